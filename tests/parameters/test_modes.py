"""Restarts find the modes of known densities, and say how."""

import math

import pytest
import torch

from diffpost.parameters.modes import find_modes, laplace_covariance

F64 = torch.float64


def start(n, p, spread=2.0, seed=0):
    return spread * torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rosenbrock(z):
    x, y = z.unbind(1)
    return -((1 - x).square() + 100 * (y - x.square()).square())


def two_modes(z):
    """Unequal normals at -2 and 3 in every coordinate."""
    width = 0.05
    left = -0.5 * ((z + 2) / width).square().sum(1)
    right = -0.5 * ((z - 3) / (2 * width)).square().sum(1) - 4.0
    return torch.logaddexp(left, right)


def test_a_curved_valley_is_followed_to_its_end():
    modes = find_modes(rosenbrock, start(16, 2), adam=50, bfgs=80)
    assert bool(modes.converged.all()), modes.report(("x", "y"))
    torch.testing.assert_close(modes.z, torch.ones(16, 2, dtype=F64), rtol=0, atol=1e-4)
    assert modes.distinct() == 1
    assert modes.evaluations < 400


def test_the_better_of_two_modes_comes_first_with_its_curvature():
    modes = find_modes(two_modes, start(32, 2))
    assert bool((modes.log_prob.diff() <= 0).all())
    torch.testing.assert_close(modes.z[0], torch.full((2,), -2.0, dtype=F64), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        modes.covariance, 0.05**2 * torch.eye(2, dtype=F64), rtol=1e-4, atol=1e-9
    )
    assert modes.distinct(within=10) == 2
    assert modes.distinct(within=1) == 1
    assert modes.report(("a", "b")).count("\n") == 32


def test_problems_are_solved_side_by_side():
    centre = torch.tensor([-1.0, 0.0, 2.0], dtype=F64).repeat_interleave(4)[:, None]

    def density(z):
        return -torch.log1p((z - centre).square()).sum(1) / 0.01

    modes = find_modes(density, start(12, 2), group=4)
    assert modes.z.shape == (3, 4, 2) and modes.covariance.shape == (3, 2, 2)
    torch.testing.assert_close(modes.z[:, 0], centre[::4].expand(3, 2), rtol=0, atol=1e-5)


def test_a_restart_outside_the_domain_does_not_spoil_the_others():
    density = lambda z: -((z - 1).square()).sum(1) + 0.1 * z[:, 0].log()  # noqa: E731
    z0 = start(8, 2).abs()
    z0[3] = -1.0
    modes = find_modes(density, z0)
    assert float(modes.log_prob[-1]) == -math.inf and not bool(modes.converged[-1])
    assert bool(modes.converged[:-1].all())
    x = 0.5 * (1 + math.sqrt(1 + 0.2))
    torch.testing.assert_close(modes.z[0], torch.tensor([x, 1.0], dtype=F64), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no restart of problem"):
        find_modes(density, -z0[:3])


def test_laplace_covariance_is_that_of_a_normal():
    cov = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=F64)
    precision = torch.linalg.inv(cov)
    found = laplace_covariance(lambda z: -0.5 * (z @ precision * z).sum(1), start(3, 2))
    torch.testing.assert_close(found, cov.expand(3, 2, 2), rtol=1e-6, atol=0)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="whole groups"):
        find_modes(rosenbrock, start(5, 2), group=2)
    with pytest.raises(ValueError, match="expected"):
        find_modes(rosenbrock, torch.zeros(2, dtype=F64))
