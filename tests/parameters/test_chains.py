"""Chains against targets with known moments and distribution functions."""

import math

import pytest
import torch
from scipy import stats

import diffpost.parameters.hmc as hmc_module
import diffpost.parameters.stretch as stretch_module
from diffpost.parameters.chains import run_chains, value_and_gradient
from diffpost.parameters.hmc import HMC, windows
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.priors import Normal, Uniform
from diffpost.parameters.stretch import Stretch

from .targets import F64, accepts, deviations, normal_cdf


def correlated(p=5, rho=0.99):
    """A Gaussian whose covariance has a condition number of (1 + (p - 1) rho)/(1 - rho) and unequal scales."""
    scale = torch.logspace(-1.5, 0.5, p, dtype=F64)
    cov = scale[:, None] * scale * (rho + (1 - rho) * torch.eye(p, dtype=F64))
    precision = torch.linalg.inv(cov)
    mean = torch.linspace(-1, 1, p, dtype=F64)

    def log_density(z):
        off = z - mean
        return -0.5 * (off @ precision * off).sum(1)

    exact = mean, cov.diagonal().sqrt()
    cdf = [normal_cdf(m, s) for m, s in zip(*exact, strict=True)]
    return log_density, *exact, cdf


def banana(bend=0.25, width=0.6):
    """x ~ N(0, 1), y given x ~ N(bend (x^2 - 1), width^2): mean 0, variance of y 2 bend^2 + width^2."""

    def log_density(z):
        x, y = z.unbind(1)
        return -0.5 * (x.square() + ((y - bend * (x.square() - 1)) / width).square())

    nodes = torch.linspace(-7, 7, 281, dtype=F64)
    weights = torch.softmax(-0.5 * nodes.square(), 0)

    def cdf(y):
        inner = (y[:, None] - bend * (nodes.square() - 1)) / (width * math.sqrt(2))
        return (0.5 * (1 + torch.erf(inner))) @ weights

    std = torch.tensor([1.0, math.sqrt(2 * bend**2 + width**2)], dtype=F64)
    return log_density, torch.zeros(2, dtype=F64), std, [normal_cdf(0.0, 1.0), cdf]


def student(nu=5.0, p=2):
    """A Student t in p dimensions, of variance nu/(nu - 2)."""

    def log_density(z):
        return -0.5 * (nu + p) * torch.log1p(z.square().sum(1) / nu)

    def cdf(x):
        return torch.from_numpy(stats.t(nu).cdf(x.numpy()))

    std = torch.full((p,), math.sqrt(nu / (nu - 2)), dtype=F64)
    return log_density, torch.zeros(p, dtype=F64), std, [cdf] * p


def bounded():
    """A normal likelihood beyond the bound of one prior and within another: cut normals, in theta."""
    prior = ParameterPrior({"a": Uniform(0, 1), "b": Normal(0, 1, low=-0.5)})
    sigma = 0.3

    def log_density(z):
        theta = prior.constrain(z)
        likelihood = -0.5 * ((theta - torch.tensor([1.2, 0.0], dtype=F64)) / sigma).square().sum(1)
        return likelihood + prior.log_prob_z(z)

    width = 1 / math.sqrt(1 + 1 / sigma**2)
    exact = [
        stats.truncnorm((0 - 1.2) / sigma, (1 - 1.2) / sigma, 1.2, sigma),
        stats.truncnorm(-0.5 / width, math.inf, 0, width),
    ]
    mean, std = (torch.tensor([getattr(e, f)() for e in exact], dtype=F64) for f in ("mean", "std"))
    cdf = [lambda x, e=e: torch.from_numpy(e.cdf(x.numpy())) for e in exact]
    return log_density, mean, std, cdf, prior


def start(chains, p, seed=0, spread=0.5):
    return spread * torch.randn(chains, p, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("target", [correlated, banana, student])
@pytest.mark.parametrize("leapfrogs", [1, 3])
def test_hmc_reproduces_known_distributions(target, leapfrogs):
    log_density, mean, std, cdf = target()
    kernel = HMC(120, 100, leapfrogs=leapfrogs, target=0.574 if leapfrogs == 1 else 0.8)
    chains = run_chains(log_density, kernel, start(64, len(mean)), seed=1)
    assert accepts(chains.z, mean, std, cdf), deviations(chains.z, mean, std, cdf)
    assert bool((chains.nonfinite == 0).all())
    assert abs(float(chains.acceptance.mean()) - kernel.target) < 0.2


@pytest.mark.parametrize("target", [correlated, banana, student])
def test_stretch_reproduces_known_distributions(target):
    log_density, mean, std, cdf = target()
    chains = run_chains(log_density, Stretch(400, 250, group=64), start(128, len(mean)), seed=2)
    draws = chains.z[:, ::4]
    assert accepts(draws, mean, std, cdf), deviations(draws, mean, std, cdf)


@pytest.mark.parametrize("kernel", [HMC(120, 60), Stretch(250, 100)])
def test_bounded_priors_cut_the_posterior(kernel):
    log_density, mean, std, cdf, prior = bounded()
    chains = run_chains(log_density, kernel, start(64, 2), seed=3)
    theta = prior.constrain(chains.z)
    assert accepts(theta, mean, std, cdf), deviations(theta, mean, std, cdf)


@pytest.mark.parametrize(
    ("module", "kernel", "share"),
    [
        (hmc_module, HMC(130, 100, leapfrogs=1, target=0.574), 0.0),  # accepts everything
        (stretch_module, Stretch(400, 250, group=64), 0.5),  # accepts by the root of the ratio
    ],
)
def test_a_broken_acceptance_is_rejected(monkeypatch, module, kernel, share):
    log_density, mean, std, cdf = correlated()
    monkeypatch.setattr(module, "metropolis", lambda ratio, u: u.log() <= share * ratio)
    chains = run_chains(log_density, kernel, start(128, len(mean)), seed=1)
    assert not accepts(chains.z, mean, std, cdf)


def test_groups_learn_apart_and_splitting_changes_nothing():
    """Two problems of other scales in one batch; each half alone gives the same draws."""
    scale = torch.tensor([0.01, 10.0], dtype=F64).repeat_interleave(8)[:, None]

    def density(which):
        return lambda z: -0.5 * (z / scale[which]).square().sum(1)

    kernel = HMC(60, 60, group=8)
    z0 = scale * start(16, 3)
    both = run_chains(density(slice(None)), kernel, z0, seed=4)
    ids = torch.arange(16)
    for half in (slice(0, 8), slice(8, 16)):
        alone = run_chains(density(half), kernel, z0[half], seed=4, ids=ids[half])
        torch.testing.assert_close(alone.z, both.z[half], rtol=1e-9, atol=0)
    assert both.convergence().rhat.shape == (2, 3)
    assert float(both.convergence().rhat.max()) < 1.2
    ratio = both.covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt() / scale[::8, 0]
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all())


@pytest.mark.parametrize("kernel", [HMC(20, 30), Stretch(20, 30)])
def test_an_interrupted_run_goes_on_with_the_same_draws(tmp_path, kernel):
    log_density, *_ = correlated(p=2)
    z0 = start(8, 2)
    whole = run_chains(log_density, kernel, z0, seed=5)
    calls = 0

    def failing(z):
        nonlocal calls
        calls += 1
        if calls > 75:
            raise KeyboardInterrupt
        return log_density(z)

    with pytest.raises(KeyboardInterrupt):
        run_chains(failing, kernel, z0, seed=5, checkpoint=tmp_path, every=7)
    again = run_chains(log_density, kernel, z0, seed=5, checkpoint=tmp_path, every=7)
    torch.testing.assert_close(again.z, whole.z, rtol=0, atol=0)
    torch.testing.assert_close(again.acceptance, whole.acceptance, rtol=0, atol=0)
    assert again.evaluations == whole.evaluations
    finished = run_chains(log_density, kernel, z0, seed=5, checkpoint=tmp_path, every=7)
    torch.testing.assert_close(finished.z, whole.z, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another run: seed differ"):
        run_chains(log_density, kernel, z0, seed=6, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="the density of the parameters differ"):
        run_chains(lambda z: 2 * log_density(z), kernel, z0, seed=5, checkpoint=tmp_path)
    (tmp_path / "chains.npz").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="cannot be read; delete it"):
        run_chains(log_density, kernel, z0, seed=5, checkpoint=tmp_path)


@pytest.mark.parametrize("kernel", [HMC(150, 60), Stretch(300, 60)])
def test_proposals_without_a_density_are_rejected_and_counted(kernel):
    """NaN beyond a wall: the target is the normal on this side of it."""

    def log_density(z):
        inside = z[:, 0] < 0.5
        return torch.where(inside, -0.5 * z.square().sum(1), math.nan)

    chains = run_chains(log_density, kernel, start(16, 1) - 1, seed=6)
    exact = stats.truncnorm(-math.inf, 0.5)
    mean, std = (torch.tensor([v], dtype=F64) for v in (exact.mean(), exact.std()))
    cdf = [lambda x: torch.from_numpy(exact.cdf(x.numpy()))]
    assert accepts(chains.z, mean, std, cdf), deviations(chains.z, mean, std, cdf)
    assert bool((chains.nonfinite > 0).all())
    assert int(chains.nonfinite.max()) <= kernel.draws


def test_windows_cover_the_warmup():
    assert windows(0) == (0, ())
    assert windows(10) == (2, (8,))
    begin, ends = windows(1000)
    assert (begin, ends[-1]) == (150, 800)
    assert list(ends) == sorted(ends)


def test_bad_input_is_refused():
    flat = lambda z: 0 * z.sum(1)  # noqa: E731
    with pytest.raises(ValueError, match="at least 1"):
        HMC(0, 10)
    with pytest.raises(ValueError, match="target"):
        HMC(10, 10, target=1.0)
    with pytest.raises(ValueError, match="positive definite"):
        HMC(10, 10, covariance=-torch.eye(2))
    with pytest.raises(ValueError, match="number above 1"):
        Stretch(10, 10, scale=1.0)
    with pytest.raises(ValueError, match="whole groups"):
        run_chains(flat, HMC(10, 10, group=3), start(4, 2))
    with pytest.raises(ValueError, match="even number of at least 6"):
        run_chains(flat, Stretch(10, 10), start(5, 2))
    with pytest.raises(ValueError, match="in a plane"):
        run_chains(flat, Stretch(10, 10), start(8, 1).expand(8, 2))
    with pytest.raises(ValueError, match="chains 0, 1 start where"):
        run_chains(lambda z: z.sum(1).log(), HMC(10, 10), -start(2, 2).abs())
    with pytest.raises(ValueError, match=r"gave \(2, 2\)"):
        run_chains(lambda z: z, HMC(10, 10), start(2, 2))
    with pytest.raises(ValueError, match="take Stretch"):
        value_and_gradient(lambda z: z.detach().sum(1), start(2, 2))
