"""Parameters under learned noise: chains that move by a score and test by its line integrals, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import diffpost as dp
from diffpost.parameters import HMC, ModelledData, Normal, ParameterPrior, run_chains

N = 8
SDE = dp.EDM(0.01, 20.0)
PRIOR = ParameterPrior({"a": Normal(0.0, 2.0), "b": Normal(1.0, 1.0)})
GRID = torch.linspace(-1, 1, N, dtype=torch.float64)


def model(values):
    """A plane: linear in its parameters."""
    a, b = (values[name][:, None, None] for name in ("a", "b"))
    return a * GRID[:, None].expand(N, N) + b * GRID.expand(N, N)


def power() -> torch.Tensor:
    k = torch.fft.fftfreq(N, dtype=torch.float64)
    return 0.5 / (1 + 40 * (k[:, None] ** 2 + k**2))


def posterior(y: torch.Tensor, spectrum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance for Gaussian noise of a power spectrum."""
    columns = torch.stack([GRID[:, None].expand(N, N), GRID.expand(N, N)])

    def whitened(x):
        return (torch.fft.fft2(x, norm="ortho") / spectrum.sqrt()).flatten(-2)

    m, d = whitened(columns), whitened(y)
    precision = (m.conj() @ m.T).real + torch.diag(torch.tensor([0.25, 1.0], dtype=torch.float64))
    covariance = torch.linalg.inv(precision)
    right = (m.conj() @ d).real + torch.tensor([0.0, 1.0], dtype=torch.float64)
    return covariance @ right, covariance


def drawn(density: ModelledData, seed: int = 0, chains: int = 32, draws: int = 60):
    kernel = HMC(draws=draws, warmup=50, leapfrogs=4)
    return run_chains(density, kernel, PRIOR.sample(chains, 5), seed, progress=False)


def test_gaussian_noise_by_its_score_alone_gives_the_exact_posterior() -> None:
    """Means within 4 standard errors, variances within 8%; with the noise taken for white both are far off."""
    spectrum = power()
    truth = model({"a": torch.tensor([1.5]).double(), "b": torch.tensor([-0.5]).double()})
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(1, N, N, generator=generator, dtype=torch.float64)
    y = (truth + torch.fft.ifft2(torch.fft.fft2(z) * spectrum.sqrt()).real)[0]
    score = dp.GaussianScore(torch.zeros(N, N).double(), power=spectrum, sde=SDE)
    noise = dp.LearnedNoise(score)
    mean, covariance = posterior(y, spectrum + noise.blur**2)
    found = drawn(ModelledData(y, model, noise, PRIOR))
    z = found.z.flatten(0, 1)
    theta = PRIOR.constrain(z)
    error = covariance.diagonal().sqrt() / math.sqrt(1000)  # of a thousand effective draws
    assert ((theta.mean(0) - mean).abs() < 4 * error).all()
    assert torch.allclose(torch.cov(theta.T), covariance, rtol=0.1, atol=0.02 * covariance.max())
    assert float(found.acceptance.mean()) > 0.6

    same = drawn(ModelledData(y, model, dp.GaussianNoise(power=spectrum + noise.blur**2), PRIOR))
    assert torch.allclose(found.z, same.z, atol=1e-5)  # the same trajectories, the same tests

    white = drawn(ModelledData(y, model, dp.GaussianNoise(var=float(spectrum.mean())), PRIOR))
    ratio = torch.cov(PRIOR.constrain(white.z.flatten(0, 1)).T).diagonal() / covariance.diagonal()
    assert (ratio < 0.75).all()


def test_outliers_are_borne_as_the_exact_density_bears_them() -> None:
    """Noise of independent pixels with outliers, whose density is known: against the posterior on a grid."""
    noise_model = dp.ScaleMixtureScore.outliers(0.3, (N, N), SDE, share=0.1)
    noise = dp.LearnedNoise(noise_model, nodes=33)
    y = model({"a": torch.tensor([0.7]).double(), "b": torch.tensor([1.2]).double()})[0]
    y = y + noise_model.sample(1, seed=4)[0].double()
    found = drawn(ModelledData(y, model, noise, PRIOR), draws=100)
    theta = PRIOR.constrain(found.z.flatten(0, 1))
    axis = torch.linspace(-1.0, 2.6, 161, dtype=torch.float64)
    a, b = torch.meshgrid(axis, axis, indexing="ij")
    values = {"a": a.reshape(-1), "b": b.reshape(-1)}
    t = SDE.t_of_nsr(torch.tensor(noise.blur, dtype=torch.float64))
    density = noise_model.log_prob(y - model(values), t)
    density = density + PRIOR.log_prob(torch.stack([values["a"], values["b"]], 1))
    weight = density.softmax(0)
    grid = torch.stack([values["a"], values["b"]], 1)
    mean = weight @ grid
    std = (weight @ (grid - mean).square()).sqrt()
    assert ((theta.mean(0) - mean).abs() < 4 * std / math.sqrt(1000)).all()
    assert torch.allclose(theta.std(0), std, rtol=0.08)
    naive = drawn(ModelledData(y, model, dp.GaussianNoise(var=noise_model.variance), PRIOR))
    assert (PRIOR.constrain(naive.z.flatten(0, 1)).std(0) > 1.3 * std).all()


def test_rows_of_data_belong_to_chains_and_bad_input_is_told() -> None:
    noise = dp.LearnedNoise(dp.GaussianScore(torch.zeros(N, N).double(), power=power(), sde=SDE))
    y = torch.zeros(3, N, N, dtype=torch.float64)
    y[1] += 1
    density = ModelledData(y, model, noise, PRIOR, batched=True)
    z = PRIOR.sample(3, 1)
    alone = ModelledData(y[1], model, noise, PRIOR)
    both = density.log_ratio(z, z + 0.1)
    assert torch.allclose(both[1:2], alone.log_ratio(z[1:2], z[1:2] + 0.1))
    assert not torch.allclose(both[0], both[1])
    with pytest.raises(ValueError, match="the same shape"):
        density(z[:2])
    with pytest.raises(ValueError, match="not finite"):
        ModelledData(y / 0, model, noise, PRIOR, batched=True)
