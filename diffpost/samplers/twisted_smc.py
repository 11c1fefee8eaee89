r"""Twisted sequential Monte Carlo: particles that are guided, and weighted so that the guidance cannot bias them.

The prior's own reverse process, discretised as u_s = F(u_t, z) with z ~ N(0, I), ends in draws of the prior, and
draws weighted by p(y | x_0) are draws of the posterior. Nearly all weights would vanish. So z is drawn from a
q(z | u_t, y) that knows the data, and the particles carry a twist, an estimate p^(y | u_t) of the evidence (Wu et
al. 2023, arXiv:2306.17775). From level to level the weight is multiplied by

    N(z; 0, I)/q(z | u_t, y)  p^(y | u_s)/p^(y | u_t),

and at the clean image the exact likelihood takes the place of the last twist. Whatever q and the twist are, the
weighted particles converge to p(y | x_0) times the law of the sampler's draws of the prior; good ones make few
particles enough. Here the twist is the moment-matched evidence

    p^(y | u_t) = N(y; A D, S_t),      S_t = Sigma + A C_t A^T,      C_t = sigma^2/alpha J,

and q what it implies for a Gaussian p(x_0 | u_t). There D is a martingale that the noise g z moves by
C_s g z/nu_s^2, with C_s = (C_t^-1 + 1/nu_s^2 - 1/nu_t^2)^-1 what is left of C_t, so that y - A D ~ N(H z, S_s),
H = A C_s g/nu_s^2, and q is the Kalman update of N(0, I) by it. Then the weights stay equal where the prior is
Gaussian, up to the discretisation. As q lives in z, F is free: it is the stochastic multistep scheme of
:mod:`diffpost.samplers.dpm_solver`, of second order at one denoiser call a step.

C_t is met through the data alone, by the m products J^T A^T W^T e_j, where W^T W = Sigma^-1 makes the noise white.
C_s A^T is C_t A^T (G + kappa M)^-1 G with M = A C_t A^T, G = A A^T and kappa = 1/nu_s^2 - 1/nu_t^2, exact where C_t
A^T lies in the range of A^T; this concerns q, so efficiency and not correctness.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.operators.base import LinearOperator
from diffpost.random import Noise
from diffpost.samplers.base import CLEAN, NoiseSource, Sampler, State, levels, run_down
from diffpost.samplers.chain import conditions
from diffpost.samplers.dpm_solver import DPMSolver, History, correct, moments, predict
from diffpost.samplers.particles import (
    effective_ancestors,
    effective_size,
    evidence_error,
    systematic,
)
from diffpost.samplers.scales import ends
from diffpost.score import ScoreModel

_MOVE, _DATA, _RESAMPLE = range(3)  # streams of a step's noise
_MOST_DATA = 256
_COLLAPSED = 0.02


@final
class CollapseWarning(UserWarning):
    """The weights of a cloud fell on few particles, so that its draws are few in truth."""


@final
@dataclass(frozen=True)
class _Twist:
    """The moment-matched evidence at one level; data are whitened and flat.

    Attributes:
        residual: W (y - A D), (B, m) float64.
        columns: C_t A^T W^T, (B, m, d).
        spread: W A C_t A^T W^T, (B, m, m) float64.
        gram: W A A^T W^T, (B or 1, m, m) float64.
        log_evidence: log p^(y | u_t), (B,) float64.
    """

    residual: Tensor
    columns: Tensor
    spread: Tensor
    gram: Tensor
    log_evidence: Tensor

    def take(self, index: Tensor) -> _Twist:
        """Of the particles ``index``."""
        gram = self.gram if len(self.gram) == 1 else self.gram[index]
        parts = (self.residual, self.columns, self.spread)
        residual, columns, spread = (part[index] for part in parts)
        return _Twist(residual, columns, spread, gram, self.log_evidence[index])


@final
@dataclass(frozen=True)
class _Particles(State):
    """Particles between two levels: x, history and log_weights (B,), and of each cloud (C,).

    Attributes:
        twist: at this level.
        log_evidence: what resamplings have taken out of the weights, (C,).
        ancestors: the first particle of the cloud from which each descends, (B,).
        sizes: effective sizes (C,), one for each level so far.
    """

    log_weights: Tensor = dataclasses.field(kw_only=True)
    twist: _Twist = dataclasses.field(kw_only=True)
    log_evidence: Tensor = dataclasses.field(kw_only=True)
    ancestors: Tensor = dataclasses.field(kw_only=True)
    sizes: tuple[Tensor, ...] = ()


@final
@dataclass(frozen=True, init=False)
class TwistedSMC(Sampler):
    """Particles with moment-matched twists (after Wu et al. 2023, arXiv:2306.17775, Algorithm 1).

    Draws come in clouds of ``particles``: n must be a multiple, and consecutive draws are one cloud, so data with a
    batch axis must have equal rows within a cloud (``Likelihood.repeat``), one observation to a cloud. Draws have
    weights (``Samples.log_weights``), by which several clouds of one observation are pooled according to their
    evidence; clouds of rows of their own each weigh the same. ``Samples.extras`` tells of each draw's cloud
    ``log_evidence``, the estimate of log p(y), and ``log_evidence_error``, its standard error, infinite where it is not
    known; ``ess`` (n, steps + 1), the effective number of particles at every level, before resampling, and of the
    clean images; and ``ancestors``, how many of the first particles are behind the draws. The guidance of the
    posterior is not used.

    Exact as particles go to infinity, for a prior as the sampler would draw it without data and any Gaussian noise; the twist's error costs
    effective particles only. The cost is one denoiser call and m Jacobian products a step, and the memory m images a
    particle, for m data. Already with tens of sharp data weights fall on few particles, and with thousands on one:
    hence the limit of 256 data.

    Args:
        particles: in a cloud, at least 2.
        steps: levels of noise.
        ess: resample a cloud (systematically) when its effective size falls below this share of it.
        nsr_min, nsr_max, rho: as in :class:`Sampler`, but None takes what prior and data need: from 8 times the
            widest standard deviation of the prior to 0.05 times the narrowest of the posterior, as far as the process
            reaches (:mod:`diffpost.samplers.scales`; costs about 50 evaluations, once). Starting too low loses modes.

    Raises:
        ValueError: fewer than 2 particles or steps, ess outside [0, 1]; and when sampling: not a posterior, noise
            that is not Gaussian, more than 256 data, rows that differ within a cloud.
    """

    particles: int = 256
    ess: float = 0.5

    def __init__(
        self,
        particles: int,
        steps: int,
        ess: float = 0.5,
        *,
        nsr_min: float | None = None,
        nsr_max: float | None = None,
        rho: float | None = None,
    ) -> None:
        given = {"particles": particles, "steps": steps, "ess": ess}
        for name, value in (given | {"nsr_min": nsr_min, "nsr_max": nsr_max, "rho": rho}).items():
            object.__setattr__(self, name, value)  # the class is frozen
        super().__post_init__()
        whole = isinstance(particles, int) and not isinstance(particles, bool)
        if not whole or particles < 2 or not 0 <= ess <= 1:
            raise ValueError(
                f"TwistedSMC(particles={particles!r}, ess={ess!r}): expected an integer of at least 2, and a share "
                "within [0, 1]."
            )

    @property
    def group(self) -> int:
        return self.particles

    def prepared(self, model: ScoreModel) -> TwistedSMC:
        """With the ends of the grid decided, and the data checked."""
        prior, likelihood = conditions(model, "TwistedSMC")
        if prior.rows is not None:
            raise ValueError(
                f"TwistedSMC: got the prior {prior!r}, itself with data of {prior.rows} rows; expected one prior for "
                "all particles. Join the data: likelihood + likelihood."
            )
        self._check(likelihood)
        if self.nsr_min is not None and self.nsr_max is not None:
            return self
        low, high = ends(prior, likelihood, lambda n: _rough(prior, n), "TwistedSMC")
        if self.nsr_min is not None:
            low = self.nsr_min
        if self.nsr_max is not None:
            high = self.nsr_max
        return TwistedSMC(
            self.particles, self.steps, self.ess, nsr_min=low, nsr_max=high, rho=self.rho
        )

    def _check(self, likelihood: Likelihood) -> None:
        count = math.prod(likelihood.data_shape)
        if len(_seen(likelihood)) > _MOST_DATA:
            raise ValueError(
                f"TwistedSMC: got {len(_seen(likelihood))} data; expected at most {_MOST_DATA}. With more, all weights fall on one "
                "particle, and every step takes a Jacobian product for each. Take MomentMatching, and MALA after it."
            )
        if likelihood.rows is not None:
            y = likelihood.y.reshape(-1, count)
            whole = len(y) % self.particles == 0
            clouds = y.reshape(-1, self.particles, count) if whole else y[:, None]
            # the noise of each datum too
            seen = likelihood.noise.whiten(torch.ones_like(likelihood.y)).reshape(y.shape)
            noises = seen.reshape(clouds.shape)
            same = (clouds == clouds[:, :1]).all() & (noises == noises[:, :1]).all()
            if not whole or not bool(same):
                raise ValueError(
                    f"TwistedSMC: got data of {len(y)} rows that differ within a cloud of {self.particles}; expected "
                    "one observation to a cloud: likelihood.repeat(particles)."
                )

    def init(self, model: ScoreModel, noise: NoiseSource, n: int) -> State:
        prior, likelihood = conditions(model, "TwistedSMC")
        t = self.times(model.sde)[0]
        alpha, nu = levels(model.sde, t)
        z = super().init(model, noise, n).x
        centre = prior.denoise(torch.zeros_like(z[:1]), t).to(z)  # nearly the prior's mean
        x = z + alpha * centre
        denoised, twist = _twist(prior, likelihood, x / alpha, t)
        clouds = n // self.particles
        return _Particles(
            x,
            ((-math.log(nu), denoised),),
            log_weights=twist.log_evidence,
            twist=twist,
            log_evidence=torch.zeros(clouds, dtype=torch.float64, device=x.device),
            ancestors=torch.arange(n, device=x.device) % self.particles,
        )

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        if not isinstance(state, _Particles):
            raise TypeError(f"TwistedSMC.step got {type(state).__name__}; expected what init made.")
        prior, likelihood = conditions(model, "TwistedSMC")
        state = self._resampled(state, noise)
        twist, history = state.twist, state.history
        alpha, nu = levels(model.sde, t)
        denoised = history[0][1]
        if s == CLEAN:
            _, white, constant = _whitened(likelihood, denoised)
            exact = constant - 0.5 * white.square().sum(1)
            weights = state.log_weights + exact - twist.log_evidence
            return self._finished(state, denoised, weights, pooled=likelihood.rows is None)
        u = state.x / alpha
        alpha, new = levels(model.sde, s)
        h = math.log(nu / new)
        reach = new * math.sqrt(-math.expm1(-2 * h))
        z, log_ratio = _guided(twist, noise, u, reach, nu, new)
        integrals = moments(2.0, h)
        base = math.exp(-2 * h) * u + reach * z
        ahead, later = _twist(prior, likelihood, predict(base, history, integrals), s)
        u = correct(base, denoised, ahead, integrals, h)
        newest: History = ((-math.log(new), ahead), *history)
        return dataclasses.replace(
            state,
            x=alpha * u,
            history=newest[:2],
            log_weights=state.log_weights + log_ratio + later.log_evidence - twist.log_evidence,
            twist=later,
        )

    def _resampled(self, state: _Particles, noise: NoiseSource) -> _Particles:
        """With the clouds resampled whose effective size is small; nothing is read back from the device."""
        weights = state.log_weights.reshape(-1, self.particles)
        size = effective_size(weights)
        few = size < self.ess * self.particles
        z = noise(weights.new_zeros(weights.numel(), 1), stream=_RESAMPLE)
        uniform = torch.special.ndtr(z.reshape(weights.shape)[:, 0])
        stay = torch.arange(self.particles, device=weights.device)
        chosen = torch.where(few[:, None], systematic(weights, uniform), stay)
        first = self.particles * torch.arange(len(weights), device=weights.device)
        index = (first[:, None] + chosen).reshape(-1)
        taken = torch.where(few, weights.logsumexp(1) - math.log(self.particles), 0.0)
        return dataclasses.replace(
            state,
            x=state.x[index],
            history=tuple((level, value[index]) for level, value in state.history),
            log_weights=torch.where(few[:, None], 0.0, weights).reshape(-1),
            twist=state.twist.take(index),
            log_evidence=state.log_evidence + taken,
            ancestors=state.ancestors[index],
            sizes=(*state.sizes, size),
        )

    def _finished(
        self, state: _Particles, clean: Tensor, log_weights: Tensor, pooled: bool
    ) -> State:
        weights = log_weights.reshape(-1, self.particles)
        total = weights.logsumexp(1)
        evidence = state.log_evidence + total - math.log(self.particles)
        first = state.ancestors.reshape(weights.shape)
        error, left = evidence_error(weights, first), effective_ancestors(weights, first)
        sizes = torch.stack([*state.sizes, effective_size(weights)], 1)
        # Clouds of one observation count by their evidence, those of different ones alike.
        shared = evidence[:, None] if pooled else 0.0
        weights = weights - total[:, None] + shared
        self._report(sizes, left)
        told = {
            "log_evidence": evidence,
            "log_evidence_error": error,
            "ess": sizes,
            "ancestors": left,
        }
        extras = {k: v.repeat_interleave(self.particles, 0) for k, v in told.items()}
        return State(clean, log_weights=weights.reshape(-1), extras=extras)

    def _report(self, sizes: Tensor, ancestors: Tensor) -> None:
        """Warns of clouds that collapsed: at some level, or by descent."""
        least, at = sizes.min(1)
        bad = (least < max(_COLLAPSED * self.particles, 2)) | (ancestors < 4)
        if bool(bad.any()):
            worst = int(least.argmin())
            warnings.warn(
                f"TwistedSMC: {int(bad.sum())} of {len(sizes)} clouds collapsed: the least effective size was "
                f"{float(least[worst]):.1f} of {self.particles}, at level {int(at[worst]) + 1} of {sizes.shape[1]}, and as few as "
                f"{float(ancestors.min()):.1f} of the first particles are behind all draws of a cloud. Its draws repeat "
                "each other. Take more particles or steps, or fewer data.",
                CollapseWarning,
                stacklevel=4,
            )


def _twist(
    prior: ScoreModel, likelihood: Likelihood, u: Tensor, t: Tensor
) -> tuple[Tensor, _Twist]:
    """The denoiser at u, and the twist there."""
    alpha, nu = levels(prior.sde, t)
    denoised, vjp = prior.denoise_vjp(alpha * u, t)
    noise, linear = likelihood.noise, likelihood.operator.linearize(denoised)
    residual, white, constant = _whitened(likelihood, denoised)
    seen = _seen(likelihood)
    white = white[:, seen]
    # A linear operator with the same noise everywhere sees each datum alike for all particles.
    alike = isinstance(likelihood.operator, LinearOperator) and likelihood.rows is None
    columns, spread, gram = [], [], []
    for j in seen:
        unit = torch.zeros_like(residual[: 1 if alike else None])
        unit.flatten(1)[:, j] = 1
        image = linear.adjoint(noise.whiten_adjoint(unit))
        column = alpha * nu**2 * vjp(image.expand_as(denoised))
        columns.append(column.flatten(1))
        spread.append(noise.whiten(linear(column)).flatten(1).double()[:, seen])
        gram.append(noise.whiten(linear(image)).flatten(1).double()[:, seen])
    m = _positive(torch.stack(spread, 1))
    log_evidence = constant + _log_normal(white, m + _eye(m))
    return denoised.to(u.dtype), _Twist(
        white, torch.stack(columns, 1), m, torch.stack(gram, 1), log_evidence
    )


def _whitened(likelihood: Likelihood, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r = y - A x, W r (B, m), and log p(y | x) + |W r|^2/2, so that chi^2 can be summed in float64."""
    residual = likelihood.residual(x)
    white = likelihood.noise.whiten(residual).flatten(1).double()
    return residual, white, likelihood.noise.log_prob(torch.zeros_like(residual)).double()


def _seen(likelihood: Likelihood) -> list[int]:
    """Which of the flattened data are not masked, in any row."""
    gone = likelihood.noise.masked(likelihood.data_shape)
    count = math.prod(likelihood.data_shape)
    if gone is None:
        return list(range(count))
    return (~gone.reshape(-1, count)).any(0).nonzero()[:, 0].tolist()


def _guided(
    twist: _Twist, noise: NoiseSource, u: Tensor, reach: float, nu: float, new: float
) -> tuple[Tensor, Tensor]:
    """z ~ q, shaped as u, and log N(z; 0, I) - log q(z), (B,): a Kalman update by perturbed observations."""
    kappa = 1 / new**2 - 1 / nu**2
    eye = _eye(twist.spread)
    full = twist.gram + kappa * twist.spread
    full = full + 1e-12 * eye * full.diagonal(dim1=1, dim2=2).amax(1)[:, None, None]
    left = torch.linalg.solve(full, twist.gram.expand_as(full))  # C_s A^T = C_t A^T left
    inner = eye + _positive(twist.spread @ left)  # S_s
    # H^T = g/nu_s^2 C_s A^T, as (B, m, d)
    h = reach / new**2 * (left.mT.to(twist.columns.dtype) @ twist.columns)
    outer = inner + (h @ h.mT).double()
    free = noise(u, stream=_MOVE).flatten(1)
    perturbed = noise(twist.residual, stream=_DATA)[..., None]
    root = torch.linalg.cholesky(inner)

    def data_of(v: Tensor) -> Tensor:
        return (h @ v[..., None].to(h.dtype)).double()

    missing = twist.residual[..., None] - data_of(free) - root @ perturbed
    gain = torch.linalg.solve(outer, missing).to(h.dtype)
    z = free + (h.mT @ gain)[..., 0].to(free.dtype)
    log_ratio = _log_normal(twist.residual, outer)
    log_ratio = log_ratio - _log_normal(twist.residual - data_of(z)[..., 0], inner)
    return z.reshape(u.shape), log_ratio


def _log_normal(r: Tensor, cov: Tensor) -> Tensor:
    """log N(r; 0, cov) + m/2 log 2 pi, (B,), for r (B, m)."""
    root = torch.linalg.cholesky(cov)
    v = torch.linalg.solve_triangular(root, r[..., None], upper=False)[..., 0]
    return -0.5 * v.square().sum(1) - root.diagonal(dim1=1, dim2=2).log().sum(1)


def _positive(m: Tensor) -> Tensor:
    """The nearest symmetric matrix without negative eigenvalues, which a network's Jacobian may have."""
    values, vectors = torch.linalg.eigh(0.5 * (m + m.mT))
    return (vectors * values.clamp_min(0)[:, None]) @ vectors.mT


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _rough(prior: ScoreModel, n: int) -> Tensor:
    """n quick draws of the prior, in its own units."""
    solver = DPMSolver(16, order=2, eta=1.0)
    noise = Noise(0, torch.arange(n, device=prior.device))
    state = solver.init(prior, noise.at(0), n)
    return run_down(solver, prior, state, lambda i: noise.at(i + 1))
