"""Conjugate gradients and GMRES against dense solves, and what they say when they fail."""

import warnings

import pytest
import torch

from diffpost.linalg import ConvergenceWarning, cg, deflated, gmres

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def systems(batch=4, n=30, seed=0, condition=1e3):
    """Symmetric positive matrices with eigenvalues from 1 to condition."""
    q = torch.linalg.qr(rand(batch, n, n, seed=seed))[0]
    values = torch.logspace(0, torch.tensor(condition).log10(), n, dtype=F64)
    return q @ torch.diag(values) @ q.mT


def product(a):
    return lambda v: (a @ v.reshape(len(v), -1, 1)).reshape(v.shape)


@pytest.mark.parametrize("solver", [cg, gmres])
@pytest.mark.parametrize("shape", [(30,), (2, 3, 5)])
def test_against_dense(solver, shape):
    a, b = systems(), rand(4, *shape, seed=1)
    report = solver(product(a), b, tol=1e-12, max_iter=300)
    want = torch.linalg.solve(a, b.reshape(4, -1)).reshape(b.shape)
    torch.testing.assert_close(report.x, want, rtol=1e-8, atol=1e-9)
    assert report.converged.all() and report.residual.shape == (4,)
    true = (product(a)(report.x) - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    assert (true < 1e-10).all()


@pytest.mark.parametrize("solver", [cg, gmres])
def test_residual_is_that_of_the_solution(solver):
    """Stopped early, the reported residual is the true one."""
    a, b = systems(), rand(4, 30, seed=1)
    with pytest.warns(ConvergenceWarning, match="4 of 4 systems.*after 8 iterations.*residual"):
        report = solver(product(a), b, tol=1e-10, max_iter=8)
    true = (product(a)(report.x) - b).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(report.residual, true, rtol=1e-8, atol=1e-12)
    assert report.iterations == 8 and not report.converged.any()


def test_gmres_minimises_the_residual():
    """After k products, no vector of the Krylov space is better."""
    a, b = systems(batch=1, n=12), rand(1, 12, seed=1)
    with pytest.warns(ConvergenceWarning):
        report = gmres(product(a), b, tol=1e-14, max_iter=4)
    basis = [b[0]]
    for _ in range(3):
        basis.append(a[0] @ basis[-1])
    k = a[0] @ torch.stack([v / v.norm() for v in basis], 1)
    best = (b[0] - k @ torch.linalg.lstsq(k, b[0, :, None]).solution[:, 0]).norm() / b[0].norm()
    torch.testing.assert_close(report.residual[0], best, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [cg, gmres])
def test_entries_do_not_see_each_other(solver):
    """An entry stops on its own, and its solution is the one it gets alone."""
    a = systems()
    a[1] = torch.eye(30, dtype=F64)  # done after one product
    b = rand(4, 30, seed=1)
    b[2] *= 1e-12
    report = solver(product(a), b, tol=1e-8)
    for entry in range(4):
        part = slice(entry, entry + 1)
        alone = solver(product(a[part]), b[part], tol=1e-8)
        torch.testing.assert_close(
            report.x[part], alone.x, rtol=1e-6, atol=1e-7 * float(alone.x.norm())
        )
        torch.testing.assert_close(report.residual[part], alone.residual, rtol=1e-4, atol=1e-8)


def test_nonsymmetric_needs_gmres():
    """A rotation plus a little: GMRES solves it; conjugate gradients do not, and say so."""
    n = 20
    skew = rand(3, n, n, seed=2)
    a = 0.3 * torch.eye(n, dtype=F64) + (skew - skew.mT)
    b = rand(3, n, seed=1)
    report = gmres(product(a), b, tol=1e-10, restart=25)
    torch.testing.assert_close(report.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-8)
    with pytest.warns(ConvergenceWarning):
        assert not cg(product(a), b, tol=1e-10, max_iter=100).converged.all()


def test_gmres_restarts():
    a, b = systems(condition=20.0), rand(4, 30, seed=1)
    report = gmres(product(a), b, tol=1e-9, restart=5, max_iter=400)
    torch.testing.assert_close(report.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-8)
    assert report.iterations > 5


@pytest.mark.parametrize("solver", [cg, gmres])
def test_preconditioner(solver):
    """The inverse as preconditioner needs one product; a diagonal one fewer than none."""
    a = systems() + torch.diag(torch.logspace(0, 5, 30, dtype=F64))
    b = rand(4, 30, seed=1)
    plain = solver(product(a), b, tol=1e-8, max_iter=500)
    d = a.diagonal(dim1=1, dim2=2)
    scaled = solver(product(a), b, tol=1e-8, max_iter=500, precond=lambda v: v / d)
    exact = solver(product(a), b, tol=1e-8, precond=product(torch.linalg.inv(a)))
    assert exact.iterations <= 2 < scaled.iterations < plain.iterations
    for report in (plain, scaled, exact):
        torch.testing.assert_close(report.x, torch.linalg.solve(a, b), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", [cg, gmres])
def test_start(solver):
    a, b = systems(), rand(4, 30, seed=1)
    want = torch.linalg.solve(a, b)
    assert solver(product(a), b, tol=1e-6, x0=want).iterations == 0
    near = solver(product(a), b, tol=1e-6, x0=want + 1e-5 * rand(4, 30, seed=3))
    assert near.iterations < solver(product(a), b, tol=1e-6).iterations
    torch.testing.assert_close(near.x, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", [cg, gmres])
def test_zero_right_hand_side(solver):
    b = rand(3, 30, seed=1)
    b[1] = 0
    a = systems(3)
    for x0 in (None, rand(3, 30, seed=5)):
        report = solver(product(a), b, tol=1e-8, x0=x0)
        assert report.converged.all() and (report.x[1] == 0).all() and report.x.isfinite().all()
    assert solver(product(a), torch.zeros(3, 30, dtype=F64), tol=1e-8).iterations == 0


def test_negative_curvature_is_reported():
    """An indefinite entry stops with a finite iterate and is named; its neighbours are solved."""
    a = systems()
    a[2] = torch.diag(torch.tensor([1.0] * 15 + [-1.0] * 15, dtype=F64)) * 2
    a[2] += 0.1 * torch.diag(torch.arange(30, dtype=F64))
    b = rand(4, 30, seed=1)
    with pytest.warns(ConvergenceWarning, match="1 of 4 .*1 met a direction of zero or negative"):
        report = cg(product(a), b, tol=1e-8)
    assert report.indefinite.tolist() == [False, False, True, False]
    assert report.converged.tolist() == [True, True, False, True]
    assert report.x.isfinite().all()
    true = (product(a)(report.x) - b).norm(dim=1) / b.norm(dim=1)
    torch.testing.assert_close(report.residual[2], true[2])
    with pytest.warns(ConvergenceWarning):  # the null matrix: curvature zero at once
        nothing = cg(torch.zeros_like, b, tol=1e-8)
    assert (nothing.x == 0).all() and nothing.indefinite.all() and (nothing.residual > 0.99).all()


@pytest.mark.parametrize("solver", [cg, gmres])
def test_a_nan_is_never_silent(solver):
    """It stays in its entry, and the solution is NaN, so that whoever uses it sees it too."""
    a, b = systems(), rand(4, 30, seed=1)
    bad = b.clone()
    bad[1, 3] = float("nan")
    with pytest.warns(ConvergenceWarning, match="not finite"):
        report = solver(product(a), bad, tol=1e-8)
    assert report.x[1].isnan().all() and not report.converged[1] and report.residual[1].isnan()
    with pytest.warns(ConvergenceWarning, match="not finite"):
        assert solver(product(a), bad, tol=1e-8, x0=b).x[1].isnan().all()
    good = solver(product(a), b, tol=1e-8)
    torch.testing.assert_close(report.x[[0, 2, 3]], good.x[[0, 2, 3]], rtol=1e-9, atol=1e-12)

    a[2, 0, 0] = float("inf")
    with pytest.warns(ConvergenceWarning, match="not finite"):
        report = solver(product(a), b, tol=1e-8)
    assert report.x[2].isnan().all() and report.converged.tolist() == [True, True, False, True]


def test_converged_solves_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cg(product(systems()), rand(4, 30), tol=1e-6)
        gmres(product(systems()), rand(4, 30), tol=1e-6)


@pytest.mark.parametrize("solver", [cg, gmres])
def test_float32_and_small_units(solver):
    """Fluxes of 1e-22, whose squares are not float32 numbers."""
    a, b = systems(condition=50.0).float(), rand(4, 30, dtype=torch.float32) * 1e-22
    report = solver(product(a), b, tol=1e-5)
    assert report.x.dtype == torch.float32 and report.converged.all()
    want = torch.linalg.solve(a.double(), b.double())
    assert (report.x - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"tol": 0.0}, "tol > 0"),
        ({"tol": 1e-3, "max_iter": 0}, "max_iter >= 1"),
        ({"tol": 1e-3, "x0": torch.zeros(4, 29)}, "x0 has shape"),
    ],
)
@pytest.mark.parametrize("solver", [cg, gmres])
def test_bad_arguments(solver, kwargs, match):
    with pytest.raises(ValueError, match=match):
        solver(product(systems()), rand(4, 30), **kwargs)
    with pytest.raises(ValueError, match=r"\(B, ...\)"):
        solver(product(systems()), rand(30), tol=1e-3)
    with pytest.raises(ValueError, match="restart"):
        gmres(product(systems()), rand(4, 30), tol=1e-3, restart=0)


def test_a_slow_solve_is_not_asked_for_more_than_a_window(monkeypatch):
    """Eigenvalues over six decades: the window that stops it is of ten steps, not a share of all."""
    values = torch.logspace(-6, 0, 800, dtype=torch.float64)
    b = values.sqrt()[None]

    def steps():
        return cg(lambda v: values * v, b, tol=1e-12, max_iter=2000, energy=0.02).iterations

    found = steps()
    monkeypatch.setattr("diffpost.linalg._LEAST", 10)
    assert 60 < found <= steps()
    monkeypatch.setattr("diffpost.linalg._MOST", 10**6)
    assert steps() > 1.05 * found


def test_energy_norm_stops_each_entry_on_its_own():
    """The error in the energy norm is within the share asked, and what an entry gets is its own affair."""
    a, b = systems(condition=1e5), rand(4, 30, seed=1)
    a[1] = a[1] / 50 + torch.eye(30, dtype=F64)  # an easier one
    exact = torch.linalg.solve(a, b[..., None])[..., 0]

    def energy(v):
        return (v * product(a)(v)).sum(1).sqrt()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = cg(product(a), b, tol=1e-12, max_iter=400, energy=0.1)
    assert report.converged.all() and (energy(report.x - exact) < 0.1 * energy(exact)).all()
    assert report.iterations < cg(product(a), b, tol=1e-12, max_iter=400).iterations
    alone = cg(lambda v: (a[1] @ v[..., None])[..., 0], b[1:2], tol=1e-12, energy=0.1)
    # Rounding grows with the iterations.
    torch.testing.assert_close(alone.x[0], report.x[1], rtol=0.01, atol=1e-3)
    assert alone.iterations < report.iterations
    with pytest.raises(ValueError, match="share between 0 and 1"):
        cg(product(a), b, energy=0.0)


@pytest.mark.parametrize("largest", [0.3, 0.9, 0.99])
def test_the_root_of_what_is_left(largest):
    basis, _ = torch.linalg.qr(rand(24, 24, seed=1))
    values = largest * torch.linspace(0, 1, 24, dtype=torch.float64)
    z = rand(5, 24, seed=2)

    def gram(v):
        return (v @ basis * values) @ basis.T

    root = (z @ basis * (1 - values).sqrt()) @ basis.T
    assert (deflated(gram, z, largest) - root).norm() < 1e-5 * z.norm()
    assert (deflated(gram, z, largest, tol=1e-2) - root).norm() > 1e-5 * z.norm()
    with pytest.raises(ValueError, match="between 0 and 1"):
        deflated(gram, z, 1.0)
