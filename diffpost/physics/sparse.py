"""Sparse matrices of interpolation, one or a block for each lens, in both directions.

A x gathers, and so does A^T v once A^T is stored by its own rows as well: neither product scatters, so
nothing is added atomically and the same input gives the same bits. Blocks of a batch stand on the
diagonal of one matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor

from diffpost.operators.base import Memo
from diffpost.physics.transforms import plain

__all__ = ["SparseBlocks", "rows_from_taps"]


@final
class SparseBlocks:
    """K matrices (m, n) of equal shape on a diagonal, (K m, K n), with their transposes.

    Args:
        start: (K m + 1,) where each row begins (CSR).
        column: (nnz,) within the block, 0 to n - 1, rising within a row.
        value: (nnz,).
        blocks: K.
        n: columns of a block.
    """

    def __init__(self, start: Tensor, column: Tensor, value: Tensor, blocks: int, n: int) -> None:
        self.start, self.column, self.value = start, column, value
        self.blocks, self.n = blocks, n
        self.m = (len(start) - 1) // blocks
        self._memo = Memo(8)

    @classmethod
    def from_rows(
        cls, parts: Iterable[tuple[Tensor, Tensor, Tensor]], blocks: int, n: int
    ) -> SparseBlocks:
        """From consecutive rows: how many entries each has, their columns, and their values."""
        counts, columns, values = zip(*parts, strict=True)
        count = torch.cat(counts)
        start = torch.zeros(len(count) + 1, dtype=torch.int64, device=count.device)
        torch.cumsum(count, 0, out=start[1:])
        return cls(start, torch.cat(columns), torch.cat(values), blocks, n)

    def to(self, device: torch.device | str | None, dtype: torch.dtype | None) -> SparseBlocks:
        return SparseBlocks(
            self.start.to(device),
            self.column.to(device),
            self.value.to(device, dtype),
            self.blocks,
            self.n,
        )

    def select(self, ids: Tensor) -> SparseBlocks:
        """The blocks ids (k,), in this order."""
        ids = ids.to(self.start.device)
        rows = (ids[:, None] * self.m + torch.arange(self.m, device=ids.device)).flatten()
        counts = (self.start[1:] - self.start[:-1])[rows]
        first, last = self.start[ids * self.m], self.start[(ids + 1) * self.m]
        place = torch.cat(
            [
                torch.arange(int(a), int(b), device=ids.device)
                for a, b in zip(first, last, strict=True)
            ]
        )
        return SparseBlocks.from_rows(
            [(counts, self.column[place], self.value[place])], len(ids), self.n
        )

    def multiply(self, x: Tensor, adjoint: bool = False) -> Tensor:
        """A x, or A^T x: (K n, c) to (K m, c), or back. Differentiable in x, at any order."""
        if plain(x):
            return self.product(x, adjoint)
        product: Tensor = _Product.apply(x, self, adjoint)  # costs as much as a small product
        return product

    def product(self, x: Tensor, adjoint: bool) -> Tensor:
        """As ``multiply``, without derivatives."""
        matrix = self._matrix(x, adjoint)
        columns = x.to(matrix.dtype).contiguous()
        if columns.shape[1] == 1:  # twice as fast
            return (matrix @ columns[:, 0])[:, None].to(x.dtype)
        return (matrix @ columns).to(x.dtype)

    def to_dense(self) -> Tensor:
        """(K, m, n)."""
        full = self.value.new_zeros(self.blocks * self.m, self.n)
        full[self._rows(), self.column] = self.value
        return full.reshape(self.blocks, self.m, self.n)

    def row_sums(self) -> Tensor:
        """(K, m): the data of ones."""
        one = self.value.new_ones(self.blocks * self.n, 1)
        return self.multiply(one).reshape(self.blocks, self.m)

    def _rows(self) -> Tensor:
        counts = self.start[1:] - self.start[:-1]
        return torch.repeat_interleave(
            torch.arange(len(counts), device=counts.device), counts, output_size=len(self.column)
        )

    def _matrix(self, like: Tensor, adjoint: bool) -> Tensor:
        # half precision has no sparse products, and would not be enough for the sums
        dtype = like.dtype if like.dtype == torch.float64 else torch.float32
        return self._memo(
            (dtype, like.device, adjoint), lambda: self._build(dtype, like.device, adjoint)
        )

    def _build(self, dtype: torch.dtype, device: torch.device, adjoint: bool) -> Tensor:
        height, width = self.blocks * self.m, self.blocks * self.n
        rows = self._rows()
        column = self.column + rows.div(self.m, rounding_mode="floor") * self.n
        start, value = self.start, self.value
        if adjoint:
            # stable: within a column the rows go on rising
            order = torch.argsort(column.to(_index(height, width)), stable=True)
            counts = torch.bincount(column, minlength=width)
            start = torch.zeros(width + 1, dtype=torch.int64, device=counts.device)
            torch.cumsum(counts, 0, out=start[1:])
            column, value = rows[order], value[order]
            height, width = width, height
        index = _index(len(column), max(height, width))
        if device.type == "cpu" and not torch.backends.mkl.is_available():
            # torch multiplies CSR on CPUs by MKL only
            counts = start[1:] - start[:-1]
            rows = torch.repeat_interleave(torch.arange(height), counts.cpu())
            return torch.sparse_coo_tensor(
                torch.stack([rows, column.cpu()]),
                value.to(device, dtype),
                (height, width),
                is_coalesced=True,
                check_invariants=False,
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                start.to(device, index),
                column.to(device, index),
                value.to(device, dtype),
                (height, width),
                check_invariants=False,
            )


def _index(*sizes: int) -> torch.dtype:
    return torch.int32 if max(sizes) < 2**31 else torch.int64


class _Product(torch.autograd.Function):
    """A x, with A^T for its derivative."""

    @staticmethod
    def forward(x: Tensor, blocks: SparseBlocks, adjoint: bool) -> Tensor:
        return blocks.product(x, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.blocks, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Product.apply(gradient, ctx.blocks, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        product: Tensor = _Product.apply(tangent, ctx.blocks, ctx.adjoint)
        return product

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], x: Tensor, blocks: SparseBlocks, adjoint: bool
    ) -> tuple[Tensor, int]:
        moved = x.movedim(in_dims[0], -1)  # as further columns
        product = _Product.apply(moved.reshape(len(moved), -1), blocks, adjoint)
        return product.reshape(len(product), *moved.shape[1:]), moved.ndim - 1


def rows_from_taps(columns: Tensor, weights: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a sparse matrix from entries in any order, with repetitions.

    Args:
        columns: (rows, e), n for an entry that counts for nothing.
        weights: (rows, e).
        n: columns of the matrix.

    Returns:
        Entries of each row (rows,), their columns, rising, and their values, each column once.
    """
    columns, order = torch.sort(columns, -1)
    weights = weights.gather(-1, order).flatten()
    first = torch.ones_like(columns, dtype=torch.bool)
    first[:, 1:] = columns[:, 1:] != columns[:, :-1]
    counts = (first & (columns < n)).sum(-1)
    begins = first.flatten().nonzero()[:, 0]
    end = torch.full((1,), columns.numel(), dtype=begins.dtype, device=begins.device)
    lengths = torch.diff(begins, append=end)
    # not index_add: one thread a segment, in order
    sums = torch.segment_reduce(weights, "sum", lengths=lengths, unsafe=True)
    kept = columns.flatten()[begins]
    inside = kept < n
    return counts, kept[inside].long(), sums[inside]
