r"""Score models at sizes they were not made for.

Noise has a correlation length, and beyond it a pixel's score does not see. So the score of a large image is that of
overlapping tiles: every pixel is taken from the tile in which it is farthest from the border, at least ``overlap``/2
pixels inside but for the edges of the image itself,

    d log p/dr_i = d log p_tile/dr_i + error,

with an error that falls as the conditional dependence of pixel i on pixels more than ``overlap``/2 away: none for
independent pixels, and none where p is Markov of that range. It is not a gradient of one density. Networks that are
fully convolutional need no tiles but where the size is not divisible by their stride.
"""

from __future__ import annotations

import itertools
from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import Shape
from diffpost.score import ScoreModel

__all__ = ["TiledScore", "fitted"]


@final
class TiledScore(ScoreModel):
    """A score model of small images as one of large ones.

    Args:
        model: of tiles (..., h, w).
        shape: of the large image, (..., H, W), no smaller than a tile.
        overlap: pixels by which neighbouring tiles overlap at least; None is half the shorter side of a tile.

    Raises:
        ValueError: shapes that do not fit, a scale or offset that differs between pixels, or an overlap that is not
            smaller than a tile.
    """

    def __init__(self, model: ScoreModel, shape: Shape, overlap: int | None = None) -> None:
        shape = tuple(int(side) for side in shape)
        tile = model.shape
        if len(tile) < 2 or len(tile) != len(shape) or tile[:-2] != shape[:-2]:
            raise ValueError(
                f"TiledScore: got tiles of {tile} for images of {shape}; expected the same axes but the last two."
            )
        if any(side < small for side, small in zip(shape[-2:], tile[-2:], strict=True)):
            raise ValueError(
                f"TiledScore: the image {shape} is smaller than a tile, {tile}; crop the model instead, or pad the data."
            )
        for value in (model.scale, model.offset):
            if isinstance(value, Tensor) and value.numel() > 1 and max(value.shape[-2:]) > 1:
                raise ValueError(
                    "TiledScore: the model's map to physical units differs between pixels."
                )
        self.overlap = min(tile[-2:]) // 2 if overlap is None else int(overlap)
        if not 0 <= self.overlap < min(tile[-2:]):
            raise ValueError(
                f"TiledScore(overlap={overlap}): expected 0 to {min(tile[-2:]) - 1} pixels for tiles of {tile}."
            )
        self.model, self.shape = model, shape
        self.sde, self.scale, self.offset = model.sde, model.scale, model.offset
        self.analytic = model.analytic
        self._rows = _cover(shape[-2], tile[-2], self.overlap)
        self._columns = _cover(shape[-1], tile[-1], self.overlap)

    def __repr__(self) -> str:
        return f"TiledScore({self.model!r}, {self.shape}, overlap={self.overlap})"

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def card(self) -> dict[str, object]:
        """The model's."""
        return dict(getattr(self.model, "card", {}))

    def with_shape(self, shape: Shape) -> TiledScore:
        return TiledScore(self.model, shape, self.overlap)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> TiledScore:
        move = getattr(self.model, "to", None)
        return self if move is None else TiledScore(move(device, dtype), self.shape, self.overlap)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return self._tiled(x, t, score=False)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self._tiled(x, t, score=True)

    def _tiled(self, x: Tensor, t: Tensor, score: bool) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"TiledScore: got x {tuple(x.shape)}; expected (B, *{self.shape}).")
        height, width = self.model.shape[-2:]
        tiles = [
            x[..., top : top + height, left : left + width]
            for top, _, _ in self._rows
            for left, _, _ in self._columns
        ]
        each = t if t.ndim == 0 else t.repeat(len(tiles))
        answer = self.model.score if score else self.model.denoise
        found = iter(answer(torch.cat(tiles), each).split(len(x)))
        bands = []
        for top, first, last in self._rows:
            parts = []
            for left, begin, end in self._columns:
                part = next(found)
                parts.append(part[..., first - top : last - top, begin - left : end - left])
            bands.append(torch.cat(parts, -1))
        return torch.cat(bands, -2)


def _cover(side: int, tile: int, overlap: int) -> list[tuple[int, int, int]]:
    """Tiles of an axis: (where one starts, the first pixel taken from it, the first no longer taken)."""
    count = 1 if side == tile else -(-(side - overlap) // (tile - overlap))
    starts = [0] if count == 1 else [round(i * (side - tile) / (count - 1)) for i in range(count)]
    # half way between the end of one tile and the start of the next
    edges = [0, *((a + tile + b) // 2 for a, b in itertools.pairwise(starts)), side]
    return [(start, edges[i], edges[i + 1]) for i, start in enumerate(starts)]


def fitted(model: ScoreModel, shape: Shape) -> ScoreModel:
    """The model for data of this shape: itself, of another size, or in tiles.

    An axis of one channel may be missing in the data.

    Raises:
        ValueError: the model can be neither; says what it takes.
    """
    own = tuple(model.shape)
    shape = tuple(shape)
    if shape == own:
        return model
    if len(own) == len(shape) + 1 and own[0] == 1:
        shape = (1, *shape)
        if shape == own:
            return model
    try:
        return model.with_shape(shape)
    except ValueError:
        pass
    if len(shape) != len(own) or len(own) < 2 or shape[:-2] != own[:-2]:
        raise ValueError(
            f"the noise model is of images {own}, the data are {shape}; expected the same but for the last two axes."
        )
    stride = int(getattr(model, "stride", 1))
    if stride > 1:
        sides = [side - side % stride for side in shape[-2:]]
        if min(sides) < stride:
            raise ValueError(
                f"the noise model's network takes sides divisible by {stride}, the data are {shape}; expected at least "
                f"{stride} pixels each way."
            )
        small = model.with_shape((*shape[:-2], *sides))
        left = max(side % stride for side in shape[-2:])
        return TiledScore(small, shape, overlap=max(min(sides) - left, 0))  # two tiles an axis
    return TiledScore(model, shape)
