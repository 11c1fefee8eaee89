"""Deconvolution of an image into posterior samples: the main job as one function.

    result = deconvolve("galaxy.fits", "psf.fits", cutout=(76, 74, 112), samples=16, seed=0)
    result.mean, result.std, result.metrics["reduced_chi2"]
    result.save("out")

Sky, neighbours, noise and flux scale are inferred and told (`result.notes`); each can be given.  If
model and noise are right, a posterior draw is as far from the data as the truth is: the expectation
of its reduced chi-squared is 1, with standard deviation sqrt(2 / n) for n pixels.  The posterior mean
fits closer, by the mean variance of the draws seen through the operator.

Where the noise is a model learned from the instrument (`noise_model=`), a draw starts from the Gaussian of the model's
power spectrum and ends in Metropolis chains on the scores of prior and noise, whose target has no Gaussian in it:

    pi(u) = p_nu(u) p_eta(y - A u),    A = Crop Convolve(psf),

first at nu the standard deviation to which the data fix the image at best, where what is large moves, then at a quarter
of it, where what is small does; the prior's blur by nu is taken out after each by the reverse SDE.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.diagnostics.misspecification import (
    HeldOutReference,
    misspecification,
    reference_from_card,
)
from diffpost.guidance import Guidance, choose, default_guidance
from diffpost.guidance.choice import finest
from diffpost.guidance.slic import with_surrogate
from diffpost.jobs.fit import chain_metrics, fit_metrics, residuals
from diffpost.jobs.problem import Grid, ImageLike, Problem, prepare
from diffpost.jobs.setup import Setup, set_up
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Crop, LinearOperator, PixelBin
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import MALA, DPMSolver, Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["DeconvolutionResult", "deconvolve", "default_inference"]

Array = NDArray[np.float64]

_STEPS = 32
_MOVES = 64  # of the chains that learned noise ends in, half of them at each
_LEVELS = (1.0, 0.25)  # noise, in standard deviations to which the data fix the image at best
_SPAN = 2.0  # times the process's lowest, that it may be taken out
_REVERSE = 16  # steps that take it out
_JUDGED = 4  # draws by which it is judged whether the target is like what the prior knows


def default_inference(
    prior: ScoreModel, likelihood: Likelihood, steps: int | None = None, moves: int | None = None
) -> tuple[Guidance, Sampler]:
    """The guidance and the sampler that the job uses unless told otherwise: what a `Posterior` takes by
    itself (`diffpost.guidance.default_guidance`), and `sampler_of(steps)`, with a chain of `moves` after it where the
    noise is learned (0: none).

    Raises
    ------
    ValueError: moves for Gaussian noise, or fewer than 4.
    """
    start: Sampler = sampler_of(steps)
    if likelihood.noise.is_gaussian:
        if moves is not None:
            raise ValueError(
                f"got {moves} moves of a chain, which learned noise ends in; Gaussian noise needs none: leave them out, "
                "or give a noise model"
            )
        return choose(prior, likelihood).guidance, start
    guidance = default_guidance(prior, likelihood)
    count = _MOVES if moves is None else moves
    if count == 0:
        return guidance, start
    if count < 4:
        raise ValueError(f"got {count} moves of a chain; expected 0 (no chain), or 4 or more")
    precise = finest(prior, with_surrogate(likelihood))
    lowest, highest = prior.sde.nsr_range
    for i, share in enumerate(_LEVELS):
        nsr = min(max(share * (precise or 0.0), _SPAN * lowest), highest)
        part = count // 2 if i == 0 else count - count // 2
        back = DPMSolver(_REVERSE, eta=1.0)
        start = MALA(part, start, nsr=float(f"{nsr:.3g}"), reverse=back)
    return guidance, start


def sampler_of(steps: int | None) -> Sampler:
    """The default sampler, or the same with another number of noise levels."""
    return DPMSolver(_STEPS if steps is None else steps, eta=1.0)


@final
@dataclass(frozen=True)
class DeconvolutionResult:
    """Posterior samples of a deconvolution and everything that led to them.

    samples: draws on the whole grid of the model, (n, 1, H, W), in flux per model pixel.
    problem: what was deconvolved; grid: where the cutout lies on the grid of the model.
    likelihood: of the data, in their units; prior: with the flux scale that was used.
    metrics: how well the draws fit (see `fit_metrics`), under misspecification whether they are like what the prior
        knows (see `likeness`), and under chain how a chain went; timings: in seconds; title: of the picture.
    """

    samples: Samples
    problem: Problem
    grid: Grid
    likelihood: Likelihood
    prior: ScoreModel
    guidance: Guidance
    sampler: Sampler
    metrics: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)
    title: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found and done, in words."""
        return self.problem.notes

    def _map(self, values: Tensor) -> Array:
        rows, columns = self.grid.region
        out: Array = values[..., 0, rows, columns].double().numpy()
        # Flux per pixel, unless the unit is per solid angle.
        return out * self.problem.oversample**2 if self.problem.surface_brightness else out

    @property
    def images(self) -> Array:
        """(n, h K, w K) draws over the cutout, in the unit of the data."""
        return self._map(self.samples.x)

    @property
    def mean(self) -> Array:
        """(h K, w K) posterior mean over the cutout."""
        return self._map(self.samples.mean)

    @property
    def std(self) -> Array:
        """(h K, w K) posterior standard deviation over the cutout."""
        return self._map(self.samples.std)

    def quantile(self, q: float | Sequence[float]) -> Array:
        """Posterior quantiles over the cutout."""
        return self._map(self.samples.quantile(q))

    @property
    def residual(self) -> Array:
        """(h, w) (data - model of the posterior mean) / sigma; NaN where there is no data."""
        return residuals(self.likelihood, self.samples.mean[None], self.problem, self.grid)[0]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all products into a folder, atomically (see `diffpost.jobs.outputs`).

        Raises
        ------
        FileExistsError: the folder exists and overwrite is False.
        """
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(path)
        folder.check(overwrite=overwrite)
        folder.write(self)


def deconvolve(
    image: ImageLike,
    psf: ImageLike,
    noise: float | ImageLike | None = None,
    *,
    prior: str | os.PathLike[str] | ScoreModel = "galaxies-64",
    samples: int = 16,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    margin: int | None = None,
    steps: int | None = None,
    moves: int | None = None,
    **target: Any,
) -> DeconvolutionResult:
    """Draw posterior samples of the image behind a blurred, noisy one.

    Parameters
    ----------
    image: FITS file, `FitsImage` or array (h, w), linear in flux; NaN marks missing pixels.
    psf: FITS file, `FitsImage` or array; see `diffpost.jobs.psf.prepare_psf` for what is done to it.
    noise: standard deviation per pixel, as a number or a map (inf and NaN mask); default: an ERR or RMS
        extension, a keyword, or the sky.
    prior: name, folder, or a score model of one-channel images.
    samples: number of draws; seed: of the draws; batch_size: draws computed together.
    sampler, guidance: default as `default_inference` chooses.
    steps: noise levels of the default sampler.
    moves: of the chain in which a draw ends under a noise model, 64 by default; 0 leaves the chain out.
    checkpoint: folder for finished draws; the same call goes on from there.
    margin: image pixels that the model reaches beyond the cutout; default: what holds 90% of the PSF.
    target: the keywords of `diffpost.jobs.problem.prepare`: cutout=(x, y, size) or center=(ra, dec) and
        size; weight, a map of the inverse variance instead of `noise` (zeros, inf and NaN mask); hdu,
        plane; oversample=1; psf_oversample, psf_background, psf_plane, recentre_psf;
        background="smooth" | "constant" | "none"; keep_neighbours; exptime; psf_error; scale, the flux
        per model pixel that the prior calls 1, or a rule to infer it by (`SmoothedPeak`); noise_model, the folder of a
        model of `diffpost train-noise` or a `LearnedNoise` in the image's unit, instead of `noise`, with sky_std, the
        standard deviation of the blank sky to which a folder's model is scaled.  By default the
        rule is the one in the prior's card; where it states none, the prior's own units stand (its
        `scale` and `offset`), and a note says so.

    Raises
    ------
    FileNotFoundError, ValueError: for inputs that cannot be used; TypeError: an unknown keyword.
    """
    start = time.perf_counter()
    setup = set_up(prepare(image, psf, noise, **target), load(prior), margin)
    return solve(
        setup,
        samples=samples,
        sampler=sampler,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        checkpoint=checkpoint,
        steps=steps,
        moves=moves,
        prepared=time.perf_counter() - start,
    )


def solve(
    setup: Setup,
    *,
    samples: int = 16,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    steps: int | None = None,
    moves: int | None = None,
    prepared: float = 0.0,
    title: str = "",
    announce: Callable[[str], None] | None = None,
) -> DeconvolutionResult:
    """Draw the samples of a problem that was set up; arguments as for `deconvolve`.

    steps: noise levels of the default sampler; announce: is told, before the sampling, what is going to be done.
    """
    if samples < 1:
        raise ValueError(f"got {samples} samples; expected at least 1")
    problem, grid, fitted = setup.problem, setup.grid, setup.prior
    likelihood = build_likelihood(problem, grid)
    if sampler is not None and (steps, moves) != (None, None):
        raise ValueError(
            f"got a sampler and steps={steps}, moves={moves} of the default one; give one or the other"
        )
    chosen_guidance, chosen_sampler = default_inference(fitted, likelihood, steps, moves)
    guidance = guidance or chosen_guidance
    sampler = sampler or chosen_sampler
    reference = reference_from_card(getattr(fitted, "card", None))
    if announce is not None:
        announce(
            f"sampling: {samples} draws on {grid.shape[1]} x {grid.shape[0]} pixels, "
            f"{guidance!r}, {sampler!r}"
        )
    start = time.perf_counter()
    draws = sample(
        Posterior(fitted, likelihood, guidance),
        samples,
        sampler,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
    )
    sampled = time.perf_counter() - start
    metrics = fit_metrics(problem, grid, likelihood, draws)
    if "acceptance" in draws.extras:
        metrics["chain"] = chain_metrics(draws, sampler)
    metrics["misspecification"] = None if reference is None else likeness(draws, fitted, reference)
    return DeconvolutionResult(
        samples=draws,
        problem=problem,
        grid=grid,
        likelihood=likelihood,
        prior=fitted,
        guidance=guidance,
        sampler=sampler,
        metrics=metrics,
        timings={"prepare": prepared, "sample": sampled},
        title=title,
    )


# Parts ----------------------------------------------------------------------------------------


def load(prior: str | os.PathLike[str] | ScoreModel) -> ScoreModel:
    """The prior by name or folder.

    Raises
    ------
    ValueError: it is not of one-channel images.
    """
    if not isinstance(prior, ScoreModel):
        from diffpost.io.checkpoints import load_prior

        prior = load_prior(prior)
    if len(prior.shape) != 3 or prior.shape[0] != 1:
        raise ValueError(
            f"the prior is of images of shape {tuple(prior.shape)}; expected (1, H, W): one channel"
        )
    return prior


def build_operator(problem: Problem) -> LinearOperator:
    """PixelBin(K) Convolve(psf), from the grid of the model to that of the data with its margin."""
    blurred = Convolve(torch.from_numpy(problem.psf.kernel).float())
    k = problem.oversample
    return blurred if k == 1 else PixelBin(k) @ blurred


def build_likelihood(problem: Problem, grid: Grid) -> Likelihood:
    """The likelihood on the whole grid at the sampling of the data.

    The margin and pixels without data have infinite variance, which keeps the operator one that is
    nearly diagonal in Fourier space. Learned noise has no infinite variance: the operator ends in a crop to
    the cutout.
    """
    operator = build_operator(problem)
    k = problem.oversample
    rows, columns = grid.data_region(k)
    if problem.noise_model is not None:
        y = torch.from_numpy(problem.data).float()[None]
        window = Crop(rows.start, columns.start, *problem.data.shape)
        return Likelihood(y, window @ operator, problem.noise_model)
    shape = (1, grid.shape[0] // k, grid.shape[1] // k)
    y, std = torch.zeros(shape), torch.full(shape, torch.inf)
    y[0, rows, columns] = torch.from_numpy(np.where(problem.seen, problem.data, 0.0)).float()
    std[0, rows, columns] = torch.from_numpy(problem.std).float()
    return Likelihood(y, operator, GaussianNoise(std=std))


def likeness(draws: Samples, prior: ScoreModel, reference: HeldOutReference) -> dict[str, Any]:
    """Whether the first draws are like what the prior knows, as JSON values (see `diffpost.diagnostics.misspecification`).

    p_value: the share of held-out images as strange; statistic: in standard deviations; loudest: what is strange.
    """
    few = Samples(draws.x[:_JUDGED]) if draws.log_weights is None else draws
    found = misspecification(few, prior, reference=reference)
    return {
        "p_value": float(found.p_value),
        "statistic": float(found.statistic),
        "loudest": found.loudest[0],
        "reference_images": len(reference),
    }


def prior_hash(prior: ScoreModel) -> str:
    """SHA-256 of a prior's weights, or of its description when it has none."""
    digest = hashlib.sha256(repr(type(prior)).encode())
    net = getattr(prior, "net", None)
    if isinstance(net, torch.nn.Module):
        for name, value in sorted(net.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    else:
        for name, value in sorted(vars(prior).items()):
            if isinstance(value, Tensor):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
