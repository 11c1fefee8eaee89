"""Weighted particles: effective sizes, resampling, and the error of an evidence."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_ancestors", "effective_size", "evidence_error", "systematic"]

_FEWEST = 4.0  # ancestors, below which a genealogy does not tell an error


def effective_size(log_weights: Tensor) -> Tensor:
    """1/sum w^2 of the normalised weights (Kong 1992): (..., N) to (...)."""
    return 1 / torch.softmax(log_weights, -1).square().sum(-1)


def systematic(log_weights: Tensor, uniform: Tensor, count: int | None = None) -> Tensor:
    """Systematic resampling (Kitagawa 1996): particle i is kept ``count`` w_i times, up to one.

    Args:
        log_weights: (C, N), not normalised.
        uniform: (C,) in [0, 1), one number for each cloud.
        count: how many are kept; None is N.

    Returns:
        (C, count) indices, increasing.
    """
    last = log_weights.shape[1] - 1
    count = last + 1 if count is None else count
    edges = torch.softmax(log_weights, 1).cumsum(1)
    place = (torch.arange(count, device=edges.device) + uniform[:, None]) / count
    return torch.searchsorted(edges / edges[:, -1:], place).clamp_max(last)


def effective_ancestors(log_weights: Tensor, ancestors: Tensor) -> Tensor:
    """1/sum_e W_e^2, with W_e the weight of all that descend from the first particle e: (C, N) to (C,).

    How many of the first particles the draws come from; like the effective size, but it remembers all resamplings.
    """
    weights = torch.softmax(log_weights, 1)
    shares = torch.zeros_like(weights).scatter_add_(1, ancestors, weights)
    return 1 / shares.square().sum(1)


def evidence_error(log_weights: Tensor, ancestors: Tensor) -> Tensor:
    """Standard error of log Z from one run, by its genealogy: (C, N) to (C,); infinite where few ancestors are left.

    With W_e the final weight of all that descend from the first particle e, the relative variance of Z is about
    N/(N - 1) (sum_e W_e^2 - 1/N).  Lee & Whiteley (2018, arXiv:1509.00394, equation 2) subtract 1/N for every
    resampling as well, which is right for independent resampling; systematic resampling scatters less, so that
    theirs becomes negative. This one errs on the large side where many ancestors are left. It cannot exceed 1, so
    with fewer than 4 effective ancestors, when it would be above 0.5 and says nothing, it is infinite.

    Args:
        log_weights: (C, N), not normalised.
        ancestors: (C, N) the first particle from which each descends, 0 to N - 1.
    """
    count = log_weights.shape[1]
    left = effective_ancestors(log_weights, ancestors)
    variance = (1 / left - 1 / count) * count / max(count - 1, 1)
    return torch.where(left < min(_FEWEST, count), torch.inf, variance.clamp_min(0).sqrt())
