"""Lensing by known lenses: a sparse matrix from the pixels of the source to those of the image."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import LinearOperator, Shape, numel
from diffpost.physics.grid import Grid
from diffpost.physics.sparse import SparseBlocks

__all__ = ["FixedLens"]

_LARGEST_DENSE = 1 << 22  # entries of a matrix that is worth decomposing


@final
class FixedLens(LinearOperator):
    """Lensing by known lenses, as a sparse matrix: ``Lens.at(params)`` makes it.

    Args:
        blocks: a matrix from source to image pixels for each entry of the batch, and within it for each
            channel, where these have lenses of their own.
        image, source: the grids.
        entries: of the batch; None for one lens that serves any.
        channels: with lenses of their own; None for one that serves any.
    """

    def __init__(
        self,
        blocks: SparseBlocks,
        image: Grid,
        source: Grid,
        entries: int | None,
        channels: int | None,
    ) -> None:
        self.blocks = blocks
        self.image, self.source = image, source
        self._entries, self._channels = entries, channels

    def __repr__(self) -> str:
        lenses = "" if self._entries is None else f", {self._entries} lenses"
        return f"FixedLens({self.source!r} -> {self.image!r}{lenses})"

    @property
    def batch(self) -> int | None:
        return self._entries

    @property
    def input_shape(self) -> Shape | None:
        return None if self._channels is None else (self._channels, *self.source.shape)

    def output_shape(self, input_shape: Shape) -> Shape:
        self._check(tuple(input_shape), self.source, "images")
        return (*input_shape[:-2], *self.image.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, ..., ny, nx) of sources (B, ..., ny_s, nx_s), flux per pixel.

        Raises:
            ValueError: sources of another shape, or not as many entries as lenses.
        """
        self._check(tuple(x.shape[1:]), self.source, "images")
        return self._multiply(x, self.image, adjoint=False)

    def adjoint(self, v: Tensor) -> Tensor:
        self._check(tuple(v.shape[1:]), self.image, "data")
        return self._multiply(v, self.source, adjoint=True)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> FixedLens:
        return self._with(self.blocks.to(device, dtype), self._entries)

    def select(self, ids: Tensor) -> FixedLens:
        """The lenses of entries ids; itself where all entries have the same one."""
        if self._entries is None:
            return self
        if bool(((ids < 0) | (ids >= self._entries)).any()):
            raise ValueError(
                f"{self!r}: got entries {ids.tolist()}; expected 0 to {self._entries - 1}."
            )
        if ids.tolist() == list(range(self._entries)):
            return self
        k = self._channels or 1
        each = (ids[:, None] * k + torch.arange(k, device=ids.device)).flatten()
        return self._with(self.blocks.select(each), len(ids))

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        """The matrix, for one lens and up to 2^22 entries; else None. See ``to_dense``."""
        shape = input_shape or self.input_shape
        if shape is None or self._entries is not None:
            return None
        self.output_shape(shape)
        count = numel(shape[:-2])
        if count**2 * self.blocks.m * self.blocks.n > _LARGEST_DENSE:
            return None
        single = self.blocks.to_dense().double()
        if self._channels is None:
            single = single.expand(count, -1, -1)
        return torch.block_diag(*single)

    def to_dense(self) -> Tensor:
        """The matrices over flattened pixels, (m, n), with a batch axis (B, m, n) and one of channels
        (K, m, n) or (B, K, m, n) where these have lenses of their own.
        """
        full = self.blocks.to_dense()
        front = [size for size in (self._entries, self._channels) if size is not None]
        return full.reshape(*front, *full.shape[1:])

    # products ----------------------------------------------------------------------------------

    def _with(self, blocks: SparseBlocks, entries: int | None) -> FixedLens:
        return FixedLens(blocks, self.image, self.source, entries, self._channels)

    def _check(self, shape: Shape, grid: Grid, what: str) -> None:
        front = shape[:-2]
        right = len(shape) >= 2 and shape[-2:] == grid.shape
        if not right or (self._channels is not None and front != (self._channels,)):
            wanted = "..." if self._channels is None else str(self._channels)
            side = "source" if what == "images" else "image"
            raise ValueError(
                f"{self!r}: got {what} of shape {shape}; expected ({wanted}, {grid.shape[0]}, "
                f"{grid.shape[1]}), the {side} grid."
            )

    def _multiply(self, x: Tensor, to: Grid, adjoint: bool) -> Tensor:
        if self._entries is not None and len(x) != self._entries:
            raise ValueError(
                f"{self!r}: got a batch of {len(x)}; expected {self._entries} entries, one for each lens "
                "(select(ids) takes a part of them)."
            )
        front = x.shape[1:-2]
        batch, channels = len(x), numel(tuple(front))
        flat = x.reshape(batch, channels, -1)
        # to columns: blocks and pixels first, what shares a block last
        if self._entries is None and self._channels is None:
            columns = flat.flatten(0, 1).T
        elif self._channels is None:
            columns = flat.transpose(1, 2).flatten(0, 1)
        elif self._entries is None:
            columns = flat.permute(1, 2, 0).flatten(0, 1)
        else:
            columns = flat.reshape(-1, 1)
        y = self.blocks.multiply(columns, adjoint)
        if self._entries is None and self._channels is None:
            y = y.T
        elif self._channels is None:
            y = y.reshape(batch, -1, channels).transpose(1, 2)
        elif self._entries is None:
            y = y.reshape(channels, -1, batch).permute(2, 0, 1)
        return y.reshape(batch, *front, *to.shape)
