"""Levels whose spacing follows an embedded error estimate.

A multistep predictor-corrector (:mod:`diffpost.samplers.dpm_solver`, order 2, probability-flow ODE) has two values of a
step at one denoiser call: the prediction u_p, from D extrapolated, and the correction u_c, from D interpolated. Both are
of second order, so their difference is of the size of the local error (Milne's device; Hairer, Norsett & Wanner 1993,
Solving ODEs I, section III.1 and II.4 for the control),

    e = max over draws of rms over entries of (u_c - u_p)/(atol + rtol nu),

nu that of the end of the step: the noise left in the draw is the unit of what can be seen at that level. A step h in log
nu is accepted if e <= 1, and the next is h min(3, max(0.2, 0.9 e^(-1/3))).

Draws of a batch cannot step each for itself: a guidance decides for a batch by its level, and a step that is shared by a
batch would let a draw depend on its neighbours, so that splitting a batch changed it. Steps are therefore decided
once, by a few pilot draws, and all batches take the levels that the pilot accepted. The pilot waits for the device
once a step (it has to know e); the sampling loop does not. The control is of the ODE, which has no Brownian path that
a rejected step would have to keep; a stochastic sampler may use the levels, its noise being drawn on accepted steps only.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.random import Noise
from diffpost.samplers.base import NoiseSource, Sampler, State, denoise_u
from diffpost.samplers.dpm_solver import DPMSolver, History, correct, moments, predict
from diffpost.samplers.on_levels import OnLevels, check_inner, pilot, unprepared
from diffpost.score import ScoreModel
from diffpost.sde import SDE

__all__ = ["AdaptiveLevels"]

_FIRST = 0.5  # the first step in log nsr; the control takes over after it
_SAFETY, _LEAST, _MOST = 0.9, 0.2, 3.0


@final
@dataclass(frozen=True, init=False)
class AdaptiveLevels(Sampler):
    """A sampler on as many levels as a tolerance asks for: see the module.

    The pilot costs a call for every accepted and every rejected step, for each of its draws; ``OnLevels.pilot_calls`` and
    ``Samples.info`` tell how many. ``Samples.calls`` counts those of a draw.

    Args:
        sampler: ``DPMSolver``, ``Heun`` or ``PredictorCorrector``; of its own levels only the ends, nsr_max and nsr_min,
            count, the process's where they are None.
        rtol: error of a step allowed, in units of the noise-to-signal ratio.
        atol: the same in the prior's own units, where draws need not be better than that.
        draws, seed: of the pilot. Of data with a batch axis as many rows are taken.
        max_steps: levels at most.

    Raises:
        ValueError: another sampler or one with ``rho``; rtol not positive, atol negative, draws below 1 or max_steps below
            4; when sampling, a tolerance that takes more than max_steps levels.
    """

    sampler: Sampler = dataclasses.field()
    rtol: float = 0.05
    atol: float = 0.0
    draws: int = 4
    seed: int = 0

    def __init__(
        self,
        sampler: Sampler,
        rtol: float = 0.05,
        atol: float = 0.0,
        *,
        draws: int = 4,
        seed: int = 0,
        max_steps: int = 1000,
    ) -> None:
        check_inner("AdaptiveLevels", sampler)
        if sampler.rho is not None or not (rtol > 0 and atol >= 0) or draws < 1 or max_steps < 4:
            raise ValueError(
                f"AdaptiveLevels({sampler}, rtol={rtol}, atol={atol}, draws={draws}, max_steps={max_steps}): expected a "
                "sampler without rho, rtol > 0, atol >= 0, draws of 1 or more and max_steps of 4 or more."
            )
        given: dict[str, object] = {
            "steps": max_steps,
            "nsr_min": sampler.nsr_min,
            "nsr_max": sampler.nsr_max,
        }
        given |= {"rho": None, "sampler": sampler, "rtol": float(rtol), "atol": float(atol)}
        for name, value in (given | {"draws": int(draws), "seed": int(seed)}).items():
            object.__setattr__(self, name, value)  # the class is frozen

    @torch.no_grad()
    def prepared(self, model: ScoreModel) -> OnLevels:
        """The sampler on the levels that the pilot accepted."""
        part, ids, counter = pilot(model, self.draws)
        sde = model.sde
        ends = sde.nsr(sde.time_grid(1, self.nsr_min, self.nsr_max)).tolist()
        top, bottom = (math.log(end) for end in ends)
        place = top
        ode = DPMSolver(2, nsr_min=self.nsr_min, nsr_max=self.nsr_max)
        start = ode.init(part, Noise(self.seed, ids.to(model.device)).at(0), len(ids))
        u = start.x / float(sde.alpha(_time(sde, top)))
        history: History = ((-top, _denoise(part, u, top)),)
        levels = [top]
        h = _FIRST
        while place > bottom:
            left = place - bottom
            # Two halves rather than a step and a remnant, which a multistep formula does not stand.
            step = left if left <= h else min(h, 0.5 * left) if left < 2 * h else h
            new = place - step
            integrals = moments(1.0, step)
            base = math.exp(-step) * u
            predicted = predict(base, history, integrals)
            again = _denoise(part, predicted, new)
            corrected = correct(base, history[0][1], again, integrals, step)
            allowed = self.atol + self.rtol * math.exp(new)
            miss = (corrected - predicted).flatten(1).double().square().mean(1).sqrt()
            error = float(miss.max()) / allowed  # waits for the device
            if not math.isfinite(error):
                raise ValueError(
                    f"AdaptiveLevels: the pilot became non-finite at nsr {math.exp(new):.3g}. Check the data and the "
                    "noise, or take another guidance."
                )
            h = step * min(_MOST, max(_LEAST, _SAFETY * max(error, 1e-12) ** (-1 / 3)))
            if error > 1:
                continue
            u, place = corrected, new
            history = ((-new, again), *history)[:2]
            levels.append(place)
            if len(levels) > self.steps:
                raise ValueError(
                    f"AdaptiveLevels(rtol={self.rtol}, atol={self.atol}): more than {self.steps} levels, and nsr "
                    f"{math.exp(place):.3g} is only reached. Allow more error, or raise max_steps."
                )
        # Four digits, so that rounding errors do not tell one run from another; the ends as they are.
        inner = tuple(float(f"{math.exp(level):.4g}") for level in levels[1:-1])
        chosen = (ends[0], *inner, ends[1])
        return OnLevels(self.sampler, chosen, pilot_calls=round(counter.calls * len(ids)))

    def times(self, sde: SDE) -> Tensor:
        raise unprepared("AdaptiveLevels")

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        raise unprepared("AdaptiveLevels")


def _time(sde: SDE, place: float) -> Tensor:
    time = sde.t_of_nsr(torch.tensor(math.exp(place), dtype=torch.float64))
    return time.clamp(sde.t_min, sde.t_max)


def _denoise(model: ScoreModel, u: Tensor, place: float) -> Tensor:
    t = _time(model.sde, place)
    return denoise_u(model, u, t, float(model.sde.alpha(t)))
