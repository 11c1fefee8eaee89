r"""Does a sampler visit the modes of a mixture as often as it should?

A draw is given to component k with probability r_k(x) = p(k | x), its responsibility. If draws come
from the mixture, the component so drawn has *exactly* the probability w_k, however much the
components overlap, so the counts are multinomial (n, w). The p-value of Pearson's statistic is
taken from simulated multinomial counts, as expected counts may be far below one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.score import GaussianMixtureScore

__all__ = ["ModeWeights", "mode_weights"]

_LEAST = 1e-3


@final
@dataclass(frozen=True)
class ModeWeights:
    """How often each mode was visited.

    Attributes:
        counts: (K,) draws of each mode; with weighted draws, of the effective number of them.
        expected: (K,) n w_k.
        chi2: Pearson's statistic, infinite if a mode of weight 0 was visited.
        p_value: of the multinomial test, from simulated counts.
        assignment: (n,) the mode of each draw.
    """

    counts: Tensor
    expected: Tensor
    chi2: float
    p_value: float
    assignment: Tensor


def mode_weights(
    x: Tensor,
    mixture: GaussianMixtureScore | Tensor,
    expected_weights: Tensor | None = None,
    *,
    var: float | Tensor = 1.0,
    log_weights: Tensor | None = None,
    simulations: int = 20_000,
    seed: int = 0,
) -> ModeWeights:
    """Counts of draws in each mode, and a test of their weights.

    Draws must be independent: those of one particle cloud are not, nor is a chain. Modes that
    overlap are counted right if the components' own shapes are right.

    Args:
        x: (n, *shape) draws.
        mixture: the target, or its means (K, *shape).
        expected_weights: (K,) w, up to a factor; default those of the mixture.
        var: with means, the variance of the components: a number, (K,), or broadcastable to
            (K, *shape). For a full covariance, hand over whitened draws and means.
        log_weights: (n,) log importance weights of the draws; the test is then that of the effective
            number (sum w)^2/sum w^2, which is approximate.
        simulations: of the counts.
        seed: of assignments and simulations.

    Raises:
        ValueError: shapes that do not fit, draws that are not finite, negative weights.
    """
    if isinstance(mixture, GaussianMixtureScore):
        means, weights = mixture.means.double().cpu(), mixture.weights.cpu()
        variance = mixture.variance.cpu()
    else:
        means, weights = torch.as_tensor(mixture).double().cpu(), None
        variance = torch.as_tensor(var, dtype=torch.float64).cpu()
        if variance.ndim == 0 or variance.shape == (len(means),):
            variance = variance.expand(len(means))[:, None]
        else:
            variance = variance.expand(means.shape).flatten(1)
    if expected_weights is not None:
        weights = torch.as_tensor(expected_weights, dtype=torch.float64).cpu()
    k = len(means)
    if weights is None or weights.shape != (k,) or not bool((weights >= 0).all()):
        raise ValueError(
            f"mode_weights: expected_weights {None if weights is None else tuple(weights.shape)} for {k} modes; "
            f"expected ({k},), not negative."
        )
    x = torch.as_tensor(x).detach().cpu().double()
    if tuple(x.shape[1:]) != tuple(means.shape[1:]) or len(x) == 0 or not bool(x.isfinite().all()):
        raise ValueError(
            f"mode_weights: draws {tuple(x.shape)} for means {tuple(means.shape)}; expected (n, *shape) and "
            "(K, *shape), all finite."
        )
    weights = weights / weights.sum()
    # The floor lets a draw that sits on a mode of weight 0 be counted there, not hidden elsewhere;
    # it takes a draw of the mixture there with probability 1e-3 in all.
    logits = (
        _log_density(x.flatten(1), means.flatten(1), variance)
        + weights.clamp_min(_LEAST / len(x) / k).log()
    )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    share = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    if log_weights is not None:
        share = torch.softmax(torch.as_tensor(log_weights).detach().cpu().double(), 0)
    n = float(1 / share.square().sum())
    counts = n * torch.zeros(k, dtype=torch.float64).index_add(0, chosen, share)
    size = max(1, round(n))
    observed = _pearson(counts.numpy()[None], n * weights.numpy())[0]
    null = np.random.default_rng(seed).multinomial(size, weights.numpy(), size=simulations)
    worse = int(
        (_pearson(null.astype(np.float64), size * weights.numpy()) >= observed * (1 - 1e-9)).sum()
    )
    return ModeWeights(
        counts=counts,
        expected=n * weights,
        chi2=float(observed),
        p_value=(1 + worse) / (1 + simulations),
        assignment=chosen,
    )


def _log_density(x: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """log N(x; m_k, v_k) up to a constant, (n, K); one component at a time to keep memory at (n, d)."""
    columns = []
    for mean, v in zip(means, variance, strict=True):
        chi2 = ((x - mean).square() / v).sum(1)
        columns.append(-0.5 * (chi2 + v.expand(x.shape[1]).log().sum()))
    return torch.stack(columns, 1)


def _pearson(counts: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's statistic of each row; a cell of expectation 0 must be empty."""
    known = expected > 0
    value = ((counts - expected)[:, known] ** 2 / expected[known]).sum(1)
    return np.where(counts[:, ~known].sum(1) > 0, np.inf, value)
