"""Direct solves with Sigma + s A A^T, and approximate ones that precondition.

With the whitening W of the noise, (Sigma + s A A^T)^-1 = W^T (I + s W A A^T W^T)^-1 W, and the
matrix in the middle is diagonal

* over pixels, where the gram A A^T is (masks, scalings, block sums, crops) and the noise is
  independent;
* over Fourier modes, where A A^T (periodic convolutions, and block sums of them) and Sigma (white,
  or with a power spectrum) are stationary;
* in blocks over Fourier modes, where several such data show one image of one channel (several PSFs,
  or joint data on the same pixels): I + s a a^H in each mode;
* over the left singular vectors of W A, where A is a matrix: one decomposition serves every s.

Elsewhere, the data are nearly a window of a stationary field, and that field's inverse, windowed,
preconditions conjugate gradients (:class:`Embedded`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from diffpost.noise import Noise
from diffpost.operators.algebra import Stack
from diffpost.operators.base import LinearOperator, Parameter, Shape, numel, on_grid

__all__ = [
    "WhitenedSolve",
    "counts_effective_data",
    "effective_data",
    "near_solve",
    "structured_solve",
]

_LARGEST_MATRIX = 1 << 26  # entries of a matrix that is worth decomposing
_LARGEST_SIDE = 4096


class WhitenedSolve(ABC):
    """u -> (I + s W A A^T W^T)^-1 u, exactly or nearly."""

    @abstractmethod
    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        """For u (B, *data) and s () or (B,), not negative."""


@final
class Elementwise(WhitenedSolve):
    """W A A^T W^T = diag(ratio), ratio broadcastable to (B, *data)."""

    def __init__(self, ratio: Tensor) -> None:
        self._ratio = Parameter(ratio)

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        return u / (1 + _wide(s, u) * self._ratio.like(u))


@final
class Spectral(WhitenedSolve):
    """W A A^T W^T = F^-1 diag(ratio) F, F the FFT2 of the data, ratio broadcastable to (B, *data)."""

    def __init__(self, ratio: Tensor) -> None:
        self._half = Parameter(half(ratio))

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        divisor = 1 + _wide(s, u) * self._half.like(u)
        return torch.fft.irfft2(torch.fft.rfft2(u) / divisor, s=u.shape[-2:])


@final
class Embedded(WhitenedSolve):
    """Nearly: the data as a window of a periodic field, with noise of one variance.

    If all data had noise of variance v and lay on a periodic grid on which A A^T is diag(g) in
    Fourier space, the inverse in the data's own units would be F^-1 1/(v + s g) F. Its window, with
    the whitening undone on both sides, u -> S window(F^-1 1/(1 + s g/v) F pad(S u)) with S =
    diag(std/sqrt(v)), differs from the inverse by the edge and by the noise's scatter about v, both
    bounded however strong the signal is. Masked data have S = 0.

    Args:
        ratio: g/v, broadcastable to (B, *data) with the grid for the last two axes.
        size: S, broadcastable to (B, *data).
        grid: rows and columns of the periodic grid, at least those of the data.
    """

    def __init__(self, ratio: Tensor, size: Tensor, grid: tuple[int, int]) -> None:
        self._half, self._size = Parameter(half(ratio)), Parameter(size)
        self._grid = grid

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        height, width = u.shape[-2:]
        size = self._size.like(u)
        divisor = 1 + _wide(s, u) * self._half.like(u)
        full = torch.fft.irfft2(torch.fft.rfft2(u * size, s=self._grid) / divisor, s=self._grid)
        return full[..., :height, :width] * size


@final
class RankOne(WhitenedSolve):
    """K data of one image: W A x = a x in Fourier space, a (K, h, w), and I + s a a^H mode by mode.

    Exact for stationary data on their own grid; otherwise windowed and weighted as
    :class:`Embedded`.

    Args:
        vectors: a, (..., K, h, w) on the grid.
        size: S, broadcastable to (B, K, rows, columns).
        grid: rows and columns of the periodic grid.
        view: (K, rows, columns) of the data.
    """

    def __init__(
        self, vectors: Tensor, size: Tensor, grid: tuple[int, int], view: tuple[int, int, int]
    ) -> None:
        kept = half(vectors)
        self._real, self._imag = Parameter(kept.real), Parameter(kept.imag)
        self._size, self._grid, self._view = Parameter(size), grid, view

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        data = u.reshape(-1, *self._view)
        size = self._size.like(u)
        a = torch.complex(self._real.like(u), self._imag.like(u))
        norm = a.abs().square().sum(-3, keepdim=True)
        inverse = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)

        def along(t: Tensor) -> Tensor:
            return a * ((a.conj() * t).sum(-3, keepdim=True) * inverse)

        t = torch.fft.rfft2(data * size, s=self._grid)
        inside = along(t)
        outside = t - inside
        # what rounding left inside would be multiplied by a large s |a|^2 later
        outside = outside - along(outside)
        full = torch.fft.irfft2(inside / (1 + _wide(s, data) * norm) + outside, s=self._grid)
        _, height, width = self._view
        return (full[..., :height, :width] * size).reshape(u.shape)


@final
class Singular(WhitenedSolve):
    """W A = U diag(l) V^T, decomposed once, in float64."""

    def __init__(self, matrix: Tensor) -> None:
        m, n = matrix.shape
        u, values, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
        self._complete = m <= n
        self._u, self._squares = Parameter(u), Parameter(values.square())

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        flat = u.flatten(1).double()
        vectors, squares = self._u.like(flat), self._squares.like(flat)
        inside = flat @ vectors
        shrunk = (inside / (1 + _wide(s, flat) * squares)) @ vectors.T
        if not self._complete:
            outside = flat - inside @ vectors.T
            # what rounding left inside would be multiplied by the largest singular values later
            shrunk = shrunk + outside - (outside @ vectors) @ vectors.T
        return shrunk.to(u.dtype).reshape(u.shape)


def structured_solve(
    linear: LinearOperator, noise: Noise, input_shape: Shape, data_shape: Shape
) -> WhitenedSolve | None:
    """The direct solve, or None where no structure allows one."""
    weight = noise.weight()
    gram = linear.gram_diagonal(input_shape)
    if weight is not None and gram is not None:
        return Elementwise(gram * weight.to(gram.device))
    power = noise.spectrum(data_shape)
    spectrum = linear.gram_spectrum(input_shape)
    if power is not None and spectrum is not None:
        return Spectral(spectrum / power.to(spectrum.device))
    joint = _rank_one(linear, noise, input_shape, data_shape, None, exactly=True)
    if joint is not None:
        return joint
    batched = weight is not None and weight.ndim > len(data_shape)
    matrix = None if batched else linear.dense(input_shape)
    dense_noise = weight is None and noise.size is not None
    explicit = dense_noise and linear.batch is None
    if (
        matrix is None
        and explicit
        and numel(data_shape) * numel(input_shape) <= _LARGEST_MATRIX // 4
    ):
        # the noise is a matrix of that size already, so A as one costs little more
        matrix = _explicit(linear, input_shape, data_shape)
    if matrix is None or min(matrix.shape) > _LARGEST_SIDE or matrix.numel() > _LARGEST_MATRIX:
        return None
    columns = matrix.detach().double().T.reshape(-1, *data_shape)
    return Singular(noise.whiten(columns).flatten(1).T)


def _explicit(linear: LinearOperator, input_shape: Shape, data_shape: Shape) -> Tensor:
    """The matrix of an operator, row by row."""
    rows = torch.eye(numel(data_shape), dtype=torch.float64).reshape(-1, *data_shape)
    return linear.bind(input_shape).adjoint(rows).flatten(1)


def near_solve(
    linear: LinearOperator,
    noise: Noise,
    input_shape: Shape,
    data_shape: Shape,
    power: Tensor | None = None,
) -> WhitenedSolve | None:
    """An approximate solve that is symmetric and positive, or None.

    Args:
        linear: A.
        noise: of covariance Sigma.
        input_shape: of one image.
        data_shape: of its data.
        power: eigenvalues under the FFT2 of the image of a covariance P, for A P A^T in place of A
            A^T.
    """
    joint = _rank_one(linear, noise, input_shape, data_shape, power, exactly=False)
    if joint is not None:
        return joint
    weight, gram = noise.weight(), linear.near_gram(input_shape, power)
    if weight is not None and gram is not None:
        return Elementwise(gram * weight.to(gram.device))
    if len(data_shape) < 2:
        return None
    height, width = data_shape[-2:]
    weight = noise.weight()
    if weight is not None:
        margin = linear.margin(input_shape)
        grid = (_grid_size(height, margin[0]), _grid_size(width, margin[1]))
        spectrum = linear.near_spectrum(input_shape, on_grid(power), grid)
        if spectrum is None:
            return None
        mean, size = _typical(weight.expand(torch.broadcast_shapes(weight.shape, data_shape)))
        return Embedded(spectrum * mean.to(spectrum.device), size, grid)
    stationary = noise.spectrum(data_shape)
    spectrum = linear.near_spectrum(input_shape, on_grid(power), (height, width))
    if stationary is None or spectrum is None:
        return None
    return Spectral(spectrum / stationary.to(spectrum.device))


def _typical(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mean weight of the data that count over the last two axes, and sqrt(mean/weight), 0 where
    masked.
    """
    kept = weight > 0
    count = kept.sum((-2, -1), keepdim=True).clamp_min(1)
    mean = weight.sum((-2, -1), keepdim=True) / count
    mean = torch.where(mean > 0, mean, 1.0)
    return mean, torch.where(kept, (mean / torch.where(kept, weight, 1.0)).sqrt(), 0.0)


def _rank_one(
    linear: LinearOperator,
    noise: Noise,
    input_shape: Shape,
    data_shape: Shape,
    power: Tensor | None,
    exactly: bool,
) -> WhitenedSolve | None:
    """The solve for several data of one image on one grid of pixels, or None."""
    shapes = (
        [op.output_shape(input_shape) for op in linear.operators]
        if isinstance(linear, Stack)
        else [data_shape]
    )
    if numel(input_shape[:-2]) != 1 or any(len(shape) not in (2, 3) for shape in shapes):
        return None
    channels = sum(numel(shape[:-2]) for shape in shapes)
    height, width = shapes[0][-2:]
    weight = noise.weight()
    alone = channels == 1 and not isinstance(linear, Stack)
    if alone or weight is None or channels * height * width != numel(data_shape):
        return None
    margin = linear.margin(input_shape)
    grid = (_grid_size(height, margin[0]), _grid_size(width, margin[1]))
    transfer = linear.near_transfer(input_shape, grid)
    if transfer is None or (exactly and margin != (0, 0)):
        return None
    full = weight.expand(torch.broadcast_shapes(weight.shape, data_shape))
    front = full.shape[: full.ndim - len(data_shape)]
    mean, size = _typical(full.reshape(*front, channels, height, width))
    if exactly and not bool(((size - 1).abs() < 1e-9).all()):
        return None
    before = on_grid(power)(grid)
    if before is None:
        return None
    strength = (mean.to(before.device) * before).sqrt().to(transfer.device)
    vectors = (transfer.to(torch.complex128) * strength).expand(
        *strength.shape[:-3], channels, *grid
    )
    return RankOne(vectors, size, grid, (channels, height, width))


def _grid_size(n: int, margin: int) -> int:
    size: int = next_fast_len(n + margin, real=True) if margin else n
    return size


def spectral_solve(
    linear: LinearOperator, noise: Noise, input_shape: Shape, data_shape: Shape, power: Tensor
) -> WhitenedSolve | None:
    """The direct solve with A P A^T in place of A A^T, P of eigenvalues ``power`` under the FFT2."""
    spectrum = linear.gram_spectrum(input_shape, power)
    stationary = noise.spectrum(data_shape)
    if spectrum is None or stationary is None:
        return _rank_one(linear, noise, input_shape, data_shape, power, exactly=True)
    return Spectral(spectrum / stationary.to(spectrum.device))


def effective_data(
    linear: LinearOperator,
    noise: Noise,
    input_shape: Shape,
    data_shape: Shape,
    power: Tensor,
    gain: Tensor | None,
) -> Tensor | None:
    """How many data P decides rather than the noise: nearly tr (Sigma + A P A^T)^-1 A P A^T, (B,).

    P = G F^-1 diag(power) F G. Where the gain and the noise vary slowly the trace is the sum over pixels
    and modes of q h/(1 + q h), with q = G^2/sigma^2 of the pixel (G^2 carried to the data by A G^2/A 1) and h
    the spectrum of A F^-1 diag(power) F A^T. None where the structure does not give h.
    """
    weight = noise.weight()
    if weight is None or len(data_shape) < 2:
        return None
    height, width = data_shape[-2:]
    spectrum = linear.near_spectrum(input_shape, on_grid(power), (height, width))
    if spectrum is None:
        return None
    spectrum = spectrum.to(weight.device, torch.float64).clamp_min(1e-300)
    batch = spectrum.shape[0] if spectrum.ndim > len(data_shape) else 1
    spectrum = spectrum.expand(*spectrum.shape[:-2], height, width)
    spectrum = spectrum.reshape(batch, -1, height, width).mean(1)  # channels alike
    strength = weight.double().expand(torch.broadcast_shapes(weight.shape, (1, *data_shape)))
    if gain is not None:
        squares = gain.square()
        local, unit = linear(squares), linear(torch.ones_like(squares))
        strength = strength * torch.where(unit > 0, local / torch.where(unit > 0, unit, 1.0), 0.0)
    largest = spectrum.amax((-2, -1)).clamp_min(1e-300)
    nodes = torch.linspace(
        -12.0, 28.0, 81, dtype=torch.float64, device=spectrum.device
    )  # of log q h
    share = torch.stack(
        [
            (1 / (1 + largest[:, None, None] * (-node).exp() / spectrum)).mean((-2, -1))
            for node in nodes
        ],
        dim=-1,
    )
    rows = max(len(strength), len(share))
    q = strength.flatten(1).expand(rows, -1) * largest.expand(rows)[:, None]
    place = (q.clamp_min(1e-300).log() - nodes[0]) / (nodes[1] - nodes[0])
    place = place.clamp(0.0, len(nodes) - 1.001)
    left = place.floor().long()
    table = share.expand(rows, -1)
    mixed = torch.lerp(table.gather(1, left), table.gather(1, left + 1), place - left)
    return torch.where(q > 0, mixed, 0.0).sum(1)


def counts_effective_data(
    linear: LinearOperator, noise: Noise, input_shape: Shape, data_shape: Shape
) -> bool:
    """Whether :func:`effective_data` knows its answer for these."""
    if noise.weight() is None or len(data_shape) < 2:
        return False
    height, width = data_shape[-2:]
    return linear.near_spectrum(input_shape, on_grid(None), (height, width)) is not None


def half(ratio: Tensor) -> Tensor:
    """The modes that rfft2 keeps."""
    return ratio[..., : ratio.shape[-1] // 2 + 1] if ratio.ndim and ratio.shape[-1] > 1 else ratio


def _wide(s: Tensor, like: Tensor) -> Tensor:
    s = s.to(like.device, like.dtype)
    return s.reshape(-1, *[1] * (like.ndim - 1)) if s.ndim else s
