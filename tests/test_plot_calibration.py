"""Pictures of calibration: that they are drawn, and show what the numbers say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost import diagnostics as dg


def fractions(power: float, n: int = 300) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).double() ** power


def test_coverage_shows_its_curve_and_the_band_of_exact_posteriors(tmp_path: Path) -> None:
    result = dg.coverage_from_fractions(fractions(1.5), 64)
    figure = dp.plot.coverage(result, tmp_path / "c.png", title="A blurred galaxy")
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    curve, difference = figure.axes
    shown = curve.lines[-1].get_ydata()
    assert np.array_equal(shown, result.ecp.numpy())
    assert np.allclose(difference.lines[-1].get_ydata(), result.ecp - result.alpha)
    assert any("A blurred galaxy" in text.get_text() for text in figure.texts)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any("95%" in label for label in labels) and any("p = " in label for label in labels)


def test_several_methods_in_one_picture() -> None:
    several = {str(k): dg.coverage_from_fractions(fractions(k), 64) for k in (0.8, 1.0, 1.3)}
    assert len(dp.plot.coverage(several).axes[0].lines) == 4
    with pytest.raises(ValueError, match="0 curves"):
        dp.plot.coverage({})


@pytest.mark.parametrize("draws", [9, 64])
def test_ranks_show_histogram_and_ecdf_of_each_statistic(draws: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, draws + 1, (200, 3), generator=generator)
    result = dg.sbc_from_ranks(values, draws)
    figure = dp.plot.ranks(result, ["total flux", "peak", "size"], tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert len(figure.axes) == 6
    bars = figure.axes[0]
    heights = [patch.get_height() for patch in bars.patches if hasattr(patch, "get_height")]
    if draws == 9:  # one bin a rank
        assert np.allclose(heights[:10], 10 * torch.bincount(values[:, 0]) / 200)
    assert "total flux" in bars.get_title(loc="left")
    with pytest.raises(ValueError, match="names"):
        dp.plot.ranks(result, ["total flux"])
