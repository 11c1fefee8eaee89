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

__all__ = ["clenshaw_curtis", "integral_between", "line_integral", "nodes", "refined"]

_NEGLIGIBLE = 1e-3  # an error of log p that is not worth an evaluation


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


def refined(
    slopes: Tensor,
    slopes_at: Callable[[list[float], Tensor], Tensor],
    most: int,
    doubt: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The integral, and the estimate of its error where that is in doubt; both (B,).

    Entries in doubt by more than 0.001 are evaluated again at twice the nodes, up to ``most`` intervals; the others are
    not, so an entry never depends on its neighbours.

    Args:
        slopes: d . score at the nodes of 4 intervals, (B, 5).
        slopes_at: the same at these places for the entries ids (n,) of the batch, (n, places).
        most: intervals at most, a power of 2 of at least 4.
        doubt: (integral, its error, ids) to what of the error matters, (n,); None is all of it.
    """
    ids = torch.arange(len(slopes), device=slopes.device)

    def integrated(values: Tensor) -> tuple[Tensor, Tensor]:
        total, error = line_integral(values)
        return total, error if doubt is None else doubt(total, error, ids)

    total, left = integrated(slopes)
    n = 4
    while 2 * n <= most:
        unsure = (left[ids] > _NEGLIGIBLE).nonzero()[:, 0]
        if len(unsure) == 0:
            break
        ids, old = ids[unsure], slopes[unsure]
        n *= 2
        slopes = old.new_empty(len(ids), n + 1)
        slopes[:, ::2] = old
        slopes[:, 1::2] = slopes_at(nodes(n)[1::2], ids)
        finer, doubted = integrated(slopes)
        total, left = total.index_copy(0, ids, finer), left.index_copy(0, ids, doubted)
    return total, left


def integral_between(
    score: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    most: int = 32,
) -> tuple[Tensor, Tensor]:
    """log p(end) - log p(start) from the score alone, and the estimate of its error; both (B,) float64.

    Refined where the estimated error asks for it (:func:`refined`).

    Args:
        score: score(r, ids), d log p/dr at r (n, *shape) of the entries ids (n,) of the batch.
        start, end: (B, *shape).
        most: intervals at most, a power of 2 of at least 4.
    """
    delta = end - start
    wide = delta.double().flatten(1)

    def slopes_at(places: list[float], ids: Tensor) -> Tensor:
        points = torch.cat([start[ids] + a * delta[ids] for a in places])
        values = score(points, ids.repeat(len(places))).double().flatten(1)
        return (values * wide[ids].repeat(len(places), 1)).sum(1).reshape(len(places), -1).T

    everyone = torch.arange(len(start), device=start.device)
    return refined(slopes_at(nodes(4), everyone), slopes_at, most)
