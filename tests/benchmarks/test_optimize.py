"""What `optimize` gains, as the median ratio of pairs in one process: `extra_info["ratio"]`.

    pytest tests/benchmarks/test_optimize.py --benchmark-only

The peers are score_models' own networks of 13.5 GFLOP an evaluation, and for the U-Net a 3 x 3 convolution of 128 channels,
as fast as this machine makes one. Nothing here asserts a time.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffpost as dp
from diffpost.networks.fast_score_models import fast_twin


def flops(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.benchmark(group="a network of score_models")
@pytest.mark.parametrize("what", ["forward", "VJP"])
@pytest.mark.parametrize("kind", ["NCSNpp", "DDPM"])
def test_score_models(benchmark, ratio, kind, what):
    architectures = pytest.importorskip("score_models.architectures")
    torch.manual_seed(0)
    # of a ReLU, DDPM's default, rounding flips some derivatives: 0.4% of a VJP at random weights
    options = {"nf": 32, "ch_mult": (1, 2, 2, 2), "activation_type": "swish"}
    net = getattr(architectures, kind)(channels=1, **options).eval()
    net.requires_grad_(False)
    twin = fast_twin(net)
    x, t, v = torch.randn(4, 1, 64, 64), torch.full((4,), 0.5), torch.randn(4, 1, 64, 64)
    if what == "VJP":
        x.requires_grad_()

    def run(model):
        out = model(t, x)
        return torch.autograd.grad(out, x, v)[0] if what == "VJP" else out

    gained = ratio(lambda: run(net), lambda: run(twin))
    out = benchmark.pedantic(lambda: run(twin), rounds=1, warmup_rounds=1)
    benchmark.extra_info["ratio to score_models"] = round(gained, 3)
    expected = run(net)
    assert (out - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.benchmark(group="a U-Net of ours")
@pytest.mark.parametrize("name", ["galaxies-64", "galaxies-32"])
def test_share_of_a_convolution(benchmark, ratio, name):
    prior = dp.optimize(dp.load_prior(name))
    x, label = torch.randn(8, *prior.shape), torch.zeros(8)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    y = torch.randn(8, 128, 32, 32).to(memory_format=torch.channels_last)

    def many():
        for _ in range(4):
            conv(y)

    def run():
        with torch.no_grad():
            return prior.net(x, label)

    share = ratio(many, run) * flops(run) / flops(many)
    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1).isfinite().all()
    benchmark.extra_info["rate over that of the convolution"] = round(share, 3)
