"""docs/conventions.md, checked with a shifted point source."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffpost as dp


def point(i: int, j: int, height: int = 12, width: int = 16) -> Tensor:
    image = torch.zeros(1, 1, height, width, dtype=torch.float64)
    image[..., i, j] = 1.0
    return image


def centroid(image: Tensor) -> tuple[float, float]:
    """(x, y) of the light: x along columns, y along rows, pixel centres at integers from 0."""
    plane = image.reshape(image.shape[-2:])
    y, x = (torch.arange(n, dtype=plane.dtype) for n in plane.shape)
    total = plane.sum()
    return float((plane.sum(0) * x).sum() / total), float((plane.sum(1) * y).sum() / total)


@pytest.mark.parametrize("boundary", ["zero", "periodic"])
@pytest.mark.parametrize("size", [(5, 5), (4, 4), (4, 7)])
def test_a_point_becomes_the_psf_centred_on_it(size: tuple[int, int], boundary: str) -> None:
    h, w = size
    psf = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = dp.Convolve(psf, boundary=boundary)(point(5, 8))[0, 0]
    top, left = 5 - h // 2, 8 - w // 2
    torch.testing.assert_close(out[top : top + h, left : left + w], psf)
    assert float(out.sum()) == pytest.approx(float(psf.sum()))


def test_a_delta_at_the_centre_of_the_psf_is_the_identity_and_one_aside_shifts() -> None:
    for n in (4, 5):
        psf = torch.zeros(n, n, dtype=torch.float64)
        psf[n // 2, n // 2] = 1.0
        assert centroid(dp.Convolve(psf)(point(5, 8))) == pytest.approx((8, 5))
        assert centroid(dp.Convolve(psf.roll(1, 1))(point(5, 8))) == pytest.approx((9, 5))
        assert centroid(dp.Convolve(psf.roll(1, 0))(point(5, 8))) == pytest.approx((8, 6))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_binning_conserves_flux_and_moves_positions_by_halves(k: int) -> None:
    image = point(5, 8) + 2 * point(9, 3)
    out = dp.PixelBin(k)(image)
    assert float(out.sum()) == float(image.sum())
    # The centroid of a block is that of its pixels' centres: K p + (K - 1)/2 of every coarse p.
    coarse = torch.ones(1, 1, 12 // k, 16 // k, dtype=torch.float64)
    fine = dp.PixelBin(k).adjoint(point(1, 2, 12 // k, 16 // k))
    assert centroid(fine) == pytest.approx((k * 2 + (k - 1) / 2, k * 1 + (k - 1) / 2))
    assert dp.PixelBin(k).adjoint(coarse).shape == image.shape


def test_operators_act_from_the_right() -> None:
    psf = torch.zeros(3, 3, dtype=torch.float64)
    psf[1, 2] = 1.0  # one pixel to the right, on the fine grid
    out = (dp.PixelBin(2) @ dp.Convolve(psf))(point(4, 7))
    torch.testing.assert_close(out, dp.PixelBin(2)(point(4, 8)))
    assert float((out - dp.PixelBin(2)(point(4, 7))).abs().max()) > 0.9  # without the shift


def test_fourier_sign_and_normalisation() -> None:
    height, width = 12, 16
    modes = torch.view_as_complex(dp.Fourier()(point(3, 5)))[0, 0]
    ky, kx = (torch.arange(n, dtype=torch.float64) for n in (height, width))
    phase = 2 * math.pi * (ky[:, None] * 3 / height + kx[None, :] * 5 / width)
    expected = torch.polar(torch.full_like(phase, (height * width) ** -0.5), -phase)
    torch.testing.assert_close(modes, expected)
    assert float((modes - expected.conj()).abs().max()) > 0.1  # the other sign is another transform


def test_power_is_the_variance_of_orthonormal_modes() -> None:
    """White noise of variance 4: power = 4 and var = 4 give one density, at any size."""
    for shape in ((1, 6, 8), (1, 12, 12)):
        residual = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1)).double()
        power = dp.GaussianNoise(power=torch.full(shape, 4.0, dtype=torch.float64))
        white = dp.GaussianNoise(var=4.0)
        torch.testing.assert_close(power.log_prob(residual), white.log_prob(residual))


def test_physical_is_scale_times_model_plus_offset() -> None:
    prior = dp.GaussianScore(torch.zeros(1, 4, 4), var=1.0, sde=dp.EDM()).with_affine(3.0, -2.0)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(prior.to_physical(x), 3 * x - 2)
    torch.testing.assert_close(prior.to_model(prior.to_physical(x)), x)


@pytest.mark.parametrize("sde", [dp.VE(), dp.VP(), dp.TSVE(), dp.EDM()])
def test_time_runs_from_noise_to_clean(sde: dp.SDE) -> None:
    grid = sde.time_grid(10)
    assert grid.dtype == torch.float64
    assert bool((grid.diff() < 0).all())
    assert bool((sde.nsr(grid).diff() < 0).all())
    assert float(sde.nsr(grid[-1])) < 0.02
    assert float(sde.nsr(grid[0])) > 10


@pytest.mark.parametrize("n", [8, 9])
def test_visibilities_of_a_point_source(n: int) -> None:
    """l = -x towards the east and m = y towards the north from the middle of the grid, even or odd; V(-u, -v) = V(u, v)*."""
    pytest.importorskip("finufft", reason="needs finufft")
    from diffpost.physics import Grid, Visibilities

    pixel, radian = 0.1, math.pi / 180 / 3600
    u = torch.tensor([1e5, 0.0, -2e5, 1.5e5], dtype=torch.float64)
    v = torch.tensor([0.0, 2e5, 1e5, -0.5e5], dtype=torch.float64)
    for i, j in ((n // 2, n // 2), (1, 6)):
        x, y = ((k - (n - 1) / 2) * pixel * radian for k in (j, i))
        expected = torch.exp(-2j * math.pi * (-u * x + v * y))
        image = 3.0 * point(i, j, n, n)
        seen = torch.view_as_complex(Visibilities(u, v, Grid(n, pixel))(image))[0]
        mirrored = torch.view_as_complex(Visibilities(-u, -v, Grid(n, pixel))(image))[0]
        torch.testing.assert_close(seen, 3.0 * expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mirrored, seen.conj(), rtol=1e-8, atol=1e-8)
