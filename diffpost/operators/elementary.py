"""Operators that act pixel by pixel, block by block, by a matrix, or by a change of basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import (
    LinearOperator,
    Memo,
    Parameter,
    PowerSpectrum,
    Shape,
    as_real,
    check_broadcast,
    expand,
    numel,
)

__all__ = ["Crop", "Diagonal", "Fourier", "Identity", "Mask", "Matrix", "PixelBin"]


@final
class Identity(LinearOperator):
    """A x = x."""

    def __repr__(self) -> str:
        return "Identity()"

    def output_shape(self, input_shape: Shape) -> Shape:
        return tuple(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, v: Tensor) -> Tensor:
        return v

    def diagonal(self, input_shape: Shape) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        return torch.ones((), dtype=torch.float64) if len(input_shape) >= 2 else None

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        return power(grid)

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        return self.spectrum(input_shape)


@final
class Diagonal(LinearOperator):
    """A x = d x, pixel by pixel.

    Args:
        d: real and finite, broadcastable to the image.
    """

    def __init__(self, d: Tensor) -> None:
        self.d = as_real(d, "Diagonal(d)")
        self._d = Parameter(self.d)
        # a factor that is the same over the last two axes is diagonal under their FFT as well
        flat = self.d.ndim < 2 or self.d.shape[-2:].numel() == 1
        self._uniform = self.d.ndim == 0 or (self.d.ndim >= 2 and flat)

    def __repr__(self) -> str:
        return f"Diagonal({tuple(self.d.shape)})"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Diagonal:
        return Diagonal(self.d.to(device=device, dtype=dtype))

    def output_shape(self, input_shape: Shape) -> Shape:
        check_broadcast(self.d, tuple(input_shape), "Diagonal d")
        return tuple(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return self._d.like(x) * x

    def adjoint(self, v: Tensor) -> Tensor:
        return self(v)

    def diagonal(self, input_shape: Shape) -> Tensor:
        self.output_shape(input_shape)
        return self.d.double()

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        d = self.diagonal(input_shape)
        return d if self._uniform and len(input_shape) >= 2 else None

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        return _mean_square(self.diagonal(input_shape), input_shape, power(grid))

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        return self.spectrum(input_shape)


_NEARLY_WHOLE = 0.95  # share of the pixels that a mask keeps for its data to be nearly stationary


@final
class Mask(LinearOperator):
    """A x = m x: pixels outside the mask are seen as zero. The data keep the image's shape.

    Pixels that were not observed belong into the noise, with infinite variance; a mask is for light
    that does not arrive.

    Args:
        m: boolean, or weights, broadcastable to the image.
    """

    def __init__(self, m: Tensor) -> None:
        tensor = torch.as_tensor(m)
        self.m = as_real(
            tensor.to(torch.get_default_dtype()) if tensor.dtype == torch.bool else m, "Mask(m)"
        )
        self._m = Parameter(self.m)

    def __repr__(self) -> str:
        return f"Mask({tuple(self.m.shape)})"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Mask:
        return Mask(self.m.to(device=device, dtype=dtype))

    def output_shape(self, input_shape: Shape) -> Shape:
        check_broadcast(self.m, tuple(input_shape), "Mask m")
        return tuple(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return self._m.like(x) * x

    def adjoint(self, v: Tensor) -> Tensor:
        return self(v)

    def diagonal(self, input_shape: Shape) -> Tensor:
        self.output_shape(input_shape)
        return self.m.double()

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        # Through many holes a stationary field is far from stationary, and the circulant of its mean
        # preconditions worse than nothing where its power spans decades.
        kept = self.diagonal(input_shape)
        if float(kept.mean()) < _NEARLY_WHOLE:
            return None
        return _mean_square(kept, input_shape, power(grid))


def _mean_square(d: Tensor, input_shape: Shape, power: Tensor | None) -> Tensor | None:
    """The circulant nearest to diag(d) P diag(d): its mean square times P."""
    if len(input_shape) < 2 or power is None:
        return None
    return d.expand(input_shape).square().mean((-2, -1), keepdim=True) * power.to(d.device)


@final
class Matrix(LinearOperator):
    """A x for a matrix over the flattened image; data (m,).

    Args:
        matrix: (m, n), real and finite.
        input_shape: shape of the image, n numbers, that the adjoint returns; None is (n,).
            ``bind``, ``linearize`` and so every likelihood set it from the images that they meet.

    Raises:
        ValueError: not a matrix, or an input_shape that has not n numbers.
    """

    def __init__(self, matrix: Tensor, input_shape: Sequence[int] | None = None) -> None:
        self.matrix = as_real(matrix, "Matrix(A)")
        if self.matrix.ndim != 2:
            raise ValueError(f"Matrix: got shape {tuple(self.matrix.shape)}; expected (m, n).")
        self._known = None if input_shape is None else tuple(input_shape)
        self._shape = self._known or (self.matrix.shape[1],)
        self._matrix = Parameter(self.matrix)
        self._bound: Matrix | None = None
        self.output_shape(self._shape)

    def __repr__(self) -> str:
        return f"Matrix({tuple(self.matrix.shape)})"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Matrix:
        return Matrix(self.matrix.to(device=device, dtype=dtype), self._known)

    @property
    def input_shape(self) -> Shape | None:
        return self._known

    @property
    def data_shape(self) -> Shape:
        return (self.matrix.shape[0],)

    def output_shape(self, input_shape: Shape) -> Shape:
        m, n = self.matrix.shape
        if numel(input_shape) != n:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}, {numel(input_shape)} numbers; "
                f"expected {n}, one for each column."
            )
        return (m,)

    def bind(self, input_shape: Shape) -> Matrix:
        shape = tuple(input_shape)
        if shape == self._known:
            return self
        if self._bound is None or self._bound.input_shape != shape:
            self._bound = Matrix(self.matrix, shape)
        return self._bound

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return x.flatten(1) @ self._matrix.like(x).T

    def adjoint(self, v: Tensor) -> Tensor:
        m = self.matrix.shape[0]
        if v.ndim != 2 or v.shape[1] != m:
            raise ValueError(f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, {m}).")
        return (v @ self._matrix.like(v)).reshape(-1, *self._shape)

    def dense(self, input_shape: Shape | None = None) -> Tensor:
        return self.matrix


@final
class PixelBin(LinearOperator):
    """Sum over k x k blocks of the last two axes: (..., H, W) to (..., H/k, W/k). Flux is
    conserved.

    Args:
        k: block size, at least 1.

    Raises:
        ValueError: k not a positive integer; on use, a side that k does not divide.
    """

    def __init__(self, k: int) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"PixelBin({k!r}): expected an integer of at least 1.")
        self.k = k
        self._memo = Memo(4)

    def __repr__(self) -> str:
        return f"PixelBin({self.k})"

    def output_shape(self, input_shape: Shape) -> Shape:
        shape = tuple(input_shape)
        if len(shape) < 2 or shape[-2] % self.k or shape[-1] % self.k:
            raise ValueError(
                f"{self!r}: got images of shape {shape}; expected (..., H, W) with sides divisible by {self.k}."
            )
        return (*shape[:-2], shape[-2] // self.k, shape[-1] // self.k)

    def __call__(self, x: Tensor) -> Tensor:
        *_, height, width = self.output_shape(tuple(x.shape[1:]))
        return x.reshape(*x.shape[:-2], height, self.k, width, self.k).sum((-3, -1))

    def adjoint(self, v: Tensor) -> Tensor:
        if v.ndim < 3:
            raise ValueError(f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, ..., h, w).")
        *front, height, width = v.shape
        spread = v[..., :, None, :, None].expand(*front, height, self.k, width, self.k)
        return spread.reshape(*front, height * self.k, width * self.k)

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        return (
            torch.ones((), dtype=torch.float64) if self.k == 1 and len(input_shape) >= 2 else None
        )

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor:
        self.output_shape(input_shape)
        if weight is None or weight.ndim == 0:
            full = torch.full((), float(self.k**2), dtype=torch.float64)
            return full if weight is None else full * weight
        full = expand(weight, tuple(input_shape))
        return self(full.reshape(-1, *input_shape)).reshape(
            *full.shape[: full.ndim - len(input_shape)], *self.output_shape(input_shape)
        )

    def gram_spectrum(self, input_shape: Shape, power: Tensor | None = None) -> Tensor:
        self.output_shape(input_shape)
        if power is None or power.ndim < 2:
            full = torch.full((), float(self.k**2), dtype=torch.float64)
            return full if power is None else full * power
        return self._fold(power.expand(*power.shape[:-2], *input_shape[-2:]))

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        finer = (grid[0] * self.k, grid[1] * self.k)
        before = power(finer)
        if before is None:
            return None
        front = before.shape[:-2] if before.ndim >= 2 else ()
        return self._fold(before.expand(*front, *finer))

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        return -(-inner[0] // self.k), -(-inner[1] // self.k)

    def _fold(self, power: Tensor) -> Tensor:
        """Summing blocks is a convolution with a box and then every k-th pixel: spectra fold."""
        height, width = power.shape[-2] // self.k, power.shape[-1] // self.k
        seen = power * self._box((power.shape[-2], power.shape[-1])).to(power.device)
        blocks = seen.unflatten(-2, (self.k, height)).unflatten(-1, (self.k, width))
        return blocks.sum((-4, -2)) / self.k**2

    def _box(self, size: Shape) -> Tensor:
        """|FFT2 of the k x k box|^2."""

        def make() -> Tensor:
            box = torch.zeros(size, dtype=torch.float64)
            box[: self.k, : self.k] = 1
            return torch.fft.fft2(box).abs().square()

        return self._memo(size, make)


@final
class Crop(LinearOperator):
    """A window of the last two axes: x[..., top : top + height, left : left + width].

    Args:
        top, left: first row and column.
        height, width: size of the window.
        input_shape: of the image, for the adjoint; None where ``bind`` or ``linearize`` will tell.

    Raises:
        ValueError: a negative corner or an empty window; on use, an image that does not hold it.
    """

    def __init__(
        self, top: int, left: int, height: int, width: int, input_shape: Sequence[int] | None = None
    ) -> None:
        if min(top, left) < 0 or min(height, width) < 1:
            raise ValueError(
                f"Crop({top}, {left}, {height}, {width}): expected a corner (top, left) of at least 0 and a "
                "size (height, width) of at least 1."
            )
        self.top, self.left, self.height, self.width = top, left, height, width
        self._shape = None if input_shape is None else tuple(input_shape)
        self._bound: Crop | None = None
        if self._shape is not None:
            self.output_shape(self._shape)

    def __repr__(self) -> str:
        return f"Crop({self.top}, {self.left}, {self.height}, {self.width})"

    @property
    def input_shape(self) -> Shape | None:
        return self._shape

    def output_shape(self, input_shape: Shape) -> Shape:
        shape = tuple(input_shape)
        if self._shape is not None and shape != self._shape:
            raise ValueError(f"{self!r}: got images of shape {shape}; expected {self._shape}.")
        if (
            len(shape) < 2
            or self.top + self.height > shape[-2]
            or self.left + self.width > shape[-1]
        ):
            raise ValueError(
                f"{self!r}: got images of shape {shape}; expected (..., H, W) with H of at least "
                f"{self.top + self.height} and W of at least {self.left + self.width}."
            )
        return (*shape[:-2], self.height, self.width)

    def bind(self, input_shape: Shape) -> Crop:
        shape = tuple(input_shape)
        if shape == self._shape:
            return self
        if self._bound is None or self._bound.input_shape != shape:
            self._bound = Crop(self.top, self.left, self.height, self.width, shape)
        return self._bound

    def _window(self, x: Tensor) -> Tensor:
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return self._window(x)

    def adjoint(self, v: Tensor) -> Tensor:
        if self._shape is None:
            raise ValueError(
                f"{self!r}: the size of the image is not known; bind(input_shape) first."
            )
        expected = self.output_shape(self._shape)
        if tuple(v.shape[1:]) != expected:
            raise ValueError(f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, *{expected}).")
        right = self._shape[-1] - self.left - self.width
        below = self._shape[-2] - self.top - self.height
        return torch.nn.functional.pad(v, (self.left, right, self.top, below))

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor:
        self.output_shape(input_shape)
        if weight is None or weight.ndim == 0:
            return torch.ones((), dtype=torch.float64) if weight is None else weight
        return self._window(expand(weight, tuple(input_shape)))

    def gram_spectrum(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        self.output_shape(input_shape)
        if power is None or power.ndim < 2 or power.shape[-2:].numel() == 1:
            return torch.ones((), dtype=torch.float64) if power is None else power
        return power if tuple(input_shape[-2:]) == (self.height, self.width) else None

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        return power(grid)

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        """The shift by its corner, which matters beside other data of the image."""
        rows = torch.fft.fftfreq(grid[0], dtype=torch.float64)[:, None] * self.top
        columns = torch.fft.fftfreq(grid[1], dtype=torch.float64)[None, :] * self.left
        return torch.exp(2j * torch.pi * (rows + columns))

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        # the grid of the whole image: it may be periodic, and other data may show another window
        return inner[0] + input_shape[-2] - self.height, inner[1] + input_shape[-1] - self.width


@final
class Fourier(LinearOperator):
    """Orthonormal FFT2 of the last two axes as real numbers: (..., H, W) to (..., H, W, 2).

    F[k] = (H W)^(-1/2) sum_j x[j] exp(-2 pi i k j / n); the last axis is real and imaginary part.
    The image is real, so F[-k] = F[k]* and half of the data repeat the other half.
    """

    def __repr__(self) -> str:
        return "Fourier()"

    def output_shape(self, input_shape: Shape) -> Shape:
        if len(input_shape) < 2:
            raise ValueError(
                f"Fourier(): got images of shape {tuple(input_shape)}; expected (..., H, W)."
            )
        return (*input_shape, 2)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return torch.view_as_real(torch.fft.fft2(x, norm="ortho"))

    def adjoint(self, v: Tensor) -> Tensor:
        if v.ndim < 4 or v.shape[-1] != 2:
            raise ValueError(
                f"Fourier(): adjoint got {tuple(v.shape)}; expected (B, ..., H, W, 2)."
            )
        # not view_as_complex: the v of joint data may start at an odd place in memory
        return torch.fft.ifft2(torch.complex(v[..., 0], v[..., 1]), norm="ortho").real
