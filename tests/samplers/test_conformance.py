"""What every sampler must pass; a new one is added to CASES and nowhere else."""

import dataclasses
import math

import pytest
import torch

import diffpost.samplers as samplers
from diffpost.instrument import NonFiniteError
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, EulerMaruyama, Heun, PredictorCorrector, State
from diffpost.samplers.base import CLEAN
from diffpost.score import GaussianMixtureScore, GaussianScore, ScoreModel
from diffpost.sde import EDM, TSVE, VE, VP

SHAPE = (1, 8, 8)
PIXELS = math.prod(SHAPE)


@dataclasses.dataclass(frozen=True)
class Case:
    """A sampler, its evaluations per draw, and its own error of variance and mean (in standard
    deviations).
    """

    sampler: samplers.Sampler
    calls: int
    variance_bias: float
    mean_bias: float


CASES = [
    Case(EulerMaruyama(200), 200, 0.06, 0.02),
    Case(PredictorCorrector(100), 199, 0.10, 0.02),
    Case(Heun(32), 63, 0.005, 0.03),
    Case(Heun(32, churn=4.0), 63, 0.015, 0.03),
    Case(DPMSolver(32, order=2), 32, 0.01, 0.03),
    Case(DPMSolver(32), 32, 0.01, 0.03),
    Case(DPMSolver(32, eta=1.0), 32, 0.015, 0.01),
    Case(DPMSolver(48, order=2, eta=0.5, corrector=False), 48, 0.015, 0.02),
]
SHORT = [dataclasses.replace(c.sampler, steps=5) for c in CASES]
NAMES = [repr(c.sampler).replace("nsr_min=None, nsr_max=None, rho=None, ", "") for c in CASES]
every_case = pytest.mark.parametrize("case", CASES, ids=NAMES)
every_sampler = pytest.mark.parametrize("sampler", SHORT, ids=NAMES)


def gaussian(sde=None, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    mean = torch.randn(SHAPE, generator=g).to(dtype)
    var = torch.exp(torch.empty(SHAPE).uniform_(math.log(0.05), math.log(4.0), generator=g)).to(
        dtype
    )
    return GaussianScore(mean, var=var, sde=sde or EDM(0.005, 50.0)), mean, var


def accepts_gaussian(x, mean, var, variance_bias, mean_bias):
    """The test of exactness: mean and variance over pixels within the stated bias and 4.5 Monte
    Carlo errors.
    """
    n = len(x)
    ratio = (x.var(0) / var).mean()
    ratio_error = math.sqrt(2 / ((n - 1) * PIXELS))
    shift = ((x.mean(0) - mean) / var.sqrt()).square().mean()
    floor, floor_error = 1 / n, math.sqrt(2 / PIXELS) / n
    return bool(
        (ratio - 1).abs() < variance_bias + 4.5 * ratio_error
        and shift < mean_bias**2 + floor + 4.5 * floor_error
    )


@every_case
def test_gaussian(case):
    model, mean, var = gaussian()
    x = sample(model, 1024, case.sampler, seed=3, progress=False).x
    assert accepts_gaussian(x, mean, var, case.variance_bias, case.mean_bias)


class Quieter(samplers.Sampler):
    """A wrong sampler: every normal of the wrapped one is multiplied by 0.9."""

    def __init__(self, inner):
        object.__setattr__(self, "inner", inner)
        for f in dataclasses.fields(samplers.Sampler):
            object.__setattr__(self, f.name, getattr(inner, f.name))

    def init(self, model, noise, n):
        return self.inner.init(model, self.quiet(noise), n)

    def step(self, model, state, t, s, noise):
        return self.inner.step(model, state, t, s, self.quiet(noise))

    def quiet(self, noise):
        return lambda like, stream=0: 0.9 * noise(like, stream=stream)


@every_case
def test_gaussian_rejects_too_little_noise(case):
    model, mean, var = gaussian()
    x = sample(model, 1024, Quieter(case.sampler), seed=3, progress=False).x
    assert not accepts_gaussian(x, mean, var, case.variance_bias, case.mean_bias)


def mixture():
    means = torch.stack([torch.full(SHAPE, -0.5), torch.full(SHAPE, 0.7)])
    return GaussianMixtureScore(means, torch.tensor([0.3, 0.7]), 0.09, EDM(0.005, 50.0)), means


def accepts_mixture(x, means, variance_bias):
    n = len(x)
    upper = x.mean((1, 2, 3)) > 0.1
    share_error = math.sqrt(0.3 * 0.7 / n)
    if (upper.float().mean() - 0.7).abs() > 0.02 + 4.5 * share_error:
        return False
    for part, mean in zip((x[~upper], x[upper]), means, strict=True):
        m = len(part)
        if ((part.mean(0) - mean) / 0.3).square().mean() > 0.05**2 + (
            1 + 4.5 * math.sqrt(2 / PIXELS)
        ) / m:
            return False
        ratio = (part.var(0) / 0.09).mean() - 1
        if ratio.abs() > variance_bias + 0.01 + 4.5 * math.sqrt(2 / (m * PIXELS)):
            return False
    return True


@every_case
def test_mixture(case):
    model, means = mixture()
    x = sample(model, 1024, case.sampler, seed=5, progress=False).x
    assert accepts_mixture(x, means, case.variance_bias)


def test_mixture_rejects_wrong_weights():
    model, means = mixture()
    x = model.sample(1024, 0)
    assert accepts_mixture(x, means, 0.0)
    assert not accepts_mixture(-x, -means.flip(0), 0.0)
    assert not accepts_mixture(means[1] + 0.9 * (x - means[1]), means, 0.0)


@every_sampler
def test_entries_are_independent(sampler):
    """An entry's draw does not change when its neighbours do."""
    model, _, _ = gaussian()
    few = sample(model, 2, sampler, seed=7, progress=False).x
    many = sample(model, 5, sampler, seed=7, progress=False).x
    torch.testing.assert_close(few, many[:2], rtol=1e-5, atol=1e-5)
    flat = (many - many.mean(0)).flatten(1)
    correlation = torch.corrcoef(flat).triu(1)
    assert correlation.abs().max() < 0.9  # two equal draws would have 1


@every_sampler
def test_seed(sampler):
    model, _, _ = gaussian()
    first = sample(model, 3, sampler, seed=11, progress=False).x
    again = sample(model, 3, sampler, seed=11, progress=False).x
    other = sample(model, 3, sampler, seed=12, progress=False).x
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.1


@every_sampler
def test_batch_split(sampler):
    model, _, _ = gaussian()
    whole = sample(model, 7, sampler, seed=2, progress=False).x
    for size in (1, 3):
        split = sample(model, 7, sampler, seed=2, batch_size=size, progress=False).x
        torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(sampler, dtype):
    model, _, _ = gaussian(dtype=dtype)
    assert sample(model, 2, sampler, progress=False).x.dtype == dtype


@every_sampler
@pytest.mark.parametrize(
    "sde", [VE(0.01, 50.0), VP(), TSVE(), EDM()], ids=lambda s: type(s).__name__
)
def test_processes(sampler, sde):
    """Every process is sampled: coarse moments with few steps."""
    model, mean, var = gaussian(sde)
    longer = dataclasses.replace(sampler, steps=40)
    x = sample(model, 256, longer, progress=False).x
    assert ((x.mean(0) - mean) / var.sqrt()).square().mean() < 0.05
    assert (x.var(0) / var).mean().log().abs() < 0.35


@every_sampler
def test_times_and_state(sampler):
    model, _, _ = gaussian()
    times = sampler.times(model.sde)
    assert times.shape == (sampler.steps + 1,) and times.dtype == torch.float64
    assert (times.diff() < 0).all() and times[-1] == CLEAN
    noise = lambda like, stream=0: torch.ones_like(like)  # noqa: E731
    state = sampler.init(model, noise, 2)
    kept = state.x.clone()
    after = sampler.step(model, state, times[0], times[1], noise)
    assert isinstance(after, State) and torch.equal(state.x, kept)


@every_case
def test_calls(case):
    model, _, _ = gaussian()
    draws = sample(model, 2, case.sampler, batch_size=1, progress=False)
    assert draws.calls == case.calls and draws.vjps == 0


class Broken(ScoreModel):
    """A denoiser that answers NaN for the second entry below a noise level."""

    def __init__(self, inner, below):
        self.inner, self.below = inner, below
        self.sde, self.shape = inner.sde, inner.shape
        self.scale, self.offset = inner.scale, inner.offset

    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: self.inner.device)

    def denoise(self, x, t):
        out = self.inner.denoise(x, t).clone()
        if float(self.sde.sigma(torch.as_tensor(t))) < self.below:
            out[1] = math.nan
        return out


@every_sampler
def test_guard(sampler):
    model, _, _ = gaussian()
    broken = Broken(model, 1.0)
    with pytest.raises(
        NonFiniteError, match=r"step \d of 5, sigma = .* draws 1: .*denoiser"
    ) as caught:
        sample(broken, 3, sampler, progress=False)
    assert caught.value.entries.tolist() == [False, True, False]
    assert float(model.sde.sigma(caught.value.t)) < 1.0
