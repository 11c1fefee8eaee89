"""Covariances C_t of p(x_0 | x_t) for moment matching.

The exact one is C_t = sigma^2/alpha dD/dx (Tweedie's second order), one product per VJP of the
denoiser. It is also the covariance of the denoising error, E[(x_0 - D)(x_0 - D)^T | x_t]; averaged
over images, that error can be measured once per noise level and tabulated, and then a product costs
no network evaluation. For a stationary prior the averaged covariance is diagonal under the Fourier
transform, which is what :class:`SpectralCovariance` stores. Galaxies are not stationary, and
:class:`LocalCovariance` lets the error of a pixel follow how bright the image is there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import per_entry, squared_nsr
from diffpost.likelihood import Likelihood
from diffpost.linalg import Solver, SolveReport, cg, filtered
from diffpost.operators.base import LinearOperator
from diffpost.score import ScoreModel
from diffpost.sde import expand


class CovarianceAt(ABC):
    """C_t at one state: symmetric, positive, (B, *shape) -> (B, *shape).

    Attributes:
        power: the stationary covariance that it is or is like, to precondition solves: s, () or (B,), for
            s I, or eigenvalues under the FFT2 of the last two axes, broadcastable to the images.
    """

    power: Tensor

    @abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """C_t v, for v (B, *shape)."""

    @abstractmethod
    def enlarged(self, factor: Tensor) -> CovarianceAt:
        """The covariance times factor (B,), but no larger than nsr^2, which is what a flat prior
        leaves, where it was smaller.
        """

    @abstractmethod
    def effective_data(
        self, likelihood: Likelihood, linear: LinearOperator, r: Tensor
    ) -> Tensor | None:
        """tr (Sigma + A C_t A^T)^-1 A C_t A^T, (B,) or (1,), or None where it is not known."""

    @abstractmethod
    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        tol: float,
        max_iter: int,
        solver: Solver = cg,
    ) -> SolveReport:
        """v with (Sigma + A C_t A^T) v = r, for A = ``linear``."""


class Covariance(ABC):
    """A model of C_t, as a function of the noise level and of the denoised image."""

    @abstractmethod
    def at(self, denoised: Tensor, prior: ScoreModel, t: Tensor) -> CovarianceAt:
        """C_t where the denoiser gives ``denoised`` (B, *shape), at t () or (B,)."""


@final
class _White(CovarianceAt):
    """s I."""

    def __init__(self, s: Tensor, limit: Tensor) -> None:
        self.power, self._limit = s, limit

    def apply(self, v: Tensor) -> Tensor:
        return expand(self.power, v) * v

    def enlarged(self, factor: Tensor) -> CovarianceAt:
        power, limit = self.power.to(factor), self._limit.to(factor)
        return _White(torch.minimum(power * factor, torch.maximum(power, limit)), self._limit)

    def effective_data(
        self, likelihood: Likelihood, linear: LinearOperator, r: Tensor
    ) -> Tensor | None:
        return likelihood.effective_data(linear, r, self.power.reshape(-1, *[1] * (r.ndim - 1)))

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        tol: float,
        max_iter: int,
        solver: Solver = cg,
    ) -> SolveReport:
        return likelihood.solve_operator(linear, r, self.power, tol, max_iter, solver)


@final
class _Stationary(CovarianceAt):
    """F^-1 diag(power) F."""

    def __init__(self, power: Tensor, limit: Tensor) -> None:
        self.power, self._limit = power, limit

    def apply(self, v: Tensor) -> Tensor:
        return filtered(v, self.power)

    def enlarged(self, factor: Tensor) -> CovarianceAt:
        limit = per_entry(self._limit.reshape(-1).to(self.power.device), self.power)
        power = self.power * per_entry(factor, self.power)
        return _Stationary(torch.minimum(power, torch.maximum(self.power, limit)), self._limit)

    def effective_data(
        self, likelihood: Likelihood, linear: LinearOperator, r: Tensor
    ) -> Tensor | None:
        return likelihood.effective_data(linear, r, self.power)

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        tol: float,
        max_iter: int,
        solver: Solver = cg,
    ) -> SolveReport:
        return likelihood.solve_spectral(linear, r, self.power, tol, max_iter, solver)


@final
class _Modulated(CovarianceAt):
    """G F^-1 diag(power) F G."""

    def __init__(self, power: Tensor, gain: Tensor, limit: Tensor) -> None:
        self._power, self.gain, self._limit = power, gain, limit
        self.power = power * per_entry(gain.square().flatten(1).mean(1), gain)

    def apply(self, v: Tensor) -> Tensor:
        return self.gain * filtered(self.gain * v, self._power)

    def enlarged(self, factor: Tensor) -> CovarianceAt:
        limit = per_entry(self._limit.reshape(-1).to(self.gain.device).sqrt(), self.gain)
        gain = self.gain * per_entry(factor.sqrt(), self.gain)
        gain = torch.minimum(gain, torch.maximum(self.gain, limit))
        return _Modulated(self._power, gain, self._limit)

    def effective_data(
        self, likelihood: Likelihood, linear: LinearOperator, r: Tensor
    ) -> Tensor | None:
        return likelihood.effective_data(linear, r, self._power, self.gain)

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        tol: float,
        max_iter: int,
        solver: Solver = cg,
    ) -> SolveReport:
        return likelihood.solve_operator_with(
            linear, self.apply, r, tol, max_iter, s_precond=self.power, solver=solver
        )


@final
class IsotropicCovariance(Covariance):
    """C_t = nsr^2 v/(nsr^2 + v) I: the posterior of a white Gaussian prior of variance v.

    Args:
        variance: v, the prior's variance per pixel, in the prior's own units.

    Raises:
        ValueError: variance not positive.
    """

    def __init__(self, variance: float) -> None:
        if not variance > 0:
            raise ValueError(
                f"IsotropicCovariance(variance={variance}): expected a positive number."
            )
        self.prior_variance = float(variance)

    def __repr__(self) -> str:
        return f"IsotropicCovariance({self.prior_variance})"

    def at(self, denoised: Tensor, prior: ScoreModel, t: Tensor) -> CovarianceAt:
        s = squared_nsr(prior.sde, denoised, t)
        return _White(s * self.prior_variance / (s + self.prior_variance), s)


@final
class SpectralCovariance(Covariance):
    """C_t diagonal under the orthonormal FFT2, from a table of denoising-error spectra.

    The table is interpolated linearly in log nsr and in k, the logarithm of the variance that is,
    and held constant in k outside it. Below the table's smallest nsr the variance falls as nsr^2
    (noise much smaller than every structure); above its largest it stays. k is the radial
    frequency, so the covariance is isotropic on the sky and serves any image size.

    Args:
        nsr: (T,) increasing noise-to-signal ratios, positive.
        k: (K,) increasing frequencies in cycles per pixel, from 0 up to 0.7 (the corner).
        variance: (T, K) variance per mode of x_0 - D(x_t, t), in the prior's own units squared.

    Raises:
        ValueError: shapes that do not fit, axes not increasing, or values not positive and finite.
    """

    def __init__(self, nsr: Tensor, k: Tensor, variance: Tensor) -> None:
        nsr, k, variance = (
            torch.as_tensor(a, dtype=torch.float64, device="cpu").clone()
            for a in (nsr, k, variance)
        )
        if nsr.ndim != 1 or k.ndim != 1 or variance.shape != (len(nsr), len(k)) or len(nsr) < 2:
            raise ValueError(
                f"SpectralCovariance: nsr {tuple(nsr.shape)}, k {tuple(k.shape)}, variance "
                f"{tuple(variance.shape)}; expected (T,), (K,) and (T, K) with T of at least 2."
            )
        if not ((nsr.diff() > 0).all() and (k.diff() > 0).all() and nsr[0] > 0 and k[0] >= 0):
            raise ValueError("SpectralCovariance: nsr and k must increase, nsr > 0 and k >= 0.")
        if not (variance.isfinite().all() and (variance > 0).all()):
            raise ValueError("SpectralCovariance: variances must be positive and finite.")
        self.nsr, self.k, self.table = nsr, k, variance

    def __repr__(self) -> str:
        low, high = float(self.nsr[0]), float(self.nsr[-1])
        return f"SpectralCovariance({len(self.nsr)} levels {low:g}-{high:g}, {len(self.k)} k)"

    def spectrum(self, like: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        """Eigenvalues of C_t under the orthonormal FFT2, (1 or B, ..., H, W) for ``like`` (B, ..., H, W)."""
        height, width = like.shape[-2:]
        k = torch.hypot(
            torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
            torch.fft.fftfreq(width, dtype=torch.float64)[None, :],
        )
        level = squared_nsr(prior.sde, like, t).cpu().sqrt().clamp_min(1e-150).log()
        rows = _interpolate(level.reshape(-1), self.nsr.log(), self.table.log())
        rows = rows + 2 * (level.reshape(-1, 1) - math.log(self.nsr[0])).clamp_max(0)
        values = _interpolate(k.reshape(-1), self.k, rows.T.contiguous())
        values = values.T.exp().reshape(-1, *[1] * (like.ndim - 3), height, width)
        return values.to(like.device, like.dtype)

    def at(self, denoised: Tensor, prior: ScoreModel, t: Tensor) -> CovarianceAt:
        limit = squared_nsr(prior.sde, denoised, t)
        return _Stationary(self.spectrum(denoised, prior, t), limit)


@final
class LocalCovariance(Covariance):
    """C_t = G S G: errors that are stationary but for their size, which follows the brightness.

    G is diagonal, the standard deviation of the denoising error of a pixel by how bright the denoised image
    is there (the Gaussian average of its absolute value), and S the spectrum of the error over G. The error of
    a pixel at a galaxy's peak is ten to twenty times that of one on the sky, at every noise level but the
    lowest: a stationary C_t moves the sky too much and the galaxy too little.

    G depends on the image, and, as everywhere in moment matching, this dependence is not differentiated.

    Args:
        correlations: spectrum of error/G, as a function of nsr and k, of mean 1; below its smallest nsr it is
            the one there (G holds the scale).
        nsr: (T,) increasing noise-to-signal ratios of the table of G, positive.
        brightness: (N,) increasing, positive, in the prior's own units.
        amplitude: (T, N) standard deviation of x_0 - D(x_t, t) per pixel, in the prior's own units. Log-linear
            between the nodes; proportional to nsr below the table, constant above it.
        smoothing: standard deviation in pixels of the Gaussian average of the brightness.

    Raises:
        ValueError: shapes that do not fit, axes not increasing, or values not positive and finite.
    """

    def __init__(
        self,
        correlations: SpectralCovariance,
        nsr: Tensor,
        brightness: Tensor,
        amplitude: Tensor,
        smoothing: float,
    ) -> None:
        nsr, brightness, amplitude = (
            torch.as_tensor(a, dtype=torch.float64, device="cpu").clone()
            for a in (nsr, brightness, amplitude)
        )
        if (
            nsr.ndim != 1
            or brightness.ndim != 1
            or amplitude.shape != (len(nsr), len(brightness))
            or min(amplitude.shape) < 2
        ):
            raise ValueError(
                f"LocalCovariance: nsr {tuple(nsr.shape)}, brightness {tuple(brightness.shape)}, amplitude "
                f"{tuple(amplitude.shape)}; expected (T,), (N,) and (T, N), each of at least 2."
            )
        for name, nodes in (("nsr", nsr), ("brightness", brightness)):
            if not (nodes.diff() > 0).all() or not nodes[0] > 0:
                raise ValueError(f"LocalCovariance: {name} must increase from a positive value.")
        if not (amplitude.isfinite().all() and (amplitude > 0).all()) or not smoothing > 0:
            raise ValueError(
                "LocalCovariance: amplitudes must be positive and finite, smoothing positive."
            )
        self.correlations = correlations
        self.nsr, self.brightness, self.amplitude = nsr, brightness, amplitude
        self.smoothing = float(smoothing)

    def __repr__(self) -> str:
        low, high = float(self.nsr[0]), float(self.nsr[-1])
        return (
            f"LocalCovariance({len(self.nsr)} levels {low:g}-{high:g}, {len(self.brightness)} "
            f"brightnesses, {len(self.correlations.k)} k)"
        )

    def gain(self, denoised: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        """G, (B, *shape): the standard deviation of the error of each pixel."""
        level = squared_nsr(prior.sde, denoised, t).cpu().sqrt().clamp_min(1e-150).log().reshape(-1)
        rows = _interpolate(level, self.nsr.log(), self.amplitude.log())
        rows = rows + (level[:, None] - math.log(self.nsr[0])).clamp_max(0)
        rows = rows.to(denoised.device, denoised.dtype).expand(len(denoised), -1)
        bright = local_brightness(denoised, self.smoothing).flatten(1)
        left, weight = between_nodes(bright, self.brightness.to(bright))
        gain = (1 - weight) * rows.gather(1, left) + weight * rows.gather(1, left + 1)
        return gain.exp().reshape(denoised.shape)

    def at(self, denoised: Tensor, prior: ScoreModel, t: Tensor) -> CovarianceAt:
        if denoised.ndim < 3:
            raise ValueError(
                f"LocalCovariance: got a prior of shape {tuple(denoised.shape[1:])}; expected images (..., H, W)."
            )
        power = self.correlations.spectrum(denoised, prior, t)
        power = power / power.mean((-2, -1), keepdim=True)
        limit = squared_nsr(prior.sde, denoised, t)
        return _Modulated(power, self.gain(denoised, prior, t), limit)


def local_brightness(image: Tensor, smoothing: float) -> Tensor:
    """|image| averaged by a Gaussian of ``smoothing`` pixels, on a periodic frame: (B, ..., H, W)."""
    height, width = image.shape[-2:]
    k2 = (
        torch.fft.fftfreq(height, dtype=image.dtype, device=image.device)[:, None] ** 2
        + torch.fft.fftfreq(width, dtype=image.dtype, device=image.device)[None, :] ** 2
    )
    response = torch.exp(-2 * math.pi**2 * smoothing**2 * k2)
    return filtered(image.abs(), response).clamp_min(0)


def between_nodes(values: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The node to the left of each value and the weight of the one to its right, linear in the logarithm;
    values beyond the nodes (N,) are taken to be at the outermost.
    """
    logs = nodes.log()
    place = values.clamp(nodes[0], nodes[-1]).log().clamp(logs[0], logs[-1])
    right = torch.searchsorted(logs, place).clamp(1, len(nodes) - 1)
    return right - 1, (place - logs[right - 1]) / (logs[right] - logs[right - 1])


def _interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of values (N, M) at x (L,), constant outside the nodes: (L, M)."""
    x = x.clamp(nodes[0], nodes[-1])
    right = torch.searchsorted(nodes, x).clamp(1, max(len(nodes) - 1, 1))
    if len(nodes) == 1:
        return values.expand(len(x), -1)
    left = right - 1
    weight = ((x - nodes[left]) / (nodes[right] - nodes[left]))[:, None]
    return (1 - weight) * values[left] + weight * values[right]
