"""What is recommended follows the data and the prior, works, and is what a posterior without a guidance takes."""

import pytest
import torch

import diffpost as dp
from diffpost.guidance import IsotropicCovariance, LocalCovariance, MomentMatching, choose
from diffpost.networks.precondition import NetworkScore
from diffpost.networks.unet import UNet
from diffpost.oracles import gaussian_field, gaussian_mixture, ring, textures


def noisy(prior, seed=0, std=0.1):
    """White-noise data of a draw of a prior of images."""
    x = dp.sample(prior, 1, dp.DPMSolver(8, eta=1.0), seed=seed, progress=False).x[0]
    y = x + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return dp.Likelihood(y, dp.Identity(), dp.GaussianNoise(std=std))


def same(a, b):
    return repr(a) == repr(b)


def test_gaussian_fields_are_exact():
    oracle = gaussian_field(16)
    advice = dp.recommend(oracle.prior, oracle.likelihood)
    assert isinstance(advice.sampler, dp.DPMSolver)
    assert advice.guidance.covariance is None
    assert same(dp.Posterior(oracle.prior, oracle.likelihood).guidance, advice.guidance)
    draws = dp.sample(advice.posterior, 200, advice.sampler, seed=1, progress=False)

    def right(x):
        report = oracle.report(x, [(0, 4), (4, 99)])
        pairs = zip(report.ratios, report.errors, strict=True)
        within = all(abs(ratio - 1) < 4.5 * error + 0.02 for ratio, error in pairs)
        return report.mean_error < 1.3 * report.floor and within

    assert right(draws.x)
    middle = draws.x.mean(0)
    assert not right(middle + 1.1 * (draws.x - middle))  # negative controls
    assert not right(draws.x + 0.2 * draws.x.std(0))


@pytest.mark.parametrize("oracle", [gaussian_mixture(8, 2, seed=2), ring(seed=1)], ids=repr)
def test_few_data_get_particles(oracle):
    """Advised from a pilot, and right: the evidence is met."""
    advice = dp.recommend(oracle.prior, oracle.likelihood)
    assert isinstance(advice.sampler, dp.TwistedSMC)
    assert "effective share" in str(advice)
    n = advice.sampler.particles
    draws = dp.sample(advice.posterior, n, advice.sampler, seed=1, progress=False)
    off = float(draws.extras["log_evidence"][0]) - oracle.log_evidence
    assert float(draws.extras["log_evidence_error"][0]) < 0.2
    bound = 4.5 * float(draws.extras["log_evidence_error"][0]) + 0.02
    assert (
        abs(off) < bound < min(abs(off - 2), abs(off + 2))
    )  # an evidence wrong by e^2 would be seen


def test_a_linear_gaussian_needs_no_particles():
    prior = dp.GaussianScore(torch.zeros(4, dtype=torch.float64), var=1.0, sde=dp.EDM())
    data = dp.Likelihood(torch.ones(4, dtype=torch.float64), dp.Identity(), dp.GaussianNoise(std=1))
    assert isinstance(dp.recommend(prior, data).sampler, dp.DPMSolver)


def test_rows_of_their_own_get_no_particles():
    oracle = gaussian_mixture(8, 1)
    y = oracle.likelihood.y[None] + torch.arange(3.0, dtype=torch.float64)[:, None]
    data = dp.Likelihood(y, oracle.likelihood.operator, oracle.likelihood.noise, batched=True)
    advice = dp.recommend(oracle.prior, data)
    assert not isinstance(advice.sampler, dp.TwistedSMC)
    assert "repeat" in str(advice)


def test_particles_that_collapse_are_not_advised():
    """Eight data sharper than the process's smallest noise: the pilot collapses, and both are told."""
    oracle = gaussian_mixture(8, 8, seed=1)
    sharp = dp.Likelihood(
        oracle.likelihood.y, oracle.likelihood.operator, dp.GaussianNoise(std=1e-4)
    )
    advice = dp.recommend(oracle.prior, sharp)
    assert not isinstance(advice.sampler, dp.TwistedSMC)
    assert "collapsed in the pilot" in str(advice)
    assert "goes lower" in str(advice)


def test_masked_data_do_not_count():
    """An image of which twelve pixels were seen has twelve data."""
    std = torch.full((1, 20, 20), torch.inf, dtype=torch.float64)
    std[0, 4:7, 3:7] = 0.5
    prior = textures(20).prior
    y = torch.zeros(1, 20, 20, dtype=torch.float64)
    advice = dp.recommend(prior, dp.Likelihood(y, dp.Identity(), dp.GaussianNoise(std=std)))
    assert isinstance(advice.sampler, dp.TwistedSMC)
    assert "12 data are few" in str(advice)


def test_many_data_of_a_cheap_prior_end_with_chains():
    oracle = textures(20, seed=1)
    advice = dp.recommend(oracle.prior, oracle.likelihood)
    assert isinstance(advice.sampler, dp.MALA)
    assert "400 data" in str(advice)


def test_a_process_that_starts_too_low_is_told():
    oracle = gaussian_field(16, sde=dp.EDM(0.002, 3.0))
    assert "Take a process that reaches" in str(dp.recommend(oracle.prior, oracle.likelihood))


def test_trained_priors():
    """A shipped prior brings its table of errors; one without gets a table from its own draws."""
    prior = dp.load_prior("galaxies-32")
    data = noisy(prior)
    advice = dp.recommend(prior, data)
    assert isinstance(advice.guidance.covariance, LocalCovariance)
    assert not advice.guidance.differentiate
    assert same(dp.Posterior(prior, data).guidance, advice.guidance)
    assert 0.7 < advice.pilot["reduced_chi2"] < 1.3

    net = UNet(channels=1, widths=(8,), blocks=(1,), embedding=8)
    bare = NetworkScore(net, dp.EDM(0.01, 10.0), (1, 16, 16), sigma_data=0.5)
    choice = choose(bare, noisy(bare))
    assert isinstance(choice.guidance.covariance, IsotropicCovariance)
    measured = dp.recommend(bare, noisy(bare))
    assert isinstance(measured.guidance.covariance, LocalCovariance)
    assert "measured on" in str(measured)
    few = dp.Likelihood(torch.zeros(1, 4, 4), dp.PixelBin(4), dp.GaussianNoise(std=1.0))
    assert isinstance(choose(bare, few).guidance, MomentMatching)
    assert choose(bare, few).guidance.covariance is None


@pytest.mark.parametrize(
    "operator",
    [
        dp.Identity(),
        dp.PixelBin(2) @ dp.Convolve(torch.ones(3, 3) / 9),
        dp.Mask(torch.arange(1024).reshape(1, 32, 32) % 3 > 0),
        dp.Mask(torch.arange(1024).reshape(1, 32, 32) % 3 > 0) @ dp.Convolve(torch.ones(3, 3) / 9),
        dp.Matrix(torch.eye(100, 1024)),
        dp.Fourier(),
    ],
    ids=repr,
)
def test_every_operator_works_with_a_shipped_prior(operator):
    """The default never refuses an operator: what the structure does not give is left out."""
    prior = dp.load_prior("galaxies-32")
    x = torch.zeros(1, *prior.shape)
    like = dp.Likelihood(operator(x)[0], operator, dp.GaussianNoise(std=0.1), batched=False)
    draws = dp.sample(dp.Posterior(prior, like), 2, dp.DPMSolver(4), progress=False)
    assert bool(draws.x.isfinite().all())
