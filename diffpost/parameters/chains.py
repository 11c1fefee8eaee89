"""Markov chains on a few parameters: the loop, and what it returns.

A target is a function log_density(z), (B, P) to (B,), of unconstrained coordinates; entry b belongs to chain b, so that
one batch holds all chains, also those of many problems, each ``group`` of consecutive chains a problem of its own. A
kernel makes one move of all chains. Every random number is a function of (seed, chain, move), so chains may be
interrupted, or computed in parts of whole groups, and do not change.

A proposal whose density is not finite is rejected, as one of density 0 is, and counted.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.diagnostics.chains import Convergence, convergence
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.random import normal, uniform
from diffpost.sample import progress_bar

__all__ = ["Chains", "Kernel", "KernelState", "LogDensity", "run_chains", "value_and_gradient"]

LogDensity = Callable[[Tensor], Tensor]
"""z (B, P) to log density (B,), each entry on its own; differentiable for kernels that use gradients."""

_STREAM = 24_100  # the first of those of kernels, away from those of image samplers


@final
@dataclass(frozen=True, eq=False)
class MoveNoise:
    """The random numbers of one move: functions of (seed, ids[b], step) and a stream."""

    seed: int
    ids: Tensor
    step: int

    def normal(self, size: int, stream: int) -> Tensor:
        """(B, size) float64."""
        stream += _STREAM
        return normal(self.seed, self.ids, self.step, (size,), torch.float64, stream=stream)

    def uniform(self, size: int, stream: int) -> Tensor:
        """(B, size) float64 in [0, 1)."""
        stream += _STREAM
        return uniform(self.seed, self.ids, self.step, (size,), torch.float64, stream=stream)


@dataclass(frozen=True, eq=False)
class KernelState:
    """What a kernel carries from move to move; tensors only.

    Attributes:
        z: (B, P) float64.
        log_prob: (B,) float64.
        done: () moves made.
        accepted: (B,) sum of the acceptance probabilities of the moves after the warm-up.
        nonfinite: (B, 2) proposals of no finite density, in the warm-up and after it.
        evaluations: () of the density, a chain.
    """

    z: Tensor
    log_prob: Tensor
    done: Tensor
    accepted: Tensor
    nonfinite: Tensor
    evaluations: Tensor

    def arrays(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


S = TypeVar("S", bound=KernelState)


@dataclass(frozen=True)
class Kernel(ABC, Generic[S]):
    """One move of all chains, and how many there are.

    Args:
        draws: moves that are kept, after the warm-up.
        warmup: moves that adapt the kernel and are dropped.
        group: consecutive chains that share a target and what is learned of it; None is all of them.

    Raises:
        ValueError: numbers that are not positive integers (0 is allowed for warmup).
    """

    draws: int
    warmup: int
    group: int | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name, least in (("draws", 1), ("warmup", 0), ("group", 1)):
            value = getattr(self, name)
            if name == "group" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{type(self).__name__}({name}={value!r}): expected an integer of at least {least}."
                )

    @abstractmethod
    def init(self, log_density: LogDensity, z: Tensor) -> S:
        """The state of chains at z (B, P).

        Raises:
            ValueError: a start whose density or gradient is not finite.
        """

    @abstractmethod
    def move(self, log_density: LogDensity, state: S, noise: MoveNoise) -> S:
        """The state after one move."""

    @abstractmethod
    def restored(self, arrays: dict[str, Tensor]) -> S:
        """A state of its arrays."""

    def describe(self) -> dict[str, Any]:
        """What determines the moves, as JSON values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in fields.items()}
        return {"kind": type(self).__name__} | plain

    def step_size(self, state: S) -> Tensor | None:
        """(B,) what the moves after the warm-up use, or None."""
        return None

    def grouped(self, chains: int) -> int:
        """Chains of a group.

        Raises:
            ValueError: not whole groups.
        """
        group = chains if self.group is None else self.group
        if chains % group:
            raise ValueError(
                f"{type(self).__name__}(group={group}): got {chains} chains; expected whole groups."
            )
        return group


@final
@dataclass(frozen=True)
class Chains:
    """Draws of all chains.

    Attributes:
        z: (B, draws, P) unconstrained coordinates, float64.
        log_prob: (B, draws) their log density.
        acceptance: (B,) mean acceptance probability after the warm-up.
        nonfinite: (B,) proposals of no finite density after the warm-up; each was rejected.
        warmup_nonfinite: (B,) those during it.
        step_size: (B,) of kernels that have one.
        evaluations: of the density, a chain.
        group: chains of a problem.
    """

    z: Tensor
    log_prob: Tensor
    acceptance: Tensor
    nonfinite: Tensor
    warmup_nonfinite: Tensor
    step_size: Tensor | None
    evaluations: int
    group: int

    def convergence(self, z: Tensor | None = None) -> Convergence:
        """R-hat and effective sample sizes of every parameter: (P,), or (groups, P) for several groups.

        Args:
            z: (B, draws, P) other values of the same draws, such as theta.

        Raises:
            ImportError: ArviZ is not installed.
            ValueError: fewer than 2 chains in a group, or 4 draws.
        """
        values = self.z if z is None else z
        chains, draws, p = values.shape
        if self.group == chains:
            return convergence(values)
        return convergence(values.reshape(-1, self.group, draws, p).permute(1, 2, 0, 3))

    @property
    def covariance(self) -> Tensor:
        """Of z over the chains and draws of each group: (P, P), or (groups, P, P)."""
        chains, _, p = self.z.shape
        pooled = self.z.reshape(chains // self.group, -1, p)
        centred = pooled - pooled.mean(1, keepdim=True)
        covariance = centred.mT @ centred / max(centred.shape[1] - 1, 1)
        return covariance[0] if self.group == chains else covariance


def value_and_gradient(log_density: LogDensity, z: Tensor) -> tuple[Tensor, Tensor]:
    """log density (B,) and its gradient (B, P) at z.

    Raises:
        ValueError: not (B,), or not differentiable.
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = log_density(leaf)
        check_values(value, z)
        if not value.requires_grad:
            raise ValueError(
                "the log density does not depend on the parameters in a way that autograd sees; take Stretch, which "
                "needs no gradient, or compute it by torch operations."
            )
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().to(z), gradient


def check_values(value: Tensor, z: Tensor) -> None:
    if value.shape != z.shape[:1]:
        raise ValueError(
            f"the log density gave {tuple(value.shape)} for z {tuple(z.shape)}; expected ({len(z)},)."
        )


def check_start(z: Tensor, *values: Tensor) -> None:
    """Raises a ValueError unless all values at the start are finite, chain by chain."""
    good = torch.stack([v.reshape(len(z), -1).isfinite().all(1) for v in (z, *values)]).all(0)
    if not bool(good.all()):
        bad = (~good).nonzero()[:, 0].tolist()
        listed = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
        raise ValueError(
            f"chains {listed} start where the log density or its gradient is not finite; start inside the prior's "
            "bounds, at draws of the prior or at the modes that find_modes returns."
        )


def metropolis(log_ratio: Tensor, u: Tensor) -> Tensor:
    """Whether a proposal of this log acceptance ratio is accepted, for u uniform; NaN never is."""
    return u.log() < log_ratio


def run_chains(
    log_density: LogDensity,
    kernel: Kernel[Any],
    start: Tensor,
    seed: int = 0,
    *,
    ids: Tensor | None = None,
    checkpoint: str | Path | None = None,
    every: int = 50,
    progress: bool = True,
) -> Chains:
    """Runs chains of a kernel.

    Args:
        log_density: of the target.
        kernel: :class:`HMC <diffpost.parameters.hmc.HMC>` or :class:`Stretch <diffpost.parameters.stretch.Stretch>`.
        start: (B, P) unconstrained coordinates, one row a chain.
        seed: of the moves; chain b depends on (seed, ids[b]) and on its group.
        ids: (B,) numbers of the chains; None is 0, 1, ...
        checkpoint: a folder, to which the state is written every ``every`` moves and from which the same call goes on.
        every: moves.
        progress: a bar, on a terminal or in a notebook.

    Raises:
        ValueError: a start that is not (B, P) or of no finite density; chains that are not whole groups; a checkpoint
            folder of another run.
    """
    if start.ndim != 2 or not start.is_floating_point():
        raise ValueError(f"run_chains: got a start {tuple(start.shape)}; expected (B, P).")
    if every < 1:
        raise ValueError(f"run_chains(every={every}): expected a positive integer.")
    chains, p = start.shape
    group = kernel.grouped(chains)
    ids = torch.arange(chains) if ids is None else ids
    if ids.shape != (chains,):
        raise ValueError(f"run_chains: ids {tuple(ids.shape)}; expected ({chains},).")
    state = kernel.init(log_density, start.detach().double())
    z = start.new_empty((kernel.draws, chains, p), dtype=torch.float64)
    log_prob = start.new_empty((kernel.draws, chains), dtype=torch.float64)
    folder = None
    if checkpoint is not None:
        info = {
            "diffpost": __version__,
            "kernel": kernel.describe(),
            "seed": seed,
            "ids": ids.tolist(),
            "start": start.tolist(),
        }
        folder = Checkpoint(checkpoint, info, state.log_prob.tolist())
        saved = folder.load("chains")
        if saved is not None:
            past, past_log_prob = saved.pop("draws"), saved.pop("draws_log_prob")
            z[: len(past)], log_prob[: len(past)] = past, past_log_prob
            state = kernel.restored({k: v.to(start.device) for k, v in saved.items()})
    total = kernel.warmup + kernel.draws
    first = int(state.done)
    with progress_bar(total - first, progress) as advance:
        for i in range(first, total):
            state = kernel.move(log_density, state, MoveNoise(seed, ids.to(start.device), i))
            kept = i + 1 - kernel.warmup
            if kept > 0:
                z[kept - 1], log_prob[kept - 1] = state.z, state.log_prob
            if folder is not None and ((i + 1) % every == 0 or i + 1 == total):
                drawn = {"draws": z[: max(kept, 0)], "draws_log_prob": log_prob[: max(kept, 0)]}
                folder.save("chains", state.arrays() | drawn)
            advance()
    return Chains(
        z=z.transpose(0, 1).contiguous(),
        log_prob=log_prob.T.contiguous(),
        acceptance=state.accepted / kernel.draws,
        nonfinite=state.nonfinite[:, 1],
        warmup_nonfinite=state.nonfinite[:, 0],
        step_size=kernel.step_size(state),
        evaluations=int(state.evaluations),
        group=group,
    )
