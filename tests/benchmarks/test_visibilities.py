"""Visibilities: the NUFFT against the direct sum, A^T W A as a convolution against two NUFFTs, and growth.

    pytest tests/benchmarks/test_visibilities.py --benchmark-only

Ratios are medians of pairs in one process, in `extra_info`. Nothing here asserts a time.
"""

from __future__ import annotations

import math

import pytest
import torch

from diffpost.physics import Grid

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import Visibilities

ARCSEC = math.pi / 180 / 3600
CELL = 0.05


def baselines(m):
    """u and v of m baselines, Gaussian, cut where pixels of CELL end."""
    limit = 0.49 / (CELL * ARCSEC)
    g = torch.Generator().manual_seed(0)
    uv = 0.3 * limit * torch.randn(2, m, generator=g, dtype=torch.float64)
    return uv.clamp(-limit, limit)


@pytest.mark.benchmark(group="V of one image of 64 x 64")
@pytest.mark.parametrize("m", [1000, 10_000])
def test_against_the_direct_sum(benchmark, ratio, m):
    grid, (u, v) = Grid(64, CELL), baselines(m)
    operator = Visibilities(u, v, grid)
    x = torch.rand(1, 1, 64, 64, dtype=torch.float64)
    columns, rows = (axis * ARCSEC for axis in grid.axes())

    def direct():
        down = torch.exp(-2j * math.pi * torch.outer(v, rows))
        along = torch.exp(2j * math.pi * torch.outer(u, columns))
        return ((down @ x[0, 0].to(torch.complex128)) * along).sum(1)

    gained = ratio(direct, lambda: operator(x))
    out = benchmark.pedantic(lambda: operator(x), rounds=5, warmup_rounds=1)
    benchmark.extra_info["ratio to the direct sum"] = round(gained, 1)
    assert (torch.view_as_complex(out)[0] - direct()).abs().max() < 1e-8 * x.sum()


@pytest.mark.benchmark(group="A^T W A of 20,000 visibilities")
@pytest.mark.parametrize("side", [64, 256])
def test_the_convolution_against_two_nuffts(benchmark, ratio, side):
    u, v = baselines(20_000)
    operator = Visibilities(u, v, Grid(side, CELL))
    weight = torch.rand(20_000, dtype=torch.float64)
    normal = operator.normal(weight)
    x = torch.rand(1, 1, side, side, dtype=torch.float64)

    def two():
        return operator.adjoint(weight[:, None] * operator(x))

    benchmark.extra_info["ratio to two NUFFTs"] = round(ratio(two, lambda: normal(x)), 1)
    single = x.float()
    benchmark.extra_info["in float32"] = round(ratio(two, lambda: normal(single)), 1)
    out = benchmark.pedantic(lambda: normal(x), rounds=5, warmup_rounds=1)
    assert (out - two()).norm() < 1e-6 * out.norm()


@pytest.mark.benchmark(group="growth with visibilities, 256 x 256")
@pytest.mark.parametrize(
    "m", [10**3, 10**4, 10**5, 10**6, pytest.param(10**7, marks=pytest.mark.slow)]
)
def test_growth_with_visibilities(benchmark, m):
    operator = Visibilities(*baselines(m), Grid(256, CELL))
    x = torch.rand(1, 1, 256, 256, dtype=torch.float64)
    assert benchmark.pedantic(lambda: operator(x), rounds=1, warmup_rounds=1).isfinite().all()


@pytest.mark.benchmark(group="growth with pixels, 20,000 visibilities")
@pytest.mark.parametrize("side", [32, 64, 128, 256, 512, 1024])
def test_growth_with_pixels(benchmark, side):
    operator = Visibilities(*baselines(20_000), Grid(side, CELL))
    x = torch.rand(1, 1, side, side, dtype=torch.float64)
    assert benchmark.pedantic(lambda: operator(x), rounds=3, warmup_rounds=1).isfinite().all()
