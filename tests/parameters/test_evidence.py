"""The collapsed density against dense normal distributions, and Gaussians of images against matrices."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from diffpost.noise import GaussianNoise
from diffpost.parameters.evidence import Evidence
from diffpost.parameters.family import ParametricLikelihood
from diffpost.parameters.gaussian import GaussianImage
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.priors import LogNormal, Uniform
from diffpost.score import GaussianScore
from diffpost.sde import EDM

from .toy import F64, BlurFamily, field, matrices, toy

SIZE = 6
THETA = torch.tensor([[0.8, 0.3], [1.4, -0.7]], dtype=F64)


@pytest.fixture(scope="module")
def problem():
    return toy(size=SIZE, glow=0.2)


def dense(problem, theta, gaussian, factor=1.0, cov=None):
    """log N(y; b + A m, Sigma + A C A^T) by torch.distributions."""
    values = problem.prior.values(theta)
    family = problem.likelihood.family
    a = matrices(family, values)
    f = gaussian.scaled_modes.flatten(1)
    image_cov = factor**2 * f.T @ f
    background = family.background(values).flatten(1)
    mean = factor * a @ gaussian.mean.flatten() + background
    noise = problem.noise**2 * torch.eye(a.shape[1], dtype=F64) if cov is None else cov
    return MultivariateNormal(mean, noise + a @ image_cov @ a.mT), a, image_cov, noise


@pytest.mark.parametrize("modes", [SIZE**2, 9])
@pytest.mark.parametrize("chunk", [None, 4])
def test_evidence_is_that_of_a_dense_normal(problem, modes, chunk):
    gaussian = GaussianImage.from_score(problem.score).truncated(modes=modes)
    evidence = Evidence(problem.likelihood, problem.prior, gaussian, chunk=chunk)
    exact = dense(problem, THETA, gaussian)[0].log_prob(problem.likelihood.y.flatten())
    torch.testing.assert_close(evidence.log_prob(THETA), exact, rtol=1e-10, atol=0)
    leaf = THETA.clone().requires_grad_()
    torch.testing.assert_close(evidence.log_prob(leaf).detach(), exact, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(evidence.log_prob, leaf)
    z = problem.prior.unconstrain(THETA)
    torch.testing.assert_close(evidence(z), exact + problem.prior.log_prob_z(z))
    assert torch.autograd.gradcheck(evidence, z.requires_grad_())


def test_image_given_parameters_has_the_posterior_mean_and_covariance(problem):
    gaussian = GaussianImage.from_score(problem.score).truncated(modes=12)
    found = Evidence(problem.likelihood, problem.prior, gaussian).given(THETA[:1])
    marginal, a, cov, _ = dense(problem, THETA[:1], gaussian)
    gain = cov @ a[0].T @ torch.linalg.inv(marginal.covariance_matrix[0])
    y = problem.likelihood.y.flatten()
    mean = gaussian.mean.flatten() + gain @ (y - marginal.mean[0])
    torch.testing.assert_close(found.images(found.mean)[0].flatten(), mean, rtol=1e-8, atol=1e-10)
    n = 3000
    many = Evidence(problem.likelihood, problem.prior, gaussian).given(THETA[:1].expand(n, 2))
    draws = many.draw(3, torch.arange(n)).flatten(1)
    posterior = cov - gain @ a[0] @ cov
    off = draws - mean
    # whitened by the posterior's own modes, a chi^2 of n degrees of freedom each
    values, vectors = torch.linalg.eigh(posterior)
    keep = values > 1e-10 * values.max()
    assert int(keep.sum()) == 12
    white = off @ vectors[:, keep] / values[keep].sqrt()
    assert float((white.square().mean(0) - 1).abs().max()) < 4.5 * math.sqrt(2 / n)
    assert float(white.mean(0).abs().max()) < 4.5 / math.sqrt(n)
    torch.testing.assert_close(many.draw(3, torch.arange(n))[5:7].flatten(1), draws[5:7])


def test_amplitude_scales_the_images(problem):
    prior = ParameterPrior(
        {"flux": LogNormal(1.0, 0.5), "width": Uniform(0.2, 2.5), "shift": Uniform(-3, 3)}
    )
    gaussian = GaussianImage.from_score(problem.score)
    evidence = Evidence(problem.likelihood, prior, gaussian, amplitude="flux")
    theta = torch.cat([torch.full((2, 1), 1.7, dtype=F64), THETA], 1)
    exact = dense(problem, THETA, gaussian, 1.7)[0].log_prob(problem.likelihood.y.flatten())
    torch.testing.assert_close(evidence.log_prob(theta), exact, rtol=1e-10, atol=0)
    assert torch.autograd.gradcheck(evidence.log_prob, theta.requires_grad_())
    same = Evidence(problem.likelihood, problem.prior, gaussian.scaled(1.7)).log_prob(THETA)
    torch.testing.assert_close(same, exact, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="also takes shift"):
        Evidence(problem.likelihood, ParameterPrior({"width": Uniform(0, 1)}), gaussian)
    with pytest.raises(ValueError, match="has a parameter of that name"):
        Evidence(problem.likelihood, problem.prior, gaussian, amplitude="width")


@pytest.mark.parametrize("kind", ["masked", "power", "cov"])
def test_other_noises(problem, kind):
    generator = torch.Generator().manual_seed(1)
    n = SIZE**2
    y = problem.likelihood.y[0].clone()
    seen = torch.ones(n, dtype=torch.bool)
    if kind == "masked":
        std = problem.noise * (1 + torch.rand(1, SIZE, SIZE, generator=generator, dtype=F64))
        seen = torch.rand(n, generator=generator) < 0.7
        noise = GaussianNoise(std=torch.where(seen.reshape(1, SIZE, SIZE), std, math.inf))
        y[~seen.reshape(1, SIZE, SIZE)] = math.nan
        cov = torch.diag(std.flatten().square())
    elif kind == "power":
        k = torch.fft.fftfreq(SIZE, dtype=F64)
        power = problem.noise**2 / (1 + 20 * (k[:, None] ** 2 + k[None] ** 2))
        noise = GaussianNoise(power=power)
        eye = torch.eye(n, dtype=F64).reshape(n, SIZE, SIZE)
        cov = torch.fft.ifft2(torch.fft.fft2(eye) * power).real.reshape(n, n)
    else:
        root = torch.randn(n, n, generator=generator, dtype=F64) / n
        cov = problem.noise**2 * (torch.eye(n, dtype=F64) + root @ root.T)
        noise = GaussianNoise(cov=cov)
    gaussian = GaussianImage.from_score(problem.score)
    likelihood = ParametricLikelihood(y, problem.likelihood.family, noise)
    evidence = Evidence(likelihood, problem.prior, gaussian)
    marginal = dense(problem, THETA, gaussian, cov=cov)[0]
    keep = seen.nonzero()[:, 0]
    of_seen = MultivariateNormal(
        marginal.mean[:, keep], marginal.covariance_matrix[:, keep[:, None], keep]
    )
    exact = of_seen.log_prob(y.flatten()[keep])
    torch.testing.assert_close(evidence.log_prob(THETA), exact, rtol=1e-9, atol=0)
    assert torch.autograd.gradcheck(evidence.log_prob, THETA.clone().requires_grad_())


def test_rows_of_data_meet_their_own_parameters(problem):
    y = torch.cat([problem.likelihood.y, problem.likelihood.y + 0.1])
    rows = ParametricLikelihood(y, problem.likelihood.family, GaussianNoise(std=problem.noise))
    gaussian = GaussianImage.from_score(problem.score)
    both = Evidence(rows, problem.prior, gaussian).log_prob(THETA)
    for b in range(2):
        one = ParametricLikelihood(y[b], problem.likelihood.family, rows.noise)
        alone = Evidence(one, problem.prior, gaussian).log_prob(THETA[b : b + 1])
        torch.testing.assert_close(alone[0], both[b], rtol=1e-12, atol=0)
    assert len(rows.select(torch.tensor([1])).y) == 1
    with pytest.raises(ValueError, match="2 rows and there are 3 parameters"):
        rows.data(problem.prior.values(torch.rand(3, 2, dtype=F64)))


def test_likelihood_given_parameters_is_the_ordinary_one(problem):
    values = problem.prior.values(THETA)
    x = problem.image.expand(2, *problem.image.shape)
    ordinary = problem.likelihood.at(values)
    assert ordinary.rows == 2
    torch.testing.assert_close(ordinary.log_prob(x), problem.likelihood.log_prob(values, x))
    assert ordinary.operator.dot_test((1, SIZE, SIZE)) < 1e-12


def test_bad_likelihoods_are_refused(problem):
    family = problem.likelihood.family
    with pytest.raises(ValueError, match="with a row a chain"):
        ParametricLikelihood(torch.zeros(3, 3), family, GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match="expected Gaussian noise"):
        ParametricLikelihood(problem.likelihood.y, family, None)
    bad = problem.likelihood.y[0].clone()
    bad[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        ParametricLikelihood(bad, family, GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match="of images"):
        Evidence(problem.likelihood, problem.prior, GaussianImage.from_score(toy(size=4).score))
    assert BlurFamily(4).background({}) is None


# Gaussians of images ---------------------------------------------------------------------------


def covariance(gaussian):
    f = gaussian.scaled_modes.flatten(1)
    return f.T @ f


def test_gaussian_image_holds_the_covariance_of_a_score_model():
    mean, cov = field(6)
    score = GaussianScore(mean, cov=cov, sde=EDM(0.002, 80.0)).with_affine(3.0, 0.5)
    gaussian = GaussianImage.from_score(score)
    torch.testing.assert_close(covariance(gaussian), 9 * cov, rtol=0, atol=1e-10)
    torch.testing.assert_close(gaussian.mean, 3 * mean + 0.5)
    assert bool((gaussian.std.diff() <= 0).all())
    x = score.to_physical(score.sample(5))
    c, rest = gaussian.coordinates(x)
    torch.testing.assert_close(gaussian.images(c) + rest, x, rtol=0, atol=1e-10)
    short = gaussian.truncated(share=0.9)
    kept = float(short.std.square().sum() / gaussian.std.square().sum())
    assert 0.9 <= kept < 0.95 and len(short.std) < 36
    c, rest = short.coordinates(x)
    torch.testing.assert_close(short.images(c) + rest, x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(1, 6, 5), (2, 4, 4)])
def test_gaussian_image_of_a_power_spectrum(shape):
    ky, kx = (torch.fft.fftfreq(n, dtype=F64) for n in shape[-2:])
    power = (1 + 30 * (ky[:, None] ** 2 + kx[None] ** 2)) ** -2
    power = power * torch.arange(1, shape[0] + 1, dtype=F64).reshape(-1, 1, 1)
    mean = torch.zeros(shape, dtype=F64)
    gaussian = GaussianImage.from_power(mean, power)
    score = GaussianScore(mean, power=power, sde=EDM(0.002, 80.0))
    torch.testing.assert_close(
        covariance(gaussian), covariance(GaussianImage.from_score(score)), rtol=0, atol=1e-10
    )
    with pytest.raises(ValueError, match="differs between k and -k"):
        GaussianImage.from_power(mean, torch.rand(shape[-2:], dtype=F64))


def test_gaussian_image_of_draws_approaches_the_truth():
    mean, cov = field(6)
    score = GaussianScore(mean, cov=cov, sde=EDM(0.002, 80.0))
    error = []
    for n in (20, 4000):
        gaussian = GaussianImage.from_draws(score.sample(n, seed=2))
        error.append(float((covariance(gaussian) - cov).norm() / cov.norm()))
        sample = torch.cov(score.sample(n, seed=2).flatten(1).T)
        assert error[-1] <= float((sample - cov).norm() / cov.norm()) * 1.05
    assert error[1] < 0.1 < error[0] < 1
    assert len(GaussianImage.from_draws(score.sample(20), share=0.9).std) < 36


def test_bad_gaussians_are_refused():
    eye = torch.eye(4, dtype=F64).reshape(4, 1, 2, 2)
    mean = torch.zeros(1, 2, 2, dtype=F64)
    with pytest.raises(ValueError, match="not orthonormal"):
        GaussianImage(mean, 2 * eye, torch.ones(4))
    with pytest.raises(ValueError, match="positive std"):
        GaussianImage(mean, eye, torch.zeros(4))
    with pytest.raises(ValueError, match=r"\(K, \*shape\)"):
        GaussianImage(mean, eye, torch.ones(3))
    good = GaussianImage(mean, eye, torch.ones(4))
    with pytest.raises(ValueError, match="1 to 4 modes"):
        good.truncated(modes=5)
    with pytest.raises(ValueError, match="either"):
        good.truncated()
    with pytest.raises(ValueError, match="at most 4096"):
        GaussianImage.from_draws(torch.zeros(3, 1, 65, 64))
    with pytest.raises(ValueError, match="at least 2"):
        GaussianImage.from_draws(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="symmetric"):
        GaussianImage.from_covariance(mean, torch.arange(16.0).reshape(4, 4))
