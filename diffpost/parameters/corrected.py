r"""Collapsed chains, corrected towards the true prior of images.

What :func:`sample_collapsed <diffpost.parameters.collapsed.sample_collapsed>` leaves out is the log ratio of evidences,

    r(z) = log p(y | theta(z)) - log p_G(y | theta(z)),

of the prior of images and the Gaussian in its place. Its gradient can be seen: for x drawn from p(x | theta, y), by
Fisher's identity,

    grad r(z) = E[g] - grad log p_G(theta(z) | y),      g = grad_z [log p(y | x, theta(z)) + log p(z)].

So every image that is drawn says, with noise, which way theta should go. In rounds, r is fitted as a quadratic to the
gradients of all images so far, a linear regression in coordinates w in which the draws have unit covariance,

    r = a v + v B v/2,     v = w/(1 + |w|^2/c^2)^1/2,     B symmetric,     a ~ N(0, 3^2),  B_ij ~ N(0, 1/2^2) beforehand,

which beyond c = 4 standard deviations, where nothing is seen, stays what it is; and the next round's chains follow
p_G e^r. In the last round every chain follows a draw of (a, B) from the posterior of the regression, so that the draws
of theta contain what is not known of r; R-hat and effective sample sizes then count the chains, not the moves, where
that dominates.

Exact where r is quadratic over the bulk of the posterior, in the limit of many images and as far as they are exact
draws; for a Gaussian prior of images r is 0 and the fit finds it. It asks nothing of the prior but draws, hence the scores
at all levels of noise, where :func:`sample_transported <diffpost.parameters.transported.sample_transported>` relies on
the lowest alone.

The gradient is what a strong likelihood makes of the prior's weak pull on the image, and so it magnifies errors. If theta
is known rho times better with the image than without it, n images leave a statistical error of the mean of about
1/(rho n^1/2) standard deviations, and a sampler of images that is off by a share f of their standard deviation one of
f/rho, which no number of images shows. Where rho is a tenth, take a sampler that is good to a percent, or believe
no shift below a standard deviation. (On the eight galaxies of :mod:`diffpost.parameters.collapsed`, with rho of a fifth for
the shift and the default sampler, it came to 2.4 standard deviations rms from 3, and the width stayed.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.guidance.base import Guidance
from diffpost.parameters.chains import Chains, run_chains, value_and_gradient
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.parameters.collapsed import (
    check_one_problem,
    chosen_draws,
    conditional_images,
    marks,
    response,
    starting_points,
)
from diffpost.parameters.evidence import Evidence
from diffpost.parameters.hmc import HMC
from diffpost.parameters.result import JointSamples
from diffpost.parameters.shift import image_gradients
from diffpost.random import derived_seed, normal
from diffpost.samplers import Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["sample_corrected"]

# standard deviations of a and of B beforehand, in units of the posterior's
_SHIFT, _BEND = 3.0, 0.5
_MOST = 0.7  # of the posterior's precision that B may take away
_REACH = 4.0  # standard deviations to which the quadratic is believed
_STREAM = 24_500


@final
@dataclass(frozen=True, eq=False)
class _Ratio:
    """r(z), w = R^-1 (z - centre); one for all chains, or one for each.

    Attributes:
        centre: (P,).
        root: (P, P) lower triangular R.
        a: (1 or B, P).
        b: (1 or B, P, P).
    """

    centre: Tensor
    root: Tensor
    a: Tensor
    b: Tensor

    def __call__(self, z: Tensor) -> Tensor:
        w = torch.linalg.solve_triangular(self.root, (z - self.centre).T, upper=False).T
        v = w / (1 + w.square().sum(1, keepdim=True) / _REACH**2).sqrt()
        bent = (self.b @ v[..., None])[..., 0]
        return (self.a * v).sum(1) + 0.5 * (bent * v).sum(1)


@final
@dataclass(frozen=True, eq=False)
class _Fit:
    """The regression's posterior.

    Attributes:
        centre, root: of w.
        mean: (Q,) of a and of the lower triangle of B.
        cov: (Q, Q).
    """

    centre: Tensor
    root: Tensor
    mean: Tensor
    cov: Tensor

    @property
    def error(self) -> Tensor:
        """(P,) of a."""
        return self.cov.diagonal()[: len(self.centre)].sqrt()

    def ratio(self, seed: int | None = None, chains: int = 1) -> _Ratio:
        """r by the mean, or by a draw for each chain."""
        beta = self.mean.expand(chains, -1)
        if seed is not None:
            size = (len(self.mean),)
            z = normal(seed, torch.arange(chains), 0, size, torch.float64, stream=_STREAM)
            beta = beta + z.to(beta) @ torch.linalg.cholesky(self.cov).T
        p = len(self.centre)
        i, j = torch.tril_indices(p, p)
        b = beta.new_zeros(chains, p, p)
        b[:, i, j] = beta[:, p:]
        b[:, j, i] = beta[:, p:]
        values, vectors = torch.linalg.eigh(b)
        b = (vectors * values.clamp_max(_MOST)[:, None]) @ vectors.mT
        return _Ratio(self.centre, self.root, beta[:, :p], b)


def _fitted(z: Tensor, slopes: Tensor, centre: Tensor, cov: Tensor) -> _Fit:
    """The regression of slopes (n, P), grad_z r with noise, on places z (n, P)."""
    p = z.shape[1]
    root = torch.linalg.cholesky(cov)
    w = torch.linalg.solve_triangular(root, (z - centre).T, upper=False).T
    seen = slopes @ root
    i, j = torch.tril_indices(p, p)
    design = seen.new_zeros(len(z), p, p + len(i))
    design[:, torch.arange(p), torch.arange(p)] = 1
    columns = torch.arange(len(i)) + p
    stretch = (1 + w.square().sum(1) / _REACH**2).sqrt()[:, None]
    v = w / stretch
    design[:, i, columns] = v[:, j]
    design[:, j, columns] = v[:, i]  # B is symmetric
    # dv/dw, which is symmetric
    eye = torch.eye(p, dtype=w.dtype, device=w.device)
    bend = (eye - v[:, :, None] * v[:, None] / _REACH**2) / stretch[..., None]
    design = bend @ design
    # places of earlier rounds, far from where the draws are now, count less
    weight = 1 / (1 + w.square().sum(1) / (4 * p))
    prior = torch.cat([seen.new_full((p,), _SHIFT), seen.new_full((len(i),), _BEND)]) ** -2
    noise = seen.var(0).clamp_min(1e-12)
    mean = cov_beta = torch.zeros(0)
    for _ in range(3):  # the noise is that of the residuals
        scaled = design * (weight[:, None] / noise)[..., None]
        precision = torch.einsum("npq,npr->qr", scaled, design) + torch.diag(prior)
        inverse = torch.linalg.inv(precision)
        mean = inverse @ torch.einsum("npq,np->q", scaled, seen)
        residual = seen - design @ mean
        noise = (weight[:, None] * residual.square()).sum(0) / weight.sum()
        # the errors of each place as they are, since they depend on theta (White 1980)
        score = torch.einsum("npq,np->nq", scaled, residual)
        cov_beta = inverse @ (score.T @ score + torch.diag(prior)) @ inverse
    return _Fit(centre, root, mean, 0.5 * (cov_beta + cov_beta.T))


def sample_corrected(
    evidence: Evidence,
    image_prior: ScoreModel,
    kernel: HMC | None = None,
    *,
    rounds: int = 3,
    chains: int = 16,
    images: int = 16,
    restarts: int = 16,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> JointSamples:
    """Draws theta by collapsed chains whose evidence is corrected by images of the diffusion posterior.

    Args:
        evidence: under a Gaussian of images, without an amplitude.
        image_prior: of images.
        kernel: of the chains; None is HMC(draws=200, warmup=150).
        rounds: of correction, each with images of its own, before the last chains; 0 is ``sample_collapsed``.
        chains: how many; each follows a correction of its own in the end.
        images: drawn for each chain in every round, and of the last chains.
        restarts: of the search for modes.
        guidance: of the images' posterior; None chooses.
        sampler: of it; None is DPMSolver(32, eta=1).
        seed: of everything.
        batch_size: images computed together.
        checkpoint: a folder, from which the same call goes on.
        progress: bars.

    Returns:
        JointSamples: extras: ``step_size``; info: ``shift`` and ``error``, lists of each round's mean shift of every
        parameter in standard deviations, and its standard error. A last shift of several standard deviations needs more
        rounds. :func:`evidence_shift <diffpost.parameters.shift.evidence_shift>` of the result is zero within
        its error if nothing is left to correct.

    Raises:
        ValueError: an evidence with an amplitude, fewer than 2 images in a chain, or as ``sample_collapsed``.
    """
    kernel = HMC(200, 150) if kernel is None else kernel
    check_one_problem(evidence.likelihood, "sample_corrected")
    if evidence.amplitude is not None:
        raise ValueError(
            f"sample_corrected: the evidence has an amplitude, {evidence.amplitude!r}, which the prior of images does "
            "not know. Fix it: Evidence(likelihood, prior, gaussian.scaled(factor))."
        )
    if not 2 <= images <= kernel.draws or rounds < 0 or chains < 2:
        raise ValueError(
            f"sample_corrected(images={images}, rounds={rounds}, chains={chains}): expected 2 to {kernel.draws} images, "
            "the draws of a chain, no negative rounds, and 2 chains or more."
        )
    prior = evidence.prior
    info: dict[str, Any] = {
        "diffpost": __version__,
        "method": "corrected",
        "prior": prior.to_dict(),
        "modes_of_images": len(evidence.gaussian.std),
        "kernel": kernel.describe(),
        "rounds": rounds,
        "chains": chains,
        "images": images,
        "restarts": restarts,
        "guidance": repr(guidance),
        "sampler": repr(sampler),
        "seed": seed,
    }
    folder = None
    if checkpoint is not None:
        folder = Checkpoint(checkpoint, info, [*marks(evidence), *response(image_prior)])
    begun = None if folder is None else folder.load("start")
    if begun is None:
        found = starting_points(evidence, chains, restarts=restarts, seed=seed, progress=progress)
        begun = {"z": found.z, "covariance": found.covariance}
        if folder is not None:
            folder.save("start", begun)
    device = evidence.likelihood.y.device
    z, covariance = begun["z"].to(device), begun["covariance"].to(device)
    places: list[Tensor] = []
    slopes: list[Tensor] = []
    ratio: _Ratio | None = None
    shifts: list[list[float]] = []
    errors: list[list[float]] = []
    for stage in range(rounds + 1):
        path = None if checkpoint is None else Path(checkpoint) / f"round-{stage}"
        run, samples = _round(
            evidence,
            ratio,
            dataclasses.replace(kernel, covariance=covariance),
            z,
            images,
            image_prior,
            guidance,
            sampler,
            derived_seed(seed, "round", stage),
            batch_size,
            path,
            progress,
        )
        if stage == rounds:
            break
        z, covariance = run.z[:, -1], run.covariance
        chain, draw = samples.extras["chain"], samples.extras["draw"]
        place = run.z[chain.to(device), draw.to(device)]
        g = image_gradients(evidence.likelihood, prior, place, samples.x)
        _, known = value_and_gradient(evidence, place)
        places.append(place)
        slopes.append(g - known)
        centre = run.z.flatten(0, 1).mean(0)
        fit = _fitted(torch.cat(places), torch.cat(slopes), centre, covariance)
        before = torch.zeros_like(fit.mean[: len(prior)])
        if ratio is not None:  # what this round adds to the last
            _, slope = value_and_gradient(ratio, centre[None].expand(chains, -1))
            before = slope[0] @ fit.root
        shifts.append((fit.mean[: len(prior)] - before).tolist())
        errors.append(fit.error.tolist())
        last = stage + 1 == rounds
        ratio = fit.ratio(derived_seed(seed, "ratios") if last else None, chains)
    return JointSamples(
        names=prior.names,
        theta=prior.unwrapped(prior.constrain(run.z)).cpu(),
        acceptance=run.acceptance.cpu(),
        nonfinite=run.nonfinite.cpu(),
        samples=samples,
        log_prob=run.log_prob.cpu(),
        extras={} if run.step_size is None else {"step_size": run.step_size.cpu()},
        info=info | {"shift": shifts, "error": errors},
    )


def _round(
    evidence: Evidence,
    ratio: _Ratio | None,
    kernel: HMC,
    z: Tensor,
    images: int,
    image_prior: ScoreModel,
    guidance: Guidance | None,
    sampler: Sampler | None,
    seed: int,
    batch_size: int | None,
    path: Path | None,
    progress: bool,
) -> tuple[Chains, Samples]:
    """Chains on the evidence with a correction, and images of some of their draws."""

    def density(z: Tensor) -> Tensor:
        return evidence(z) if ratio is None else evidence(z) + ratio(z)

    run = run_chains(
        density,
        kernel,
        z,
        derived_seed(seed, "chains"),
        checkpoint=None if path is None else path / "chains",
        progress=progress,
    )
    theta = evidence.prior.unwrapped(evidence.prior.constrain(run.z))
    chosen, told = chosen_draws(theta, images)
    samples = conditional_images(
        evidence,
        chosen,
        image_prior,
        guidance,
        sampler,
        derived_seed(seed, "images"),
        batch_size,
        None if path is None else path / "images",
        progress,
        told,
    )
    return run, samples
