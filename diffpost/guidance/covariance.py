"""Covariances C_t of p(x_0 | x_t) for moment matching.

The exact one is C_t = sigma^2/alpha dD/dx (Tweedie's second order), one product per VJP of the
denoiser. It is also the covariance of the denoising error, E[(x_0 - D)(x_0 - D)^T | x_t]; averaged
over images, that error can be measured once per noise level and tabulated, and then a product costs
no network evaluation. For a stationary prior the averaged covariance is diagonal under the Fourier
transform, which is what :class:`SpectralCovariance` stores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import squared_nsr
from diffpost.likelihood import Likelihood
from diffpost.linalg import SolveReport, filtered
from diffpost.operators.base import LinearOperator
from diffpost.score import ScoreModel
from diffpost.sde import expand


class Covariance(ABC):
    """C_t as a function of the noise level alone: symmetric, positive, (B, *shape) -> (B,
    *shape).
    """

    @abstractmethod
    def apply(self, v: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        """C_t v, for v (B, *shape) and t () or (B,)."""

    @abstractmethod
    def preconditioner(self, like: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        """What C_t is like, to precondition solves: s, () or (B,), for s I, or its eigenvalues under
        the FFT2 of the last two axes, broadcastable to the images ``like``.
        """

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        like: Tensor,
        prior: ScoreModel,
        t: Tensor,
        tol: float,
        max_iter: int,
    ) -> SolveReport:
        """v with (Sigma + A C_t A^T) v = r, for A = ``linear``; by conjugate gradients unless a class
        knows better. ``like`` is a batch of images, for its shape, dtype and device.
        """
        return likelihood.solve_operator_with(
            linear,
            lambda v: self.apply(v, prior, t),
            r,
            tol=tol,
            max_iter=max_iter,
            s_precond=self.preconditioner(like, prior, t),
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

    def preconditioner(self, like: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        """nsr^2 v/(nsr^2 + v), () or (B,), float64."""
        s = squared_nsr(prior.sde, like, t)
        return s * self.prior_variance / (s + self.prior_variance)

    def apply(self, v: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        return expand(self.preconditioner(v, prior, t), v) * v

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        like: Tensor,
        prior: ScoreModel,
        t: Tensor,
        tol: float,
        max_iter: int,
    ) -> SolveReport:
        s = self.preconditioner(like, prior, t)
        return likelihood.solve_operator(linear, r, s, tol=tol, max_iter=max_iter)


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

    def preconditioner(self, like: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        return self.spectrum(like, prior, t)

    def apply(self, v: Tensor, prior: ScoreModel, t: Tensor) -> Tensor:
        return filtered(v, self.spectrum(v, prior, t))

    def solve(
        self,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        like: Tensor,
        prior: ScoreModel,
        t: Tensor,
        tol: float,
        max_iter: int,
    ) -> SolveReport:
        power = self.spectrum(like, prior, t)
        return likelihood.solve_spectral(linear, r, power, tol=tol, max_iter=max_iter)


def _interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation of values (N, M) at x (L,), constant outside the nodes: (L, M)."""
    x = x.clamp(nodes[0], nodes[-1])
    right = torch.searchsorted(nodes, x).clamp(1, max(len(nodes) - 1, 1))
    if len(nodes) == 1:
        return values.expand(len(x), -1)
    left = right - 1
    weight = ((x - nodes[left]) / (nodes[right] - nodes[left]))[:, None]
    return (1 - weight) * values[left] + weight * values[right]
