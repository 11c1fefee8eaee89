"""Direct solves with Sigma + s A A^T, and approximate ones that precondition.

With the whitening W of the noise, (Sigma + s A A^T)^-1 = W^T (I + s W A A^T W^T)^-1 W, and the matrix in the middle
is diagonal

* over pixels, where the gram A A^T is (masks, scalings, block sums, crops) and the noise is independent;
* over Fourier modes, where A A^T (periodic convolutions, and block sums of them) and Sigma (white, or with a
  power spectrum) are stationary;
* over the left singular vectors of W A, where A is a matrix: one decomposition serves every s.

Elsewhere, the nearest such matrix preconditions conjugate gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from diffpost.noise import Noise
from diffpost.operators.base import LinearOperator, Parameter, Shape, numel

__all__ = ["WhitenedSolve", "near_solve", "structured_solve"]

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
class Observed(WhitenedSolve):
    """Another solve among the data that count; masked data, whose rows of W are 0, are left alone."""

    def __init__(self, inner: WhitenedSolve, seen: Tensor) -> None:
        self._inner = inner
        self._seen = Parameter(seen.to(torch.float32))

    def solve(self, u: Tensor, s: Tensor) -> Tensor:
        seen = self._seen.like(u)
        return seen * self._inner.solve(seen * u, s) + (1 - seen) * u


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
        power: eigenvalues under the FFT2 of the image of a covariance P, for A P A^T in place of A A^T.
    """
    spectrum = linear.gram_spectrum(input_shape, power, approximate=True)
    if spectrum is not None:
        stationary = noise.spectrum(data_shape)
        if stationary is not None:
            return Spectral(spectrum / stationary.to(spectrum.device))
        weight = noise.weight()
        if weight is not None and len(data_shape) >= 2:
            full = weight.expand(torch.broadcast_shapes(weight.shape, data_shape))
            seen = full > 0
            count = seen.sum((-2, -1), keepdim=True).clamp_min(1)
            mean = full.sum((-2, -1), keepdim=True) / count
            near = Spectral(spectrum * mean.to(spectrum.device))
            return near if bool(seen.all()) else Observed(near, seen)
    return None


def spectral_solve(
    linear: LinearOperator, noise: Noise, input_shape: Shape, data_shape: Shape, power: Tensor
) -> WhitenedSolve | None:
    """The direct solve with A P A^T in place of A A^T, P of eigenvalues ``power`` under the FFT2."""
    spectrum = linear.gram_spectrum(input_shape, power)
    stationary = noise.spectrum(data_shape)
    if spectrum is None or stationary is None:
        return None
    return Spectral(spectrum / stationary.to(spectrum.device))


def half(ratio: Tensor) -> Tensor:
    """The modes that rfft2 keeps."""
    return ratio[..., : ratio.shape[-1] // 2 + 1] if ratio.ndim and ratio.shape[-1] > 1 else ratio


def _wide(s: Tensor, like: Tensor) -> Tensor:
    s = s.to(like.device, like.dtype)
    return s.reshape(-1, *[1] * (like.ndim - 1)) if s.ndim else s
