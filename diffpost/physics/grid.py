"""Pixel grids: where the pixels of an image are, in arcsec and on the sky.

Arrays are [y, x]. On n pixels of side p around the centre c the middle of pixel j is at

    x_j = c_x + (j - (n_x - 1)/2) p,        y_i = c_y + (i - (n_y - 1)/2) p,

x along the last axis and y along the one before it, both increasing with the index, so that row 0 is
drawn at the bottom. Splitting each pixel into k x k puts the fine pixels symmetrically around its
middle, and the field stays the same.

A :class:`SkyFrame` ties x and y to the sky: they are offsets from a tangent point along the rows and
columns of the image, rotated against north, and x runs to the *west* if north is up and east is left.
The gnomonic projection (Calabretta & Greisen 2002, A&A 395, 1077, section 5.1.3) is taken as linear
in the offsets, as FITS does it with TAN.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from astropy.io.fits import Header
    from astropy.wcs import WCS

__all__ = ["Grid", "SkyFrame"]

_SQUARE = 1e-3  # by which the sides of a pixel, or its angles, may differ from those of a square
_DISTORTION = 0.1  # pixels by which a corner may be off the linear map


@final
@dataclass(frozen=True)
class SkyFrame:
    """How the offsets (x, y) of a grid lie on the sky.

    With xi towards east and eta towards north, both in arcsec from the tangent point, and the
    rotation rho,

        xi = -x cos rho + y sin rho,      eta = x sin rho + y cos rho,

    and with x -> -x if mirrored.

    Args:
        ra, dec: of the tangent point, where x = y = 0, in degrees (ICRS).
        rotation: position angle of the +y axis, in degrees from north through east.
        mirrored: east is to the right when north is up, as no image of the sky has it before it is
            flipped.

    Raises:
        ValueError: a value that is not finite, or dec beyond a pole.
    """

    ra: float
    dec: float
    rotation: float = 0.0
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.ra, self.dec, self.rotation)):
            raise ValueError(
                f"SkyFrame: got ra={self.ra}, dec={self.dec}, rotation={self.rotation}; expected finite "
                "degrees."
            )
        if abs(self.dec) > 90:
            raise ValueError(f"SkyFrame: got dec={self.dec}; expected -90 to 90 degrees.")

    @property
    def matrix(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """M with (xi, eta) = M (x, y)."""
        rho = math.radians(self.rotation)
        sign = 1.0 if self.mirrored else -1.0
        return (
            (sign * math.cos(rho), math.sin(rho)),
            (-sign * math.sin(rho), math.cos(rho)),
        )

    def position_angle(self, phi: float) -> float:
        """Position angle, in degrees from north through east and in [0, 180), of an axis at phi.

        Args:
            phi: angle of the axis in radians, from +x towards +y, as caustics has it.
        """
        degrees = math.degrees(phi)
        turned = 90.0 - degrees if self.mirrored else degrees - 90.0
        return (self.rotation + turned) % 180.0


@final
@dataclass(frozen=True)
class Grid:
    """A grid of square pixels.

    Args:
        n: pixels on a side, or (ny, nx).
        pixel: side of a pixel, arcsec.
        centre: (x, y) of the middle of the grid, arcsec.
        oversample: k; each pixel is seen through k x k sub-pixels (rays of a lens, for example).
        sky: where x and y lie on the sky, None if that is not known.

    Raises:
        ValueError: n or oversample not positive integers, pixel not positive, a centre that is not
            two finite numbers.
    """

    n: int | tuple[int, int]
    pixel: float
    centre: tuple[float, float] = (0.0, 0.0)
    oversample: int = 1
    sky: SkyFrame | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", _shape(self.n))
        object.__setattr__(self, "oversample", _positive(self.oversample, "oversample"))
        pixel = float(self.pixel)
        if not (math.isfinite(pixel) and pixel > 0):
            raise ValueError(
                f"Grid: got pixel={self.pixel!r}; expected the side of a pixel in arcsec, positive."
            )
        object.__setattr__(self, "pixel", pixel)
        try:
            x, y = (float(value) for value in self.centre)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Grid: got centre={self.centre!r}; expected (x, y) in arcsec."
            ) from error
        if not (math.isfinite(x) and math.isfinite(y)):
            raise ValueError(f"Grid: got centre={self.centre!r}; expected finite arcsec.")
        object.__setattr__(self, "centre", (x, y))
        if self.sky is not None and not isinstance(self.sky, SkyFrame):
            raise ValueError(f"Grid: got sky={self.sky!r}; expected a SkyFrame or None.")

    def __repr__(self) -> str:
        ny, nx = self.shape
        parts = [f"{ny}x{nx} pixels of {self.pixel:g} arcsec"]
        if self.centre != (0.0, 0.0):
            parts.append(f"centre=({self.centre[0]:g}, {self.centre[1]:g})")
        if self.oversample > 1:
            parts.append(f"oversample={self.oversample}")
        return f"Grid({', '.join(parts)})"

    # sizes -------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(ny, nx)."""
        return self.n if isinstance(self.n, tuple) else _shape(self.n)

    @property
    def area(self) -> float:
        """Of a pixel, arcsec^2."""
        return self.pixel**2

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """(left, right, bottom, top) of the outer edges, arcsec: ``extent`` of ``imshow(...,
        origin="lower")``.
        """
        (ny, nx), (x, y) = self.shape, self.centre
        half_x, half_y = nx * self.pixel / 2, ny * self.pixel / 2
        return x - half_x, x + half_x, y - half_y, y + half_y

    @property
    def fine(self) -> Grid:
        """The grid of the sub-pixels: the same field in pixels k times smaller."""
        ny, nx = self.shape
        k = self.oversample
        return replace(self, n=(ny * k, nx * k), pixel=self.pixel / k, oversample=1)

    # maps --------------------------------------------------------------------------------------

    def axes(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x of the columns (nx,) and y of the rows (ny,), arcsec, of the pixels' middles."""
        ny, nx = self.shape
        columns = torch.arange(nx, dtype=torch.float64, device=device)
        rows = torch.arange(ny, dtype=torch.float64, device=device)
        x, y = self.to_arcsec(columns, rows)
        return x.to(dtype), y.to(dtype)

    def coordinates(
        self, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """x and y of the pixels' middles, arcsec, each (ny, nx). Of the sub-pixels:
        ``grid.fine.coordinates()``.
        """
        x, y = self.axes(dtype, device)
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        return xx, yy

    def to_arcsec(self, column: Any, row: Any) -> tuple[Any, Any]:
        """(x, y) in arcsec of a place in pixels, counted from 0 at the middle of the first one.

        Args:
            column, row: numbers, arrays or tensors; fractions are between the middles.
        """
        (ny, nx), (x, y) = self.shape, self.centre
        return (
            x + (column - (nx - 1) / 2) * self.pixel,
            y + (row - (ny - 1) / 2) * self.pixel,
        )

    def to_pixel(self, x: Any, y: Any) -> tuple[Any, Any]:
        """(column, row) of a place in arcsec, the inverse of ``to_arcsec``."""
        (ny, nx), (cx, cy) = self.shape, self.centre
        return (
            (x - cx) / self.pixel + (nx - 1) / 2,
            (y - cy) / self.pixel + (ny - 1) / 2,
        )

    def contains(self, x: Any, y: Any) -> Any:
        """Whether a place in arcsec is within the outer edges."""
        left, right, bottom, top = self.extent
        return (x >= left) & (x <= right) & (y >= bottom) & (y <= top)

    # the sky -----------------------------------------------------------------------------------

    @classmethod
    def from_wcs(
        cls,
        wcs: WCS | Header,
        shape: tuple[int, int] | None = None,
        oversample: int = 1,
    ) -> Self:
        """The grid of an image with world coordinates, its middle at x = y = 0.

        Args:
            wcs: celestial, or a FITS header that has it.
            shape: (ny, nx) of the image; None takes it from the header (or from the WCS).
            oversample: as above.

        Raises:
            ValueError: no celestial coordinates, no shape, pixels that are not square to 0.1%, or
                distortions that move a corner by more than 0.1 pixels from a linear map.
        """
        from astropy.io.fits import Header
        from astropy.wcs import WCS

        if isinstance(wcs, Header):
            header_shape = (wcs.get("NAXIS2"), wcs.get("NAXIS1"))
            if shape is None and None not in header_shape:
                shape = (int(header_shape[0]), int(header_shape[1]))
            wcs = WCS(wcs, naxis=2)
        if not wcs.has_celestial:
            raise ValueError(
                "Grid.from_wcs: the image has no celestial world coordinates; give Grid(n, pixel=...) "
                "the size of its pixels instead."
            )
        wcs = wcs.celestial
        if shape is None:
            shape = wcs.array_shape
        if shape is None:
            raise ValueError("Grid.from_wcs: the WCS has no shape; pass shape=(ny, nx).")
        ny, nx = _shape(shape)
        if wcs.wcs.lngtyp != "RA":
            raise ValueError(
                f"Grid.from_wcs: got coordinates {wcs.wcs.lngtyp}, {wcs.wcs.lattyp}; expected right ascension and "
                "declination."
            )
        ra, dec = (float(v) for v in wcs.all_pix2world((nx - 1) / 2, (ny - 1) / 2, 0))
        plane = _tangent_plane(ra, dec)
        step = 0.5
        middle = ((nx - 1) / 2, (ny - 1) / 2)

        def offsets(dx: float, dy: float) -> tuple[float, float]:
            place = wcs.all_pix2world(middle[0] + dx, middle[1] + dy, 0)
            xi, eta = plane.wcs_world2pix(*place, 0)
            return float(xi), float(eta)

        right, left = offsets(step, 0), offsets(-step, 0)
        up, down = offsets(0, step), offsets(0, -step)
        m = [
            [right[0] - left[0], up[0] - down[0]],
            [right[1] - left[1], up[1] - down[1]],
        ]
        det = m[0][0] * m[1][1] - m[0][1] * m[1][0]
        pixel = math.sqrt(abs(det))
        sides = math.hypot(m[0][0], m[1][0]), math.hypot(m[0][1], m[1][1])
        skew = (m[0][0] * m[0][1] + m[1][0] * m[1][1]) / pixel**2 if pixel > 0 else math.inf
        if pixel == 0 or abs(sides[0] / sides[1] - 1) > _SQUARE or abs(skew) > _SQUARE:
            raise ValueError(
                f"Grid.from_wcs: got pixels with sides {sides[0]:.5g} and {sides[1]:.5g} arcsec and a skew "
                f"of {skew:.2g}; expected squares to {_SQUARE:.1%}. Resample the image to square pixels."
            )
        for dx in (-nx / 2, nx / 2):
            for dy in (-ny / 2, ny / 2):
                xi, eta = offsets(dx, dy)
                off = math.hypot(
                    xi - m[0][0] * dx - m[0][1] * dy, eta - m[1][0] * dx - m[1][1] * dy
                )
                if not off <= _DISTORTION * pixel:
                    raise ValueError(
                        f"Grid.from_wcs: a corner of the image is {off / pixel:.2f} pixels off the linear map of "
                        f"its middle; expected at most {_DISTORTION}. Drizzle or resample the image to a plain "
                        "TAN projection, or cut out a smaller field."
                    )
        # +y points to (xi, eta) = (sin rho, cos rho)
        rotation = math.degrees(math.atan2(m[0][1], m[1][1]))
        frame = SkyFrame(ra, dec, rotation, mirrored=det > 0)
        return cls((ny, nx), pixel, oversample=oversample, sky=frame)

    def to_wcs(self) -> WCS:
        """World coordinates of the grid's pixels (TAN, ICRS).

        Raises:
            ValueError: a grid without ``sky``.
        """
        from astropy.wcs import WCS

        sky = self._sky()
        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.crval = [sky.ra, sky.dec]
        column, row = self.to_pixel(0.0, 0.0)
        wcs.wcs.crpix = [column + 1, row + 1]
        wcs.wcs.cd = [[m * self.pixel / 3600 for m in line] for line in sky.matrix]
        wcs.wcs.radesys = "ICRS"
        wcs.array_shape = self.shape
        wcs.wcs.set()
        return wcs

    def to_sky(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Right ascension and declination in degrees of places in arcsec (numbers or arrays).

        Raises:
            ValueError: a grid without ``sky``.
        """
        ra, dec = self.to_wcs().wcs_pix2world(*self.to_pixel(x, y), 0)
        return ra, dec

    def from_sky(self, ra: Any, dec: Any) -> tuple[Any, Any]:
        """(x, y) in arcsec of places on the sky in degrees, the inverse of ``to_sky``.

        Raises:
            ValueError: a grid without ``sky``.
        """
        column, row = self.to_wcs().wcs_world2pix(ra, dec, 0)
        return self.to_arcsec(column, row)

    def _sky(self) -> SkyFrame:
        if self.sky is None:
            raise ValueError(
                f"{self!r} is not tied to the sky; build it by Grid.from_wcs, or give it sky=SkyFrame(ra, dec)."
            )
        return self.sky


def _shape(n: Any) -> tuple[int, int]:
    if isinstance(n, Tensor):
        n = n.tolist()
    if isinstance(n, tuple | list):
        if len(n) != 2:
            raise ValueError(f"Grid: got n={n!r}; expected a number of pixels or (ny, nx).")
        return _positive(n[0], "n"), _positive(n[1], "n")
    side = _positive(n, "n")
    return side, side


def _positive(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"Grid: got {name}={value!r}; expected an integer of at least 1.")
    return number


def _tangent_plane(ra: float, dec: float) -> WCS:
    """The gnomonic projection at a point, whose pixels are arcsec towards east and north."""
    from astropy.wcs import WCS

    plane = WCS(naxis=2)
    plane.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    plane.wcs.crval = [ra, dec]
    plane.wcs.crpix = [1, 1]
    plane.wcs.cd = [[1 / 3600, 0], [0, 1 / 3600]]
    plane.wcs.set()
    return plane
