r"""The affine-invariant ensemble of Goodman & Weare (2010, CAMCoS 5, 65), for densities without gradients.

A walker z_k moves along the line to another one z_j of the other half of its ensemble,

    z' = z_j + s (z_k - z_j),     g(s) ~ s^-1/2 on [1/a, a],

accepted with probability min(1, s^(P-1) pi(z')/pi(z_k)) (their equation 7; in halves as in Foreman-Mackey et al. 2013,
arXiv:1202.3665, section 3). It adapts to any linear map of the target by itself. Moves shrink with P: beyond about ten
parameters take :class:`HMC <diffpost.parameters.hmc.HMC>`.
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
    check_values,
    metropolis,
)

__all__ = ["Stretch"]

_STREAM = 0


@final
@dataclass(frozen=True, eq=False)
class StretchState(KernelState):
    """The walkers."""


@final
@dataclass(frozen=True)
class Stretch(Kernel[StretchState]):
    """Goodman & Weare's stretch move: each group is an ensemble of its own.

    A group must have an even number of walkers, at least 2 (P + 1), which start apart from each other: draws of the
    prior, or a mode with scatter. The density sees half of the walkers of all groups at a time, (B/2, P), so it must be
    the same for all groups. The walkers of an ensemble are not independent chains; R-hat needs several ensembles to
    tell what one ensemble missed.

    Args:
        draws, warmup, group: as :class:`Kernel <diffpost.parameters.chains.Kernel>`; nothing is adapted, the warm-up is only dropped.
        scale: a.

    Raises:
        ValueError: a scale not above 1; when run, groups that are too small or odd, or that span no volume.
    """

    scale: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.scale < math.inf:
            raise ValueError(f"Stretch(scale={self.scale}): expected a number above 1.")

    def init(self, log_density: LogDensity, z: Tensor) -> StretchState:
        chains, p = z.shape
        walkers = self.grouped(chains)
        if walkers % 2 or walkers < 2 * (p + 1):
            raise ValueError(
                f"Stretch: got {walkers} walkers in a group for {p} parameters; expected an even number of at least "
                f"{2 * (p + 1)}."
            )
        value = log_density(z)
        check_values(value, z)
        check_start(z, value)
        off = z.reshape(-1, walkers, p)
        off = off - off.mean(1, keepdim=True)
        if int(torch.linalg.matrix_rank(off).min()) < p:
            raise ValueError(
                "Stretch: walkers of a group start in a plane, which they would never leave; scatter them."
            )
        return StretchState(
            z=z,
            log_prob=value.to(z),
            done=torch.zeros((), dtype=torch.int64),
            accepted=z.new_zeros(chains),
            nonfinite=torch.zeros(chains, 2, dtype=torch.int64, device=z.device),
            evaluations=torch.ones((), dtype=torch.int64),
        )

    def restored(self, arrays: dict[str, Tensor]) -> StretchState:
        return StretchState(**arrays)

    def move(self, log_density: LogDensity, state: StretchState, noise: MoveNoise) -> StretchState:
        chains, p = state.z.shape
        walkers = self.grouped(chains)
        place = torch.arange(chains, device=state.z.device)
        first = place % walkers < walkers // 2
        z, value = state.z.clone(), state.log_prob.clone()
        probability = torch.zeros_like(value)
        lost = torch.zeros(chains, dtype=torch.int64, device=z.device)
        numbers = noise.uniform(6, _STREAM)
        for half, mine in enumerate((place[first], place[~first])):
            # the partner: uniform among the other half of the same ensemble
            u = numbers[mine, 3 * half : 3 * half + 3]
            chosen = (u[:, 0] * (walkers // 2)).long()
            other = mine - mine % walkers + chosen + (walkers // 2 if half == 0 else 0)
            s = ((self.scale - 1) * u[:, 1] + 1).square() / self.scale
            proposed = z[other] + s[:, None] * (z[mine] - z[other])
            found = log_density(proposed)
            check_values(found, proposed)
            gain = (p - 1) * s.log() + found.to(z) - value[mine]
            gain = torch.where(found.isfinite(), gain, -math.inf)
            accepted = metropolis(gain, u[:, 2])
            z[mine] = torch.where(accepted[:, None], proposed, z[mine])
            value[mine] = torch.where(accepted, found.to(z), value[mine])
            probability[mine] = gain.clamp_max(0).exp()
            lost[mine] = (~found.isfinite()).to(torch.int64)
        warming = int(state.done) < self.warmup
        none = torch.zeros_like(lost)
        return dataclasses.replace(
            state,
            z=z,
            log_prob=value,
            done=state.done + 1,
            accepted=state.accepted + (0 if warming else probability),
            nonfinite=state.nonfinite + torch.stack([lost, none] if warming else [none, lost], 1),
            evaluations=state.evaluations + 1,
        )
