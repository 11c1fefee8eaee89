"""The cost of lensed sources, and of a lens and its source together, in units of a draw of the prior alone.

    pytest tests/benchmarks/test_lens_draws.py --benchmark-only

``extra_info`` holds the ratios, of calls timed in pairs in one process, and how memory grows with the source. Nothing here
asserts a time.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import diffpost as dp
from diffpost.parameters import (
    Evidence,
    GaussianImage,
    ParameterPrior,
    ParametricLikelihood,
    sample_blocked,
)
from diffpost.physics import Grid, Lens
from diffpost.random import normal

caustics = pytest.importorskip("caustics", reason="pip install caustics")

pytestmark = pytest.mark.usefixtures("asked_for")

DRAWS, MANY = 8, 64
SAMPLER = dp.DPMSolver(24, eta=1.0)
TRUTH = torch.tensor([[0.02, -0.03, 0.75, 0.6, 1.3, 0.03, -0.02]], dtype=torch.float64)

Scene = tuple[dp.ScoreModel, ParametricLikelihood, ParameterPrior]


@pytest.fixture(scope="module")
def scene(example) -> Scene:
    """A draw of `galaxies-32` through the lens of examples/calibration_lenses.py, and the prior of that lens."""
    lenses = example("calibration_lenses")
    family, noise = lenses.family(), lenses.NOISE
    prior = dp.load_prior("galaxies-32")
    source = dp.sample(prior, 1, SAMPLER, seed=3, progress=False).x.double()
    clean = family.apply(lenses.PRIOR.values(TRUTH), source)
    y = clean + noise * normal(4, torch.arange(1), 0, tuple(clean.shape[1:]), torch.float64)
    return prior, ParametricLikelihood(y[0], family, dp.GaussianNoise(std=noise)), lenses.PRIOR


@pytest.fixture(scope="module")
def source(scene: Scene) -> Callable[[], dp.Samples]:
    """Draws of the source given the lens."""
    prior, likelihood, of_lens = scene
    posterior = dp.Posterior(prior, likelihood.at(of_lens.values(TRUTH.expand(DRAWS, -1))))
    return lambda: dp.sample(posterior, DRAWS, SAMPLER, seed=0, progress=False)


def test_source_draw(benchmark, ratio, scene, source) -> None:
    """Sources through a known lens, over as many draws of the prior with as many network calls."""
    prior, _, _ = scene

    def free() -> dp.Samples:
        return dp.sample(prior, DRAWS, SAMPLER, seed=0, progress=False)

    draws = source()
    benchmark.group = "source"
    benchmark.extra_info["calls, VJPs"] = (draws.calls, round(draws.vjps))
    benchmark.extra_info["posterior / prior draw"] = round(ratio(source, free), 2)
    benchmark.pedantic(source, rounds=2)


@pytest.fixture(scope="module")
def larger() -> dp.Posterior:
    """A draw of `galaxies-64`, 64 x 64, through a known lens and a PSF onto 128 x 128 pixels."""
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    sie = caustics.SIE(cosmology, name="main", x0=0.02, y0=-0.03, q=0.75, phi=0.6, Rein=1.3)
    shear = caustics.ExternalShear(
        cosmology, name="shear", x0=0.0, y0=0.0, gamma_1=0.03, gamma_2=-0.02
    )
    mass = caustics.SinglePlane(cosmology, [sie, shear], name="mass")
    lens = Lens(mass, Grid(128, pixel=0.04, oversample=2), Grid(64, pixel=0.03))
    offsets = torch.arange(7) - 3
    psf = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 2.0)
    operator = dp.Convolve(psf / psf.sum()) @ lens
    prior = dp.load_prior("galaxies-64")
    clean = operator(dp.sample(prior, 1, SAMPLER, seed=3, progress=False).x)[0]
    y = clean + 0.05 * normal(4, torch.arange(1), 0, tuple(clean.shape), torch.float32)[0]
    return dp.Posterior(prior, dp.Likelihood(y, operator, dp.GaussianNoise(std=0.05)))


def test_64_source_draws_of_64_pixels(benchmark, ratio, larger) -> None:
    """64 sources of 64 x 64 pixels from 128 x 128 data, timed once, for they take minutes; in pairs with the prior alone, 8."""

    def draw(model: dp.Posterior | dp.ScoreModel, count: int) -> dp.Samples:
        return dp.sample(model, count, SAMPLER, seed=0, progress=False)

    draws = draw(larger, DRAWS)
    benchmark.group = "source of 64 pixels"
    benchmark.extra_info["calls, VJPs"] = (draws.calls, round(draws.vjps))
    benchmark.extra_info["posterior / prior draw"] = round(
        ratio(lambda: draw(larger, DRAWS), lambda: draw(larger.prior, DRAWS), pairs=2), 2
    )
    benchmark.pedantic(lambda: draw(larger, MANY), rounds=1)


def test_turn(benchmark, ratio, scene, source) -> None:
    """A turn of source and lens over a source draw alone, by the time that more turns take."""
    prior, likelihood, of_lens = scene

    def turns(count: int) -> None:
        sample_blocked(
            likelihood,
            of_lens,
            prior,
            TRUTH.expand(DRAWS, -1),
            sweeps=count,
            warmup=1,
            sampler=SAMPLER,
            progress=False,
        )

    benchmark.group = "turn"
    more, fewer = ratio(lambda: turns(3), source), ratio(lambda: turns(1), source)
    benchmark.extra_info["turn / source draw"] = round((more - fewer) / 2, 2)
    benchmark.pedantic(lambda: turns(1), rounds=1)


def test_marginalised_lens(benchmark, ratio, scene, source) -> None:
    """Four leapfrogs of the lens' parameters with a Gaussian of sources marginalised, over a source draw."""
    prior, likelihood, of_lens = scene
    images = dp.sample(prior, 256, dp.DPMSolver(16, eta=1.0), seed=5, progress=False).x
    gaussian = GaussianImage.from_draws(images.double()).truncated(80)  # as the job has
    evidence = Evidence(likelihood, of_lens, gaussian)
    z = of_lens.unconstrain(TRUTH).expand(DRAWS, -1)

    def move() -> None:
        for _ in range(4):
            start = z.clone().requires_grad_()
            torch.autograd.grad(evidence(start).sum(), start)

    benchmark.group = "marginalised"
    benchmark.extra_info["modes"] = len(gaussian.std)
    benchmark.extra_info["move / source draw"] = round(ratio(move, source, pairs=2), 2)
    benchmark.pedantic(source, rounds=1)


_MEMORY = """
import re, sys
import torch, caustics
import diffpost as dp
from diffpost.physics import Grid, Lens

def peak():  # ru_maxrss would hold the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

side, what = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
cosmology = caustics.FlatLambdaCDM(name="cosmology")
sie = caustics.SIE(cosmology, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25)
prior = dp.load_prior("galaxies-64").with_shape((1, side, side))
base = peak()
lens = Lens(sie, Grid(2 * side, pixel=2.5 / side, oversample=2), Grid(side, pixel=2.4 / side))
if what == "draws":
    data = torch.zeros(1, 2 * side, 2 * side)
    posterior = dp.Posterior(prior, dp.Likelihood(data, lens, dp.GaussianNoise(std=0.05)))
    base = peak()
    dp.sample(posterior, 4, dp.DPMSolver(2, eta=1.0), progress=False)
print(peak() - base)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("what", ["matrix", "draws"])
def test_memory(benchmark, what: str) -> None:
    """Peak memory of the lens as it is built, or of four source draws beyond that, for sources of 64, 128 and 256 pixels a
    side, each in a process of its own.
    """

    def peak(side: int) -> float:
        command = [sys.executable, "-c", _MEMORY, str(side), what]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    sizes = (64, 128, 256)
    found = [peak(side) for side in sizes]
    benchmark.group = f"memory, {what}"
    benchmark.extra_info["MiB"] = dict(zip(sizes, map(round, found), strict=True))
    benchmark.extra_info["growth, 64 to 256, per pixel"] = round(
        math.log(found[2] / found[0]) / math.log(16), 2
    )
    benchmark.pedantic(lambda: None, rounds=1)
