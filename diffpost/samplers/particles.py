"""Weighted particles: effective sizes, resampling, and the error of an evidence."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_size", "evidence_error", "systematic"]


def effective_size(log_weights: Tensor) -> Tensor:
    """1/sum w^2 of the normalised weights (Kong 1992): (..., N) to (...)."""
    return 1 / torch.softmax(log_weights, -1).square().sum(-1)


def systematic(log_weights: Tensor, uniform: Tensor) -> Tensor:
    """Systematic resampling (Kitagawa 1996): particle i is kept N w_i times, up to one.

    Args:
        log_weights: (C, N), not normalised.
        uniform: (C,) in [0, 1), one number for each cloud.

    Returns:
        (C, N) indices, increasing.
    """
    count = log_weights.shape[1]
    edges = torch.softmax(log_weights, 1).cumsum(1)
    place = (torch.arange(count, device=edges.device) + uniform[:, None]) / count
    return torch.searchsorted(edges / edges[:, -1:], place).clamp_max(count - 1)


def evidence_error(log_weights: Tensor, ancestors: Tensor) -> Tensor:
    """Standard error of log Z from one run, by its genealogy: (C, N) to (C,).

    With W_e the final weight of all that descend from the first particle e, the relative variance of Z is about
    N/(N - 1) (sum_e W_e^2 - 1/N).  Lee & Whiteley (2018, arXiv:1509.00394, equation 2) subtract 1/N for every
    resampling as well, which is right for independent resampling; systematic resampling scatters less, so that
    theirs becomes negative. This one errs on the large side.

    Args:
        log_weights: (C, N), not normalised.
        ancestors: (C, N) the first particle from which each descends, 0 to N - 1.
    """
    count = log_weights.shape[1]
    weights = torch.softmax(log_weights, 1)
    shares = torch.zeros_like(weights).scatter_add_(1, ancestors, weights)
    variance = (shares.square().sum(1) - 1 / count) * count / max(count - 1, 1)
    return variance.clamp_min(0).sqrt()
