"""Morphology against profiles whose numbers are known in closed form."""

import math

import pytest
import torch

from diffpost.morphology import half_light_radius, measure, peak, total_flux


def gaussian(sigma, q=1.0, centre=(0.0, 0.0), n=65):
    grid = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    y, x = grid[:, None] - centre[0], grid[None, :] - centre[1]
    return torch.exp(-(x**2 + (y / q) ** 2) / (2 * sigma**2))[None]


def test_round_gaussian():
    found = measure(gaussian(5.0))
    assert float(found["size"]) == pytest.approx(5 * math.sqrt(2 * math.log(2)), rel=0.01)
    ratio = math.sqrt(math.log(1 / 0.2) / math.log(1 / 0.8))
    assert float(found["concentration"]) == pytest.approx(5 * math.log10(ratio), rel=0.02)
    assert float(found["ellipticity"]) < 1e-3
    assert float(found["asymmetry"]) < 1e-3


def test_flattened_gaussian_in_its_window():
    """Second moments of a product of Gaussians: 1/Q = 1/s^2 + 1/r50^2 on each axis."""
    sigma, q = 6.0, 0.5
    found = measure(gaussian(sigma, q))
    r50 = float(found["size"])
    qx, qy = (1 / (1 / s**2 + 1 / r50**2) for s in (sigma, q * sigma))
    assert float(found["ellipticity"]) == pytest.approx((qx - qy) / (qx + qy), rel=0.01)


def test_a_shift_changes_nothing_much():
    images = torch.cat([gaussian(5.0, 0.6), gaussian(5.0, 0.6, centre=(2.3, -3.4))])
    for name, values in measure(images).items():
        assert float(values[0]) == pytest.approx(float(values[1]), abs=0.03, rel=0.03), name


def test_asymmetry_sees_a_lopsided_galaxy():
    lopsided = gaussian(5.0) + 0.5 * gaussian(2.0, centre=(8.0, 0.0))
    assert float(measure(lopsided)["asymmetry"]) > 0.05


def test_wrong_shape():
    with pytest.raises(ValueError, match="expected \\(B, H, W\\)"):
        measure(torch.zeros(2, 3, 8, 8))


def test_the_half_light_radius_alone_is_that_of_all():
    images = torch.cat([gaussian(5.0, 0.6), gaussian(3.0, centre=(2.3, -3.4)), -gaussian(4.0)])
    assert torch.equal(half_light_radius(images[:, None]), measure(images)["size"])
    with pytest.raises(ValueError, match="expected"):
        half_light_radius(images[0])


def test_flux_and_peak_are_those_of_the_pixels():
    images = torch.arange(24.0).reshape(2, 1, 3, 4)
    assert total_flux(images).tolist() == [66.0, 210.0]
    assert peak(images).tolist() == [11.0, 23.0]
