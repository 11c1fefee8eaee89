r"""A point spread function as people have it, made into the kernel of the model.

A star cut out of an image sits on a pedestal of sky, is not normalised and not centred; a model PSF
may be sampled finer than the image.  With P(f) the transform of the PSF sampled at s pixels per
image pixel (each value integrated over its own pixel), the kernel on a grid of k pixels per image
pixel, centred at index n // 2, is the inverse transform of

    P(f) exp(2 pi i f c) sinc(f s / k) / sinc(f),      |f| <= 1/2 cycles per PSF pixel,

c its centroid: the PSF's own pixel is taken out and the grid's put in, so that summing the k x k
pixels of an image pixel gives the PSF that was measured, not one blurred by the pixel twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from diffpost.io.wcs import pixel_scale

__all__ = ["Psf", "centroid", "oversampling_of", "prepare_psf"]

Array = NDArray[np.float64]

_BORDER = 2  # pixels of the ring that the pedestal is read from
_MAX_LOST = 0.05  # share of the flux that trimming may lose


@final
@dataclass(frozen=True)
class Psf:
    """A PSF that is ready for use.

    kernel: (n, m), odd sides, sum 1, centred at (n // 2, m // 2), on the grid of the model.
    native: the same at the sampling of the image, never trimmed.
    notes: what was done to it, in words.
    report: the same in numbers.
    """

    kernel: Array
    native: Array
    notes: tuple[str, ...]
    report: dict[str, Any]

    def radius(self, share: float) -> int:
        """Smallest half-width, in image pixels, of a square that holds `share` of the flux."""
        # With its sign: the noise in a wide stamp adds up to nothing, its modulus to a wide PSF.
        cy, cx = (n // 2 for n in self.native.shape)
        for r in range(max(cy, cx) + 1):
            part = self.native[max(cy - r, 0) : cy + r + 1, max(cx - r, 0) : cx + r + 1]
            if part.sum() >= share:
                return r
        return max(cy, cx)

    def trimmed(self, limit: tuple[int, int]) -> Psf:
        """The same with a kernel of the largest odd sides within `limit`, normalised, which is told.

        limit: (rows, columns) in model pixels.

        Raises
        ------
        ValueError: more than 5% of the flux would be cut off.
        """
        sides = [
            min(n, most if most % 2 else most - 1)
            for n, most in zip(self.kernel.shape, limit, strict=True)
        ]
        if tuple(sides) == self.kernel.shape:
            return self
        top, left = ((n - side) // 2 for n, side in zip(self.kernel.shape, sides, strict=True))
        kernel = self.kernel[top : top + sides[0], left : left + sides[1]]
        lost = 1 - float(kernel.sum() / self.kernel.sum())
        if abs(lost) > _MAX_LOST:
            raise ValueError(
                f"the PSF ({self.kernel.shape[1]} x {self.kernel.shape[0]} model pixels) is larger "
                f"than the model can hold ({sides[1]} x {sides[0]}), and {100 * lost:.1f}% of its flux "
                "would be cut off; take a larger cutout, or a PSF trimmed to what is wanted"
            )
        told = (
            f"PSF: larger than the model can hold, trimmed to {sides[1]} x {sides[0]} model pixels and "
            f"normalised again; {100 * lost:.2g}% of its flux was beyond"
        )
        return replace(
            self,
            kernel=kernel / kernel.sum(),
            notes=(*self.notes, told),
            report={**self.report, "lost": lost},
        )


def oversampling_of(psf: fits.Header, image: fits.Header) -> tuple[float, str | None]:
    """How many PSF pixels span an image pixel, from the headers, and what to tell about it.

    Raises
    ------
    ValueError: the headers say that the PSF is sampled coarser than the image.
    """
    theirs = pixel_scale(psf)
    if theirs is None:
        for key in ("PIXELSCL", "PIXSCALE"):
            value = psf.get(key)
            if isinstance(value, int | float) and value > 0:
                theirs = float(value)
                break
    ours = pixel_scale(image)
    if theirs is None or ours is None:
        return 1.0, None
    ratio = ours / theirs
    if abs(ratio - 1) < 0.02:
        return 1.0, None
    if ratio < 1:
        raise ValueError(
            f'the PSF has pixels of {theirs:.4g}" and the image of {ours:.4g}": a PSF coarser than '
            "the image cannot be used; give --psf-oversample if the header is wrong"
        )
    if abs(ratio - round(ratio)) < 0.02 * ratio:
        ratio = float(round(ratio))
    return ratio, (
        f"the PSF's header gives pixels of {theirs:.4g}\" against the image's {ours:.4g}\": taken as "
        f"sampled {ratio:.4g} times finer"
    )


def prepare_psf(
    raw: Array,
    *,
    oversample: int = 1,
    psf_oversample: float = 1.0,
    background: float | None = None,
    recentre: bool = True,
) -> Psf:
    """Subtract the pedestal, normalise, centre and resample a PSF.

    Parameters
    ----------
    raw: (h, w), any size and normalisation.
    oversample: pixels of the model per image pixel, along a side.
    psf_oversample: pixels of `raw` per image pixel, along a side.
    background: pedestal to subtract; default: by rule.  The rule: where the PSF does not sum to 1
        within 2% (a PSF that does has been treated by whoever made it), the median of the outer ring
        of 2 pixels is subtracted if it exceeds 3 times its standard error.
    recentre: shift the centroid to the centre of the kernel; else `raw`'s own pixel (h // 2, w // 2)
        is its centre.

    Raises
    ------
    ValueError: a PSF without flux or without a centre, or that is not an image.
    """
    if oversample < 1 or not psf_oversample > 0:
        raise ValueError(
            f"got oversample = {oversample} and psf_oversample = {psf_oversample}; expected an "
            "integer of at least 1 and a positive number"
        )
    data = np.array(raw, dtype=np.float64)
    if data.ndim != 2:
        raise ValueError(f"got a PSF of shape {data.shape}; expected an image (h, w)")
    notes: list[str] = []
    report: dict[str, Any] = {"shape": list(data.shape)}
    bad = ~np.isfinite(data)
    if bad.all() or not np.any(data[~bad]):
        what = "NaN" if bad.all() else "zero"
        raise ValueError(f"the PSF is {what} everywhere; expected the image of a point source")
    if bad.any():
        notes.append(f"PSF: {bad.sum()} pixels are NaN or infinite and were set to the pedestal")

    pedestal = _pedestal(data, bad) if background is None else float(background)
    if pedestal:
        share = pedestal * data.size / np.nansum(np.where(bad, 0, data))
        notes.append(
            f"PSF: a pedestal of {pedestal:.4g} per pixel ({100 * share:.1f}% of its flux; median of "
            f"the outer ring of {_BORDER} pixels) was subtracted"
            if background is None
            else f"PSF: the given background of {pedestal:.4g} per pixel was subtracted"
        )
    data = np.where(bad, 0.0, data - pedestal)
    report["pedestal"] = pedestal
    total = float(data.sum())
    if not total > 0:
        raise ValueError(
            f"the PSF sums to {total:.4g} after its background was subtracted; expected positive flux"
        )
    report["sum"] = total
    if abs(total - 1) > 1e-3:
        notes.append(f"PSF: it summed to {total:.5g} and was normalised to 1")
    data /= total

    middle = np.array([n // 2 for n in data.shape], dtype=np.float64)
    centre = centroid(data) if recentre else middle
    report["centroid"] = [float(c) for c in centre]
    if recentre and np.abs(centre - middle).max() > 0.02:
        notes.append(
            f"PSF: its centroid (x, y) = ({centre[1]:.2f}, {centre[0]:.2f}) was moved to the centre "
            "of the kernel"
        )
    ratio = oversample / psf_oversample
    if ratio > 1:
        notes.append(
            f"PSF: interpolated (Fourier) from {psf_oversample:g} to {oversample} samples per image "
            "pixel, its own pixel divided out"
        )
    kernel = _resample(data, centre, ratio)
    native = kernel if oversample == 1 else _resample(data, centre, 1 / psf_oversample)
    kernel = kernel / kernel.sum()
    native = native / native.sum()
    report["negative"] = float(-kernel[kernel < 0].sum())
    report["fwhm"] = _fwhm(native)
    return Psf(kernel, native, tuple(notes), report)


def _pedestal(data: Array, bad: NDArray[np.bool_]) -> float:
    total = float(np.where(bad, 0, data).sum())
    if abs(total - 1) < 0.02 or min(data.shape) <= 4 * _BORDER:
        return 0.0
    ring = np.ones(data.shape, dtype=bool)
    ring[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    values = data[ring & ~bad]
    if not values.size:
        return 0.0
    level = float(np.median(values))
    # Standard error of a median of Gaussian values whose spread is read off their MAD.
    error = 1.2533 * 1.4826 * float(np.median(np.abs(values - level))) / values.size**0.5
    return level if level > 3 * error and level > 0 else 0.0


def centroid(data: Array, *, tol: float = 1e-5, max_iter: int = 200) -> Array:
    """Gaussian-windowed centroid (y, x) in zero-based pixels (SExtractor's XWIN).

    The window follows the centroid; its width is that of a Gaussian with the PSF's half-light radius.

    Raises
    ------
    ValueError: when it does not settle on the array.
    """
    h, w = data.shape
    smooth = gaussian_filter(data, 1.0, mode="constant")
    peak = np.unravel_index(int(np.argmax(smooth)), data.shape)
    position = np.array(peak, dtype=np.float64)
    y, x = np.mgrid[:h, :w].astype(np.float64)
    distance = np.hypot(y - position[0], x - position[1])
    order = np.argsort(distance, axis=None)
    growth = np.cumsum(data.ravel()[order])
    half = float(distance.ravel()[order][int(np.argmax(growth >= 0.5 * growth[-1]))])
    # Half-light radius of a Gaussian: 1.1774 sigma.
    sigma = max(half / 1.1774, 0.7)
    for _ in range(max_iter):
        window = np.exp(-((y - position[0]) ** 2 + (x - position[1]) ** 2) / (2 * sigma**2))
        weight = window * data
        total = weight.sum()
        if not total > 0:
            break
        step = 2 * np.array(
            [(weight * (y - position[0])).sum(), (weight * (x - position[1])).sum()]
        )
        step /= total
        position = position + step
        if not (-1 < position[0] < h and -1 < position[1] < w):
            break
        if np.abs(step).max() < tol:
            return position
    raise ValueError(
        "the PSF's centroid cannot be found; expected one compact source on an empty background"
    )


def _resample(data: Array, centre: Array, ratio: float) -> Array:
    """`data` at `ratio` samples per pixel, centred, with odd sides that keep all of it."""
    h, w = data.shape
    if ratio == 1 and np.abs(centre - np.round(centre)).max() < 1e-3:
        rows, columns = (
            _placement(n, float(np.round(c))) for n, c in zip((h, w), centre, strict=True)
        )
    else:
        rows, columns = (
            _interpolation(n, float(c), ratio) for n, c in zip((h, w), centre, strict=True)
        )
    out: Array = rows @ data @ columns.T
    return out


def _placement(n: int, centre: float) -> Array:
    """(2 r + 1, n): moves pixel `centre` to r without touching a value."""
    r = int(max(centre, n - 1 - centre))
    matrix = np.zeros((2 * r + 1, n))
    matrix[np.arange(n) + r - int(centre), np.arange(n)] = 1
    return matrix


def _interpolation(n: int, centre: float, ratio: float) -> Array:
    """(m, n): trigonometric interpolation around `centre` with the change of pixel (see above)."""
    reach = max(centre, n - 1 - centre)
    r = int(np.ceil(reach * ratio))
    # Room for the tails, so that one end does not wrap around to the other; odd, so that no mode
    # sits on the Nyquist frequency.
    period = 2 * (n // 2 + int(np.ceil(reach))) + 9
    modes = np.arange(-(period // 2), period // 2 + 1)
    f = modes / period
    response = np.sinc(f / ratio) / np.sinc(f) / ratio
    at = centre + (np.arange(2 * r + 1) - r) / ratio
    to = np.exp(2j * np.pi * np.outer(at, f)) * response
    back = np.exp(-2j * np.pi * np.outer(f, np.arange(n))) / period
    matrix: Array = (to @ back).real
    return matrix


def _fwhm(kernel: Array) -> float:
    """Full width at half maximum in pixels, from the area above half the peak."""
    # Cheap and monotone; good to a few per cent for a compact, round core, around which a wide stamp
    # is left out.
    cy, cx = (n // 2 for n in kernel.shape)
    rows, columns = np.nonzero(kernel > kernel.max() / 4)
    r = 3 * int(max(np.abs(rows - cy).max(), np.abs(columns - cx).max())) + 8
    kernel = kernel[max(cy - r, 0) : cy + r + 1, max(cx - r, 0) : cx + r + 1]
    fine = _resample(kernel, np.array([n // 2 for n in kernel.shape], dtype=np.float64), 4.0)
    area = float((fine > fine.max() / 2).sum()) / 16
    return 2 * (area / np.pi) ** 0.5
