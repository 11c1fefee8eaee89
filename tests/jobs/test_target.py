"""Sky, neighbours and noise of a target."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import uniform_filter

from diffpost.jobs.target import read_scene, sky_noise


def disc(shape: tuple[int, int], y: float, x: float, h: float, flux: float) -> np.ndarray:
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    light = np.exp(-np.hypot(yy - y, xx - x) / h)
    return flux * light / light.sum()


def field(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A galaxy at (60, 60) with a neighbour at (60, 95) on a tilted sky, and the sky."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:140, :140]
    sky = 5 + 0.02 * xx + 0.01 * yy
    image = sky + disc((140, 140), 60, 60, 4, 4000) + disc((140, 140), 60, 95, 2, 800)
    return image + 0.5 * rng.normal(size=(140, 140)), sky


def test_the_target_its_neighbour_and_the_sky_are_told_apart() -> None:
    image, sky = field()
    scene = read_scene(image, (60, 60))
    assert scene.segments[60, 60] == 1
    assert scene.segments[60, 95] > 1
    assert scene.neighbours[60, 95]
    assert not scene.neighbours[60, 60]
    far = np.hypot(*(np.mgrid[:140, :140] - 60)) > 45
    # The mesh follows the tilt, which spans 4.2, to half a cell at the edges; a constant does not.
    assert np.abs(scene.background - sky)[far].mean() < 0.3
    assert np.abs(np.median(sky) - sky)[far].mean() > 0.7
    # Asked for its neighbour, the roles change.
    other = read_scene(image, (95, 60))
    assert other.segments[60, 95] == 1
    assert other.neighbours[60, 60]
    # Kinds of background.
    assert np.ptp(read_scene(image, (60, 60), background="constant").background) == 0
    assert (read_scene(image, (60, 60), background="none").background == 0).all()
    with pytest.raises(ValueError, match="smooth, constant or none"):
        read_scene(image, (60, 60), background="wavy")


def test_a_clump_within_the_galaxy_belongs_to_it() -> None:
    image, _ = field()
    clumpy = image + disc((140, 140), 66, 63, 0.8, 400)
    scene = read_scene(clumpy, (60, 60))
    assert scene.segments[66, 63] == 1
    assert not scene.neighbours[66, 63]


def test_missing_pixels_are_not_sky() -> None:
    image, _ = field()
    image[:, :20] = np.nan
    scene = read_scene(image, (60, 60))
    assert not scene.sky[:, :20].any()
    assert np.isfinite(scene.background).all()


def test_white_noise_is_measured_under_galaxies_and_gradients() -> None:
    image, _ = field(1)
    scene = read_scene(image, (60, 60))
    noise = sky_noise(image - scene.background, scene.sky)
    # 10,000 pixels: 1.2% for a MAD.
    assert noise.std == pytest.approx(0.5, rel=0.04)
    assert abs(noise.correlation) < 0.03
    assert noise.inflation == pytest.approx(1, abs=0.12)


def test_correlated_noise_is_found_out() -> None:
    rng = np.random.default_rng(2)
    correlated = uniform_filter(rng.normal(size=(200, 200)), 2)
    noise = sky_noise(correlated, np.ones((200, 200), dtype=bool))
    assert noise.std == pytest.approx(0.5, rel=0.05)
    assert noise.correlation == pytest.approx(0.5, abs=0.05)
    # Four pixels averaged: 1 + 4 / 2 + 4 / 4 = 4 times the power of white noise.
    assert noise.inflation == pytest.approx(2.0, rel=0.07)


def test_too_little_or_too_quiet_sky_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        sky_noise(np.ones((30, 30)), np.zeros((30, 30), dtype=bool))
    with pytest.raises(ValueError, match="no scatter"):
        sky_noise(np.ones((30, 30)), np.ones((30, 30), dtype=bool))
