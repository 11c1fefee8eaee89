"""Images of the sky from visibilities, as posterior samples: the interferometry job as one function.

    result = image_visibilities("target.uvfits", cell=0.03, size=64, samples=16, seed=0)
    result.mean, result.std, result.metrics["reduced_chi2"]
    result.save("out")

The visibilities are fitted as they are, without gridding or CLEAN: each is the exact transform of the image (times the antennas'
primary beam) plus its own Gaussian noise.  If model and noise are right, a posterior draw is as far from the data as the truth is:
its reduced chi-squared has expectation 1 and standard deviation m^(-1/2) for m visibilities (2 m data).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.deconvolve import load, sampler_of
from diffpost.guidance import Guidance, choose
from diffpost.io.uv import VisibilityData
from diffpost.jobs.imaging import ImagingProblem, dirty_image, prepare_imaging
from diffpost.jobs.imaging_scale import infer_imaging_scale
from diffpost.jobs.scale import rule_of_card
from diffpost.likelihood import Likelihood
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["ImagingResult", "image_visibilities", "solve_imaging"]

Array = NDArray[np.float64]

_LARGER = 2  # times a prior's own side, up to which it is used
_COMPRESSED = 64  # pixels on a side up to which the likelihood is diagonalised
_USUAL = (0.4, 2.0)  # smoothed peaks of the draws, in the prior's units, that its training covers


@final
@dataclass(frozen=True)
class ImagingResult:
    """Posterior samples of an image of the sky and everything that led to them.

    samples: draws, (n, 1, size, size), Jy per pixel; problem: what was imaged; prior: with the flux scale that was used.
    models: (n, m) complex visibilities of the draws; metrics: how well they fit (see `imaging_metrics`); timings: in seconds.
    """

    samples: Samples
    problem: ImagingProblem
    prior: ScoreModel
    guidance: Guidance
    sampler: Sampler
    model: NDArray[np.complex128]
    metrics: dict[str, Any]
    timings: dict[str, float] = field(default_factory=dict)
    title: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found and done, in words."""
        return self.problem.notes

    @property
    def images(self) -> Array:
        """(n, size, size) draws, Jy per pixel."""
        return _plane(self.samples.x)

    @property
    def mean(self) -> Array:
        """(size, size) posterior mean."""
        return _plane(self.samples.mean)

    @property
    def std(self) -> Array:
        """(size, size) posterior standard deviation; 0 for one draw."""
        return _plane(self.samples.std) if len(self.samples) > 1 else np.zeros_like(self.mean)

    def quantile(self, q: float | Sequence[float]) -> Array:
        """Posterior quantiles."""
        return _plane(self.samples.quantile(q))

    @property
    def residual(self) -> NDArray[np.complex128]:
        """(m,) V - A(posterior mean), Jy."""
        return self.problem.data.vis - self.model

    @property
    def residual_image(self) -> Array:
        """(size, size) dirty image of the residual, in standard deviations of its noise."""
        y = torch.view_as_real(torch.from_numpy(self.residual.copy()))
        return dirty_image(self.problem, y) / self.problem.data.noise

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all products into a folder, atomically (see `diffpost.jobs.imaging_outputs`).

        Raises
        ------
        FileExistsError: the folder exists and overwrite is False.
        """
        from diffpost.jobs.imaging_outputs import write_imaging
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(path)
        folder.check(overwrite=overwrite)
        write_imaging(folder, self)


def image_visibilities(
    vis: str | os.PathLike[str] | VisibilityData,
    *,
    cell: float,
    size: int,
    prior: str | os.PathLike[str] | ScoreModel = "galaxies-64",
    samples: int = 16,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    title: str = "",
    **target: Any,
) -> ImagingResult:
    """Draw posterior samples of the sky behind visibilities.

    Parameters
    ----------
    vis: UVFITS file, measurement set, table, or `VisibilityData`.
    cell: side of a pixel, arcsec; size: pixels on a side, a multiple of the prior's stride, at most twice the prior's own.
    prior: name, folder, or a score model of one-channel images.
    samples: number of draws; seed: of the draws; batch_size: draws computed together.
    sampler, guidance: default DPMSolver(32, eta=1), and what a `Posterior` takes.
    checkpoint: folder for finished draws; the same call goes on from there.
    target: the keywords of `diffpost.jobs.imaging.prepare_imaging`: center, form, stokes, field, spw, average, recalibrate,
        primary_beam, conjugate, scale, ...

    Raises
    ------
    FileNotFoundError, ValueError: for inputs that cannot be used; TypeError: an unknown keyword.
    """
    start = time.perf_counter()
    model = load(prior)
    check_size(model, size)
    problem = prepare_imaging(vis, cell=cell, size=size, **target)
    problem, fitted = set_up_imaging(problem, model)
    return solve_imaging(
        problem,
        fitted,
        samples=samples,
        sampler=sampler,
        guidance=guidance,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        checkpoint=checkpoint,
        prepared=time.perf_counter() - start,
        title=title,
    )


def check_size(prior: ScoreModel, size: int) -> None:
    """Whether a prior has images of this size.

    Raises
    ------
    ValueError: it has not, saying which sizes it has.
    """
    stride, own = int(getattr(prior, "stride", 1)), int(prior.shape[-1])
    if size == own == int(prior.shape[-2]):
        return
    if size % stride:
        below, above = size // stride * stride, -(-size // stride) * stride
        raise ValueError(
            f"got a size of {size} pixels; the prior takes multiples of {stride}, such as {below or above} or {above}"
        )
    if size > _LARGER * own:
        raise ValueError(
            f"got a size of {size} pixels; the prior knows images of {own}, and is used up to {_LARGER * own}: take fewer pixels "
            "(a larger --cell, if the longest baseline allows it), or a prior that was trained on larger images"
        )
    try:
        prior.with_shape((1, size, size))
    except ValueError as error:
        raise ValueError(f"the prior has no images of {size} x {size} pixels: {error}") from error


def set_up_imaging(problem: ImagingProblem, prior: ScoreModel) -> tuple[ImagingProblem, ScoreModel]:
    """The prior at the size and the flux scale of a problem, and the problem with what was found told.

    Raises
    ------
    ValueError: a size that the prior has not, or no light by which the scale could be inferred.
    """
    size = problem.grid.shape[0]
    check_size(prior, size)
    sized = prior if tuple(prior.shape) == (1, size, size) else prior.with_shape((1, size, size))
    notes, report, scale = list(problem.notes), dict(problem.report), problem.scale
    rule = rule_of_card(getattr(prior, "card", None))
    if size > prior.shape[-1]:
        card = getattr(prior, "card", None) or {}
        notes.append(f"warning: {size} pixels are more than the prior's own {prior.shape[-1]}. {card.get('sizes', '')}".strip())  # fmt: skip
    if scale is not None:
        notes.append(f"flux scale: {scale:.4g} Jy/pixel is 1 of the prior, as given")
    elif rule is not None:
        scale, found = infer_imaging_scale(problem, rule.smoothing)
        report["flux"] = found
        notes.append(
            f"flux scale: {scale:.4g} Jy/pixel is 1 of the prior, the peak of a Gaussian-field image smoothed by {rule.smoothing:g} "
            "pixels"
        )
    else:
        notes.append("flux scale: the prior states no rule to infer it by, so its own units stand; --scale sets another")  # fmt: skip
        report["flux"] = {"own_units": True}
    problem = replace(problem, notes=tuple(notes), report=report, scale=scale)
    if scale is None:
        return problem, sized
    return problem, sized.with_affine(scale, prior.offset / prior.scale * scale)


def fitted_likelihood(problem: ImagingProblem) -> Likelihood:
    """What the sampler sees: an equivalent likelihood with direct solves for small images, all visibilities for others."""
    if problem.grid.shape[0] > _COMPRESSED:
        return problem.likelihood()
    from diffpost.physics import compress

    return compress(problem.likelihood(torch.float64))


def solve_imaging(
    problem: ImagingProblem,
    prior: ScoreModel,
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
) -> ImagingResult:
    """Draw the samples of a problem that was set up; arguments as for `image_visibilities`.

    announce: is told, before the sampling, what is going to be done.
    """
    if samples < 1:
        raise ValueError(f"got {samples} samples; expected at least 1")
    start = time.perf_counter()
    likelihood = fitted_likelihood(problem)
    guidance = guidance or choose(prior, likelihood).guidance
    sampler = sampler or sampler_of(None)
    if announce is not None:
        size = problem.grid.shape[0]
        announce(
            f"sampling: {samples} draws on {size} x {size} pixels by {len(problem.data)} visibilities, {guidance!r}, {sampler!r}"
        )
    draws = sample(
        Posterior(prior, likelihood, guidance),
        samples,
        sampler,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
    )
    sampled = time.perf_counter() - start
    model, metrics = imaging_metrics(problem, draws)
    notes = [*problem.notes, *_warnings(problem, prior, draws)]
    return ImagingResult(
        samples=draws,
        problem=replace(problem, notes=tuple(notes)),
        prior=prior,
        guidance=guidance,
        sampler=sampler,
        model=model,
        metrics=metrics,
        timings={"prepare": prepared, "sample": sampled},
        title=title,
    )


def imaging_metrics(
    problem: ImagingProblem, draws: Samples
) -> tuple[NDArray[np.complex128], dict[str, Any]]:
    """(m,) visibilities of the posterior mean, and how well the draws fit, as JSON values.

    reduced_chi2: of the posterior mean and of the draws (mean over them), each with its expectation if noise and model are right,
    and of an empty sky.  residual_image: rms and largest deviation of the dirty image of the residual, in its noise.
    flux: of the draws, Jy.  baselines: those whose reduced chi-squared is worst.
    """
    data, weight = problem.data, problem.weight
    m, n = len(data), len(draws)
    y = problem.y
    with torch.no_grad():
        mean = problem.operator(draws.mean[None, :].double())[0]
        chi2, spread = [], 0.0
        for row in draws.x:
            part = problem.operator(row[None].double())[0]
            chi2.append(float((weight * (y - part) ** 2).sum()) / (2 * m))
            spread += float((weight * (part - mean) ** 2).sum()) / (2 * m)
    off = y - mean
    residual = dirty_image(problem, off) / data.noise
    flux = draws.x.double().sum((1, 2, 3))
    model = torch.view_as_complex(mean.contiguous()).numpy()
    return model, {
        "visibilities": m,
        "reduced_chi2": {
            "mean": float((weight * off**2).sum()) / (2 * m),
            "mean_expected": 1 - spread / n if n > 1 else None,
            "draws": float(np.mean(chi2)),
            "draws_expected": 1.0,
            "expected_std": m**-0.5,
            "empty_sky": float((weight * y**2).sum()) / (2 * m),
        },
        "residual_image": {
            "rms": float(np.sqrt((residual**2).mean())),
            "largest": float(np.abs(residual).max()),
        },
        "flux": {"mean": float(flux.mean()), "std": float(flux.std()) if n > 1 else None},
        "baselines": _worst(problem, model),
    }


# Parts ----------------------------------------------------------------------------------------


def baseline_chi2(
    data: VisibilityData, model: NDArray[np.complex128]
) -> list[tuple[int, int, int, float, float]]:
    """(antenna 1, antenna 2, visibilities, reduced chi-squared, mean length in wavelengths) of every pair, by number."""
    pair = data.baseline
    if pair is None or data.antenna1 is None or data.antenna2 is None:
        return []
    value = data.weight * np.abs(data.vis - model) ** 2 / 2
    numbers, first, group, count = np.unique(pair, return_index=True, return_inverse=True, return_counts=True)  # fmt: skip
    group = np.asarray(group).reshape(-1)
    chi2 = np.bincount(group, value, len(numbers)) / count
    length = np.bincount(group, data.distance, len(numbers)) / count
    return [
        (int(data.antenna1[f]), int(data.antenna2[f]), int(c), float(x), float(q))
        for f, c, x, q in zip(first, count, chi2, length, strict=True)
    ]


def _worst(problem: ImagingProblem, model: NDArray[np.complex128]) -> list[dict[str, Any]]:
    data = problem.data
    rows = baseline_chi2(data, model)
    rows.sort(
        key=lambda row: -(row[3] - 1) * row[2] ** 0.5
    )  # in standard deviations of what is expected
    return [
        {
            "antennas": [_name(data, a), _name(data, b)],
            "visibilities": count,
            "reduced_chi2": chi2,
            "expected_std": count**-0.5,
        }
        for a, b, count, chi2, _ in rows[:5]
    ]


def _name(data: VisibilityData, number: int) -> str:
    known = data.antennas[number] if 0 <= number < len(data.antennas) else ""
    return known or str(number)


def _warnings(problem: ImagingProblem, prior: ScoreModel, draws: Samples) -> list[str]:
    """What the draws tell about the flux scale."""
    rule = rule_of_card(getattr(prior, "card", None))
    if rule is None or problem.scale is None:
        return []
    from scipy.ndimage import gaussian_filter

    peaks = [gaussian_filter(image, rule.smoothing).max() for image in _plane(draws.x)]
    peak = float(np.median(peaks)) / problem.scale
    if _USUAL[0] <= peak <= _USUAL[1]:
        return []
    return [
        f"warning: the smoothed peak of the draws is {peak:.2g} of the flux scale, where the prior's training has {_USUAL[0]:g} to "
        f"{_USUAL[1]:g}: repeat with --scale {problem.scale * peak:.3g}"
    ]


def _plane(values: Tensor) -> Array:
    out: Array = values[..., 0, :, :].double().cpu().numpy()
    return out
