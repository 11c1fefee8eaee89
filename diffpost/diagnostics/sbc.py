r"""Simulation-based calibration: ranks of the truth among its draws, for chosen statistics.

For draws of the posterior, s(x) of the truth has a uniform rank on 0...M among the s of the M
independent draws (Talts et al. 2018, arXiv:1804.06788, theorem 1), whatever s: total flux, peak, a
size. Ties are broken at random. Tests of the N ranks of each statistic:

    ecdf   the simultaneous band of Säilynoja et al. (2022, arXiv:2103.10522), exact here because it
           is evaluated at multiples of 1/(M + 1), where the ranks' distribution is that of uniform
           numbers: see :mod:`diffpost.diagnostics.uniformity`
    chi2   Pearson's, in bins of about equal probability with N/bins >= 10

Chains that are correlated give too many extreme ranks, even if they are right: thin them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffpost.diagnostics.uniformity import ecdf_band, ecdf_p_value
from diffpost.random import uniform

__all__ = ["Ranks", "ranks", "sbc", "sbc_from_ranks"]

_STREAM = 8  # of the numbers that break ties
_POINTS = 128  # of the ECDF, at most
_BINS = 20  # of chi2, at most


@final
@dataclass(frozen=True)
class Ranks:
    """Ranks of the truths, and tests of their uniformity.

    Attributes:
        ranks: (sims, K) int64 in 0...draws: draws below the truth, for K statistics.
        draws: M, per simulation.
        ecdf_p_value: (K,) of the simultaneous ECDF band; exact.
        chi2_p_value: (K,) of Pearson's chi2 in `bins` bins; approximate.
        grid: (G,) points in (0, 1), multiples of 1/(draws + 1).
        ecdf: (G, K) share of ranks r with (r + 1)/(draws + 1) <= grid.
        band: (2, G) where the ECDF of uniform ranks stays, at all points at once, with probability
            `level`.
        bins: of chi2.
        level: of the band.
    """

    ranks: Tensor
    draws: int
    ecdf_p_value: Tensor
    chi2_p_value: Tensor
    grid: Tensor
    ecdf: Tensor
    band: Tensor
    bins: int
    level: float

    @property
    def p_value(self) -> Tensor:
        """(K,) the verdict on each statistic: that of the ECDF band."""
        return self.ecdf_p_value

    @property
    def joint_p_value(self) -> float:
        """Of all statistics together: K times the smallest, at most 1 (Bonferroni)."""
        return min(1.0, len(self.p_value) * float(self.p_value.min()))

    @property
    def inside(self) -> Tensor:
        """(K,) whether each ECDF stays in the band."""
        low, high = self.band[..., None]
        return ((self.ecdf >= low - 1e-12) & (self.ecdf <= high + 1e-12)).all(0)


def sbc(
    statistic_samples: Tensor, statistic_truths: Tensor, seed: int = 0, *, level: float = 0.95
) -> Ranks:
    """Ranks of the truths and their tests.

    Not seen: the prior handed back (its ranks are uniform too; `coverage` with data sees it), and
    what no statistic depends on.

    Args:
        statistic_samples: (sims, draws) or (sims, draws, K), K statistics of each draw.
        statistic_truths: (sims,) or (sims, K), those of the truths.
        seed: of the numbers that break ties.
        level: of the band.

    Raises:
        ValueError: shapes that do not fit, or values that are NaN.
    """
    found = ranks(statistic_samples, statistic_truths, seed)
    return sbc_from_ranks(found, torch.as_tensor(statistic_samples).shape[1], level=level)


def ranks(
    statistic_samples: Tensor,
    statistic_truths: Tensor,
    seed: int = 0,
    *,
    ids: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """How many draws lie below the truth, ties broken at random: int64, shaped as the truths.

    Args:
        statistic_samples: (sims, draws) or (sims, draws, K).
        statistic_truths: (sims,) or (sims, K).
        seed: of the numbers that break ties.
        ids: (sims,) number of each simulation in the whole run, so that batches of any size give
            the same ranks; default 0, 1, ...

    Raises:
        ValueError: shapes that do not fit, or values that are NaN.
    """
    s = torch.as_tensor(statistic_samples).detach().cpu()
    truth = torch.as_tensor(statistic_truths).detach().cpu()
    kind = torch.promote_types(s.dtype, truth.dtype)
    s, truth = s.to(kind), truth.to(kind)
    shape = tuple(truth.shape)
    if s.ndim not in (2, 3) or 0 in s.shape or shape != (s.shape[0], *s.shape[2:]):
        raise ValueError(
            f"ranks: statistic_samples {tuple(s.shape)} and statistic_truths {shape}; expected (sims, draws) and "
            "(sims,), or (sims, draws, K) and (sims, K)."
        )
    if bool(s.isnan().any() | truth.isnan().any()):
        raise ValueError(
            "ranks: got NaN statistics; give them a value (a rank below all others, say) or leave those simulations "
            "out, and say so."
        )
    numbers = torch.arange(len(s)) if ids is None else torch.as_tensor(ids).cpu()
    if numbers.shape != shape[:1]:
        raise ValueError(f"ranks: ids {tuple(numbers.shape)}; expected ({shape[0]},).")
    below, tied = (s < truth[:, None]).sum(1), (s == truth[:, None]).sum(1)
    u = uniform(seed, numbers, 0, shape[1:] or (1,), torch.float64, stream=_STREAM).reshape(shape)
    return below + (u * (tied + 1)).long()


def sbc_from_ranks(ranks: Tensor, draws: int, *, level: float = 0.95) -> Ranks:
    """Tests of ranks that were kept.

    Args:
        ranks: (sims,) or (sims, K), whole numbers in 0...draws.
        draws: M.
        level: of the band.

    Raises:
        ValueError: ranks of another shape or outside 0...draws; level not in (0, 1).
    """
    r = torch.as_tensor(ranks).detach().cpu()
    if r.ndim == 1:
        r = r[:, None]
    if r.ndim != 2 or r.numel() == 0 or r.is_floating_point() or draws < 1:
        raise ValueError(
            f"sbc_from_ranks: got {r.dtype} ranks of shape {tuple(r.shape)} and {draws} draws; expected whole numbers "
            "(sims,) or (sims, K), and draws > 0."
        )
    if int(r.min()) < 0 or int(r.max()) > draws:
        raise ValueError(
            f"sbc_from_ranks: ranks from {int(r.min())} to {int(r.max())}; expected 0 to draws = {draws}."
        )
    if not 0 < level < 1:
        raise ValueError(f"sbc_from_ranks: got level {level}; expected 0 < level < 1.")
    n, values = len(r), r.long().numpy()
    steps = np.unique(np.linspace(1, draws, min(draws, _POINTS)).round().astype(np.int64))
    grid = steps / (draws + 1)
    counts = np.stack([np.searchsorted(np.sort(v), steps, side="left") for v in values.T], 1)
    bins = int(min(_BINS, draws + 1, max(2, n // 10)))
    return Ranks(
        ranks=r.long(),
        draws=draws,
        ecdf_p_value=torch.tensor(
            [ecdf_p_value(c, grid, n) for c in counts.T], dtype=torch.float64
        ),
        chi2_p_value=torch.tensor(
            [_chi2_p_value(v, draws, bins) for v in values.T], dtype=torch.float64
        ),
        grid=torch.from_numpy(grid),
        ecdf=torch.from_numpy(counts / n),
        band=torch.from_numpy(ecdf_band(grid, n, level)),
        bins=bins,
        level=level,
    )


def _chi2_p_value(values: NDArray[np.int64], draws: int, bins: int) -> float:
    """Pearson's test; bins hold whole ranks, so their probabilities may differ a little."""
    edges = np.linspace(0, draws + 1, bins + 1).round()
    observed, _ = np.histogram(values, edges - 0.5)
    expected = len(values) * np.diff(edges) / (draws + 1)
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), bins - 1))
