r"""Reference points for TARP that depend on the data, learned on the way.

A fraction f_i is exactly uniform for any reference that, given the data y_i, is free of the truth
x_i and of its draws. So what simulations before i say about x given y may be used: with ridge
regression on those,

    p_i = mean(x) + sum_j a_j K(y_j, y_i),     a = (K + lambda I)^-1 (x - mean(x)),     K = y y^T,

a rough estimate of x_i from y_i, and the reference stands beside it at half its error e = x - p,

    r_i = p_i + rms |e| e_0/(2 |e_0|),

always on the side of the same earlier error e_0, which lies where x varies. Near the estimate the
prior handed back is found out at once and a wrong width soon; the offset shows a bias. As each f_i
is uniform whatever came before it, they are independent, as the test wants them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["references_from_data"]

_FIRST = 16  # simulations before the first regression


def references_from_data(data: Tensor, truths: Tensor, seed: int = 0) -> Tensor:
    """References (sims, *shape) for ``coverage`` and ``tarp_fraction``.

    The regression is renewed when the simulations before it have doubled. The first 16 have none:
    their references are a fixed random projection of their data.

    Args:
        data: (sims, *data), of any shape; values that are not finite count as 0.
        truths: (sims, *shape), in the order of the data.
        seed: of the projection.

    Raises:
        ValueError: numbers of data and truths differ, or a truth is not finite.
    """
    data, truths = torch.as_tensor(data), torch.as_tensor(truths)
    n = len(truths)
    if data.ndim < 2 or truths.ndim < 2 or len(data) != n or n == 0:
        raise ValueError(
            f"references_from_data: data {tuple(data.shape)} and truths {tuple(truths.shape)}; expected (sims, *data) "
            "and (sims, *shape)."
        )
    x = truths.detach().cpu().double().flatten(1)
    y = torch.nan_to_num(data.detach().cpu().double().flatten(1), 0.0, 0.0, 0.0)
    if not bool(x.isfinite().all()):
        raise ValueError("references_from_data: got truths that are not finite.")
    generator = torch.Generator().manual_seed(seed)
    first = min(_FIRST, n)
    out = torch.empty_like(x)
    out[:first] = _projected(y[:first], x.shape[1], generator)
    start = first
    while start < n:
        stop = min(2 * start, n)
        guess, errors = _regress(x[:start], y[:start], y[start:stop])
        length = float(errors.square().sum(1).mean().sqrt())
        out[start:stop] = guess + 0.5 * length * errors[0] / errors[0].norm().clamp_min(1e-300)
        start = stop
    return out.reshape(truths.shape).to(truths)


def _projected(y: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random linear map of y, in slices of rows so that it never stands in memory whole."""
    parts = []
    for rows in torch.arange(size).split(max(1, 2**22 // y.shape[1])):
        p = torch.randn(len(rows), y.shape[1], generator=generator, dtype=y.dtype)
        parts.append(y @ p.T / math.sqrt(y.shape[1]))
    return torch.cat(parts, 1)


def _regress(x: Tensor, y: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates at new data, and errors of those learned from, each estimated without itself."""
    xm, ym = x.mean(0), y.mean(0)
    x, y, new = x - xm, y - ym, new - ym
    value, vector = torch.linalg.eigh(y @ y.T)
    value = value.clamp_min(0)
    best: tuple[float, Tensor, Tensor] | None = None
    for relative in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        ridge = relative * float(value.mean()) + 1e-300
        # Leave-one-out errors of ridge regression: a_i/[(K + lambda)^-1]_ii.
        inverse = (vector / (value + ridge)) @ vector.T
        a = inverse @ x
        errors = a / inverse.diagonal()[:, None]
        loss = float(errors.square().sum())
        if best is None or loss < best[0]:
            best = loss, a, errors
    if best is None:
        raise RuntimeError("references_from_data: no regression was tried.")
    return xm + (new @ y.T) @ best[1], best[2]
