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

Nothing need be added where the data's own noise has room for the coupling, rho^2 A A^T <= Sigma (exact data augmentation:
Marnissi, Chouzenoux, Benazza-Benyahia & Pesquet 2018, Entropy 20, 110). Then y = A u + e with e ~ N(0, Sigma - rho^2 A A^T)
has the noise Sigma about A z, the draws z are those of the posterior itself at a finite rho, and no solve is left:

    u = z + rho^2 A^T Sigma^-1 (y - A z) + rho (I - B^T B)^1/2 n,       B = rho Sigma^-1/2 A,

a gradient step on the likelihood, with the root as a polynomial in B^T B (:func:`diffpost.linalg.deflated`).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.gain import largest_gain
from diffpost.likelihood import Likelihood
from diffpost.linalg import deflated
from diffpost.operators.base import LinearOperator
from diffpost.samplers.base import NoiseSource, Sampler, State
from diffpost.samplers.chain import (
    BEGIN,
    TRACES,
    Chain,
    Gaussian,
    check_reverse,
    conditions,
    reversed_from,
    traced,
)
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.score import ScoreModel
from diffpost.sde import SDE

_SHARE = 0.9  # of the noise, at most, that is the coupling's
_ITERATIONS = 60  # so that the eigenvalue is right well within what _SHARE leaves


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

    Needs no guidance. Every draw is the end of a chain of its own; it is a clean draw z of the reverse diffusion, and its
    target is exact in the limit of many moves and of many levels of ``reverse``: the posterior, with the default coupling, which
    is as large as the noise has room for. Where a few data are much better than the others that is small, and moves with it:
    a number for ``coupling`` may be larger, and the target then is p_0(z) N(y; A z, Sigma + coupling^2 A A^T). Where
    the coupling falls faster than the moves follow, the spread of larger ones stays (a 16-pixel Gaussian, 3 to 0.05: 11% too
    much variance in 40 moves, 4% in 80). Chains pass between modes while the coupling is large, as in annealing, and keep to one
    when it is small, so the weights of modes are approximate.

    ``Samples.extras``, over the moves at the last coupling: ``trace_chi2`` and ``trace_flux`` (n, moves), chi^2 and the
    sum of the image in physical units along the chain, for ``diagnostics.convergence`` (R-hat and effective sample sizes).

    Args:
        steps: moves, each with as many denoiser evaluations as ``reverse`` has steps.
        coupling: the last rho, a noise-to-signal ratio in the prior's units. None takes what leaves the posterior as
            it is, rho^2 = 0.9/lambda with lambda the largest eigenvalue of A^T Sigma^-1 A (over all observations).
        first: the first rho; None is the process's largest, or with a start, ``coupling``.
        anneal: share of the moves in which rho falls, in equal ratios.
        reverse: draws z given u: ``DPMSolver(eta=1)`` or ``EulerMaruyama``, which follow the reverse SDE. Its errors stay:
            from 0.1 to 0.002 the variance of z given u is off by at most 10%, 4% and 2% with 8, 12 and 16 levels
            of order 2 (closed form, prior variances of 0.001 to 10), by 37%, 16% and 8% at order 3.
        start: a sampler whose draws the chains begin at; None begins at 0, at a rho that forgets it.
        room: the last rho where ``coupling`` is None; ``sample`` finds it.

    Raises:
        ValueError: as :class:`Chain <diffpost.samplers.chain.Chain>`; a coupling that is not positive, above ``first`` or outside the process,
            anneal outside [0, 1), or another reverse; when sampling, an operator that is not linear.
    """

    coupling: float | None = field(default=None, kw_only=True)
    first: float | None = None
    anneal: float = 0.5
    reverse: Sampler = field(default_factory=lambda: DPMSolver(16, order=2, eta=1.0))
    start: Sampler | None = None
    room: float | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.coupling if self.coupling is not None else self.first or 1.0
        first = last if self.first is None else self.first
        if not 0 < last <= first < math.inf or not 0 <= self.anneal < 1:
            raise ValueError(
                f"SplitGibbs(coupling={self.coupling}, first={self.first}, anneal={self.anneal}): expected 0 < coupling "
                "<= first and 0 <= anneal < 1."
            )
        check_reverse("SplitGibbs", self.reverse)

    @property
    def falling(self) -> int:
        """Moves at a coupling above the last."""
        return round(self.anneal * self.steps)

    @property
    def last(self) -> float:
        """The last coupling."""
        last = self.room if self.coupling is None else self.coupling
        if last is None:
            raise ValueError(
                "SplitGibbs(coupling=None): the coupling follows from the data; expected the sampler that prepared(model) returns."
            )
        return last

    def prepared(self, model: ScoreModel) -> Sampler:
        if self.coupling is not None:
            return super().prepared(model)
        start = None if self.start is None else self.start.prepared(model)
        prior, likelihood = conditions(model, "SplitGibbs")
        highest = prior.sde.nsr_range[1] if self.first is None else self.first
        rho = min(math.sqrt(_SHARE / _sharpest(prior, likelihood)), highest)
        return dataclasses.replace(self, start=start, room=rho)

    def levels(self, sde: SDE) -> list[float]:
        lowest, highest = sde.nsr_range
        lowest = lowest if self.reverse.nsr_min is None else self.reverse.nsr_min
        last = self.last
        if not lowest < last <= highest or (self.first or highest) > highest * (1 + 1e-9):
            raise ValueError(
                f"SplitGibbs(coupling={last:.4g}, first={self.first}): expected noise-to-signal ratios above "
                f"{lowest:g}, where the reverse diffusion ends, and up to {highest:g}, the largest of {sde}."
            )
        first = self.first or (highest if self.start is None else last)
        fraction = last / first
        return [
            first * fraction ** min(1.0, i / max(self.falling, 1)) if self.falling else last
            for i in range(self.steps)
        ]

    def begin(
        self, prior: ScoreModel, likelihood: Likelihood, clean: State, t: Tensor, noise: NoiseSource
    ) -> State:
        _check_linear(likelihood)
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
        residual = likelihood.residual(z)
        if self.coupling is None and rho <= self.last * (1 + 1e-6):
            pull = linear.adjoint(likelihood.noise.precision(residual))

            def gram(v: Tensor) -> Tensor:
                return rho**2 * linear.adjoint(likelihood.noise.precision(linear(v)))

            u = z + rho**2 * pull + rho * deflated(gram, noise(z, stream=BEGIN), _SHARE)
        else:
            gaussian = Gaussian(likelihood, linear, torch.tensor(rho**2, dtype=torch.float64))
            n, e = gaussian.draws(z, residual, noise, BEGIN)
            u = z + gaussian.update(n, residual + e)

        z = reversed_from(prior, u, rho, self.reverse, noise)
        kept = state.done - self.falling
        extras = traced(state.extras, prior, likelihood, z) if kept >= 0 else state.extras
        return dataclasses.replace(state, x=z, done=state.done + 1, extras=extras)

    def end(self, prior: ScoreModel, state: State, t: Tensor, noise: NoiseSource) -> State:
        return State(state.x, log_weights=state.log_weights, extras=state.extras)


def _check_linear(likelihood: Likelihood) -> None:
    if not isinstance(likelihood.operator, LinearOperator):
        raise ValueError(
            f"SplitGibbs got {likelihood.operator!r}; expected a linear operator, for which u given z is Gaussian. "
            "Take MALA."
        )


def _sharpest(prior: ScoreModel, likelihood: Likelihood) -> float:
    """The largest eigenvalue of A^T Sigma^-1 A over all rows, within some per cent."""
    _check_linear(likelihood)
    blank = torch.zeros(likelihood.rows or 1, *prior.shape, dtype=prior.dtype, device=prior.device)
    largest = largest_gain(likelihood, blank, _ITERATIONS)
    if not 0 < largest < math.inf:
        raise ValueError(
            f"SplitGibbs: the largest eigenvalue of A^T Sigma^-1 A is {largest}; expected a positive one. Are all data masked?"
        )
    return largest
