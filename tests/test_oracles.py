"""The exact problems are exact: their posteriors and evidences by other routes."""

import math

import pytest
import torch

from diffpost.oracles import gaussian_mixture, ring, textures
from diffpost.oracles.field import gaussian_psf
from diffpost.sample import sample
from diffpost.samplers import DPMSolver
from diffpost.score import GaussianMixtureScore
from diffpost.sde import EDM

F64 = torch.float64


def importance(prior_draws, likelihood, statistic):
    """Evidence and the posterior mean of a statistic by weighted prior draws, each with its standard error."""
    logs = likelihood.log_prob(prior_draws).double()
    top = logs.max()
    w = (logs - top).exp()
    n = len(w)
    z, z_error = w.mean(), w.std() / math.sqrt(n)
    values = statistic(prior_draws).double()
    mean = (w * values).sum() / w.sum()
    error = (w.square() * (values - mean).square()).sum().sqrt() / w.sum()
    return float(z.log() + top), float(z_error / z), float(mean), float(error)


@pytest.mark.parametrize("data", [1, 2])
def test_mixture(data):
    oracle = gaussian_mixture(8, data, seed=data)
    draws = oracle.prior.sample(400_000, seed=3)
    log_z, z_error, mean, error = importance(draws, oracle.likelihood, lambda x: x[:, 0])
    assert abs(log_z - oracle.log_evidence) < 4.5 * z_error
    exact = oracle.exact_draws(20_000, seed=4)[:, 0]
    assert abs(mean - float(exact.mean())) < 4.5 * math.hypot(error, float(exact.std()) / 141)
    assert abs(mean - float(oracle.weights @ oracle.means[:, 0])) < 4.5 * error
    # the covariance of a component, from draws of it alone
    one = oracle.exact_draws(20_000, seed=5)
    near = one[oracle.nearest(one) == int(oracle.weights.argmax())]
    a, s = (
        oracle.likelihood.operator.matrix,
        oracle.likelihood.noise.weight().rsqrt().reshape(-1)[0],
    )
    precision = torch.eye(8, dtype=F64) + a.T @ a / s**2
    found = near.T.cov() @ precision - torch.eye(8, dtype=F64)
    assert float(found.abs().max()) < 4.5 * 3 / math.sqrt(len(near))


def test_textures():
    """Weights and evidence by dense matrices, means and variances by drawing, mode by mode."""
    size, noise = 8, 0.5
    oracle = textures(size, noise=noise, psf_sigma=1.0, seed=2)
    d = size * size
    dft = torch.fft.fft2(torch.eye(d, dtype=F64).reshape(d, size, size), norm="ortho").reshape(d, d)
    _, transfer = gaussian_psf(size, 1.0)
    logs = []
    for field, mean, variance in zip(
        oracle.prior.fields, oracle.means, oracle.variances, strict=True
    ):
        power = field.eigenvalues.reshape(-1)
        cov = (dft.T @ torch.diag(power).to(dft) @ dft.conj()).real
        blur = (dft.T @ torch.diag(transfer.reshape(-1)).to(dft) @ dft.conj()).real
        eye = torch.eye(d, dtype=F64)
        torch.testing.assert_close(
            oracle.likelihood.operator(eye.reshape(d, 1, size, size)).reshape(d, d), blur.T
        )
        y = oracle.likelihood.y.reshape(-1)
        total = blur @ cov @ blur.T + noise**2 * eye
        logs.append(
            torch.distributions.MultivariateNormal(torch.zeros(d, dtype=F64), total).log_prob(y)
        )
        gain = torch.linalg.solve(total, blur @ cov).T
        torch.testing.assert_close(mean.reshape(-1), gain @ y)
        posterior = (cov - gain @ blur @ cov).diagonal()
        torch.testing.assert_close(variance.mean().expand(d), posterior)
    logits = torch.stack(logs) + oracle.prior.weights.log()
    torch.testing.assert_close(logits.softmax(0), oracle.weights)
    assert oracle.log_evidence == pytest.approx(float(logits.logsumexp(0)), rel=1e-9)
    # the probability of a texture, averaged over exact draws, is its weight: the tower rule
    share = oracle.share(oracle.exact_draws(4000, seed=1))
    assert abs(float(share.mean() - oracle.weights[0])) < 4.5 * float(share.std()) / math.sqrt(4000)


def test_the_mixture_of_fields_is_a_score_model():
    """Its denoiser is the gradient of its density, and its draws have the prior's weights."""
    oracle = textures(8, seed=0)
    prior = oracle.prior
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    t = torch.tensor(0.7, dtype=F64)

    def log_prob(v):
        logs = torch.stack([f.log_prob(v, t) for f in prior.fields], 1) + prior.weights.log()
        return logs.logsumexp(1).sum()

    torch.testing.assert_close(
        prior.score(x, t), torch.func.grad(log_prob)(x), rtol=1e-7, atol=1e-9
    )
    draws = sample(prior, 1000, DPMSolver(64, eta=1.0), seed=1, progress=False)
    share = prior.responsibilities(draws.x)[:, 0]
    assert abs(float(share.mean()) - 0.5) < 4.5 * float(share.std()) / math.sqrt(1000)


def test_point_lens():
    """Moments and evidence of the ring by importance sampling; the Jacobian by finite differences."""
    oracle = ring(seed=3)
    draws = oracle.prior.sample(400_000, seed=1)
    log_z, z_error, mean, error = importance(draws, oracle.likelihood, lambda x: x[:, 1])
    assert abs(log_z - oracle.log_evidence) < 4.5 * z_error
    assert abs(mean - float(oracle.mean[1])) < 4.5 * error
    exact = oracle.exact_draws(40_000, seed=2)
    torch.testing.assert_close(
        exact.T.cov(), oracle.cov, atol=4.5 * 0.01 * float(oracle.cov[0, 0]), rtol=0
    )
    lens, x, v = oracle.likelihood.operator, draws[:5], torch.ones(5, 2, dtype=F64)
    slope = (lens(x + 1e-6 * v) - lens(x - 1e-6 * v)) / 2e-6
    torch.testing.assert_close(lens.linearize(x)(v), slope, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        lens.output_shape((3,))


def test_bad_sizes():
    with pytest.raises(ValueError, match="even size"):
        gaussian_mixture(7, 1)
    assert isinstance(gaussian_mixture(8, 1, sde=EDM()).prior, GaussianMixtureScore)
