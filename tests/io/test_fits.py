"""FITS images: what is read, what is refused, and where a pixel's sky position goes."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from diffpost.io.fits import (
    cutout_corner,
    read_companion,
    read_image,
    write_cube,
    write_map,
)
from diffpost.io.units import is_electron_rate, is_logarithmic, is_surface_brightness, parse_unit
from diffpost.io.wcs import regrid_header, sky_to_pixel


def base_header(kind: str) -> fits.Header:
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CRPIX1"], header["CRPIX2"] = 31.3, -12.7
    header["CRVAL1"], header["CRVAL2"] = 3.58, -30.39
    header["CUNIT1"] = header["CUNIT2"] = "deg"
    if kind in ("cd", "sip"):
        header["CD1_1"], header["CD1_2"] = -1.5e-5, 0.4e-5
        header["CD2_1"], header["CD2_2"] = 0.5e-5, 1.7e-5
    elif kind == "pc":
        header["PC1_1"], header["PC1_2"], header["PC2_1"], header["PC2_2"] = -0.9, 0.2, 0.3, 0.8
        header["CDELT1"], header["CDELT2"] = 1.6e-5, 1.9e-5
    elif kind == "pc-only":
        header["PC1_1"], header["PC2_2"] = -1.6666e-5, 1.6666e-5
    elif kind == "crota":
        header["CDELT1"], header["CDELT2"], header["CROTA2"] = -1.6e-5, 1.6e-5, 27.0
    if kind == "sip":
        header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
        header["A_ORDER"] = header["B_ORDER"] = 3
        header["A_2_0"], header["A_1_1"], header["B_0_2"], header["B_3_0"] = 2e-4, -1e-4, 3e-4, 1e-6
    return header


KINDS = ["cd", "pc", "pc-only", "crota", "sip"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_the_sky_position_of_a_point_survives_cutout_and_oversampling(
    kind: str, factor: int
) -> None:
    header = base_header(kind)
    x0, y0 = 17, -5
    moved = regrid_header(header, x0=x0, y0=y0, factor=factor)
    before, after = WCS(header), WCS(moved)
    x, y = np.array([17.0, 40.25, 61.0]), np.array([3.0, 28.5, 55.0])
    sky = before.all_pix2world(np.stack([x, y], 1), 0)
    # The centre of coarse pixel p is the mean of the centres of its fine pixels.
    fine_x = factor * (x - x0) + (factor - 1) / 2
    fine_y = factor * (y - y0) + (factor - 1) / 2
    back = after.all_world2pix(sky, 0, tolerance=1e-9)
    assert np.abs(back - np.stack([fine_x, fine_y], 1)).max() < 1e-6
    # Negative control: a header that forgets the half pixel is off by what this test must see.
    if factor > 1:
        wrong = moved.copy()
        wrong["CRPIX1"] -= 0.5
        off = WCS(wrong).all_world2pix(sky, 0, tolerance=1e-9)
        assert np.abs(off - np.stack([fine_x, fine_y], 1)).max() > 0.4


def test_iraf_physical_coordinates_and_alternate_wcs_move_along() -> None:
    header = base_header("cd")
    header["LTV1"], header["LTM1_1"] = -100.0, 1.0
    header["CTYPE1A"], header["CRPIX1A"], header["CRVAL1A"], header["CDELT1A"] = (
        "X",
        1.0,
        101.0,
        1.0,
    )
    header["CTYPE2A"], header["CRPIX2A"], header["CRVAL2A"], header["CDELT2A"] = "Y", 1.0, 1.0, 1.0
    out = regrid_header(header, x0=10, factor=2)
    # Fine pixel 1 (1-based) is a quarter pixel left of coarse pixel 11, physical 111.
    assert (1 - out["LTV1"]) / out["LTM1_1"] == pytest.approx(111 - 0.25)
    assert out["CRVAL1A"] + out["CDELT1A"] * (1 - out["CRPIX1A"]) == pytest.approx(111 - 0.25)


def test_lookup_table_distortions_are_refused() -> None:
    header = base_header("cd")
    header["CPDIS1"] = "LOOKUP"
    with pytest.raises(ValueError, match="lookup table"):
        regrid_header(header, factor=2)


def test_an_image_is_read_with_its_unit_scale_and_gaps(tmp_path: Path) -> None:
    data = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    data[1, 2] = np.inf
    header = base_header("crota")
    header["BUNIT"] = "ELECTRONS/S"
    path = tmp_path / "image.fits.gz"
    fits.PrimaryHDU(data, header).writeto(path)
    image = read_image(path)
    assert image.data.shape == (3, 4)
    assert image.data.dtype == np.float64
    assert np.isnan(image.data[1, 2])
    assert np.isnan(image.data).sum() == 1
    assert image.unit == "ELECTRONS/S"
    assert image.notes == ()
    assert image.pixel_scale == pytest.approx(1.6e-5 * 3600, rel=1e-6)


def test_a_cutout_is_centred_and_empty_beyond_the_image(tmp_path: Path) -> None:
    path = tmp_path / "image.fits"
    fits.PrimaryHDU(np.arange(100.0).reshape(10, 10), base_header("cd")).writeto(path)
    image = read_image(path)
    cut = image.cutout(4, 6, 5)
    assert cut.data[2, 2] == 64
    even = image.cutout(4.5, 6.5, 4)
    assert even.data[0, 0] == 53
    edge = image.cutout(0, 0, 5)
    assert np.isnan(edge.data[:2]).all()
    assert np.isnan(edge.data[:, :2]).all()
    assert edge.data[2, 2] == 0
    sky = WCS(image.header).all_pix2world([[4, 6]], 0)
    assert np.allclose(WCS(cut.header).all_world2pix(sky, 0), [[2, 2]], atol=1e-6)
    with pytest.raises(ValueError, match="off the image"):
        image.cutout(10, 3, 5)


@pytest.mark.parametrize("size", [8, 9, 24, 25])
def test_a_cutout_halfway_between_pixels_goes_to_the_same_side_everywhere(size: int) -> None:
    # A whole pixel as the centre suits odd sizes, a pixel's edge even ones.
    exact = 0.5 * ((size - 1) % 2)
    halfway = exact + 0.5
    for x in range(40, 60):
        first, _ = cutout_corner(x + exact, 50, size)
        assert first + (size - 1) / 2 == x + exact
        assert cutout_corner(x + halfway, 50, size)[0] == first + 1
        assert cutout_corner(50, x + halfway, size)[1] == first + 1
        # Nearest all the same: a little less than halfway stays.
        assert cutout_corner(x + halfway - 1e-6, 50, size)[0] == first
        assert cutout_corner(x + exact - 0.49, 50, size)[0] == first


def test_a_sky_position_in_degrees_or_sexagesimal_finds_its_pixel() -> None:
    header = base_header("cd")
    header["RADESYS"] = "ICRS"
    ra, dec = WCS(header).all_pix2world([[12.0, 7.0]], 0)[0]
    assert sky_to_pixel(header, ra, dec) == pytest.approx((12.0, 7.0), abs=1e-6)
    from astropy.coordinates import SkyCoord

    position = SkyCoord(ra, dec, unit="deg")
    text = position.to_string("hmsdms", sep=":", precision=7).split()
    assert sky_to_pixel(header, text[0], text[1]) == pytest.approx((12.0, 7.0), abs=1e-3)
    with pytest.raises(ValueError, match="cannot read the position"):
        sky_to_pixel(header, "north", "east")
    with pytest.raises(ValueError, match="--cutout"):
        sky_to_pixel(fits.Header(), 3.0, 4.0)


def test_an_extension_and_a_plane_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "cube.fits"
    cube = np.stack([np.full((4, 5), float(k)) for k in range(3)])
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])])
    fits.HDUList(
        [
            fits.PrimaryHDU(),
            table,
            fits.ImageHDU(cube, name="CUBE"),
            fits.ImageHDU(cube[2], name="ERR"),
        ]
    ).writeto(path)
    with pytest.raises(ValueError, match="cube of 3 images"):
        read_image(path)
    assert (read_image(path, plane=1).data == 1).all()
    assert (read_image(path, hdu="ERR").data == 2).all()
    with pytest.raises(ValueError, match="expected 0 to 2"):
        read_image(path, plane=3)
    with pytest.raises(ValueError, match="no HDU 'SCI'"):
        read_image(path, hdu="SCI")
    with pytest.raises(ValueError, match="is not an image"):
        read_image(path, hdu=1)


def test_a_companion_is_the_plane_of_the_same_number(tmp_path: Path) -> None:
    cube = np.arange(3.0)[:, None, None] * np.ones((3, 4, 5))
    sci, err = fits.ImageHDU(cube, name="SCI"), fits.ImageHDU(10 + cube, name="ERR")
    flat = fits.ImageHDU(np.full((4, 5), 7.0), name="FLAT")
    path = tmp_path / "cube.fits"
    fits.HDUList([fits.PrimaryHDU(), sci, err, flat]).writeto(path)
    image = read_image(path, plane=2)
    assert image.plane == (2, 3)
    assert (read_companion(path, image, hdu="ERR").data == 12).all()
    assert (read_companion(path, image, hdu="FLAT").data == 7).all()
    single = read_image(path, hdu="FLAT")
    assert single.plane is None
    with pytest.raises(ValueError, match=r"holds 3 images and the image is no plane of a cube"):
        read_companion(path, single, hdu="ERR")


def test_what_is_not_a_readable_image_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_image(tmp_path / "missing.fits")
    with pytest.raises(ValueError, match="folder"):
        read_image(tmp_path)
    text = tmp_path / "text.fits"
    text.write_text("not FITS at all")
    with pytest.raises(ValueError, match="cannot read"):
        read_image(text)
    whole = tmp_path / "whole.fits"
    fits.PrimaryHDU(np.random.default_rng(0).normal(size=(64, 64))).writeto(whole)
    raw = whole.read_bytes()
    cut = tmp_path / "cut.fits"
    cut.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        read_image(cut)
    cut_zip = tmp_path / "cut.fits.gz"
    packed = gzip.compress(raw)
    cut_zip.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="cannot read"):
        read_image(cut_zip)
    table = tmp_path / "table.fits"
    fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])]).writeto(table)
    with pytest.raises(ValueError, match="holds no image"):
        read_image(table)


def test_units(tmp_path: Path) -> None:
    for text in ("electron / s", "ELECTRONS/S", "counts/s", "DN/s", "MJy/sr", "nJy", "e-/s", "adu"):
        assert parse_unit(text) is not None, text
    assert parse_unit("frobs per fortnight") is None
    assert is_surface_brightness("MJy/sr")
    assert is_surface_brightness("Jy/arcsec2")
    assert is_surface_brightness("Jy/beam")
    assert not is_surface_brightness("electron / s")
    assert not is_surface_brightness(None)
    assert is_electron_rate("ELECTRONS/S")
    assert is_electron_rate("e-/s")
    assert not is_electron_rate("counts/s")
    for unit, word in (("frobs", "unknown"), (None, "no units")):
        hdu = fits.PrimaryHDU(np.ones((4, 4)))
        if unit:
            hdu.header["BUNIT"] = unit
        hdu.writeto(tmp_path / "u.fits", overwrite=True)
        image = read_image(tmp_path / "u.fits")
        assert image.unit == unit
        assert word in image.notes[0]
    hdu.header["BUNIT"] = "mag"
    hdu.writeto(tmp_path / "u.fits", overwrite=True)
    with pytest.raises(ValueError, match="logarithmic"):
        read_image(tmp_path / "u.fits")


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_cubes_carry_the_world_coordinates(kind: str, tmp_path: Path) -> None:
    header = base_header(kind)
    header["OBJECT"], header["BUNIT"], header["BSCALE"] = "M 51", "adu", 2.0
    data = np.random.default_rng(1).normal(size=(3, 6, 5)).astype(np.float32)
    write_map(tmp_path / "m.fits", data[0], header, unit="nJy", cards={"NDRAWS": (3, "draws")})
    write_cube(tmp_path / "c.fits", data, header, unit="nJy", comment="draws")
    with fits.open(tmp_path / "m.fits") as hdus:
        assert (hdus[0].data == data[0]).all()
        assert hdus[0].header["BUNIT"] == "nJy"
        assert hdus[0].header["NDRAWS"] == 3
        assert hdus[0].header["OBJECT"] == "M 51"
        points = WCS(hdus[0].header).all_pix2world([[1, 2], [4, 5]], 0)
    with fits.open(tmp_path / "c.fits") as hdus:
        hdus.verify("exception")
        assert (hdus[0].data == data).all()
        cube_points = WCS(hdus[0].header, naxis=2).all_pix2world([[1, 2], [4, 5]], 0)
    assert np.allclose(points, WCS(header).all_pix2world([[1, 2], [4, 5]], 0), atol=1e-12)
    assert np.allclose(points, cube_points, atol=1e-12)


@pytest.mark.parametrize("unit", ["mag", "mag/arcsec2", "ABmag", "dB", "dex(K)", "log(erg/s)"])
def test_logarithms_are_known(unit: str) -> None:
    assert is_logarithmic(unit)
    assert not is_surface_brightness(unit) or unit == "mag/arcsec2"


@pytest.mark.parametrize("unit", ["electron / s", "Jy/beam", "MJy/sr", "nonsense"])
def test_linear_units_are_no_logarithms(unit: str) -> None:
    assert not is_logarithmic(unit)
