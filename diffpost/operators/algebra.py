"""Sums, products and stacks of operators.

Linear parts make linear wholes (``Compose``, ``Sum``, ``Scaled``, ``Stack``), which pass on the
structure that survives: Fourier after Fourier, diagonal after diagonal, and the gram of a product
factor by factor, (A B) P (A B)^T = A (B P B^T) A^T. With a nonlinear part the whole is nonlinear
and linearises by the chain rule,

    (A o B)'(x) = A'(B(x)) B'(x),

so that a linear factor keeps its own adjoint. ``A @ B``, ``A + B``, ``c * A`` and :func:`stack`
choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor

from diffpost.operators.base import LinearOperator, Operator, PowerSpectrum, Shape, numel

__all__ = [
    "Compose",
    "Scaled",
    "Stack",
    "Sum",
]


def same_output(operators: Sequence[Operator], input_shape: Shape) -> Shape:
    shapes = [op.output_shape(input_shape) for op in operators]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"Sum: for images {tuple(input_shape)} the terms give data of shapes "
            f"{', '.join(map(str, shapes))}; expected the same of all."
        )
    return shapes[0]


def as_factor(value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise ValueError(
            f"got {value!r} as a factor of an operator; expected a finite number (a tensor that varies "
            "over pixels is Diagonal(d) @ A)."
        )
    return float(value)


class _Bound:
    """The last binding of an operator, kept so that it stays the same object."""

    def __init__(self) -> None:
        self.shape: Shape | None = None
        self.operator: LinearOperator | None = None


@final
class Compose(LinearOperator):
    """A B: first B, then A.

    Args:
        outer: A.
        inner: B.
    """

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer, self.inner = outer, inner
        self._bound = _Bound()

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    @property
    def input_shape(self) -> Shape | None:
        return self.inner.input_shape

    @property
    def batch(self) -> int | None:
        return common_batch([self.outer, self.inner])

    def select(self, ids: Tensor) -> LinearOperator:
        outer, inner = self.outer.select(ids), self.inner.select(ids)
        same = outer is self.outer and inner is self.inner
        return self if same else Compose(outer, inner)

    @property
    def data_shape(self) -> Shape | None:
        middle = self.inner.data_shape
        return self.outer.data_shape or (
            None if middle is None else self.outer.output_shape(middle)
        )

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.outer.output_shape(self.inner.output_shape(input_shape))

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def adjoint(self, v: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(v))

    def bind(self, input_shape: Shape) -> LinearOperator:
        if self._bound.operator is None or self._bound.shape != tuple(input_shape):
            inner = self.inner.bind(input_shape)
            outer = self.outer.bind(self.inner.output_shape(input_shape))
            same = inner is self.inner and outer is self.outer
            bound = self if same else Compose(outer, inner)
            if same:  # no cycle of references
                return self
            self._bound.shape, self._bound.operator = tuple(input_shape), bound
        return self._bound.operator

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Compose:
        return Compose(self.outer.to(device, dtype), self.inner.to(device, dtype))

    def diagonal(self, input_shape: Shape) -> Tensor | None:
        return self._product("diagonal", input_shape)

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        return self._product("spectrum", input_shape)

    def _product(self, name: str, input_shape: Shape) -> Tensor | None:
        inner = getattr(self.inner, name)(input_shape)
        if inner is None:
            return None
        outer = getattr(self.outer, name)(self.inner.output_shape(input_shape))
        return None if outer is None else outer * inner

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        shape = input_shape or self.input_shape
        middle = None if shape is None else self.inner.output_shape(shape)
        inner = self.inner.dense(shape)
        outer = self.outer.dense(middle)
        if inner is not None and outer is not None:
            return outer.to(inner) @ inner
        if shape is None or middle is None:
            return None
        if inner is not None:
            return self.outer(inner.T.reshape(-1, *middle)).flatten(1).T
        if outer is not None:
            return self.inner.bind(shape).adjoint(outer.reshape(-1, *middle)).flatten(1)
        return None

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor | None:
        inner = self.inner.gram_diagonal(input_shape, weight)
        if inner is None:
            return None
        return self.outer.gram_diagonal(self.inner.output_shape(input_shape), inner)

    def gram_spectrum(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        inner = self.inner.gram_spectrum(input_shape, power)
        if inner is None:
            return None
        return self.outer.gram_spectrum(self.inner.output_shape(input_shape), inner)

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        def inner(wanted: tuple[int, int]) -> Tensor | None:
            return self.inner.near_spectrum(input_shape, power, wanted)

        return self.outer.near_spectrum(self.inner.output_shape(input_shape), inner, grid)

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        inner = self.inner.near_transfer(input_shape, grid)
        middle = self.inner.output_shape(input_shape)
        if inner is None or (len(middle) > 2 and middle[0] != 1):
            return None
        outer = self.outer.near_transfer(middle, grid)
        return None if outer is None else outer * inner

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        before = self.inner.margin(input_shape, inner)
        return self.outer.margin(self.inner.output_shape(input_shape), before)


@final
class Sum(LinearOperator):
    """A + B + ...: terms with the same data shape.

    Args:
        terms: the operators.
    """

    def __init__(self, *terms: LinearOperator) -> None:
        if not terms:
            raise ValueError("Sum(): expected at least one operator.")
        self.terms = terms
        self._bound = _Bound()

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.terms)) + ")"

    @property
    def input_shape(self) -> Shape | None:
        return next((t.input_shape for t in self.terms if t.input_shape is not None), None)

    @property
    def batch(self) -> int | None:
        return common_batch(self.terms)

    def select(self, ids: Tensor) -> LinearOperator:
        terms = [term.select(ids) for term in self.terms]
        same = all(a is b for a, b in zip(terms, self.terms, strict=True))
        return self if same else Sum(*terms)

    @property
    def data_shape(self) -> Shape | None:
        return next((t.data_shape for t in self.terms if t.data_shape is not None), None)

    def output_shape(self, input_shape: Shape) -> Shape:
        return same_output(self.terms, input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return reduce(torch.add, (term(x) for term in self.terms))

    def adjoint(self, v: Tensor) -> Tensor:
        parts = [term.adjoint(v) for term in self.terms]
        if any(p.shape != parts[0].shape for p in parts):
            raise ValueError(
                f"{self!r}: the adjoints give images of shapes {[tuple(p.shape) for p in parts]}; "
                "bind(input_shape) first."
            )
        return reduce(torch.add, parts)

    def bind(self, input_shape: Shape) -> LinearOperator:
        self.output_shape(input_shape)
        if self._bound.operator is None or self._bound.shape != tuple(input_shape):
            terms = [term.bind(input_shape) for term in self.terms]
            if all(a is b for a, b in zip(terms, self.terms, strict=True)):
                return self
            self._bound.shape, self._bound.operator = tuple(input_shape), Sum(*terms)
        return self._bound.operator

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Sum:
        return Sum(*(term.to(device, dtype) for term in self.terms))

    def diagonal(self, input_shape: Shape) -> Tensor | None:
        return _sum([term.diagonal(input_shape) for term in self.terms])

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        return _sum([term.spectrum(input_shape) for term in self.terms])

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        return _sum([term.dense(input_shape or self.input_shape) for term in self.terms])


def common_batch(operators: Sequence[Operator]) -> int | None:
    """Entries of the batch, of operators that belong together."""
    return next((op.batch for op in operators if op.batch is not None), None)


def _sum(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    return reduce(torch.add, known) if len(known) == len(values) else None


@final
class Scaled(LinearOperator):
    """c A, for a number c.

    Args:
        factor: c.
        operator: A.
    """

    def __init__(self, factor: float, operator: LinearOperator) -> None:
        self.factor = as_factor(factor)
        self.operator = operator
        self._bound = _Bound()

    def __repr__(self) -> str:
        return f"{self.factor:g} * ({self.operator!r})"

    @property
    def input_shape(self) -> Shape | None:
        return self.operator.input_shape

    @property
    def batch(self) -> int | None:
        return self.operator.batch

    def select(self, ids: Tensor) -> LinearOperator:
        chosen = self.operator.select(ids)
        return self if chosen is self.operator else Scaled(self.factor, chosen)

    @property
    def data_shape(self) -> Shape | None:
        return self.operator.data_shape

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.operator.output_shape(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * self.operator(x)

    def adjoint(self, v: Tensor) -> Tensor:
        return self.factor * self.operator.adjoint(v)

    def bind(self, input_shape: Shape) -> LinearOperator:
        if self._bound.operator is None or self._bound.shape != tuple(input_shape):
            bound = self.operator.bind(input_shape)
            if bound is self.operator:
                return self
            self._bound.shape, self._bound.operator = tuple(input_shape), Scaled(self.factor, bound)
        return self._bound.operator

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Scaled:
        return Scaled(self.factor, self.operator.to(device, dtype))

    def diagonal(self, input_shape: Shape) -> Tensor | None:
        return self._times(self.operator.diagonal(input_shape), self.factor)

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        return self._times(self.operator.spectrum(input_shape), self.factor)

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        return self._times(self.operator.dense(input_shape), self.factor)

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor | None:
        return self._times(self.operator.gram_diagonal(input_shape, weight), self.factor**2)

    def gram_spectrum(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        return self._times(self.operator.gram_spectrum(input_shape, power), self.factor**2)

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        return self._times(self.operator.near_spectrum(input_shape, power, grid), self.factor**2)

    def near_gram(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        return self._times(self.operator.near_gram(input_shape, power), self.factor**2)

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        return self._times(self.operator.near_transfer(input_shape, grid), self.factor)

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        return self.operator.margin(input_shape, inner)

    @staticmethod
    def _times(value: Tensor | None, factor: float) -> Tensor | None:
        return None if value is None else factor * value


@final
class Stack(LinearOperator):
    """Joint data: the flattened data of each operator, one after the other, (sum of the sizes,).

    The adjoint has to know the shapes of the parts: from ``output_shapes``, or from ``bind``.

    Args:
        operators: linear, all of the same images.
        output_shapes: of the data of each; None where ``bind`` will tell.
    """

    def __init__(
        self, operators: Sequence[LinearOperator], output_shapes: Sequence[Shape] | None = None
    ) -> None:
        if not operators or not all(isinstance(op, LinearOperator) for op in operators):
            raise ValueError(
                f"Stack: got {list(operators)!r}; expected linear operators, at least one (stack() also "
                "takes nonlinear ones)."
            )
        if output_shapes is None:
            fixed = [(op, op.input_shape) for op in operators]
            if all(shape is not None for _, shape in fixed):
                output_shapes = [op.output_shape(shape) for op, shape in fixed if shape is not None]
        elif len(output_shapes) != len(operators):
            raise ValueError(
                f"Stack: {len(output_shapes)} output shapes for {len(operators)} operators."
            )
        self.operators = tuple(operators)
        self.output_shapes = None if output_shapes is None else tuple(map(tuple, output_shapes))
        self._bound = _Bound()

    def __repr__(self) -> str:
        return f"Stack({list(self.operators)!r})"

    @property
    def input_shape(self) -> Shape | None:
        return next((op.input_shape for op in self.operators if op.input_shape is not None), None)

    @property
    def batch(self) -> int | None:
        return common_batch(self.operators)

    def select(self, ids: Tensor) -> LinearOperator:
        chosen = [op.select(ids) for op in self.operators]
        same = all(a is b for a, b in zip(chosen, self.operators, strict=True))
        return self if same else Stack(chosen, self.output_shapes)

    @property
    def data_shape(self) -> Shape | None:
        shapes = self.output_shapes
        return super().data_shape if shapes is None else (sum(map(numel, shapes)),)

    def output_shape(self, input_shape: Shape) -> Shape:
        return (sum(numel(op.output_shape(input_shape)) for op in self.operators),)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([op(x).flatten(1) for op in self.operators], 1)

    def split(self, v: Tensor) -> list[Tensor]:
        """Joint data (B, m) as those of each operator.

        Raises:
            ValueError: the shapes of the parts are not known, or v is not of their joint size.
        """
        if self.output_shapes is None:
            raise ValueError(
                f"{self!r}: the shapes of its data are not known; bind(input_shape) first."
            )
        sizes = [numel(shape) for shape in self.output_shapes]
        if v.ndim != 2 or v.shape[1] != sum(sizes):
            raise ValueError(
                f"{self!r}: got joint data {tuple(v.shape)}; expected (B, {sum(sizes)})."
            )
        parts = v.split(sizes, 1)
        return [p.reshape(-1, *shape) for p, shape in zip(parts, self.output_shapes, strict=True)]

    def adjoint(self, v: Tensor) -> Tensor:
        parts = self.split(v)
        back = [op.adjoint(p) for op, p in zip(self.operators, parts, strict=True)]
        if any(b.shape != back[0].shape for b in back):
            raise ValueError(
                f"{self!r}: the adjoints give images of shapes {[tuple(b.shape) for b in back]}; "
                "bind(input_shape) first."
            )
        return reduce(torch.add, back)

    def bind(self, input_shape: Shape) -> LinearOperator:
        if self._bound.operator is None or self._bound.shape != tuple(input_shape):
            operators = [op.bind(input_shape) for op in self.operators]
            shapes = tuple(op.output_shape(input_shape) for op in self.operators)
            same = all(a is b for a, b in zip(operators, self.operators, strict=True))
            if same and shapes == self.output_shapes:
                return self
            self._bound.shape, self._bound.operator = tuple(input_shape), Stack(operators, shapes)
        return self._bound.operator

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Stack:
        return Stack([op.to(device, dtype) for op in self.operators], self.output_shapes)

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        shape = input_shape or self.input_shape
        parts = [op.dense(shape) for op in self.operators]
        known = [p for p in parts if p is not None]
        return torch.cat(known) if len(known) == len(parts) else None

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        """The channels of all parts, where they share a grid of pixels."""
        shapes = [op.output_shape(input_shape) for op in self.operators]
        if any(len(shape) not in (2, 3) or shape[-2:] != shapes[0][-2:] for shape in shapes):
            return None
        parts = []
        for op, shape in zip(self.operators, shapes, strict=True):
            part = op.near_transfer(input_shape, grid)
            if part is None:
                return None
            parts.append(part.to(torch.complex128).expand(numel(shape[:-2]), *grid))
        return torch.cat([part.to(parts[0].device) for part in parts])

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        margins = [op.margin(input_shape, inner) for op in self.operators]
        return max(m[0] for m in margins), max(m[1] for m in margins)


def scaled_by(operator: LinearOperator, factor: float | Tensor) -> LinearOperator:
    """A diag(factor), for a number or a tensor broadcastable to the image."""
    from diffpost.operators.elementary import Diagonal

    if not isinstance(factor, Tensor) or factor.numel() == 1:
        value = float(factor)
        return operator if value == 1.0 else Scaled(value, operator)
    return Compose(operator, Diagonal(factor))
