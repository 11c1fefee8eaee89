"""The noise of an image: given, read from its file, or measured on the sky.

In this order: a number or a map, of standard deviations or of inverse variances; an extension ERR or RMS
of the image's file, of a cube the plane of the same number; a keyword; the sky, whose correlated noise is
inflated to what it is on scales larger than a pixel, and to which the Poisson noise of the sources is
added for images in electrons per second of known exposure time.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from diffpost.io.fits import FitsImage, read_companion
from diffpost.io.units import is_electron_rate
from diffpost.jobs.target import Scene, sky_noise

__all__ = ["deviation_of", "expected_flux", "noise_of", "poisson_variance"]

Array = NDArray[np.float64]

_NOISE_CARDS = ("SKYRMS", "BKGRMS", "SKYSIGMA", "NOISESTD", "RMS")
_NOISE_HDUS = ("ERR", "RMS")


def noise_of(
    noise: float | FitsImage | None,
    image: FitsImage,
    corner: tuple[int, int],
    around: Array,
    scene: Scene,
    exptime: float | None,
    notes: list[str],
) -> tuple[Array, dict[str, Any]]:
    """Standard deviation (h, w) of every pixel of the window, in the image's unit; inf where there is no
    data.  And the same in numbers, under "noise".

    noise: standard deviation as a number or a map of the whole image; None: look for it.
    corner: zero-based (x, y) in the image of the window; around: (h, w) the image there; scene: what is on it.
    exptime: seconds, for the Poisson noise; notes: where to tell what was found.

    Raises
    ------
    ValueError: a noise that is not positive, a map of another shape than the image's or without a usable
        pixel, an exposure time that is not positive, or no noise to be found.
    """
    shape = around.shape
    if isinstance(noise, int | float):
        if not (math.isfinite(noise) and noise > 0):
            raise ValueError(f"got a noise of {noise}; expected a positive standard deviation")
        notes.append(f"noise: {noise:.4g} per pixel everywhere, as given")
        return np.full(shape, float(noise)), {"noise": {"source": "given", "std": float(noise)}}
    if noise is not None:
        if (noise.path, noise.hdu) == (image.path, image.hdu) and not image.path.startswith("<"):
            raise ValueError(
                f"the noise map {noise.path} is the image itself; give a map of standard deviations, or "
                "none: an extension ERR or RMS of the image is found by itself"
            )
        return _noise_map(noise, image, corner, around.shape, notes)
    if not image.path.startswith("<"):
        found = _noise_hdu(image, notes)
        if found is not None:
            return _noise_map(found, image, corner, around.shape, notes, found=True)
    for key in _NOISE_CARDS:
        value = image.header.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and value > 0:
            notes.append(f"noise: {value:.4g} per pixel everywhere, from the header's {key}")
            return np.full(shape, float(value)), {"noise": {"source": key, "std": float(value)}}
    residual = around - scene.background
    sky = sky_noise(residual, scene.sky)
    level = sky.std * sky.inflation
    variance = np.full(shape, level**2)
    report: dict[str, Any] = {
        "source": "sky",
        "std": level,
        "sky_std": sky.std,
        "sky_correlation": sky.correlation,
        "inflation": sky.inflation,
        "sky_pixels": sky.pixels,
        "poisson": False,
    }
    told = f"noise: {sky.std:.4g} per pixel, measured on {sky.pixels} pixels of sky"
    if sky.inflation > 1.02:
        told += (
            f"; adjacent pixels are correlated ({sky.correlation:.2f}), so {level:.4g} is used, "
            f"{sky.inflation:.2f} times more"
        )
    own, seconds = poisson_variance(residual, image, exptime)
    if seconds is not None:
        variance = variance + own
        report |= {"poisson": True, "exptime": seconds}
        told += f"; the sources' Poisson noise was added for {seconds:.6g} s of {image.unit}"
    else:
        told += "; the sources' own Poisson noise is not known and not included"
    notes.append(told)
    return np.sqrt(variance), {"noise": report}


def poisson_variance(
    residual: Array, image: FitsImage, exptime: float | None
) -> tuple[Array, float | None]:
    """Variance (h, w) of the sources' own photons, and the exposure time in seconds that it is of; 0 and None where that is
    not known, or the image is not in electrons per second.

    Raises
    ------
    ValueError: an exposure time that is not positive.
    """
    seconds = exptime if exptime is not None else image.header.get("EXPTIME")
    known = isinstance(seconds, int | float) and math.isfinite(seconds) and seconds > 0
    if exptime is not None and not known:
        raise ValueError(
            f"got an exposure time of {exptime}; expected a positive number of seconds"
        )
    if not known or not is_electron_rate(image.unit):
        return np.zeros(residual.shape), None
    return expected_flux(residual) / float(seconds), float(seconds)


def deviation_of(weight: FitsImage) -> FitsImage:
    """A map of standard deviations from one of inverse variances; NaN where the weight is zero.

    Raises
    ------
    ValueError: negative weights, or none that is positive.
    """
    values = weight.data
    bad = int((values < 0).sum())
    if bad:
        raise ValueError(
            f"the weight map {weight.path} has {bad} negative pixels; expected inverse variances, with "
            "zeros where there is no data. A map of standard deviations goes to --noise"
        )
    usable = np.isfinite(values) & (values > 0)
    if not usable.any():
        raise ValueError(
            f"the weight map {weight.path} has no positive pixel; expected inverse variances"
        )
    return replace(weight, data=np.where(usable, np.where(usable, values, 1.0) ** -0.5, np.nan))


def expected_flux(residual: Array) -> Array:
    """The image smoothed by 1 pixel, not negative, in place of its expectation: the noise of a pixel must
    not decide its own weight."""
    filled = np.where(np.isfinite(residual), residual, 0.0)
    return np.asarray(np.clip(gaussian_filter(filled, 1.0), 0, None))


def _noise_hdu(image: FitsImage, notes: list[str]) -> FitsImage | None:
    """The error extension of the same version as the image; one that cannot be used is told."""
    version = image.header.get("EXTVER", 1)
    with fits.open(image.path) as hdus:
        numbers = [
            i
            for name in _NOISE_HDUS
            for i, hdu in enumerate(hdus)
            if hdu.name == name and hdu.ver == version
        ]
    for number in numbers:
        try:
            found = read_companion(image.path, image, hdu=number)
        except ValueError as error:
            notes.append(f"noise: extension {number} of the image was not used: {error}")
            continue
        if found.data.shape == image.data.shape:
            return found
        notes.append(f"noise: extension {number} of the image was not used: its shape differs")
    return None


def _noise_map(
    noise: FitsImage,
    image: FitsImage,
    corner: tuple[int, int],
    shape: tuple[int, ...],
    notes: list[str],
    *,
    found: bool = False,
) -> tuple[Array, dict[str, Any]]:
    """found: nobody named it, and its zeros mean what pipelines mean by them: no data."""
    (wx, wy), (h, w) = corner, shape
    name = f"extension {noise.hdu} of the image" if found else f"map {noise.path}"
    if noise.data.shape != image.data.shape:
        raise ValueError(
            f"the noise {name} has {noise.data.shape[1]} x {noise.data.shape[0]} pixels and "
            f"the image {image.data.shape[1]} x {image.data.shape[0]}; they must be of one shape"
        )
    data = np.where(noise.data == 0, np.nan, noise.data) if found else noise.data
    bad = int((data <= 0).sum())
    if bad:
        kind = "negative" if found else "zero or negative"
        raise ValueError(
            f"the noise {name} has {bad} pixels that are {kind}; a standard deviation is positive. "
            "If they mark pixels without data, set them to inf or NaN: those are masked"
        )
    gaps = "are zero, inf or NaN" if found else "have no finite standard deviation"
    values = data[wy : wy + h, wx : wx + w]
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError(
            f"the noise {name} has no finite pixel around the target: all {gaps}; give the noise by "
            " --noise RMS.fits or --noise-std"
        )
    masked = int((~finite).sum())
    typical = float(np.median(values[finite]))
    told = f"noise: {name}, median {typical:.4g} per pixel"
    if masked:
        told += f"; {masked} pixels around the target {gaps} and are masked"
    notes.append(told)
    report = {"source": noise.path, "std": typical, "masked": masked}
    return np.where(finite, values, np.inf), {"noise": report}
