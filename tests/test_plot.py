"""Pictures: that they are drawn, and that what cannot be drawn is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffpost import plot
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Identity, PixelBin
from diffpost.samples import Samples


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw[:4] == b"\x89PNG"
    return int.from_bytes(raw[16:20], "big"), int.from_bytes(raw[20:24], "big")


def draws(n: int, side: int) -> Samples:
    return Samples(torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("n", [1, 6])
def test_the_summary_shows_data_mean_spread_residual_and_draws(
    factor: int, n: int, tmp_path: Path
) -> None:
    samples = draws(n, 16 * factor)
    std = torch.full((1, 16, 16), 0.5)
    std[0, :3] = torch.inf
    operator = Identity() if factor == 1 else PixelBin(factor)
    likelihood = Likelihood(torch.zeros(1, 16, 16), operator, GaussianNoise(std=std))
    figure = plot.summary(
        samples,
        likelihood,
        path=tmp_path / "s.png",
        region=(slice(2 * factor, 14 * factor), slice(2 * factor, 14 * factor)),
        pixel_scale=0.06,
        unit="nJy",
        title="A galaxy",
        subtitle="and what it stands on",
    )
    assert png_size(tmp_path / "s.png")[0] > 1200
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert "Data" in titles
    assert sum(title.startswith("Posterior draw") for title in titles) == min(n, 4)
    assert figure.axes[0].images[0].get_array().shape == (12, 12)
    assert figure.axes[1].images[0].get_array().shape == (12 * factor, 12 * factor)


def test_data_that_are_not_an_image_are_refused() -> None:
    likelihood = Likelihood(torch.zeros(3, 8, 8), Identity(), GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match="one channel"):
        plot.summary(draws(4, 8), likelihood)


def test_a_grid_of_images(tmp_path: Path) -> None:
    images = draws(7, 12).x
    images[2] = 0
    images[3] = float("nan")
    figure = plot.image_grid(images, tmp_path / "g.png", titles=[str(i) for i in range(7)])
    assert png_size(tmp_path / "g.png")[0] > 100
    assert sum(bool(ax.images) for ax in figure.axes) == 7
    with pytest.raises(ValueError, match="expected"):
        plot.image_grid(torch.from_numpy(np.zeros((2, 3, 4, 4))))
