"""Split Gibbs sampling: the data and the prior take turns.

With the prior on z and the data on u, held together by a coupling rho (Vono, Dobigeon & Chainais 2019,
arXiv:1804.05809),

    pi(u, z) = p(y | u) N(u; z, rho^2) p_0(z),

both conditionals can be drawn exactly. For linear A and Gaussian noise, u given z is Gaussian, one solve with
Sigma + rho^2 A A^T (:mod:`diffpost.samplers.chain`),

    u = z + rho n + rho^2 A^T (Sigma + rho^2 A A^T)^-1 (y - A (z + rho n) + e),       n ~ N(0, I),  e ~ N(0, Sigma),

and z given u is p(x_0 | x_0 + rho n = u): what the reverse diffusion draws when it starts at u and at the level rho
(Coeurdoux, Dobigeon & Chainais 2024, arXiv:2304.11134; Xu & Chi 2024, arXiv:2403.17042; Wu et al. 2024,
arXiv:2405.18782). That needs the true reverse process, tau = 1: an ODE gives the right marginal of z, not its
conditional. Averaged over u, the draws z are those of

    pi(z) = p_0(z) N(y; A z, Sigma + rho^2 A A^T):

the exact posterior of data with that little more noise, and exact as rho goes to 0. A move goes about rho in what
the data leave open, so rho falls from large to small first, and then stays.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.operators.base import LinearOperator
from diffpost.samplers.base import NoiseSource, Sampler, State
from diffpost.samplers.chain import (
    BEGIN,
    TRACES,
    Chain,
    Gaussian,
    check_reverse,
    reversed_from,
    traced,
)
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.score import ScoreModel
from diffpost.sde import SDE


@final
@dataclass(frozen=True)
class Turns(State):
    """A chain at z, which is x.

    Attributes:
        done: moves made.
    """

    done: int = 0


@final
@dataclass(frozen=True)
class SplitGibbs(Chain):
    """Exact turns of data and prior (Vono et al. 2019, arXiv:1804.05809; Wu et al. 2024, arXiv:2405.18782, PnP-DM).

    Needs no guidance. Every draw is the end of a chain of its own; it is a clean draw z of the reverse diffusion, and
    pi(z) = p_0(z) N(y; A z, Sigma + coupling^2 A A^T) is exact in the limit of many moves and of many levels of
    ``reverse``. Choose a coupling so small that the added variance is little beside the noise's, and no smaller: with
    ``coupling`` the moves shrink, and where it falls faster than they follow, the spread of larger couplings stays
    (a 16-pixel Gaussian, 3 to 0.05: 11% too much variance in 40 moves, 4% in 80). Chains pass between modes while the coupling is large, as in annealing, and keep to one
    when it is small, so the weights of modes are approximate.

    ``Samples.extras``, over the moves at the last coupling: ``trace_chi2`` and ``trace_flux`` (n, moves), chi^2 and the
    sum of the image in physical units along the chain, for ``diagnostics.convergence`` (R-hat and effective sample sizes).

    Args:
        steps: moves, each with as many denoiser evaluations as ``reverse`` has steps.
        coupling: the last rho, a noise-to-signal ratio in the prior's units.
        first: the first rho; None is the process's largest, or with a start, ``coupling``.
        anneal: share of the moves in which rho falls, in equal ratios.
        reverse: draws z given u: ``DPMSolver(eta=1)`` or ``EulerMaruyama``, which follow the reverse SDE. Its errors stay:
            from 0.1 to 0.002 the variance of z given u is off by at most 10%, 4% and 2% with 8, 12 and 16 levels
            of order 2 (closed form, prior variances of 0.001 to 10), by 37%, 16% and 8% at order 3.
        start: a sampler whose draws the chains begin at; None begins at 0, at a rho that forgets it.

    Raises:
        ValueError: as :class:`Chain <diffpost.samplers.chain.Chain>`; a coupling that is not positive, above ``first`` or outside the process,
            anneal outside [0, 1), or another reverse; when sampling, an operator that is not linear.
    """

    coupling: float = field(kw_only=True)
    first: float | None = None
    anneal: float = 0.5
    reverse: Sampler = field(default_factory=lambda: DPMSolver(16, order=2, eta=1.0))
    start: Sampler | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first = self.coupling if self.first is None else self.first
        if not 0 < self.coupling <= first < math.inf or not 0 <= self.anneal < 1:
            raise ValueError(
                f"SplitGibbs(coupling={self.coupling}, first={self.first}, anneal={self.anneal}): expected 0 < coupling "
                "<= first and 0 <= anneal < 1."
            )
        check_reverse("SplitGibbs", self.reverse)

    @property
    def falling(self) -> int:
        """Moves at a coupling above the last."""
        return round(self.anneal * self.steps)

    def levels(self, sde: SDE) -> list[float]:
        lowest, highest = sde.nsr_range
        lowest = lowest if self.reverse.nsr_min is None else self.reverse.nsr_min
        if not lowest < self.coupling <= highest or (self.first or highest) > highest * (1 + 1e-9):
            raise ValueError(
                f"SplitGibbs(coupling={self.coupling}, first={self.first}): expected noise-to-signal ratios above "
                f"{lowest:g}, where the reverse diffusion ends, and up to {highest:g}, the largest of {sde}."
            )
        first = self.first or (highest if self.start is None else self.coupling)
        fraction = self.coupling / first
        return [
            first * fraction ** min(1.0, i / max(self.falling, 1))
            if self.falling
            else self.coupling
            for i in range(self.steps)
        ]

    def begin(
        self, prior: ScoreModel, likelihood: Likelihood, clean: State, t: Tensor, noise: NoiseSource
    ) -> State:
        if not isinstance(likelihood.operator, LinearOperator):
            raise ValueError(
                f"SplitGibbs got {likelihood.operator!r}; expected a linear operator, for which u given z is Gaussian. "
                "Take MALA."
            )
        extras = {name: v for name, v in clean.extras.items() if name not in TRACES}
        return Turns(clean.x, log_weights=clean.log_weights, extras=extras)

    def move(
        self, prior: ScoreModel, likelihood: Likelihood, state: State, t: Tensor, noise: NoiseSource
    ) -> State:
        if not isinstance(state, Turns):
            raise ValueError(
                f"got a {type(state).__name__}; expected a state that the chain itself made: begin at init."
            )
        z = state.x
        rho = float(prior.sde.nsr(t))
        linear = likelihood.operator.linearize(z)
        gaussian = Gaussian(likelihood, linear, torch.tensor(rho**2, dtype=torch.float64))
        residual = likelihood.residual(z)
        n, e = gaussian.draws(z, residual, noise, BEGIN)
        u = z + gaussian.update(n, residual + e)

        z = reversed_from(prior, u, rho, self.reverse, noise)
        kept = state.done - self.falling
        extras = traced(state.extras, prior, likelihood, z) if kept >= 0 else state.extras
        return dataclasses.replace(state, x=z, done=state.done + 1, extras=extras)

    def end(self, prior: ScoreModel, state: State, t: Tensor, noise: NoiseSource) -> State:
        return State(state.x, log_weights=state.log_weights, extras=state.extras)
