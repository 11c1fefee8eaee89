"""Levels fitted to a posterior, and levels by an error estimate, against closed forms."""

import itertools
import math

import pytest
import torch

from diffpost.guidance import MomentMatching
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Diagonal
from diffpost.oracles import gaussian_field
from diffpost.oracles.response import response
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import (
    MALA,
    AdaptiveLevels,
    DPMSolver,
    EulerMaruyama,
    FittedLevels,
    Heun,
    OnLevels,
    PredictorCorrector,
    TwistedSMC,
)
from diffpost.samplers.on_levels import fitted
from diffpost.score import GaussianScore
from diffpost.sde import EDM, VP

F64 = torch.float64


@pytest.fixture(scope="module")
def oracle():
    return gaussian_field()


def accepted(report, errors=1):
    """The bounds of tests/test_oracle_field.py, or with more Monte Carlo errors."""
    return report.mean_error <= 1.15 * report.floor and all(
        abs(ratio - 1) <= 0.03 + errors * error
        for ratio, error in zip(report.ratios, report.errors, strict=True)
    )


def errors(levels, variance):
    """Relative errors of the variance of Gaussian modes, without Monte Carlo."""
    model = GaussianScore(torch.zeros_like(variance), var=variance, sde=EDM())
    return response(model, levels)[1] / variance - 1


def scalar_posterior(std, gain, dtype=F64):
    """Of 64 numbers of unit prior variance, half of them seen with noise ``std``; ``gain`` 0 sees nothing."""
    seen = torch.zeros(1, 8, 8, dtype=dtype)
    seen[:, :4] = gain
    prior = GaussianScore(
        torch.zeros(1, 8, 8, dtype=dtype), var=torch.ones(1, 8, 8, dtype=dtype), sde=EDM(1e-4, 80.0)
    )
    y = torch.zeros(1, 8, 8, dtype=dtype)
    return Posterior(prior, Likelihood(y, Diagonal(seen), GaussianNoise(std=std)), MomentMatching())


@pytest.mark.parametrize(
    "inner", [DPMSolver(24, eta=1.0), DPMSolver(12)], ids=["sde, 24", "ode, 12"]
)
def test_the_field_is_met_in_fewer_calls(oracle, inner):
    draws = sample(
        oracle.posterior(), 256, FittedLevels(inner), seed=4, batch_size=64, progress=False
    )
    assert draws.calls == inner.steps
    assert accepted(oracle.report(draws.x)), oracle.report(draws.x)
    assert draws.info["sampler"] == "OnLevels"
    assert draws.info["sampler_arguments"]["pilot_calls"] == 224


@pytest.mark.parametrize("steps", [16, 24])
def test_fitted_levels_have_a_third_of_the_error(oracle, steps):
    """Over the modes of the field, the wide ones and the narrow ones; the grid of the process is the control."""
    variance = torch.logspace(math.log10(0.067), math.log10(0.48), 12, dtype=F64) ** 2
    inner = DPMSolver(steps, eta=1.0)
    levels = FittedLevels(inner).prepared(oracle.posterior())
    usual = float(errors(inner, variance).abs().max())
    assert float(errors(levels, variance).abs().max()) < usual / 3
    # fitted to a posterior whose widest modes are five times narrower, they begin too late for these
    late = [level for level in levels.nsr[1:] if level < levels.nsr[1] / 5]
    narrow = OnLevels(inner, (levels.nsr[0], *late))
    assert float(errors(narrow, variance).abs().max()) > usual / 3


def test_levels_follow_the_scales():
    """From 8 times the widest to 0.05 times the narrowest, of modes of known widths."""
    nsr = torch.logspace(math.log10(80), math.log10(0.002), 60, dtype=F64)
    widths = torch.tensor([0.1, 0.5], dtype=F64)
    answer = widths**2 / (widths**2 + nsr[:, None] ** 2)
    levels = fitted(nsr, answer, 20)
    assert len(levels) == 20 and levels[0] == pytest.approx(80)
    assert levels[1] == pytest.approx(8 * 0.5, rel=0.02)
    assert levels[-1] == pytest.approx(0.05 * 0.1, rel=0.02)
    steps = -torch.tensor(levels[1:], dtype=F64).log().diff()
    assert float(steps.max() / steps.min()) < 1.05
    # nothing to skip: one uniform grid between the ends
    many = fitted(nsr, answer, 2000)  # all different, and the same ends
    assert all(a > b for a, b in itertools.pairwise(many)) and many[1] == levels[1]
    wide = fitted(
        nsr, torch.tensor([1e4, 1e-6]) / (torch.tensor([1e4, 1e-6]) + nsr[:, None] ** 2), 20
    )
    assert wide[0] == pytest.approx(80) and wide[-1] == pytest.approx(0.002)
    steps = -torch.tensor(wide, dtype=F64).log().diff()
    assert float(steps.max() / steps.min()) < 1.05


def test_adaptive_levels_follow_the_tolerance(oracle):
    """A tolerance ten times smaller: more levels, a smaller error; and so on."""
    variance = oracle.variance.flatten().sort().values[::200]
    found = []
    for rtol in (0.2, 0.02, 0.002):
        levels = AdaptiveLevels(DPMSolver(2), rtol=rtol).prepared(oracle.posterior())
        found.append((levels.steps, float(errors(levels, variance).abs().max())))
        # a call for each accepted step and each rejected one, of 4 draws
        assert levels.pilot_calls >= 4 * levels.steps and levels.pilot_calls % 4 == 0
    counts, worst = zip(*found, strict=True)
    assert counts[0] < counts[1] < counts[2]
    assert worst[0] > 2.5 * worst[1] > 2.5 * 2.5 * worst[2]
    assert worst[0] < 0.2 and worst[1] < 0.04


def test_adaptive_draws_meet_the_field(oracle):
    """The draws, and as the negative control those of a tolerance that is no tolerance."""
    good, bad = (
        sample(
            oracle.posterior(),
            128,
            AdaptiveLevels(DPMSolver(2), rtol=rtol),
            seed=4,
            batch_size=128,
            progress=False,
        )
        for rtol in (0.02, 1.0)
    )
    assert good.calls <= 24
    # a level less is a few per cent of the variance
    assert accepted(oracle.report(good.x), 3), oracle.report(good.x)
    assert not accepted(oracle.report(bad.x), 3)


def test_a_stiff_likelihood_takes_more_steps():
    def count(std, gain=1.0):
        adaptive = AdaptiveLevels(DPMSolver(2), rtol=0.01)
        return adaptive.prepared(scalar_posterior(std, gain)).steps

    mild, stiff = count(1.0), count(0.02)
    assert stiff >= mild + 4
    assert abs(mild - count(1.0, gain=0.0)) <= 2  # data that say little are as none


def test_the_batch_split_does_not_matter():
    posterior = scalar_posterior(0.1, 1.0)
    for sampler in (FittedLevels(DPMSolver(8, eta=1.0)), AdaptiveLevels(Heun(2), rtol=0.1)):
        whole = sample(posterior, 5, sampler, seed=3, progress=False).x
        split = sample(posterior, 5, sampler, seed=3, batch_size=2, progress=False).x
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)


def test_rows_and_processes():
    """Data with a batch axis, and a process whose alpha is not 1: the levels are those of EDM."""
    seen = torch.ones(1, 8, 8, dtype=F64)
    y = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    found = []
    for sde in (EDM(0.003, 100.0), VP()):
        prior = GaussianScore(torch.zeros(1, 8, 8, dtype=F64), var=torch.ones_like(seen), sde=sde)
        posterior = Posterior(prior, Likelihood(y, Diagonal(seen), GaussianNoise(std=0.3)))
        ends = {"nsr_min": 0.004, "nsr_max": 90.0}
        for wrapper in (FittedLevels, AdaptiveLevels):
            levels = wrapper(DPMSolver(20, eta=1.0, **ends)).prepared(posterior)
            found.append(torch.tensor(levels.nsr))
        x = sample(posterior, 6, FittedLevels(DPMSolver(20, eta=1.0, **ends)), progress=False).x
        want = y / 1.09
        assert ((x - want).square().mean() / (0.09 / 1.09) - 1).abs() < 0.3
    torch.testing.assert_close(found[0], found[2], rtol=0.02, atol=0)
    torch.testing.assert_close(found[1], found[3], rtol=0.02, atol=0)


def test_given_levels_are_the_samplers_own():
    """On the levels of its own grid a sampler is itself; and a chain may begin with it."""
    posterior = scalar_posterior(0.1, 1.0)
    for inner in (DPMSolver(6, eta=1.0), Heun(6), PredictorCorrector(6)):
        sde = posterior.sde
        nsr = sde.nsr(inner.times(sde)[:-1]).tolist()
        own = sample(posterior, 3, inner, progress=False).x
        given = sample(posterior, 3, OnLevels(inner, tuple(nsr)), progress=False).x
        torch.testing.assert_close(given, own, rtol=1e-7, atol=1e-9)
    chain = MALA(4, start=FittedLevels(DPMSolver(8, eta=1.0)))
    assert bool(sample(posterior, 2, chain, progress=False).x.isfinite().all())


@pytest.mark.parametrize(
    "make",
    [
        lambda: OnLevels(DPMSolver(8), (1.0,)),
        lambda: OnLevels(DPMSolver(8), (1.0, 2.0)),
        lambda: OnLevels(EulerMaruyama(8), (2.0, 1.0)),
        lambda: OnLevels(DPMSolver(8), (200.0, 1.0)).times(EDM()),
        lambda: FittedLevels(TwistedSMC(16, 8)),
        lambda: FittedLevels(DPMSolver(8, rho=7.0)),
        lambda: FittedLevels(DPMSolver(8), draws=1),
        lambda: FittedLevels(DPMSolver(8)).times(EDM()),
        lambda: fitted(torch.tensor([2.0, 1.0]), torch.tensor([[0.1], [math.nan]]), 8),
        lambda: AdaptiveLevels(EulerMaruyama(8)),
        lambda: AdaptiveLevels(DPMSolver(8), rtol=0.0),
        lambda: AdaptiveLevels(DPMSolver(8)).times(EDM()),
        lambda: AdaptiveLevels(DPMSolver(8), rtol=1e-6, max_steps=8).prepared(
            scalar_posterior(0.1, 1.0)
        ),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match=r"expected|more than 8 levels"):
        make()
