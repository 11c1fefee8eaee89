"""Langevin dynamics on the posterior at a low noise level, with and without the Metropolis test.

At the noise-to-signal ratio nu the prior is blurred to p_nu = p_0 * N(0, nu^2), whose score s is the network's, and
the data are seen through their exact likelihood. The target is

    pi(u) = p_nu(u) p(y | u):

the posterior under a prior blurred by nu, which approaches that under p_0 as nu goes to 0; where pi has a variance v
under p_0, the blur adds at most nu^2 to it and moves the mean by about nu^2/v of what the data move it. With M, the
covariance of a Gaussian of the prior's and the likelihood's curvature (:mod:`diffpost.samplers.chain`), the proposal
is a step of the Ornstein-Uhlenbeck process that is exact if pi is that Gaussian (Cotter et al. 2013, arXiv:1202.0709,
section 4.3),

    u' = u + delta m(u) + sqrt(2 delta - delta^2) M^1/2 xi,       m = M (s + A^T Sigma^-1 (y - A u)),

and at delta = 1 a fresh draw. A nonlinear A is linearised in m once, where the chain begins; the residual is exact.
With <a, b> = a^T M^-1 b, the acceptance is (Besag 1994; Roberts & Tweedie 1996) min(1, e^a),

    a = int s . du + log p(y | u') - log p(y | u) - [<d, m + m'> + delta/2 (<m', m'> - <m, m>)]/(2 - delta),  d = u' - u,

with the integral along the straight line (:mod:`diffpost.line_integral`). For small delta this is the error
of the trapezoidal rule for the integral of grad log pi: a test of the third order in d, so it takes a good integral.

Noise that is not Gaussian (:class:`LearnedNoise <diffpost.learned_noise.LearnedNoise>`) has a Gaussian surrogate for M, its
own score in m = M (s - A^T s_eta(y - A u)), and in the acceptance its own log p(y | u') - log p(y | u), the line
integral of s_eta between the residuals: the target is p_nu(u) p(y | u) whatever the surrogate is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import per_entry
from diffpost.guidance.slic import with_surrogate
from diffpost.likelihood import Likelihood
from diffpost.line_integral import nodes, refined
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

_TOLD = ("acceptance", "step_size", "quadrature_error", *TRACES)
_PRIOR_WEIGHT = 4.0  # modes' worth of belief that a band's curvature is that of the next finer band


@final
@dataclass(frozen=True)
class Point:
    """What a move needs to know of u, (B, *shape).

    Attributes:
        score: s(u).
        shift: m(u).
        embedded: C^-1/2 m and Sigma^-1/2 A m.
        residual: Sigma^-1/2 (y - A(u)), or y - A(u) itself where the noise is not Gaussian.
    """

    u: Tensor
    score: Tensor
    shift: Tensor
    embedded: tuple[Tensor, Tensor]
    residual: Tensor

    def where(self, accepted: Tensor, other: Point) -> Point:
        """Self where accepted (B,), other elsewhere."""

        def choose(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        pairs = zip(self.embedded, other.embedded, strict=True)
        first, second = (choose(a, b) for a, b in pairs)
        return Point(
            choose(self.u, other.u),
            choose(self.score, other.score),
            choose(self.shift, other.shift),
            (first, second),
            choose(self.residual, other.residual),
        )


@final
@dataclass(frozen=True)
class Walk(State):
    """A chain at ``point``; x is u.

    Attributes:
        reference: the Gaussian of covariance M.
        log_step: log delta, (B,).
        done: moves made.
    """

    point: Point | None = None
    reference: Gaussian | None = None
    log_step: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(1))
    done: int = 0


@dataclass(frozen=True)
class _LangevinChain(Chain):
    """The dynamics that both samplers share."""

    any_noise = True

    start: Sampler | None = field(default_factory=lambda: DPMSolver(32, eta=1.0))
    nsr: float | None = None
    step_size: float | None = None
    reverse: Sampler | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None and not 0 < self.step_size <= 1:
            raise ValueError(
                f"{type(self).__name__}(step_size={self.step_size}): expected a number in (0, 1]; 1 is a fresh draw "
                "where the target is Gaussian."
            )
        if self.nsr is not None and not self.nsr > 0:
            raise ValueError(f"{type(self).__name__}(nsr={self.nsr}): expected a positive number.")
        if self.reverse is not None:
            check_reverse(type(self).__name__, self.reverse)

    def levels(self, sde: SDE) -> list[float]:
        lowest, highest = sde.nsr_range
        nsr = lowest if self.nsr is None else self.nsr
        if not lowest * (1 - 1e-9) <= nsr <= highest:
            raise ValueError(
                f"{type(self).__name__}(nsr={self.nsr}): expected a noise-to-signal ratio of {sde}, {lowest:g} to "
                f"{highest:g}."
            )
        return [nsr] * self.steps

    def begin(
        self, prior: ScoreModel, likelihood: Likelihood, clean: State, t: Tensor, noise: NoiseSource
    ) -> State:
        """Blurs the draw by nu where the data allow it: a draw of N(x, nu^2) given y."""
        x = clean.x
        nu = float(prior.sde.nsr(t))
        linear = likelihood.operator.linearize(x)
        gaussian = with_surrogate(likelihood)
        blur = Gaussian(gaussian, linear, torch.tensor(nu**2, dtype=torch.float64))
        z, e = blur.draws(x, likelihood.residual(x), noise, BEGIN)
        u = x + blur.update(z, likelihood.residual(x) + e)
        score = score_at(prior, u[None], t)[0]
        reference = Gaussian(gaussian, linear, curvature(score, nu))
        size = self.step_size or min(1.0, x[0].numel() ** (-1 / 3))
        log_step = torch.full((len(x),), math.log(size), dtype=torch.float64, device=x.device)
        # NaN where the score is not finite, for the loop to report
        fault = 0 * score.flatten(1).sum(1)
        return Walk(
            u + per_entry(fault, u),
            log_weights=clean.log_weights,
            extras={name: v for name, v in clean.extras.items() if name not in _TOLD},
            point=evaluate(reference, u, score, likelihood),
            reference=reference,
            log_step=log_step,
        )

    def end(self, prior: ScoreModel, state: State, t: Tensor, noise: NoiseSource) -> State:
        x = state.x
        if self.reverse is not None:
            nu = float(prior.sde.nsr(t))
            x = reversed_from(prior, x, nu, self.reverse, noise, BEGIN)
        return State(x, log_weights=state.log_weights, extras=state.extras)


def score_at(prior: ScoreModel, u: Tensor, t: Tensor) -> Tensor:
    """grad log p_nu at u (k, B, *shape), in one call."""
    k, batch = u.shape[:2]
    alpha = float(prior.sde.alpha(t))
    if k > 1 and prior.rows is not None:
        prior = prior.select(torch.arange(batch).repeat(k))
    return alpha * prior.score(alpha * u.flatten(0, 1), t).to(u.dtype).reshape(u.shape)


def evaluate(
    reference: Gaussian, u: Tensor, score: Tensor, likelihood: Likelihood | None = None
) -> Point:
    """The point at u, where the score is known; ``likelihood`` where its noise may not be the reference's."""
    residual = reference.likelihood.residual(u)
    if likelihood is not None and not likelihood.noise.is_gaussian:
        pull = -reference.linear.adjoint(likelihood.noise.score(residual))
        shift = reference.update(reference.apply(score + pull), torch.zeros_like(residual))
        return Point(u, score, shift, reference.embed(shift), residual)
    shift = reference.update(reference.apply(score), residual)
    whitened = reference.likelihood.noise.whiten(residual)
    return Point(u, score, shift, reference.embed(shift), whitened)


def curvature(score: Tensor, nu: float) -> Tensor:
    """C, the inverse of the prior's curvature, from one score at a typical point.

    Under p_nu, E[s s^T] = -E[grad grad log p_nu]: the square of the score estimates the curvature (as in Titsias 2023,
    arXiv:2305.14442). Averaged over an image's Fourier modes of a radial frequency, or over all of x where x is no
    image, one score is enough. No curvature exceeds that of the blur, 1/nu^2.

    Args:
        score: (B, *shape).
        nu: noise-to-signal ratio.

    Returns:
        Eigenvalues under the FFT2, (B, 1..., H, W), or (B,) for fewer than two axes of more than 3 pixels.
    """
    if score.ndim < 3 or min(score.shape[-2:]) < 4:
        mean = score.double().flatten(1).square().mean(1)
        return 1 / mean.clamp(1e-12 / nu**2, 1 / nu**2)
    height, width = score.shape[-2:]
    power = torch.fft.fft2(score.double(), norm="ortho").abs().square()
    power = power.reshape(len(score), -1, height * width).mean(1)
    k = torch.hypot(
        torch.fft.fftfreq(height, 1 / height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, 1 / width, dtype=torch.float64)[None, :] * height / width,
    )
    band = k.round().long().reshape(-1).to(score.device)
    count = torch.zeros(int(band.max()) + 1, dtype=torch.float64, device=score.device)
    count.index_add_(0, band, torch.ones_like(power[0]))
    total = power.new_zeros(len(score), len(count)).index_add_(1, band, power)
    table = torch.empty_like(total)
    corner = k.reshape(-1).argsort(descending=True)[: max(len(band) // 8, 1)].to(score.device)
    finer = power[:, corner].mean(1)
    for i in range(len(count) - 1, -1, -1):
        finer = (total[:, i] + _PRIOR_WEIGHT * finer) / (count[i] + _PRIOR_WEIGHT)
        table[:, i] = finer
    spectrum = 1 / table.clamp(1e-12 / nu**2, 1 / nu**2)
    shape = (len(score), *[1] * (score.ndim - 3), height, width)
    return spectrum[:, band].reshape(shape).to(score.dtype)


def proposal(
    point: Point, reference: Gaussian, size: Tensor, noise: NoiseSource, stream: int = 0
) -> Tensor:
    """u + delta m + sqrt(2 delta - delta^2) M^1/2 xi."""
    z, e = reference.draws(point.u, point.residual, noise, stream)
    fresh = reference.update(z, e)
    return (
        point.u
        + per_entry(size, point.u) * point.shift
        + per_entry((2 * size - size**2).sqrt(), point.u) * fresh
    )


@final
@dataclass(frozen=True)
class Langevin(_LangevinChain):
    """Unadjusted Langevin dynamics that end a sampler.

    The proposal of :class:`MALA`, always accepted: one network evaluation and two solves a move. Exact where p_nu is
    Gaussian and its curvature is what is measured; elsewhere with an error of order ``step_size`` that :class:`MALA`
    removes. The draw is u itself, with the blur in it, unless ``reverse`` takes it out.

    Args:
        steps: moves, after those of the start.
        start: the sampler whose draws the chains begin at; None begins at 0 in the prior's units.
        nsr: the noise-to-signal ratio nu at which the chain runs; None is the process's lowest.
        step_size: delta, in (0, 1]; None is min(1, d^-1/3) for d pixels.
        reverse: None returns u itself. ``DPMSolver(eta=1)`` or ``EulerMaruyama`` take its blur out: they draw a clean
            image given u by the reverse SDE, and then the target is p_0(x) N(y; A x, Sigma + nu^2 A A^T) for a
            linear A, the exact posterior of data with that little more noise. At each of its steps one
            evaluation more.

    Raises:
        ValueError: as :class:`Chain <diffpost.samplers.chain.Chain>`; nsr not positive or outside the process, step_size outside (0, 1].
    """

    def move(
        self, prior: ScoreModel, likelihood: Likelihood, state: State, t: Tensor, noise: NoiseSource
    ) -> State:
        walk, point, reference = unpack(state)
        u = proposal(point, reference, walk.log_step.exp(), noise)
        point = evaluate(reference, u, score_at(prior, u[None], t)[0], likelihood)
        extras = traced(walk.extras, prior, reference.likelihood, u)
        return dataclasses.replace(walk, x=u, point=point, done=walk.done + 1, extras=extras)


@final
@dataclass(frozen=True)
class MALA(_LangevinChain):
    """Metropolis-adjusted Langevin dynamics that end a sampler.

    Takes any noise: with learned noise it is the seed paper's annealed sampling (Legin et al. 2023, arXiv:2302.03046) at
    t near 0, made exact by the test. ``start`` may be a Langevin chain at a higher ``nsr``, and so on.

    Repairs what a guidance gets wrong around each draw; it does not move draws between modes. Every draw is the end of
    a chain of its own, and pi = p_nu(u) p(y | u) is exact in the limit of many moves. The draw is u itself, with
    the blur of ``nsr`` in it, unless ``reverse`` takes it out: choose ``nsr`` several times below the posterior's standard deviations that matter. The lower
    it is, the shorter are the steps that a prior of sharp features allows.

    The step size of each draw follows its acceptances in the first ``burn_in`` moves (Robbins & Monro 1951) and is
    frozen then. A move costs two solves and 4 evaluations of the score, in one call on 4 times the batch; where the
    error of the line integral could turn the decision, 4, 8, ... more at these entries only.

    ``Samples.extras``, over the moves after burn_in: ``acceptance`` (n,), the mean probability; ``step_size`` (n,);
    ``quadrature_error`` (n,), the largest estimated error of the line integral in a decision that it could have
    turned; ``trace_chi2`` and ``trace_flux`` (n, moves), chi^2 and the sum of the image in physical units along the chain,
    for ``diagnostics.convergence`` (R-hat and effective sample sizes).

    Args:
        steps: moves, after those of the start.
        start: the sampler whose draws the chains begin at; None begins at 0 in the prior's units.
        nsr: the noise-to-signal ratio nu at which the chain runs; None is the process's lowest.
        step_size: delta to begin with, in (0, 1]; None is min(1, d^-1/3) for d pixels.
        burn_in: moves that adapt the step size; None is half of them, 0 keeps step_size.
        target: the acceptance that it is adapted to; 0.574 is optimal in high dimensions (Roberts & Rosenthal 1998).
        nodes: most evaluations along a line, 5, 9, 17, ...; 5 never waits for the device.
        reverse: None returns u itself. ``DPMSolver(eta=1)`` or ``EulerMaruyama`` take its blur out: they draw a clean
            image given u by the reverse SDE, and then the target is p_0(x) N(y; A x, Sigma + nu^2 A A^T) for a
            linear A, the exact posterior of data with that little more noise. At each of its steps one
            evaluation more.

    Raises:
        ValueError: as :class:`Chain <diffpost.samplers.chain.Chain>`; nsr not positive or outside the process, step_size outside (0, 1], target
            outside (0, 1), burn_in outside [0, steps), or nodes not 2^k + 1.
    """

    burn_in: int | None = None
    target: float = 0.574
    nodes: int = 17

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target < 1 or not 0 <= self.burning < self.steps:
            raise ValueError(
                f"MALA(steps={self.steps}, burn_in={self.burn_in}, target={self.target}): expected 0 <= burn_in < "
                "steps and a target between 0 and 1."
            )
        if self.nodes < 5 or (self.nodes - 1) & (self.nodes - 2):
            raise ValueError(
                f"MALA(nodes={self.nodes}): expected 5, 9, 17 or another power of 2 plus 1."
            )

    @property
    def burning(self) -> int:
        """Moves that adapt the step size."""
        return self.steps // 2 if self.burn_in is None else self.burn_in

    def move(
        self, prior: ScoreModel, likelihood: Likelihood, state: State, t: Tensor, noise: NoiseSource
    ) -> State:
        walk, point, reference = unpack(state)
        size = walk.log_step.exp()
        u = proposal(point, reference, size, noise)
        line = Line(prior, t, point, u)
        new = evaluate(reference, u, line.end, likelihood)
        gaussian, doubt = likelihood.noise.is_gaussian, torch.zeros_like(size)
        rest = log_ratio(point, new, reference, size, gaussian)
        if not gaussian:
            fit, doubt = likelihood.noise.log_ratio(point.residual, new.residual)
            rest = rest + fit
        threshold = torch.special.log_ndtr(noise(size[:, None], stream=2)[:, 0])
        integral, error = line.integral(threshold - rest, self.nodes - 1)
        error = error + doubt
        log_acceptance = integral + rest
        accepted = threshold < log_acceptance
        point = new.where(accepted, point)
        probability = log_acceptance.clamp_max(0).exp()
        walk = self._told(walk, probability, error)
        if walk.done > self.burning:
            extras = traced(walk.extras, prior, reference.likelihood, point.u)
            walk = dataclasses.replace(walk, extras=extras)
        # a proposal without a density is no proposal to reject, but a fault that the loop reports
        x = torch.where(per_entry(log_acceptance.isnan(), u) > 0, math.nan, point.u)
        return dataclasses.replace(walk, x=x, point=point)

    def _told(self, walk: Walk, probability: Tensor, error: Tensor) -> Walk:
        """The state with the step size adapted, or the extras brought up to date."""
        kept = walk.done - self.burning
        log_step = walk.log_step
        extras = dict(walk.extras)
        if kept < 0:
            gain = (walk.done + 1) ** -0.6
            log_step = (log_step + gain * (probability - self.target)).clamp_max(0.0)
        else:
            before = extras.get("acceptance", torch.zeros_like(probability))
            extras["acceptance"] = before + (probability - before) / (kept + 1)
            extras["step_size"] = log_step.exp()
            largest = extras.get("quadrature_error", torch.zeros_like(error))
            extras["quadrature_error"] = torch.maximum(largest, error)
        return dataclasses.replace(walk, log_step=log_step, done=walk.done + 1, extras=extras)


@final
class Line:
    """The line from a point to u: the score at its end, and the integral of the score along it.

    Attributes:
        end: the score at u, (B, *shape).
    """

    def __init__(self, prior: ScoreModel, t: Tensor, point: Point, u: Tensor) -> None:
        self._prior, self._t, self._from = prior, t, point.u
        self._delta = u - point.u
        places = nodes(4)[1:]
        inside = [point.u + a * self._delta for a in places[:-1]]
        scores = score_at(prior, torch.stack([*inside, u]), t)
        self.end = scores[-1]
        values = [dot(self._delta, s) for s in (point.score, *scores)]
        self._slopes = torch.stack(values, 1)

    def integral(self, level: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The integral, and the estimate of its error where that could turn ``integral > level``; both (B,).

        Entries in such doubt are refined, up to ``most`` intervals.
        """

        def slopes_at(places: list[float], ids: Tensor) -> Tensor:
            start, delta = self._from[ids], self._delta[ids]
            points = torch.stack([start + a * delta for a in places])
            scores = score_at(self._prior.select(ids), points, self._t)
            return torch.stack([dot(delta, s) for s in scores], 1)

        def doubt(total: Tensor, error: Tensor, ids: Tensor) -> Tensor:
            return torch.where((total - level[ids]).abs() < error, error, 0.0)

        return refined(self._slopes, slopes_at, most, doubt)


def log_ratio(
    old: Point, new: Point, reference: Gaussian, size: Tensor, gaussian: bool = True
) -> Tensor:
    """log p(y | u') - log p(y | u) + log q(u | u') - log q(u' | u), (B,) float64; without the data unless gaussian."""
    delta = reference.embed(new.u - old.u)
    pairs = zip(delta, old.embedded, new.embedded, strict=True)
    along, growth = torch.zeros_like(size), torch.zeros_like(size)
    for d, m, after in pairs:
        along = along + dot(d, m + after)
        growth = growth + dot(after - m, after + m)
    fit: Tensor | float = 0.0
    if gaussian:
        fit = -0.5 * dot(new.residual - old.residual, new.residual + old.residual)
    return fit - (along + 0.5 * size * growth) / (2 - size)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """(B,) inner products, in float64."""
    return (a.double() * b.double()).flatten(1).sum(1)


def unpack(state: State) -> tuple[Walk, Point, Gaussian]:
    """The parts of a chain's state."""
    if not isinstance(state, Walk) or state.point is None or state.reference is None:
        raise ValueError(
            f"got a {type(state).__name__}; expected a state that the chain itself made: begin at init."
        )
    return state, state.point, state.reference
