"""Batched iterative solvers that say how they ended.

Each entry b of a batch is its own system A_b x_b = b_b: it has its own step sizes, stops when its
own residual is small, and is frozen from then on, so that its result does not depend on its
neighbours. Scalars are accumulated in float64.

``cg``, conjugate gradients (Hestenes & Stiefel 1952; preconditioned as in Saad 2003, alg. 9.1),
wants A symmetric and positive; along a direction p with p^T A p <= 0 it stops and says so.
``gmres`` (Saad & Schultz 1986; restarted, preconditioned from the right) takes any A. A solve that
ends above its tolerance warns with :class:`ConvergenceWarning`; one that met a value that is not
finite returns NaN for that entry, and warns too.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

__all__ = [
    "ConvergenceWarning",
    "MatVec",
    "SolveReport",
    "Solver",
    "cg",
    "deflated",
    "filtered",
    "gmres",
]

MatVec = Callable[[Tensor], Tensor]

# The progress of the last fifth of the steps, of 4 to 10, stands for the error left before them.
_LEAST, _MOST, _SHARE = 4, 10, 5


@final
class ConvergenceWarning(UserWarning):
    """An iterative solve ended above its tolerance."""


@final
@dataclass(frozen=True)
class SolveReport:
    """A solution and how it was reached.

    Attributes:
        x: (B, ...) the solution.
        iterations: products with the matrix for the slowest entry; 0 for a direct solve.
        residual: (B,) |b - A x| / |b| in the iteration's own norm (0 for a direct solve). It is
            carried along by the recurrence, as in every conjugate gradient code; rounding can leave
            the true one above it.
        converged: (B,) residual, or energy norm, within the tolerance.
        indefinite: (B,) stopped by a direction of zero or negative curvature; None if that was not
            watched.
    """

    x: Tensor
    iterations: int
    residual: Tensor
    converged: Tensor
    indefinite: Tensor | None = None

    def with_x(self, x: Tensor) -> SolveReport:
        """The same report of a transformed solution."""
        return SolveReport(x, self.iterations, self.residual, self.converged, self.indefinite)


def filtered(v: Tensor, power: Tensor) -> Tensor:
    """F^-1 power F v, F the FFT2 of the last two axes; power even in k, broadcastable to v."""
    half = power[..., : v.shape[-1] // 2 + 1] if power.shape[-1] > 1 else power
    return torch.fft.irfft2(torch.fft.rfft2(v) * half, s=v.shape[-2:])


def deflated(gram: MatVec, z: Tensor, largest: float, tol: float = 1e-5) -> Tensor:
    """(I - G)^1/2 z for a symmetric G of eigenvalues between 0 and ``largest`` < 1.

    The root is expanded in Chebyshev polynomials of G on that interval, whose coefficients fall like q^k,
    1/q = s + (s^2 - 1)^1/2 with s = 2/largest - 1 (Trefethen 2013, theorem 8.2); 11 products at 0.9 and the default.

    Args:
        gram: G, (B, ...) to (B, ...).
        z: (B, ...).
        largest: upper end of the eigenvalues. A little above is harmless as long as it stays below 1.
        tol: at which the sum of the coefficients that are left out stops to matter.

    Raises:
        ValueError: largest outside (0, 1).
    """
    if not 0 < largest < 1:
        raise ValueError(f"deflated: got largest = {largest}; expected it between 0 and 1.")
    coefficients = _root_coefficients(largest, tol)
    before, now = z, 2 / largest * gram(z) - z
    total = coefficients[0] / 2 * before + coefficients[1] * now
    for c in coefficients[2:]:
        before, now = now, 2 * (2 / largest * gram(now) - now) - before
        total = total + c * now
    return total


@functools.lru_cache(maxsize=16)
def _root_coefficients(largest: float, tol: float) -> tuple[float, ...]:
    """Chebyshev coefficients of (1 - g)^1/2 on [0, largest], at least 2, the first to be halved."""
    nodes = 128
    angles = math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    values = (1 - largest * (1 + angles.cos()) / 2).sqrt()
    orders = torch.arange(nodes, dtype=torch.float64)[:, None]
    coefficients = (2 / nodes * (orders * angles).cos() @ values).tolist()
    left = 0.0
    count = nodes
    while count > 2 and left + abs(coefficients[count - 1]) < tol:
        count -= 1
        left += abs(coefficients[count])
    return tuple(coefficients[:count])


def direct(x: Tensor) -> SolveReport:
    """The report of a direct solve."""
    zero = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    return SolveReport(x, 0, zero, zero == 0)


class Solver(Protocol):
    """An iterative solver such as :func:`cg` or :func:`gmres`."""

    def __call__(
        self,
        matvec: MatVec,
        b: Tensor,
        *,
        tol: float,
        max_iter: int,
        precond: MatVec | None,
    ) -> SolveReport: ...


def cg(
    matvec: MatVec,
    b: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 200,
    precond: MatVec | None = None,
    x0: Tensor | None = None,
    energy: float | None = None,
) -> SolveReport:
    """Conjugate gradients on A x = b, entry by entry of a batch.

    Args:
        matvec: A, (B, ...) to (B, ...), symmetric and positive definite on each entry.
        b: (B, ...) right-hand sides.
        tol: an entry is done when |b - A x| <= tol |b|.
        max_iter: most products with A (one more with x0).
        precond: an approximate inverse of A, symmetric and positive definite; None is the identity.
        x0: (B, ...) where to start; None is 0.
        energy: an entry is done as well when its error in the energy norm, (e^T A e)^1/2, is about this
            share of what it was at the start. Every step lowers its square by a known amount (Hestenes &
            Stiefel 1952, theorem 6:1), and the last fifth's sum, of four to ten steps, is taken for what was left before them
            (Strakos & Tichy 2002, ETNA 13, 56): a lower bound, which a slow tail exceeds. For the gain
            (I + B B^T)^-1 r of a Gaussian update B^T (I + B B^T)^-1 r, this norm bounds the update's error
            in standard deviations of what is updated, summed over its modes.

    Returns:
        A report. Where b is 0, x is 0. An entry stopped by negative curvature keeps its last
        iterate.

    Raises:
        ValueError: tol or max_iter out of range, or shapes that differ.
    """
    _check("cg", b, tol, max_iter, x0)
    if energy is not None and not 0 < energy < 1:
        raise ValueError(f"cg: got energy={energy}; expected a share between 0 and 1.")
    size = _norm(b)
    # in units of |b|, in which squares of fluxes like 1e-25 are still float32 numbers
    scale = torch.where(size > 0, size, 1.0)
    b = b / _wide(scale, b)
    x = torch.zeros_like(b)
    r = b
    if x0 is not None:
        x = torch.where(_wide(size != 0, b), x0 / _wide(scale, b), 0.0)
        r = torch.where(_wide(size != 0, b), b - matvec(x), 0.0)
    residual = _norm(r)
    active = residual > tol
    broken = ~residual.isfinite()
    indefinite = torch.zeros_like(active)
    active = active & ~broken
    z = r if precond is None else precond(r)
    p = z.clone()
    rz = _dot(r, z)
    iterations = 0
    settled = torch.zeros_like(active)
    # By what the steps so far have lowered the squared energy norm of the error.
    lowered = [torch.zeros_like(rz)]
    while iterations < max_iter and bool(active.any()):
        ap = matvec(p)
        iterations += 1
        curvature = _dot(p, ap)
        bad = active & ~(curvature.isfinite() & rz.isfinite())
        flat = active & ~bad & ((curvature <= 0) | (rz <= 0))
        broken, indefinite = broken | bad, indefinite | flat
        active = active & ~bad & ~flat
        step = torch.where(active, rz / torch.where(active, curvature, 1.0), 0.0)
        # where, not a product: a frozen entry's direction may hold an inf
        x = torch.where(_wide(active, b), x + _wide(step, b) * p, x)
        r = torch.where(_wide(active, b), r - _wide(step, b) * ap, r)
        residual = torch.where(active, _norm(r), residual)
        if energy is not None:
            lowered.append(lowered[-1] + step * rz)
            behind = min(max(_LEAST, iterations // _SHARE), _MOST)
            if iterations >= behind:
                left = lowered[-1] - lowered[-1 - behind]
                settled = settled | (active & (left <= energy**2 * lowered[-1]))
        active = active & (residual > tol) & ~settled
        if not bool(active.any()):
            break
        z = r if precond is None else precond(r)
        new = _dot(r, z)
        beta = torch.where(active, new / torch.where(active, rz, 1.0), 0.0)
        p = torch.where(_wide(active, b), z + _wide(beta, b) * p, 0.0)
        rz = torch.where(active, new, rz)
    return _report(
        "cg", x * _wide(scale, x), iterations, residual, tol, broken, indefinite, settled
    )


def gmres(
    matvec: MatVec,
    b: Tensor,
    *,
    tol: float = 1e-6,
    max_iter: int = 200,
    restart: int = 30,
    precond: MatVec | None = None,
    x0: Tensor | None = None,
) -> SolveReport:
    """GMRES on A x = b for any invertible A, entry by entry of a batch.

    Args:
        matvec: A, (B, ...) to (B, ...), linear on each entry.
        b: (B, ...) right-hand sides.
        tol: an entry is done when |b - A x| <= tol |b|.
        max_iter: most products with A in the Krylov bases; each restart makes one more.
        restart: size of the Krylov basis, kept in memory.
        precond: an approximate inverse of A, applied from the right; None is the identity.
        x0: (B, ...) where to start; None is 0.

    Raises:
        ValueError: tol, max_iter or restart out of range, or shapes that differ.
    """
    _check("gmres", b, tol, max_iter, x0)
    if restart < 1:
        raise ValueError(f"gmres: got restart={restart}; expected at least 1.")
    inverse: MatVec = precond or (lambda v: v)
    size = _norm(b)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    x = torch.zeros_like(b) if x0 is None else torch.where(_wide(size != 0, b), x0, 0.0)
    r = b if x0 is None else b - matvec(x)
    r = torch.where(_wide(size != 0, b), r, 0.0)
    residual = _norm(r) / scale
    broken = ~residual.isfinite()
    iterations = 0
    while iterations < max_iter and bool(((residual > tol) & ~broken).any()):
        cycle = min(restart, max_iter - iterations)
        update, used = _krylov(matvec, inverse, r, scale, tol, cycle, (residual > tol) & ~broken)
        iterations += used
        moved = x + update
        r_new = b - matvec(moved)
        new = _norm(r_new) / scale
        live = (residual > tol) & ~broken
        broken = broken | (live & ~new.isfinite())
        better = live & new.isfinite() & (new < residual)
        stalled = bool((live & ~better).all() if live.any() else True)
        x = torch.where(_wide(better, b), moved, x)
        r = torch.where(_wide(better, b), r_new, r)
        residual = torch.where(better, new, residual)
        if stalled:  # a further cycle would be the same one
            break
    return _report("gmres", x, iterations, residual, tol, broken, torch.zeros_like(broken))


def _krylov(
    matvec: MatVec,
    inverse: MatVec,
    r: Tensor,
    scale: Tensor,
    tol: float,
    cycle: int,
    active: Tensor,
) -> tuple[Tensor, int]:
    """One cycle of GMRES: the update that minimises |r - A M^-1 V y|, and the products used."""
    batch = len(r)
    flat = r.reshape(batch, -1)
    beta = _norm(r)
    basis = [_divide(flat, torch.where(active, beta, 0.0))]
    hessenberg = torch.zeros(batch, cycle + 1, cycle, dtype=torch.float64, device=r.device)
    right = torch.zeros(batch, cycle + 1, dtype=torch.float64, device=r.device)
    right[:, 0] = torch.where(active, beta, 0.0)
    y = torch.zeros(batch, cycle, dtype=torch.float64, device=r.device)
    used = 0
    for j in range(cycle):
        w = matvec(inverse(basis[j].reshape(r.shape))).reshape(batch, -1)
        used += 1
        stacked = torch.stack(basis, 1)
        for _ in range(2):  # classical Gram-Schmidt, twice is enough
            h = torch.einsum("bkn,bn->bk", stacked, w)
            w = w - torch.einsum("bk,bkn->bn", h, stacked)
            hessenberg[:, : j + 1, j] += h.double()
        norm = w.double().norm(dim=1)
        hessenberg[:, j + 1, j] = norm
        basis.append(_divide(w, norm))
        part = hessenberg[:, : j + 2, : j + 1].nan_to_num(0.0, 0.0, 0.0)
        # pinv: entries that are done have a Krylov space of lower dimension
        solution = (torch.linalg.pinv(part, rtol=1e-14) @ right[:, : j + 2, None])[..., 0]
        left = (right[:, : j + 2] - (part @ solution[..., None])[..., 0]).norm(dim=1)
        y[:, : j + 1] = torch.where(active[:, None], solution, y[:, : j + 1])
        active = active & (left > 0.5 * tol * scale) & norm.isfinite()
        if not bool(active.any()):
            break
    stacked = torch.stack(basis[:used], 1)
    update = torch.einsum("bk,bkn->bn", y[:, :used].to(r.dtype), stacked)
    return inverse(update.reshape(r.shape)), used


def _divide(v: Tensor, norm: Tensor) -> Tensor:
    """v / norm, zero where the norm is."""
    inverse = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, 1.0), 0.0)
    return v * inverse[:, None].to(v.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) inner products, summed in float64."""
    return (a * b).flatten(1).sum(1, dtype=torch.float64)


def _norm(a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a.flatten(1), dim=1, dtype=torch.float64)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to multiply or select entries of like (B, ...)."""
    wide = values.reshape(-1, *[1] * (like.ndim - 1))
    return wide if wide.dtype == torch.bool else wide.to(like.dtype)


def _check(name: str, b: Tensor, tol: float, max_iter: int, x0: Tensor | None) -> None:
    if not tol > 0 or max_iter < 1:
        raise ValueError(
            f"{name}: got tol={tol}, max_iter={max_iter}; expected tol > 0 and max_iter >= 1."
        )
    if b.ndim < 2:
        raise ValueError(
            f"{name}: got b of shape {tuple(b.shape)}; expected (B, ...), one system an entry."
        )
    if x0 is not None and x0.shape != b.shape:
        raise ValueError(
            f"{name}: x0 has shape {tuple(x0.shape)} and b {tuple(b.shape)}; expected the same."
        )


def _report(
    name: str,
    x: Tensor,
    iterations: int,
    residual: Tensor,
    tol: float,
    broken: Tensor,
    indefinite: Tensor,
    settled: Tensor | bool = False,
) -> SolveReport:
    if bool(broken.any()):
        x = torch.where(_wide(broken, x), float("nan"), x)
        residual = torch.where(broken, float("nan"), residual)
    converged = (residual <= tol) | settled
    if not bool(converged.all()):
        missed = int((~converged).sum())
        reasons = []
        if bool(broken.any()):
            reasons.append(f"{int(broken.sum())} met values that are not finite and are NaN")
        if bool(indefinite.any()):
            reasons.append(
                f"{int(indefinite.sum())} met a direction of zero or negative curvature (the matrix is not "
                "positive definite) and kept the iterate before it"
            )
        worst = residual[~converged & ~broken]
        if worst.numel():
            reasons.append(f"largest relative residual {float(worst.max()):.2g}")
        warnings.warn(
            f"{name}: {missed} of {len(x)} systems above the tolerance {tol:g} after {iterations} iterations: "
            f"{'; '.join(reasons)}.",
            ConvergenceWarning,
            stacklevel=3,
        )
    return SolveReport(x, iterations, residual, converged, indefinite)
