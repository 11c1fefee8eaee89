"""ray_shoot, forward and adjoint, against the reference and its autograd in float64."""

import numpy as np
import pytest
import torch

from diffpost.kernels._math import atan, atanh, sincos
from diffpost.kernels._runtime import jit, tl
from diffpost.kernels.ray_shoot import ray_shoot, reference, setting


@jit
def _functions(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    s, c = sincos(v)
    tl.store(out + i, s)
    tl.store(out + N + i, c)
    tl.store(out + 2 * N + i, atan(v))
    tl.store(out + 3 * N + i, atanh(tl.where(tl.abs(v) < 1, v, 0.0)))


@pytest.mark.parametrize("scale", [1e-3, 0.9, 30.0, 1000.0])
def test_device_functions(device, scale):
    n = 1 << 14
    x = scale * np.random.default_rng(5).uniform(-1, 1, n).astype(np.float32)
    out = torch.empty(4, n, device=device)
    _functions[(1,)](torch.from_numpy(x).to(device), out, N=n)
    wide = x.astype(np.float64)
    inside = np.where(np.abs(wide) < 1, wide, 0)
    expected = np.stack([np.sin(wide), np.cos(wide), np.arctan(wide), np.arctanh(inside)])
    error = np.abs(out.cpu().double().numpy() - expected) / np.maximum(np.abs(expected), 0.1)
    assert error.max() < (5e-6 if scale == 1000.0 else 1e-6)


PARAMS = [
    [0.03, -0.02, 0.7, 0.4, 1.2, 0.05, -0.03],
    [0.0, 0.1, 0.97, -2.0, 1.0, 0.0, 0.02],
    [-0.1, 0.05, 0.3, 7.0, 0.8, -0.1, 0.1],
]
# (batch, channels, height, width), (rays, pixels): odd sizes, one pixel, more channels than a tile holds
SHAPES = [
    ((2, 1, 12, 10), (1, 37)),
    ((3, 5, 7, 9), (2, 13)),
    ((1, 1, 1, 1), (2, 1)),
    ((1, 2, 16, 16), (1, 700)),
]


def inputs(draw, shape, rays, dtype, device):
    source = draw(*shape)
    params = torch.tensor(PARAMS[: shape[0]], dtype=torch.float64, device=device)
    x, y = draw(2, *rays, scale=1.3)
    x[0, 0], y[0, 0] = 0.03, -0.02  # onto the centre of the first lens
    at = setting((0.05, -0.1), 2.4 / shape[-1], 0.5, 1e-3, torch.float64, device)
    # the reference gets the same rounded numbers
    return [t.to(dtype) for t in (source, params, x, y, at)]


def gradients(function, given, g, *options):
    source, params, *rest = given
    leaves = [source.clone().requires_grad_(), params.clone().requires_grad_()]
    out = function(*leaves, *rest, *options)
    return out.detach(), *torch.autograd.grad(out, leaves, g.to(out))


def relative(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0))


@pytest.mark.parametrize(("shape", "rays"), SHAPES)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_the_reference(device, canaries, draw, shape, rays, deterministic, dtype):
    """float32 is limited by the places, of about 1e-6 of the source grid; float64 by the polynomials."""
    given = inputs(draw, shape, rays, dtype, device)
    g = draw(*shape[:2], rays[1])
    expected = gradients(reference, [t.double() for t in given], g)
    got = gradients(ray_shoot, [canaries.place(t) for t in given], g, deterministic)
    assert relative(got[0], expected[0]) < 2e-5
    assert relative(got[1], expected[1]) < 2e-5
    for b in range(shape[0]):  # by entry, of the largest of its seven
        assert relative(got[2][b], expected[2][b]) < 1e-4


def test_the_adjoint_is_the_transpose(device, draw):
    """<g, A s> = <A^T g, s>, and the integers of the deterministic sums lose nothing that float64 sees."""
    given = inputs(draw, (2, 3, 9, 8), (2, 50), torch.float64, device)
    g = draw(2, 3, 50)
    for deterministic in (True, False):
        out, back, _ = gradients(ray_shoot, given, g, deterministic)
        torch.testing.assert_close((g * out).sum(), (back * given[0]).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e30])
def test_deterministic_sums_have_the_range_of_float32(device, draw, size):
    given = inputs(draw, (2, 1, 6, 6), (1, 60), torch.float32, device)
    g = (
        draw(2, 1, 60, dtype=torch.float32)
        * torch.tensor([size, 1.0], device=device)[:, None, None]
    )
    exact = gradients(reference, [t.double() for t in given], g.double())[1]
    got = gradients(ray_shoot, given, g, True)[1]
    for b in range(2):
        largest = float(exact[b].abs().max())
        assert float((got[b].double() - exact[b]).abs().max()) <= 2e-5 * largest


def test_a_gradient_that_is_not_finite_shows(device, draw):
    given = inputs(draw, (2, 1, 6, 6), (1, 60), torch.float32, device)
    for bad in (float("nan"), float("inf")):
        g = draw(2, 1, 60, dtype=torch.float32)
        g[0, 0, 3] = bad
        back = gradients(ray_shoot, given, g, True)[1]
        assert not bool(back[0].isfinite().any())
        assert bool(back[1].isfinite().all())


def test_a_deflection_without_a_value_shows(device, draw):
    given = inputs(draw, (2, 1, 6, 6), (1, 5), torch.float32, device)
    given[1][0, 4] = float("nan")
    out = ray_shoot(*given)
    assert bool(out[0].isnan().all()) and bool(out[1].isfinite().all())


def test_places_far_outside_see_nothing(device, draw):
    source, params, x, y, at = inputs(draw, (1, 1, 6, 6), (1, 5), torch.float32, device)
    assert float(ray_shoot(source, params, x + 1e6, y - 1e6, at).abs().max()) == 0.0
    assert float(ray_shoot(source, params, x + 1e30, y, at).abs().max()) == 0.0


def test_the_same_input_gives_the_same_bits(device, draw):
    given = inputs(draw, (2, 1, 8, 8), (1, 300), torch.float32, device)
    g = draw(2, 1, 300, dtype=torch.float32)
    first, second = (gradients(ray_shoot, given, g, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_order_of_rays_changes_no_bit_of_the_deterministic_source(device, draw):
    """What atomics do on a GPU, done on purpose: integers do not care, floats do."""
    source, params, x, y, at = inputs(draw, (1, 1, 4, 4), (1, 900), torch.float32, device)
    g = draw(1, 1, 900, dtype=torch.float32)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(1)).to(device)
    for deterministic in (True, False):
        first = gradients(ray_shoot, [source, params, x, y, at], g, deterministic)[1]
        shuffled = [source, params, x[:, order], y[:, order], at]
        second = gradients(ray_shoot, shuffled, g[..., order], deterministic)[1]
        assert torch.equal(first, second) == deterministic
