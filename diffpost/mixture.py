r"""Gaussian mixtures seen through noise: the sums over components.

A mixture sum_k w_k N(m_k, v_k) becomes, at alpha and sigma, one of N(alpha m_k, s_k) with
s_k = alpha^2 v_k + sigma^2.  Everything follows from the responsibilities r_k = p(k | x), a softmax
of

    log w_k - |x - alpha m_k|^2/(2 s_k) - log(s_k)/2 (summed over pixels),

and from sums over k weighted by them.  `diffpost.score.GaussianMixtureScore` is the public face.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

__all__ = ["Mixture"]


@final
class Mixture:
    """One evaluation of a mixture at u = x - alpha centre, (B, d), float64.

    Where components are isotropic (var (K, 1)) all sums over them are matrix products; otherwise
    arrays of (B, K, d) are made.
    """

    def __init__(
        self,
        u: Tensor,
        means: Tensor,
        var: Tensor,
        log_weights: Tensor,
        alpha: Tensor,
        sigma2: Tensor,
    ) -> None:
        self.u, self.means, self.var, self.alpha, self.sigma2 = u, means, var, alpha, sigma2
        total = alpha**2 * var + sigma2  # (1 or B, K, 1 or d)
        self.precision = 1 / total
        self.isotropic = var.shape[1] == 1
        a = alpha[:, 0]
        if self.isotropic:
            square = u.square().sum(1, keepdim=True) - 2 * a * (u @ means.T)
            square = square + a**2 * means.square().sum(1)
            chi2 = self.precision[..., 0] * square
            logdet = u.shape[1] * total[..., 0].log()
        else:
            self.pull = self.precision * (u[:, None] - alpha * means)
            chi2 = (self.pull * (u[:, None] - alpha * means)).sum(2)
            logdet = total.log().sum(2)
        self.logits = log_weights - 0.5 * (chi2 + logdet)
        self.r = self.logits.softmax(1)

    def _pulled(self, c: Tensor) -> Tensor:
        """sum_k c_k (u - alpha m_k)/s_k, (B, d), for c (B, K)."""
        if not self.isotropic:
            return torch.einsum("bk,bkd->bd", c, self.pull)
        c = c * self.precision[..., 0]
        return c.sum(1, keepdim=True) * self.u - self.alpha[:, 0] * (c @ self.means)

    def _averaged(self, values: Tensor, v: Tensor | None = None) -> Tensor:
        """sum_k r_k values_k [m_k], for values (1 or B, K, 1 or d); times v where it is given."""
        if self.isotropic:
            c = self.r * values[..., 0]
            return c @ self.means if v is None else c.sum(1, keepdim=True) * v
        if v is None:
            return (self.r[..., None] * values * self.means).sum(1)
        return (self.r[..., None] * values).sum(1) * v

    def mean(self) -> Tensor:
        """E[x_0 | x_t] - centre: sum_k r_k (sigma^2 m_k + alpha v_k u)/s_k."""
        gain = self.alpha * self.var * self.precision
        return self._averaged(self.sigma2 * self.precision) + self._averaged(gain, self.u)

    def score(self) -> Tensor:
        return -self._pulled(self.r)

    def jacobian(self, v: Tensor) -> Tensor:
        """J v: the sum in the class's equation with sum_k r_k (g_k - score) = 0 used once."""
        if self.isotropic:
            along = (self.u * v).sum(1, keepdim=True) - self.alpha[:, 0] * (v @ self.means.T)
            along = self.precision[..., 0] * along
        else:
            along = torch.einsum("bkd,bd->bk", self.pull, v)
        c = self.r * ((self.r * along).sum(1, keepdim=True) - along)
        gain = self.alpha * self.var * self.precision
        spread = (self.sigma2 / self.alpha)[:, 0] * self._pulled(c)
        return self._averaged(gain, v) - spread
