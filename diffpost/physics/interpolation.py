"""Surface brightness between the pixels of a grid.

A pixelated source is a sum over its pixels, s(u) = sum_j s_j k(u - j) along each axis, in units of
pixels, with the kernel

    bilinear:  k(t) = 1 - |t|                                   |t| < 1
    bicubic:   k(t) = 1 - 5/2 t^2 + 3/2 |t|^3                   |t| < 1
               k(t) = 2 - 4 |t| + 5/2 t^2 - 1/2 |t|^3       1 < |t| < 2

(Keys 1981, IEEE Trans. ASSP 29, 1153, equation 15: a = -1/2, third order; torch's ``grid_sample``
has a = -3/4). Both interpolate, sum to 1 over the pixels, and have integral 1, so that every pixel,
also one on the border, has all of its flux. Outside the grid there are zeros: bilinear brightness falls
linearly from the middle of the last pixel, through half of it on the border, to zero half a pixel
beyond; bicubic brightness ends one and a half pixels beyond, after a small negative lobe.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Interpolation", "check_interpolation", "reach", "sample", "taps"]

Interpolation = Literal["bilinear", "bicubic"]

_OFFSETS = {"bilinear": (0, 1), "bicubic": (-1, 0, 1, 2)}


def check_interpolation(kind: str) -> None:
    """Raises unless the kernel is known."""
    if kind not in _OFFSETS:
        raise ValueError(
            f"got interpolation={kind!r}; expected {' or '.join(map(repr, get_args(Interpolation)))}."
        )


def reach(kind: Interpolation) -> int:
    """Pixels on either side of a place that its brightness depends on."""
    return len(_OFFSETS[kind]) // 2


def taps(u: Tensor, size: int, kind: Interpolation) -> tuple[list[Tensor], list[Tensor]]:
    """Pixels along one axis that a place depends on, and their weights.

    Args:
        u: places in pixels, any shape, finite.
        size: pixels of the axis.
        kind: the kernel.

    Returns:
        Indices (int64, -1 or ``size`` outside the grid) and weights, one tensor of u's shape each.
    """
    edge = reach(kind)
    # far places see nothing, and must not overflow the integers
    near = u.clamp(-1.0 - edge, size + edge)
    low = near.detach().floor()
    t = near - low
    if kind == "bilinear":
        weights = [1 - t, t]
    else:
        r = 1 - t
        # k at 1 + t, t, 1 - t, 2 - t
        weights = [
            -0.5 * t * r * r,
            1 + t * t * (1.5 * t - 2.5),
            1 + r * r * (1.5 * r - 2.5),
            -0.5 * r * t * t,
        ]
    first = low.long()
    indices = [(first + offset).clamp(-1, size) for offset in _OFFSETS[kind]]
    return indices, weights


def sample(source: Tensor, u: Tensor, v: Tensor, kind: Interpolation) -> Tensor:
    """s at places, differentiable in both.

    Args:
        source: (B, C, h, w).
        u, v: column and row in pixels, (B or 1, C or 1, n).
        kind: the kernel.

    Returns:
        (B, C, n).
    """
    height, width = source.shape[-2:]
    # a frame of zeros: what lies outside is read there
    padded = torch.nn.functional.pad(source, (1, 1, 1, 1)).flatten(-2)
    columns, along_x = taps(u, width, kind)
    rows, along_y = taps(v, height, kind)
    shape = (*source.shape[:2], u.shape[-1])
    total = source.new_zeros(())
    for row, weight_y in zip(rows, along_y, strict=True):
        line = source.new_zeros(())
        for column, weight_x in zip(columns, along_x, strict=True):
            place = (row + 1) * (width + 2) + (column + 1)
            line = line + padded.gather(-1, place.expand(shape)) * weight_x
        total = total + line * weight_y
    return total
