"""Magnification, critical curves and caustics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

import diffpost as dp
from diffpost.physics import Grid, caustic_curves, critical_curves, jacobian, magnification

caustics = pytest.importorskip("caustics", reason="pip install caustics")

F64 = torch.float64
COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
IMAGE, SOURCE = Grid((24, 25), pixel=0.2), Grid(8, pixel=0.2)


def lens(mass) -> dp.physics.Lens:
    return dp.physics.Lens(mass, IMAGE, SOURCE)


def sie(q: float | None = 0.75, phi: float = 0.4):
    return caustics.SIE(COSMOLOGY, x0=0.1, y0=-0.05, q=q, phi=phi, Rein=1.25)


@pytest.mark.parametrize("kappa", [0.25, 0.5, 1.5])
def test_a_mass_sheet_magnifies_the_same_everywhere(kappa: float) -> None:
    mu = magnification(lens(caustics.MassSheet(COSMOLOGY, x0=0.0, y0=0.0, kappa=kappa)))
    torch.testing.assert_close(mu, torch.full((24, 25), (1 - kappa) ** -2, dtype=F64))


def test_a_sphere_magnifies_by_its_closed_form() -> None:
    """mu = 1/(1 - theta_E/theta), negative inside of the ring."""
    mu = magnification(lens(caustics.SIS(COSMOLOGY, x0=0.0, y0=0.01, Rein=1.25)))
    x, y = IMAGE.coordinates()
    want = 1 / (1 - 1.25 / torch.hypot(x, y - 0.01))
    torch.testing.assert_close(mu, want, rtol=1e-5, atol=1e-7)
    assert bool((mu < 0).any() and (mu > 1).any())


def test_the_jacobian_is_that_of_finite_differences() -> None:
    model, step = lens([sie(), caustics.SIS(COSMOLOGY, x0=0.0, y0=0.0, Rein=1.0)]), 1e-5
    x, y = (
        0.3 + torch.rand(5, generator=torch.Generator().manual_seed(i), dtype=F64) for i in (0, 1)
    )
    a = jacobian(model, x, y)
    assert a.shape == (2, 5, 2, 2)
    by_x = (model.trace(x + step, y) - model.trace(x - step, y)) / (2 * step)
    by_y = (model.trace(x, y + step) - model.trace(x, y - step)) / (2 * step)
    torch.testing.assert_close(
        a, torch.stack([by_x, by_y], -1).transpose(1, 2), rtol=1e-6, atol=1e-7
    )


def test_the_critical_curve_of_a_sphere_is_its_ring() -> None:
    model = lens(caustics.SIS(COSMOLOGY, x0=0.125, y0=0.0, Rein=1.25))
    (curve,) = critical_curves(model)
    radius = torch.hypot(curve[:, 0] - 0.125, curve[:, 1])
    assert (radius - 1.25).abs().max() < 1e-4
    torch.testing.assert_close(curve[0], curve[-1])
    (point,) = caustic_curves(model)  # of a sphere it is a point
    assert torch.hypot(point[:, 0] - 0.125, point[:, 1]).max() < 1e-4


def test_the_curves_of_an_isothermal_ellipsoid() -> None:
    """Where kappa = 1/2: an ellipse of axes theta_E/sqrt(q) and theta_E sqrt(q) along phi."""
    q, phi = 0.75, 0.4
    model = lens(sie(q, phi))
    (curve,) = critical_curves(model)
    dx, dy = curve[:, 0] - 0.1, curve[:, 1] + 0.05
    along = dx * math.cos(phi) + dy * math.sin(phi)
    across = dy * math.cos(phi) - dx * math.sin(phi)
    assert (torch.sqrt(q * along**2 + across**2 / q) - 1.25).abs().max() < 1e-4
    (astroid,) = caustic_curves(model)
    reach = torch.hypot(astroid[:, 0] - 0.1, astroid[:, 1] + 0.05)
    # cusps: theta - alpha at the ends of that ellipse (alpha of Keeton 2001, equations 34 and 35)
    f = math.sqrt(1 - q**2)
    size = 1.25 * math.sqrt(q) / f
    cusps = [size * (f / q - math.atan(f / q)), size * (math.atanh(f) - f)]
    assert float(reach.max()) == pytest.approx(max(cusps), rel=2e-3)


def test_free_parameters_and_batches() -> None:
    mass = sie(None)
    model = lens(mass)
    q = torch.tensor([[0.5], [0.8]], dtype=F64)
    mu = magnification(model, q)
    assert mu.shape == (2, 24, 25)
    torch.testing.assert_close(mu[1], magnification(model, q[1]))
    grid = Grid(64, pixel=0.08)
    assert len(critical_curves(model, q[0], grid=grid)) == 1
    with pytest.raises(ValueError, match="2 vectors of parameters; expected one"):
        critical_curves(model, q, grid=grid)
    with pytest.raises(ValueError, match="free parameters"):
        magnification(model)


def test_no_curve_where_there_is_none() -> None:
    weak = lens(caustics.MassSheet(COSMOLOGY, x0=0.0, y0=0.0, kappa=0.25))
    assert critical_curves(weak) == [] and caustic_curves(weak) == []
