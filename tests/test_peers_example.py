"""The comparison with other libraries: how it finds the steps that are needed, and that all of them see one denoiser."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch

import diffpost as dp

LADDER = (8, 16, 32, 64, 128, 256, 1000)


@pytest.fixture(scope="module")
def contenders(example) -> ModuleType:
    example("known_posteriors")
    return example("contenders")


@pytest.fixture(scope="module")
def peers(example, contenders) -> ModuleType:
    return example("peers_at_equal_error")


@pytest.mark.parametrize(
    "least, found", [(8, 8), (9, 11), (12, 16), (16, 16), (23, 23), (24, 32), (800, 1000)]
)
def test_the_smallest_number_of_steps(peers, least: int, found: int) -> None:
    tried = []

    def passes(steps: int) -> bool:
        tried.append(steps)
        return steps >= least

    assert peers.smallest(passes, LADDER) == found
    assert len(tried) == len(set(tried))  # nothing is measured twice


def test_never_and_hopeless(peers) -> None:
    tried = []

    def passes(steps: int) -> bool:
        return bool(tried.append(steps))

    assert peers.smallest(passes, LADDER) is None
    assert tried == list(LADDER)
    tried.clear()
    assert peers.smallest(passes, LADDER, hopeless=lambda: True) is None
    assert tried == list(LADDER[:-1])


def test_errors_that_are_not_finite_fail(peers) -> None:
    assert peers.meets((0.04, 1.1), (0.05, 1.2))
    assert not peers.meets((0.04, math.nan), (0.05, 1.2))
    assert peers.badness((0.04, math.nan), (0.05, 1.2)) == math.inf
    assert peers.badness((0.04, 1.8), (0.05, 1.2)) == pytest.approx(1.5)


@pytest.fixture(scope="module")
def problem(contenders):
    """A mixture of two modes in four dimensions, one datum."""
    means = torch.tensor([[2.0, 0.0, 1.0, -1.0], [-2.0, 1.0, 0.0, 0.5]]).double()
    sde = dp.VE(0.02, 40.0)
    prior = dp.GaussianMixtureScore(means, torch.ones(2).double(), 1.0, sde)
    matrix = torch.tensor([[1.0, 0.5, 0.0, 0.0]]).double()
    y = torch.tensor([1.0]).double()
    likelihood = dp.Likelihood(y, dp.Matrix(matrix), dp.GaussianNoise(std=0.5))
    return contenders.Problem(prior, likelihood, 0.5, (0.02, 40.0), 5.0, 8.0)


def test_every_library_sees_the_same_denoiser(contenders, problem) -> None:
    """Each library's own object, at the same noise, answers what the prior answers."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()
    nsr = torch.tensor(0.7).double()
    prior = problem.prior
    expected = prior.denoise(x, prior.sde.t_of_nsr(nsr))
    place = (nsr / 0.02).log() / math.log(40.0 / 0.02)  # of VE processes, uniform in log noise
    view = contenders.View(problem)
    if contenders.installed("azula"):
        denoiser = contenders.azula_denoiser(view, problem.ends)
        torch.testing.assert_close(denoiser(x, place).mean, expected)
    if contenders.installed("score_models"):
        model = contenders.score_model(view, problem.ends)
        time = torch.full((3,), float(place)).double()
        found = x + nsr**2 * model.score(time, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if contenders.installed("deepinv"):
        scale, offset = 3.0, 0.5
        denoiser, physics, y = contenders.deepinv_pair(view, problem.std, scale, offset)
        image = (offset + x / scale).reshape(3, 1, 1, 4)
        found = (denoiser(image, nsr / scale).reshape(3, 4) - offset) * scale
        torch.testing.assert_close(found, expected)
        # data of a scaled image are scaled data
        residual = y - physics.A(image)
        torch.testing.assert_close(residual * scale, view.y - view.forward(x))
    assert view.counter.calls == sum(
        contenders.installed(name) for name in ("azula", "score_models", "deepinv")
    )


@pytest.mark.parametrize("kind", ["MMPS", "JFPS", "DPS", "PGDM", "TDS"])
def test_azula_draws(contenders, problem, kind: str) -> None:
    pytest.importorskip("azula")
    draws = contenders.azula(problem, 4, 0, 5, kind=kind)
    assert draws.x.shape == (5, 4) and draws.x.isfinite().all()
    vjps = {"MMPS": 8, "JFPS": 0}.get(kind, 4)
    assert (draws.calls, draws.vjps) == (4, vjps)


@pytest.mark.parametrize("kind", ["MomentMatching", "PiGDM", "DPS", "DiffPIR"])
def test_deepinv_draws(contenders, problem, kind: str) -> None:
    pytest.importorskip("deepinv")
    draws = contenders.deepinv(problem, 4, 0, 5, kind=kind)
    assert draws.x.shape == (5, 4)
    assert draws.vjps == 0 if kind == "DiffPIR" else draws.vjps >= 4


def test_score_models_and_ours_draw(contenders, problem) -> None:
    ours = contenders.ours(problem, 4, 0, 5)
    assert ours.x.shape == (5, 4) and ours.calls == 4
    pytest.importorskip("score_models")
    theirs = contenders.score_models(problem, 4, 0, 5)
    assert theirs.x.shape == (5, 4) and (theirs.calls, theirs.vjps) == (4, 0)
