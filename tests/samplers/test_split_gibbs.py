"""SplitGibbs against pi(z) = p_0(z) N(y; A z, Sigma + rho^2 A A^T), which is known for Gaussians and mixtures."""

import itertools
import math

import pytest
import torch

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Identity, Mask, Matrix, Operator
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, EulerMaruyama, Heun, PredictorCorrector, SplitGibbs
from diffpost.score import GaussianMixtureScore, GaussianScore
from diffpost.sde import EDM

F64 = torch.float64
SDE = EDM(0.002, 50.0)
SHAPE = (1, 4, 4)


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(name):
    """A Gaussian prior of independent pixels, and data: operator, its matrix, noise and its covariance."""
    var = torch.exp(torch.linspace(-2, 1, 16, dtype=F64)).reshape(SHAPE)
    prior = GaussianScore(0.5 * torch.ones(SHAPE, dtype=F64), var=var, sde=SDE)
    psf = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.5, 0.2], [0.0, 0.1, 0.0]], dtype=F64)
    std = 0.2 * torch.exp(0.5 * randn(*SHAPE, seed=1))
    operator, noise = {
        "mask": (Mask((randn(*SHAPE, seed=2) > 0).double()), GaussianNoise(std=0.3)),
        "convolution": (Convolve(psf), GaussianNoise(std=std)),
        "matrix": (Matrix(randn(9, 16, seed=3) / 4, SHAPE), GaussianNoise(std=0.2)),
    }[name]
    clean = operator(prior.sample(1, seed=4))
    y = clean + noise.color(randn(*clean.shape, seed=5))
    return prior, Likelihood(y[0], operator, noise)


def exact(prior, likelihood, rho):
    """Mean and covariance of pi(z)."""
    eye = torch.eye(16, dtype=F64)
    a = likelihood.operator.bind(SHAPE)(eye.reshape(-1, *SHAPE)).flatten(1).T
    sigma = torch.diag(likelihood.noise.variance.expand(likelihood.data_shape).reshape(-1))
    c, m = torch.diag(prior.eigenvalues.reshape(-1)), prior.mean.reshape(-1)
    gain = c @ a.T @ torch.linalg.inv(sigma + rho**2 * a @ a.T + a @ c @ a.T)
    return m + gain @ (likelihood.y.reshape(-1) - a @ m), c - gain @ a @ c


def accepts(x, mean, cov, allowed):
    """The sum of squares of whitened draws and n times that of their mean, each within 4.5 standard deviations and
    what ``allowed`` of the variance and of a standard deviation of the mean explains.
    """
    n = len(x)
    root = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(root, (x.flatten(1).double() - mean).T, upper=False).T
    d = white.shape[1]
    spread = (white - white.mean(0)).square().sum() / ((n - 1) * d) - 1
    shift = n * white.mean(0).square().sum() / d - 1
    return bool(
        spread.abs() < allowed + 4.5 * math.sqrt(2 / (n * d))
        and shift < n * allowed**2 + 4.5 * math.sqrt(2 / d)
    )


@pytest.mark.parametrize("name", ["mask", "convolution", "matrix"])
def test_gaussian(name):
    """The stated target at a coupling that matters; the posterior itself, which that biases, is told apart."""
    prior, like = problem(name)
    rho, n = 0.4, 500
    sampler = SplitGibbs(24, coupling=rho, reverse=DPMSolver(20, order=2, eta=1.0))
    draws = sample(Posterior(prior, like), n, sampler, seed=1, progress=False)
    assert accepts(draws.x, *exact(prior, like, rho), 0.03)
    assert not accepts(draws.x, *exact(prior, like, 0.0), 0.03)
    assert draws.calls == 24 * 20
    assert draws.extras["trace_chi2"].shape == draws.extras["trace_flux"].shape == (n, 12)
    torch.testing.assert_close(draws.extras["trace_chi2"][:, -1], like.chi2(draws.x))
    torch.testing.assert_close(draws.extras["trace_flux"][:, -1], draws.x.flatten(1).sum(1))


@pytest.mark.parametrize("name", ["mask", "convolution", "matrix"])
def test_the_default_coupling_leaves_the_posterior_as_it_is(name):
    """The posterior itself at a finite coupling; the same chain, its coupling on top of the noise, is told apart."""
    prior, like = problem(name)
    model, n = Posterior(prior, like), 1000
    reverse = DPMSolver(20, order=2, eta=1.0)
    moves = 60 if name == "matrix" else 30
    sampler = SplitGibbs(moves, first=3.0, reverse=reverse)
    rho = sampler.prepared(model).room
    a = like.operator.bind(SHAPE)(torch.eye(16, dtype=F64).reshape(-1, *SHAPE)).flatten(1)
    whitened = a / like.noise.variance.expand(like.data_shape).reshape(-1).sqrt()
    assert rho**2 * float(torch.linalg.matrix_norm(whitened, 2)) ** 2 == pytest.approx(
        0.9, rel=0.03
    )
    draws = sample(model, n, sampler, seed=1, progress=False)
    assert accepts(draws.x, *exact(prior, like, 0.0), 0.03)
    on_top = SplitGibbs(moves, first=3.0, coupling=rho, reverse=reverse)
    biased = sample(model, n, on_top, seed=1, progress=False).x
    assert not accepts(biased, *exact(prior, like, 0.0), 0.03)


def test_small_coupling_is_the_posterior():
    prior, like = problem("matrix")
    sampler = SplitGibbs(80, coupling=0.05, first=3.0, anneal=0.9)
    x = sample(Posterior(prior, like), 200, sampler, seed=1, progress=False).x
    mean, cov = exact(prior, like, 0.0)
    assert accepts(x, mean, cov, 0.05)
    assert not accepts(x, mean + 0.5 * cov.diagonal().sqrt(), cov, 0.05)  # negative controls
    assert not accepts(x, mean, 1.5 * cov, 0.05)


def test_mixture_weights():
    """Two modes that a coupling of their distance joins: their weights, against the target by quadrature."""
    prior = GaussianMixtureScore(
        torch.tensor([[-1.0], [1.0]], dtype=F64), torch.tensor([0.3, 0.7]), 0.04, SDE
    )
    like = Likelihood(torch.tensor([-0.5], dtype=F64), Identity(), GaussianNoise(std=0.8))
    rho, n = 0.8, 2000
    sampler = SplitGibbs(16, coupling=rho, reverse=DPMSolver(24, order=2, eta=1.0))
    x = sample(Posterior(prior, like), n, sampler, seed=2, progress=False).x
    line = torch.linspace(-4, 4, 4001, dtype=F64)[:, None]

    def share(noise):
        fit = torch.distributions.Normal(line, noise).log_prob(like.y)[:, 0]
        return float(torch.softmax(prior.log_prob(line) + fit, 0)[line[:, 0] > 0].sum())

    def fits(p):
        return abs(float((x > 0).double().mean()) - p) < 0.01 + 4.5 * math.sqrt(p * (1 - p) / n)

    assert fits(share(math.hypot(0.8, rho)))
    assert not fits(share(0.8))


def test_the_conditional_draw_needs_the_reverse_sde():
    """An ODE from u has no spread, so chains of it lose variance: refused, and shown why."""
    for reverse in (DPMSolver(16), DPMSolver(16, eta=0.5), Heun(8), PredictorCorrector(8)):
        with pytest.raises(ValueError, match="reverse SDE"):
            SplitGibbs(8, coupling=0.1, reverse=reverse)
    prior, like = problem("mask")
    wrong = SplitGibbs(12, coupling=0.4)
    object.__setattr__(wrong, "reverse", DPMSolver(20, order=2))
    x = sample(Posterior(prior, like), 500, wrong, seed=1, progress=False).x
    assert not accepts(x, *exact(prior, like, 0.4), 0.03)


def test_rows_batches_and_seeds():
    prior, like = problem("mask")
    model = Posterior(
        prior, Likelihood(like.y + randn(3, *SHAPE, seed=1), like.operator, like.noise)
    )
    for start in (None, DPMSolver(6, eta=1.0)):
        sampler = SplitGibbs(4, coupling=0.3, start=start, reverse=EulerMaruyama(6))
        whole = sample(model, 3, sampler, seed=4, progress=False)
        split = sample(model, 3, sampler, seed=4, batch_size=2, progress=False)
        torch.testing.assert_close(split.x, whole.x, rtol=1e-6, atol=1e-7)
        other = sample(model, 3, sampler, seed=5, progress=False)
        assert (other.x - whole.x).abs().mean() > 0.05


def test_couplings_fall_and_stay():
    levels = SplitGibbs(10, coupling=0.1, first=10.0).levels(SDE)
    assert levels[0] == 10 and levels[5:] == pytest.approx([0.1] * 5)
    ratios = [b / a for a, b in itertools.pairwise(levels[:6])]
    assert ratios == pytest.approx([0.01**0.2] * 5)
    assert SplitGibbs(3, coupling=0.1, start=Heun(4)).levels(SDE) == pytest.approx([0.1] * 3)
    times = SplitGibbs(3, coupling=0.1, start=Heun(4)).times(SDE)
    assert len(times) == 4 + 3 + 1


class Square(Operator):
    """x^2."""

    def __call__(self, x):
        return x**2

    def output_shape(self, input_shape):
        return input_shape


def test_bad_arguments():
    prior, like = problem("mask")
    squared = Likelihood(like.y, Square(), like.noise)
    for make in (
        lambda: SplitGibbs(8, coupling=0.0),
        lambda: SplitGibbs(8, coupling=0.5, first=0.1),
        lambda: SplitGibbs(8, coupling=0.5, anneal=1.0),
        lambda: sample(prior, 1, SplitGibbs(8, coupling=0.5), progress=False),
        lambda: SplitGibbs(8).levels(SDE),
        lambda: sample(Posterior(prior, squared), 1, SplitGibbs(8), progress=False),
        lambda: sample(
            Posterior(prior, Likelihood(like.y, like.operator, GaussianNoise(std=1e-4))),
            1,
            SplitGibbs(8),
            progress=False,
        ),
        lambda: sample(
            Posterior(prior, Likelihood(like.y, like.operator, GaussianNoise(weight=0.0))),
            1,
            SplitGibbs(8),
            progress=False,
        ),
        lambda: sample(Posterior(prior, squared), 1, SplitGibbs(8, coupling=0.5), progress=False),
        lambda: sample(Posterior(prior, like), 1, SplitGibbs(8, coupling=0.001), progress=False),
        lambda: sample(
            Posterior(prior, like), 1, SplitGibbs(8, coupling=0.1, first=90.0), progress=False
        ),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
