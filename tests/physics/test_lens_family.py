"""Lenses of unknown parameters: the family's products, and the parameters from an image."""

import pytest
import torch

pytest.importorskip("caustics", reason="caustics is not installed")

import diffpost as dp
from diffpost.parameters.collapsed import sample_collapsed
from diffpost.parameters.evidence import Evidence
from diffpost.parameters.family import ParametricLikelihood
from diffpost.parameters.gaussian import GaussianImage
from diffpost.parameters.hmc import HMC
from diffpost.physics import Grid, Lens
from diffpost.physics.lens_family import LensFamily
from diffpost.physics.lens_model import read_lens_model

F64 = torch.float64
SPEC = {
    "mass": {
        "main": {
            "profile": "SIE",
            "Rein": {"normal": [1.2, 0.1], "within": [0.5, 2.0]},
            "q": {"uniform": [0.4, 1.0]},
            "phi": 0.4,
        }
    }
}


def family(size=12, image=24):
    model = read_lens_model(SPEC)
    grids = Grid(image, pixel=3.6 / image, oversample=2), Grid(size, pixel=1.44 / size)
    lens = Lens(model.mass, *grids)
    width = torch.arange(-3, 4, dtype=F64)
    psf = torch.exp(-0.5 * width**2)
    psf = torch.outer(psf, psf)
    return LensFamily(lens, dp.Convolve(psf / psf.sum())), model


def values(*rows):
    """Rein and q of each row, in the family's order."""
    one, _ = family()
    columns = torch.tensor(rows, dtype=F64)
    named = {"main.Rein": columns[:, 0], "main.q": columns[:, 1]}
    return {name: named[name] for name in one.names}


def test_the_family_is_its_operator():
    one, _ = family()
    at = values((1.2, 0.8), (1.0, 0.6))
    x = torch.randn(2, 1, 12, 12, dtype=F64)
    torch.testing.assert_close(one.apply(at, x), one.at(at)(x))
    images = torch.randn(3, 1, 12, 12, dtype=F64)
    columns = one.columns(at, images)
    for k in range(3):
        torch.testing.assert_close(columns[k], one.at(at)(images[k].expand(2, 1, 12, 12)))
    assert one.data_shape == (1, 24, 24)


def test_parameters_out_of_range_are_nan_and_spare_their_neighbours():
    one, _ = family()
    at = values((1.2, 0.8), (1.0, 1.7))
    x = torch.randn(2, 1, 12, 12, dtype=F64)
    seen = one.apply(at, x)
    assert seen[0].isfinite().all() and seen[1].isnan().all()
    columns = one.columns(at, x)
    assert columns[:, 0].isfinite().all() and columns[:, 1].isnan().all()
    assert one.apply(values((1.2, 1.8)), x[:1]).isnan().all()


def test_the_gradient_in_parameters():
    one, _ = family()
    x = torch.randn(1, 1, 12, 12, dtype=F64)
    x = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    probe = torch.randn(1, 1, 24, 24, dtype=F64)

    def along(rein, q):
        named = {"main.Rein": rein, "main.q": q}
        return (one.apply({n: named[n] for n in one.names}, x) * probe).sum()

    rein, q = (torch.tensor([v], dtype=F64, requires_grad=True) for v in (1.2, 0.8))
    slope = torch.autograd.grad(along(rein, q), (rein, q))
    for i, step in enumerate(((1e-6, 0.0), (0.0, 1e-6))):
        with torch.no_grad():
            up = along(rein + step[0], q + step[1])
            down = along(rein - step[0], q - step[1])
        assert float(slope[i]) == pytest.approx(float(up - down) / 2e-6, rel=1e-4)


def test_a_known_lens_is_no_family():
    known = read_lens_model({"mass": {"main": {"profile": "SIS", "Rein": 1.0}}})
    with pytest.raises(ValueError, match="all known"):
        LensFamily(Lens(known.mass, Grid(8, pixel=0.3), Grid(8, pixel=0.2)))


def problem(share):
    """A lens of two unknowns, a Gaussian source, and noise of a share of the image's rms."""
    one, model = family(8, 16)
    axis = torch.fft.fftfreq(8, dtype=F64) * 8
    k = torch.hypot(axis[:, None], axis[None, :])
    gaussian = GaussianImage.from_power(
        torch.zeros(1, 8, 8, dtype=F64), 12.0 * (1 + k).pow(-3)[None]
    )
    generator = torch.Generator().manual_seed(3)
    c = torch.randn(1, len(gaussian.std), dtype=F64, generator=generator)
    clean = one.apply(values((1.25, 0.75)), gaussian.images(c))
    std = share * float(clean.std())
    y = (clean + std * torch.randn(clean.shape, dtype=F64, generator=generator))[0]

    def evidence(noise):
        likelihood = ParametricLikelihood(y, one, dp.GaussianNoise(std=noise))
        return Evidence(likelihood, model.prior, gaussian)

    return evidence, std, y


def test_the_evidence_is_that_of_the_dense_matrix():
    make, std, y = problem(0.3)
    evidence = make(std)
    theta = evidence.prior.sample(3, seed=5)
    one = evidence.likelihood.family
    values_at = evidence.prior.values(theta)
    columns = one.columns(values_at, evidence.gaussian.scaled_modes)  # (K, B, *data)
    for b in range(3):
        half = columns[:, b].flatten(1)
        cov = half.T @ half + std**2 * torch.eye(half.shape[1], dtype=F64)
        exact = torch.distributions.MultivariateNormal(torch.zeros(len(cov)).double(), cov)
        expected = exact.log_prob(y.flatten())
        torch.testing.assert_close(evidence.log_prob(theta[b : b + 1])[0], expected)
    z = evidence.prior.unconstrain(theta).requires_grad_()
    (slope,) = torch.autograd.grad(evidence(z).sum(), z)
    for i in range(2):
        step = torch.zeros_like(z)
        step[:, i] = 1e-5
        with torch.no_grad():
            found = (evidence(z + step) - evidence(z - step)) / 2e-5
        torch.testing.assert_close(slope[:, i], found, rtol=1e-3, atol=1e-3)


def moments(evidence, draws):
    """Mean and standard deviation on a grid of 25 x 25 about the draws, +- 5 of their deviations."""
    prior, one = evidence.prior, evidence.likelihood.family
    lines = [
        torch.linspace(float(m - 5 * s), float(m + 5 * s), 25)
        for m, s in zip(draws.mean, draws.std, strict=True)
    ]
    grid = torch.cartesian_prod(*lines).double()
    order = [prior.names.index(name) for name in one.names]
    bounded = torch.stack([p.log_prob(grid[:, i]) for i, p in enumerate(prior.priors)]).sum(0)
    grid = grid[one.lens.valid(grid[:, order]) & bounded.isfinite()]
    log_p = torch.cat([evidence.log_prob(part) for part in grid.split(64)])
    weight = torch.softmax(log_p + prior.log_prob(grid), 0)
    mean = weight @ grid
    return mean, (weight @ (grid - mean).square()).sqrt()


@pytest.mark.slow
def test_the_collapsed_posterior_is_that_on_a_grid():
    """Two parameters of a lens, the source marginalised: moments against quadrature of the evidence.

    With an effective size n the mean of the draws is within 4.5/sqrt(n), and their deviation within
    4.5/sqrt(2 n), of the exact ones: 4 numbers, a false alarm of 3e-5.
    """
    make, std, _ = problem(0.6)
    evidence = make(std)
    kernel = HMC(150, 80)
    draws = sample_collapsed(
        evidence, kernel, chains=4, restarts=4, images=0, seed=1, progress=False
    )
    assert float(draws.rhat.max()) < 1.1

    def off(exact):
        mean, spread = exact
        n = draws.ess
        first = (draws.mean - mean) / (spread / n.sqrt())
        second = (draws.std / spread - 1) * (2 * n).sqrt()
        return float(torch.cat([first, second]).abs().max())

    assert off(moments(evidence, draws)) < 4.5
    # Control: the posterior of half the noise is another.
    assert off(moments(make(0.5 * std), draws)) > 4.5
