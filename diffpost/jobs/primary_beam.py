"""The primary beam of an interferometer's antennas on the grid of an image: a Gaussian of some width, or a FITS map."""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from diffpost.physics.grid import Grid

__all__ = ["beam_width", "primary_beam_on"]

Array = NDArray[np.float64]

_LARGEST = 1.1  # of a response relative to the pointing centre, beyond which it is no primary beam


def primary_beam_on(grid: Grid, beam: float | str | os.PathLike[str]) -> tuple[Array, str]:
    """Factors (ny, nx) on a grid whose (0, 0) is the pointing centre, and what was taken, in words.

    beam: full width at half power of a Gaussian, arcsec, as a number or text; or a FITS map of the response, such as CASA's .pb
        images: north up, its reference pixel at the pointing centre, linear between its pixels.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: a width that is not positive, or a map that is rotated, has no scale, does not cover the image, or holds
        values that are no response.
    """
    width = beam_width(beam)
    if width is None:
        factors = _mapped(grid, beam)
        told = f"of {os.path.basename(os.fspath(str(beam)))}"
    else:
        if not (math.isfinite(width) and width > 0):
            raise ValueError(
                f"got a primary beam of {width} arcsec; expected a positive width, a FITS map, or 0 for none"
            )
        x, y = grid.coordinates()
        factors = torch.exp(-4 * math.log(2) * (x**2 + y**2) / width**2).numpy()
        told = f"a Gaussian of {width:.4g} arcsec (full width at half power)"
    return factors, f"primary beam: {told}, not less than {float(np.min(factors)):.3f} here"


def beam_width(beam: float | str | os.PathLike[str]) -> float | None:
    """The width that a beam is given by, arcsec, or None if it is a map."""
    try:
        return float(beam)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _mapped(grid: Grid, beam: float | str | os.PathLike[str]) -> Array:
    from astropy.io import fits
    from astropy.wcs import WCS

    path = os.fspath(str(beam))
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no primary beam {path}: neither a number nor a file")
    with fits.open(path) as hdus:
        hdu = next((h for h in hdus if h.data is not None and h.data.ndim >= 2), None)
        if hdu is None:
            raise ValueError(f"{path} holds no image of a primary beam")
        values = np.squeeze(np.asarray(hdu.data, dtype=np.float64))
        wcs = WCS(hdu.header).celestial
    if values.ndim != 2 or wcs.naxis != 2:
        raise ValueError(
            f"{path}: got a map of shape {values.shape} with {wcs.naxis} celestial axes; expected one image with right ascension and "
            "declination"
        )
    scale = 3600 * wcs.pixel_scale_matrix  # arcsec
    if abs(scale[0, 1]) + abs(scale[1, 0]) > 1e-6 * abs(scale[0, 0]) or scale[0, 0] == 0:
        raise ValueError(
            f"{path}: the map is rotated or has no scale; expected north up, with CDELT in degrees"
        )
    x, y = grid.coordinates()
    # x of the grid is west
    columns = wcs.wcs.crpix[0] - 1 - x.numpy() / scale[0, 0]
    rows = wcs.wcs.crpix[1] - 1 + y.numpy() / scale[1, 1]
    found: Array = map_coordinates(values, [rows, columns], order=1, cval=np.nan)
    if not np.isfinite(found).all():
        share = float(np.mean(~np.isfinite(found)))
        raise ValueError(
            f"{path}: the map does not cover {share:.1%} of the image (outside of it, or NaN); choose a smaller image, or a larger map"
        )
    if found.min() < 0 or not 0 < found.max() <= _LARGEST:
        raise ValueError(
            f"{path}: values from {found.min():.3g} to {found.max():.3g} on the image; expected a response between 0 and 1, relative to the "
            "pointing centre"
        )
    return found
