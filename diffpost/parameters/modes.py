r"""Modes of a log density by restarts: Adam, then BFGS, all restarts in one batch.

Adam (Kingma & Ba 2015, arXiv:1412.6980) crosses rough country from a poor start, with a step that falls as a cosine;
BFGS (Nocedal & Wright 2006, equation 6.17) with a backtracking line search (their algorithm 3.1) then converges
quadratically. With a few parameters the whole inverse Hessian is kept, one for every restart. Restarts whose density is
not finite stay where they were; those that have converged wait.

The modes are those of the density in the unconstrained coordinates z, in which the prior is a standard normal: always
inside the bounds, and where chains want to start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.parameters.chains import LogDensity, value_and_gradient
from diffpost.sample import progress_bar

__all__ = ["Modes", "find_modes", "laplace_covariance"]

_BETAS, _TINY = (0.9, 0.99), 1e-12
_HALVINGS = 12
_SUFFICIENT = 1e-4  # of the increase that the slope promises
_NEAR = 0.1  # in standard deviations of the prior: modes that are one


@final
@dataclass(frozen=True)
class Modes:
    """What every restart found, best first.

    Attributes:
        z: (R, P), or (G, R, P) for G problems: unconstrained coordinates.
        log_prob: (R,), or (G, R): log density there; -inf for restarts that never met a finite one.
        gradient: likewise, the largest component of the gradient.
        converged: likewise, whether that, or the last step of BFGS, fell below the tolerance.
        covariance: (P, P), or (G, P, P): of the normal with the curvature at the best mode (Laplace).
        evaluations: of the density with its gradient, a restart.
    """

    z: Tensor
    log_prob: Tensor
    gradient: Tensor
    converged: Tensor
    covariance: Tensor
    evaluations: int

    def distinct(self, within: float = 1.0) -> int:
        """How many different modes stand within this of the best log density, most over problems."""
        z, value = self.z, self.log_prob
        if value.ndim == 1:
            z, value = z[None], value[None]
        near = value >= value[:, :1] - within
        apart = (z[:, :, None] - z[:, None]).abs().amax(-1) > _NEAR
        earlier = torch.ones_like(apart[0]).tril(-1)
        first = (apart | ~earlier).all(2)  # no earlier one is the same
        return int((first & near).sum(1).max())

    def report(self, names: tuple[str, ...] = ()) -> str:
        """A line a restart, of the first problem."""
        z, value = (v if self.log_prob.ndim == 1 else v[0] for v in (self.z, self.log_prob))
        gradient, good = (
            v if self.log_prob.ndim == 1 else v[0] for v in (self.gradient, self.converged)
        )
        head = " ".join(f"{name:>10}" for name in names)
        lines = [f"{'log density':>12} {'gradient':>9}      {head}".rstrip()]
        for i in range(len(z)):
            row = " ".join(f"{v:10.4g}" for v in z[i].tolist())
            state = "ok  " if bool(good[i]) else "open"
            lines.append(f"{float(value[i]):12.2f} {float(gradient[i]):9.1e} {state} {row}")
        return "\n".join(lines)


def find_modes(
    log_density: LogDensity,
    start: Tensor,
    *,
    group: int | None = None,
    adam: int = 100,
    bfgs: int = 60,
    rate: float = 0.1,
    tol: float = 1e-4,
    progress: bool = True,
) -> Modes:
    """Climbs from every start, and sorts what it found.

    Args:
        log_density: (B, P) to (B,), differentiable.
        start: (B, P) unconstrained coordinates, such as draws of the prior.
        group: consecutive restarts of one problem; None is all of them.
        adam: steps of Adam, 0 for none.
        bfgs: most steps of BFGS.
        rate: of Adam's first steps, in z.
        tol: a restart has converged where no component of the gradient is larger, in units of 1/z, or where a step
            changes neither z nor the density.
        progress: a bar.

    Raises:
        ValueError: a start that is not (B, P), restarts that are not whole groups, or no restart of a group that meets
            a finite density.
    """
    if start.ndim != 2:
        raise ValueError(f"find_modes: got a start {tuple(start.shape)}; expected (B, P).")
    size = len(start) if group is None else group
    if size < 1 or len(start) % size:
        raise ValueError(
            f"find_modes(group={group}): got {len(start)} starts; expected whole groups."
        )
    with progress_bar(adam + bfgs, progress) as advance:
        climb = _Climb(log_density, start.detach().double())
        climb.adam(adam, rate, advance)
        climb.bfgs(bfgs, tol, advance)
    shape = (len(start) // size, size)
    value, order = climb.value.reshape(shape).sort(1, descending=True)
    if not bool(value[:, 0].isfinite().all()):
        bad = (~value[:, 0].isfinite()).nonzero()[:, 0].tolist()
        raise ValueError(
            f"find_modes: no restart of problem {bad[:8]} met a finite log density; start inside the prior's bounds, or "
            "take more restarts."
        )
    rows = (order + size * torch.arange(shape[0], device=order.device)[:, None]).flatten()
    z = climb.z[rows]
    covariance = laplace_covariance(log_density, climb.z[rows[::size].repeat_interleave(size)])
    slope = climb.gradient.abs().amax(1).nan_to_num(nan=torch.inf)[rows].reshape(shape)
    one = group is None
    return Modes(
        z=_rows(z.reshape(*shape, -1), one),
        log_prob=_rows(value, one),
        gradient=_rows(slope, one),
        converged=_rows(climb.done[rows].reshape(shape), one),
        covariance=_rows(covariance[::size], one),
        evaluations=climb.evaluations + 2 * start.shape[1],
    )


def _rows(values: Tensor, one: bool) -> Tensor:
    return values[0] if one else values


def laplace_covariance(log_density: LogDensity, z: Tensor, step: float = 1e-4) -> Tensor:
    """Inverse of the negative Hessian at z (B, P), (B, P, P), by central differences of the gradient.

    Where the density curves upwards or hardly at all, as far from a mode, curvatures below that of the prior, 1, are
    taken for it.
    """
    columns = []
    for i in range(z.shape[1]):
        off = torch.zeros_like(z)
        off[:, i] = step
        ahead = value_and_gradient(log_density, z + off)[1]
        behind = value_and_gradient(log_density, z - off)[1]
        columns.append((ahead - behind) / (2 * step))
    hessian = -torch.stack(columns, 2)
    hessian = torch.where(
        hessian.isfinite().all((1, 2), keepdim=True), hessian, torch.eye(z.shape[1]).to(z)
    )
    values, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
    return (vectors / values.clamp_min(1.0)[:, None]) @ vectors.mT


@final
class _Climb:
    """All restarts on their way: z (B, P), value (B,), gradient (B, P), and which are done."""

    def __init__(self, log_density: LogDensity, z: Tensor) -> None:
        self._density = log_density
        self.z = z
        self.evaluations = 0
        self.value, self.gradient = self._at(z)
        self.done = torch.zeros_like(self.value, dtype=torch.bool)

    def _at(self, z: Tensor) -> tuple[Tensor, Tensor]:
        self.evaluations += 1
        value, gradient = value_and_gradient(self._density, z)
        good = value.isfinite() & gradient.isfinite().all(1)
        return torch.where(good, value, -torch.inf), gradient

    def adam(self, steps: int, rate: float, advance: Callable[[], None]) -> None:
        """Keeps the best point that each restart passed."""
        z, value, gradient = self.z, self.value, self.gradient
        first, second = torch.zeros_like(z), torch.zeros_like(z)
        for i in range(steps):
            g = torch.where(value.isfinite()[:, None], gradient, 0.0)
            first = _BETAS[0] * first + (1 - _BETAS[0]) * g
            second = _BETAS[1] * second + (1 - _BETAS[1]) * g.square()
            mean = first / (1 - _BETAS[0] ** (i + 1))
            size = (second / (1 - _BETAS[1] ** (i + 1))).sqrt() + _TINY
            fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / steps)).item())
            z = z + rate * fall * mean / size
            value, gradient = self._at(z)
            # out of the domain: back to the best point, and on from there
            lost = ~value.isfinite()[:, None]
            z = torch.where(lost, self.z, z)
            first = torch.where(lost, 0.0, first)
            self._keep(value >= self.value, z, value, gradient)
            gradient = torch.where(lost, self.gradient, gradient)
            value = torch.where(lost[:, 0], self.value, value)
            advance()

    def _keep(self, better: Tensor, z: Tensor, value: Tensor, gradient: Tensor) -> None:
        self.z = torch.where(better[:, None], z, self.z)
        self.value = torch.where(better, value, self.value)
        self.gradient = torch.where(better[:, None], gradient, self.gradient)

    def bfgs(self, steps: int, tol: float, advance: Callable[[], None]) -> None:
        eye = torch.eye(self.z.shape[1]).to(self.z).expand(*self.z.shape, -1)
        scale = self.gradient.norm(dim=1).clamp_min(1.0)[:, None, None]
        inverse = eye / scale  # the first step is at most 1 in z
        fresh = torch.ones_like(self.done)
        self.done = (self.gradient.abs().amax(1) <= tol) | ~self.value.isfinite()
        for _ in range(steps):
            if bool(self.done.all()):
                break
            z, value, gradient = self.z, self.value, self.gradient
            direction = (inverse @ gradient[..., None])[..., 0]
            slope = (direction * gradient).sum(1)
            length = self._search(direction, slope)
            s, y = self.z - z, gradient - self.gradient
            curved = (s * y).sum(1)
            update = ~self.done & (curved > 1e-10 * s.norm(dim=1) * y.norm(dim=1)) & (length > 0)
            # Nocedal & Wright (6.20): the scale of the curvature before the first update
            first = (curved / y.square().sum(1).clamp_min(1e-300))[:, None, None] * eye
            inverse = torch.where((update & fresh)[:, None, None], first, inverse)
            fresh = fresh & ~update
            rho = (1 / torch.where(update, curved, 1.0))[:, None, None]
            left = eye - rho * s[:, :, None] * y[:, None]
            renewed = left @ inverse @ left.mT + rho * s[:, :, None] * s[:, None]
            inverse = torch.where(update[:, None, None], renewed, inverse)
            small = self.gradient.abs().amax(1) <= tol
            idle = (self.value - value <= 1e-12 * self.value.abs()) & ~fresh
            # a stalled search begins once more along the gradient
            again = (length == 0) & ~fresh & ~small
            size = self.gradient.norm(dim=1).clamp_min(1.0)[:, None, None]
            inverse = torch.where(again[:, None, None], eye / size, inverse)
            self.done = self.done | small | (idle & (length > 0)) | ((length == 0) & fresh)
            fresh = fresh | again
            advance()
        self.done = self.done & self.value.isfinite()

    def _search(self, direction: Tensor, slope: Tensor) -> Tensor:
        """Halves the step of each restart until the density rises enough; the lengths, 0 where it never did."""
        z, value = self.z, self.value
        length = torch.ones_like(value)
        found = self.done.clone()
        taken = torch.zeros_like(value)
        for _ in range(_HALVINGS):
            trial = torch.where(found[:, None], self.z, z + length[:, None] * direction)
            ahead, gradient = self._at(trial)
            good = ~found & (ahead >= value + _SUFFICIENT * length * slope)
            self._keep(good, trial, ahead, gradient)
            taken = torch.where(good, length, taken)
            found = found | good
            if bool(found.all()):
                break
            length = torch.where(found, length, 0.5 * length)
        return taken
