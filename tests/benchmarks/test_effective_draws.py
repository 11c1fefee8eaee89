"""Seconds per effective draw, of particles and of moment matching ended by MALA, on a small mixture.

Draws are effective as far as they estimate a mean as well as independent exact draws: with the exact variance v and the
mean squared error e over groups of draws, a group counts for v/e of them. That holds both the bias of a method and the
dependence of particles against it. Run it by

    pytest tests/benchmarks/test_effective_draws.py --benchmark-only

and read `extra_info`, which has the ratio to particles. Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import torch

import diffpost as dp
from diffpost.oracles import gaussian_mixture

GROUPS, PARTICLES, CALLS = 24, 64, 60
METHODS = {
    "TwistedSMC": (None, dp.TwistedSMC(PARTICLES, CALLS)),
    "MomentMatching + MALA": (
        dp.MomentMatching(),
        dp.MALA(5, start=dp.DPMSolver(CALLS - 20, order=2, eta=1.0)),
    ),
}
seconds: dict[str, float] = {}


def effective(oracle, x, weights):
    """Effective draws of a group, for the mean along the posterior's widest direction."""
    exact = oracle.exact_draws(20_000, seed=5)
    centred = exact - exact.mean(0)
    direction = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -1]
    values = (x.double() @ direction).reshape(GROUPS, PARTICLES)
    share = weights.reshape(GROUPS, PARTICLES)
    means = (values * share).sum(1) / share.sum(1)
    error = (means - float((exact @ direction).mean())).square().mean()
    return float((centred @ direction).square().mean() / error)


@pytest.mark.benchmark(group=f"{GROUPS * PARTICLES} draws of a mixture, {CALLS} calls")
@pytest.mark.parametrize("method", list(METHODS))
def test_seconds_per_effective_draw(benchmark, method):
    oracle = gaussian_mixture(8, 2, seed=3)
    guidance, sampler = METHODS[method]
    posterior = oracle.posterior(guidance)

    def call():
        return dp.sample(posterior, GROUPS * PARTICLES, sampler, seed=0, progress=False)

    draws = benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1)
    count = effective(oracle, draws.x, draws.weights)
    assert 0 < count < 3 * PARTICLES
    info = benchmark.extra_info
    info["denoiser calls"], info["VJPs"] = draws.calls, draws.vjps
    info[f"effective draws of {PARTICLES}"] = round(count, 2)
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds[method] = benchmark.stats.stats.mean / (GROUPS * count)
        info["seconds per effective draw"] = seconds[method]
        if "TwistedSMC" in seconds:
            info["times those of TwistedSMC"] = seconds[method] / seconds["TwistedSMC"]
