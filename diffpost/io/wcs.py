"""World coordinates of FITS images: where a pixel is on the sky, and what a cutout does to it.

A FITS image puts pixel centres at integer coordinates that start from 1, so the lower left corner of
the first pixel lies at 1/2.  Cutting (x0, y0) zero-based pixels away and splitting each pixel into
K x K therefore moves a position p (in pixels, along one axis) to

    p' = K (p - x0 - 1/2) + 1/2

which is what `regrid_header` does to CRPIX, while the matrix (CD, or CDELT next to PC or CROTA)
shrinks by K and the SIP polynomial A_pq u^p v^q scales as K^(1 - p - q).
"""

from __future__ import annotations

import re
import warnings

import numpy as np
from astropy import units
from astropy.io import fits
from astropy.wcs import WCS, FITSFixedWarning
from astropy.wcs.utils import proj_plane_pixel_scales
from numpy.typing import NDArray

__all__ = ["north_east", "pixel_scale", "pixel_to_sky", "regrid_header", "sky_to_pixel"]


def _wcs(header: fits.Header) -> WCS:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FITSFixedWarning)
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
        return WCS(header, naxis=2)


def pixel_scale(header: fits.Header) -> float | None:
    """Side of a pixel in arcsec (geometric mean of both axes), None without a celestial WCS."""
    wcs = _wcs(header)
    if not wcs.has_celestial:
        return None
    x, y = proj_plane_pixel_scales(wcs.celestial)
    return float(np.sqrt(x * y) * 3600)


def pixel_to_sky(
    header: fits.Header, x: NDArray[np.float64], y: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """ICRS right ascension and declination (degrees) of zero-based pixels, None without a celestial WCS."""
    wcs = _wcs(header)
    if not wcs.has_celestial:
        return None
    sky = wcs.celestial.pixel_to_world(x, y).icrs
    return np.asarray(sky.ra.deg), np.asarray(sky.dec.deg)


def sky_to_pixel(header: fits.Header, ra: str | float, dec: str | float) -> tuple[float, float]:
    """Zero-based pixel of a sky position, in degrees or in sexagesimal hours and degrees (ICRS).

    Raises
    ------
    ValueError: the position cannot be read, or the header has no celestial WCS.
    """
    from astropy.coordinates import SkyCoord

    wcs = _wcs(header)
    if not wcs.has_celestial:
        raise ValueError(
            "the image has no celestial world coordinates; give the target in pixels (--cutout)"
        )
    try:
        try:
            position = SkyCoord(float(ra), float(dec), unit="deg")
        except ValueError:
            position = SkyCoord(str(ra), str(dec), unit=("hourangle", "deg"))
    except Exception as error:  # astropy's parser raises several kinds
        raise ValueError(
            f"cannot read the position {ra} {dec} ({error}); expected degrees, or hours and degrees "
            "such as 00:14:20.0 -30:23:16"
        ) from error
    x, y = wcs.celestial.world_to_pixel(position)
    if not (np.isfinite(x) and np.isfinite(y)):
        raise ValueError(f"the position {ra} {dec} is not on the image's projection")
    return float(x), float(y)


def north_east(
    header: fits.Header, shape: tuple[int, ...]
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Unit vectors (x, y) in pixels towards north and east at the middle of an image, or None."""
    from astropy.coordinates import SkyCoord

    wcs = _wcs(header)
    if not wcs.has_celestial:
        return None
    wcs = wcs.celestial
    x, y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    middle = wcs.pixel_to_world(x, y)
    if not isinstance(middle, SkyCoord):
        return None
    out = []
    for angle in (0.0, 90.0):
        px, py = wcs.world_to_pixel(
            middle.directional_offset_by(angle * units.deg, 1.0 * units.arcsec)
        )
        step = np.array([float(px) - x, float(py) - y])
        norm = float(np.hypot(*step))
        if not (np.isfinite(norm) and norm > 0):
            return None
        out.append((float(step[0] / norm), float(step[1] / norm)))
    return out[0], out[1]


def regrid_header(header: fits.Header, *, x0: int = 0, y0: int = 0, factor: int = 1) -> fits.Header:
    """The header after cutting away (x0, y0) pixels and splitting each pixel into factor x factor.

    Treats the primary and every alternate WCS (CD, PC with CDELT, CROTA), SIP and IRAF's LTV/LTM.
    Lookup-table distortions belong to a full frame and are not supported.

    Raises
    ------
    ValueError: for a factor below 1 or a header with lookup-table distortions.
    """
    if factor < 1:
        raise ValueError(f"got an oversampling of {factor}; expected an integer of at least 1")
    if any(key in header for key in ("CPDIS1", "CPDIS2", "D2IMDIS1", "D2IMDIS2")) and (
        factor > 1 or x0 or y0
    ):
        raise ValueError(
            "the image's world coordinates use a lookup table (CPDIS/D2IMDIS); drizzle or resample "
            "the image to a plain projection first"
        )
    out = header.copy()
    for axis, start in ((1, x0), (2, y0)):
        for suffix in ["", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]:
            _regrid_axis(out, axis, start, factor, suffix)
        if f"LTV{axis}" in out or f"LTM{axis}_{axis}" in out:
            # IRAF: pixel = LTM physical + LTV, with the same halves as CRPIX
            old = float(out.get(f"LTV{axis}", 0.0))
            out[f"LTV{axis}"] = factor * (old - start - 0.5) + 0.5
            out[f"LTM{axis}_{axis}"] = factor * float(out.get(f"LTM{axis}_{axis}", 1.0))
    if factor > 1:
        _regrid_sip(out, factor)
    return out


def _regrid_axis(header: fits.Header, axis: int, start: int, factor: int, suffix: str) -> None:
    key = f"CRPIX{axis}{suffix}"
    described = (
        key in header or f"CTYPE{axis}{suffix}" in header or f"CRVAL{axis}{suffix}" in header
    )
    if not described:
        return
    header[key] = factor * (float(header.get(key, 0.0)) - start - 0.5) + 0.5
    if factor == 1:
        return
    # A column of CD belongs to a pixel axis.
    columns = [f"CD{i}_{axis}{suffix}" for i in (1, 2)]
    if any(name in header for name in columns) or any(
        f"CD{i}_{j}{suffix}" in header for i in (1, 2) for j in (1, 2)
    ):
        for name in columns:
            if name in header:
                header[name] = float(header[name]) / factor
        return
    cdelt = f"CDELT{axis}{suffix}"
    # CDELT scales a row of PC; both pixel axes are split alike, so both rows take the factor.
    header[cdelt] = float(header.get(cdelt, 1.0)) / factor


def _regrid_sip(header: fits.Header, factor: int) -> None:
    for key in list(header):
        match = re.match(r"^(A|B|AP|BP)_(\d)_(\d)$", key)
        if match:
            order = int(match[2]) + int(match[3])
            header[key] = float(header[key]) * float(factor) ** (1 - order)
    for key in ("A_DMAX", "B_DMAX"):
        if key in header:
            header[key] = float(header[key]) * factor
