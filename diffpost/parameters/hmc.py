r"""Hamiltonian Monte Carlo for a few parameters (Duane et al. 1987; Neal 2011, arXiv:1206.1901, section 5).

With momenta p ~ N(0, I) in coordinates w, z = R w, of a covariance R R^T of the target, a move follows

    p <- p + eps/2 R^T grad log pi(z),     z <- z + eps R p,     p <- p + eps/2 R^T grad log pi(z)

for ``leapfrogs`` steps and accepts with probability min(1, exp(H_0 - H)), H = p^2/2 - log pi. One step is the
Metropolis-adjusted Langevin algorithm. What is adapted, in the warm-up alone and by all chains of a group together:
eps to an acceptance (dual averaging: Hoffman & Gelman 2014, arXiv:1111.4246, equation 6), and R R^T in windows of
doubling length, after which it is the covariance of the draws in the window. So chains of a group are not independent
in the warm-up; after it they are, given what was learned.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.parameters.chains import (
    Kernel,
    KernelState,
    LogDensity,
    MoveNoise,
    check_start,
    metropolis,
    value_and_gradient,
)

__all__ = ["HMC"]

_FIRST_STEP = 0.5
_GAMMA, _DELAY, _DECAY = 0.05, 10.0, 0.75  # of dual averaging, as published
_JITTER = 0.2  # of the step size, against orbits that close
_WEIGHT = 5.0  # draws' worth of belief that parameters are not correlated
_STREAM = 0


@final
@dataclass(frozen=True, eq=False)
class HMCState(KernelState):
    """Chains, and what they have learned.

    Attributes:
        gradient: (B, P) at z.
        root: (G, P, P) lower triangular R of each group.
        log_step, average, error, centre: (G,) of dual averaging: log eps, its average, the mean error of the
            acceptance, and where log eps is drawn to.
        tries: () moves since dual averaging began.
        count: () draws in the window.
        total, square: (G, P) and (G, P, P) sums of z and z z^T about ``origin`` (G, P) in the window.
    """

    gradient: Tensor
    root: Tensor
    log_step: Tensor
    average: Tensor
    error: Tensor
    centre: Tensor
    tries: Tensor
    count: Tensor
    total: Tensor
    square: Tensor
    origin: Tensor


@final
@dataclass(frozen=True)
class HMC(Kernel[HMCState]):
    """Hamiltonian Monte Carlo with a learned step size and mass matrix.

    Exact in the limit of many moves, for a target that is smooth. A move costs ``leapfrogs`` densities with gradients.
    A target with a method ``log_ratio(z, z')`` (:class:`ModelledData <diffpost.parameters.modelled.ModelledData>`) is tested
    by that, and its ``log_prob`` is right but for a constant of each chain.

    Args:
        draws, warmup, group: as :class:`Kernel <diffpost.parameters.chains.Kernel>`; what is learned is learned by each group.
        leapfrogs: steps of a trajectory. 1 is MALA, with a target of 0.574.
        target: the mean acceptance to which step sizes are adapted; 0.8 is usual for trajectories.
        covariance: (P, P), or (groups, P, P), to begin with; None is the identity, the scale of the prior.
        learn_covariance: False keeps that, and only the step size is adapted.

    Raises:
        ValueError: leapfrogs not positive, a target outside (0, 1), or a covariance that is not positive definite.
    """

    leapfrogs: int = 4
    target: float = 0.8
    covariance: Tensor | None = dataclasses.field(default=None, repr=False)
    learn_covariance: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.leapfrogs < 1 or not 0 < self.target < 1:
            raise ValueError(
                f"HMC(leapfrogs={self.leapfrogs}, target={self.target}): expected at least one step and a target "
                "between 0 and 1."
            )
        if self.covariance is not None and bool(
            torch.linalg.cholesky_ex(self.covariance.double())[1].any()
        ):
            raise ValueError("HMC(covariance=...): not symmetric and positive definite.")

    def init(self, log_density: LogDensity, z: Tensor) -> HMCState:
        chains, p = z.shape
        groups = chains // self.grouped(chains)
        value, gradient = value_and_gradient(log_density, z)
        check_start(z, value, gradient)
        shape = (groups, p, p)
        if self.covariance is None:
            root = torch.eye(p, dtype=z.dtype, device=z.device).expand(shape)
        else:
            root = torch.linalg.cholesky(self.covariance.to(z))
            if root.shape not in ((p, p), shape):
                raise ValueError(
                    f"HMC(covariance {tuple(self.covariance.shape)}): expected {(p, p)}, or {shape}, one a group."
                )
            root = root.expand(shape)
        zero = z.new_zeros
        step = zero(groups) + math.log(_FIRST_STEP)
        return HMCState(
            z=z,
            log_prob=value,
            done=torch.zeros((), dtype=torch.int64),
            accepted=zero(chains),
            nonfinite=torch.zeros(chains, 2, dtype=torch.int64, device=z.device),
            evaluations=torch.ones((), dtype=torch.int64),
            gradient=gradient,
            root=root.contiguous(),
            log_step=step,
            average=step,
            error=zero(groups),
            centre=step + math.log(10),
            tries=torch.zeros((), dtype=torch.int64),
            count=torch.zeros((), dtype=torch.int64),
            total=zero(groups, p),
            square=zero(shape),
            origin=z.reshape(groups, -1, p).mean(1),
        )

    def restored(self, arrays: dict[str, Tensor]) -> HMCState:
        return HMCState(**arrays)

    def step_size(self, state: HMCState) -> Tensor:
        step = (state.average if self.warmup else state.log_step).exp()
        return step.repeat_interleave(len(state.z) // len(step))

    def refreshed(self, log_density: LogDensity, state: HMCState) -> HMCState:
        """The same chains on another density, as after the other half of a Gibbs move."""
        value, gradient = value_and_gradient(log_density, state.z)
        check_start(state.z, value, gradient)
        return dataclasses.replace(
            state, log_prob=value, gradient=gradient, evaluations=state.evaluations + 1
        )

    def move(self, log_density: LogDensity, state: HMCState, noise: MoveNoise) -> HMCState:
        chains, p = state.z.shape
        warming = int(state.done) < self.warmup
        root = state.root
        log_step = state.log_step if warming or not self.warmup else state.average
        u = noise.uniform(2, _STREAM)
        step = log_step.exp().repeat_interleave(chains // len(root), 0)
        eps = (step * (1 + _JITTER * (2 * u[:, 0] - 1)))[:, None]
        root = root.repeat_interleave(chains // len(root), 0)

        momentum = first = noise.normal(p, _STREAM)
        z, value, gradient = state.z, state.log_prob, state.gradient
        alive = torch.ones(chains, dtype=torch.bool, device=z.device)
        for _ in range(self.leapfrogs):
            half = momentum + 0.5 * eps * _times(root.mT, gradient)
            ahead = z + eps * _times(root, half)
            # a trajectory that has failed waits where it is
            alive = alive & ahead.isfinite().all(1)
            z = torch.where(alive[:, None], ahead, z)
            value, gradient = value_and_gradient(log_density, z)
            alive = alive & value.isfinite() & gradient.isfinite().all(1)
            momentum = half + 0.5 * eps * _times(root.mT, gradient)
        ratio = getattr(log_density, "log_ratio", None)
        if ratio is not None:  # of a score, whose density is known by differences alone
            value = state.log_prob + ratio(state.z, z)
            alive = alive & value.isfinite()
        gain = value - state.log_prob + 0.5 * (first.square() - momentum.square()).sum(1)
        gain = torch.where(alive & gain.isfinite(), gain, -math.inf)
        accepted = metropolis(gain, u[:, 1])
        probability = gain.clamp_max(0).exp()
        row = accepted[:, None]
        lost = (~alive).to(torch.int64)
        none = torch.zeros_like(lost)
        moved = dataclasses.replace(
            state,
            z=torch.where(row, z, state.z),
            log_prob=torch.where(accepted, value, state.log_prob),
            gradient=torch.where(row, gradient, state.gradient),
            done=state.done + 1,
            accepted=state.accepted + (0 if warming else probability),
            nonfinite=state.nonfinite + torch.stack([lost, none] if warming else [none, lost], 1),
            evaluations=state.evaluations + self.leapfrogs,
        )
        return self._learned(moved, probability) if warming else moved

    # the warm-up -------------------------------------------------------------------------------

    def _learned(self, state: HMCState, probability: Tensor) -> HMCState:
        tries = state.tries + 1
        t = float(tries)
        share = 1 / (t + _DELAY)
        found = probability.reshape(len(state.root), -1).mean(1)
        error = (1 - share) * state.error + share * (self.target - found)
        log_step = state.centre - math.sqrt(t) / _GAMMA * error
        weight = t**-_DECAY
        average = weight * log_step + (1 - weight) * state.average
        state = dataclasses.replace(
            state, tries=tries, error=error, log_step=log_step, average=average
        )
        begin, ends = windows(self.warmup) if self.learn_covariance else (0, ())
        done = int(state.done)
        if done <= begin or not ends or done > ends[-1]:
            return state
        off = (state.z.reshape(len(state.root), -1, state.z.shape[1])) - state.origin[:, None]
        state = dataclasses.replace(
            state,
            count=state.count + off.shape[1],
            total=state.total + off.sum(1),
            square=state.square + off.mT @ off,
        )
        return self._relearned(state) if done in ends else state

    @staticmethod
    def _relearned(state: HMCState) -> HMCState:
        """With the covariance of the window, and dual averaging begun anew."""
        n = float(state.count)
        mean = state.total / n
        covariance = (state.square - n * mean[:, :, None] * mean[:, None]) / max(n - 1, 1)
        diagonal = torch.diag_embed(covariance.diagonal(dim1=1, dim2=2))
        root, failed = torch.linalg.cholesky_ex(
            (n * covariance + _WEIGHT * diagonal) / (n + _WEIGHT)
        )
        # chains that never moved have taught nothing
        root = torch.where((failed == 0)[:, None, None] & root.isfinite(), root, state.root)
        step = state.average
        return dataclasses.replace(
            state,
            root=root,
            log_step=step,
            average=step,
            centre=step + math.log(10),
            error=torch.zeros_like(state.error),
            tries=torch.zeros_like(state.tries),
            count=torch.zeros_like(state.count),
            total=torch.zeros_like(state.total),
            square=torch.zeros_like(state.square),
            origin=state.origin + mean,
        )


def windows(warmup: int) -> tuple[int, tuple[int, ...]]:
    """When covariances begin to be learned, and the moves after which they are renewed.

    A seventh of the warm-up finds the target, windows of doubling length learn its shape, and a fifth settles the step
    size.
    """
    begin, end = round(0.15 * warmup), warmup - round(0.2 * warmup)
    size = max(5, round(0.08 * warmup))
    ends: list[int] = []
    at = begin
    while at + size <= end:
        at = end if at + 3 * size > end else at + size
        ends.append(at)
        size *= 2
    return begin, tuple(ends)


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v[..., None])[..., 0]
