"""The parameters of a lens' light, with the source marginalised, against the evidence integral on a grid.

Draws are held against mean, standard deviation and distribution function of the exact marginals (targets.accepts, 4 Monte
Carlo errors); the same test must reject chains to which the light is not shown and chains whose light meets no PSF. The
exact light is the integral of a round Gaussian over pixels by error functions, behind a PSF that is a matrix.
"""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

pytest.importorskip("caustics", reason="caustics is not installed")

import diffpost as dp
from diffpost.jobs.lens_system import FLUX, KnownLens
from diffpost.parameters import (
    HMC,
    Evidence,
    GaussianImage,
    ParameterPrior,
    ParametricLikelihood,
    sample_collapsed,
    sample_corrected,
)
from diffpost.physics import Grid, Lens, LensLight, read_lens_model
from diffpost.score import GaussianScore

from .targets import F64, accepts, deviations
from .toy import field, grid_marginals

N, PIXEL, NOISE = 12, 0.25, 0.15
SPEC = {
    "mass": {"main": {"profile": "SIE", "q": 0.8, "phi": 0.3, "Rein": 0.9}},
    "light": {
        "glow": {
            "profile": "Gaussian",
            "centre": "main",
            "sigma": {"lognormal": [0.4, 0.4]},
            "flux": {"lognormal": [10.0, 0.7]},
        }
    },
}
TRUTH = {"glow.sigma": 0.45, "glow.flux": 12.0}


def psf():
    axis = torch.arange(-2, 3, dtype=F64)
    kernel = torch.exp(-0.5 * (axis / 0.9) ** 2)
    kernel = torch.outer(kernel, kernel)
    return kernel / kernel.sum()


class Problem:
    def __init__(self):
        self.model = read_lens_model(SPEC)
        self.image = Grid(N, pixel=PIXEL)
        mean, cov = field(6, spread=0.3)
        self.score = GaussianScore(0.3 * mean, cov=0.3**2 * cov, sde=dp.EDM(0.002, 80.0))
        self.lens = Lens(self.model.mass, self.image, Grid(6, pixel=0.2))
        self.prior = ParameterPrior(
            {**dict(zip(self.model.prior.names, self.model.prior.priors, strict=True)), FLUX: 1.0}
        )
        self.response = dp.Convolve(psf())
        eye = torch.eye(N * N, dtype=F64).reshape(N * N, 1, N, N)
        self.blur = self.response(eye).flatten(1).T
        sources = torch.eye(36, dtype=F64).reshape(36, 1, 6, 6)
        self.matrix = self.blur @ self.lens(sources).flatten(1).T
        generator = torch.Generator().manual_seed(2)

        def white(n):
            return torch.randn(n, generator=generator, dtype=F64)

        root = torch.linalg.cholesky(0.3**2 * cov + 1e-12 * torch.eye(36, dtype=F64))
        x = 0.3 * mean.flatten() + root @ white(36)
        self.cov = 0.3**2 * cov
        self.mean = 0.3 * mean.flatten()
        light = self.light(*(torch.tensor([v], dtype=F64) for v in TRUTH.values()))[0]
        self.y = self.matrix @ x + light + NOISE * white(N * N)

    def light(self, sigma, flux):
        """(B, N^2), by error functions and a matrix."""
        edge = (torch.arange(N + 1, dtype=F64) - N / 2) * PIXEL
        line = 0.5 * torch.erf(edge / (sigma[:, None] * math.sqrt(2))).diff(dim=1)
        image = flux[:, None, None] * line[:, :, None] * line[:, None]
        return image.flatten(1) @ self.blur.T

    def exact(self, cells=40):
        """Mean, standard deviation and distribution function of sigma and flux."""
        noise = NOISE**2 * torch.eye(N * N, dtype=F64)
        marginal = MultivariateNormal(
            self.matrix @ self.mean, self.matrix @ self.cov @ self.matrix.T + noise
        )

        def log_mass(nodes):
            left = self.y - self.light(*nodes.unbind(1))
            return marginal.log_prob(left) + self.prior.log_prob(nodes)

        return grid_marginals(log_mass, [(0.1, 1.5), (1.0, 40.0)], (24, 24, cells))

    def evidence(self, response="psf", shown=True):
        light = LensLight(
            self.model.light, self.image, self.response if response == "psf" else None
        )
        family = KnownLens(
            self.response @ self.lens, (1, 6, 6), (1, N, N), light if shown else _Dark(light)
        )
        likelihood = ParametricLikelihood(
            self.y.reshape(1, N, N), family, dp.GaussianNoise(std=NOISE)
        )
        return Evidence(likelihood, self.prior, GaussianImage.from_score(self.score))


class _Dark:
    """Light of the same parameters that is nowhere seen."""

    def __init__(self, light):
        self.names, self.data_shape = light.names, light.data_shape

    def data(self, values):
        return torch.zeros(len(values["glow.flux"]), *self.data_shape, dtype=F64)


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.fixture(scope="module")
def exact(problem):
    return problem.exact()


def drawn(evidence, **more):
    settings = {"chains": 12, "images": 0, "restarts": 4, "seed": 1, "progress": False}
    draws = sample_collapsed(evidence, HMC(80, 60, leapfrogs=3), **(settings | more))
    order = [draws.names.index(name) for name in TRUTH]
    return draws, draws.theta[..., order]


def test_light_and_source_together_reproduce_the_exact_posterior(problem, exact):
    draws, theta = drawn(problem.evidence(), images=20)
    assert accepts(theta, *exact), deviations(theta, *exact)
    assert float(draws.ess.min()) > 250
    # every source was drawn of the data without the light of its own theta: whitened by the exact posterior
    prior = torch.linalg.inv(problem.cov)
    root = torch.linalg.cholesky(prior + problem.matrix.T @ problem.matrix / NOISE**2)
    told = draws.samples.extras["theta"]
    columns = (told[:, draws.names.index(name)] for name in TRUTH)
    left = problem.y - problem.light(*columns) - problem.matrix @ problem.mean
    centre = torch.cholesky_solve((left @ problem.matrix).T / NOISE**2, root).T
    x = draws.samples.x.flatten(1).double() - problem.mean
    white = (x - centre) @ root
    n = white.numel()
    assert abs(float(white.square().mean()) - 1) < 4.5 * math.sqrt(2 / n)
    assert abs(float(white.mean())) < 4.5 / math.sqrt(n)
    # control: with the lights of other draws, the brightest for the faintest, they are not
    rank = told[:, draws.names.index("glow.flux")].argsort()
    swapped = torch.empty_like(centre)
    swapped[rank] = centre[rank.flip(0)]
    other = (x - swapped) @ root
    assert float(other.square().mean()) - 1 > 4.5 * math.sqrt(2 / n)


def test_the_test_rejects_light_that_is_ignored_or_not_blurred(problem, exact):
    _, ignored = drawn(problem.evidence(shown=False))
    assert not accepts(ignored, *exact)
    _, sharp = drawn(problem.evidence(response=None))
    assert not accepts(sharp, *exact)


def test_the_corrected_sampler_takes_light_too(problem, exact):
    """For a Gaussian source there is nothing to correct, so that draws stay those of the exact posterior."""
    draws = sample_corrected(
        problem.evidence(),
        problem.score,
        HMC(80, 60, leapfrogs=3),
        rounds=1,
        chains=12,
        images=8,
        restarts=4,
        sampler=dp.DPMSolver(20, eta=1.0),
        seed=3,
        progress=False,
    )
    order = [draws.names.index(name) for name in TRUTH]
    theta = draws.theta[..., order]
    mean, std, _ = exact
    shift = (theta.flatten(0, 1).mean(0) - mean).abs() / std
    assert float(shift.max()) < 4 * max(draws.info["error"][-1]) + 4 / math.sqrt(250)
