"""Chains against closed forms: Langevin and MALA on p_nu(u) p(y | u)."""

import dataclasses
import math

import pytest
import torch

from diffpost.guidance import IsotropicCovariance, MomentMatching
from diffpost.instrument import NonFiniteError
from diffpost.likelihood import Likelihood
from diffpost.line_integral import clenshaw_curtis, line_integral, nodes
from diffpost.noise import BlockNoise, GaussianNoise
from diffpost.operator import Convolve, Identity, Mask, Matrix, Operator
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import MALA, DPMSolver, Heun, Langevin
from diffpost.samplers.base import CLEAN
from diffpost.samplers.chain import Gaussian
from diffpost.samplers.langevin import Line, curvature, evaluate, log_ratio, score_at
from diffpost.score import GaussianMixtureScore, GaussianScore, ScoreModel
from diffpost.sde import EDM, VP

F64 = torch.float64
SDE = EDM(0.002, 50.0)
SHAPE = (1, 4, 4)
START = DPMSolver(16, eta=1.0)
CRUDE = MomentMatching(covariance=IsotropicCovariance(0.05), differentiate=False)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    return torch.randn(shape, generator=generator(seed), dtype=F64)


def accepts(x, mean, cov, allowed=0.0):
    """Whether draws (n, ...) have this mean and covariance: whitened, the sum of squares of all of them and n times
    the square of their mean are chi^2; each within 4.5 of its standard deviations (a false alarm in 70,000) and
    ``allowed`` of the variance.
    """
    n = len(x)
    root = torch.linalg.cholesky(cov)
    white = torch.linalg.solve_triangular(root, (x.flatten(1).double() - mean).T, upper=False).T
    d = white.shape[1]
    spread = white.square().mean() - 1
    shift = n * white.mean(0).square().sum() / d - 1
    return bool(
        spread.abs() < allowed + 4.5 * math.sqrt(2 / (n * d))
        and shift < n * allowed**2 + 4.5 * math.sqrt(2 / d)
    )


def dense(operator, shape):
    """The matrix of a linear operator, column by column."""
    eye = torch.eye(math.prod(shape), dtype=F64).reshape(-1, *shape)
    return operator.bind(shape)(eye).flatten(1).T


def moments(likelihood, mean, prior_cov, shape):
    """Mean and covariance of N(mean, prior_cov) under the likelihood."""
    a = dense(likelihood.operator, shape)
    noise = likelihood.noise
    if likelihood.noise.weight() is None:
        eye = torch.eye(len(a), dtype=F64).reshape(-1, *likelihood.data_shape)
        precision = noise.precision(eye).flatten(1)
    else:
        precision = torch.diag(noise.weight().expand(likelihood.data_shape).reshape(-1))
    cov = torch.linalg.inv(torch.linalg.inv(prior_cov) + a.T @ precision @ a)
    return mean + cov @ a.T @ precision @ (likelihood.y.double().reshape(-1) - a @ mean), cov


def problems():
    """Linear data of a 4 x 4 image by name: operator and noise."""
    std = torch.exp(randn(*SHAPE, seed=3))
    gone = torch.where(randn(*SHAPE, seed=4) > 0.3, torch.inf, 0.2)
    psf = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.5, 0.2], [0.0, 0.1, 0.0]], dtype=F64)
    wide = randn(12, 16, seed=5) / 4
    corr = 0.1 * torch.eye(12, dtype=F64) + 0.02
    return {
        "mask": (Mask((randn(*SHAPE, seed=6) > 0).double()), GaussianNoise(std=0.1)),
        "infinite variance": (Identity(), GaussianNoise(std=gone)),
        "heteroscedastic": (Convolve(psf), GaussianNoise(std=0.2 * std)),
        "periodic": (Convolve(psf, boundary="periodic"), GaussianNoise(std=0.1)),
        "masked convolution": (
            Mask((randn(*SHAPE, seed=7) > -0.5).double()) @ Convolve(psf),
            GaussianNoise(std=0.05),
        ),
        "matrix": (Matrix(wide, SHAPE), GaussianNoise(cov=corr)),
    }


def linear_problem(name):
    """A prior of power spectrum and its likelihood."""
    operator, noise = problems()[name]
    k = torch.fft.fftfreq(4, 1 / 4, dtype=F64)
    power = 2.0 * (1 + k[:, None] ** 2 + k**2) ** -1.5
    prior = GaussianScore(0.3 * torch.ones(SHAPE, dtype=F64), power=power, sde=SDE)
    clean = operator(prior.sample(1, seed=8))
    y = clean + noise.color(randn(*clean.shape, seed=9))
    return prior, Likelihood(y[0], operator, noise)


def target(prior, likelihood, nu):
    """Mean and covariance of p_nu(u) p(y | u) for a Gaussian prior."""
    eye = torch.eye(math.prod(prior.shape), dtype=F64).reshape(-1, *prior.shape)
    cov = prior._apply(prior.eigenvalues.expand(prior.shape), eye).flatten(1)
    blurred = cov + nu**2 * torch.eye(len(cov), dtype=F64)
    return moments(likelihood, prior.mean.reshape(-1), blurred, prior.shape)


# parts ---------------------------------------------------------------------------------------------


def test_weights():
    """A rule of n + 1 nodes integrates polynomials of degree n."""
    for n in (4, 8, 16):
        weights, places = torch.tensor(clenshaw_curtis(n)).double(), torch.tensor(nodes(n)).double()
        assert abs(float(weights.sum()) - 1) < 1e-6
        for p in range(n + 1):
            assert abs(float((weights * places**p).sum()) - 1 / (p + 1)) < 1e-6


def mixture(shape=(2,), var=0.09, sde=SDE):
    """Three modes."""
    means = 0.6 * randn(3, *shape, seed=11)
    return GaussianMixtureScore(means, torch.tensor([0.2, 0.3, 0.5]), var, sde)


def test_line_integral_is_the_difference_of_log_prob():
    prior, nu = mixture((1, 3, 3)), 0.1
    t = SDE.t_of_nsr(torch.tensor(nu, dtype=F64))
    u = 0.5 * randn(400, 1, 3, 3, seed=12)
    v = u + 0.15 * randn(400, 1, 3, 3, seed=13)
    exact = prior.log_prob(v, t) - prior.log_prob(u, t)
    distance = {}
    for n in (4, 8, 16):
        places = torch.stack([u + a * (v - u) for a in nodes(n)])
        slopes = ((v - u) * score_at(prior, places, t)).flatten(2).sum(2).T
        found, error = line_integral(slopes)
        back, _ = line_integral(-slopes.flip(1))
        torch.testing.assert_close(back, -found, rtol=1e-12, atol=1e-12)
        distance[n] = (found - exact).abs()
        assert ((distance[n] <= error + 1e-9).double().mean()) > 0.97
    trapezoid = (0.5 * (slopes[:, 0] + slopes[:, -1]) - exact).abs()
    assert distance[4].mean() < 0.02 * trapezoid.mean()
    assert distance[16].max() < 1e-3 < 0.1 < trapezoid.max()
    assert distance[4].mean() > 5 * distance[8].mean() > 25 * distance[16].mean()


def test_nodes_are_added_where_the_decision_is_in_doubt():
    """With a level that the integral is far from, nothing is added; near it, what is needed."""
    prior, t = mixture((1, 3, 3)), torch.tensor(0.05, dtype=F64)
    u, v = 0.5 * randn(50, 1, 3, 3, seed=12), 0.5 * randn(50, 1, 3, 3, seed=13)
    exact = prior.log_prob(v, t) - prior.log_prob(u, t)
    linear = Identity()
    like = Likelihood(torch.zeros(1, 3, 3, dtype=F64), linear, GaussianNoise(std=1.0)).bind(
        (1, 3, 3)
    )
    reference = Gaussian(like, linear.bind((1, 3, 3)), torch.tensor(1.0, dtype=F64))
    point = evaluate(reference, u, score_at(prior, u[None], t)[0])
    rough, doubt = Line(prior, t, point, v).integral(exact - 100, 64)
    assert (doubt == 0).all()
    fine, left = Line(prior, t, point, v).integral(exact, 64)
    assert (fine - exact).abs().mean() < 0.05 * (rough - exact).abs().mean()
    assert ((fine - exact).abs() <= left + 1e-3).double().mean() > 0.95
    alone, _ = Line(prior, t, row(point, 7), v[7:8]).integral(exact[7:8], 64)
    torch.testing.assert_close(alone, fine[7:8])


def row(point, i):
    """The i-th entry of a point."""
    one = {f.name: getattr(point, f.name) for f in dataclasses.fields(point)}
    one["embedded"] = tuple(part[i : i + 1] for part in one["embedded"])
    return type(point)(**{k: v if k == "embedded" else v[i : i + 1] for k, v in one.items()})


@pytest.mark.parametrize("name", problems())
def test_gaussian_draws(name):
    """Perturb and solve: N(mean, M) with the mean by the same solve."""
    prior, likelihood = linear_problem(name)
    likelihood = likelihood.bind(SHAPE)
    power = 0.1 + prior.eigenvalues
    linear = likelihood.operator.bind(SHAPE)
    for c in (power, torch.tensor(0.7, dtype=F64)):
        gaussian = Gaussian(likelihood, linear, c)
        zero = torch.zeros(4000, *SHAPE, dtype=F64)
        noise = lambda like, stream=0: randn(*like.shape, seed=stream)  # noqa: E731
        residual = likelihood.residual(zero)
        z, e = gaussian.draws(zero, residual, noise, 20)
        eye = torch.eye(16, dtype=F64).reshape(-1, *SHAPE)
        mean, cov = moments(
            likelihood, torch.zeros(16, dtype=F64), gaussian.apply(eye).flatten(1), SHAPE
        )
        x = gaussian.update(z, residual + e)
        assert accepts(x, mean, cov)
        assert not accepts(gaussian.update(0.9 * z, residual + 0.9 * e), mean, cov)
        torch.testing.assert_close(
            gaussian.update(zero[:1], residual[:1]).reshape(-1), mean, rtol=1e-7, atol=1e-8
        )
        v = randn(2, *SHAPE, seed=1)
        length = sum(part.square().sum() for part in gaussian.embed(v))
        flat = v.flatten(1)
        torch.testing.assert_close(length, (flat @ torch.linalg.inv(cov) * flat).sum())


@pytest.mark.parametrize("size", [0.05, 0.6, 1.0])
def test_detailed_balance(size):
    """pi(u) q(u' | u) min(1, e^a) is symmetric: a against densities written out."""
    prior = mixture(SHAPE)
    _, like = linear_problem("matrix")
    like = like.bind(SHAPE)
    linear, t = like.operator.bind(SHAPE), torch.tensor(0.1, dtype=F64)
    gaussian = Gaussian(like, linear, torch.tensor(0.05, dtype=F64))
    u, v = 0.3 * randn(20, *SHAPE, seed=1), 0.3 * randn(20, *SHAPE, seed=2)
    a, b = (evaluate(gaussian, x, score_at(prior, x[None], t)[0]) for x in (u, v))
    step = torch.full((20,), size, dtype=F64)
    found = prior.log_prob(v, t) - prior.log_prob(u, t) + log_ratio(a, b, gaussian, step)

    eye = torch.eye(16, dtype=F64)
    _, m = moments(like, torch.zeros(16, dtype=F64), 0.05 * eye, SHAPE)

    def log_pi(x):
        return prior.log_prob(x, t) + like.log_prob(x)

    def log_q(to, at):
        gradient = prior.score(at, t) + like.score(at)
        mean = at.flatten(1) + size * gradient.flatten(1) @ m
        law = torch.distributions.MultivariateNormal(mean, (2 * size - size**2) * m)
        return law.log_prob(to.flatten(1))

    exact = log_pi(v) - log_pi(u) + log_q(u, v) - log_q(v, u)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7)


def test_curvature():
    """The spectrum of a field's precision, from one score."""
    k = torch.fft.fftfreq(32, 1 / 32, dtype=F64)
    k = torch.hypot(k[:, None], k[None])
    power = 10 * (1 + k) ** -2.0
    prior = GaussianScore(torch.zeros(1, 32, 32, dtype=F64), power=power, sde=SDE)
    t = torch.tensor(0.05, dtype=F64)
    x = prior.sample(3, seed=1) + 0.05 * randn(3, 1, 32, 32, seed=2)
    ratio = curvature(prior.score(x, t), 0.05) / (power + 0.05**2)
    assert ratio.shape == (3, 1, 32, 32)
    assert (ratio[..., k > 4].log().abs() < 1.0).all() and (ratio.log().abs() < 3.0).all()
    assert curvature(prior.score(x, t).flatten(1), 0.05).shape == (3,)


# whole chains ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", problems())
def test_gaussian_prior(name):
    """MALA's draws have the exact mean and covariance, whatever the start; the start's do not."""
    prior, likelihood = linear_problem(name)
    nu, n = 0.05, 150
    mean, cov = target(prior, likelihood, nu)
    posterior = Posterior(prior, likelihood, CRUDE)
    draws = sample(posterior, n, MALA(18, start=START, nsr=nu), seed=1, progress=False)
    assert accepts(draws.x, mean, cov)
    assert not accepts(mean + 1.1 * (draws.x.flatten(1) - mean), mean, cov)
    assert not accepts(sample(posterior, n, START, seed=1, progress=False).x, mean, cov)
    assert 0.3 < float(draws.extras["acceptance"].mean()) <= 1
    assert draws.calls == 16 + 1 + 4 * 18


def test_too_large_a_step_biases_langevin_and_not_mala():
    """A prior whose variances span a factor of 80, which a number for C cannot follow."""
    var = torch.logspace(math.log10(0.05), math.log10(4.0), 8, dtype=F64)
    prior = GaussianScore(torch.zeros(8, dtype=F64), var=var, sde=SDE)
    like = Likelihood(torch.ones(8, dtype=F64), Identity(), GaussianNoise(std=1.5))
    nu = 0.05
    mean, cov = target(prior, like, nu)
    posterior = Posterior(prior, like)
    mala = MALA(80, start=START, nsr=nu, step_size=0.3, burn_in=0)
    assert accepts(sample(posterior, 500, mala, seed=1, progress=False).x, mean, cov)
    for size, exact in ((0.3, False), (0.02, True)):
        langevin = Langevin(100, start=START, nsr=nu, step_size=size)
        x = sample(posterior, 500, langevin, seed=1, progress=False).x
        assert accepts(x, mean, cov, 0.03) == exact


class Bend(Operator):
    """(x, y) to (x + y^2/2, y + sin x), of images of shape (2,)."""

    def __call__(self, x):
        return torch.stack([x[:, 0] + x[:, 1] ** 2 / 2, x[:, 1] + torch.sin(x[:, 0])], 1)

    def output_shape(self, input_shape):
        return (2,)


def summaries(x):
    """Functions of x (n, 2) whose expectations are compared, (n, 7)."""
    a, b = x[:, 0], x[:, 1]
    return torch.stack([a, b, a * a, b * b, a * b, (a > 0.3).double(), a * b * b], 1)


def agrees(x, log_target):
    """Whether the summaries of draws are those of a density of two parameters, by quadrature, each to 4.5 Monte Carlo
    errors (a false alarm in 20,000).
    """
    line = torch.linspace(-6, 6, 601, dtype=F64)
    grid = torch.cartesian_prod(line, line)
    weight = torch.softmax(log_target(grid), 0)
    values = summaries(grid)
    exact = weight @ values
    error = ((weight @ (values - exact).square()) / len(x)).sqrt()
    return bool(((summaries(x.double()).mean(0) - exact).abs() < 4.5 * error).all())


def test_nonlinear_operator_against_quadrature():
    prior = mixture((2,), 0.25)
    like = Likelihood(torch.tensor([0.8, 0.3], dtype=F64), Bend(), GaussianNoise(std=0.4))
    posterior = Posterior(prior, like)
    nu = 0.1
    t = torch.tensor(nu, dtype=F64)
    exact = lambda x: prior.log_prob(x, t) + like.log_prob(x)  # noqa: E731
    # after 30 moves what the start had wrong is still at 3 to 6 errors
    draws = sample(posterior, 3000, MALA(120, start=START, nsr=nu), seed=2, progress=False)
    assert agrees(draws.x, exact)
    assert draws.extras["quadrature_error"].max() < 0.05
    assert not agrees(draws.x, lambda x: prior.log_prob(x, t) + like.log_prob(x) * 1.5)


def test_moments_inside_modes():
    """Far modes keep the draws that begin there, and each mode is exact; the start's is not."""
    means = torch.tensor([[-3.0, 1.0], [3.0, -1.0]], dtype=F64)
    var = torch.tensor([[0.2, 0.05], [0.1, 0.3]], dtype=F64)
    prior = GaussianMixtureScore(means, torch.tensor([0.5, 0.5]), var, SDE)
    matrix = Matrix(torch.tensor([[0.1, 1.0]], dtype=F64))
    like = Likelihood(torch.tensor([0.3], dtype=F64), matrix, GaussianNoise(std=0.3))
    nu = 0.05
    crude = Posterior(prior, like, CRUDE)
    both = [MALA(40, start=START, nsr=nu), START]
    fine, start = (sample(crude, 1500, s, seed=3, progress=False).x for s in both)
    rejected = []
    for k in (0, 1):
        mean, cov = moments(like, means[k], torch.diag(var[k] + nu**2), (2,))
        mine = [x[(x[:, 0] > 0) == (means[k, 0] > 0)] for x in (fine, start)]
        assert len(mine[0]) > 300
        assert accepts(mine[0], mean, cov)
        rejected.append(not accepts(mine[1], mean, cov))
    assert all(rejected)


def test_local_bias_of_moment_matching():
    """Moment matching with a stationary covariance where the prior is not: its variances are wrong, MALA's are not."""
    var = torch.exp(torch.empty(SHAPE, dtype=F64).uniform_(-3, 2, generator=generator(5)))
    prior = GaussianScore(torch.zeros(SHAPE, dtype=F64), var=var, sde=SDE)
    operator = Convolve(torch.full((3, 3), 1 / 9, dtype=F64), boundary="periodic")
    y = operator(prior.sample(1, seed=6))[0] + 0.1 * randn(*SHAPE, seed=7)
    like = Likelihood(y, operator, GaussianNoise(std=0.1))
    nu, n = 0.02, 200
    mean, cov = target(prior, like, nu)
    guidance = MomentMatching(covariance=IsotropicCovariance(0.2), differentiate=False)
    posterior = Posterior(prior, like, guidance)
    plain = sample(posterior, n, DPMSolver(24, eta=1.0), progress=False).x
    repaired = sample(posterior, n, MALA(80, DPMSolver(24, eta=1.0), nu), progress=False).x
    ratio = lambda x: (x.flatten(1).var(0) / cov.diagonal()).log().abs().max()  # noqa: E731
    assert ratio(plain) > 0.6 > 1.5 * ratio(repaired)
    assert accepts(repaired, mean, cov) and not accepts(plain, mean, cov)


def test_the_blur_is_taken_out():
    """With ``reverse`` the draws are those of the prior itself and of noise Sigma + nu^2 A A^T."""
    prior, like = linear_problem("matrix")
    nu, n = 0.3, 500
    reverse = DPMSolver(20, order=2, eta=1.0)
    sampler = MALA(24, start=START, nsr=nu, reverse=reverse)
    x = sample(Posterior(prior, like, CRUDE), n, sampler, seed=1, progress=False).x
    a = like.operator.dense(SHAPE).double()
    blurred = GaussianNoise(cov=0.1 * torch.eye(12, dtype=F64) + 0.02 + nu**2 * a @ a.T)
    more = Likelihood(like.y, like.operator, blurred)
    assert accepts(x, *target(prior, more, 0.0), 0.03)
    assert not accepts(x, *target(prior, like, nu), 0.03)


# the house's promises -----------------------------------------------------------------------------------


def batched():
    """A posterior with a row of data for each of three draws."""
    prior, like = linear_problem("infinite variance")
    y = like.y + randn(3, *SHAPE, seed=1)
    return Posterior(prior, Likelihood(y, like.operator, like.noise), CRUDE)


@pytest.mark.parametrize("sampler", [MALA(6, nsr=0.05), Langevin(6, nsr=0.05)], ids=type)
def test_rows_batches_and_seeds(sampler):
    """Draw b sees row b and nothing of its neighbours."""
    model = batched()
    whole = sample(model, 3, sampler, seed=4, progress=False)
    split = sample(model, 3, sampler, seed=4, batch_size=2, progress=False)
    torch.testing.assert_close(split.x, whole.x, rtol=1e-6, atol=1e-7)
    other = sample(model, 3, sampler, seed=5, progress=False)
    assert (other.x - whole.x).abs().mean() > 0.05
    assert whole.extras["trace_chi2"].shape == (3, 3 if isinstance(sampler, MALA) else 6)
    last = model.likelihood.chi2(whole.x)
    torch.testing.assert_close(whole.extras["trace_chi2"][:, -1], last)
    torch.testing.assert_close(whole.extras["trace_flux"][:, -1], whole.x.flatten(1).sum(1))


def test_a_posterior_with_rows_is_a_prior_too():
    """The line's nodes of entry b are conditioned on row b."""
    model = batched()
    more = Posterior(
        model, Likelihood(torch.zeros(SHAPE, dtype=F64), Identity(), GaussianNoise(std=3.0))
    )
    draws = sample(more, 3, MALA(4, nsr=0.05), progress=False)
    one = sample(more.select(torch.tensor([0])), 1, MALA(4, nsr=0.05), progress=False)
    torch.testing.assert_close(draws.x[:1], one.x, rtol=1e-5, atol=1e-6)


def test_other_processes_units_and_dtypes():
    """Draws are the same in other units, and nearly so in float32 and under VP."""
    prior, like = linear_problem("matrix")
    sampler = MALA(12, start=DPMSolver(12, eta=1.0, nsr_min=0.02, nsr_max=50.0), nsr=0.05)
    want = sample(Posterior(prior, like, CRUDE), 4, sampler, progress=False).x
    scaled = prior.with_affine(1e-3, 0.2)
    y = 1e-3 * like.y + like.operator(torch.full((1, *SHAPE), 0.2, dtype=F64))[0]
    noise = GaussianNoise(cov=1e-6 * (0.1 * torch.eye(12, dtype=F64) + 0.02))
    units = Posterior(scaled, Likelihood(y, like.operator, noise), CRUDE)
    got = sample(units, 4, sampler, progress=False).x
    torch.testing.assert_close(1e3 * (got - 0.2), want, rtol=1e-5, atol=1e-6)
    vp = GaussianScore(prior.mean, power=prior.eigenvalues, sde=VP())
    got = sample(Posterior(vp, like, CRUDE), 4, sampler, progress=False).x
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    single = Posterior(prior.to(dtype=torch.float32), like, CRUDE)
    got = sample(single, 4, sampler, progress=False).x
    assert got.dtype == torch.float32 and (got - want).abs().mean() < 0.05


def test_times_and_nested_starts():
    """Chains begin where other chains end; two Langevin stages, then MALA."""
    prior, like = linear_problem("periodic")
    first = Langevin(3, start=Heun(4), nsr=0.5)
    sampler = MALA(4, start=Langevin(2, start=first, nsr=0.1), nsr=0.05)
    times = sampler.times(SDE)
    assert len(times) == 4 + 3 + 2 + 4 + 1 and times[-1] == CLEAN and (times.diff() <= 0)[4:].all()
    draws = sample(Posterior(prior, like), 3, sampler, batch_size=2, progress=False)
    assert draws.x.isfinite().all() and draws.extras["trace_flux"].shape == (3, 2)
    assert draws.calls == 7 + (1 + 3) + (1 + 2) + (1 + 16)
    alone = sample(Posterior(prior, like), 3, MALA(4, start=None, nsr=0.05), progress=False)
    assert alone.calls == 17


def test_checkpoints_keep_what_is_told(tmp_path):
    prior, like = linear_problem("periodic")
    posterior, sampler = Posterior(prior, like), MALA(4, start=Heun(4), nsr=0.05)
    want = sample(posterior, 3, sampler, progress=False)
    sample(posterior, 2, sampler, batch_size=1, progress=False)
    got = sample(posterior, 3, sampler, batch_size=2, checkpoint=tmp_path / "run", progress=False)
    again = sample(posterior, 3, sampler, checkpoint=tmp_path / "run", progress=False)
    for name, values in want.extras.items():
        torch.testing.assert_close(again.extras[name], values, rtol=1e-4, atol=1e-5)
        assert torch.equal(again.extras[name], got.extras[name])


def test_joint_data():
    prior, like = linear_problem("periodic")
    parts = Likelihood(like.y, Identity(), GaussianNoise(std=0.7)) + like
    assert isinstance(parts.noise, BlockNoise)
    nu = 0.05
    eye = torch.eye(16, dtype=F64).reshape(-1, *SHAPE)
    cov = prior._apply(prior.eigenvalues.expand(SHAPE), eye).flatten(1) + nu**2 * torch.eye(16)
    mean, cov = moments(like, prior.mean.reshape(-1), cov, SHAPE)
    mean, cov = moments(Likelihood(like.y, Identity(), GaussianNoise(std=0.7)), mean, cov, SHAPE)
    x = sample(Posterior(prior, parts, CRUDE), 300, MALA(24, START, nu), progress=False).x
    assert accepts(x, mean, cov)
    assert not accepts(x, mean + 0.5 * cov.diagonal().sqrt(), cov)  # negative controls
    assert not accepts(x, mean, 1.4 * cov)


class Broken(ScoreModel):
    """NaN for the second entry where noise is low."""

    def __init__(self, inner):
        self.inner, self.sde, self.shape = inner, inner.sde, inner.shape

    dtype = property(lambda self: self.inner.dtype)
    device = property(lambda self: self.inner.device)

    def denoise(self, x, t):
        out = self.inner.denoise(x, t).clone()
        if float(t) < 0.06 and len(x) > 1:
            out[1] = math.nan
        return out


def test_a_broken_denoiser_is_named():
    prior, like = linear_problem("periodic")
    sampler = MALA(4, start=Heun(4, nsr_min=0.1), nsr=0.05)
    with pytest.raises(NonFiniteError, match=r"step [45] of 8, sigma = .*denoiser"):
        sample(Posterior(Broken(prior), like, CRUDE), 3, sampler, progress=False)


def test_bad_arguments():
    prior, like = linear_problem("periodic")
    for make in (
        lambda: MALA(1),
        lambda: MALA(10, nsr=0.0),
        lambda: MALA(10, step_size=1.5),
        lambda: MALA(10, target=1.0),
        lambda: MALA(10, burn_in=10),
        lambda: MALA(10, nodes=6),
        lambda: MALA(10, reverse=Heun(8)),
        lambda: Langevin(10, step_size=0.0),
        lambda: sample(prior, 1, MALA(4, nsr=0.05), progress=False),
        lambda: sample(Posterior(prior, like), 1, MALA(4, nsr=1e-4), progress=False),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()
    with pytest.raises(TypeError):
        MALA(10, nsr_min=0.1)
