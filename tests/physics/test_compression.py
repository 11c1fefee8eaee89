"""`compress`: the same likelihood in fewer data, and the exact posterior of a Gaussian sky through it."""

import math

import pytest
import torch

import diffpost as dp
from diffpost.physics import Grid

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import Visibilities, compress

F64 = torch.float64
ARCSEC = math.pi / 180 / 3600


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def observed(n, m, noise, rows=None, seed=0):
    """Baselines mostly short, weights that differ, and data of random skies of unit rms."""
    u, v = randn(2, m, seed=seed) * 0.2 * n / (n * 0.1 * ARCSEC) / 2.5
    limit = 0.49 / (0.1 * ARCSEC)
    operator = Visibilities(u.clamp(-limit, limit), v.clamp(-limit, limit), Grid(n, 0.1))
    weight = (
        0.5 + torch.rand(m, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    ) / noise**2
    weight[:3] = 0.0
    clean = operator(randn(rows or 1, 1, n, n, seed=2))
    y = clean + randn(*clean.shape, seed=3) * weight.clamp_min(1e-3 / noise**2).rsqrt()
    return dp.Likelihood(y if rows else y[0], operator, dp.GaussianNoise(weight=weight))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("m", [40, 700])  # fewer and more than pixels
def test_same_likelihood(rows, m):
    like = observed(10, m, 0.3, rows)
    small = compress(like)
    assert small.data_shape[0] <= min(2 * m, 100)
    x, z = randn(2, 3, 1, 10, 10, seed=5)
    gap = like.log_prob(x) - like.log_prob(z)
    torch.testing.assert_close(small.log_prob(x) - small.log_prob(z), gap, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(small.score(x), like.score(x), rtol=1e-5, atol=1e-4)
    wrong = compress(dp.Likelihood(like.y, like.operator, dp.GaussianNoise(std=0.4)))
    assert (wrong.score(x) - like.score(x)).norm() > 0.05 * like.score(x).norm()


def test_after_another_operator():
    """What comes before the visibilities stays."""
    bare = observed(10, 200, 0.3)
    psf = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    like = dp.Likelihood(
        bare.y, bare.operator @ dp.Convolve(psf) @ dp.Mask(torch.ones(10, 10)), bare.noise
    )
    x = randn(2, 1, 10, 10, seed=5)
    torch.testing.assert_close(compress(like).score(x), like.score(x), rtol=1e-5, atol=1e-4)


def test_refused():
    like = observed(10, 40, 0.3)
    big = Visibilities(randn(5) * 1e5, randn(5, seed=1) * 1e5, Grid(72, 0.1))
    for other, message in (
        (
            dp.Likelihood(torch.zeros(1, 4, 4), dp.Identity(), dp.GaussianNoise(std=1.0)),
            "expected Vis",
        ),
        (dp.Likelihood(like.y, like.operator, dp.GaussianNoise(cov=torch.eye(80))), "independent"),
        (dp.Likelihood(like.y, like.operator, dp.GaussianNoise(weight=0.0)), "weight 0"),
        (dp.Likelihood(torch.zeros(5, 2), big, dp.GaussianNoise(std=1.0)), "at most 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(other)


def exact(prior, like):
    """Mean and covariance by dense linear algebra on the visibilities themselves, (n,) and (n, n)."""
    n = prior.shape[-1] ** 2
    columns = like.operator(torch.eye(n, dtype=F64).reshape(n, *prior.shape)).flatten(1)
    weight = like.noise.weight().expand(like.data_shape).reshape(-1)
    eye = torch.eye(n, dtype=F64).reshape(n, *prior.shape)
    modes = torch.fft.fft2(eye, norm="ortho") / prior.eigenvalues
    inverse = torch.fft.ifft2(modes, norm="ortho").real.reshape(n, n)
    precision = inverse + (columns * weight) @ columns.T
    cov = torch.linalg.inv(precision)
    return cov @ (columns @ (weight * like.y.reshape(-1))), cov


def report(x, mean, cov):
    """RMS error of the mean over its Monte Carlo floor, and variance ratios, with errors, where the data say much, something and
    hardly anything: thirds of the eigenvectors of the exact covariance.
    """
    n = len(x)
    flat = x.flatten(1).double() - mean
    floor = math.sqrt(float(cov.trace()) / n)
    values, vectors = torch.linalg.eigh(cov)
    scores = (flat @ vectors) / values.sqrt()
    ratios = [float(part.var(0).mean()) for part in scores.chunk(3, dim=1)]
    error = math.sqrt(2 / (n * scores.shape[1] / 3))
    return float(flat.mean(0).norm()) / floor, ratios, error


def accepted(found):
    off, ratios, error = found
    return off <= 1.15 and all(abs(ratio - 1) <= 0.03 + 3 * error for ratio in ratios)


def sky(n):
    line = torch.fft.fftfreq(n, dtype=F64) * n
    k = torch.hypot(line[:, None], line[None, :]).clamp_min(1)
    power = k**-3
    return dp.GaussianScore(
        torch.zeros(1, n, n, dtype=F64), power=power / power.mean(), sde=dp.EDM(1e-3, 200.0)
    )


def test_gaussian_sky():
    """The bound of the Gaussian-field oracle: the mean within 1.15 of its floor and variances within 3%, at 32 calls; draws for
    twice the noise, and of the prior, are rejected.
    """
    prior = sky(32)
    like = observed(32, 1500, 3.0)
    truth = prior.sample(1, seed=7)
    clean = like.operator(truth)[0]
    y = clean + randn(*clean.shape, seed=8) * like.noise.weight().clamp_min(1e-3).rsqrt()
    like = dp.Likelihood(y, like.operator, like.noise)
    mean, cov = exact(prior, like)
    small = compress(like)

    def draws(likelihood, n=256):
        posterior = dp.Posterior(prior, likelihood, dp.MomentMatching())
        return dp.sample(posterior, n, dp.DPMSolver(32), seed=3, progress=False)

    made = draws(small)
    assert made.calls == 32
    assert accepted(report(made.x, mean, cov)), report(made.x, mean, cov)
    doubled = dp.Likelihood(small.y, small.operator, dp.GaussianNoise(std=2.0))
    assert not accepted(report(draws(doubled, 64).x, mean, cov))
    assert not accepted(report(prior.sample(256, seed=1), mean, cov))


def solved(prior, like, rhs, steps=3000):
    """(A^T W A + C^-1)^-1 rhs, (B, 1, n, n), by conjugate gradients on the Toeplitz operator, preconditioned by C."""
    normal = like.operator.normal(like.noise.weight().expand(like.data_shape))

    def prior_filter(v, power):
        return torch.fft.ifft2(torch.fft.fft2(v) * power).real

    def dot(a, b):
        return (a * b).flatten(1).sum(1).reshape(-1, 1, 1, 1)

    power = prior.eigenvalues.double()
    x, r = torch.zeros_like(rhs), rhs
    z = prior_filter(r, power)
    p, rz = z, dot(r, z)
    for _ in range(steps):
        q = normal(p) + prior_filter(p, 1 / power)
        a = rz / dot(p, q)
        x, r = x + a * p, r - a * q
        z = prior_filter(r, power)
        rz, old = dot(r, z), rz
        # 1e-10 would leave 0.07 of a standard deviation, for data this good
        if float((rz / dot(rhs, prior_filter(rhs, power))).max()) < 1e-13:
            return x
        p = z + rz / old * p
    raise AssertionError(f"not converged in {steps} steps")


@pytest.mark.slow
def test_gaussian_sky_of_64_pixels():
    """As above, against the exact mean and 64 exact draws by perturbing and solving with the Toeplitz operator: no code of
    samplers, compression or NUFFTs in the loop.  Variances in bands of wavenumber, and the square of the mean's error over
    its expectation, 4 Monte Carlo errors beyond 3%. That square scatters as the power of one draw does.
    """
    n, count = 64, 64
    prior = sky(n)
    like = observed(n, 4000, 6.0)
    truth = prior.sample(1, seed=7)
    clean = like.operator(truth)[0]
    weight = like.noise.weight().expand(like.data_shape)
    y = clean + randn(*clean.shape, seed=8) * weight.clamp_min(1e-3).rsqrt()
    like = dp.Likelihood(y, like.operator, like.noise)
    perturbed = weight.sqrt() * randn(count, *like.data_shape, seed=11)
    white = torch.fft.fft2(randn(count, 1, n, n, seed=12)) / prior.eigenvalues.double().sqrt()
    right = like.operator.adjoint(perturbed) + torch.fft.ifft2(white).real
    mean = solved(prior, like, like.operator.adjoint(weight * like.y.reshape(1, *weight.shape)))
    exact_draws = mean + solved(prior, like, right)
    line = torch.fft.fftfreq(n, dtype=F64) * n
    k = torch.hypot(line[:, None], line[None, :])
    bands = [(k >= low) & (k < high) for low, high in ((0, 4), (4, 12), (12, 99))]

    def band_power(x):
        modes = torch.fft.fft2(x.double() - mean, norm="ortho").abs().square()[:, 0]
        return torch.stack([modes[:, band].mean(1) for band in bands], 1)

    power = (exact_draws - mean).square().flatten(1).sum(1)
    scatter = float(power.std() / power.mean())

    def accepted(x):
        floor = ((exact_draws - mean).square().mean() / len(x)).sqrt()
        off = float((x.double().mean(0) - mean[0]).square().mean().sqrt() / floor)
        ours, theirs = band_power(x), band_power(exact_draws)
        ratio = ours.mean(0) / theirs.mean(0)
        error = torch.hypot(*(p.std(0) / p.mean(0) / math.sqrt(len(p)) for p in (ours, theirs)))
        within = bool(((ratio - 1).abs() <= 0.03 + 4 * error).all())
        return off**2 <= 1.03 + 4 * scatter and within, (off, scatter, ratio)

    small = compress(like)

    def draws(likelihood):
        posterior = dp.Posterior(prior, likelihood, dp.MomentMatching())
        return dp.sample(posterior, count, dp.DPMSolver(32), seed=3, progress=False)

    made = draws(small)
    assert made.calls == 32
    right, found = accepted(made.x)
    assert right, found
    assert accepted(exact_draws)[0]
    doubled = dp.Likelihood(small.y, small.operator, dp.GaussianNoise(std=2.0))
    assert not accepted(draws(doubled).x)[0]
    assert not accepted(prior.sample(count, seed=1))[0]
