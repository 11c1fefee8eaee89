"""How much data say about an image: the largest eigenvalue of A^T Sigma^-1 A, by power iteration."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.random import normal

__all__ = ["finest_std", "largest_eigenvalue", "largest_gain"]

_ITERATIONS = 16


def largest_gain(likelihood: Likelihood, x: Tensor, iterations: int = _ITERATIONS) -> float:
    """The largest eigenvalue of A^T Sigma^-1 A, linearised at x (B, *shape): the data fix no direction of the image
    better than to a standard deviation of gain^-1/2. A lower bound, the better the more iterations.
    """
    linear, noise = likelihood.operator.linearize(x), likelihood.noise

    def product(v: Tensor) -> Tensor:
        return linear.adjoint(noise.whiten_adjoint(noise.whiten(linear(v))))

    return largest_eigenvalue(product, x, iterations)


def finest_std(likelihood: Likelihood, x: Tensor) -> float | None:
    """The standard deviation to which the data fix the image at best, linearised at x; None where they say nothing."""
    gain = largest_gain(likelihood, x)
    return 1 / math.sqrt(gain) if gain > 0 else None


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], like: Tensor, iterations: int = _ITERATIONS
) -> float:
    """The largest eigenvalue of symmetric matrices, one for each entry of ``like``: the largest of them."""
    ids = torch.arange(len(like), device=like.device)
    v = normal(0, ids, 0, tuple(like.shape[1:]), torch.float64).to(like)
    value = v.new_zeros(len(v))
    for _ in range(iterations):
        v = v / v.flatten(1).norm(dim=1).clamp_min(1e-300).reshape(-1, *[1] * (v.ndim - 1))
        image = product(v)
        value = (v * image).flatten(1).sum(1)
        v = image
    return float(value.max())
