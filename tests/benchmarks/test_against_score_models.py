"""Time per denoiser call and per posterior sample, beside score_models' own Euler-Maruyama.

Same network, operator, data and process; run it by

    pytest tests/benchmarks --benchmark-only --benchmark-group-by=group

The ratios to the peer are what to read: `extra_info` holds the evaluations of the network behind each
figure.  Nothing here asserts a time.
"""

from __future__ import annotations

import contextlib
import io
import math

import pytest
import torch

import diffpost as dp
from diffpost.networks.score_models import SigmaHeadScore

score_models = pytest.importorskip("score_models", reason="pip install score-models")

SIZE, BATCH, STEPS = 32, 4, 12
SIGMA = (1e-2, 50.0)


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        return score_models.ScoreModel(
            "ncsnpp",
            channels=1,
            nf=16,
            ch_mult=[1, 2],
            num_res_blocks=1,
            sigma_min=SIGMA[0],
            sigma_max=SIGMA[1],
            device="cpu",
        )


@pytest.fixture(scope="module")
def ours(peer):
    return SigmaHeadScore(peer.model, dp.VE(*SIGMA), (1, SIZE, SIZE))


@pytest.fixture(scope="module")
def data():
    grid = torch.arange(SIZE) - SIZE // 2
    psf = torch.exp(-(grid[:, None] ** 2 + grid**2) / (2 * 1.5**2))
    y = torch.randn(1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return psf / psf.sum(), y, 0.1


def rounds(benchmark, call, evaluations):
    benchmark.extra_info["network evaluations"] = evaluations
    benchmark.extra_info["batch"] = BATCH
    return benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1)


@pytest.mark.benchmark(group="one score evaluation")
def test_score_of_score_models(benchmark, peer):
    x, t = torch.randn(BATCH, 1, SIZE, SIZE), torch.full((BATCH,), 0.5)

    def call():
        with torch.no_grad():
            return peer.score(t, x)

    assert rounds(benchmark, call, 1).isfinite().all()


@pytest.mark.benchmark(group="one score evaluation")
def test_score_of_diffpost(benchmark, peer, ours):
    x, t = torch.randn(BATCH, 1, SIZE, SIZE), torch.full((BATCH,), 0.5)

    def call():
        with torch.no_grad():
            return ours.score(x, t)

    with torch.no_grad():
        expected = peer.score(t, x)
    torch.testing.assert_close(rounds(benchmark, call, 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.benchmark(group=f"{BATCH} posterior samples in {STEPS} steps")
def test_euler_maruyama_of_score_models(benchmark, peer, data):
    """Convolved likelihood by FFT, as the seed papers run it."""
    psf, y, std = data
    transfer = torch.fft.fft2(torch.fft.ifftshift(psf))

    def likelihood_score(t, x):
        sigma2 = peer.sde.sigma(t).view(-1, 1, 1, 1) ** 2
        residual = torch.fft.fft2(y) - transfer * torch.fft.fft2(x)
        return torch.fft.ifft2(
            transfer.conj() * residual / (std**2 + sigma2 * transfer.abs() ** 2)
        ).real

    def call():
        with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            return peer.sample((BATCH, 1, SIZE, SIZE), STEPS, likelihood_score_fn=likelihood_score)

    assert rounds(benchmark, call, STEPS).isfinite().all()


@pytest.mark.benchmark(group=f"{BATCH} posterior samples in {STEPS} steps")
@pytest.mark.parametrize("method", ["Convolved, EulerMaruyama", "MomentMatching, DPMSolver"])
def test_samples_of_diffpost(benchmark, ours, data, method):
    psf, y, std = data
    likelihood = dp.Likelihood(y, dp.Convolve(psf, boundary="periodic"), dp.GaussianNoise(std=std))
    if method.startswith("Convolved"):
        guidance, sampler = dp.Convolved(), dp.EulerMaruyama(STEPS)
    else:
        white = dp.guidance.IsotropicCovariance(10.0)
        guidance = dp.MomentMatching(covariance=white, differentiate=False)
        sampler = dp.DPMSolver(STEPS)
    posterior = dp.Posterior(ours, likelihood, guidance)

    def call():
        return dp.sample(posterior, BATCH, sampler, seed=0, progress=False)

    draws = rounds(benchmark, call, STEPS)
    assert draws.calls == STEPS
    assert math.isfinite(float(draws.x.sum()))
