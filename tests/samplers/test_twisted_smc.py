"""Twisted SMC against closed forms: moments, weights of modes and evidences, one cloud or many."""

import math
import warnings

import pytest
import torch

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Identity, Mask, Matrix
from diffpost.oracles import gaussian_mixture, ring
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import CollapseWarning, DPMSolver, Heun, RangeWarning, TwistedSMC
from diffpost.samplers.particles import (
    effective_ancestors,
    effective_size,
    evidence_error,
    systematic,
)
from diffpost.samplers.scales import largest_gain, narrowest, widest
from diffpost.score import GaussianMixtureScore, GaussianScore
from diffpost.sde import EDM, TSVE, VP

F64 = torch.float64


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def accepts(draws, mean, cov):
    """Whether weighted draws (n, d) have this mean and covariance: 4.5 standard deviations of both chi^2, for as
    many draws as the weights and resamplings leave.
    """
    x, weights = draws.x.double().flatten(1), draws.weights
    n = 1 / float(weights.square().sum() + draws.extras["log_evidence_error"][0] ** 2)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), (x - mean).T, upper=False).T
    d = white.shape[1]
    shift = n * (weights @ white).square().sum() / d - 1
    spread = (weights @ white.square()).mean() - 1
    return bool(shift < 4.5 * math.sqrt(2 / d) and spread.abs() < 4.5 * math.sqrt(2 / (n * d)))


def gaussian(matrix, noise_cov, y, prior_cov):
    """Mean and covariance of N(0, prior_cov) given y, and log p(y)."""
    total = matrix @ prior_cov @ matrix.T + noise_cov
    gain = torch.linalg.solve(total, matrix @ prior_cov).T
    evidence = torch.distributions.MultivariateNormal(torch.zeros_like(y), total).log_prob(y)
    return gain @ y, prior_cov - gain @ matrix @ prior_cov, float(evidence)


def linear_problems():
    root = randn(6, 6, seed=1) / 2
    cov = root @ root.T + 0.1 * torch.eye(6, dtype=F64)
    wide = randn(3, 6, seed=2)
    several = torch.tensor([0.1, 1.0, 3.0], dtype=F64)
    mixed = randn(3, 3, seed=3)
    mixed = mixed @ mixed.T + 0.1 * torch.eye(3, dtype=F64)
    kept = torch.tensor([True, False, True, True, False, True])
    gone = torch.tensor([0.3, torch.inf, 0.3, 0.2, torch.inf, 1.0], dtype=F64)
    eye = torch.eye(6, dtype=F64)
    return {
        "white": (cov, Matrix(wide), GaussianNoise(std=0.2), wide, 0.04 * torch.eye(3, dtype=F64)),
        "uneven": (cov, Matrix(wide), GaussianNoise(std=several), wide, several.square().diag()),
        "correlated": (cov, Matrix(wide), GaussianNoise(cov=mixed), wide, mixed),
        "mask": (cov, Mask(kept), GaussianNoise(std=0.3), eye[kept], 0.09 * eye[:4, :4]),
        "masked by the noise": (cov, Identity(), GaussianNoise(std=gone), eye[kept], gone[kept].square().diag()),
    }  # fmt: skip


@pytest.mark.parametrize("name", linear_problems())
@pytest.mark.parametrize("sde", [EDM(1e-3, 80.0), VP()], ids=repr)
def test_exact_on_gaussians(name, sde):
    """Moments and evidence of a Gaussian; the weights stay nearly equal, as the twist is exact there."""
    cov, operator, noise, matrix, noise_cov = linear_problems()[name]
    prior = GaussianScore(torch.zeros(6, dtype=F64), cov=cov, sde=sde)
    truth = prior.sample(1, seed=5)[0]
    y = matrix @ truth + torch.linalg.cholesky(noise_cov) @ randn(len(matrix), seed=5)
    data = y
    if len(matrix) == 4:  # an image of which some pixels count
        data = torch.full((6,), 0.0 if name == "mask" else torch.nan, dtype=F64)
        data[matrix.sum(0).bool()] = y
    posterior = Posterior(prior, Likelihood(data, operator, noise, batched=False))
    draws = sample(posterior, 2000, TwistedSMC(2000, 100), seed=6, progress=False)
    mean, exact_cov, evidence = gaussian(matrix, noise_cov, y, cov)
    assert accepts(draws, mean, exact_cov)
    assert not accepts(draws, mean + 0.3 * exact_cov.diagonal().sqrt(), exact_cov)
    assert not accepts(draws, mean, 1.3 * exact_cov)
    assert float(draws.extras["ess"].min()) > 0.9 * 2000
    error = float(draws.extras["log_evidence_error"][0])
    if name != "mask":  # there the data that are not seen count as zeros of unit noise
        assert abs(float(draws.extras["log_evidence"][0]) - evidence) < max(4.5 * error, 0.02)


def shares(oracle, draws):
    """Weight of every component, (25,)."""
    near = oracle.nearest(draws.x)
    return torch.zeros(25, dtype=F64).scatter_add_(0, near, draws.weights)


def test_modes_and_evidence_of_a_mixture():
    """Forty clouds: their evidences average to the exact one, scatter as they say, and weigh the modes rightly;
    moment matching alone fails the same test of the modes.
    """
    oracle = gaussian_mixture(8, 1, seed=0)
    clouds, particles = 40, 150
    sampler = TwistedSMC(particles, 60)
    draws = sample(oracle.posterior(), clouds * particles, sampler, seed=1, progress=False)
    log_z = draws.extras["log_evidence"][::particles] - oracle.log_evidence
    told = draws.extras["log_evidence_error"][::particles]
    z = log_z.exp()
    assert abs(float(z.mean()) - 1) < 4.5 * float(z.std()) / math.sqrt(clouds)
    assert 0.5 < float(told.mean()) / float(log_z.std()) < 2.0

    per_cloud = torch.stack(
        [
            torch.zeros(25, dtype=F64).scatter_add_(
                0, oracle.nearest(draws.x[i : i + particles]), draws.weights[i : i + particles]
            )
            for i in range(0, len(draws), particles)
        ]
    )
    # ratio estimates: sum over clouds of (share - expected x weight of the cloud)
    excess = per_cloud - oracle.weights * per_cloud.sum(1, keepdim=True)
    scale = math.sqrt(clouds) * excess.std(0)
    large = oracle.weights > 0.02
    assert int(large.sum()) > 1
    assert bool((excess.sum(0).abs() < 4.5 * scale)[large].all())

    plain = sample(oracle.posterior(), 2000, DPMSolver(60, eta=1.0), seed=1, progress=False)
    off = (shares(oracle, plain) - oracle.weights).abs()
    assert bool(
        (off > 4.5 * (oracle.weights * (1 - oracle.weights) / 2000).sqrt() + 0.02)[large].any()
    )


def test_nonlinear():
    """The point lens: mean and covariance by quadrature, and the evidence."""
    oracle = ring(seed=1)
    posterior = Posterior(oracle.prior, oracle.likelihood)
    draws = sample(posterior, 2000, TwistedSMC(2000, 60), seed=2, progress=False)
    assert accepts(draws, oracle.mean, oracle.cov)
    assert not accepts(draws, oracle.mean, 1.3 * oracle.cov)
    off = float(draws.extras["log_evidence"][0]) - oracle.log_evidence
    assert float(draws.extras["log_evidence_error"][0]) < 0.1
    assert abs(off) < 4.5 * float(draws.extras["log_evidence_error"][0]) + 0.01


def test_one_cloud_for_each_observation():
    prior = GaussianScore(torch.zeros(3, dtype=F64), var=1.0, sde=EDM(1e-3, 80.0))
    y = torch.tensor([[-2.0], [0.5], [3.0]], dtype=F64)
    matrix = torch.tensor([[1.0, 1.0, 0.0]], dtype=F64)
    likelihood = Likelihood(y, Matrix(matrix), GaussianNoise(std=0.5), batched=True)
    posterior = Posterior(prior, likelihood.repeat(500))
    draws = sample(posterior, 1500, TwistedSMC(500, 60), seed=0, progress=False)
    for row in range(3):
        rows = slice(500 * row, 500 * (row + 1))
        weights = draws.log_weights[rows].softmax(0)
        mean, cov, evidence = gaussian(
            matrix, torch.tensor([[0.25]], dtype=F64), y[row], torch.eye(3, dtype=F64)
        )
        spread = (cov.diagonal() / 500).sqrt()
        assert float(((weights @ draws.x[rows] - mean).abs() / spread).max()) < 4.5
        other = gaussian(
            matrix, torch.tensor([[0.25]], dtype=F64), y[row - 1], torch.eye(3, dtype=F64)
        )[0]
        assert float(((weights @ draws.x[rows] - other).abs() / spread).max()) > 9
        assert abs(float(draws.extras["log_evidence"][rows][0]) - evidence) < 0.05
    with pytest.raises(ValueError, match="rows that differ within a cloud"):
        sample(Posterior(prior, likelihood.repeat(5)), 15, TwistedSMC(3, 4), progress=False)


def test_batches_do_not_change_a_cloud():
    oracle = gaussian_mixture(8, 2, seed=3)
    sampler = TwistedSMC(30, 12, nsr_min=0.05, nsr_max=200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        whole = sample(oracle.posterior(), 90, sampler, seed=5, progress=False)
        split = sample(oracle.posterior(), 90, sampler, seed=5, batch_size=30, progress=False)
    torch.testing.assert_close(whole.x, split.x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.log_weights, split.log_weights, rtol=1e-9, atol=1e-9)


def test_collapse_is_told():
    """Sharp data of many dimensions in few steps leave few particles, and this is said."""
    oracle = gaussian_mixture(8, 8, seed=1)
    sharp = Likelihood(oracle.likelihood.y, oracle.likelihood.operator, GaussianNoise(std=1e-3))
    with pytest.warns(CollapseWarning, match="effective size"):
        draws = sample(Posterior(oracle.prior, sharp), 64, TwistedSMC(64, 3), progress=False)
    assert float(draws.extras["ess"].min()) < 2


def test_collapse_by_descent_is_told():
    """Resampling at every level keeps the effective size up while all but few ancestors die out."""
    oracle = gaussian_mixture(8, 6, seed=1)
    with pytest.warns(CollapseWarning, match="first particles"):
        draws = sample(oracle.posterior(), 16, TwistedSMC(16, 100, ess=1.0), seed=1, progress=False)
    assert float(draws.extras["ancestors"][0]) < 4
    assert bool(draws.extras["log_evidence_error"].isinf().all())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sde", [EDM(1e-3, 80.0), TSVE(1e-3, 80.0)], ids=repr)
def test_float32_images_in_physical_units(sde, scale):
    """A prior of images (1, 2, 2) in float32 with a scale and an offset, a masked datum, another process."""
    prior = GaussianScore(torch.zeros(1, 2, 2), var=1.0, sde=sde).with_affine(scale, 5.0)
    std = torch.tensor([[[0.01, 0.5], [torch.inf, 0.5]]])
    y = torch.tensor([[[6.0, 4.0], [torch.nan, 5.0]]])
    posterior = Posterior(prior, Likelihood(y, Identity(), GaussianNoise(std=std), batched=False))
    draws = sample(posterior, 2000, TwistedSMC(2000, 80), seed=3, progress=False)
    gain = torch.where(std.isinf(), 0.0, scale**2 / (scale**2 + std.square())).double().flatten()
    mean = 5 + gain * (y.nan_to_num(0.0).double().flatten() - 5)
    cov = (scale**2 * (1 - gain)).diag()
    assert accepts(draws, mean, cov)
    assert not accepts(draws, mean + 0.3 * cov.diagonal().sqrt(), cov)
    assert not accepts(draws, mean, 1.3 * cov)
    total = (scale**2 + std.double().square()).flatten()[[0, 1, 3]]
    exact = torch.distributions.Normal(5.0, total.sqrt()).log_prob(y.double().flatten()[[0, 1, 3]])
    assert abs(float(draws.extras["log_evidence"][0]) - float(exact.sum())) < 0.05
    assert draws.vjps < 80 * 3 + 5


def test_scales():
    """The widest and narrowest directions of a Gaussian, and the grid that follows."""
    values = torch.tensor([9.0, 1.0, 0.04, 4e-4], dtype=F64)
    basis = torch.linalg.qr(randn(4, 4, seed=0))[0]
    prior = GaussianScore(
        torch.full((4,), 50.0, dtype=F64), cov=basis @ values.diag() @ basis.T, sde=EDM(1e-4, 300.0)
    )
    assert widest(prior) == pytest.approx(3, rel=0.01)
    assert narrowest(prior, prior.sample(4)) == pytest.approx(0.02, rel=0.02)
    likelihood = Likelihood(
        torch.zeros(1, dtype=F64), Matrix(10 * basis[:, :1].T), GaussianNoise(std=0.1)
    )
    assert largest_gain(likelihood, prior.sample(2)) == pytest.approx(1e4, rel=1e-6)
    chosen = TwistedSMC(10, 10).prepared(Posterior(prior, likelihood))
    assert chosen.nsr_max == pytest.approx(24, rel=0.01)
    # 1/(1/0.02^2 + 1e4) = 0.00894^2
    assert chosen.nsr_min == pytest.approx(0.05 * 0.00894, rel=0.02)
    assert TwistedSMC(10, 10, nsr_max=7.0).prepared(Posterior(prior, likelihood)).nsr_max == 7.0
    narrow = GaussianScore(prior.mean, cov=basis @ values.diag() @ basis.T, sde=EDM(1e-4, 5.0))
    with pytest.warns(RangeWarning, match="process that reaches 24"):
        TwistedSMC(10, 10).prepared(Posterior(narrow, likelihood))


def test_start_too_low_loses_modes():
    """Why the start is chosen by the prior's spread: from a tenth of it, the weights of modes are wrong."""
    means = torch.tensor([[-20.0, 0.0], [20.0, 0.0]], dtype=F64)
    prior = GaussianMixtureScore(means, torch.tensor([0.9, 0.1]), 1.0, EDM(1e-3, 1000.0))
    y, operator = torch.zeros(1, dtype=F64), Matrix(torch.tensor([[0.0, 1.0]], dtype=F64))
    posterior = Posterior(prior, Likelihood(y, operator, GaussianNoise(std=1.0)))

    def share(**options):
        sampler = TwistedSMC(2000, 60, **options)
        draws = sample(posterior, 2000, sampler, seed=0, progress=False)
        return float(draws.weights @ (draws.x[:, 0] > 0).double())

    assert abs(share() - 0.1) < 4.5 * math.sqrt(0.09 / 2000)
    assert abs(share(nsr_max=3.0) - 0.1) > 0.05


def test_resampling():
    """Every particle is kept floor or ceil of N w times, N w on average; effective size and error by hand."""
    weights = torch.tensor([[0.1, 0.2, 0.05, 0.65], [0.25, 0.25, 0.25, 0.25]], dtype=F64)
    counts = torch.zeros(2, 4, dtype=F64)
    grid = (torch.arange(1000, dtype=F64) + 0.5) / 1000
    for u in grid:
        chosen = systematic(weights.log() + 3, u.repeat(2))
        count = torch.stack([torch.bincount(row, minlength=4) for row in chosen])
        assert bool(((count - 4 * weights).abs() < 1).all())
        counts += count
    torch.testing.assert_close(counts / 1000, 4 * weights, atol=2e-3, rtol=0)
    assert float(effective_size(weights.log())[1]) == pytest.approx(4)
    ancestors = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 0, 0]])
    alike = torch.zeros(3, 5, dtype=F64)
    left = effective_ancestors(alike, ancestors)
    torch.testing.assert_close(left, torch.tensor([5.0, 25 / 7, 1.0], dtype=F64))
    errors = evidence_error(alike, ancestors)
    assert float(errors[0]) < 1e-6 and bool(errors[1:].isinf().all())  # too few ancestors to tell


def test_errors():
    prior = GaussianScore(torch.zeros(1, 20, 20, dtype=F64), var=1.0, sde=EDM())
    many = Posterior(prior, Likelihood(torch.zeros(1, 20, 20), Identity(), GaussianNoise(std=1.0)))
    with pytest.raises(ValueError, match="400 data; expected at most 256"):
        sample(many, 10, TwistedSMC(10, 4), progress=False)
    with pytest.raises(ValueError, match="expected a Posterior"):
        sample(prior, 10, TwistedSMC(10, 4), progress=False)
    with pytest.raises(ValueError, match="multiple"):
        sample(gaussian_mixture().posterior(), 11, TwistedSMC(10, 4), progress=False)
    for bad in ({"particles": 1}, {"ess": 2.0}, {"steps": 1}):
        with pytest.raises(ValueError, match="expected"):
            TwistedSMC(**({"particles": 10, "steps": 4} | bad))
    assert Heun(4).prepared(prior) == Heun(4)
