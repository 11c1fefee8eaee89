r"""Image and nuisances in turns: self-calibration that keeps its uncertainty.

    x     ~ p(x | theta, y)        a draw of the image from data corrected by theta
    theta ~ p(theta | x, y)        a draw of gains, offset and scale given the image's visibilities

The second is proposed from the linearised Gaussian about the best fit (:mod:`diffpost.physics.nuisances`) and, with ``exact``, accepted
with the probability of an independence sampler (Tierney 1994, Annals of Statistics 22, 1701),

    min(1, [p(theta' | x, y) / q(theta')] / [p(theta | x, y) / q(theta)]),

for each group of each nuisance alone, so that the turns leave the joint posterior as it is, as far as the draws of the image
are exact. Without it the Gaussian stands for the posterior; so it does during the warm-up, since the Gaussian has next to no density
where chains begin, from where no test would let them go.

What gains and image can trade (the flux with the mean log amplitude, a shift with a gradient of phases) moves slowly: a turn goes as far
as one is known given the other. R-hat and effective sizes tell (``convergence``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.diagnostics.chains import Convergence, convergence
from diffpost.guidance.base import Guidance
from diffpost.likelihood import Likelihood
from diffpost.linalg import ConvergenceWarning
from diffpost.noise import GaussianNoise
from diffpost.operators.base import Operator
from diffpost.physics.nuisances import VisibilityNuisance
from diffpost.posterior import Posterior
from diffpost.random import derived_seed, uniform
from diffpost.sample import progress_bar, sample
from diffpost.samplers import DPMSolver, Sampler
from diffpost.score import ScoreModel

__all__ = ["ImageStep", "SelfCalibration", "posterior_step", "self_calibrate"]

_STREAM = 24_850  # of the tests of acceptance
_TOL = 1e-3  # of the fits, in posterior standard deviations

ImageStep = Callable[[Likelihood, int], Tensor]
"""Draws images (chains, *shape), row b given row b of the likelihood's data, with a seed."""


@final
@dataclass(frozen=True, eq=False)
class SelfCalibration:
    """Draws of images and nuisances, sweep by sweep.

    Attributes:
        images: (chains, kept, *shape), every ``thin``-th sweep.
        theta: of each nuisance, (chains, sweeps, G, P).
        names: of the P parameters of each.
        chi2: (chains, sweeps) of the data, given image and nuisances; flux: (chains, sweeps) sum of the image.
        acceptance: (chains, nuisances) mean over sweeps and groups.
        unconverged: (chains, nuisances) kept sweeps whose fit did not converge.
    """

    images: Tensor
    theta: tuple[Tensor, ...]
    names: tuple[tuple[str, ...], ...]
    chi2: Tensor
    flux: Tensor
    acceptance: Tensor
    unconverged: Tensor

    def convergence(self, chains: slice | None = None) -> dict[str, Convergence]:
        """R-hat and effective sizes of chi2, flux, and of theta of each nuisance (theta_0: (G, P), ...).

        Args:
            chains: those of one set of data, where there are several; None: all.

        Raises:
            ImportError: ArviZ is not installed.
            ValueError: fewer than 2 chains or 4 sweeps.
        """
        chosen = slice(None) if chains is None else chains
        found = {"chi2": convergence(self.chi2[chosen]), "flux": convergence(self.flux[chosen])}
        for k, theta in enumerate(self.theta):
            found[f"theta_{k}"] = convergence(theta[chosen])
        return found


def posterior_step(
    image_prior: ScoreModel,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    batch_size: int | None = None,
) -> ImageStep:
    """Images by the library's sampler: ``sample(Posterior(image_prior, likelihood, guidance), ...)``.

    Args:
        image_prior: of x.
        guidance: None chooses.
        sampler: None is ``DPMSolver(32, eta=1)``; ``SplitGibbs`` needs no guidance.
        batch_size: images computed together.
    """
    chosen = DPMSolver(32, eta=1.0) if sampler is None else sampler

    def step(likelihood: Likelihood, seed: int) -> Tensor:
        posterior = Posterior(image_prior, likelihood, guidance)
        rows = likelihood.rows
        if rows is None:
            raise ValueError(
                "posterior_step: got data without a batch axis; expected a row for each chain."
            )
        return sample(posterior, rows, chosen, seed, batch_size, progress=False).x

    return step


def self_calibrate(
    vis: Tensor,
    weight: Tensor,
    operator: Operator,
    nuisances: VisibilityNuisance | Sequence[VisibilityNuisance],
    image_step: ImageStep,
    *,
    chains: int = 4,
    sweeps: int = 100,
    warmup: int = 50,
    thin: int = 1,
    start: Sequence[Tensor] | None = None,
    exact: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> SelfCalibration:
    """Gibbs sampling of an image and the nuisances of its visibilities, V = h_1 h_2 ... A x + n.

    Args:
        vis: data, (*uv, 2), or (chains, *uv, 2) for chains of several sets of data, Jy.
        weight: 1/sigma^2 of each part, (*uv) or (chains, *uv), 1/Jy^2.
        operator: A, from images (B, *shape) to (B, *uv, 2): ``Visibilities``, alone or after others.
        nuisances: one or several, each with a factor of its own.
        image_step: draws images given corrected data; ``posterior_step`` makes one of a prior.
        chains: computed in one batch.
        sweeps: that are kept; warmup: before them, dropped.
        thin: every so many of the sweeps kept, the image is.
        start: theta of each nuisance, (chains, G, P); None draws them from their priors, so that chains begin further apart than they
            should end.
        exact: whether a proposal is tested, after the warm-up; if not, the Gaussian about the best fit is drawn from.
        seed: of everything. The nuisances' random numbers are functions of (seed, chain, sweep), and ``image_step`` gets a seed for each sweep.
        progress: a bar.

    Raises:
        ValueError: numbers that are not positive, shapes that do not fit, or a sweep whose images are not finite (the chains are named).
    """
    for name, number, least in (
        ("chains", chains, 1),
        ("sweeps", sweeps, 1),
        ("warmup", warmup, 0),
        ("thin", thin, 1),
    ):
        if number < least:
            raise ValueError(f"self_calibrate({name}={number}): expected at least {least}.")
    parts = (nuisances,) if isinstance(nuisances, VisibilityNuisance) else tuple(nuisances)
    if not parts or any(part.uv != parts[0].uv for part in parts):
        raise ValueError(
            f"self_calibrate: got nuisances of visibilities {[part.uv for part in parts]}; expected at least one, all of the same shape."
        )
    uv = parts[0].uv
    if operator.data_shape not in (None, (*uv, 2)):
        raise ValueError(
            f"self_calibrate: the operator {operator!r} makes data {operator.data_shape}; expected {(*uv, 2)}, as the nuisances have."
        )
    ids = torch.arange(chains)
    turns = [derived_seed(seed, "nuisance", k) for k in range(len(parts))]
    if start is None:
        theta = [part.prior_draw(key, ids) for part, key in zip(parts, turns, strict=True)]
    else:
        theta = [t.double() for t in start]
    if len(theta) != len(parts) or any(len(t) != chains for t in theta):
        raise ValueError(
            f"self_calibrate: got starts {[tuple(t.shape) for t in theta]}; expected {len(parts)} of {chains} chains."
        )
    value, w = vis.double(), weight.double()
    kept: list[Tensor] = []
    traces: list[list[Tensor]] = [[] for _ in parts]
    chi2, flux = [], []
    accepted = torch.zeros(chains, len(parts), dtype=torch.float64)
    unconverged = torch.zeros(chains, len(parts), dtype=torch.int64)
    with torch.no_grad(), progress_bar(warmup + sweeps, progress) as advance:
        for sweep in range(warmup + sweeps):
            data, weights = value, w
            for part, t in zip(parts, theta, strict=True):
                data, weights = part.corrected(data, weights, t)
                weights = weights[..., 0]
            corrected = Likelihood(
                data, operator, GaussianNoise(weight=weights[..., None]), batched=True
            )
            x = image_step(corrected, derived_seed(seed, "images", sweep))
            _check_images(x, chains, sweep)
            model = operator(x).double()
            for k, part in enumerate(parts):
                seen = model
                for j, other in enumerate(parts):
                    if j != k:
                        seen = other.apply(theta[j], seen)
                stream = (turns[k], ids, sweep + 1)
                theta[k], share, converged = _turn(
                    part, value, w, seen, theta[k], stream, exact and sweep >= warmup
                )
                if sweep >= warmup:
                    accepted[:, k] += share
                    unconverged[:, k] += (~converged).long().cpu()
            done = sweep - warmup
            if done >= 0:
                for trace, t in zip(traces, theta, strict=True):
                    trace.append(t)
                for part, t in zip(parts, theta, strict=True):
                    model = part.apply(t, model)
                terms = (value - model).square().sum(-1) * w
                chi2.append(torch.where(w > 0, terms, 0.0).flatten(1).sum(1))
                flux.append(x.double().flatten(1).sum(1))
                if done % thin == 0:
                    kept.append(x)
            advance()
    if bool(unconverged.any()):
        warnings.warn(
            f"self_calibrate: {int(unconverged.sum())} of {sweeps * chains * len(parts)} fits of nuisances did not converge; narrower "
            "priors, or a better start, may be needed.",
            ConvergenceWarning,
            stacklevel=2,
        )
    return SelfCalibration(
        images=torch.stack(kept, 1),
        theta=tuple(torch.stack(trace, 1) for trace in traces),
        names=tuple(part.names for part in parts),
        chi2=torch.stack(chi2, 1),
        flux=torch.stack(flux, 1),
        acceptance=accepted / sweeps,
        unconverged=unconverged,
    )


def _turn(
    part: VisibilityNuisance,
    vis: Tensor,
    weight: Tensor,
    model: Tensor,
    theta: Tensor,
    numbers: tuple[int, Tensor, int],
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Theta given the model visibilities, the share of groups that moved (chains,), and whether the fits converged."""
    seed, ids, step = numbers
    # begun at the prior's mean, never at theta: the proposal must not depend on where the chain is
    fitted = part.fit(vis, weight, model, tol=_TOL)
    new = fitted.draw(seed, ids, step)
    if not exact:
        return new, torch.ones(len(ids), dtype=torch.float64), fitted.converged
    gain = part.log_posterior(new, vis, weight, model) - fitted.log_prob(new)
    gain -= part.log_posterior(theta, vis, weight, model) - fitted.log_prob(theta)
    level = uniform(seed, ids, step, (part.groups,), torch.float64, stream=_STREAM).to(gain)
    taken = level.log() < gain
    return (
        torch.where(taken[..., None], new, theta),
        taken.double().mean(1).cpu(),
        fitted.converged,
    )


def _check_images(x: Tensor, chains: int, sweep: int) -> None:
    if len(x) != chains:
        raise ValueError(
            f"self_calibrate: image_step gave {tuple(x.shape)}; expected {chains} images, one for each chain."
        )
    good = x.flatten(1).isfinite().all(1)
    if not bool(good.all()):
        lost = torch.nonzero(~good)[:, 0].tolist()
        raise ValueError(
            f"self_calibrate: the images of chains {lost} are not finite in sweep {sweep}; the chains have diverged. Narrower priors of the "
            "nuisances, or a start, may help."
        )
