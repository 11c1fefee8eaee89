"""The variance of every sampler on a Gaussian, without Monte Carlo.

On a Gaussian prior each sampler is an affine map of the normals that it draws, so its output's mean
and variance follow exactly from the response to one unit normal at a time.
"""

import pytest
import torch

from diffpost.samplers import DPMSolver, EulerMaruyama, Heun, State
from diffpost.score import GaussianScore
from diffpost.sde import EDM, VE, VP

VARIANCES = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64)
MEAN = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)


def run(sampler, model, n, noise):
    state = sampler.init(model, noise, n)
    times = sampler.times(model.sde)
    for i in range(sampler.steps):
        assert isinstance(state, State)
        state = sampler.step(model, state, times[i], times[i + 1], noise)
    return state.x


def exact_moments(sampler, sde, scale=1.0):
    """Mean and variance of the draws of N(MEAN, VARIANCES), from unit impulses of the noise."""
    model = GaussianScore(MEAN, var=VARIANCES, sde=sde)
    drawn = [0]

    def silent(like, stream=0):
        drawn[0] += 1
        return torch.zeros_like(like)

    run(sampler, model, 1, silent)
    total = drawn[0]
    drawn[0] = 0

    def impulse(like, stream=0):
        drawn[0] += 1
        out = torch.zeros_like(like)
        out[drawn[0]] = scale
        return out

    x = run(sampler, model, total + 1, impulse)
    return x[0], (x[1:] - x[0]).square().sum(0)


# largest relative error of the variance, and of the mean in units of the standard deviation of the
# posterior: the mean keeps |MEAN|/nsr_max of the start unless noise is injected
CASES = [
    (Heun(32), 0.004, 0.03),
    (Heun(64), 0.002, 0.03),
    (DPMSolver(32), 0.006, 0.03),
    (DPMSolver(64), 0.003, 0.03),
    (DPMSolver(32, order=2), 0.007, 0.03),
    (DPMSolver(64, order=2), 0.003, 0.03),
    (DPMSolver(32, eta=1.0), 0.010, 0.001),
    (DPMSolver(64, eta=1.0), 0.002, 0.001),
    (DPMSolver(32, eta=0.5), 0.005, 0.015),
    (DPMSolver(64, eta=0.5), 0.003, 0.015),
    (DPMSolver(64, order=2, eta=1.0), 0.007, 0.001),
    (DPMSolver(64, eta=1.0, corrector=False), 0.012, 0.001),
    (EulerMaruyama(256), 0.05, 0.001),
    (Heun(32, churn=3.2), 0.015, 0.02),
]


@pytest.mark.parametrize(("sampler", "spread", "shift"), CASES, ids=lambda c: str(c)[:60])
def test_moments(sampler, spread, shift):
    mean, variance = exact_moments(sampler, EDM())
    assert (variance / VARIANCES - 1).abs().max() < spread
    assert ((mean - MEAN) / VARIANCES.sqrt()).abs().max() < shift


def test_scaled_noise_is_noticed():
    """The negative control: noise of 0.9 times the right amplitude."""
    for sampler in (Heun(32), DPMSolver(32), DPMSolver(32, eta=1.0)):
        _, variance = exact_moments(sampler, EDM(), scale=0.9)
        assert (variance / VARIANCES - 0.81).abs().max() < 0.01


@pytest.mark.parametrize(
    "sampler",
    [Heun, DPMSolver, lambda n, **k: DPMSolver(n, order=2, eta=1.0, **k)],
    ids=["heun", "dpm3", "dpm2 sde"],
)
def test_second_order(sampler):
    """Halving the steps of the grid divides the error of the variance by about four or more."""
    ends = {"nsr_min": 1e-4, "nsr_max": 1e3}
    errors = [
        float(
            (exact_moments(sampler(n, **ends), EDM(1e-5, 1e4))[1] / VARIANCES - 1)[1:].abs().max()
        )
        for n in (65, 129)
    ]
    assert errors[1] < errors[0] / 3.2


@pytest.mark.parametrize("sde", [VE(1e-2, 100.0), VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("sampler", [Heun, DPMSolver], ids=["heun", "dpm"])
def test_process_does_not_matter(sampler, sde):
    """In u and nsr every process is the same, so the same grid gives the same moments."""
    same = sampler(24, nsr_min=0.02, nsr_max=60.0)
    for a, b in zip(exact_moments(same, EDM()), exact_moments(same, sde), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_ends_of_the_grid():
    """What the docs say of the ends: v/(v + nsr_max^2) missing at the start, nsr_min^2/v at the
    end.
    """
    _, variance = exact_moments(DPMSolver(256, nsr_max=10.0), EDM())
    torch.testing.assert_close(variance / VARIANCES, 100 / (VARIANCES + 100), rtol=2e-3, atol=0)
    _, variance = exact_moments(DPMSolver(256, nsr_min=0.05), EDM())
    torch.testing.assert_close(
        variance / VARIANCES, VARIANCES / (VARIANCES + 0.0025), rtol=3e-3, atol=0
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: Heun(1),
        lambda: Heun(8, churn=-1.0),
        lambda: Heun(8, churn_range=(2.0, 1.0)),
        lambda: DPMSolver(8, order=4),
        lambda: DPMSolver(8, eta=1.5),
        lambda: EulerMaruyama(True),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="expected"):
        make()
