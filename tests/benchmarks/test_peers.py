"""One guided denoiser, and one posterior draw, beside azula, score_models and deepinv: the same network, data and steps.

    pytest tests/benchmarks/test_peers.py --benchmark-only

`extra_info` holds the time of the peer over ours, medians of pairs in one process, and the evaluations and VJPs behind it.
Errors are not equal here; examples/peers_at_equal_error.py compares at equal error. Nothing here asserts a time.
"""

from __future__ import annotations

import math

import pytest
import torch

import diffpost as dp
from diffpost.jobs.instruments import gaussian_psf

pytestmark = pytest.mark.usefixtures("asked_for")

STEPS, BATCH, STD = 6, 2, 0.03
METHODS = {
    "azula MMPS": ("azula", {"kind": "MMPS"}),
    "azula JFPS": ("azula", {"kind": "JFPS", "iterations": 16}),
    "azula DPS": ("azula", {"kind": "DPS"}),
    "azula PGDM": ("azula", {"kind": "PGDM", "ridge": 0.01}),
    "score_models, convolved": ("score_models", {}),
    "deepinv moment matching": ("deepinv", {"kind": "MomentMatching"}),
    "deepinv PiGDM": ("deepinv", {"kind": "PiGDM"}),
    "deepinv DPS": ("deepinv", {"kind": "DPS"}),
    "deepinv DiffPIR": ("deepinv", {"kind": "DiffPIR"}),
}


@pytest.fixture(scope="module")
def contenders(example):
    example("known_posteriors")
    return example("contenders")


@pytest.fixture(scope="module")
def problem(contenders):
    """A galaxy of galaxies-32 under a PSF."""
    prior = dp.optimize(dp.load_prior("galaxies-32"))
    truth = dp.sample(prior, 1, dp.DPMSolver(8), seed=1, progress=False).x
    operator = dp.Convolve(gaussian_psf(1.5))
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    y = (operator(truth) + STD * noise.to(truth))[0]
    likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=STD))
    return contenders.Problem(prior, likelihood, STD, prior.sde.nsr_range, 0.02, 2.0)


@pytest.mark.benchmark(group="a posterior's denoiser")
@pytest.mark.parametrize("nsr", [0.05, 1.0])
@pytest.mark.parametrize("iterations", [1, 4])
def test_denoiser_of_azula(benchmark, ratio, contenders, problem, nsr, iterations):
    pytest.importorskip("azula")
    view = contenders.View(problem)
    low, high = problem.ends
    denoiser = contenders.azula_denoiser(view, problem.ends)
    guided = contenders.azula_mmps(view, denoiser, STD, iterations)
    posterior = dp.Posterior(problem.prior, problem.likelihood)
    x = torch.randn(BATCH, view.size)
    place = torch.tensor(math.log(nsr / low) / math.log(high / low))
    t = problem.prior.sde.t_of_nsr(torch.tensor(nsr, dtype=torch.float64))

    def ours():
        with torch.no_grad():
            return posterior.denoise(view.image(x), t)

    benchmark.extra_info["azula / ours"] = round(ratio(lambda: guided(x, place), ours), 2)
    assert benchmark.pedantic(ours, rounds=3, warmup_rounds=1).isfinite().all()


@pytest.mark.benchmark(group="a score")
def test_score_of_score_models(benchmark, ratio, contenders, problem):
    """score_models around the network that ours calls: what the library itself adds."""
    pytest.importorskip("score_models")
    view = contenders.View(problem)
    model = contenders.score_model(view, problem.ends)
    x, place = torch.randn(BATCH, view.size), torch.full((BATCH,), 0.5)
    nsr = model.sde.sigma(place.double())[0]
    t = problem.prior.sde.t_of_nsr(nsr)

    def theirs():
        with torch.no_grad():
            return model.score(place, x)

    def ours():
        with torch.no_grad():
            return problem.prior.score(view.image(x), t)

    benchmark.extra_info["score_models / ours"] = round(ratio(theirs, ours), 2)
    found = benchmark.pedantic(ours, rounds=3, warmup_rounds=1).flatten(1)
    assert (found - theirs()).norm() < 1e-3 * found.norm()


@pytest.mark.benchmark(group=f"{BATCH} draws in {STEPS} steps")
@pytest.mark.parametrize("name", METHODS)
def test_draws(benchmark, ratio, contenders, problem, name):
    library, parameters = METHODS[name]
    pytest.importorskip(library)
    method = getattr(contenders, library)

    def theirs():
        return method(problem, STEPS, 1, BATCH, **parameters)

    def ours():
        return contenders.ours(problem, STEPS, 1, BATCH)

    benchmark.extra_info[f"{library} / ours"] = round(ratio(theirs, ours), 2)
    peer, own = theirs(), benchmark.pedantic(ours, rounds=1, warmup_rounds=1)
    for label, draws in ((library, peer), ("ours", own)):
        benchmark.extra_info[f"calls + VJPs, {label}"] = f"{draws.calls:.0f} + {draws.vjps:.0f}"
    assert own.x.isfinite().all()
