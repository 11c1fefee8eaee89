"""The covariances behind Gaussian noise: independent data, a dense matrix, a power spectrum.

Each whitens (W with W^T W = Sigma^-1), colours (a root of Sigma) and knows log det Sigma. Kept in
float64, applied in the dtype of the data.
"""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import Memo, Parameter, Shape, numel

__all__ = ["Dense", "Independent", "Stationary", "standard_deviation"]


def standard_deviation(kind: str, values: Tensor) -> Tensor:
    """Standard deviations from what was given as kind, checked."""
    name = f"GaussianNoise({kind}=...)"
    if bool(values.isnan().any()):
        raise ValueError(
            f"{name}: {int(values.isnan().sum())} of {values.numel()} values are NaN; give pixels without "
            "data infinite variance (weight 0)."
        )
    if bool((values < 0).any()):
        raise ValueError(
            f"{name}: {int((values < 0).sum())} of {values.numel()} values are negative."
        )
    zero = values.isinf() if kind == "weight" else values == 0
    if bool(zero.any()):
        raise ValueError(
            f"{name}: {int(zero.sum())} of {values.numel()} values mean zero variance, a datum without noise, "
            "which has no density. Give it the variance of its rounding error, or infinite variance "
            "(weight 0) if it marks a pixel without data."
        )
    if kind == "std":
        return values
    return values.sqrt() if kind == "var" else values.rsqrt()


@final
class Independent:
    """Independent data: everything pixel by pixel. A batch axis of its own is kept."""

    def __init__(self, std: Tensor) -> None:
        self.std = std
        gone = std.isinf()
        self.masked = gone if bool(gone.any()) else None
        self._std, self._inverse = Parameter(std), Parameter(std.reciprocal())
        self._gone = Parameter(gone)
        self._memo = Memo(4)
        flat = std.ndim == 0 or bool(
            (std == std[..., :1, :1] if std.ndim > 1 else std == std[:1]).all()
        )
        self._flat = flat and self.masked is None

    @property
    def variance(self) -> Tensor:
        return self.std.square()

    @property
    def weight(self) -> Tensor:
        return self.std.reciprocal().square()

    def whiten(self, r: Tensor) -> Tensor:
        self.check(tuple(r.shape))
        scaled = r * self._inverse.like(r)
        if self.masked is None:
            return scaled
        # 0 * NaN is NaN, and masked pixels are where NaNs live
        return scaled.masked_fill(self._gone.value.to(r.device), 0.0)

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        return self.whiten(v)

    def color(self, z: Tensor) -> Tensor:
        self.check(tuple(z.shape))
        coloured = z * self._std.like(z)
        return (
            coloured
            if self.masked is None
            else coloured.masked_fill(self._gone.value.to(z.device), 0.0)
        )

    def log_normalisation(self, r: Tensor) -> Tensor:
        """-(m log 2 pi + log det Sigma)/2, () or (B,), in float64."""

        def make() -> Tensor:
            data = r.shape[1:] if self.std.ndim < r.ndim else r.shape
            terms = -self.std.log() - 0.5 * math.log(2 * math.pi)
            terms = terms.masked_fill(self.std.isinf(), 0.0).expand(data)
            return terms.sum() if self.std.ndim < r.ndim else terms.flatten(1).sum(1)

        return self._memo(tuple(r.shape), make).to(r.device)

    def spectrum(self, shape: Shape) -> Tensor | None:
        if not self._flat or len(shape) < 2:
            return None
        if self.std.ndim < 2:  # (W,) of equal values is white as well
            return self.variance.reshape(-1)[0]
        return self.variance[..., :1, :1]

    def check(self, shape: Shape) -> None:
        check_shape(self.std, shape, "The noise")


@final
class Dense:
    """A covariance matrix over the flattened data."""

    masked = None

    def __init__(self, cov: Tensor) -> None:
        if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
            raise ValueError(
                f"GaussianNoise(cov=...): got shape {tuple(cov.shape)}; expected (m, m)."
            )
        if not bool(cov.isfinite().all()):
            raise ValueError(
                "GaussianNoise(cov=...): got NaN or infinite values; leave data that were not taken out of y, "
                "or give independent noise by var with infinite values."
            )
        if bool((cov - cov.T).abs().max() > 1e-6 * cov.abs().max()):
            raise ValueError("GaussianNoise(cov=...): not symmetric.")
        root, failed = torch.linalg.cholesky_ex(0.5 * (cov + cov.T))
        if int(failed):
            raise ValueError(
                "GaussianNoise(cov=...): not positive definite: some combination of the data has zero or negative "
                "variance. Add the variance of the rounding error to the diagonal."
            )
        self.size = len(cov)
        self.variance = cov.diagonal().clone()
        self._root = root
        eye = torch.eye(self.size, dtype=cov.dtype, device=cov.device)
        self._inverse = Parameter(torch.linalg.solve_triangular(root, eye, upper=False))

    def _rows(self, r: Tensor) -> Tensor:
        """r as (B, m), also without a batch axis."""
        if r.numel() == self.size or numel(tuple(r.shape[1:])) == self.size:
            return r.reshape(-1, self.size)
        raise ValueError(
            f"The noise has a covariance of {self.size} data, but the residual is {tuple(r.shape)}; expected "
            f"(B, *data) with {self.size} data."
        )

    def check(self, shape: Shape) -> None:
        self._rows(torch.empty(shape, device="meta"))

    def whiten(self, r: Tensor) -> Tensor:
        return (self._rows(r) @ self._inverse.like(r).T).reshape(r.shape)

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        return (self._rows(v) @ self._inverse.like(v)).reshape(v.shape)

    def color(self, z: Tensor) -> Tensor:
        return (self._rows(z) @ self._root.T.to(z)).reshape(z.shape)

    def log_normalisation(self, r: Tensor) -> Tensor:
        total = -self._root.diagonal().log().sum() - 0.5 * self.size * math.log(2 * math.pi)
        return total.to(r.device)

    def spectrum(self, shape: Shape) -> Tensor | None:
        return None


@final
class Stationary:
    """A covariance that the FFT2 of the last two axes diagonalises."""

    masked = None

    def __init__(self, power: Tensor) -> None:
        if power.ndim < 2:
            raise ValueError(
                f"GaussianNoise(power=...): got shape {tuple(power.shape)}; expected (..., H, W), one value a mode."
            )
        if not bool(power.isfinite().all()) or bool((power <= 0).any()):
            raise ValueError(
                "GaussianNoise(power=...): got values that are NaN, infinite, zero or negative; expected the "
                "positive variance of every Fourier mode."
            )
        mirrored = power.flip(-2, -1).roll((1, 1), (-2, -1))
        if bool(((power - mirrored).abs() > 1e-4 * power).any()):
            raise ValueError(
                "GaussianNoise(power=...): P(k) and P(-k) differ, which no real noise does; is the zero "
                "frequency at index (0, 0)?"
            )
        self.power = 0.5 * (power + mirrored)
        half = self.power[..., : power.shape[-1] // 2 + 1]
        self._inverse = Parameter(half.rsqrt())
        self._root = Parameter(half.sqrt())

    @property
    def variance(self) -> Tensor:
        return self.power.mean((-2, -1), keepdim=True)

    def check(self, shape: Shape) -> None:
        check_shape(self.power, shape, "The noise's power")

    def _filter(self, r: Tensor, factor: Tensor) -> Tensor:
        self.check(tuple(r.shape))
        return torch.fft.irfft2(torch.fft.rfft2(r) * factor, s=r.shape[-2:])

    def whiten(self, r: Tensor) -> Tensor:
        return self._filter(r, self._inverse.like(r))

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        return self.whiten(v)

    def color(self, z: Tensor) -> Tensor:
        return self._filter(z, self._root.like(z))

    def log_normalisation(self, r: Tensor) -> Tensor:
        terms = -0.5 * self.power.log() - 0.5 * math.log(2 * math.pi)
        if self.power.ndim < r.ndim:
            return terms.expand(r.shape[1:]).sum().to(r.device)
        return terms.expand(r.shape).flatten(1).sum(1).to(r.device)

    def spectrum(self, shape: Shape) -> Tensor | None:
        return self.power


def check_shape(values: Tensor, shape: Shape, what: str) -> None:
    try:
        good = torch.broadcast_shapes(values.shape, shape) == shape
    except RuntimeError:
        good = False
    if not good:
        raise ValueError(
            f"{what} has shape {tuple(values.shape)} and the residual {shape}; the first must broadcast to "
            "the second, (B, *data)."
        )
