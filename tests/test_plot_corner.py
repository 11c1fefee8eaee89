"""Corner plots: what they hold, and what they refuse."""

import numpy as np
import pytest
import torch

from diffpost.parameters.result import JointSamples
from diffpost.plot import corner
from diffpost.plot.corner import LEVELS, _level


def draws(chains=4, n=300, p=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(p, p, generator=generator, dtype=torch.float64)
    return torch.randn(chains, n, p, generator=generator, dtype=torch.float64) @ mixing


def joint(**given):
    theta = draws(**given)
    zero = torch.zeros(len(theta))
    return JointSamples(("a", "b", "c")[: theta.shape[2]], theta, zero, zero)


def test_a_panel_for_each_pair_and_marks_where_they_belong(tmp_path):
    figure = corner(
        joint(),
        path=tmp_path / "corner.png",
        labels={"a": "$a$ [arcsec]"},
        truth={"a": 0.1},
        published={"a": (0.2, 0.1), "b": (0.0, 0.2, 0.3), "c": 9.0},
        title="a lens",
    )
    assert len(figure.axes) == 6
    assert (tmp_path / "corner.png").stat().st_size > 10_000
    bottom = [ax.get_xlabel() for ax in figure.axes[3:]]
    assert bottom == ["$a$ [arcsec]", "b", "c"]
    low, high = figure.axes[5].get_xlim()
    assert low < 9.0 < high  # marks are inside
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["truth", "published"]


def test_several_sets_and_one_parameter():
    both = {"one": joint(), "two": joint(seed=1)}
    figure = corner(both, ["c", "a"])
    assert len(figure.axes) == 3
    assert [ax.get_xlabel() for ax in figure.axes[1:]] == ["c", "a"]
    assert len(corner(draws(p=1)).axes) == 1
    assert len(corner(draws(n=4)).axes) == 6  # few draws are shown as points
    assert len(corner(np.ones((50, 2)) + 1e-9 * np.arange(50)[:, None]).axes) == 3


def test_contours_hold_their_share():
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).numpy()
    density, *_ = np.histogram2d(*x.T, bins=60)
    for share in LEVELS:
        radius = np.sqrt(-2 * np.log(1 - share))  # of a normal
        inside = density[density >= _level(density, share)]
        assert inside.sum() / density.sum() == pytest.approx(share, abs=0.01)
        area = len(inside) * np.prod(np.ptp(x, axis=0) / 60)
        assert area == pytest.approx(np.pi * radius**2, rel=0.08)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="1 to 3"):
        corner({})
    with pytest.raises(ValueError, match="no parameter 'd'; there are a, b, c"):
        corner(joint(), ["a", "d"])
    with pytest.raises(ValueError, match="truth of d, but"):
        corner(joint(), truth={"d": 1.0})
    with pytest.raises(ValueError, match="3 parameters and 2 names"):
        corner(draws(), ["a", "b"])
    with pytest.raises(ValueError, match="at least 8 draws"):
        corner(draws(chains=1, n=4))
    with pytest.raises(ValueError, match="value, minus, plus"):
        corner(joint(), published={"a": (1, 2, 3, 4)})
