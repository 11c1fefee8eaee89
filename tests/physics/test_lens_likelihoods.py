"""A lens for each entry of a batch, inside compositions, likelihoods, posteriors and samplers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffpost as dp
from diffpost.operator import LinearOperator, Operator, stack
from diffpost.physics import Grid

caustics = pytest.importorskip("caustics", reason="pip install caustics")

F64 = torch.float64
COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
IMAGE, SOURCE = Grid(10, pixel=0.4, oversample=2), Grid(6, pixel=0.25)
SHAPE = (1, 6, 6)
RADII = torch.tensor([[1.1], [1.3], [1.25]], dtype=F64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def psf() -> Tensor:
    p = rand(3, 3, seed=9).abs()
    return p / p.sum()


def lenses() -> LinearOperator:
    free = dp.physics.Lens(caustics.SIS(COSMOLOGY, x0=0.0, y0=0.05), IMAGE, SOURCE)
    return free.at(RADII)


class Squares(Operator):
    """x + x^2/8."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + x**2 / 8

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(input_shape)


MASK = rand(10, 10, seed=4) > -0.5
CHAINS = {
    "alone": lambda a: a,
    "blurred": lambda a: dp.Convolve(psf()) @ a,
    "binned": lambda a: dp.PixelBin(2) @ dp.Convolve(psf()) @ a,
    "masked": lambda a: dp.Mask(MASK) @ a,
    "scaled sum": lambda a: 2.0 * a + dp.Mask(MASK) @ a,
    "joint": lambda a: dp.Stack([dp.Convolve(psf()) @ a, dp.PixelBin(2) @ a]),
    "nonlinear": lambda a: dp.PixelBin(2) @ Squares() @ a,
    "nonlinear source": lambda a: a @ Squares(),
    "nonlinear sum": lambda a: Squares() @ a - 3.0 * (Squares() @ a),
    "nonlinear joint": lambda a: stack([Squares() @ a, dp.PixelBin(2) @ a]),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_select_their_entries(chain: str) -> None:
    operator = CHAINS[chain](lenses())
    assert operator.batch == 3
    x, ids = rand(3, *SHAPE), torch.tensor([2, 0])
    torch.testing.assert_close(operator.select(ids)(x[ids]), operator(x)[ids])
    linear, part = operator.linearize(x), operator.linearize(x).select(ids)
    v = rand(*linear(x).shape, seed=1)
    torch.testing.assert_close(part(x[ids]), linear(x)[ids])
    torch.testing.assert_close(part.adjoint(v[ids]), linear.adjoint(v)[ids])
    torch.testing.assert_close(
        operator.select(ids).linearize(x[ids]).adjoint(v[ids]), linear.adjoint(v)[ids]
    )


def test_operators_without_entries_are_not_copied() -> None:
    for operator in (dp.Convolve(psf()), 2 * dp.Identity() + dp.Mask(MASK), Squares()):
        assert operator.batch is None and operator.select(torch.tensor([0, 0])) is operator


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_moment_matching_with_a_lens_for_each_entry(rows: bool, offset: float) -> None:
    """With a Gaussian prior the posterior's denoiser is known, entry by entry, in closed form.

    The data are the same for all entries, or their own.
    """
    std, scale = 0.1, 2.0
    basis = rand(36, 36, seed=5) / 6
    cov, mean = basis @ basis.T + 0.2 * torch.eye(36, dtype=F64), rand(36, seed=6)
    prior = dp.GaussianScore(mean.reshape(SHAPE), cov=cov, sde=dp.VE(1e-3, 50.0))
    prior = prior.with_affine(scale, offset)
    operator = dp.PixelBin(2) @ dp.Convolve(psf()) @ lenses()
    y = rand(*(3,) * rows, 1, 5, 5, seed=7)
    likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=std))
    posterior = dp.Posterior(prior, likelihood, dp.MomentMatching(tol=1e-12))
    assert posterior.rows == 3
    x, t = rand(3, *SHAPE, seed=8), torch.tensor(0.4, dtype=F64)
    sigma = prior.sde.sigma(t)
    got = posterior.denoise(x, t).flatten(1)
    want = []
    for b in range(3):
        single = dp.PixelBin(2) @ dp.Convolve(psf()) @ lenses().select(torch.tensor([b]))
        eye = torch.eye(36, dtype=F64).reshape(36, 1, *SHAPE)
        a = torch.stack([single(scale * e).flatten() for e in eye], 1)
        data = (y[b] if rows else y).flatten() - single(torch.full_like(x[:1], offset)).flatten()
        precision = torch.linalg.inv(cov) + torch.eye(36, dtype=F64) / sigma**2 + a.T @ a / std**2
        right = torch.linalg.solve(cov, mean) + x[b].flatten() / sigma**2 + a.T @ data / std**2
        want.append(torch.linalg.solve(precision, right))
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-6, atol=1e-6)
    assert (got[0] - want[1]).abs().max() > 1e-2  # the neighbour's lens would be seen
    ids = torch.tensor([2, 0])
    torch.testing.assert_close(
        posterior.select(ids).denoise(x[ids], t).flatten(1), got[ids], rtol=1e-6, atol=1e-6
    )


def test_draws_do_not_depend_on_how_a_batch_of_lenses_is_split() -> None:
    prior = dp.GaussianScore(torch.zeros(SHAPE, dtype=F64), var=1.0, sde=dp.VE(1e-2, 30.0))
    operator = dp.Convolve(psf()) @ lenses()
    likelihood = dp.Likelihood(rand(1, 10, 10), operator, dp.GaussianNoise(std=0.3))
    posterior = dp.Posterior(prior, likelihood, dp.MomentMatching(tol=1e-10))
    whole = dp.sample(posterior, 3, dp.Heun(steps=6), seed=1, progress=False)
    parts = dp.sample(posterior, 3, dp.Heun(steps=6), seed=1, batch_size=2, progress=False)
    torch.testing.assert_close(whole.x, parts.x, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="must be 3"):
        dp.sample(posterior, 4, dp.Heun(steps=6), progress=False)


def test_likelihoods_repeat_their_lenses() -> None:
    """Of one image or of three; every lens twice in a row."""
    operator = dp.Convolve(psf()) @ lenses()
    x = rand(6, *SHAPE, seed=3)
    for y in (rand(1, 10, 10), rand(3, 1, 10, 10)):
        likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=0.5)).bind(SHAPE)
        twice = likelihood.repeat(2)
        assert twice.rows == 6
        torch.testing.assert_close(twice.log_prob(x)[::2], likelihood.log_prob(x[::2]))
        torch.testing.assert_close(twice.score(x)[1::2], likelihood.score(x[1::2]))


def test_joint_likelihoods_of_lenses() -> None:
    a, x = lenses(), rand(3, *SHAPE)
    one = dp.Likelihood(rand(1, 10, 10), dp.Convolve(psf()) @ a, dp.GaussianNoise(std=0.5))
    two = dp.Likelihood(rand(3, 1, 5, 5), dp.PixelBin(2) @ a, dp.GaussianNoise(std=0.2))
    joint = one + two
    assert joint.rows == 3
    torch.testing.assert_close(joint.log_prob(x), one.log_prob(x) + two.log_prob(x))
    ids = torch.tensor([1, 1])
    torch.testing.assert_close(joint.select(ids).score(x[ids]), joint.score(x)[ids])


def test_rows_and_lenses_must_be_as_many() -> None:
    likelihood = dp.Likelihood(rand(4, 1, 10, 10), lenses(), dp.GaussianNoise(std=0.5))
    with pytest.raises(ValueError, match=r"y has 4 rows, but the operator .* one of 3 entries"):
        likelihood.bind(SHAPE)


def test_a_posterior_of_a_known_lens_by_its_matrix() -> None:
    """A small one is decomposed once, so that the solves of isotropic errors are direct."""
    sie = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25)
    operator = dp.Convolve(psf()) @ dp.physics.Lens(sie, IMAGE, SOURCE)
    noise = dp.GaussianNoise(std=0.1)
    likelihood = dp.Likelihood(rand(1, 10, 10), operator, noise).bind(SHAPE)
    r = rand(2, 1, 10, 10, seed=2)
    report = likelihood.solve_operator(operator, r, 0.7)
    assert report.iterations == 0
    a = operator.dense(SHAPE)
    assert a is not None
    want = torch.linalg.solve(0.01 * torch.eye(100, dtype=F64) + 0.7 * a @ a.T, r.flatten(1).T).T
    torch.testing.assert_close(report.x.flatten(1), want)


GUIDED = {
    "moment matching": (dp.MomentMatching(tol=1e-6), dp.DPMSolver(24, eta=1.0)),
    "default": (None, dp.DPMSolver(24, eta=1.0)),
    "ODE": (dp.MomentMatching(tol=1e-6), dp.Heun(steps=24)),
    "SplitGibbs": (None, dp.SplitGibbs(60, first=3.0, reverse=dp.DPMSolver(12, order=2, eta=1.0))),
    "MALA": (None, dp.MALA(10, start=dp.DPMSolver(16, eta=1.0), nsr=0.02)),
    "Convolved": (dp.Convolved(), dp.DPMSolver(24, eta=1.0)),
}


@pytest.mark.parametrize("name", GUIDED)
def test_draws_of_a_field_through_a_known_lens(name: str) -> None:
    """A Gaussian field as the source, a known lens and a PSF: the posterior in closed form, by every sampler of the core.

    In the basis in which the exact covariance is the identity, means and variances of 400 draws in 36 directions to 5 of
    their Monte Carlo errors (72 numbers: a false alarm in 20,000), and 6% on top for the discretisation. `Convolved` is
    the negative control: it takes the data for less certain than they are.
    """
    k = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(6), torch.fft.fftfreq(6), indexing="ij"))
    power = (1 / (1 + (6 * k) ** 2)).double()[None]
    prior = dp.GaussianScore(
        torch.zeros(SHAPE, dtype=F64), power=power, sde=dp.EDM(sigma_min=1e-3, sigma_max=20.0)
    )
    sie = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25)
    operator = dp.Convolve(psf()) @ dp.physics.Lens(sie, IMAGE, SOURCE)
    a = operator(torch.eye(36, dtype=F64).reshape(36, *SHAPE)).flatten(1).T
    std = 0.1
    y = a @ prior.sample(1, seed=1).flatten() + std * rand(100, seed=2)
    basis = torch.fft.fft2(torch.eye(36, dtype=F64).reshape(36, 6, 6))
    cov = torch.fft.ifft2(power * basis).real.reshape(36, 36)
    precision = torch.linalg.inv(cov) + a.T @ a / std**2
    mean = torch.linalg.solve(precision, a.T @ y / std**2)
    guidance, sampler = GUIDED[name]
    likelihood = dp.Likelihood(y.reshape(1, 10, 10), operator, dp.GaussianNoise(std=std))
    n = 400
    draws = dp.sample(dp.Posterior(prior, likelihood, guidance), n, sampler, progress=False)
    white = (draws.x.double().flatten(1) - mean) @ torch.linalg.cholesky(precision)
    off = white.mean(0).abs() * n**0.5
    wide = (white.var(0) - 1).abs() - 0.06
    good = bool((off < 5 + 0.06 * n**0.5).all() and (wide < 5 * (2 / (n - 1)) ** 0.5).all())
    assert good == (name != "Convolved"), (float(off.max()), float(wide.max()))
