"""Blank sky from an image with sources: none of them in a stamp, and the noise as it was put in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from scipy.ndimage import gaussian_filter

from diffpost.io.stamps import Stamps, asymmetry, contaminated, read_stamps, write_stamps
from diffpost.jobs.harvest import Harvest, add_to_folder, harvest
from diffpost.jobs.noise_summary import radial_power

SIDE, STD = 512, 0.3
BLUR = 0.7


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Correlated noise of standard deviation STD, periodic."""
    w = np.random.default_rng(seed).normal(size=shape)
    x = gaussian_filter(w, (0, BLUR, BLUR) if len(shape) == 3 else BLUR, mode="wrap")
    return STD * x / x.std()


def header() -> fits.Header:
    wcs = WCS(naxis=2)
    wcs.wcs.crpix, wcs.wcs.crval = [1, 1], [150.0, 2.0]
    wcs.wcs.cdelt, wcs.wcs.ctype = [-0.06 / 3600, 0.06 / 3600], ["RA---TAN", "DEC--TAN"]
    head = wcs.to_header()
    head["BUNIT"] = "MJy/sr"
    return head


def field(tmp: Path, name: str = "field.fits", *, faint: float = 0.0, seed: int = 1) -> Path:
    """A field of 25 sources on a sky of 5, and, if wanted, a faint one every 16 pixels."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:SIDE, :SIDE].astype(float)
    sky = 5 + 0.0003 * xx + noise((SIDE, SIDE), seed)
    for x, y in rng.uniform(20, SIDE - 20, (25, 2)):
        sky += 8 * np.exp(-0.5 * ((xx - x) ** 2 + (yy - y) ** 2) / 4)
    for x in range(8, SIDE, 16):
        for y in range(8, SIDE, 16):
            sky += faint * STD * np.exp(-0.5 * ((xx - x) ** 2 + (yy - y) ** 2) / 1.2**2)
    fits.PrimaryHDU(sky.astype(np.float32), header()).writeto(tmp / name, overwrite=True)
    return tmp / name


def squares(found: Harvest) -> list[tuple[int, int]]:
    size = found.stamps.values.shape[1]
    return [
        (round(y - (size - 1) / 2), round(x - (size - 1) / 2))
        for x, y in zip(found.stamps.x, found.stamps.y, strict=True)
    ]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return harvest(field(tmp_path_factory.mktemp("sky")), size=32)


def test_no_pixel_of_a_source_is_in_a_stamp(found: Harvest) -> None:
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[:SIDE, :SIDE].astype(float)
    light = sum(
        8 * np.exp(-0.5 * ((xx - x) ** 2 + (yy - y) ** 2) / 4)
        for x, y in rng.uniform(20, SIDE - 20, (25, 2))
    )
    assert len(found.stamps) > 60
    brightest = max(float(light[t : t + 32, left : left + 32].max()) for t, left in squares(found))
    assert brightest < 0.02 * STD
    # the squares that a blind grid takes hold them
    assert (
        sum(
            light[i : i + 32, j : j + 32].max() > STD
            for i in range(0, SIDE, 32)
            for j in range(0, SIDE, 32)
        )
        > 20
    )


def test_stamps_do_not_overlap_and_their_positions_are_the_images(found: Harvest) -> None:
    count = np.zeros((SIDE, SIDE), int)
    for top, left in squares(found):
        count[top : top + 32, left : left + 32] += 1
    assert count.max() == 1
    assert not (count.astype(bool) & (found.sources | found.bad)).any()
    sky = WCS(header()).pixel_to_world_values(found.stamps.x, found.stamps.y)
    np.testing.assert_allclose([found.stamps.ra, found.stamps.dec], sky, atol=1e-9)
    assert np.abs(np.median(found.stamps.values, (1, 2))).max() < 1e-6


def test_the_power_spectrum_is_that_of_the_noise_put_in(found: Harvest) -> None:
    """Against stamps of pure noise cut as blindly; the errors are those of the two means."""
    truth = noise((SIDE, SIDE), 77).reshape(16, 32, 16, 32).swapaxes(1, 2).reshape(-1, 32, 32)
    truth = truth - np.median(truth, (1, 2), keepdims=True)
    a, b = radial_power(found.stamps.values)[0], radial_power(truth)[0]

    def deviation(a: np.ndarray, b: np.ndarray) -> float:
        error = np.hypot(a.std(0) / len(a) ** 0.5, b.std(0) / len(b) ** 0.5)
        return float(np.abs((a.mean(0) - b.mean(0)) / error).max())

    assert deviation(a, b) < 3.5  # the largest of 8 rings
    white = np.random.default_rng(3).normal(0, STD, truth.shape)
    assert deviation(a, radial_power(white)[0]) > 20


def test_faint_sources_below_the_threshold_are_warned_of(tmp_path: Path, found: Harvest) -> None:
    assert not found.warnings
    dirty = harvest(field(tmp_path, faint=2.5), size=32)
    assert dirty.warnings
    assert "faintest" in dirty.warnings[0] or "bright tail" in dirty.warnings[0]


def test_one_contaminated_stamp_is_named_and_noise_is_not() -> None:
    clean = noise((40, 64, 64), 5).astype(np.float32)
    suspect, words = contaminated(clean)
    assert not suspect.any() and words is None
    yy, xx = np.mgrid[:64, :64]
    clean[7] += 3 * STD * np.exp(-0.5 * ((xx - 30) ** 2 + (yy - 20) ** 2) / 9)
    suspect, words = contaminated(clean)
    assert np.flatnonzero(suspect).tolist() == [7]
    assert words is not None and "number 7" in words
    assert abs(asymmetry(np.delete(clean, 7, 0)).mean()) < 0.1


def test_flags_weights_and_coverage_are_honoured(tmp_path: Path) -> None:
    image = field(tmp_path)
    flags = np.zeros((SIDE, SIDE), np.int32)
    flags[:, :100] = 4
    flags[:, 200:300] = 16
    flags[::50, 300:] = 1 + 16
    weight = np.full((SIDE, SIDE), STD**-2, np.float32)
    weight[400:] = 0
    coverage = np.full((SIDE, SIDE), 10, np.float32)
    coverage[:, 450:] = 5
    for name, data in (("dq", flags), ("weight", weight), ("coverage", coverage)):
        fits.PrimaryHDU(data).writeto(tmp_path / f"{name}.fits")
    got = harvest(
        image,
        size=32,
        dq=tmp_path / "dq.fits",
        bad_bits=[1, 4],
        weight=tmp_path / "weight.fits",
        coverage=tmp_path / "coverage.fits",
    )
    seen = np.zeros((SIDE, SIDE), bool)
    for top, left in squares(got):
        seen[top : top + 32, left : left + 32] = True
    assert not seen[:, :100].any() and not seen[400:].any() and not seen[:, 450:].any()
    assert seen[:, 200:300].any()  # flag 16 is not among the bad ones
    assert seen[::50, 300:].any()  # a few bad pixels are filled ...
    assert got.record["filled_pixels"] > 0
    strict = harvest(image, size=32, dq=tmp_path / "dq.fits", bad_bits=[1, 4], max_masked=0)
    assert strict.record["filled_pixels"] == 0  # ... or not allowed
    everything = harvest(image, size=32, dq=tmp_path / "dq.fits")
    assert not any(200 - 31 < left < 300 for _, left in squares(everything))


def test_a_folder_takes_several_fields_and_keeps_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "stamps"
    first = harvest(field(tmp_path, "a.fits"), size=64)
    second = harvest(field(tmp_path, "b.fits", seed=2), size=64, field="south")
    add_to_folder(out, first)
    add_to_folder(out, second)
    there = read_stamps(out)
    assert there.names == ["a", "south"] and there.unit == "MJy/sr"
    np.testing.assert_array_equal(
        there.select(there.fields == "south").values, second.stamps.values
    )
    assert len((out / "positions.csv").read_text().splitlines()) == 1 + len(there)
    with pytest.raises(FileExistsError, match="the field south already"):
        add_to_folder(out, second)
    add_to_folder(out, second, overwrite=True)
    assert len(read_stamps(out)) == len(there)
    with pytest.raises(ValueError, match="one size"):
        add_to_folder(out, harvest(tmp_path / "a.fits", size=32, field="c"))
    other = Stamps.of(first.stamps.values, ["d"] * len(first.stamps), "electron / s")
    write_stamps(tmp_path / "other", other)
    with pytest.raises(ValueError, match="one unit"):
        read_stamps([out, tmp_path / "other"])


def test_bad_input_is_told(tmp_path: Path) -> None:
    image = field(tmp_path)
    small = tmp_path / "small.fits"
    fits.PrimaryHDU(np.ones((40, 40), np.float32)).writeto(small)
    for match, arguments in (
        ("at least 8", {"size": 4}),
        ("not room for one stamp", {"size": 600}),
        ("one of them", {"rms": small, "weight": small}),
        ("bad_bits without dq", {"bad_bits": [1]}),
        ("of one shape", {"dq": small}),
        ("no square of 500", {"size": 500}),
    ):
        with pytest.raises(ValueError, match=match):
            harvest(image, **arguments)  # type: ignore[arg-type]
    flags = tmp_path / "dq.fits"
    fits.PrimaryHDU(np.zeros((SIDE, SIDE), np.int16)).writeto(flags)
    with pytest.raises(ValueError, match="powers of 2"):
        harvest(image, dq=flags, bad_bits=[3])
    with pytest.raises(FileNotFoundError):
        harvest(tmp_path / "none.fits")
    np.savez(tmp_path / "x.npz", patches=np.ones((2, 8, 8)))
    with pytest.raises(ValueError, match="--key"):
        read_stamps(tmp_path / "x.npz")


def test_the_command_cuts_fields_and_tells(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from diffpost.cli import app

    images = [str(field(tmp_path, "a.fits")), str(field(tmp_path, "b.fits", seed=2))]
    out = str(tmp_path / "stamps")
    done = CliRunner().invoke(app, ["harvest", *images, "--size", "32", "--out", out])
    assert done.exit_code == 0, done.output
    assert "of 2 fields" in done.output and "near" not in done.stderr
    assert read_stamps(out).names == ["a", "b"]
    again = CliRunner().invoke(app, ["harvest", images[0], "--size", "32", "--out", out])
    assert again.exit_code == 2 and "--overwrite" in again.stderr
    two = CliRunner().invoke(app, ["harvest", *images, "--field", "x", "--out", out])
    assert two.exit_code == 2 and "one image" in two.stderr
    flags = CliRunner().invoke(
        app, ["harvest", images[0], "--dq", images[0], "--bad-bits", "a", "--out", out]
    )
    assert flags.exit_code == 2 and "--bad-bits" in flags.stderr
