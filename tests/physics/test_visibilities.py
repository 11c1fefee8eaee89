"""Visibilities against the direct sum in float64, its normal operator against the NUFFT, and what is refused."""

import math
import pickle

import pytest
import torch

import diffpost as dp
from diffpost.operators.base import Linearized, Operator
from diffpost.physics import Grid, SkyFrame

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import Visibilities, w_phase

F64 = torch.float64
ARCSEC = math.pi / 180 / 3600
GRIDS = {
    "square": Grid(8, 0.1),
    "off centre": Grid((7, 10), 0.1, centre=(0.3, -0.2)),
    "rotated": Grid((9, 6), 0.1, centre=(0.1, 0.05), sky=SkyFrame(10.0, 20.0, 33.0)),
    "mirrored": Grid(8, 0.1, sky=SkyFrame(10.0, 20.0, -70.0, mirrored=True)),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def direct(grid, u, v, x, sign=-1):
    """sum_j x_j exp(sign 2 pi i (u l + v m)), term by term: (B, m) complex."""
    columns, rows = grid.coordinates()
    east, north = ((-1.0, 0.0), (0.0, 1.0)) if grid.sky is None else grid.sky.matrix
    l_, m_ = ((a * columns + b * rows).reshape(-1) * ARCSEC for a, b in (east, north))
    phase = 2 * math.pi * (u.reshape(-1, 1) * l_ + v.reshape(-1, 1) * m_)
    return x.flatten(1).to(torch.complex128) @ torch.exp(sign * 1j * phase).T


@pytest.mark.parametrize("accuracy", [1e-4, 1e-8, 1e-12])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_the_direct_sum(grid, accuracy):
    """Within 10 times the accuracy asked for, of sum |x|; the other sign of the Fourier transform is not."""
    u, v = randn(2, 60, seed=1) * 2e5
    beam = torch.rand(grid.shape, generator=torch.Generator().manual_seed(2), dtype=F64)
    operator = Visibilities(u, v, grid, primary_beam=beam, accuracy=accuracy)
    x = randn(3, 1, *grid.shape, seed=3)
    size = (x * beam).abs().sum((1, 2, 3))[:, None]
    out = torch.view_as_complex(operator(x))
    assert ((out - direct(grid, u, v, x * beam)).abs() / size).max() < 10 * accuracy
    assert ((out - direct(grid, u, v, x * beam, sign=1)).abs() / size).max() > 0.01
    assert operator.dot_test(operator.input_shape) < 1e-12
    assert operator(x.float()).dtype == torch.float32


def test_channels_and_pickles():
    u, v = randn(2, 3, 20, seed=1) * 2e5
    grid = Grid(8, 0.1)
    operator = Visibilities(u, v, grid)
    x = randn(2, 1, 8, 8)
    flat = Visibilities(u.reshape(-1), v.reshape(-1), grid)
    assert operator.data_shape == (3, 20, 2)
    torch.testing.assert_close(operator(x).flatten(1, 2), flat(x))
    torch.testing.assert_close(pickle.loads(pickle.dumps(operator))(x), operator(x))


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_the_normal_operator(grid):
    u, v = randn(2, 200, seed=1) * 2e5
    weight = torch.rand(200, generator=torch.Generator().manual_seed(4), dtype=F64)
    operator = Visibilities(u, v, grid, primary_beam=lambda r: torch.exp(-(r**2)))
    normal = operator.normal(weight)
    x = randn(2, 1, *grid.shape, seed=3)
    expected = operator.adjoint(weight[:, None] * operator(x))
    assert (normal(x) - expected).norm() < 1e-6 * expected.norm()
    assert (normal(x.float()) - expected).norm() < 1e-5 * expected.norm()
    assert normal.dot_test(normal.input_shape) < 1e-12
    dense = (x.flatten(1) @ normal.dense()).reshape(x.shape)
    assert (dense - expected).norm() < 1e-6 * expected.norm()
    pairs = torch.stack([weight, weight], -1)
    torch.testing.assert_close(operator.normal(pairs)(x), normal(x))
    other = operator.normal(weight.flip(0))(x)
    assert (other - expected).norm() > 0.01 * expected.norm()
    with pytest.raises(ValueError, match="no convolution"):
        operator.normal(torch.stack([weight, 2 * weight], -1))
    with pytest.raises(ValueError, match="not negative"):
        operator.normal(-weight)


def test_derivatives_pass_through():
    """By torch.func and by autograd, inside a nonlinear composition."""

    class Square(Operator):
        def __call__(self, x):
            return x**2

        def output_shape(self, input_shape):
            return input_shape

    u, v = randn(2, 30, seed=1) * 2e5
    seen = Visibilities(u, v, Grid(8, 0.1)) @ Square()
    x, d = randn(2, 2, 1, 8, 8, seed=5)
    derivative = Linearized(seen, x)
    step = 1e-6
    numeric = (seen(x + step * d) - seen(x - step * d)) / (2 * step)
    torch.testing.assert_close(derivative(d), numeric, rtol=1e-6, atol=1e-6)
    assert derivative.dot_test((1, 8, 8)) < 1e-12
    z = x.clone().requires_grad_()
    out = seen(z)
    (gradient,) = torch.autograd.grad((out * numeric).sum(), z)
    torch.testing.assert_close(gradient, derivative.adjoint(numeric), rtol=1e-8, atol=1e-8)


def test_a_weight_is_that_of_each_part():
    """Noise of variance 1/w in both parts: chi^2 of the truth is twice the number of visibilities, not half of that."""
    m = 4000
    u, v = randn(2, m, seed=1) * 2e5
    operator = Visibilities(u, v, Grid(8, 0.1))
    weight = 1 + torch.rand(m, 1, generator=torch.Generator().manual_seed(2), dtype=F64)
    x = randn(1, 1, 8, 8, seed=3)
    y = operator(x)[0] + randn(m, 2, seed=4) / weight.sqrt()
    like = dp.Likelihood(y, operator, dp.GaussianNoise(weight=weight))
    chance = 4.5 * math.sqrt(2 * 2 * m)
    assert abs(float(like.chi2(x)) - 2 * m) < chance
    half = dp.Likelihood(y, operator, dp.GaussianNoise(weight=weight / 2))
    assert abs(float(half.chi2(x)) - 2 * m) > chance
    assert like.ndata == 2 * m


def test_w_phase():
    grid = Grid((64, 128), 0.5)
    r = ARCSEC * math.hypot(32.0, 16.0)
    exact = 2 * math.pi * 3e4 * (1 - math.sqrt(1 - r**2))
    assert w_phase(torch.tensor([1e4, -3e4]), grid) == pytest.approx(exact)


def test_refused():
    u, v = randn(2, 30, seed=1) * 2e5
    grid = Grid(8, 0.1)
    longest = float(torch.maximum(u.abs(), v.abs()).max())
    largest = 0.5 / longest / ARCSEC
    with pytest.raises(ValueError, match=rf"at most {largest:.4g} arcsec"):
        Visibilities(u, v, Grid(8, 1.0))
    Visibilities(u, v, Grid(8, 0.999 * largest))
    bad = u.clone()
    bad[3] = math.nan
    for make, message in (
        (lambda: Visibilities(bad, v, grid), "NaN"),
        (lambda: Visibilities(u, v[:-1], grid), "same shape"),
        (lambda: Visibilities(u[:0], v[:0], grid), "not"),
        (lambda: Visibilities(u / 1e3, v / 1e3, grid), "in metres"),
        (lambda: Visibilities(u, v, grid, accuracy=0.1), "1e-14 to 1e-2"),
        (lambda: Visibilities(u, v, grid, primary_beam=torch.ones(4, 4)), "primary beam"),
        (lambda: Visibilities(u, v, grid)(torch.zeros(1, 1, 4, 4)), "got images"),
        (lambda: Visibilities(u, v, grid).adjoint(torch.zeros(1, 30)), "adjoint got"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
