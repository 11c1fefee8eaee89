"""A Gaussian problem whose posterior is known, and the ways in which a sampler may get it wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

# Each test of a null in this folder fails for fresh seeds with this probability. There are some 40, and what is
# asked of the power leaves 0.3% for all controls together.
ALARM = 5e-5


@dataclass(frozen=True)
class Problem:
    """x ~ N(0, 1) in d dimensions, y = A x + 0.5 n; draws of the posterior, or what is handed back."""

    truths: Tensor
    data: Tensor
    samples: Tensor
    mean: Tensor
    covariance: Tensor
    operator: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """Exact, up to a constant; x is (sims, d) or (sims, draws, d)."""
        e = x - (self.mean if x.ndim == 2 else self.mean[:, None])
        return -0.5 * torch.einsum("...i,ij,...j", e, torch.linalg.inv(self.covariance), e)


# Faults: "prior", "wide" and "narrow" by 20%, "biased" by 0.3 sigma in every entry, "copies" (each draw
# eight times).
def make(fault: str = "", sims: int = 300, draws: int = 64, d: int = 4, seed: int = 0) -> Problem:
    fixed = torch.Generator().manual_seed(99)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    a = torch.randn(d, d, generator=fixed, dtype=torch.float64) / math.sqrt(d)
    x = normal(sims, d)
    y = x @ a.T + 0.5 * normal(sims, d)
    covariance = torch.linalg.inv(torch.eye(d, dtype=torch.float64) + a.T @ a / 0.25)
    mean = y @ a @ covariance / 0.25
    z = normal(sims, draws, d)
    width = {"wide": 1.2, "narrow": 0.8}.get(fault, 1.0)
    samples = mean[:, None] + width * z @ torch.linalg.cholesky(covariance).T
    if fault == "prior":
        samples = z
    elif fault == "biased":
        samples = samples + 0.3 * covariance.diagonal().sqrt()
    elif fault == "copies":
        samples = samples[:, : draws // 8].repeat_interleave(8, 1)
    return Problem(x, y, samples, mean, covariance, a)


@pytest.fixture(scope="session")
def problem() -> Callable[..., Problem]:
    return make


@pytest.fixture(scope="session")
def uniform_p() -> Callable[..., None]:
    """That p-values of independent repeats are uniform; with fewer small ones allowed if told."""

    def check(values: list[float], conservative: bool = False) -> None:
        p = np.asarray(values)
        found = stats.kstest(
            p, "uniform", alternative="greater" if conservative else "two-sided"
        ).pvalue
        small = stats.binomtest(int((p <= 0.05).sum()), len(p), 0.05, alternative="greater").pvalue
        assert min(found, small) > ALARM / 2, f"p-values that are not uniform: {np.sort(p)}"

    return check
