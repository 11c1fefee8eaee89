"""The products of a known lens beside torch's ``grid_sample``, forward and backward, in one process.

Both make images of flux from the same rays, binned to pixels; ``grid_sample`` has its coordinates ready as the
lens has its matrix. Run it by

    pytest tests/benchmarks/test_lensing.py --benchmark-only --benchmark-group-by=group

``extra_info`` holds the ratios, of times measured in turns within the same test. Nothing here asserts a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import diffpost as dp
from diffpost.physics import Grid

caustics = pytest.importorskip("caustics", reason="pip install caustics")

COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
SIZES = {  # of image and source, rays along a side of a pixel, batch: the rows of docs/lensing.md
    "128, 64, k=2, batch 1": (128, 64, 2, 1),
    "128, 64, k=2, batch 4": (128, 64, 2, 4),
    "128, 64, k=2, batch 16": (128, 64, 2, 16),
    "128, 64, k=4, batch 4": (128, 64, 4, 4),
    "128, 64, k=1, batch 1": (128, 64, 1, 1),
    "128, 64, k=1, batch 16": (128, 64, 1, 16),
    "128, 64, k=1, batch 64": (128, 64, 1, 64),
    "64, 32, k=2, batch 64": (64, 32, 2, 64),
}


def setup(image: int, source: int, k: int):
    """A lens, and the same by grid_sample."""
    sie = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25)
    lens = dp.physics.Lens(
        sie, Grid(image, pixel=5.0 / image, oversample=k), Grid(source, pixel=2.4 / source)
    )
    beta = lens.trace(*(c.flatten() for c in lens.image.fine.coordinates()))[0]
    places = (beta / 1.2).T.reshape(1, image * k, image * k, 2).float()
    factor = lens.image.area / lens.source.area

    def sampled(x: Tensor) -> Tensor:
        grid = places.expand(len(x), -1, -1, -1)
        rays = torch.nn.functional.grid_sample(x, grid, align_corners=False)
        return factor * (torch.nn.functional.avg_pool2d(rays, k) if k > 1 else rays)

    return lens, sampled


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    source = x.detach().requires_grad_()
    return torch.autograd.grad(forward(source), source, v)[0]


def seconds(*calls: Callable[[], object], rounds: int = 20) -> list[float]:
    """The fastest of each, in turns."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward(benchmark, size: str) -> None:
    image, source, k, batch = SIZES[size]
    lens, sampled = setup(image, source, k)
    x = torch.rand(batch, 1, source, source, generator=torch.Generator().manual_seed(0))
    v = torch.rand(batch, 1, image, image, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(lens(x), sampled(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lens.adjoint(v), gradient(sampled, x, v), rtol=1e-3, atol=1e-2)
    ours, theirs, back, both = seconds(
        lambda: lens(x),
        lambda: sampled(x),
        lambda: lens.adjoint(v),
        lambda: gradient(sampled, x, v),
    )
    benchmark.group = size
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.extra_info["forward, grid_sample / lens"] = round(theirs / ours, 2)
    benchmark.extra_info["backward, grid_sample / lens"] = round((both - theirs) / back, 2)
    benchmark.extra_info["both, grid_sample / lens"] = round(both / (ours + back), 2)
    benchmark(lambda: lens.adjoint(lens(x)))


def test_beside_caustics(benchmark) -> None:
    """caustics' simulator of a pixelated source, which traces its rays at every call."""
    lens, _ = setup(128, 64, 2)
    simulator = caustics.LensSource(
        lens=caustics.SIE(COSMOLOGY, z_l=0.5, z_s=2.0, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25),
        source=caustics.Pixelated(x0=0.0, y0=0.0, shape=(64, 64), pixelscale=2.4 / 64, scale=1.0),
        pixelscale=5.0 / 128,
        pixels_x=128,
        upsample_factor=2,
    )
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    v = torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    ours, theirs, back, both = seconds(
        lambda: lens(x),
        lambda: simulator([x[0, 0]]),
        lambda: lens.adjoint(v),
        lambda: gradient(lambda s: simulator([s[0, 0]])[None, None], x, v),
    )
    benchmark.group = "caustics"
    benchmark.extra_info["forward, caustics / lens"] = round(theirs / ours, 1)
    benchmark.extra_info["both, caustics / lens"] = round(both / (ours + back), 1)
    benchmark(lambda: lens.adjoint(lens(x)))


@pytest.mark.parametrize("side", [64, 128, 256])
def test_memory_and_time_to_build(benchmark, side: int) -> None:
    """With the size of the source, the image twice as large: how the matrix grows."""
    lens, _ = setup(2 * side, side, 2)
    blocks = lens.at().blocks
    benchmark.group = "build"
    benchmark.extra_info["entries a row"] = round(len(blocks.value) / blocks.m, 2)
    held = (blocks.start, blocks.column, blocks.value)
    benchmark.extra_info["MB"] = round(sum(t.numel() * t.element_size() for t in held) / 1e6, 2)
    benchmark.pedantic(lambda: setup(2 * side, side, 2), rounds=2)
