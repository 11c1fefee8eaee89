r"""Densities and draws from a score: the probability flow.

Blurred by a Gaussian of growing covariance K + tau, a density p_tau obeys the heat equation, and the points of

    dr/dtau = -1/2 s_tau(r),       d log p_tau(r)/dtau = 1/2 tr ds_tau/dr

keep their share of it (Song et al. 2021, arXiv:2011.13456, equations 39 and 13). Forward they carry r to where p is
Gaussian and log p is known; backward they turn normals into draws. Here in w, tau = c (e^(2 w) - 1) with c the smallest
variance in K, by the classical Runge-Kutta rule, whose error falls as the fourth power of the step. The trace is exact,
a derivative for each datum, or Hutchinson's (1989): z^T (ds/dr) z over signs z, the same along all of the flow
(Grathwohl et al. 2018, arXiv:1810.01367).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffpost.random import uniform

__all__ = ["Flow", "Perturbation"]

_STREAM = 24_400


@final
@dataclass(frozen=True, eq=False)
class Perturbation:
    """A Gaussian of covariance diag(values), over data or over the modes of their FFT2.

    Attributes:
        values: float64, broadcastable to (B, *data); infinite where a datum is masked. Not negative.
        spectral: whether they belong to modes.
    """

    values: Tensor
    spectral: bool = False

    @staticmethod
    def white(variance: float | Tensor) -> Perturbation:
        """The same everywhere."""
        return Perturbation(torch.as_tensor(variance, dtype=torch.float64))

    @property
    def is_white(self) -> bool:
        return self.values.numel() == 1

    @property
    def masked(self) -> Tensor | None:
        """Which data are masked, or None."""
        gone = self.values.isinf()
        return gone if not self.spectral and bool(gone.any()) else None

    def plus(self, other: Perturbation) -> Perturbation:
        """The sum of both; where one is over data and the other over modes, the second's mean variance."""
        a, b = self, other
        if a.is_white or b.is_white or a.spectral == b.spectral:
            values = a.values + b.values.to(a.values.device)
            return Perturbation(
                values, (a.spectral and not a.is_white) or (b.spectral and not b.is_white)
            )
        data, modes = (b, a) if a.spectral else (a, b)
        return Perturbation(data.values + modes.values.mean((-2, -1), keepdim=True))

    def floored(self, least: float) -> Perturbation:
        """With no value below ``least``."""
        return Perturbation(self.values.clamp_min(least), self.spectral)

    def grown(self, tau: Tensor) -> Perturbation:
        return Perturbation(self.values + tau, self.spectral)

    def ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and largest finite value of each entry of (B, *data): (1,) or (B,)."""
        values = self.values.to(like.device)
        rows = values.reshape(1, -1) if values.ndim < like.ndim else values.flatten(1)
        seen = rows.isfinite()
        least = torch.where(seen, rows, math.inf).amin(1)
        most = torch.where(seen, rows, 0.0).amax(1)
        # an entry of which nothing is seen needs some level all the same
        blind = ~seen.any(1)
        return torch.where(blind, 1.0, least), torch.where(blind, 1.0, most)


@final
class Flow:
    """The flow of a noise from covariance K to a hot end, and back.

    Args:
        score: score(r, K), (B, *data) to (B, *data).
        level: K at the cold end; positive.
        hottest: variance to which the smallest of K grows.
        steps: Runge-Kutta steps.
    """

    def __init__(
        self,
        score: Callable[[Tensor, Perturbation], Tensor],
        level: Perturbation,
        hottest: float,
        steps: int,
    ) -> None:
        self._score, self._level, self._steps = score, level, steps
        self._least = float(torch.where(level.values.isfinite(), level.values, math.inf).min())
        if not 0 < self._least < math.inf:
            self._least = 1.0  # everything is masked
        self._length = 0.5 * math.log(max(hottest / self._least, 1 + 1e-9))

    def _tau(self, w: float) -> float:
        return self._least * math.expm1(2 * w)

    def _rate(self, w: float) -> float:
        return self._least * math.exp(2 * w)

    @property
    def hottest(self) -> Perturbation:
        """K at the hot end."""
        return self._level.grown(torch.tensor(self._tau(self._length), dtype=torch.float64))

    def _slope(self, r: Tensor, w: float) -> Tensor:
        level = self._level.grown(torch.tensor(self._tau(w), dtype=torch.float64))
        return -self._rate(w) * self._score(r, level)

    def backward(self, z: Tensor, mean: Tensor | float = 0.0) -> Tensor:
        """Draws at the cold end from normals z (B, *data), and the mean of the noise."""
        hot = self.hottest.values
        gone = self._level.masked
        if self._level.spectral:
            x = torch.fft.ifft2(torch.fft.fft2(z) * hot.sqrt().to(z)).real
        else:
            x = z * hot.sqrt().to(z)
        x = x + mean
        if gone is not None:
            x = x.masked_fill(gone.to(z.device), 0.0)
        h = -self._length / self._steps
        with torch.no_grad():
            for i in range(self._steps):
                x, _ = _runge_kutta(self._alone, x, self._length + i * h, h)
        return x

    def forward(self, r: Tensor, probes: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """From r at the cold end to the hot one.

        Args:
            r: (B, *data).
            probes: of Hutchinson's trace; None takes the trace exactly.
            seed: of the probes, which all entries share.

        Returns:
            The end (B, *data), log p(r) - log p_hot(end), and the standard error of that by the probes; (B,) float64.
        """
        vectors = self._vectors(r, probes, seed)
        h = self._length / self._steps
        found = torch.zeros(len(vectors), len(r), dtype=torch.float64, device=r.device)
        for i in range(self._steps):
            r, more = _runge_kutta(lambda x, w: self._both(x, w, vectors), r, i * h, h)
            found = found + more
        if probes is None:
            total = found.sum(0)
            return r, total, torch.zeros_like(total)
        return r, found.mean(0), found.std(0) / math.sqrt(probes)

    def _alone(self, r: Tensor, w: float) -> tuple[Tensor, float]:
        return self._slope(r, w), 0.0

    def _both(self, r: Tensor, w: float, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """dr/dw, and v^T (d/dr) dr/dw v for each vector, (V, B): by that log p falls."""
        with torch.enable_grad():
            leaf = r.detach().requires_grad_()
            slope = self._slope(leaf, w)
            wide = vectors[:, None].expand(len(vectors), *slope.shape)
            (products,) = torch.autograd.grad(slope, leaf, wide, is_grads_batched=True)
        terms = (vectors[:, None] * products).double().flatten(2).sum(2)
        return slope.detach(), terms

    @staticmethod
    def _vectors(r: Tensor, probes: int | None, seed: int) -> Tensor:
        shape = tuple(r.shape[1:])
        if probes is None:
            return torch.eye(math.prod(shape), dtype=r.dtype, device=r.device).reshape(-1, *shape)
        u = uniform(seed, torch.arange(probes), 0, shape, torch.float64, stream=_STREAM)
        return torch.where(u < 0.5, -1.0, 1.0).to(r)


def _runge_kutta(
    rates: Callable[[Tensor, float], tuple[Tensor, Any]], r: Tensor, w: float, h: float
) -> tuple[Tensor, Any]:
    """r after a step h, and the integral over it of the other rate; rates(r, w) gives both."""
    k1, d1 = rates(r, w)
    k2, d2 = rates(r + 0.5 * h * k1, w + 0.5 * h)
    k3, d3 = rates(r + 0.5 * h * k2, w + 0.5 * h)
    k4, d4 = rates(r + h * k3, w + h)
    return r + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
