"""What a user does not want to be asked: the sky, the neighbours and the noise.

Sources are what stands 3 robust standard deviations above the background in the image smoothed by a
Gaussian of 1.5 pixels, measured against the smoothed sky itself, so that correlated (drizzled) noise
does not fake detections.  The background is a mesh of medians of what is left, interpolated
(photutils' Background2D), and both are iterated.  Sources are deblended; the one at the target's
position is the target, the others are neighbours.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import final

import numpy as np
from astropy.stats import SigmaClip, mad_std
from numpy.typing import NDArray
from photutils.background import Background2D, MedianBackground
from photutils.segmentation import deblend_sources, detect_sources
from photutils.utils.exceptions import NoDetectionsWarning
from scipy.ndimage import binary_dilation, gaussian_filter

__all__ = ["Scene", "SkyNoise", "find_sources", "read_scene", "sky_noise"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_DETECT = 1.5  # smoothing (pixels) and
_THRESHOLD = 3.0  # threshold (robust sigma of the smoothed sky) of detection
_PIXELS = 10  # fewest pixels of a source
_CONTRAST = 0.02  # share of a blend's flux that a peak must hold to count as its own source
_GROW = 3  # pixels by which neighbours' masks are grown


@final
@dataclass(frozen=True)
class Scene:
    """What is on an image.

    background: (h, w), smooth light that is not the target's.
    segments: (h, w) integers: 0 sky, 1 the target, 2, 3, ... its neighbours.
    sky: (h, w), pixels away from every source.
    notes: what was found, in words.
    """

    background: Array
    segments: NDArray[np.int_]
    sky: Mask
    notes: tuple[str, ...]

    @property
    def target(self) -> Mask:
        return np.asarray(self.segments == 1)

    @property
    def neighbours(self) -> Mask:
        """Pixels of neighbours, grown by 3 but never into the target."""
        return np.asarray(
            binary_dilation(self.segments > 1, iterations=_GROW) & ~(self.segments == 1)
        )


def read_scene(data: Array, position: tuple[float, float], *, background: str = "smooth") -> Scene:
    """Background, target and neighbours of an image.

    Parameters
    ----------
    data: (h, w), NaN where there is no data.
    position: zero-based (x, y) of the target.
    background: "smooth" (a mesh; a constant for images under 96 pixels), "constant" (a median), or
        "none" (the image is background-subtracted).

    Raises
    ------
    ValueError: an unknown kind of background.
    """
    if background not in ("smooth", "constant", "none"):
        raise ValueError(f"got background = {background!r}; expected smooth, constant or none")
    smooth = background == "smooth" and min(data.shape) >= 96
    level, segments, sources = find_sources(data, background)
    bad = ~np.isfinite(data)
    filled = np.where(bad, float(np.nanmedian(data)), data)
    notes: list[str] = []
    blends = _deblend(filled - level, segments)
    ordered = _target_first(blends, filled - level, position)
    if background == "none":
        notes.append("background: none subtracted, as asked")
    elif smooth:
        notes.append(
            f"background: a smooth one of {level.min():.4g} to {level.max():.4g} (medians of a mesh "
            "away from sources) was subtracted"
        )
    else:
        notes.append(f"background: a constant of {level.flat[0]:.4g} was subtracted")
    if not (ordered == 1).any():
        notes.append("no source stands out at the target's position; everything near it is kept")
    return Scene(level, ordered, ~(sources | bad), tuple(notes))


def find_sources(
    data: Array, background: str = "smooth", widths: tuple[float, ...] = (_DETECT,)
) -> tuple[Array, NDArray[np.int_], Mask]:
    """Background (h, w), segments of what was detected, and the pixels near those, grown by 4.

    data: (h, w), NaN where there is no data; background: as `read_scene`.
    widths: of the Gaussians (pixels) in which sources are detected; the segments are those in the first.
    """
    bad = ~np.isfinite(data)
    filled = np.where(bad, float(np.nanmedian(data)), data)
    smooth = background == "smooth" and min(data.shape) >= 96
    level = np.zeros_like(filled) if background == "none" else np.full_like(filled, _mode(data))
    sources = np.zeros(data.shape, dtype=bool)
    segments: NDArray[np.int_] = np.zeros(data.shape, dtype=int)
    for _ in range(5):
        found = [_detect(filled - level, bad, sources, width) for width in widths]
        segments = found[0]
        sources = binary_dilation(np.any([f > 0 for f in found], axis=0), iterations=_GROW + 1)
        if background != "none":
            level = _background(data, bad | sources, level, smooth)
    return level, segments, sources


def _mode(data: Array) -> float:
    """Sigma-clipped median of an image with sources on it."""
    clipped = SigmaClip(3, maxiters=10)(data[np.isfinite(data)], masked=False)
    return float(np.median(clipped))


def _detect(residual: Array, bad: Mask, sources: Mask, width: float) -> NDArray[np.int_]:
    smoothed = gaussian_filter(np.where(bad, 0.0, residual), width)
    free = ~(sources | bad)
    if free.sum() < 20:
        return np.asarray(sources, dtype=int)
    spread = float(mad_std(smoothed[free]))
    if not spread > 0:
        spread = max(float(np.std(smoothed)) * 1e-3, 1e-300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)  # an empty field is an answer
        found = detect_sources(smoothed, _THRESHOLD * spread, n_pixels=_PIXELS, mask=bad)
    return np.zeros(residual.shape, dtype=int) if found is None else np.asarray(found.data)


def _background(data: Array, masked: Mask, before: Array, smooth: bool) -> Array:
    free = ~masked
    if free.sum() < max(20, 0.01 * data.size):
        return before  # nothing but sources: the last level stands
    if smooth:
        box = max(16, min(data.shape) // 5)
        try:
            mesh = Background2D(
                np.where(np.isfinite(data), data, 0.0),
                box_size=(box, box),
                filter_size=3,
                mask=masked,
                exclude_percentile=80,
                sigma_clip=SigmaClip(3),
                bkg_estimator=MedianBackground(),
            )
        except ValueError:  # no box has enough sky
            return np.full_like(before, float(np.median(data[free])))
        return np.asarray(mesh.background, dtype=np.float64)
    return np.full_like(before, _mode(np.where(masked, np.nan, data)))


def _deblend(residual: Array, segments: NDArray[np.int_]) -> NDArray[np.int_]:
    if not segments.any():
        return segments
    from photutils.segmentation import SegmentationImage

    smoothed = gaussian_filter(residual, _DETECT)
    with warnings.catch_warnings():
        # Sources with pixels at or below zero are deblended at levels spaced evenly; nothing to mend.
        warnings.filterwarnings("ignore", message="The deblending mode")
        out = deblend_sources(
            smoothed,
            SegmentationImage(segments),
            n_pixels=_PIXELS,
            contrast=_CONTRAST,
            progress_bar=False,
        )
    return np.asarray(out.data, dtype=int)


def _target_first(
    segments: NDArray[np.int_], residual: Array, position: tuple[float, float]
) -> NDArray[np.int_]:
    """Label 1 for the target and the clumps that lie within it, 2 and up for the rest."""
    h, w = segments.shape
    x, y = position
    yy, xx = np.mgrid[:h, :w]
    distance = np.hypot(yy - y, xx - x)
    near = (segments > 0) & (distance <= 3)
    out = np.zeros(segments.shape, dtype=int)
    if near.any():
        target = int(segments[near][np.argmin(distance[near])])
        member = segments == target
        keep = [target, *_clumps(segments, residual, member, target)]
        member = np.isin(segments, keep)
        out[member] = 1
    label = 2
    for other in np.unique(segments):
        if other > 0 and not (out[segments == other] == 1).any():
            out[segments == other] = label
            label += 1
    return out


def _clumps(segments: NDArray[np.int_], residual: Array, member: Mask, target: int) -> list[int]:
    """Sources that touch the target and peak within its rms ellipse (2 sigma): parts of it."""
    weight = np.clip(residual, 0, None) * member
    total = weight.sum()
    if not total > 0:
        return []
    yy, xx = np.mgrid[: member.shape[0], : member.shape[1]]
    cy, cx = (weight * yy).sum() / total, (weight * xx).sum() / total
    offsets = np.stack([yy - cy, xx - cx], axis=-1)
    covariance = np.einsum("ij,ijk,ijl->kl", weight / total, offsets, offsets) + 0.1 * np.eye(2)
    inverse = np.linalg.inv(covariance)
    touching = np.unique(segments[binary_dilation(member) & ~member])
    found = []
    for other in touching:
        if other in (0, target):
            continue
        part = np.where(segments == other, residual, -np.inf)
        peak = offsets[np.unravel_index(int(np.argmax(part)), part.shape)]
        if peak @ inverse @ peak <= 2.0**2:
            found.append(int(other))
    return found


# Noise ----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class SkyNoise:
    """Noise of the sky, measured away from sources.

    std: standard deviation of a pixel.
    correlation: mean correlation of adjacent pixels.
    inflation: square root of the sum of the correlations with the eight pixels around and itself:
        what std must be multiplied by for white noise to have the right power on scales larger than a
        pixel (Casertano et al. 2000 for drizzled images).
    pixels: how many pixels were used.
    """

    std: float
    correlation: float
    inflation: float
    pixels: int


def sky_noise(residual: Array, sky: Mask) -> SkyNoise:
    """Measure the noise of background-subtracted data on `sky` pixels.

    What varies over more than 5 pixels (halos, cluster light) is taken out first by a masked
    Gaussian filter, and the surroundings of sources are left out where enough sky remains.

    Raises
    ------
    ValueError: fewer than 50 sky pixels, or sky without any scatter.
    """
    if sky.sum() < 50:
        raise ValueError(
            f"only {sky.sum()} pixels of the image are free of sources: too few to measure the noise; "
            "give it by --noise RMS.fits or --noise-std, or use a larger image"
        )
    far = ~binary_dilation(~sky, iterations=5)
    sky = far if far.sum() >= 1000 else sky
    weight = sky.astype(np.float64)
    values = np.where(sky, residual, 0.0)
    width = 5.0
    local = gaussian_filter(values, width) / np.maximum(gaussian_filter(weight, width), 1e-6)
    high = np.where(sky, residual - local, 0.0)
    std = float(mad_std(high[sky]))
    if not std > 0:
        raise ValueError(
            "the sky has no scatter at all, so the noise cannot be measured; give it by --noise "
            "RMS.fits or --noise-std"
        )
    good = sky & (np.abs(high) < 4 * std)
    total = 0.0
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            total += _correlation(high, good, dy, dx)
    adjacent = 0.5 * (_correlation(high, good, 0, 1) + _correlation(high, good, 1, 0))
    return SkyNoise(std, adjacent, float(np.sqrt(max(total, 1.0))), int(sky.sum()))


def _correlation(values: Array, good: Mask, dy: int, dx: int) -> float:
    """Correlation of good pixels with those (dy, dx) away."""
    h, w = values.shape
    a = np.s_[max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)]
    b = np.s_[max(-dy, 0) : h + min(-dy, 0), max(-dx, 0) : w + min(-dx, 0)]
    both = good[a] & good[b]
    if not both.any():
        return 0.0
    return float((values[a] * values[b])[both].mean() / np.square(values[good]).mean())
