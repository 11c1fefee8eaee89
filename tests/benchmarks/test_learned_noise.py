"""What a likelihood's score costs with learned noise, and what steps of the flow buy.

    pytest tests/benchmarks/test_learned_noise.py --benchmark-only

``extra_info`` holds ratios of times measured in turns within the same test, and errors of log_prob against the exact density.
Nothing here asserts a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

import diffpost as dp
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore

NETWORK = {
    "kind": "unet",
    "channels": 1,
    "patch": 2,
    "widths": [48],
    "blocks": [1],
    "embedding": 48,
}
SDE = dp.EDM(0.02, 20.0)


def learned(side: int) -> dp.LearnedNoise:
    """The network that `diffpost train-noise` takes by default, not trained: its cost is the same."""
    torch.manual_seed(0)
    net = build_network(NETWORK)
    return dp.LearnedNoise(NetworkScore(net, SDE, (1, side, side), 1.0, card={"noise_std": 1.0}))


def seconds(*calls: Callable[[], object], rounds: int = 7) -> list[float]:
    """The fastest of each, in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - begin)
    return best


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("batch", [1, 16])
def test_likelihood_score(benchmark, side: int, batch: int) -> None:
    """Blurred data: learned noise beside white Gaussian noise, and with a variance map on top (8 levels)."""
    axis = torch.arange(9) - 4.0
    psf = torch.exp(-0.5 * (axis[:, None] ** 2 + axis**2) / 1.5**2)
    operator = dp.Convolve(psf / psf.sum(), boundary="periodic")
    y = torch.randn(1, side, side, generator=torch.Generator().manual_seed(1))
    x = torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(2))
    noise = learned(side)
    variance = torch.linspace(0.1, 2.0, side * side).reshape(1, side, side)
    plain = dp.Likelihood(y, operator, dp.GaussianNoise(std=1.0))
    slic = dp.Likelihood(y, operator, noise)
    mapped = dp.Likelihood(y, operator, noise + dp.GaussianNoise(var=variance))
    with torch.no_grad():
        times = seconds(*(lambda m=m: m.score(x) for m in (plain, slic, mapped)))
        benchmark.pedantic(slic.score, args=(x,), rounds=3, warmup_rounds=1)
    benchmark.extra_info["learned / Gaussian"] = round(times[1] / times[0], 1)
    benchmark.extra_info["with a variance map / learned"] = round(times[2] / times[1], 1)


@pytest.mark.parametrize("trace", ["exact", "8 probes"])
@pytest.mark.parametrize("steps", [4, 8, 16, 32, 64])
def test_log_prob(benchmark, steps: int, trace: str) -> None:
    """Gaussian noise of a known spectrum, 8 x 8: the largest error of log p of 16 residuals, in nats."""
    k = torch.fft.fftfreq(8, dtype=torch.float64)
    power = 1 / (1 + 30 * (k[:, None] ** 2 + k**2))
    score = dp.GaussianScore(torch.zeros(1, 8, 8).double(), power=power[None], sde=SDE)
    exact_trace = 64 if trace == "exact" else 1
    noise = dp.LearnedNoise(score, steps=steps, exact_trace=exact_trace, temperature=0.1)
    exact = dp.GaussianNoise(power=power[None] + noise.blur**2)
    r = exact.sample((16, 1, 8, 8), seed=3, dtype=torch.float64)
    found, error = benchmark.pedantic(noise.log_prob_error, args=(r,), rounds=1)
    benchmark.extra_info["largest error, nats"] = float((found - exact.log_prob(r)).abs().max())
    benchmark.extra_info["stated error of the trace"] = float(error.max())
    start, end = r[:8], r[8:]
    line, doubt = noise.log_ratio(start, end)
    truth = exact.log_prob(end) - exact.log_prob(start)
    benchmark.extra_info["error of the line integral"] = float((line - truth).abs().max())
    benchmark.extra_info["its own estimate"] = float(doubt.max())
