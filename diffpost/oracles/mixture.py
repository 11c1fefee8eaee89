r"""The Gaussian mixture of MCGDiff under a linear operator (Cardoso et al. 2023, arXiv:2308.07983, section 5).

Prior sum_k w_k N(m_k, v I), data y = A x + n with n ~ N(0, s^2 I). With K = v A^T (v A A^T + s^2)^-1 the posterior is
the mixture

    sum_k w'_k N(m_k + K (y - A m_k), v (I - K A)),     w'_k ~ w_k N(y; A m_k, v A A^T + s^2).

Many modes far apart, of which the data single out a few: what a guidance makes of p(x_0 | x_t) before the noise
decides between them shows in the weights of the modes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Matrix
from diffpost.posterior import Posterior
from diffpost.score import GaussianMixtureScore
from diffpost.sde import EDM, SDE


@final
@dataclass(frozen=True)
class MixtureOracle:
    """A mixture, data, and the exact posterior, which is a mixture of components of one covariance.

    Attributes:
        prior: the mixture of K components as a score model, images (d,).
        likelihood: the data (m,).
        truth: (d,) what the data are of.
        means: (K, d) the posterior's components.
        weights: (K,) their weights.
        log_evidence: log p(y).
    """

    prior: GaussianMixtureScore
    likelihood: Likelihood
    truth: Tensor
    means: Tensor
    weights: Tensor
    log_evidence: float
    _matrix: Tensor
    _std: float
    _var: float

    def posterior(self, guidance: Guidance | None = None) -> Posterior:
        """The posterior as a score model; None is moment matching."""
        return Posterior(self.prior, self.likelihood, guidance)

    def exact_draws(self, n: int, seed: int = 0) -> Tensor:
        """(n, d) independent draws of the exact posterior, float64."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        m, d = self._matrix.shape
        z = torch.randn(n, d, generator=generator, dtype=torch.float64) * math.sqrt(self._var)
        noise = self._std * torch.randn(n, m, generator=generator, dtype=torch.float64)
        gain = _gain(self._matrix, self._std, self._var)
        return self.means[component] + z - (z @ self._matrix.T + noise) @ gain.T

    def nearest(self, x: Tensor) -> Tensor:
        """The component whose mean is nearest, (n, d) to (n,)."""
        return torch.cdist(x.double(), self.means).argmin(1)


def mixture_posterior(
    prior: GaussianMixtureScore, matrix: Tensor, y: Tensor, std: float, var: float, truth: Tensor
) -> MixtureOracle:
    """The exact posterior of a mixture of components N(m_k, var I) under y = matrix x + noise of ``std``."""
    matrix, y = matrix.double(), y.double()
    means = prior.means.double()
    cov = var * matrix @ matrix.T + std**2 * torch.eye(len(y), dtype=torch.float64)
    residual = y - means @ matrix.T
    logits = torch.distributions.MultivariateNormal(torch.zeros_like(y), cov).log_prob(residual)
    logits = logits + (prior.weights / prior.weights.sum()).log()
    dtype = prior.dtype
    return MixtureOracle(
        prior=prior,
        likelihood=Likelihood(y.to(dtype), Matrix(matrix.to(dtype)), GaussianNoise(std=std)),
        truth=truth,
        means=means + residual @ _gain(matrix, std, var).T,
        weights=logits.softmax(0),
        log_evidence=float(logits.logsumexp(0)),
        _matrix=matrix,
        _std=std,
        _var=var,
    )


def gaussian_mixture(
    size: int = 8,
    data: int = 1,
    seed: int = 0,
    sde: SDE | None = None,
    dtype: torch.dtype = torch.float64,
) -> MixtureOracle:
    """25 components of unit variance at (8 i, 8 j, 8 i, 8 j, ...), i, j in -2...2, and random data.

    The weights are squares of normals; A = U diag(sorted U(0, 1)) V^T with the singular vectors of a normal
    matrix; the noise has the standard deviation U(0, 1) times the largest singular value.

    Args:
        size: d, even.
        data: m, at most d.
        seed: of the problem.
        sde: process of the prior; None is an EDM from 0.001 to 100 sqrt(d), well beyond the modes' spread.
        dtype: of prior and data.

    Raises:
        ValueError: d odd, or m not within 1 to d.
    """
    if size % 2 or not 1 <= data <= size:
        raise ValueError(
            f"gaussian_mixture(size={size}, data={data}): expected an even size, and 1 to that many data."
        )
    generator = torch.Generator().manual_seed(seed)

    def normals(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniforms(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    corners = [(8.0 * i, 8.0 * j) for i in range(-2, 3) for j in range(-2, 3)]
    means = torch.tensor(corners, dtype=torch.float64).repeat(1, size // 2)
    weights = normals(len(means)).square()
    u, _, v = torch.linalg.svd(normals(data, size), full_matrices=False)
    singular = uniforms(data).sort(descending=True).values
    matrix = u @ torch.diag(singular) @ v
    std = float(uniforms(1)[0] * singular.max())
    component = int(torch.multinomial(weights, 1, generator=generator))
    truth = means[component] + normals(size)
    y = matrix @ truth + std * normals(data)
    process = EDM(1e-3, 100 * math.sqrt(size)) if sde is None else sde
    prior = GaussianMixtureScore(means.to(dtype), weights, 1.0, process)
    return mixture_posterior(prior, matrix, y, std, 1.0, truth)


def _gain(matrix: Tensor, std: float, var: float) -> Tensor:
    """K = v A^T (v A A^T + s^2)^-1, (d, m)."""
    cov = var * matrix @ matrix.T + std**2 * torch.eye(len(matrix), dtype=torch.float64)
    return var * torch.linalg.solve(cov, matrix).T
