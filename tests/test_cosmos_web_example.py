"""examples/cosmos_web.py: what it measures on blank sky, and how it states an ellipse, against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

Example = Callable[[str], ModuleType]
SIDE = 240


@pytest.fixture(scope="module")
def noise(example: Example) -> ModuleType:
    return example("cosmos_web_noise")


def white(seed: int, std: float = 0.02) -> np.ndarray:
    return std * np.random.default_rng(seed).normal(size=(SIDE, SIDE))


def boxes(seed: int) -> np.ndarray:
    """Means of 2 x 2 white pixels: correlations of 1/2 and 1/4, which sum to 4."""
    w = white(seed)
    return (w + np.roll(w, 1, 0) + np.roll(w, 1, 1) + np.roll(w, (1, 1), (0, 1))) / 4


def everywhere() -> np.ndarray:
    return np.ones((SIDE, SIDE), bool)


def test_an_inflated_map_is_scaled_to_the_scatter_of_white_sky(noise: ModuleType) -> None:
    slope = np.linspace(0.9, 1.1, SIDE) * np.ones((SIDE, 1))
    data = white(0) * slope + 0.5
    data[100:130, 100:130] += 3.0  # a source, within what was taken for sky
    level, scatter, sky = noise.blank_sky(data, everywhere())
    assert level == pytest.approx(0.5, abs=5e-4)
    assert scatter == pytest.approx(0.02, rel=0.02)
    assert not sky[100:130, 100:130].any()
    given = 1.45 * 0.02 * slope
    std, ratio = noise.recalibrated(given, data - level, sky, 1.0, 0 * data)
    assert ratio == pytest.approx(1.45, rel=0.01)
    np.testing.assert_allclose(std, 0.02 * slope, rtol=0.01)
    # a map that is right is left alone, and one that is too small is not taken for too large
    assert noise.recalibrated(given / 1.45, data - level, sky, 1.0, 0 * data)[1] == pytest.approx(
        1, rel=0.01
    )
    assert noise.recalibrated(given / 2.9, data - level, sky, 1.0, 0 * data)[1] < 0.51


def test_a_map_cut_at_a_floor_gets_the_photons_of_the_light_back(noise: ModuleType) -> None:
    light = np.zeros((SIDE, SIDE))
    light[:40] = np.linspace(0.0, 4.0, SIDE)
    true = np.sqrt(0.007**2 + 6e-4 * light)
    data = true * np.random.default_rng(1).normal(size=light.shape)
    sky = light == 0
    std, ratio = noise.recalibrated(np.maximum(true, 0.02), data, sky, 1.0, light)
    assert ratio == pytest.approx(0.02 / 0.007, rel=0.01)
    np.testing.assert_allclose(std, true, rtol=0.01)


def test_the_inflation_is_that_of_sums_over_many_pixels(noise: ModuleType) -> None:
    correlation = noise.correlation_of(boxes(2), everywhere(), 3)
    assert correlation[3, 3:] == pytest.approx([1, 0.5, 0, 0], abs=0.02)
    assert correlation[4, 4] == pytest.approx(0.25, abs=0.02)
    assert noise.inflation_of(correlation) == pytest.approx(2, rel=0.02)
    alone = noise.correlation_of(white(3), everywhere(), 3)
    assert noise.inflation_of(alone) == pytest.approx(1, abs=0.03)


def test_errors_under_white_noise_are_judged_by_the_noise_there_is(noise: ModuleType) -> None:
    """A single mode, of information a: sqrt((1 + a k^2)/(1 + a)) where the noise is k times as large."""
    mode = np.random.default_rng(4).normal(size=(1, 20, 20))
    std = np.full((20, 20), 2.0)
    std[:5] = np.inf
    a = float(np.square(mode[0, 5:]).sum() / 4)
    alone = np.zeros((3, 3))
    alone[1, 1] = 1
    one = np.ones(1)
    true = np.full((20, 20), 2.0)
    assert noise.honesty(mode, std, true, alone, one) == pytest.approx(1)
    expected = np.sqrt((1 + 9 * a) / (1 + a))
    assert noise.honesty(mode, std, 3 * true, alone, one) == pytest.approx(expected)
    # noise of 2 x 2 boxes errs twice as much on what is flat, and hardly on a chess board
    box = np.outer([0.5, 1, 0.5], [0.5, 1, 0.5])
    flat = np.full((1, 200, 200), 10.0)
    board = flat * (-1.0) ** np.add.outer(np.arange(200), np.arange(200))
    unit = np.ones((200, 200))
    assert noise.honesty(flat, unit, unit, box, one) == pytest.approx(2, rel=0.01)
    assert noise.honesty(board, unit, unit, box, one) < 0.05


def test_an_ellipse_is_stated_as_pyautolens_does(example: Example) -> None:
    """kappa = b/(1 + q) / sqrt(x^2 + y^2/q^2) there; caustics' own ellipse here."""
    caustics = pytest.importorskip("caustics")
    for name in ("slacs", "cosmos_web_noise"):
        example(name)
    script = example("cosmos_web")
    q, radius = 0.6, 1.3
    theta = {"main.q": np.array([q]), "main.Rein": np.array([radius])}
    theta |= {f"shear.{name}": np.zeros(1) for name in script.SHEAR}
    b = float(script.as_published(SimpleNamespace(theta=theta))["theta_E"][0])
    assert b != pytest.approx(radius, rel=1e-3)
    values = {"x0": 0.0, "y0": 0.0, "q": q, "phi": 0.0, "Rein": radius, "s": 0.0}
    lens = caustics.SIE(
        caustics.FlatLambdaCDM(name="cosmology"),
        name="main",
        z_l=0.5,
        z_s=1.0,
        **{k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()},
    )
    x = torch.tensor([0.7, -1.1, 0.1], dtype=torch.float64)
    y = torch.tensor([0.4, 0.2, 1.9], dtype=torch.float64)
    there = b / (1 + q) / torch.sqrt(x**2 + y**2 / q**2)
    assert lens.convergence(x, y).numpy() == pytest.approx(there.numpy(), rel=1e-5)
