"""Differences of log p from its score, along straight lines.

    log p(u + d) - log p(u) = int_0^1 d . score(u + a d) da

by Clenshaw and Curtis' (1960) rule, whose nodes (1 - cos(pi j/n))/2 contain those of n/2: each doubling keeps what
was evaluated, and its change is the error that the rule before made, hence a bound on what the new one makes where
the integrand is smooth. Reversed, the line gives minus the same number exactly. A network's score is the gradient
of something only as far as it was trained well; along one straight line the integral is defined all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

__all__ = ["clenshaw_curtis", "integral_between", "line_integral", "nodes"]


def nodes(n: int) -> list[float]:
    """The n + 1 nodes in [0, 1]; n even."""
    return [0.5 * (1 - math.cos(math.pi * j / n)) for j in range(n + 1)]


@cache
def clenshaw_curtis(n: int) -> tuple[float, ...]:
    """The weights of the nodes, which sum to 1 (Waldvogel 2006, BIT 46, 195, eq. 2.4); n even."""
    weights = []
    for j in range(n + 1):
        series = sum(
            (1 if k == n // 2 else 2) / (4 * k**2 - 1) * math.cos(2 * math.pi * j * k / n)
            for k in range(1, n // 2 + 1)
        )
        weights.append((0.5 if j in (0, n) else 1.0) * (1 - series) / n)
    return tuple(weights)


def line_integral(slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The integral and the estimate of its error, from d . score at the nodes.

    Args:
        slopes: (B, n + 1), n of at least 4 and a power of 2.

    Returns:
        The integral by all nodes and its distance from that by every other, both (B,).
    """
    n = slopes.shape[1] - 1
    fine = slopes @ slopes.new_tensor(clenshaw_curtis(n))
    coarse = slopes[:, ::2] @ slopes.new_tensor(clenshaw_curtis(n // 2))
    return fine, (fine - coarse).abs()


def integral_between(
    score: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    most: int = 32,
    tol: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """log p(end) - log p(start) from the score alone, and the estimate of its error; both (B,) float64.

    Entries whose estimated error is above ``tol`` are evaluated again at twice the nodes, up to ``most`` intervals; the
    others are not, so an entry never depends on its neighbours.

    Args:
        score: score(r, ids), d log p/dr at r (n, *shape) of the entries ids (n,) of the batch.
        start, end: (B, *shape).
        most: intervals at most, a power of 2 of at least 4.
        tol: error of log p that is not worth an evaluation.
    """
    delta = end - start
    wide = delta.double().flatten(1)

    def slopes_at(places: list[float], ids: Tensor) -> Tensor:
        points = torch.cat([start[ids] + a * delta[ids] for a in places])
        values = score(points, ids.repeat(len(places))).double().flatten(1)
        return (values * wide[ids].repeat(len(places), 1)).sum(1).reshape(len(places), -1).T

    ids = torch.arange(len(start), device=start.device)
    n = 4
    slopes = slopes_at(nodes(n), ids)
    total, error = line_integral(slopes)
    while 2 * n <= most:
        unsure = (error[ids] > tol).nonzero()[:, 0]
        if len(unsure) == 0:
            break
        ids, old = ids[unsure], slopes[unsure]
        n *= 2
        slopes = old.new_empty(len(ids), n + 1)
        slopes[:, ::2] = old
        slopes[:, 1::2] = slopes_at(nodes(n)[1::2], ids)
        finer, left = line_integral(slopes)
        total, error = total.index_copy(0, ids, finer), error.index_copy(0, ids, left)
    return total, error
