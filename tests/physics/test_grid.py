"""Pixel grids: centres, sub-pixels, maps, and the sky, beside numpy and astropy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io.fits import Header
from astropy.wcs import WCS

from diffpost.physics import Grid, SkyFrame


def test_the_first_middle_is_half_a_field_from_the_centre() -> None:
    grid = Grid((4, 3), pixel=0.5, centre=(1.0, -2.0))
    x, y = grid.coordinates()
    assert x.shape == y.shape == grid.shape == (4, 3)
    assert x[0].tolist() == [0.5, 1.0, 1.5] and bool((x == x[:1]).all())
    assert y[:, 0].tolist() == [-2.75, -2.25, -1.75, -1.25] and bool((y == y[:, :1]).all())
    assert grid.extent == (0.25, 1.75, -3.0, -1.0)
    assert grid.area == 0.25


@pytest.mark.parametrize("n", [5, 6])
def test_a_grid_is_symmetric_about_its_centre(n: int) -> None:
    x, y = Grid(n, pixel=0.1).axes()
    torch.testing.assert_close(x, -x.flip(0), rtol=0, atol=1e-15)
    torch.testing.assert_close(x, y)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_sub_pixels_share_the_field_and_average_to_the_pixel(k: int) -> None:
    grid = Grid((3, 4), pixel=0.3, centre=(0.2, 0.1), oversample=k)
    assert grid.fine.shape == (3 * k, 4 * k) and grid.fine.oversample == 1
    np.testing.assert_allclose(grid.fine.extent, grid.extent)
    for fine, coarse in zip(grid.fine.coordinates(), grid.coordinates(), strict=True):
        torch.testing.assert_close(fine.reshape(3, k, 4, k).mean((1, 3)), coarse)


def test_pixels_and_arcsec_are_inverse() -> None:
    grid = Grid((5, 8), pixel=0.07, centre=(0.3, -0.2))
    assert grid.to_arcsec(0, 0) == pytest.approx((0.3 - 3.5 * 0.07, -0.2 - 2 * 0.07))
    places = torch.rand(2, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    column, row = grid.to_pixel(*grid.to_arcsec(*places))
    torch.testing.assert_close(torch.stack([column, row]), places)
    inside = grid.contains(*grid.to_arcsec(torch.tensor([-0.6, -0.4, 7.4, 7.6]), torch.zeros(4)))
    assert inside.tolist() == [False, True, True, False]


def test_a_grid_is_a_value() -> None:
    assert Grid(4, pixel=1) == Grid((4, 4), pixel=1.0) != Grid(4, pixel=2)
    assert len({Grid(4, pixel=1), Grid(np.int64(4), pixel=1.0)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid(4, pixel=1).pixel = 2.0  # type: ignore[misc]
    assert "4x4 pixels of 0.5 arcsec" in repr(Grid(4, pixel=0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "pixel": 1}, "n=0; expected an integer"),
        ({"n": (4, 5, 6), "pixel": 1}, "number of pixels or"),
        ({"n": 4.5, "pixel": 1}, "n=4.5"),
        ({"n": 4, "pixel": 0}, "pixel=0; expected the side"),
        ({"n": 4, "pixel": math.nan}, "pixel=nan"),
        ({"n": 4, "pixel": 1, "centre": 3}, "centre=3; expected"),
        ({"n": 4, "pixel": 1, "centre": (0, math.inf)}, "finite"),
        ({"n": 4, "pixel": 1, "oversample": 0}, "oversample=0"),
        ({"n": 4, "pixel": 1, "sky": "north"}, "SkyFrame"),
    ],
)
def test_bad_grids(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Grid(**arguments)


# the sky -------------------------------------------------------------------------------------------


def wcs(rotation: float = 0.0, mirrored: bool = False, pixel: float = 0.1) -> WCS:
    """TAN, with the position angle of the rows' direction and east to the left unless mirrored."""
    rho, sign = math.radians(rotation), 1.0 if mirrored else -1.0
    out = WCS(naxis=2)
    out.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    out.wcs.crval = [150.1, 2.3]
    out.wcs.crpix = [3.0, 40.0]
    out.wcs.cd = np.array(
        [[sign * math.cos(rho), math.sin(rho)], [-sign * math.sin(rho), math.cos(rho)]]
    ) * (pixel / 3600)
    return out


@pytest.mark.parametrize("rotation", [0.0, 33.0, -120.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_grid_has_the_coordinates_of_its_image(rotation: float, mirrored: bool) -> None:
    image = wcs(rotation, mirrored)
    grid = Grid.from_wcs(image, (20, 31), oversample=2)
    assert grid.shape == (20, 31) and grid.oversample == 2
    assert grid.pixel == pytest.approx(0.1, rel=1e-9)
    assert grid.sky is not None and grid.sky.mirrored is mirrored
    assert grid.sky.rotation == pytest.approx(rotation, abs=1e-2)  # north turns along the field
    column, row = np.array([0.0, 30.0, 12.3]), np.array([0.0, 19.0, 4.4])
    want = image.wcs_pix2world(column, row, 0)
    got = grid.to_wcs().wcs_pix2world(column, row, 0)
    np.testing.assert_allclose(got, want, atol=1e-9)
    x, y = grid.to_arcsec(column, row)
    np.testing.assert_allclose(grid.to_sky(x, y), want, atol=1e-9)
    np.testing.assert_allclose(grid.from_sky(*want), (x, y), atol=1e-5)


def test_without_rotation_north_is_up_and_east_is_left() -> None:
    grid = Grid(11, pixel=0.1, sky=SkyFrame(10.0, 20.0))
    middle = SkyCoord(10.0, 20.0, unit="deg")
    east = middle.directional_offset_by(90 * units.deg, 0.5 * units.arcsec)
    x, y = grid.from_sky(east.ra.deg, east.dec.deg)
    assert (float(x), float(y)) == pytest.approx((-0.5, 0.0), abs=1e-5)


@pytest.mark.parametrize("rotation", [0.0, 25.0])
@pytest.mark.parametrize("mirrored", [False, True])
def test_position_angles(rotation: float, mirrored: bool) -> None:
    """Of the axis at phi, against the sky positions of two places on it."""
    sky = SkyFrame(10.0, -30.0, rotation, mirrored)
    grid = Grid(11, pixel=0.1, sky=sky)
    phi = 0.6
    ra, dec = grid.to_sky(math.cos(phi), math.sin(phi))
    middle, end = SkyCoord(10.0, -30.0, unit="deg"), SkyCoord(float(ra), float(dec), unit="deg")
    want = middle.position_angle(end).deg % 180
    assert sky.position_angle(phi) == pytest.approx(want, abs=1e-3)
    assert sky.position_angle(phi + math.pi) == pytest.approx(want, abs=1e-3)


def test_a_header_knows_its_shape() -> None:
    header = wcs().to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, 9, 7
    assert Grid.from_wcs(header).shape == (7, 9)


def sheared() -> WCS:
    out = wcs()
    out.wcs.cd = out.wcs.cd @ np.array([[1.0, 0.02], [0.0, 1.0]])
    return out


def distorted() -> WCS:
    header = wcs().to_header(relax=True)
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
    header["CRPIX1"], header["CRPIX2"] = 20.5, 20.5
    header["A_ORDER"], header["A_2_0"], header["B_ORDER"], header["B_0_2"] = 2, 1e-3, 2, 0.0
    return WCS(header)


def galactic() -> WCS:
    out = wcs()
    out.wcs.ctype = ["GLON-TAN", "GLAT-TAN"]
    return out


@pytest.mark.parametrize(
    ("image", "shape", "message"),
    [
        (wcs(), None, "pass shape"),
        (Header(), (4, 4), "no celestial"),
        (sheared(), (20, 20), "expected squares"),
        (distorted(), (40, 40), "pixels off the linear map"),
        (galactic(), (4, 4), "right ascension"),
    ],
)
def test_coordinates_that_are_not_a_grid(image: WCS, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid.from_wcs(image, shape)


def test_a_grid_without_a_sky_says_so() -> None:
    with pytest.raises(ValueError, match="not tied to the sky"):
        Grid(4, pixel=1).to_wcs()
    with pytest.raises(ValueError, match="dec=91"):
        SkyFrame(0.0, 91.0)
    with pytest.raises(ValueError, match="finite"):
        SkyFrame(math.nan, 0.0)
