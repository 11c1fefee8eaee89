"""Primary beams: a Gaussian and the FITS map of the same, which way is east, and maps that cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from diffpost.jobs.primary_beam import primary_beam_on
from diffpost.physics.grid import Grid

GRID = Grid(12, 0.5, centre=(-1.0, 0.75))  # its middle is 1 arcsec east of the pointing centre
PIXEL, SIDE = 0.25, 65


def written(path: Path, values: np.ndarray, axes: int = 2, rotated: bool = False) -> Path:
    """A map with the pointing centre at its middle, east to the left."""
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = "RA---SIN", "DEC--SIN"
    header["CRVAL1"], header["CRVAL2"] = 56.67, -52.08
    header["CRPIX1"] = header["CRPIX2"] = SIDE // 2 + 1
    header["CDELT1"], header["CDELT2"] = -PIXEL / 3600, PIXEL / 3600
    if rotated:
        header["PC1_2"], header["PC2_1"] = 0.3, -0.3
    if axes == 4:
        header["CTYPE3"], header["CTYPE4"] = "FREQ", "STOKES"
    shape = (1,) * (axes - 2) + values.shape
    fits.writeto(path, values.reshape(shape), header)
    return path


def offsets() -> tuple[np.ndarray, np.ndarray]:
    """East and north of the pixels of a map, arcsec."""
    at = (np.arange(SIDE) - SIDE // 2) * PIXEL
    return -at[None] + 0 * at[:, None], at[:, None] + 0 * at[None]


def gaussian(width: float) -> np.ndarray:
    east, north = offsets()
    return np.exp(-4 * np.log(2) * (east**2 + north**2) / width**2)


@pytest.mark.parametrize("axes", [2, 4])
def test_a_map_of_a_gaussian_is_that_gaussian(tmp_path: Path, axes: int) -> None:
    found, told = primary_beam_on(GRID, written(tmp_path / "pb.fits", gaussian(9.0), axes))
    expected, _ = primary_beam_on(GRID, "9.0")
    np.testing.assert_allclose(found, expected, atol=3e-3)  # linear between pixels
    other, _ = primary_beam_on(GRID, 8.0)
    assert np.abs(found - other).max() > 0.03
    assert "pb.fits" in told


def test_east_is_left(tmp_path: Path) -> None:
    east, north = offsets()
    ramp = 0.5 + 0.04 * east + 0.01 * north
    found, _ = primary_beam_on(GRID, written(tmp_path / "pb.fits", ramp))
    x, y = (a.numpy() for a in GRID.coordinates())
    np.testing.assert_allclose(found, 0.5 - 0.04 * x + 0.01 * y, atol=1e-6)
    assert (np.diff(found, axis=1) < 0).all()


def test_refused(tmp_path: Path) -> None:
    flat = np.ones((SIDE, SIDE))
    hole = flat.copy()
    hole[30:34, 34:38] = np.nan
    cases = [
        (-1.0, ValueError, "positive width"),
        (tmp_path / "none.fits", FileNotFoundError, "neither a number nor a file"),
        (written(tmp_path / "a.fits", hole), ValueError, "does not cover"),
        (written(tmp_path / "b.fits", 3 * flat), ValueError, "between 0 and 1"),
        (written(tmp_path / "c.fits", flat, rotated=True), ValueError, "rotated"),
        (written(tmp_path / "d.fits", np.ones((3, SIDE, SIDE))), ValueError, "expected one image"),
    ]
    for beam, error, words in cases:
        with pytest.raises(error, match=words):
            primary_beam_on(GRID, beam)
    with pytest.raises(ValueError, match="does not cover"):
        primary_beam_on(Grid(64, 0.5), written(tmp_path / "e.fits", flat))
