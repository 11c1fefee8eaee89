"""Fields under operators that are not diagonal: the solve against a dense one, and exact draws on their floor."""

import pytest
import torch

from diffpost.guidance import MomentMatching
from diffpost.oracles import OBSERVATIONS, gaussian_field, observed_field
from diffpost.sample import sample
from diffpost.samplers import DPMSolver


def dense(oracle):
    """Posterior mean and variance per mode, from matrices."""
    size = oracle.truth.shape[-1]
    pixels = torch.eye(size**2, dtype=torch.float64).reshape(-1, 1, size, size)
    power = oracle.prior.eigenvalues.double()
    cov = torch.fft.ifft2(torch.fft.fft2(pixels) * power).real.flatten(1)
    operator, noise = oracle.likelihood.operator, oracle.likelihood.noise
    a = operator.to(dtype=torch.float64)(pixels).flatten(1).T
    y = oracle.likelihood.y.double()
    units = torch.eye(y.numel(), dtype=torch.float64).reshape(-1, *y.shape)
    seen = ~noise.masked(y.shape).flatten() if noise.masked(y.shape) is not None else ...
    sigma = noise.color(noise.color(units)).flatten(1)
    if seen is not ...:
        a, sigma, y = a[seen], sigma[seen][:, seen], y.flatten()[seen]
    gain = torch.linalg.solve(sigma + a @ cov @ a.T, a @ cov).T
    left = (cov - gain @ a @ cov).reshape(-1, 1, size, size)
    rows = torch.fft.fft2(left, norm="ortho").flatten(1).T.reshape(-1, 1, size, size)
    modes = torch.fft.ifft2(rows, norm="ortho").flatten(1).diagonal().real
    return (gain @ y.flatten()).reshape(oracle.mean.shape), modes.reshape(size, size)


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_posterior_is_that_of_matrices(observation):
    oracle = observed_field(observation, size=20, data=160, psf_sigma=1.0, dtype=torch.float64)
    mean, variance = dense(oracle)
    torch.testing.assert_close(oracle.mean, mean, rtol=1e-5, atol=1e-6)
    ratio = oracle.variance / variance
    assert abs(float(ratio.mean()) - 1) < 0.02  # 400 modes of 1024 draws: 0.2%
    assert float(ratio.min()) > 0.75 and float(ratio.max()) < 1.3
    report = oracle.report(oracle.exact_draws(256, seed=3))
    assert 0.8 < report.mean_error / report.floor < 1.2


def test_psf_with_white_noise_is_the_diagonal_oracle():
    oracle = observed_field("psf", size=16, psf_sigma=1.0)
    diagonal = gaussian_field(size=16, psf_sigma=1.0)
    torch.testing.assert_close(oracle.truth, diagonal.truth)
    torch.testing.assert_close(oracle.mean, diagonal.mean, rtol=1e-4, atol=1e-4)


def test_moment_matching_meets_a_mask():
    """And a control: draws that scatter 10% too little are told from exact ones."""
    oracle = observed_field("mask", size=32, dtype=torch.float64)
    draws = sample(oracle.posterior(MomentMatching()), 64, DPMSolver(24), seed=1, progress=False)
    report = oracle.report(draws.x)
    assert report.mean_error < 1.3 * report.floor
    for ratio, error in zip(report.ratios, report.errors, strict=True):
        assert abs(ratio - 1) < 0.04 + 4 * error
    narrow = oracle.report(oracle.mean + 0.9 * (draws.x.double() - oracle.mean))
    assert narrow.ratios[1] < 1 - 0.04 - 4 * narrow.errors[1]


def test_unknown_observations_are_refused():
    with pytest.raises(ValueError, match="psf"):
        observed_field("lens")
