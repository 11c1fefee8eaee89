r"""Parameters first, with the image marginalised; then the image.

    theta ~ p_G(theta | y) ~ p(theta) p_G(y | theta),        x ~ p(x | theta, y),

where p_G(y | theta) is the evidence under a Gaussian of images (:mod:`diffpost.parameters.evidence`). Because the image
is integrated out, a chain of theta does not drag an image behind it, and mixes as well as if there were none.

If images are Gaussian both lines are exact, and so is the joint draw. For a diffusion prior of images the second line
may follow it; the first is then that of the Gaussian in its place, and what is missing is the factor
p(y | theta)/p_G(y | theta). What the data decide hardly depends on it; what they leave to the prior of images does: of
eight galaxies of galaxies-32 behind a PSF of unknown width and shift, at peaks of ten times the noise, the shift, which only
the galaxy's place tells, came out 3 standard deviations (rms) from the truth, the width 1.5. :func:`evidence_shift <diffpost.parameters.shift.evidence_shift>` estimates how far it would
move theta, and :func:`sample_transported <diffpost.parameters.transported.sample_transported>` draws with it.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.guidance.base import Guidance
from diffpost.parameters.chains import Kernel, run_chains
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.parameters.evidence import Evidence
from diffpost.parameters.family import ParametricLikelihood, Values
from diffpost.parameters.hmc import HMC
from diffpost.parameters.modes import Modes, find_modes
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.result import JointSamples
from diffpost.posterior import Posterior
from diffpost.random import derived_seed, normal
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["Start", "sample_collapsed", "starting_points"]

# standard deviations of the mode's curvature: wider than the target, for R-hat to tell
_SCATTER = 1.5
_WORSE = 10.0  # of log density, up to which another mode is worth chains of its own
_NEAR = 0.1  # in z: modes that are one
_HALVINGS = 8
_DRAWS = 64  # images whose conditional is held at once
_STREAM = 24_300


@dataclasses.dataclass(frozen=True)
class Start:
    """Where chains begin.

    Attributes:
        z: (chains, P) unconstrained coordinates.
        covariance: (P, P) of z by the curvature at the best mode.
        modes: how many modes chains begin at.
    """

    z: Tensor
    covariance: Tensor
    modes: int


def starting_points(
    evidence: Evidence, chains: int, *, restarts: int = 16, seed: int = 0, progress: bool = True
) -> Start:
    """Chains scattered about the modes that restarts from draws of the prior find.

    Chains take turns at all modes whose density comes within e^-10 of the best, so that R-hat tells where they do
    not mix.

    Args:
        evidence: the density.
        chains: how many.
        restarts: of the search.
        seed: of restarts and scatter.
        progress: a bar.

    Raises:
        ValueError: as :func:`find_modes <diffpost.parameters.modes.find_modes>`.
    """
    prior = evidence.prior
    first = prior.unconstrain(prior.sample(restarts, derived_seed(seed, "restarts")))
    data = evidence.likelihood.y
    modes = find_modes(evidence, first.to(data.device), progress=progress)
    kept = distinct_modes(modes, prior)
    z = kept[torch.arange(chains) % len(kept)]
    return Start(scattered(evidence, z, modes.covariance, seed), modes.covariance, len(kept))


def distinct_modes(modes: Modes, prior: ParameterPrior) -> Tensor:
    """(n, P) different modes, as near to the best as chains are begun at, best first; angles modulo their period."""
    periods = [p.z_period for p in prior.priors]
    kept: list[Tensor] = []
    for z in modes.z[modes.log_prob >= modes.log_prob[0] - _WORSE]:
        apart = True
        for other in kept:
            off = [
                abs(v) if t is None else abs(math.remainder(v, t))
                for v, t in zip((z - other).tolist(), periods, strict=True)
            ]
            apart = apart and max(off) > _NEAR
        if apart:
            kept.append(z)
    return torch.stack(kept)


def scattered(
    evidence: Evidence,
    z: Tensor,
    covariance: Tensor,
    seed: int,
    *,
    room: float = 2.0,
    stream: int = _STREAM,
) -> Tensor:
    """z (chains, P) with scatter wider than the target; less of it where the curvature promises more room than there is.

    room: what a chain's log density may fall by, in units of what a normal of that covariance would lose on average;
    stream: of the random numbers.
    """
    ids = torch.arange(len(z))
    noise = normal(seed, ids, 0, (z.shape[1],), torch.float64, stream=stream).to(z)
    noise = noise @ torch.linalg.cholesky(covariance).T
    size = torch.full_like(z[:, :1], _SCATTER)
    with torch.no_grad():
        least = evidence(z) - room * _SCATTER**2 * z.shape[1] / 2
        for _ in range(_HALVINGS):
            lost = ~(evidence(z + size * noise) >= least)
            if not bool(lost.any()):
                return z + size * noise
            size = torch.where(lost[:, None], size / 2, size)
    return z + torch.where(lost[:, None], 0.0, size) * noise


def sample_collapsed(
    evidence: Evidence,
    kernel: Kernel[Any] | None = None,
    *,
    chains: int = 8,
    start: Tensor | None = None,
    restarts: int = 16,
    images: int = 8,
    image_prior: ScoreModel | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> JointSamples:
    """Draws theta with the image marginalised, and images for some of the draws.

    Exact for a Gaussian prior of images, ``image_prior=None``. With another one theta follows the Gaussian of the
    evidence, and the images are as good as guidance and sampler.

    Args:
        evidence: p(y | theta) under a Gaussian of images, and the prior of theta.
        kernel: of the chains; None is HMC(draws=200, warmup=150). One without a covariance begins with that of
            the best mode's curvature.
        chains: how many; more than one for R-hat.
        start: (chains, P) theta at which they begin; None finds modes by ``restarts``.
        restarts: of the search for modes.
        images: drawn for each chain, at evenly spaced draws; 0 for none.
        image_prior: a score model of images; None draws them from the Gaussian of the evidence, exactly.
        guidance: of its posterior; None chooses.
        sampler: of its posterior; None is DPMSolver(32, eta=1).
        seed: of everything.
        batch_size: images computed together; None is all of them.
        checkpoint: a folder, from which the same call goes on.
        progress: bars.

    Returns:
        JointSamples: with ``log_prob`` the collapsed log density in unconstrained coordinates. extras:
        ``step_size`` where the kernel has one.

    Raises:
        ValueError: a start of another shape or outside the prior's bounds; more images than draws; or as
            :func:`run_chains <diffpost.parameters.chains.run_chains>`.
    """
    kernel = HMC(200, 150) if kernel is None else kernel
    prior = evidence.prior
    if not 0 <= images <= kernel.draws:
        raise ValueError(
            f"sample_collapsed(images={images}): expected 0 to {kernel.draws}, the draws of a chain."
        )
    check_one_problem(evidence.likelihood, "sample_collapsed")
    if start is not None and start.shape != (chains, len(prior)):
        raise ValueError(
            f"sample_collapsed: got a start {tuple(start.shape)}; expected ({chains}, {len(prior)}), a row a chain."
        )
    info: dict[str, Any] = {
        "diffpost": __version__,
        "method": "collapsed",
        "prior": prior.to_dict(),
        "amplitude": evidence.amplitude,
        "modes_of_images": len(evidence.gaussian.std),
        "kernel": kernel.describe(),
        "chains": chains,
        "restarts": restarts if start is None else None,
        "start": None if start is None else start.tolist(),
        "seed": seed,
    }
    folder = None if checkpoint is None else Checkpoint(checkpoint, info, marks(evidence))
    begun = None if folder is None else folder.load("start")
    if begun is None:
        if start is None:
            found = starting_points(
                evidence, chains, restarts=restarts, seed=seed, progress=progress
            )
            begun = {"z": found.z, "covariance": found.covariance}
        else:
            begun = {"z": prior.unconstrain(start.double())}
        if folder is not None:
            folder.save("start", begun)
    if isinstance(kernel, HMC) and kernel.covariance is None and "covariance" in begun:
        kernel = dataclasses.replace(kernel, covariance=begun["covariance"])
    run = run_chains(
        evidence,
        kernel,
        begun["z"].to(evidence.likelihood.y.device),
        derived_seed(seed, "chains"),
        checkpoint=None if checkpoint is None else Path(checkpoint) / "chains",
        progress=progress,
    )
    theta = prior.unwrapped(prior.constrain(run.z))
    samples = None
    if images:
        chosen, told = chosen_draws(theta, images)
        if image_prior is None:
            samples = _gaussian_images(evidence, chosen, derived_seed(seed, "images"), told)
        else:
            samples = conditional_images(
                evidence,
                chosen,
                image_prior,
                guidance,
                sampler,
                derived_seed(seed, "images"),
                batch_size,
                None if checkpoint is None else Path(checkpoint) / "images",
                progress,
                told,
            )
    steps = {} if run.step_size is None else {"step_size": run.step_size.cpu()}
    return JointSamples(
        names=prior.names,
        theta=theta.cpu(),
        acceptance=run.acceptance.cpu(),
        nonfinite=run.nonfinite.cpu(),
        samples=samples,
        log_prob=run.log_prob.cpu(),
        extras=steps,
        info=info | {"evaluations": run.evaluations},
    )


def chosen_draws(theta: Tensor, images: int) -> tuple[Tensor, dict[str, Tensor]]:
    """As many evenly spaced draws of every chain, the last among them: (chains images, P), and which they are."""
    chains, draws = theta.shape[:2]
    every = torch.linspace(draws - 1, 0, images).round().long().flip(0)
    chain = torch.arange(chains).repeat_interleave(images)
    draw = every.repeat(chains)
    chosen = theta[chain.to(theta.device), draw.to(theta.device)]
    return chosen, {"theta": chosen.cpu(), "chain": chain, "draw": draw}


def check_one_problem(likelihood: ParametricLikelihood, name: str) -> None:
    """Raises a ValueError where the data have rows, each a problem of its own."""
    if likelihood.rows is not None:
        raise ValueError(
            f"{name}: the data have {likelihood.rows} rows, which are problems of their own; expected one. Run chains of "
            "many problems by run_chains, with the problem's number of chains as the kernel's group."
        )


def marks(evidence: Evidence) -> list[float]:
    """The density at three places, by which a run is known again."""
    place = torch.tensor([[-0.5], [0.0], [0.5]], dtype=torch.float64)
    z = place.expand(3, len(evidence.prior)).to(evidence.likelihood.y.device)
    with torch.no_grad():
        return [float(v) for v in evidence(z)]


def response(image_prior: ScoreModel) -> list[float]:
    """The prior's answers to a fixed image, by which it is known again."""
    dtype = torch.promote_types(image_prior.dtype, torch.float32)
    z = normal(0, torch.arange(1), 0, tuple(image_prior.shape), dtype, stream=_STREAM)
    found = []
    with torch.no_grad():
        for t in image_prior.sde.time_grid(4)[1:3]:
            x = z.to(image_prior.device) * float(image_prior.sde.sigma(t))
            answer = image_prior.to_physical(image_prior.denoise(x, t)).double()
            found += [float(answer.mean()), float(answer.square().mean().sqrt())]
    return found


def _gaussian_images(
    evidence: Evidence, theta: Tensor, seed: int, told: dict[str, Tensor]
) -> Samples:
    parts = []
    for ids in torch.arange(len(theta)).split(_DRAWS):
        given = evidence.given(theta[ids.to(theta.device)])
        parts.append(given.draw(seed, ids.to(theta.device)).cpu())
    info = {"diffpost": __version__, "sampler": "exact, for a Gaussian of images", "seed": seed}
    return Samples(torch.cat(parts), info=info, extras=told)


def conditional_images(
    evidence: Evidence,
    theta: Tensor,
    image_prior: ScoreModel,
    guidance: Guidance | None,
    sampler: Sampler | None,
    seed: int,
    batch_size: int | None,
    checkpoint: Path | None,
    progress: bool,
    told: dict[str, Tensor],
) -> Samples:
    """A draw of p(x | theta_b, y) for each theta (n, P)."""
    values = evidence.prior.values(theta)
    if evidence.amplitude is not None:
        values.pop(evidence.amplitude)
    drawn = drawn_images(
        evidence.likelihood,
        values,
        image_prior,
        guidance,
        DPMSolver(32, eta=1.0) if sampler is None else sampler,
        seed,
        batch_size,
        checkpoint=checkpoint,
        progress=progress,
    )
    return dataclasses.replace(drawn, extras=dict(drawn.extras) | told)


def drawn_images(
    likelihood: ParametricLikelihood,
    values: Values,
    image_prior: ScoreModel,
    guidance: Guidance | None,
    sampler: Sampler,
    seed: int,
    batch_size: int | None,
    *,
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Samples:
    """A draw of p(x | theta_b, y) by the diffusion posterior for each theta of a batch, by name."""
    like = torch.zeros((), dtype=image_prior.dtype, device=image_prior.device)
    given = {name: v.to(like) for name, v in values.items()}
    posterior = Posterior(image_prior, likelihood.at(given), guidance)
    count = len(next(iter(given.values())))
    return sample(posterior, count, sampler, seed, batch_size, progress, checkpoint)
