"""The two interfaces of the physics, Operator and LinearOperator.

An operator maps images (B, *shape) to noise-free data (B, *data), each entry of the batch on its
own. Near x it is linear, A(x + v) = A(x) + L v + O(v^2), and ``linearize(x)`` returns that L with
its adjoint, from ``torch.func`` unless a class knows better. The gradient of a likelihood needs
L^T; moment matching needs solves with Sigma + s L L^T, or Sigma + L C L^T with a covariance C of
images.

Those solves are cheap where L L^T is diagonal over pixels or over Fourier modes, so a linear
operator tells, where it can do so exactly, its own eigenvalues (``diagonal``, ``spectrum``), its
matrix (``dense``), and what it makes of a covariance that is diagonal over pixels
(``gram_diagonal``) or over Fourier modes (``gram_spectrum``). None means "not of this structure".
Fourier modes are those of FFT2 over the last two axes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Self, final, overload

import torch
from torch import Tensor

__all__ = ["LinearOperator", "Linearized", "Operator", "Shape"]

Shape = tuple[int, ...]
PowerSpectrum = Callable[[tuple[int, int]], Tensor | None]
"""Spectral density on a periodic grid (h, w): real, broadcastable to (B, ..., h, w)."""


class Operator(ABC):
    """A map of images (B, *shape) to data (B, *data), entry by entry."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A(x): (B, *shape) to (B, *data), in the dtype and on the device of x.

        Raises:
            ValueError: the operator does not take images of this shape.
        """

    @abstractmethod
    def output_shape(self, input_shape: Shape) -> Shape:
        """Shape of the data of one image, both without the batch axis.

        Raises:
            ValueError: the operator does not take images of this shape.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def input_shape(self) -> Shape | None:
        """Shape of one image where the operator fixes it, otherwise None."""
        return None

    @property
    def data_shape(self) -> Shape | None:
        """Shape of the data of one image where the operator fixes it, otherwise None."""
        return None if self.input_shape is None else self.output_shape(self.input_shape)

    @property
    def batch(self) -> int | None:
        """Entries that the batch must have, where each has an operator of its own; otherwise None."""
        return None

    def select(self, ids: Tensor) -> Operator:
        """The operators of entries ids, in this order; itself where all entries have the same one."""
        return self

    def linearize(self, x: Tensor) -> LinearOperator:
        """The derivative at x, entry b at x[b]: (B, *shape) to (B, *data)."""
        return Linearized(self, x)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A copy whose own tensors are there; for speed only, since data follow the input anyway."""
        return self

    def __matmul__(self, other: Operator) -> Operator:
        from diffpost.operators.nonlinear import compose

        return compose(self, other) if isinstance(other, Operator) else NotImplemented

    def __add__(self, other: Operator) -> Operator:
        from diffpost.operators.nonlinear import add

        return add(self, other) if isinstance(other, Operator) else NotImplemented

    def __mul__(self, factor: float) -> Operator:
        from diffpost.operators.nonlinear import scale

        return scale(self, factor)

    def __rmul__(self, factor: float) -> Operator:
        return self * factor

    def __neg__(self) -> Operator:
        return self * -1.0

    def __sub__(self, other: Operator) -> Operator:
        return self + (-other) if isinstance(other, Operator) else NotImplemented


class LinearOperator(Operator):
    """An operator with A(a x + b y) = a A(x) + b A(y), and its adjoint."""

    @abstractmethod
    def adjoint(self, v: Tensor) -> Tensor:
        """A^T v: (B, *data) to (B, *shape).

        Raises:
            ValueError: v is not of the shape of the data, or the shape of the images is not known
                (``bind`` tells it).
        """

    def select(self, ids: Tensor) -> LinearOperator:
        return self

    def bind(self, input_shape: Shape) -> LinearOperator:
        """The same operator for images of this shape: what the adjoint then returns.

        Operators whose adjoint knows its shape return themselves.

        Raises:
            ValueError: the operator does not take images of this shape.
        """
        self.output_shape(input_shape)
        return self

    def linearize(self, x: Tensor) -> LinearOperator:
        """Itself, bound to the shape of x."""
        return self.bind(tuple(x.shape[1:]))

    def diagonal(self, input_shape: Shape) -> Tensor | None:
        """d with A x = d x, broadcastable to input_shape, or None."""
        return None

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        """h with A x = ifft2(h fft2(x)), broadcastable to input_shape, or None."""
        return None

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        """The matrix (m, n) over flattened data and image where it is at hand, otherwise None."""
        return None

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor | None:
        """g with A diag(weight) A^T = diag(g), or None.

        Args:
            input_shape: of one image.
            weight: broadcastable to (B, *input_shape); None is 1.

        Returns:
            Broadcastable to the data (B, *data).
        """
        d = self.diagonal(input_shape)
        return None if d is None else _times(d.square(), weight)

    def gram_spectrum(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        """Eigenvalues of A P A^T under the FFT2 of the data, where they exist, otherwise None.

        Args:
            input_shape: of one image.
            power: eigenvalues of P under the FFT2 of the image, real, nonnegative, broadcastable to
                (B, *input_shape); None is 1.

        Returns:
            Real and nonnegative, broadcastable to the data (B, *data).
        """
        h = self.spectrum(input_shape)
        return None if h is None else _times(h.abs().square(), power)

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        """Spectrum of A P A^T away from edges, where it is near stationary, to precondition solves.

        Args:
            input_shape: of one image.
            power: spectrum of P on any grid (see :func:`on_grid`).
            grid: periodic grid that holds the data, at least as large as they are.

        Returns:
            Real and nonnegative, broadcastable to (B, *data) with the grid for the last two axes,
            or None.
        """
        return None

    def near_gram(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        """The diagonal of A P A^T where that is a good stand-in for it, to precondition solves, or None.

        Args:
            input_shape: of one image.
            power: eigenvalues of P under the FFT2 of the image, broadcastable to (B, *input_shape); None is 1.

        Returns:
            Not negative, broadcastable to the data (B, *data).
        """
        return None

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        """h with A x = h x in Fourier space away from edges, for images of one channel and any
        number of data.

        Exact on the data's own grid if ``margin`` is zero. Broadcastable to (K, *grid), or None.
        """
        return None

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Pixels by which that grid should exceed the data, lest opposite edges see each other.

        Args:
            input_shape: of one image.
            inner: the margin of what comes before this operator.
        """
        return inner

    def dot_test(
        self,
        input_shape: Shape,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> float:
        """|<A x, v> - <x, A^T v>| / (|A x| |v|) for random x and v: rounding error if the adjoint
        is right.

        Args:
            input_shape: of one image.
            seed: of x and v.
            dtype: of x and v.
        """
        linear = self.bind(input_shape)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch or 2, *input_shape, generator=generator, dtype=dtype)
        ax = linear(x)
        v = torch.randn(ax.shape, generator=generator, dtype=dtype)
        atv = linear.adjoint(v)
        if atv.shape != x.shape:
            raise ValueError(
                f"{self!r}: the adjoint gave {tuple(atv.shape)} for images {tuple(x.shape)}."
            )
        gap = (ax.double() * v).sum() - (x.double() * atv).sum()
        size = ax.double().norm() * v.double().norm()
        return float(gap.abs() / size.clamp_min(torch.finfo(dtype).tiny))

    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...

    @overload
    def __matmul__(self, other: Operator) -> Operator: ...

    def __matmul__(self, other: Operator) -> Operator:
        return super().__matmul__(other)

    @overload
    def __add__(self, other: LinearOperator) -> LinearOperator: ...

    @overload
    def __add__(self, other: Operator) -> Operator: ...

    def __add__(self, other: Operator) -> Operator:
        return super().__add__(other)

    @overload
    def __sub__(self, other: LinearOperator) -> LinearOperator: ...

    @overload
    def __sub__(self, other: Operator) -> Operator: ...

    def __sub__(self, other: Operator) -> Operator:
        return super().__sub__(other)

    def __mul__(self, factor: float) -> LinearOperator:
        from diffpost.operators.algebra import Scaled

        return Scaled(factor, self)

    def __rmul__(self, factor: float) -> LinearOperator:
        return self * factor

    def __neg__(self) -> LinearOperator:
        return self * -1.0


@final
class Linearized(LinearOperator):
    """The derivative of an operator at x, by ``torch.func``: entry b of its input meets entry b of
    x.

    The forward product is one forward-mode pass; the adjoint keeps the graph of one evaluation, and
    each product walks it backwards.

    Args:
        operator: any operator.
        x: (B, *shape), where.
    """

    def __init__(self, operator: Operator, x: Tensor) -> None:
        self.operator = operator
        self.x = x.detach()
        self._pullback: Callable[[Tensor], tuple[Tensor, ...]] | None = None
        self._output: Shape = ()

    def __repr__(self) -> str:
        return f"{self.operator!r}.linearize(x {tuple(self.x.shape)})"

    @property
    def input_shape(self) -> Shape:
        return tuple(self.x.shape[1:])

    @property
    def batch(self) -> int:
        return len(self.x)

    def select(self, ids: Tensor) -> Linearized:
        return Linearized(self.operator.select(ids), self.x[ids.to(self.x.device)])

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self.input_shape:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}; expected {self.input_shape}."
            )
        return self.operator.output_shape(self.input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.x.shape:
            raise ValueError(
                f"{self!r}: got {tuple(x.shape)}; expected {tuple(self.x.shape)}, one entry for each "
                "entry of the batch at which it was linearised."
            )
        product: Tensor = torch.func.jvp(self.operator, (self.x.to(x),), (x,))[1]
        return product

    def adjoint(self, v: Tensor) -> Tensor:
        if self._pullback is None:
            output, self._pullback, *_ = torch.func.vjp(self.operator, self.x)
            self._output = tuple(output.shape)
        if tuple(v.shape) != self._output:
            raise ValueError(f"{self!r}: adjoint got {tuple(v.shape)}; expected {self._output}.")
        return self._pullback(v.to(self.x))[0].to(v)


@final
class Memo:
    """A few derived tensors, kept by key, the least recently used dropped first."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self._kept: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __call__(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        # what is kept must outlive the transform or the inference mode it was first needed in
        with torch.inference_mode(False):
            value = make()
        if value.requires_grad:  # a graph is used once
            return value
        value = torch.func.debug_unwrap(value)
        self._kept[key] = value
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return value

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo(self.size)

    def __len__(self) -> int:
        return len(self._kept)


@final
class Parameter:
    """A tensor of an operator, handed out in the dtype and on the device of the data."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._casts = Memo(4)

    def like(self, x: Tensor) -> Tensor:
        if self.value.dtype == x.dtype and self.value.device == x.device:
            return self.value
        return self._casts((x.dtype, x.device), lambda: self.value.to(x.device, x.dtype))


def on_grid(power: Tensor | None) -> PowerSpectrum:
    """A spectrum on the FFT2 of one grid as one on any, linear in frequency between its modes."""

    def resampled(grid: tuple[int, int]) -> Tensor:
        if power is None:
            return torch.ones((), dtype=torch.float64)
        values = power
        for axis, n in ((-2, grid[0]), (-1, grid[1])):
            size = values.shape[axis] if values.ndim >= -axis else 1
            if size in (1, n):
                continue
            place = torch.fft.fftfreq(n, dtype=torch.float64, device=values.device) * size
            low = place.floor()
            shape = (-1, 1) if axis == -2 else (-1,)
            weight = (place - low).reshape(shape).to(values.dtype)
            below = values.index_select(axis, low.long() % size)
            above = values.index_select(axis, (low.long() + 1) % size)
            values = (1 - weight) * below + weight * above
        return values

    return resampled


def as_double(value: Any) -> Tensor:
    """A number or tensor in float64; a Python float keeps all its digits."""
    if isinstance(value, Tensor):
        if value.is_complex():
            raise ValueError("got complex values; expected real ones.")
        return value.double()
    return torch.as_tensor(value, dtype=torch.float64)


def as_real(value: Any, name: str) -> Tensor:
    """A finite real floating tensor from what a user gave."""
    tensor = torch.as_tensor(value)
    if tensor.is_complex():
        raise ValueError(f"{name}: got complex values; expected real ones.")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype())
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: got NaN or infinite values; replace them first.")
    return tensor


def check_broadcast(value: Tensor, shape: Shape, name: str) -> None:
    """Raises unless value broadcasts to exactly this shape."""
    try:
        good = torch.broadcast_shapes(value.shape, shape) == tuple(shape)
    except RuntimeError:
        good = False
    if not good:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} got images of shape {tuple(shape)}; the first must "
            "broadcast to the second."
        )


def expand(weight: Tensor | None, shape: Shape) -> Tensor:
    """Weight broadcast to (..., *shape), keeping a batch axis that it has; 1 if None."""
    if weight is None:
        return torch.ones(shape, dtype=torch.float64)
    return weight.expand(torch.broadcast_shapes(weight.shape, shape))


def numel(shape: Shape) -> int:
    return math.prod(shape)


def _times(values: Tensor, weight: Tensor | None) -> Tensor:
    return values if weight is None else values * weight.to(values.device)
