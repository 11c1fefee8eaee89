r"""Are n numbers in [0, 1] uniform? An exact test, and the band that goes with it.

At points z_1 < ... < z_G the number of values up to z_k, C_k, is binomial (n, z_k) if they are. Its
local level is the smaller of P(C <= C_k) and P(C >= C_k), and the statistic is the smallest local
level g of all points (Aldor-Noiman et al. 2013; Säilynoja et al. 2022, arXiv:2103.10522, section
2): every point has an equal part in the test, those near 0 and 1 too, where wrong widths show.

The counts are a Poisson process given its total, so the probability that they stay inside bounds at
all points follows from one convolution a point (Moscovich and Nadler 2017, Stat. Probab. Lett. 123,
177), without simulation. Hence the p-value is exact, and a curve leaves the band of level 1 - p
just when the p-value is at most p.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import gammaln

__all__ = ["ecdf_band", "ecdf_p_value"]

Array = NDArray[np.float64]
_SLACK = 1e-9  # relative, so that levels that are equal but for rounding count as equal


def ecdf_p_value(counts: NDArray[np.int64], grid: Array, n: int) -> float:
    """Probability that uniform values stray as far at one of the points as these do, or farther.

    Args:
        counts: (G,) how many of the n values are at most z_k.
        grid: (G,) ascending z in (0, 1).
        n: values.
    """
    below, above = _tails(n, tuple(grid.tolist()))
    rows = np.arange(len(grid))
    level = float(np.minimum(below[rows, counts], above[rows, counts]).min())
    return _leaving(n, tuple(grid.tolist()), level * (1 + _SLACK))


@lru_cache(maxsize=64)
def _band(n: int, grid: tuple[float, ...], level: float) -> tuple[Array, Array]:
    """Bounds on the counts that hold at all points at once with probability `level` or more."""
    wrong = 1 - level
    low, high = math.log(wrong / len(grid)) - 1, math.log(wrong)
    for _ in range(40):
        middle = 0.5 * (low + high)
        if _leaving(n, grid, math.exp(middle)) <= wrong:
            low = middle
        else:
            high = middle
    return _bounds(n, grid, math.exp(low))


def ecdf_band(grid: Array, n: int, level: float = 0.95) -> Array:
    """(2, G) lower and upper bounds of the cumulative share at each z, all holding at once.

    The share of exact values stays inside at all points with probability `level` (a little more,
    as counts are whole numbers).
    """
    low, high = _band(n, tuple(grid.tolist()), level)
    return np.stack([low, high]) / n


@lru_cache(maxsize=4)
def _tails(n: int, grid: tuple[float, ...]) -> tuple[Array, Array]:
    """P(C <= c) and P(C >= c) at each point for c = 0...n: (G, n + 1) each."""
    c, z = np.arange(n + 1), np.asarray(grid)[:, None]
    return stats.binom.cdf(c, n, z), stats.binom.sf(c - 1, n, z)


def _bounds(n: int, grid: tuple[float, ...], level: float) -> tuple[Array, Array]:
    """The least and greatest count at each point whose local level is above `level`."""
    below, above = _tails(n, grid)
    return (below <= level).sum(1), (above > level).sum(1) - 1


def _leaving(n: int, grid: tuple[float, ...], level: float) -> float:
    """P(some local level is at most `level`) for uniform values."""
    lows, highs = (b.tolist() for b in _bounds(n, grid, level))
    state, first = np.ones(1), 0  # state[i]: the process is at first + i, and has stayed inside
    edges = [0.0, *grid, 1.0]
    for left, right, low, high in zip(edges, edges[1:], [*lows, n], [*highs, n], strict=False):
        least = max(0, low - first - len(state) + 1)
        step = np.arange(least, high - first + 1)
        if len(step) == 0:
            return 1.0
        mean = n * (right - left)
        state = np.convolve(state, np.exp(step * math.log(mean) - mean - gammaln(step + 1)))
        start = first + least
        first = max(low, start)
        state = state[first - start : high - start + 1]
    staying = float(state[0]) / math.exp(n * math.log(n) - n - float(gammaln(n + 1)))
    return min(max(1 - staying, 0.0), 1.0)
