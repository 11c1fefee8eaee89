"""Magnification, critical curves and caustics.

With the Jacobian of the lens equation A = d beta/d theta, the magnification is mu = 1/det A, negative
where an image is mirrored. det A = 0 on the critical curves, which the lens equation maps to the
caustics of the source (Schneider, Ehlers & Falco 1992, section 5.2). A singular lens that is no
steeper than isothermal has no radial critical curve; the line in the source plane that its centre
maps to (the cut) is no caustic and is not drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffpost.physics.grid import Grid
from diffpost.physics.lensing import Lens, Params

__all__ = ["caustic_curves", "critical_curves", "jacobian", "magnification"]

_CHUNK = 1 << 16  # places at once
_FINE = 320  # places on the shorter side of the image between which curves are interpolated


def jacobian(lens: Lens, x: Tensor, y: Tensor, params: Params | None = None) -> Tensor:
    """A = d beta/d theta at places, by forward differentiation of caustics' ray tracing.

    Args:
        lens: with K masses.
        x, y: (n,), arcsec on the image.
        params: as for ``Lens.at``.

    Returns:
        (K, n, 2, 2), or (B, K, n, 2, 2) for (B, P); the last axis is that of the derivative.

    Raises:
        ValueError: as ``Lens.at``.
    """
    parts = []
    for u, v in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
        one, none = torch.ones_like(u), torch.zeros_like(u)

        def trace(a: Tensor, b: Tensor) -> Tensor:
            return lens.trace(a, b, params)

        columns = [
            torch.func.jvp(trace, (u, v), tangents)[1] for tangents in ((one, none), (none, one))
        ]
        parts.append(torch.stack(columns, -1).transpose(-2, -3))
    return torch.cat(parts, -3)


def magnification(
    lens: Lens, params: Params | None = None, grid: Grid | None = None, channel: int = 0
) -> Tensor:
    """mu = 1/det A at the middles of pixels.

    Args:
        lens: for its mass.
        params: as for ``Lens.at``.
        grid: where; None is the lens' image.
        channel: of a lens with several masses.

    Returns:
        (ny, nx), or (B, ny, nx) for (B, P), signed.

    Raises:
        ValueError: as ``Lens.at``.
    """
    grid = lens.image if grid is None else grid
    return 1 / _determinant(lens, params, grid, channel)


def critical_curves(
    lens: Lens, params: Params | None = None, grid: Grid | None = None, channel: int = 0
) -> list[Tensor]:
    """Where det A = 0, interpolated between the middles of pixels.

    Args:
        lens: for its mass.
        params: (P,), or as for ``Lens.at``.
        grid: between whose pixels; None is the lens' image, split to at least 320 pixels a side.
        channel: of a lens with several masses.

    Returns:
        A line (n, 2) for each, x and y in arcsec; a closed one ends where it began.

    Raises:
        ValueError: several vectors of parameters; as ``Lens.at``.
    """
    from skimage.measure import find_contours

    if grid is None:
        ny, nx = lens.image.shape
        finer = max(1, math.ceil(_FINE / min(ny, nx)))
        grid = Grid((ny * finer, nx * finer), lens.image.pixel / finer, lens.image.centre)
    determinant = _determinant(lens, params, grid, channel)
    if determinant.ndim != 2:
        raise ValueError(
            f"critical_curves: got {len(determinant)} vectors of parameters; expected one, (P,)."
        )
    curves = []
    for line in find_contours(determinant.cpu().double().numpy(), 0.0):
        row, column = torch.from_numpy(line.copy()).unbind(-1)
        curves.append(torch.stack(grid.to_arcsec(column, row), -1))
    return curves


def caustic_curves(
    lens: Lens, params: Params | None = None, grid: Grid | None = None, channel: int = 0
) -> list[Tensor]:
    """The critical curves on the source plane, line by line; arguments as there."""
    return traced(lens, critical_curves(lens, params, grid, channel), params, channel)


def traced(lens: Lens, curves: list[Tensor], params: Params | None, channel: int) -> list[Tensor]:
    """Lines (n, 2) of the image plane on the source plane."""
    found = []
    for line in curves:
        x, y = line.unbind(-1)
        found.append(lens.trace(x, y, params)[channel].T)
    return found


def _determinant(lens: Lens, params: Params | None, grid: Grid, channel: int) -> Tensor:
    x, y = grid.coordinates()
    a = jacobian(lens, x.flatten(), y.flatten(), params)[..., channel, :, :, :]
    determinant = a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
    return determinant.unflatten(-1, grid.shape)
