"""Posterior predictive chi^2: uniform for exact draws, small where the draws miss the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost import diagnostics as dg


def likelihoods(p, rows: bool):
    operator, noise = dp.Matrix(p.operator), dp.GaussianNoise(std=0.5)
    if rows:
        return dp.Likelihood(p.data, operator, noise, batched=True)
    return [dp.Likelihood(y, operator, noise) for y in p.data]


def test_p_values_of_single_draws_are_uniform_and_of_many_conservative(problem, uniform_p) -> None:
    p = problem(sims=200, draws=16, seed=20)
    found = [
        dg.predictive_chi2(dp.Samples(x), like, replicas=400, seed=i)
        for i, (x, like) in enumerate(zip(p.samples, likelihoods(p, rows=False), strict=True))
    ]
    uniform_p([float(f.draw_p_values[0]) for f in found])
    small = np.mean([f.p_value <= 0.05 for f in found])
    assert small < 0.05 + 4 * 0.0154
    one = found[0]
    assert one.values.shape == one.draw_p_values.shape == (16,) and one.replicated.shape == (400,)
    # chi^2 of 4 data: mean 4, variance 8.
    pooled = torch.cat([f.replicated for f in found])
    assert one.expected == 4 and abs(float(pooled.mean()) - 4) < 4 * (8 / len(pooled)) ** 0.5


def test_rows_of_data_are_tested_together(problem, uniform_p) -> None:
    """One draw for each of 100 data sets; the prior handed back, and a posterior that is too wide."""
    found: dict[str, list[float]] = {"": [], "prior": [], "wide": []}
    for fault, values in found.items():
        for seed in range(25):
            p = problem(fault, sims=100, draws=1, seed=seed)
            result = dg.predictive_chi2(
                dp.Samples(p.samples[:, 0]), likelihoods(p, rows=True), replicas=200, seed=seed
            )
            assert result.replicated.shape == (200, 100)
            values.append(result.p_value)
    uniform_p(found[""])
    assert np.mean(np.array(found["prior"]) <= 0.01) == 1.0
    # As the docstring says, a wrong width is hardly seen; coverage sees it.
    assert np.mean(np.array(found["wide"]) <= 0.01) < 0.5


def test_the_prior_and_a_wrong_noise_are_found_in_one_data_set() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 8, 8, generator=generator, dtype=torch.float64)
    y = truth + 0.5 * torch.randn(1, 8, 8, generator=generator, dtype=torch.float64)
    like = dp.Likelihood(y, dp.Identity(), dp.GaussianNoise(std=0.5))
    z = torch.randn(100, 1, 8, 8, generator=generator, dtype=torch.float64)
    exact = 0.8 * y + 0.2**0.5 * z
    assert dg.predictive_chi2(dp.Samples(exact), like).p_value > 2e-4
    prior = dg.predictive_chi2(dp.Samples(z), like)
    assert prior.upper < 1e-3 and prior.p_value < 2e-3
    # Noise that is half as large as said: the draws' residuals are too small for it.
    quiet = dp.Likelihood(y, dp.Identity(), dp.GaussianNoise(std=2.0))
    assert dg.predictive_chi2(dp.Samples(exact), quiet).upper > 0.999
    # Importance weights choose the draws that fit.
    log_weights = torch.full((200,), -torch.inf).double()
    log_weights[:100] = 0.0
    both = dp.Samples(torch.cat([exact, z]), log_weights=log_weights)
    assert dg.predictive_chi2(both, like).p_value > 2e-4


def test_masked_data_do_not_count() -> None:
    std = torch.full((1, 8, 8), 0.5, dtype=torch.float64)
    std[0, :4] = torch.inf
    like = dp.Likelihood(torch.zeros(1, 8, 8).double(), dp.Identity(), dp.GaussianNoise(std=std))
    result = dg.predictive_chi2(dp.Samples(torch.zeros(3, 1, 8, 8).double()), like)
    assert (
        result.expected == 32 and abs(float(result.replicated.mean()) - 32) < 4 * (64 / 1000) ** 0.5
    )
    with pytest.raises(ValueError, match="replicas"):
        dg.predictive_chi2(dp.Samples(torch.zeros(3, 1, 8, 8)), like, replicas=0)
