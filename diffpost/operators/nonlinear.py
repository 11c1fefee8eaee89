"""Sums, products and stacks with a nonlinear part, which linearise by the chain rule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Self, final

import torch
from torch import Tensor

from diffpost.operators.algebra import (
    Compose,
    Scaled,
    Stack,
    Sum,
    as_factor,
    common_batch,
    same_output,
    scaled_by,
)
from diffpost.operators.base import LinearOperator, Operator, Parameter, Shape, as_double, numel

__all__ = ["Affine", "NonlinearCompose", "NonlinearScaled", "NonlinearStack", "NonlinearSum"]


@final
class NonlinearCompose(Operator):
    """A(B(x)), at least one of them nonlinear."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner

    def __repr__(self) -> str:
        return f"{self.outer!r} @ {self.inner!r}"

    @property
    def input_shape(self) -> Shape | None:
        return self.inner.input_shape

    @property
    def data_shape(self) -> Shape | None:
        middle = self.inner.data_shape
        return self.outer.data_shape or (
            None if middle is None else self.outer.output_shape(middle)
        )

    @property
    def batch(self) -> int | None:
        return common_batch([self.outer, self.inner])

    def select(self, ids: Tensor) -> Operator:
        return NonlinearCompose(self.outer.select(ids), self.inner.select(ids))

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.outer.output_shape(self.inner.output_shape(input_shape))

    def __call__(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def linearize(self, x: Tensor) -> LinearOperator:
        return Compose(self.outer.linearize(self.inner(x)), self.inner.linearize(x))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return type(self)(self.outer.to(device, dtype), self.inner.to(device, dtype))


@final
class NonlinearSum(Operator):
    """A(x) + B(x) + ..., at least one of them nonlinear."""

    def __init__(self, *terms: Operator) -> None:
        self.terms = terms

    def __repr__(self) -> str:
        return "(" + " + ".join(map(repr, self.terms)) + ")"

    @property
    def input_shape(self) -> Shape | None:
        return next((t.input_shape for t in self.terms if t.input_shape is not None), None)

    @property
    def data_shape(self) -> Shape | None:
        return next((t.data_shape for t in self.terms if t.data_shape is not None), None)

    @property
    def batch(self) -> int | None:
        return common_batch(self.terms)

    def select(self, ids: Tensor) -> Operator:
        return NonlinearSum(*(term.select(ids) for term in self.terms))

    def output_shape(self, input_shape: Shape) -> Shape:
        return same_output(self.terms, input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return reduce(torch.add, (term(x) for term in self.terms))

    def linearize(self, x: Tensor) -> LinearOperator:
        return Sum(*(term.linearize(x) for term in self.terms))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return type(self)(*(term.to(device, dtype) for term in self.terms))


@final
class NonlinearScaled(Operator):
    """c A(x), A nonlinear."""

    def __init__(self, factor: float, operator: Operator) -> None:
        self.factor = as_factor(factor)
        self.operator = operator

    def __repr__(self) -> str:
        return f"{self.factor:g} * ({self.operator!r})"

    @property
    def input_shape(self) -> Shape | None:
        return self.operator.input_shape

    @property
    def data_shape(self) -> Shape | None:
        return self.operator.data_shape

    @property
    def batch(self) -> int | None:
        return self.operator.batch

    def select(self, ids: Tensor) -> Operator:
        return NonlinearScaled(self.factor, self.operator.select(ids))

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.operator.output_shape(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return self.factor * self.operator(x)

    def linearize(self, x: Tensor) -> LinearOperator:
        return Scaled(self.factor, self.operator.linearize(x))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return type(self)(self.factor, self.operator.to(device, dtype))


@final
class NonlinearStack(Operator):
    """The flattened data of several operators, at least one of them nonlinear."""

    def __init__(
        self, operators: Sequence[Operator], output_shapes: Sequence[Shape] | None = None
    ) -> None:
        if not operators:
            raise ValueError("NonlinearStack: expected at least one operator.")
        self.operators = tuple(operators)
        self.output_shapes = None if output_shapes is None else tuple(map(tuple, output_shapes))

    def __repr__(self) -> str:
        return f"NonlinearStack({list(self.operators)!r})"

    @property
    def input_shape(self) -> Shape | None:
        return next((op.input_shape for op in self.operators if op.input_shape is not None), None)

    @property
    def data_shape(self) -> Shape | None:
        shapes = self.output_shapes
        return super().data_shape if shapes is None else (sum(map(numel, shapes)),)

    @property
    def batch(self) -> int | None:
        return common_batch(self.operators)

    def select(self, ids: Tensor) -> Operator:
        return NonlinearStack([op.select(ids) for op in self.operators], self.output_shapes)

    def output_shape(self, input_shape: Shape) -> Shape:
        return (sum(numel(op.output_shape(input_shape)) for op in self.operators),)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([op(x).flatten(1) for op in self.operators], 1)

    def linearize(self, x: Tensor) -> LinearOperator:
        shape = tuple(x.shape[1:])
        return Stack(
            [op.linearize(x) for op in self.operators],
            [op.output_shape(shape) for op in self.operators],
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return type(self)([op.to(device, dtype) for op in self.operators], self.output_shapes)


@final
class Affine(Operator):
    """A(scale x + offset): an operator of physical images as one of images in the units of a prior.

    Args:
        operator: A, linear or not.
        scale: number, or tensor broadcastable to the image.
        offset: likewise.
    """

    def __init__(self, operator: Operator, scale: float | Tensor, offset: float | Tensor) -> None:
        self.operator = operator
        self.scale, self.offset = scale, offset
        self._scale = Parameter(as_double(scale))
        self._offset = Parameter(as_double(offset))
        # made once: solvers are remembered by operator
        self._linear: LinearOperator | None = None
        if isinstance(operator, LinearOperator):
            self._linear = scaled_by(operator, scale)

    def __repr__(self) -> str:
        return f"Affine({self.operator!r})"

    @property
    def input_shape(self) -> Shape | None:
        return self.operator.input_shape

    @property
    def data_shape(self) -> Shape | None:
        return self.operator.data_shape

    @property
    def batch(self) -> int | None:
        return self.operator.batch

    def select(self, ids: Tensor) -> Operator:
        chosen = self.operator.select(ids)
        return self if chosen is self.operator else Affine(chosen, self.scale, self.offset)

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.operator.output_shape(input_shape)

    def _map(self, x: Tensor) -> Tensor:
        return self._scale.like(x) * x + self._offset.like(x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(self._map(x))

    def linearize(self, x: Tensor) -> LinearOperator:
        if self._linear is not None:
            return self._linear.linearize(x)
        return scaled_by(self.operator.linearize(self._map(x)), self.scale)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        return type(self)(self.operator.to(device, dtype), self.scale, self.offset)


def compose(outer: Operator, inner: Operator) -> Operator:
    if isinstance(outer, LinearOperator) and isinstance(inner, LinearOperator):
        return Compose(outer, inner)
    return NonlinearCompose(outer, inner)


def add(left: Operator, right: Operator) -> Operator:
    if isinstance(left, LinearOperator) and isinstance(right, LinearOperator):
        return Sum(left, right)
    return NonlinearSum(left, right)


def scale(operator: Operator, factor: float) -> Operator:
    if isinstance(operator, LinearOperator):
        return Scaled(factor, operator)
    return NonlinearScaled(factor, operator)


def stack(operators: Sequence[Operator]) -> Operator:
    """The flattened data of several operators, one after the other: linear if they all are."""
    if all(isinstance(op, LinearOperator) for op in operators):
        return Stack([op for op in operators if isinstance(op, LinearOperator)])
    return NonlinearStack(operators)
