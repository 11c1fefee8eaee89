r"""Expected coverage: do credible regions of level alpha hold the truth with probability alpha?

A family of regions orders the draws of each simulation: TARP (Lemos et al. 2023, arXiv:2302.03026)
by their distance from a reference point, balls about it; HPD by falling density. The credibility of
the smallest region that holds the truth is

    f_i = (number of the M draws inside it + u_i)/(M + 1),     u_i uniform in [0, 1),

with ties broken at random. If the draws follow the posterior, they and the truth are exchangeable
given the data, the rank of the truth is uniform on 0...M and f_i is uniform *exactly*, for any M
(u_i takes away the discreteness). ECP(alpha) is the share of f_i <= alpha; the p-value is that of
the exact simultaneous test of :mod:`diffpost.diagnostics.uniformity` at the alphas.

With balls, this is a sufficient condition too only if the references depend on the data (their
theorem 3). With references that do not, the prior handed back as the posterior is never found out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffpost.diagnostics.references import references_from_data
from diffpost.diagnostics.uniformity import ecdf_band, ecdf_p_value
from diffpost.random import uniform

__all__ = [
    "Coverage",
    "coverage",
    "coverage_from_fractions",
    "hpd_coverage",
    "hpd_fraction",
    "tarp_fraction",
]

_STREAM = 7  # of the numbers that break ties, apart from what samplers draw


@final
@dataclass(frozen=True)
class Coverage:
    """Expected coverage against credibility.

    Attributes:
        alpha: (A,) levels of credibility, ascending, in [0, 1].
        ecp: (A,) share of simulations whose truth lies in the region of that level.
        band: (2, A) pointwise bootstrap interval of ecp over the simulations, at `level`.
        null_band: (2, A) where the whole curve of an exact posterior stays with probability
            `level`; a curve leaves it just when p_value <= 1 - level.
        p_value: of uniform fractions.
        fractions: (sims,) credibility f_i of the smallest region that holds the truth.
        draws: per simulation; with weights, the mean effective number.
        level: of the bands.
    """

    alpha: Tensor
    ecp: Tensor
    band: Tensor
    null_band: Tensor
    p_value: float
    fractions: Tensor
    draws: float
    level: float

    @property
    def inside(self) -> bool:
        """Whether the curve stays in the band of an exact posterior."""
        low, high = self.null_band
        return bool(((self.ecp >= low - 1e-12) & (self.ecp <= high + 1e-12)).all())

    @property
    def sims(self) -> int:
        """Simulations."""
        return len(self.fractions)


def coverage(
    samples: Tensor,
    truths: Tensor,
    references: Tensor | None = None,
    data: Tensor | None = None,
    seed: int = 0,
    *,
    weights: Tensor | None = None,
    alphas: Tensor | Sequence[float] | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
) -> Coverage:
    """Expected coverage of balls about reference points (TARP).

    A posterior that is too wide gives too few f_i near 0 and 1, one too narrow too many. A bias is
    seen in its component towards the references; `sbc` of a statistic that it moves sees it better.
    Where an array of all draws would be too large, keep ``tarp_fraction`` of each simulation and
    hand them to ``coverage_from_fractions``.

    Args:
        samples: (sims, draws, *shape) draws of each posterior.
        truths: (sims, *shape) what each data set was simulated from.
        references: (sims, *shape) a point for each simulation, which may depend on its data and on
            chance but on neither its truth nor its draws. For instance A^T y.
        data: (sims, *data) builds references where none are given: see ``references_from_data``.
        seed: of ties, references and bootstrap.
        weights: (sims, draws) importance weights of the draws, up to a factor in each simulation;
            f_i is then uniform to the accuracy of the weighted shares.
        alphas: levels at which the curve is computed and tested; default 101 from 0 to 1.
        bootstrap: resamplings for the band.
        level: of the bands.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, both references and data.

    Warns:
        UserWarning: neither references nor data: the truths of other simulations serve as
            references, and the prior handed back as posterior cannot be seen.
    """
    samples, truths = torch.as_tensor(samples), torch.as_tensor(truths)
    _check_draws("coverage", samples, truths)
    if references is not None and data is not None:
        raise ValueError(
            "coverage: got references and data; give references, or data to build them from."
        )
    if references is None and data is not None:
        references = references_from_data(torch.as_tensor(data), truths, seed)
    elif references is None:
        warnings.warn(
            "coverage: without references or data the reference points know nothing of the data, so the prior "
            "handed back as the posterior passes this test. Give data=, or references that depend on them.",
            UserWarning,
            stacklevel=2,
        )
        # A chain, not a permutation: the reference of i is then free of all that follows it.
        references = torch.cat([torch.zeros_like(truths[:1]), truths[:-1]])
    fractions = tarp_fraction(samples, truths, references, seed, weights=weights)
    draws = _draws(samples.shape[1], weights)
    return coverage_from_fractions(
        fractions, draws, alphas=alphas, bootstrap=bootstrap, level=level, seed=seed
    )


def tarp_fraction(
    samples: Tensor,
    truths: Tensor,
    references: Tensor,
    seed: int = 0,
    *,
    ids: Tensor | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Credibility f_i of the ball about the reference that reaches to the truth, (sims,) float64.

    Distances are Euclidean, in the units of the images.

    Args:
        samples: (sims, draws, *shape).
        truths: (sims, *shape).
        references: (sims, *shape), free of the truth and the draws given the data.
        seed: of the numbers that break ties.
        ids: (sims,) number of each simulation in the whole run, so that batches of any size give
            the same fractions; default 0, 1, ...
        weights: (sims, draws) importance weights, up to a factor in each simulation.

    Raises:
        ValueError: shapes that do not fit, or distances that are not finite.
    """
    samples, truths = torch.as_tensor(samples), torch.as_tensor(truths)
    references = torch.as_tensor(references)
    _check_draws("tarp_fraction", samples, truths)
    if references.shape != truths.shape:
        raise ValueError(
            f"tarp_fraction: references {tuple(references.shape)} for truths {tuple(truths.shape)}; expected the same."
        )
    distances = []
    for x, truth, reference in zip(samples, truths, references, strict=True):
        # In one array, so that a draw equal to the truth is a tie to the last bit.
        points = torch.cat([truth[None].to(x), x]).double() - reference.to(x.device).double()
        distances.append(points.flatten(1).square().sum(1).cpu())
    own, far = torch.stack(distances).split([1, samples.shape[1]], 1)
    return _fractions("tarp_fraction", far, own[:, 0], seed, ids, weights)


def hpd_fraction(
    log_prob_samples: Tensor,
    log_prob_truths: Tensor,
    seed: int = 0,
    *,
    ids: Tensor | Sequence[int] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Credibility of the highest-density region that just holds the truth, (sims,) float64.

    Arguments as for ``hpd_coverage`` and ``tarp_fraction``.
    """
    far, own = (
        -torch.as_tensor(log_prob_samples).double(),
        -torch.as_tensor(log_prob_truths).double(),
    )
    if far.ndim != 2 or own.shape != far.shape[:1] or far.numel() == 0:
        raise ValueError(
            f"hpd_fraction: log_prob_samples {tuple(far.shape)} and log_prob_truths {tuple(own.shape)}; expected "
            "(sims, draws) and (sims,)."
        )
    return _fractions("hpd_fraction", far.cpu(), own.cpu(), seed, ids, weights)


def hpd_coverage(
    log_prob_samples: Tensor,
    log_prob_truths: Tensor,
    seed: int = 0,
    *,
    weights: Tensor | None = None,
    alphas: Tensor | Sequence[float] | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
) -> Coverage:
    """Expected coverage of highest-density regions.

    With the exact log p(x | y) this finds draws of another distribution; with the density that the
    draws themselves follow it tests whether the truths follow it too, on average, and the prior
    handed back with its own density passes. A bias along a contour is not seen.

    Args:
        log_prob_samples: (sims, draws) log density of each draw, up to a constant per simulation.
        log_prob_truths: (sims,) that of the truth, with the same constant.
        seed, weights, alphas, bootstrap, level: as for ``coverage``.

    Raises:
        ValueError: shapes that do not fit, or values that are NaN or +inf.
    """
    fractions = hpd_fraction(log_prob_samples, log_prob_truths, seed, weights=weights)
    draws = _draws(torch.as_tensor(log_prob_samples).shape[1], weights)
    return coverage_from_fractions(
        fractions, draws, alphas=alphas, bootstrap=bootstrap, level=level, seed=seed
    )


def coverage_from_fractions(
    fractions: Tensor,
    draws: float,
    *,
    alphas: Tensor | Sequence[float] | None = None,
    bootstrap: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Coverage:
    """The coverage of simulations of which only the fractions were kept.

    Args:
        fractions: (sims,) as ``tarp_fraction`` and ``hpd_fraction`` return them.
        draws: per simulation; kept for the record.
        alphas, bootstrap, level, seed: as for ``coverage``.

    Raises:
        ValueError: no fractions, or outside [0, 1]; alphas not ascending in [0, 1].
    """
    f = torch.as_tensor(fractions).detach().cpu().double()
    if f.ndim != 1 or len(f) == 0 or not bool(((f >= 0) & (f <= 1)).all()):
        raise ValueError(
            f"coverage_from_fractions: got fractions of shape {tuple(f.shape)}; expected (sims,), sims > 0, all in "
            "[0, 1] (as tarp_fraction returns them)."
        )
    if not 0 < level < 1 or bootstrap < 1:
        raise ValueError(
            f"coverage: got level {level} and bootstrap {bootstrap}; expected 0 < level < 1, bootstrap > 0."
        )
    alpha = torch.linspace(0, 1, 101, dtype=torch.float64)
    if alphas is not None:
        alpha = torch.as_tensor(alphas, dtype=torch.float64).cpu()
    a = alpha.numpy()
    inner = (a > 0) & (a < 1)
    if alpha.ndim != 1 or not inner.any() or (np.diff(a) <= 0).any() or a[0] < 0 or a[-1] > 1:
        raise ValueError(
            f"coverage: got alphas {a.tolist()}; expected ascending values in [0, 1], one inside at least."
        )
    n = len(f)
    counts = np.searchsorted(np.sort(f.numpy()), a, side="right")
    # Resampling simulations with replacement makes the numbers between alphas multinomial.
    share = np.diff(np.concatenate([[0], counts, [n]])) / n
    rng = np.random.default_rng(seed)
    again = rng.multinomial(n, share, size=bootstrap)[:, :-1].cumsum(1) / n
    band = np.quantile(again, [(1 - level) / 2, (1 + level) / 2], axis=0)
    null = np.stack([np.where(a >= 1, 1.0, 0.0)] * 2)
    null[:, inner] = ecdf_band(a[inner], n, level)
    return Coverage(
        alpha=alpha,
        ecp=torch.from_numpy(counts / n),
        band=torch.from_numpy(band),
        null_band=torch.from_numpy(null),
        p_value=ecdf_p_value(counts[inner], a[inner], n),
        fractions=f,
        draws=float(draws),
        level=level,
    )


def _check_draws(name: str, samples: Tensor, truths: Tensor) -> None:
    shape = tuple(samples.shape)
    if samples.ndim < 2 or 0 in shape or tuple(truths.shape) != (shape[0], *shape[2:]):
        raise ValueError(
            f"{name}: samples {shape} and truths {tuple(truths.shape)}; expected (sims, draws, *shape) and "
            "(sims, *shape)."
        )


def _draws(count: int, weights: Tensor | None) -> float:
    """Draws per simulation; with weights, the mean effective number."""
    if weights is None:
        return count
    return float(_effective(torch.as_tensor(weights).double()).mean())


def _effective(weights: Tensor) -> Tensor:
    """Effective number of draws, (sum w)^2/sum w^2: (sims, draws) to (sims,)."""
    return weights.sum(1).square() / weights.square().sum(1)


def _fractions(
    name: str,
    far: Tensor,
    own: Tensor,
    seed: int,
    ids: Tensor | Sequence[int] | None,
    weights: Tensor | None,
) -> Tensor:
    """f_i from the order of the draws (sims, draws) and of the truth (sims,): small is inside."""
    bad = far.isnan().any(1) | own.isnan() | (far == -torch.inf).any(1) | (own == -torch.inf)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: simulation {int(bad.nonzero()[0, 0])} has draws or a truth that are not finite; leave it out, "
            "and say so, or find why its sampler failed."
        )
    inside, tied = far < own[:, None], far == own[:, None]
    numbers = torch.arange(len(far)) if ids is None else torch.as_tensor(ids).cpu()
    if numbers.shape != own.shape:
        raise ValueError(f"{name}: ids {tuple(numbers.shape)}; expected ({len(own)},).")
    u = uniform(seed, numbers, 0, (1,), torch.float64, stream=_STREAM)[:, 0]
    # A uniform place among the ties and the truth is r + k + u with k uniform on 0...ties: the sum
    # k + u is uniform on [0, ties + 1).
    if weights is None:
        return (inside.sum(1) + u * (tied.sum(1) + 1)) / (far.shape[1] + 1)
    w = torch.as_tensor(weights).detach().cpu().double()
    if w.shape != far.shape or not bool((w.isfinite() & (w >= 0)).all() & (w.sum(1) > 0).all()):
        raise ValueError(
            f"{name}: weights {tuple(w.shape)} for draws {tuple(far.shape)}; expected the same shape, not negative, "
            "some positive in each simulation."
        )
    n = _effective(w)
    w = w / w.sum(1, keepdim=True)
    return (n * (w * inside).sum(1) + u * (n * (w * tied).sum(1) + 1)) / (n + 1)
