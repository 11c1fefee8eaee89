"""Markov chains that begin where another sampler ends.

A chain runs at one low noise level nu, in u = x/alpha = x_0 + nu z, on the prior p_nu there, a Gaussian blur of the
prior by nu, and the exact likelihood. Other samplers follow a guidance's approximation from noise to image; a chain
makes no approximation of p(y | x) and knows its target, but it only finds what lies near its start. So the loop runs
the start's own steps first and then the chain's, each draw at the end of a chain of its own.

Both chains here move by the same Gaussian, that of a prior N(., C) under the linear(ised) data,

    M = (C^-1 + A^T Sigma^-1 A)^-1 = C - C A^T S^-1 A C,        S = Sigma + A C A^T,

whose mean and draws both are one solve by the operator's structure: with update(q, r) = q + C A^T S^-1 (r - A q),

    M (s + A^T Sigma^-1 r) = update(C s, r),     update(C^1/2 z, Sigma^1/2 e) ~ N(0, M)   for normals z, e

(perturb and solve: Papandreou & Yuille 2010; Orieux et al. 2012, arXiv:1105.5887).
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from diffpost.instrument import Probe
from diffpost.likelihood import Likelihood
from diffpost.linalg import filtered
from diffpost.operators.base import LinearOperator
from diffpost.posterior import Posterior
from diffpost.samplers.base import CLEAN, NoiseSource, Sampler, State, run_down
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.samplers.euler_maruyama import EulerMaruyama
from diffpost.score import ScoreModel
from diffpost.sde import SDE

BEGIN = 1000
"""The first stream of the noise with which a chain begins; those below are its start's."""

TRACES = ("trace_chi2", "trace_flux")


@final
@dataclass(frozen=True)
class Starting(State):
    """The state of the start, and how many of its steps are done."""

    inner: State | None = None
    done: int = 0


@dataclass(frozen=True)
class Chain(Sampler):
    """``start``'s steps, then ``steps`` moves of a chain on a posterior.

    Args:
        steps: moves of the chain, at least 2.
        start: the sampler whose draws the chains begin at. It sees the posterior with its guidance. None begins at 0 in
            the prior's units.

    Raises:
        ValueError: fewer than 2 steps; when sampling, a model that is not a posterior, or noise that is not
            Gaussian where the chain needs that.
    """

    any_noise = False  # whether a Gaussian surrogate of the noise is enough

    start: Sampler | None = None
    # the grid is the start's
    nsr_min: None = field(default=None, init=False, repr=False)
    nsr_max: None = field(default=None, init=False, repr=False)
    rho: None = field(default=None, init=False, repr=False)

    @property
    def group(self) -> int:
        return 1 if self.start is None else self.start.group

    def prepared(self, model: ScoreModel) -> Sampler:
        if self.start is None:
            return self
        return dataclasses.replace(self, start=self.start.prepared(model))

    @abstractmethod
    def levels(self, sde: SDE) -> list[float]:
        """The noise-to-signal ratio of every move."""

    def times(self, sde: SDE) -> Tensor:
        """Times of the start's steps and of the moves, then CLEAN; float64 on the CPU."""
        moves = sde.t_of_nsr(torch.tensor(self.levels(sde), dtype=torch.float64))
        moves = moves.clamp(sde.t_min, sde.t_max)
        before = moves[:0] if self.start is None else self.start.times(sde)[:-1]
        return torch.cat([before, moves, moves.new_full((1,), CLEAN)])

    def init(self, model: ScoreModel, noise: NoiseSource, n: int) -> State:
        prior, likelihood = conditions(model, type(self).__name__, self.any_noise)
        if self.start is not None:
            inner = self.start.init(model, noise, n)
            return Starting(inner.x, inner=inner)
        dtype = torch.promote_types(model.dtype, torch.float32)
        zero = torch.zeros(n, *model.shape, dtype=dtype, device=model.device)
        return self.begin(prior, likelihood, State(zero), self.times(model.sde)[0], noise)

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        prior, likelihood = conditions(model, type(self).__name__, self.any_noise)
        if self.start is None or not isinstance(state, Starting) or state.inner is None:
            moved = self.move(prior, likelihood, state, t, noise)
            return self.end(prior, moved, t, noise) if s == CLEAN else moved
        times = self.start.times(model.sde)
        i = state.done
        inner = self.start.step(model, state.inner, times[i], times[i + 1], noise)
        if i + 2 < len(times):
            return Starting(inner.x, inner=inner, done=i + 1)
        return self.begin(prior, likelihood, inner, s, noise)

    @abstractmethod
    def begin(
        self, prior: ScoreModel, likelihood: Likelihood, clean: State, t: Tensor, noise: NoiseSource
    ) -> State:
        """The chain's first state, at the level of t, from the start's clean draw."""

    @abstractmethod
    def move(
        self, prior: ScoreModel, likelihood: Likelihood, state: State, t: Tensor, noise: NoiseSource
    ) -> State:
        """One move at the level of t."""

    @abstractmethod
    def end(self, prior: ScoreModel, state: State, t: Tensor, noise: NoiseSource) -> State:
        """The draw and what is told of it."""


def check_reverse(name: str, reverse: Sampler) -> None:
    """Raises ValueError unless the sampler follows the reverse SDE, down from any level."""
    conditional = isinstance(reverse, EulerMaruyama) or (
        isinstance(reverse, DPMSolver) and reverse.eta == 1
    )
    if not conditional or reverse.nsr_max is not None:
        raise ValueError(
            f"{name}(reverse={reverse}): expected DPMSolver(eta=1) or EulerMaruyama without nsr_max. They follow the "
            "reverse SDE, which draws a clean image given a noisy one; an ODE or a corrector does not."
        )


def reversed_from(
    prior: ScoreModel, u: Tensor, nu: float, reverse: Sampler, noise: NoiseSource, stream: int = 0
) -> Tensor:
    """A draw of p(x_0 | x_0 + nu n = u), by the reverse SDE from u and the level nu: (B, *shape)."""
    down = dataclasses.replace(reverse, nsr_max=nu)
    state = State(float(prior.sde.alpha(down.times(prior.sde)[0])) * u)
    return run_down(down, prior, state, lambda i: functools.partial(noise, stream=stream + i))


def traced(
    extras: Mapping[str, Tensor], prior: ScoreModel, likelihood: Likelihood, u: Tensor
) -> dict[str, Tensor]:
    """The extras with chi^2 and the flux of u, in physical units, at the end of their traces (B, moves)."""
    flux = prior.to_physical(u).flatten(1).sum(1, dtype=torch.float64)
    told = dict(extras)
    for name, value in zip(TRACES, (likelihood.chi2(u), flux), strict=True):
        told[name] = torch.cat(
            [*([told[name]] if name in told else []), value.double()[:, None]], 1
        )
    return told


def conditions(
    model: ScoreModel, name: str, any_noise: bool = False
) -> tuple[ScoreModel, Likelihood]:
    """The prior of a posterior and its data, both in the prior's units.

    Raises:
        ValueError: not a posterior, or noise that is not Gaussian, unless any will do.
    """
    if isinstance(model, Probe):
        prior, likelihood = conditions(model.inner, name, any_noise)
        return Probe(prior), likelihood
    if not isinstance(model, Posterior):
        raise ValueError(
            f"{name} got {model!r}; expected a Posterior, whose prior and exact likelihood it uses. Sample a "
            "model without data by another sampler."
        )
    if not any_noise and not model.data.noise.is_gaussian:
        raise ValueError(
            f"{name} got the noise {model.data.noise!r}; expected Gaussian noise, whose covariance its moves "
            "use. MALA and Langevin take any noise."
        )
    return model.prior, model.data


@final
@dataclass(frozen=True)
class Gaussian:
    """N(., M) with M = (C^-1 + A^T Sigma^-1 A)^-1.

    Attributes:
        likelihood: of Gaussian noise, for Sigma.
        linear: A, (B, *shape) to (B, *data).
        power: C: s for s I, () or (B,), or its eigenvalues under the FFT2 of the last two axes, broadcastable to
            (B, *shape).
    """

    likelihood: Likelihood
    linear: LinearOperator
    power: Tensor

    def apply(self, v: Tensor) -> Tensor:
        """C v."""
        return self._filter(v, self.power)

    def update(self, q: Tensor, r: Tensor) -> Tensor:
        """q + C A^T (Sigma + A C A^T)^-1 (r - A q): (B, *shape) and (B, *data) to (B, *shape).

        Where the structure of A gives no direct solve it iterates to a relative residual of 1e-5 in float32 and
        1e-9 in float64.
        """
        tol = 1e-9 if q.dtype == torch.float64 else 1e-5
        r = r - self.linear(q)
        if self._white:
            report = self.likelihood.solve_operator(self.linear, r, self.power, tol=tol)
        else:
            report = self.likelihood.solve_spectral(self.linear, r, self.power, tol=tol)
        return q + self.apply(self.linear.adjoint(report.x))

    def draws(
        self, like: Tensor, r: Tensor, noise: NoiseSource, stream: int
    ) -> tuple[Tensor, Tensor]:
        """C^1/2 z and Sigma^1/2 e, shaped as ``like`` (B, *shape) and r (B, *data): normals z of the stream and
        e of the next.
        """
        z = self._filter(noise(like, stream=stream), self.power.sqrt())
        return z, self.likelihood.noise.color(noise(r, stream=stream + 1))

    def embed(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(C^-1/2 v, Sigma^-1/2 A v), whose inner products are those of M^-1."""
        white = self._filter(v, self.power.rsqrt())
        return white, self.likelihood.noise.whiten(self.linear(v))

    @property
    def _white(self) -> bool:
        return self.power.ndim < 2

    def _filter(self, v: Tensor, factor: Tensor) -> Tensor:
        if self._white:
            return factor.to(v).reshape(-1, *[1] * (v.ndim - 1)) * v
        return filtered(v, factor)
