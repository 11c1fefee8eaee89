"""FITS images in, FITS maps out, with their world coordinates right.

Images are flux per pixel; surface brightness (per solid angle) is the exception that `diffpost.io.units`
finds out.  `diffpost.io.wcs` says where a pixel is on the sky.
"""

from __future__ import annotations

import math
import os
import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from diffpost.io.units import is_logarithmic, parse_unit
from diffpost.io.wcs import pixel_scale, regrid_header

__all__ = [
    "FitsImage",
    "cutout_corner",
    "read_companion",
    "read_image",
    "write_cube",
    "write_map",
]

Array = NDArray[np.float64]

# Cards that describe the file read, not the map written.
_STRUCTURE = {
    "SIMPLE", "XTENSION", "BITPIX", "EXTEND", "PCOUNT", "GCOUNT", "GROUPS", "BSCALE", "BZERO",
    "BLANK", "BUNIT", "EXTNAME", "EXTVER", "EXTLEVEL", "CHECKSUM", "DATASUM", "DATAMIN", "DATAMAX",
    "INHERIT", "NEXTEND",
}  # fmt: skip


@final
@dataclass(frozen=True)
class FitsImage:
    """A two-dimensional image.

    data: (h, w) float64 in `unit` per pixel; pixels without data are NaN.
    header: of the HDU read, moved along by `cutout`.
    unit: BUNIT as the file has it, None when missing.
    notes: what the reader found worth telling.
    plane: (number from 0, of how many) where it is one image of a cube.
    """

    data: Array
    header: fits.Header
    path: str
    hdu: str
    unit: str | None = None
    notes: tuple[str, ...] = ()
    plane: tuple[int, int] | None = None

    @property
    def pixel_scale(self) -> float | None:
        """Side of a pixel in arcsec (geometric mean of both axes), None without a celestial WCS."""
        return pixel_scale(self.header)

    def cutout(self, x: float, y: float, size: int) -> FitsImage:
        """The square of `size` pixels around zero-based (x, y); NaN where it leaves the image.

        Raises
        ------
        ValueError: for a size below 1 or a centre off the image.
        """
        h, w = self.data.shape
        if size < 1:
            raise ValueError(f"got a cutout of {size} pixels; expected a size of at least 1")
        if not (-0.5 <= x < w - 0.5 and -0.5 <= y < h - 0.5):
            raise ValueError(
                f"the cutout's centre ({x:g}, {y:g}) is off the image {self.path}, which has "
                f"{w} x {h} pixels; x runs over columns and y over rows, both from 0"
            )
        x0, y0 = cutout_corner(x, y, size)
        return self.window(x0, y0, size, size)

    def window(self, x0: int, y0: int, width: int, height: int) -> FitsImage:
        """The window whose first pixel is (x0, y0); NaN where it leaves the image."""
        h, w = self.data.shape
        data = np.full((height, width), np.nan)
        top, left = max(y0, 0), max(x0, 0)
        bottom, right = min(y0 + height, h), min(x0 + width, w)
        if top < bottom and left < right:
            data[top - y0 : bottom - y0, left - x0 : right - x0] = self.data[top:bottom, left:right]
        return replace(self, data=data, header=regrid_header(self.header, x0=x0, y0=y0))


def cutout_corner(x: float, y: float, size: int) -> tuple[int, int]:
    """First pixel of the square of `size` pixels whose centre is nearest to zero-based (x, y).

    Where two are equally near, the one further on: always to the same side, whatever the position.
    """
    # round() would go to the even of the two.
    return math.floor(x - size / 2 + 1), math.floor(y - size / 2 + 1)


# Reading --------------------------------------------------------------------------------------


def read_image(
    path: str | os.PathLike[str],
    *,
    hdu: int | str | None = None,
    plane: int | None = None,
) -> FitsImage:
    """Read a two-dimensional image.

    Parameters
    ----------
    path: FITS file, which may be compressed.
    hdu: number or name of the HDU; default: the first that holds an image.
    plane: which image of a cube, from 0.

    Raises
    ------
    FileNotFoundError: there is no such file.
    ValueError: it is not FITS, is cut off, holds no image, or a cube without a choice of plane.
    """
    path = Path(path)
    return _image_of(*_load(path, hdu), plane, path)


def read_companion(
    path: str | os.PathLike[str], image: FitsImage, *, hdu: int | str | None = None
) -> FitsImage:
    """Read a map that goes with an image, such as its noise: of a cube, the plane of the same number.

    Raises
    ------
    FileNotFoundError, ValueError: as `read_image`; a cube of another number of planes than the image's.
    """
    path = Path(path)
    data, header, name = _load(path, hdu)
    planes = _planes(data)
    if not planes:
        return _image_of(data, header, name, None, path)
    number, of = image.plane or (0, 0)
    if planes != [of]:
        raise ValueError(
            f"HDU {name} of {path} holds {' x '.join(map(str, planes))} images and the image is "
            f"{f'one of {of}' if of else 'no plane of a cube'}; expected one map, or one a plane"
        )
    return _image_of(data, header, name, number, path)


def _load(path: Path, hdu: int | str | None) -> tuple[Array, fits.Header, str]:
    """Data, header and name of an HDU that holds an image or more."""
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected a FITS image")
    try:
        with warnings.catch_warnings():
            # A cut-off file is only warned about; its missing pixels would come out as an error
            # far away, or as zeros.
            warnings.filterwarnings("error", message=".*truncated.*")
            warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
            with fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
                found, name = _choose(hdus, hdu, path)
                header = found.header.copy()
                # The file's own type is read in full here: a short read raises.
                data = np.array(found.data, dtype=np.float64)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # astropy raises many kinds for broken files
        raise ValueError(
            f"cannot read {path} as FITS ({error}); the file is not FITS, or it is damaged or cut off"
        ) from error
    return data, header, name


def _image_of(
    data: Array, header: fits.Header, name: str, plane: int | None, path: Path
) -> FitsImage:
    planes = _planes(data)
    data, header = _two_dimensional(data, header, plane, path)
    notes = []
    text = header.get("BUNIT")
    unit = str(text).strip() or None if text is not None else None
    if unit is None:
        notes.append(f"{path.name} states no units (BUNIT): the maps will have none either")
    else:
        if parse_unit(unit) is None:
            notes.append(
                f"{path.name}: the unit BUNIT = {unit!r} is unknown; it is kept as it is and the "
                "image is taken as linear flux per pixel"
            )
        elif is_logarithmic(unit):
            raise ValueError(
                f"{path}: BUNIT = {unit!r} is logarithmic; expected an image that is linear in flux"
            )
    data = np.where(np.isfinite(data), data, np.nan)
    return FitsImage(
        data,
        header,
        str(path),
        name,
        unit,
        tuple(notes),
        (plane, planes[0]) if planes and plane is not None else None,
    )


def _planes(data: Array) -> list[int]:
    """Lengths of the axes before the image's; those of length 1 do not count."""
    return [n for n in data.shape[:-2] if n > 1]


class _Refused(Exception):
    """A message of ours, told apart from the many errors that astropy raises for broken files."""


def _choose(hdus: fits.HDUList, hdu: int | str | None, path: Path) -> tuple[Any, str]:
    def label(index: int) -> str:
        name = hdus[index].name
        return f"{index} ({name})" if name else str(index)

    def is_image(item: Any) -> bool:
        shape = getattr(item, "shape", ())
        return bool(item.is_image) and len(shape) >= 2 and int(np.prod(shape)) > 0

    images = [i for i, item in enumerate(hdus) if is_image(item)]
    listing = ", ".join(f"{label(i)}: {hdus[i].shape}" for i in images)
    if hdu is not None:
        try:
            index = hdus.index_of(hdu)
            found = hdus[index]
        except (KeyError, IndexError):
            raise _Refused(f"{path} has no HDU {hdu!r}; it holds {listing or 'no image'}") from None
        if not is_image(found):
            raise _Refused(f"HDU {label(index)} of {path} is not an image; images: {listing}")
        return found, label(index)
    if not images:
        raise _Refused(
            f"{path} holds no image: its {len(hdus)} HDU(s) have no two-dimensional data"
        )
    return hdus[images[0]], label(images[0])


def _two_dimensional(
    data: Array, header: fits.Header, plane: int | None, path: Path
) -> tuple[Array, fits.Header]:
    shape = data.shape
    data = data.reshape([*_planes(data), *shape[-2:]])
    if data.ndim == 2:
        if plane not in (None, 0):
            raise ValueError(f"{path} holds one image; got plane {plane}, expected none or 0")
    elif data.ndim == 3:
        if plane is None:
            raise ValueError(
                f"{path} holds a cube of {len(data)} images; choose one by --plane, of a PSF by --psf-plane "
                f"(0 to {len(data) - 1})"
            )
        if not 0 <= plane < len(data):
            raise ValueError(
                f"{path} holds {len(data)} images; got plane {plane}, expected 0 to {len(data) - 1}"
            )
        data = data[plane]
    else:
        raise ValueError(f"{path} holds data of shape {shape}; expected an image or a cube")
    if len(shape) > 2:
        header = _drop_axes(header)
    return data, header


def _drop_axes(header: fits.Header) -> fits.Header:
    """Remove every card of the axes after the second."""
    out = header.copy()
    pattern = re.compile(
        r"^(NAXIS|CTYPE|CRPIX|CRVAL|CDELT|CUNIT|CROTA|CRDER|CSYER|CNAME|LTV)([3-9])[A-Z]?$"
        r"|^(CD|PC|LTM)(\d_[3-9]|[3-9]_\d)[A-Z]?$"
    )
    for key in list(out):
        if pattern.match(key):
            del out[key]
        elif re.match(r"^WCSAXES[A-Z]?$", key):
            out[key] = 2
    if "NAXIS" in out:
        out["NAXIS"] = 2
    return out


# Writing --------------------------------------------------------------------------------------


def write_map(
    path: str | os.PathLike[str],
    data: Array,
    header: fits.Header,
    *,
    unit: str | None,
    comment: str = "",
    cards: dict[str, Any] | None = None,
) -> None:
    """Write an (h, w) map with the world coordinates and provenance of `header`, as float32.

    cards: further keywords, value or (value, comment).
    """
    out = _map_header(header, unit, comment, cards)
    fits.PrimaryHDU(np.asarray(data, dtype=np.float32), out).writeto(path, overwrite=True)


def write_cube(
    path: str | os.PathLike[str],
    data: Array,
    header: fits.Header,
    *,
    unit: str | None,
    comment: str = "",
    cards: dict[str, Any] | None = None,
) -> None:
    """Write (n, h, w) draws as a cube whose third axis counts them from 1, as float32."""
    out = _map_header(header, unit, comment, cards)
    if "CTYPE1" in out:
        out["WCSAXES"] = 3
        out["CTYPE3"] = ("DRAW", "number of the draw")
        out["CRPIX3"], out["CRVAL3"] = 1.0, 1.0
        out["CD3_3" if "CD1_1" in out else "CDELT3"] = 1.0
        # WCSAXES has to come before the cards it announces.
        value = out["WCSAXES"]
        del out["WCSAXES"]
        first = next(i for i, key in enumerate(out) if re.match(r"^(C[A-Z]+\d|CD\d|PC\d)", key))
        out.insert(first, ("WCSAXES", value, "number of coordinate axes"))
    fits.PrimaryHDU(np.asarray(data, dtype=np.float32), out).writeto(path, overwrite=True)


def _map_header(
    header: fits.Header, unit: str | None, comment: str, cards: dict[str, Any] | None
) -> fits.Header:
    out = fits.Header()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=fits.verify.VerifyWarning)
        for card in header.cards:
            key = card.keyword
            if key in _STRUCTURE or re.match(r"^(NAXIS\d*|TTYPE|TFORM|ZIMAGE)", key):
                continue
            if key in ("COMMENT", "HISTORY", ""):
                continue
            try:
                card.verify("fix")
                out.append(card, bottom=True)
            except (fits.VerifyError, ValueError):
                continue  # a card that the standard forbids cannot be written on
    if unit is not None:
        out["BUNIT"] = (unit, "of each pixel of this map")
    for key, value in (cards or {}).items():
        out[key] = value
    if comment:
        out["COMMENT"] = comment
    return out
