"""Pictures of lenses: that they are drawn, what of, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost.physics import Grid

caustics = pytest.importorskip("caustics", reason="pip install caustics")

COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")


@pytest.fixture(scope="module")
def lens() -> dp.physics.Lens:
    mass = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, q=None, phi=0.5, Rein=1.25)
    return dp.physics.Lens(mass, Grid(20, pixel=0.2), Grid(10, pixel=0.06, centre=(0.1, 0.0)))


def test_image_source_and_magnification(lens: dp.physics.Lens, tmp_path: Path) -> None:
    source = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0))
    figure = dp.plot.lens(
        lens, {"q": 0.5}, source=source, path=tmp_path / "lens.png", unit="nJy", title="A lens"
    )
    assert (tmp_path / "lens.png").read_bytes()[:4] == b"\x89PNG"
    seen, plane, mu = figure.axes[:3]
    image = lens.render(source[None].double(), {"q": 0.5})[0, 0]
    np.testing.assert_allclose(seen.images[0].get_array(), image, rtol=1e-6)
    np.testing.assert_allclose(plane.images[0].get_array(), source[0])
    assert tuple(plane.images[0].get_extent()) == lens.source.extent
    assert mu.images[0].get_array().max() <= 100
    assert len(seen.lines) == 1 and len(plane.lines) == 2  # the caustic is larger than the grid


def test_without_a_source_there_are_lines_only(lens: dp.physics.Lens) -> None:
    figure = dp.plot.lens(lens, {"q": 0.8})
    assert [len(ax.images) for ax in figure.axes[:3]] == [0, 0, 1]
    data = torch.ones(1, 1, 20, 20)
    assert len(dp.plot.lens(lens, {"q": 0.8}, image=data).axes[0].images) == 1
    for bad in ({"image": torch.ones(10, 10)}, {"source": torch.ones(2, 10, 10)}):
        with pytest.raises(ValueError, match=r"plot.lens: got the"):
            dp.plot.lens(lens, {"q": 0.8}, **bad)
