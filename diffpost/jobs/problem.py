r"""From files or arrays to a likelihood on a grid that a prior can run on.

The model is an image x of K x K pixels per image pixel on a grid with a margin around the cutout,

    y = PixelBin(K) Convolve(psf) x + noise,

so that light from just outside scatters in and nothing wraps around.  The margin holds 90% of the
PSF's flux on each side, and the sides are rounded up to what the prior's network can take.  The
margin and pixels without data have infinite variance.  Under a noise model, which knows whole frames only, the
operator ends in a crop to the cutout instead, and no pixel of that may be masked.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, final

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from diffpost.io.fits import (
    FitsImage,
    cutout_corner,
    read_companion,
    read_image,
)
from diffpost.io.units import is_surface_brightness
from diffpost.io.wcs import regrid_header, sky_to_pixel
from diffpost.jobs.noise import deviation_of, expected_flux, noise_of, poisson_variance
from diffpost.jobs.noise_model import noise_model_of, on_top, refuse_masked
from diffpost.jobs.psf import Psf, oversampling_of, prepare_psf
from diffpost.jobs.scale import SmoothedPeak, infer_scale
from diffpost.jobs.target import Scene, read_scene, sky_noise
from diffpost.learned_noise import LearnedNoise

__all__ = ["Grid", "ImageLike", "Problem", "prepare"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
ImageLike = str | os.PathLike[str] | FitsImage | NDArray[Any]

_SHARE = 0.90  # of the PSF's flux that the margin holds
_LARGEST = 1024  # side of a model grid beyond which a cutout is surely missing


@final
@dataclass(frozen=True)
class Grid:
    """Where the cutout lies on the grid of the model.

    shape: (H, W) of the grid; top, left: first model pixel of the cutout; height, width: of the cutout
    in model pixels.
    """

    shape: tuple[int, int]
    top: int
    left: int
    height: int
    width: int

    @property
    def region(self) -> tuple[slice, slice]:
        return (
            slice(self.top, self.top + self.height),
            slice(self.left, self.left + self.width),
        )

    def data_region(self, oversample: int) -> tuple[slice, slice]:
        """The cutout on the grid at the sampling of the data."""
        k = oversample
        return (
            slice(self.top // k, (self.top + self.height) // k),
            slice(self.left // k, (self.left + self.width) // k),
        )


@final
@dataclass(frozen=True)
class Problem:
    """What is to be deconvolved, in the units of the data.

    data: (h, w) with the background subtracted; NaN where there is no data.
    std: (h, w) standard deviation of the noise; inf where there is no data.
    psf: the kernel; background: (h, w) what was subtracted; scene: sources of the cutout.
    scale: flux per model pixel that the prior calls 1; None: the prior decides (`diffpost.jobs.setup`).
    header: of the cutout, at the sampling of the data; unit: its BUNIT.
    corner: zero-based (x, y) in the image of the first pixel of the cutout.
    notes: everything worth telling, in order; report: the same in numbers.
    noise_model: the noise where it is learned; then std is the root of its variance.
    """

    data: Array
    std: Array
    psf: Psf
    background: Array
    scene: Scene
    scale: float | None
    oversample: int
    header: fits.Header
    unit: str | None
    corner: tuple[int, int]
    pixel_scale: float | None
    notes: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict)
    noise_model: LearnedNoise | None = None

    @property
    def seen(self) -> Mask:
        """Pixels that count."""
        return np.asarray(np.isfinite(self.std))

    @property
    def model_header(self) -> fits.Header:
        """Header of a map at the sampling of the model."""
        return regrid_header(self.header, factor=self.oversample)

    @property
    def surface_brightness(self) -> bool:
        """Whether the unit is per solid angle, so that a map at finer sampling takes a factor K^2."""
        return is_surface_brightness(self.unit)

    def _brightest(self) -> Mask:
        """Pixels of the source with the highest peak among those that are modelled."""
        segments = np.where(self.seen, self.scene.segments, 0)
        if not (segments > 0).any():
            return self.scene.target
        smooth = gaussian_filter(np.where(self.seen, self.data, 0.0), 1.0)
        peak = int(np.argmax(np.where(segments > 0, smooth, -np.inf)))
        return np.asarray(segments == segments.flat[peak])

    def scaled(self, rule: SmoothedPeak) -> Problem:
        """The same with the flux scale that a rule infers from the brightest of its sources.

        That is the target unless neighbours were kept: the prior has not seen amplitudes far above 1.

        Raises
        ------
        ValueError: the target has no light.
        """
        std = float(np.median(self.std[self.seen]))
        scale, flux = infer_scale(
            self.data,
            self.psf.native,
            std,
            self._brightest(),
            oversample=self.oversample,
            smoothing=rule.smoothing,
        )
        told = (
            f"flux scale: {scale:.4g} per model pixel is 1 in network units (peak smoothed by "
            f"{rule.smoothing:g} model pixels {flux['smoothed_peak']:.4g}, x "
            f"{flux['psf_correction']:.2f} for the PSF)"
        )
        return replace(
            self,
            scale=scale,
            notes=(*self.notes, told),
            report={**self.report, "flux": {**flux, "smoothing": rule.smoothing}},
        )

    def grid(
        self, stride: int, smallest: tuple[int, int] = (0, 0), margin: int | None = None
    ) -> Grid:
        """The grid of the model for a network that takes sides divisible by `stride`.

        smallest: sides that the grid has at least, in model pixels.
        margin: image pixels around the cutout; default: what holds 90% of the PSF's flux, 4 or more.

        Raises
        ------
        ValueError: a margin that is negative, or so wide a PSF that the grid would be out of proportion.
        """
        if margin is not None and margin < 0:
            raise ValueError(f"got a margin of {margin} pixels; expected 0 or more")
        k = self.oversample
        m = max(4, self.psf.radius(_SHARE)) if margin is None else margin
        unit = math.lcm(stride, k)
        h, w = self.data.shape
        sides = [
            math.ceil(max((n + 2 * m) * k, least) / unit) * unit
            for n, least in zip((h, w), smallest, strict=True)
        ]
        if max(sides) > max(_LARGEST, 2 * k * max(h, w), *smallest):
            raise ValueError(
                f"the model would have {sides[1]} x {sides[0]} pixels for a cutout of {w * k} x {h * k}: "
                f"it reaches {m} image pixels beyond, where 90% of the PSF's flux is; check the PSF's "
                "background and sampling, or trim it"
            )
        top, left = (((side // k - n) // 2) * k for side, n in zip(sides, (h, w), strict=True))
        return Grid((sides[0], sides[1]), top, left, h * k, w * k)


def prepare(
    image: ImageLike,
    psf: ImageLike,
    noise: float | ImageLike | None = None,
    *,
    weight: ImageLike | None = None,
    cutout: tuple[float, float, int] | None = None,
    center: tuple[str | float, str | float] | None = None,
    size: int | None = None,
    hdu: int | str | None = None,
    plane: int | None = None,
    oversample: int = 1,
    psf_oversample: float | None = None,
    psf_background: float | None = None,
    psf_plane: int | None = None,
    recentre_psf: bool = True,
    background: str = "smooth",
    keep_neighbours: bool = False,
    exptime: float | None = None,
    psf_error: float = 0.0,
    scale: float | SmoothedPeak | None = None,
    noise_model: str | os.PathLike[str] | LearnedNoise | None = None,
    sky_std: float | None = None,
) -> Problem:
    """Read, check and describe a target; the arguments are those of `diffpost.deconvolve.deconvolve`.

    Raises
    ------
    FileNotFoundError, ValueError: for inputs that cannot be used, saying why and what to do.
    """
    if isinstance(oversample, bool) or oversample != int(oversample) or oversample < 1:
        raise ValueError(f"got oversample = {oversample}; expected an integer of at least 1")
    if noise is not None and weight is not None:
        raise ValueError("got a noise and a weight; give one of them")
    if noise_model is not None and (noise is not None or weight is not None):
        raise ValueError(
            "got a noise model and also a Gaussian noise or a weight; the model is the whole of the noise: give one"
        )
    if noise_model is None and sky_std is not None:
        raise ValueError("got a sky_std without a noise model to scale; give noise_model too")
    whole = _image(image, "image", hdu=hdu, plane=plane)
    notes = list(whole.notes)
    if not np.isfinite(whole.data).any():
        raise ValueError(
            f"the image {whole.path} is NaN everywhere: there is nothing to deconvolve"
        )
    x, y, width, height = _frame(whole, cutout, center, size)
    x0, y0 = (0, 0) if (width, height) == whole.data.shape[::-1] else cutout_corner(x, y, width)
    cut = whole.window(x0, y0, width, height)
    if not np.isfinite(cut.data).any():
        raise ValueError("the cutout is NaN everywhere: there is nothing to deconvolve")
    if max(width, height) * oversample > _LARGEST:
        raise ValueError(
            f"the model would have {width * oversample} x {height * oversample} pixels; choose the "
            "target by --cutout x,y,size (or --center RA DEC --size N)"
        )
    blank = int((~np.isfinite(cut.data)).sum())
    if blank:
        notes.append(f"{blank} pixels of the cutout have no data (NaN or off the image): masked")

    # The PSF comes before the slower steps, so that a bad one is told at once.
    kernel_image = _image(psf, "PSF", plane=psf_plane)
    finer = psf_oversample
    if finer is None:
        finer, told = oversampling_of(kernel_image.header, whole.header)
        if told:
            notes.append(told)
    prepared = prepare_psf(
        kernel_image.data,
        oversample=oversample,
        psf_oversample=finer,
        background=psf_background,
        recentre=recentre_psf,
    )
    notes += prepared.notes

    # The surroundings tell the sky better than a cutout that its galaxy fills.
    rim = max(100, max(width, height) // 2)
    wx, wy = max(x0 - rim, 0), max(y0 - rim, 0)
    right = min(x0 + width + rim, whole.data.shape[1])
    bottom = min(y0 + height + rim, whole.data.shape[0])
    around = whole.data[wy:bottom, wx:right]
    scene = read_scene(around, (x - wx, y - wy), background=background)
    notes += scene.notes

    learned: LearnedNoise | None = None
    if noise_model is not None:
        off = around - scene.background
        learned, report = noise_model_of(noise_model, sky_std, whole.unit, off, scene.sky, notes)
        given = np.full(around.shape, math.sqrt(learned.own_variance))
    else:
        source = _noise_source(noise, whole)
        if weight is not None:
            source = deviation_of(_companion(weight, "weight map", whole))
        given, report = noise_of(source, whole, (wx, wy), around, scene, exptime, notes)
    inner = _window(x0 - wx, y0 - wy, width, height)
    level = inner(scene.background, 0.0)
    std = inner(given, np.inf)
    segments = inner(scene.segments.astype(float), 0.0).astype(int)
    part = Scene(level, segments, inner(scene.sky.astype(float), 0.0) > 0, scene.notes)
    residual = cut.data - level
    if not (math.isfinite(psf_error) and psf_error >= 0):
        raise ValueError(f"got psf_error = {psf_error}; expected a fraction such as 0.01")
    extra = np.zeros(std.shape)
    if learned is not None:
        extra, seconds = poisson_variance(residual, whole, exptime)
        if seconds is not None:
            notes.append(
                f"noise: the sources' Poisson noise was added for {seconds:.6g} s of {whole.unit}"
            )
        std = np.sqrt(std**2 + extra)
    if psf_error:
        extra = extra + (psf_error * expected_flux(residual)) ** 2
        std = np.hypot(std, psf_error * expected_flux(residual))
        notes.append(
            f"noise: {100 * psf_error:g}% of the local flux was added in quadrature for errors of the PSF"
        )
    std = np.where(np.isfinite(residual) & np.isfinite(std), std, np.inf)
    if not np.isfinite(std).any():
        raise ValueError("no pixel of the cutout has both data and a finite noise")
    others = inner(scene.neighbours.astype(float), 0.0) > 0
    if others.any():
        count = len(np.unique(segments[segments > 1]))
        share = f"{count} neighbouring source(s), {others.sum()} pixels"
        if keep_neighbours:
            notes.append(f"{share}: kept as part of the target, as asked")
        else:
            std = np.where(others, np.inf, std)
            notes.append(
                f"{share}, were masked: segments of photutils' deblending that are not the target's, "
                "grown by 3 pixels (--keep-neighbours includes them)"
            )
    residual = np.where(np.isfinite(std), residual, np.nan)
    if not np.isfinite(residual).any():
        raise ValueError(
            "every pixel of the cutout is masked as a neighbour; centre the cutout on the target or "
            "use --keep-neighbours"
        )
    if learned is not None:
        refuse_masked(np.isfinite(std), others)
        learned = on_top(learned, extra)
    if isinstance(scale, SmoothedPeak) or scale is None:
        flux = {}
    elif not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"got scale = {scale}; expected a positive flux per model pixel")
    else:
        flux = {"given": True}
        notes.append(f"flux scale: {scale:.4g} per model pixel, as given")
    sky = _sky_check(around - scene.background, scene, given)
    if sky is not None:
        report["sky"] = sky
    report |= {
        "psf": prepared.report,
        "flux": flux,
        "masked_pixels": int((~np.isfinite(std)).sum()),
        "background": {
            "kind": background,
            "min": float(level.min()),
            "max": float(level.max()),
            "sky_pixels": int(scene.sky.sum()),
        },
    }
    problem = Problem(
        data=residual,
        std=std,
        psf=prepared,
        background=level,
        scene=part,
        scale=None if isinstance(scale, SmoothedPeak) or scale is None else float(scale),
        oversample=int(oversample),
        header=cut.header,
        unit=whole.unit,
        corner=(x0, y0),
        pixel_scale=None if whole.pixel_scale is None else whole.pixel_scale / oversample,
        notes=tuple(notes),
        report=report,
        noise_model=learned,
    )
    return problem.scaled(scale) if isinstance(scale, SmoothedPeak) else problem


def _sky_check(residual: Array, scene: Scene, std: Array) -> dict[str, float] | None:
    """What the blank sky says about the noise that is going to be used: a yardstick for residuals."""
    used = scene.sky & np.isfinite(std) & np.isfinite(residual)
    try:
        sky = sky_noise(residual, used)
    except ValueError:
        return None
    assumed = float(np.sqrt(np.mean(std[used] ** 2)))
    return {
        "std": sky.std,
        "autocorrelation": sky.correlation,
        "reduced_chi2": (sky.std / assumed) ** 2,
    }


# Parts ----------------------------------------------------------------------------------------


def _image(
    source: ImageLike, what: str, *, hdu: int | str | None = None, plane: int | None = None
) -> FitsImage:
    if isinstance(source, FitsImage):
        return source
    if isinstance(source, str | os.PathLike):
        return read_image(source, hdu=hdu, plane=plane)
    data = np.asarray(source, dtype=np.float64)
    data = (
        data.reshape(data.shape[-2:])
        if data.ndim > 2 and data.size == np.prod(data.shape[-2:])
        else data
    )
    if data.ndim != 2:
        raise ValueError(f"got a {what} of shape {data.shape}; expected (h, w)")
    return FitsImage(
        np.where(np.isfinite(data), data, np.nan), fits.Header(), f"<{what} array>", "array"
    )


def _frame(
    image: FitsImage,
    cutout: tuple[float, float, int] | None,
    center: tuple[str | float, str | float] | None,
    size: int | None,
) -> tuple[float, float, int, int]:
    """Centre (x, y) and sides of the cutout."""
    h, w = image.data.shape
    if cutout is not None and (center is not None or size is not None):
        raise ValueError("got a cutout and also a centre or a size; give one or the other")
    if center is not None:
        x, y = sky_to_pixel(image.header, *center)
        if not (-0.5 <= x < w - 0.5 and -0.5 <= y < h - 0.5):
            raise ValueError(
                f"the position {center[0]} {center[1]} falls on pixel ({x:.1f}, {y:.1f}), off the "
                f"image of {w} x {h} pixels"
            )
        side = min(h, w) if size is None else size
        return *_centred(image, x, y, side), side, side
    if cutout is not None:
        x, y, side = cutout
        return *_centred(image, x, y, side), int(side), int(side)
    x, y = (w - 1) / 2, (h - 1) / 2
    if size is not None:
        return *_centred(image, x, y, size), size, size
    return x, y, w, h


def _centred(image: FitsImage, x: float, y: float, side: int) -> tuple[float, float]:
    if side != int(side) or side < 8:
        raise ValueError(f"got a cutout of {side} pixels; expected an integer of at least 8")
    h, w = image.data.shape
    if not (-0.5 <= x < w - 0.5 and -0.5 <= y < h - 0.5):
        raise ValueError(
            f"the cutout's centre ({x:g}, {y:g}) is off the image, which has {w} x {h} pixels; x runs "
            "over columns and y over rows, both from 0"
        )
    return x, y


def _window(x0: int, y0: int, width: int, height: int) -> Any:
    """A function that cuts the window out of an array and fills what is beyond with a value."""

    def cut(values: Array, fill: float) -> Array:
        h, w = values.shape
        out = np.full((height, width), fill)
        top, left = max(y0, 0), max(x0, 0)
        bottom, right = min(y0 + height, h), min(x0 + width, w)
        out[top - y0 : bottom - y0, left - x0 : right - x0] = values[top:bottom, left:right]
        return out

    return cut


def _noise_source(noise: float | ImageLike | None, image: FitsImage) -> float | FitsImage | None:
    if isinstance(noise, bool):
        raise ValueError(f"got noise = {noise}; expected a standard deviation or a map")
    if noise is None or isinstance(noise, int | float):
        return noise
    return _companion(noise, "noise map", image)


def _companion(source: ImageLike, what: str, image: FitsImage) -> FitsImage:
    if isinstance(source, str | os.PathLike):
        return read_companion(source, image)
    return _image(source, what)
