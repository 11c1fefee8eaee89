"""What `optimize` gains, and what is left to gain, as median ratios of pairs in one process: in `extra_info`.

    pytest tests/benchmarks/test_optimize.py --benchmark-only --benchmark-json=runs/optimize.json

The peers are score_models' own networks of 13.5 GFLOP an evaluation, and for the U-Net a 3 x 3 convolution of 128 channels,
as fast as this machine makes one. What is left are shares of a forward or of a draw, of the processor's time: run them on one
thread (OMP_NUM_THREADS=1). Nothing here asserts a time.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import diffpost as dp
from diffpost.jobs.instruments import gaussian_psf
from diffpost.networks.fast_score_models import fast_twin
from diffpost.random import Noise

ATEN = torch.ops.aten
NORMS = {ATEN.native_layer_norm.default, ATEN.native_group_norm.default}
AROUND = {ATEN.silu.default, ATEN.addcmul.default}  # SiLU and the U-Net's FiLM
NETWORKS = ["galaxies-64", "NCSNpp", "NCSNpp of score_models", "DDPM", "DDPM of score_models"]


def flops(call) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def seconds(call) -> float:
    """Of the processor."""
    start = time.process_time()
    call()
    return time.process_time() - start


def over(part, whole, repeats: int = 1, pairs: int = 5) -> float:
    """Median time of one call, repeated where it is short, over that of another."""

    def many():
        for _ in range(repeats):
            part()

    return statistics.median([seconds(many) / seconds(whole) for _ in range(pairs + 1)][1:]) / (
        repeats
    )


def unet(name: str = "galaxies-64"):
    prior = dp.optimize(dp.load_prior(name))
    prior.net.requires_grad_(False)  # as a guidance has it: no convolution for gradients of weights
    return prior


def peer(kind: str):
    """A network of score_models with random weights."""
    architectures = pytest.importorskip("score_models.architectures")
    torch.manual_seed(0)
    # of a ReLU, DDPM's default, rounding flips some derivatives: 0.4% of a VJP at random weights
    options = {"nf": 32, "ch_mult": (1, 2, 2, 2), "activation_type": "swish"}
    net = getattr(architectures, kind)(channels=1, **options).eval()
    return net.requires_grad_(False)


def evaluation(name: str):
    """A network as a function of x alone, and an x: 64 x 64, a batch of 4."""
    x = torch.randn(4, 1, 64, 64)
    if name == "galaxies-64":
        net = unet().net
        return lambda at: net(at, torch.zeros(4)), x
    kind, _, own = name.partition(" ")
    net = peer(kind) if own else fast_twin(peer(kind))
    return lambda at: net(torch.full((4,), 0.5), at), x


def without_gradients(call, *inputs):
    def run():
        with torch.no_grad():
            return call(*inputs)

    return run


@pytest.mark.slow
@pytest.mark.benchmark(group="a network of score_models")
@pytest.mark.parametrize("what", ["forward", "VJP"])
@pytest.mark.parametrize("kind", ["NCSNpp", "DDPM"])
def test_score_models(benchmark, ratio, kind, what):
    net = peer(kind)
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
@pytest.mark.parametrize("what", ["forward", "VJP"])
@pytest.mark.parametrize("name", ["galaxies-64", "galaxies-32"])
def test_share_of_a_convolution(benchmark, ratio, name, what):
    prior = unet(name)
    x, label, v = torch.randn(8, *prior.shape), torch.zeros(8), torch.randn(8, *prior.shape)
    conv = torch.nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    conv = conv.to(memory_format=torch.channels_last)
    y = torch.randn(8, 128, 32, 32).to(memory_format=torch.channels_last)

    def many():
        for _ in range(4):
            conv(y)

    def run():
        if what == "forward":
            with torch.no_grad():
                return prior.net(x, label)
        at = x.clone().requires_grad_()
        prior.net(at, label).backward(v)  # the counter of operations does not stand autograd.grad
        return at.grad

    # of a VJP, the forward and the convolutions that carry gradients back to their inputs
    work = flops(run)
    share = ratio(many, run) * work / flops(many)
    assert benchmark.pedantic(run, rounds=3, warmup_rounds=1).isfinite().all()
    benchmark.extra_info["rate over that of the convolution"] = round(share, 3)
    benchmark.extra_info["GFLOP"] = round(work / 1e9, 2)


@pytest.mark.usefixtures("asked_for")
@pytest.mark.benchmark(group="a VJP on top of its forward, in forwards")
@pytest.mark.parametrize("name", NETWORKS)
def test_cost_of_a_vjp(benchmark, name):
    call, x = evaluation(name)
    v = torch.randn_like(x)

    def both():
        at = x.clone().requires_grad_()
        return torch.autograd.grad(call(at), at, v)[0]

    cost = over(both, without_gradients(call, x)) - 1
    assert benchmark.pedantic(both, rounds=1, warmup_rounds=0).isfinite().all()
    benchmark.extra_info["forwards"] = round(cost, 2)


class Recorded(TorchDispatchMode):
    """Calls of some operations on feature maps, to be made again."""

    def __init__(self, operations):
        super().__init__()
        self.operations, self.calls = operations, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in self.operations and args[0].ndim == 4:
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("asked_for")
@pytest.mark.benchmark(group="normalisation and SiLU")
@pytest.mark.parametrize("name", [name for name in NETWORKS if "DDPM" not in name])
def test_share_of_normalisations(benchmark, name):
    """What a fused kernel could gain at most: it reads and writes a map once, as a SiLU does."""
    call, x = evaluation(name)
    run = without_gradients(call, x)
    with Recorded(NORMS | AROUND) as recorded:
        run()
    maps = [args[0] for function, args in recorded.calls if function in NORMS]

    @torch.no_grad()
    def plain():
        for function, args in recorded.calls:  # whose answers are dropped: memory is used again
            function(*args)

    @torch.no_grad()
    def least():
        for y in maps:
            ATEN.silu(y)

    shares = over(plain, run), over(least, run)
    benchmark.pedantic(plain, rounds=1, warmup_rounds=0)
    benchmark.extra_info["share of a forward"] = round(shares[0], 3)
    benchmark.extra_info["of as many SiLUs alone"] = round(shares[1], 3)


@pytest.mark.benchmark(group="the noise embedding")
def test_share_of_the_embedding(benchmark):
    """What embeddings computed once for all levels would gain."""
    net, x, label = unet().net, torch.randn(4, 1, 64, 64), torch.zeros(4)
    films = [layer.film for layer in net.modules() if getattr(layer, "film", None) is not None]

    def embed():
        found = net.embed(label)
        return [film(found) for film in films]

    call = without_gradients(embed)
    share = over(call, without_gradients(net, x, label), repeats=20)
    benchmark.pedantic(call, rounds=3)
    benchmark.extra_info["share of a forward"] = round(share, 4)


class Free:
    """A model whose denoiser costs nothing."""

    def __init__(self, model):
        self.sde, self.shape = model.sde, model.shape
        self.dtype, self.device = model.dtype, model.device

    def denoise(self, x, t):
        return x


@pytest.mark.usefixtures("asked_for")
@pytest.mark.benchmark(group="the update of a step")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("guided", [False, True], ids=["prior", "posterior"])
def test_share_of_the_update(benchmark, batch, guided):
    """Of all steps of a draw: the sampler without its denoiser, and the noise in it."""
    model, operator = unet(), dp.Convolve(gaussian_psf(1.5))
    sampler, noise = dp.DPMSolver(32, eta=1.0), Noise(0, torch.arange(batch))
    times = sampler.times(model.sde)
    x = torch.randn(batch, *model.shape)
    if guided:
        axis = torch.arange(64) - 32
        truth = torch.exp(-(axis[:, None] ** 2 + axis**2).sqrt() / 6)[None, None]
        clean = operator(truth)[0]
        y = clean + 0.03 * torch.randn(clean.shape)
        model = dp.Posterior(model, dp.Likelihood(y, operator, dp.GaussianNoise(std=0.03)))

    def steps(of):
        state = sampler.init(of, noise.at(0), batch)
        for i in range(len(times) - 1):
            state = sampler.step(of, state, times[i], times[i + 1], noise.at(i + 1))
        return state.x

    draw, free = without_gradients(steps, model), without_gradients(steps, Free(model))

    def numbers():
        for i in range(len(times) - 1):
            noise.at(i)(x)

    shares = over(free, draw, pairs=2), over(numbers, free)
    assert benchmark.pedantic(free, rounds=1).isfinite().all()
    benchmark.extra_info["share of a draw"] = round(shares[0], 4)
    benchmark.extra_info["share of the noise in it"] = round(shares[1], 2)
