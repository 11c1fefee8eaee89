"""The steps that turn survey images into training frames, on frames whose answer is known."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

_PATH = Path(__file__).parents[1] / "examples" / "prepare_galaxies.py"
_SPEC = importlib.util.spec_from_file_location("prepare_galaxies", _PATH)
prepare = importlib.util.module_from_spec(_SPEC)
sys.modules["prepare_galaxies"] = prepare
_SPEC.loader.exec_module(prepare)

N = 88
Y, X = np.mgrid[:N, :N] - (N - 1) / 2
RNG = np.random.default_rng(0)


def _galaxy(sigma: float = 0.005) -> np.ndarray:
    disc = np.exp(-np.hypot(X, Y) / 9)
    return (disc + sigma * RNG.normal(size=(N, N))).astype(np.float32)


def _star(y: float, x: float, height: float) -> np.ndarray:
    return (height * np.exp(-((Y - y) ** 2 + (X - x) ** 2) / (2 * 1.5**2))).astype(np.float32)


def _verdict(gray: np.ndarray) -> str:
    level, sigma = prepare.sky(gray)
    frame = prepare.Frame("ceers", "1", "1", gray, gray[..., None])
    return prepare.verdict(frame, gray - level, sigma)


def test_sky_is_found_beside_stars_and_a_galaxy_that_crosses_the_border():
    noise = 3 + 0.1 * RNG.normal(size=(N, N))
    edge_on = 5 * np.exp(-np.abs(X) / 3)
    level, rms = prepare.sky((noise + edge_on + _star(-40, 30, 8)).astype(np.float32))
    assert level == pytest.approx(3, abs=0.03)
    assert rms == pytest.approx(0.1, rel=0.15)


def test_filter_quietens_the_sky_and_keeps_the_galaxy():
    clean = np.exp(-np.hypot(X, Y) / 6).astype(np.float32) * (1 + 0.3 * np.cos(X)).astype(
        np.float32
    )
    noisy = clean + 0.005 * RNG.normal(size=(N, N)).astype(np.float32)
    quiet = prepare.quieten(noisy, None)
    assert prepare.sky(quiet)[1] < 0.3 * prepare.sky(noisy)[1]
    bright = clean > 0.2
    assert np.abs(quiet - clean)[bright].std() < 0.006  # no worse than the noise it carries
    # negative control: a box filter loses that structure
    box = prepare.ndimage.uniform_filter(noisy, 5)
    assert np.abs(box - clean)[bright].std() > 0.03


def test_area_average_keeps_the_mean_and_small_steps():
    image = RNG.random((256, 256)).astype(np.float32)
    small = prepare.area_average(image)
    assert small.shape == (192, 192)
    np.testing.assert_allclose(small.mean(), image.mean(), rtol=1e-5)
    ramp = np.arange(256, dtype=np.float32) + np.zeros((256, 1), np.float32)
    np.testing.assert_allclose(
        prepare.area_average(ramp)[0], (np.arange(192) + 0.5) * 4 / 3 - 0.5, atol=0.2
    )


def test_peak_is_that_of_the_smoothed_centre():
    flat = np.ones((N, N), np.float32)
    assert prepare.smoothed_peak(flat) == pytest.approx(1, rel=1e-5)
    assert prepare.smoothed_peak(_star(40, 40, 9.0)) < 1e-3  # outside of the central third


@pytest.mark.parametrize(
    ("added", "reason"),
    [
        (_star(0, 0, 0.0), "kept"),
        (_star(25, -20, 0.4), "kept"),  # a small neighbour may stay
        (_star(25, -20, 3.0), "off-centre"),
        ((0.2 * np.exp(-((Y - 0.2 * X - 30) ** 2) / 2)).astype(np.float32), "trail"),
    ],
)
def test_cleaning(added, reason):
    assert _verdict(_galaxy() + added) == reason


def test_cleaning_of_missing_faint_and_empty_frames():
    torn = _galaxy()
    torn[:10, :10] = 0
    assert _verdict(torn) == "missing"
    assert _verdict(_galaxy(sigma=0.05)) == "faint"
    empty = (0.01 * RNG.normal(size=(N, N))).astype(np.float32)
    assert _verdict(empty) in ("not found", "faint")


def test_saturated_blocks_and_field_edges():
    gray = _galaxy()
    raw = np.uint8(np.clip(200 * gray + 20, 0, 255))[..., None].repeat(3, axis=-1)
    frame = prepare.Frame("gz2", "1", "1", gray, gray[..., None].repeat(3, -1), raw)
    level, sigma = prepare.sky(gray)
    assert not prepare._crack(raw)
    cracked = raw.copy()
    cracked[30:60, N // 2] //= 2
    assert prepare._crack(cracked)
    burnt = raw.copy()
    burnt[40:46, 40:46] = 255
    frame = prepare.Frame("efigi", "1", "1", gray, frame.channels, burnt)
    assert prepare.verdict(frame, gray - level, sigma) == "saturated"


def test_split_is_fixed_and_holds_out_a_tenth():
    held = [prepare.held_out("efigi", f"PGC{i:07d}") for i in range(5000)]
    assert 0.085 < np.mean(held) < 0.115
    assert prepare.held_out("ceers", "10983") == prepare.held_out("ceers", "10983")


def test_stretches_are_undone(tmp_path):
    import io
    import tarfile

    from PIL import Image

    linear = np.clip(np.exp(-np.hypot(X, Y) / 9), 0, 1)
    shown = np.uint8(np.round(255 * linear ** (1 / prepare.EFIGI_GAMMA)))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        stream = io.BytesIO()
        Image.fromarray(shown[..., None].repeat(3, -1)).save(stream, "JPEG", quality=98)
        member = tarfile.TarInfo("galaxies/PGC1.jpg")
        member.size = stream.tell()
        stream.seek(0)
        tar.addfile(member, stream)
    (frame,) = prepare.efigi(tmp_path / "a.tar")
    assert frame.name == "PGC1"
    np.testing.assert_allclose(frame.gray, linear, atol=0.03)
