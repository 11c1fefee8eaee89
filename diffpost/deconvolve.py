"""Deconvolution of an image into posterior samples: the main job as one function.

    result = deconvolve("galaxy.fits", "psf.fits", cutout=(76, 74, 112), samples=16, seed=0)
    result.mean, result.std, result.metrics["reduced_chi2"]
    result.save("out")

Sky, neighbours, noise and flux scale are inferred and told (`result.notes`); each can be given.  If
model and noise are right, a posterior draw is as far from the data as the truth is: the expectation
of its reduced chi-squared is 1, with standard deviation sqrt(2 / n) for n pixels.  The posterior mean
fits closer, by the mean variance of the draws seen through the operator.
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
from diffpost.guidance import Guidance, choose
from diffpost.jobs.problem import Grid, ImageLike, Problem, prepare
from diffpost.jobs.setup import Setup, set_up
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, LinearOperator, PixelBin
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["DeconvolutionResult", "deconvolve", "default_inference"]

Array = NDArray[np.float64]

_STEPS = 32
_JUDGED = 4  # draws by which it is judged whether the target is like what the prior knows


def default_inference(prior: ScoreModel, likelihood: Likelihood) -> tuple[Guidance, Sampler]:
    """The guidance and the sampler that the job uses unless told otherwise: what a `Posterior` takes by
    itself (`diffpost.guidance.choose`), and `sampler_of(None)`.
    """
    return choose(prior, likelihood).guidance, sampler_of(None)


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
    metrics: how well the draws fit (see `fit_metrics`), and under misspecification whether they are like what the prior
        knows (see `likeness`); timings: in seconds; title: of the picture.
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
        return _residuals(self.likelihood, self.samples.mean[None], self.problem, self.grid)[0]

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
    checkpoint: folder for finished draws; the same call goes on from there.
    margin: image pixels that the model reaches beyond the cutout; default: what holds 90% of the PSF.
    target: the keywords of `diffpost.jobs.problem.prepare`: cutout=(x, y, size) or center=(ra, dec) and
        size; weight, a map of the inverse variance instead of `noise` (zeros, inf and NaN mask); hdu,
        plane; oversample=1; psf_oversample, psf_background, psf_plane, recentre_psf;
        background="smooth" | "constant" | "none"; keep_neighbours; exptime; psf_error; scale, the flux
        per model pixel that the prior calls 1, or a rule to infer it by (`SmoothedPeak`).  By default the
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
    prepared: float = 0.0,
    title: str = "",
    announce: Callable[[str], None] | None = None,
) -> DeconvolutionResult:
    """Draw the samples of a problem that was set up; arguments as for `deconvolve`.

    announce: is told, before the sampling, what is going to be done.
    """
    if samples < 1:
        raise ValueError(f"got {samples} samples; expected at least 1")
    problem, grid, fitted = setup.problem, setup.grid, setup.prior
    likelihood = build_likelihood(problem, grid)
    chosen_guidance, chosen_sampler = default_inference(fitted, likelihood)
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
    nearly diagonal in Fourier space.
    """
    k = problem.oversample
    shape = (1, grid.shape[0] // k, grid.shape[1] // k)
    y, std = torch.zeros(shape), torch.full(shape, torch.inf)
    rows, columns = grid.data_region(k)
    y[0, rows, columns] = torch.from_numpy(np.where(problem.seen, problem.data, 0.0)).float()
    std[0, rows, columns] = torch.from_numpy(problem.std).float()
    return Likelihood(y, build_operator(problem), GaussianNoise(std=std))


def _residuals(likelihood: Likelihood, x: Tensor, problem: Problem, grid: Grid) -> Array:
    """(B, h, w) residuals in sigma, NaN where there is no data."""
    rows, columns = grid.data_region(problem.oversample)
    with torch.no_grad():
        raw = likelihood.residual(x.to(likelihood.y.dtype))[:, 0, rows, columns].double().numpy()
    seen = problem.seen
    out: Array = np.where(seen, raw / np.where(seen, problem.std, 1.0), np.nan)
    return out


def fit_metrics(
    problem: Problem, grid: Grid, likelihood: Likelihood, draws: Samples
) -> dict[str, Any]:
    """How well the draws fit, as JSON values.

    reduced_chi2: of the posterior mean and of the draws (mean over them), each with the expectation
    if noise and model are right.  residual_autocorrelation: of the mean's residual between adjacent
    pixels, along x and y, and what blank sky has of it (drizzled noise is correlated).  flux: of the
    model in the pixels that count, and through the operator over the data's there.
    """
    seen = problem.seen
    n = int(seen.sum())
    mean = _residuals(likelihood, draws.mean[None], problem, grid)[0]
    each = []
    modelled = []
    k = problem.oversample
    inside = torch.from_numpy(np.kron(seen, np.ones((k, k))))
    through = np.zeros(seen.shape)
    square = np.zeros(seen.shape)
    for row in draws.x.split(8):
        part = _residuals(likelihood, row, problem, grid)
        each += [float(np.nanmean(r**2)) for r in part]
        deviation = np.nan_to_num(part - mean)
        through += deviation.sum(0)
        square += (deviation**2).sum(0)
        rows, columns = grid.region
        modelled += (row[:, 0, rows, columns].double() * inside).sum((1, 2)).tolist()
    m = len(draws)
    spread = float((square - through**2 / m)[seen].sum() / (max(m - 1, 1) * n)) if m > 1 else None
    data = np.where(seen, problem.data, 0.0)
    with torch.no_grad():
        blurred = likelihood.operator(draws.mean[None].to(likelihood.y.dtype))[0, 0]
    rows, columns = grid.data_region(problem.oversample)
    image = blurred[rows, columns].double().numpy()
    source = problem.scene.target & seen
    sky = problem.report.get("sky", {})
    metrics: dict[str, Any] = {
        "pixels": n,
        "reduced_chi2": {
            "mean": float(np.nanmean(mean**2)),
            "mean_expected": None if spread is None else 1 - spread * (m - 1) / m,
            "draws": float(np.mean(each)),
            "draws_expected": 1.0,
            "expected_std": (2 / n) ** 0.5,
            "target": float(np.mean(mean[source] ** 2)) if source.any() else None,
            "sky": sky.get("reduced_chi2"),
        },
        "residual_autocorrelation": {
            "x": autocorrelation(mean, 0, 1),
            "y": autocorrelation(mean, 1, 0),
            "expected_std": float(n**-0.5),
            "sky": sky.get("autocorrelation"),
        },
        "largest_residual": float(np.nanmax(np.abs(mean))),
        "flux": {
            "mean": float(np.mean(modelled)),
            "std": float(np.std(modelled, ddof=1)) if m > 1 else None,
            "model_over_data": float(image[seen].sum() / data[seen].sum()),
        },
    }
    return metrics


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


def autocorrelation(residual: Array, dy: int, dx: int) -> float:
    """Correlation of pixels with those (dy, dx) further on, NaN pixels left out."""
    h, w = residual.shape
    a, b = residual[: h - dy, : w - dx], residual[dy:, dx:]
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        return float("nan")
    return float((a * b)[both].mean() / np.nanmean(residual**2))


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
