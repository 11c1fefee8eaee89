"""The exact test of uniformity, against enumeration, simulation and a single binomial."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from diffpost.diagnostics.uniformity import ecdf_band, ecdf_p_value


def local_level(counts: np.ndarray, grid: np.ndarray, n: int) -> float:
    below, above = stats.binom.cdf(counts, n, grid), stats.binom.sf(counts - 1, n, grid)
    return float(np.minimum(below, above).min())


def test_the_p_value_by_enumeration() -> None:
    n, grid = 4, np.array([0.2, 0.5, 0.6])
    cells = np.diff(np.concatenate([[0], grid, [1]]))
    outcomes = [c for c in product(range(n + 1), repeat=4) if sum(c) == n]
    chance = [stats.multinomial.pmf(c, n, cells) for c in outcomes]
    levels = [local_level(np.cumsum(c)[:-1], grid, n) for c in outcomes]
    for outcome, level in zip(outcomes, levels, strict=True):
        exact = sum(p for p, g in zip(chance, levels, strict=True) if g <= level * (1 + 1e-9))
        assert ecdf_p_value(np.cumsum(outcome)[:-1], grid, n) == pytest.approx(exact, abs=1e-12)


def test_one_point_is_a_binomial() -> None:
    n, grid = 50, np.array([0.3])
    level = stats.binom.cdf(9, n, 0.3)
    other = stats.binom.sf(np.arange(n + 1) - 1, n, 0.3)
    expected = level + other[other <= level].max()
    assert ecdf_p_value(np.array([9]), grid, n) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n", [20, 300, 1000])
def test_the_band_holds_at_its_level_and_p_values_are_uniform(n: int, uniform_p) -> None:
    rng = np.random.default_rng(n)
    grid = np.linspace(0, 1, 101)[1:-1]
    values = np.sort(rng.random((2000, n)), 1)
    counts = np.stack([np.searchsorted(v, grid, side="right") for v in values])
    low, high = ecdf_band(grid, n, 0.95) * n
    inside = ((counts >= low - 1e-9) & (counts <= high + 1e-9)).all(1)
    # 0.95 or a little more, to 4 standard deviations of 2000 repeats.
    assert 0.95 - 4 * 0.0049 < inside.mean() < 0.965 + 4 * 0.0049
    p = np.array([ecdf_p_value(c, grid, n) for c in counts[:300]])
    assert ((p > 0.05) == inside[:300]).all()
    uniform_p(p.tolist())


def test_a_large_number_of_values() -> None:
    grid = np.linspace(0, 1, 101)[1:-1]
    n = 20_000
    counts = np.round(n * grid).astype(np.int64)
    assert ecdf_p_value(counts, grid, n) > 0.999
    assert ecdf_p_value(np.round(n * grid**1.1).astype(np.int64), grid, n) < 1e-6
