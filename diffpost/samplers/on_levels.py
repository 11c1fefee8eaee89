"""A sampler on levels of its own choice, and levels that follow from a pilot's denoising error.

With D the denoiser of a model, prior or posterior, and u = x/alpha = x_0 + nu z, a direction of standard deviation s has

    j(nu) = E[(x_0 - D(u, nu))^2]/nu^2 = s^2/(s^2 + nu^2),

by which D answers u: J = dD/du for a Gaussian. Nothing happens while j is near 0, where D is the mean and the exact
exponential step is right for any length, nor while it is near 1, where D is u. A posterior is often much narrower than
its prior, so that a grid from the prior's widest scale down spends a third of its levels, or more, before anything
happens. So: the first level where the process begins, then levels uniform in log nu from 8 times the posterior's
widest standard deviation to 0.05 times its narrowest.

Uniform, because that is what was measured to be best. Variance of modes of 0.067 to 0.49, nsr from 80 to 0.002,
``DPMSolver(eta=1)``, largest relative error, closed form, at 16 and 24 levels:

    uniform in log nsr                                    14.7%    3.1%
    density (4 j (1 - j))^(1/4), equal error per step     30%      1.9%
    density (4 j (1 - j))^(1/3)                           95%      22%
    first level, then uniform, 8 and 0.05                  4.5%    0.7%

A multistep formula stands neither steps that grow nor long ones where j is a few per cent, so the asymptotic density
of equal errors is the wrong one at so few levels.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.instrument import Counter, counted
from diffpost.random import Noise
from diffpost.samplers.base import CLEAN, NoiseSource, Sampler, State, denoise_u, run_down
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.samplers.heun import Heun
from diffpost.samplers.predictor_corrector import PredictorCorrector
from diffpost.score import ScoreModel
from diffpost.sde import SDE

__all__ = ["FittedLevels", "OnLevels", "pilot"]

_ABOVE = 8.0  # times the widest standard deviation, as in `scales`
_BELOW = 0.05  # times the narrowest: 0.25% of its variance is missing at the end
_ANSWER = 0.8  # j at which the narrowest is read off: where a fifth of a band's variance is narrower than half of nu
_PILOT_STEPS, _PILOT_LEVELS = 32, 24
_FIRST_BAND = 4.0  # integer wavenumber; below it modes are too few for bands of their own


@final
@dataclass(frozen=True, init=False)
class OnLevels(Sampler):
    """A sampler on given noise levels.

    Args:
        sampler: ``DPMSolver``, ``Heun`` or ``PredictorCorrector``, whose steps solve the linear part exactly and so stand
            long ones; its own levels (steps, nsr_min, nsr_max, rho) are not used.
        nsr: noise-to-signal ratios, decreasing, at least 2; the denoiser is called at each of them, as often as the sampler
            does.
        pilot_calls: denoiser evaluations, of one image each, that were spent on choosing them; told in ``Samples.info``.

    Raises:
        ValueError: another sampler, or levels that are not positive or not decreasing; when sampling, levels outside the
            process.
    """

    sampler: Sampler = dataclasses.field()
    nsr: tuple[float, ...] = ()
    pilot_calls: int = 0

    def __init__(self, sampler: Sampler, nsr: tuple[float, ...], *, pilot_calls: int = 0) -> None:
        check_inner("OnLevels", sampler)
        nsr = tuple(float(level) for level in nsr)
        if len(nsr) < 2 or not all(math.inf > a > b > 0 for a, b in itertools.pairwise(nsr)):
            raise ValueError(
                f"OnLevels(nsr={nsr}): expected at least two positive noise-to-signal ratios, decreasing."
            )
        given: dict[str, object] = {
            "steps": len(nsr),
            "nsr_min": None,
            "nsr_max": None,
            "rho": None,
        }
        given |= {"sampler": sampler, "nsr": nsr, "pilot_calls": int(pilot_calls)}
        for name, value in given.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def times(self, sde: SDE) -> Tensor:
        lowest, highest = sde.nsr_range
        slack = 1 + 1e-9  # round-off of a level that went through t_of_nsr
        if self.nsr[0] > highest * slack or self.nsr[-1] * slack < lowest:
            raise ValueError(
                f"OnLevels: levels from {self.nsr[0]:g} to {self.nsr[-1]:g}; expected them within {lowest:g} to "
                f"{highest:g}, the noise-to-signal ratios of {sde}."
            )
        times = sde.t_of_nsr(torch.tensor(self.nsr, dtype=torch.float64))
        times = times.clamp(sde.t_min, sde.t_max)
        return torch.cat([times, times.new_full((1,), CLEAN)])

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        return self.sampler.step(model, state, t, s, noise)


@final
@dataclass(frozen=True, init=False)
class FittedLevels(Sampler):
    """As many levels as the sampler has, where the model needs them: see the module.

    A pilot measures the model's denoising error once, before sampling: ``draws`` draws by ``DPMSolver(32, eta=1)`` and 24
    calls on each, 224 evaluations for 4 draws; ``OnLevels`` then has the levels, the same for all batches, so that a
    draw depends on its seed and index alone. Bands are of the radial wavenumber for images, every entry for vectors.
    Levels are trimmed only where all of them allow it. Where a prior is sampled, or data say little, little is gained;
    nothing is lost but the pilot.

    Args:
        sampler: as of :class:`OnLevels`; its nsr_max and nsr_min, or the process's ends, bound the levels.
        draws: of the pilot, at least 2. Of data with a batch axis as many rows are taken.
        seed: of the pilot.

    Raises:
        ValueError: another sampler or one with ``rho``, or fewer than 2 draws or 4 levels; when sampling, a pilot that
            becomes non-finite.
    """

    sampler: Sampler = dataclasses.field()
    draws: int = 4
    seed: int = 0

    def __init__(self, sampler: Sampler, draws: int = 4, seed: int = 0) -> None:
        check_inner("FittedLevels", sampler)
        if sampler.rho is not None or sampler.steps < 4 or draws < 2:
            raise ValueError(
                f"FittedLevels({sampler}, draws={draws}): expected a sampler of at least 4 steps without rho, and at least "
                "2 draws."
            )
        given: dict[str, object] = {"steps": sampler.steps, "rho": None, "sampler": sampler}
        given |= {"nsr_min": sampler.nsr_min, "nsr_max": sampler.nsr_max}
        for name, value in (given | {"draws": int(draws), "seed": int(seed)}).items():
            object.__setattr__(self, name, value)  # the class is frozen

    @torch.no_grad()
    def prepared(self, model: ScoreModel) -> OnLevels:
        """The sampler on the levels that the model's denoising error asks for."""
        part, ids, counter = pilot(model, self.draws)
        noise = Noise(self.seed, ids.to(model.device))
        grid = model.sde.time_grid(_PILOT_LEVELS - 1, self.nsr_min, self.nsr_max)
        nsr = model.sde.nsr(grid)
        first = DPMSolver(_PILOT_STEPS, eta=1.0, nsr_min=self.nsr_min, nsr_max=self.nsr_max)
        clean = run_down(
            first, part, first.init(part, noise.at(0), len(ids)), lambda i: noise.at(i + 1)
        )
        answers = []
        for i, t in enumerate(grid):
            u = clean + float(nsr[i]) * noise.at(_PILOT_STEPS + 1 + i)(clean)
            error = clean - denoise_u(part, u, t, float(model.sde.alpha(t)))
            answers.append(_by_band(error) / float(nsr[i]) ** 2)
        levels = fitted(nsr, torch.stack(answers), self.steps)
        return OnLevels(self.sampler, levels, pilot_calls=round(counter.calls * len(ids)))

    def times(self, sde: SDE) -> Tensor:
        raise unprepared("FittedLevels")

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        raise unprepared("FittedLevels")


def fitted(nsr: Tensor, answer: Tensor, steps: int) -> tuple[float, ...]:
    """Levels from the answers j of bands: first the largest of nsr, then uniform in log nsr between the scales.

    Args:
        nsr: (T,) decreasing.
        answer: (T, bands) j at each; a band's is taken not to fall again with falling nsr.
        steps: levels wanted.

    Raises:
        ValueError: an answer that is not finite.
    """
    if not bool(answer.isfinite().all()):
        raise ValueError(
            "FittedLevels: the pilot's draws or the denoiser's answers are not finite; expected finite ones. Check the "
            "data and the noise, or take another guidance."
        )
    places = nsr.double().log().cpu()
    j = answer.double().cpu().cummax(0).values
    rising = j.amax(1)  # of the band that answers first
    last = j.amin(1)  # and last
    threshold = 1 / (1 + _ABOVE**2)
    top, bottom = float(places[0]), float(places[-1])
    high = _crossing(places, rising, threshold)
    # s = nu sqrt(j/(1 - j)) at the crossing
    low = _crossing(places, last, _ANSWER) + math.log(_BELOW * math.sqrt(_ANSWER / (1 - _ANSWER)))
    if float(last[-1]) < _ANSWER:
        low = bottom
    low = max(low, bottom)
    high = min(max(high, low + 1.0), top)
    # Three digits for what was estimated, so that rounding errors do not tell one run from another.
    low, high = (math.log(float(f"{math.exp(end):.3g}")) for end in (low, high))
    low, high = max(low, bottom), min(high, top)
    rest = steps - 1
    if top - high <= (high - low) / max(rest - 1, 1):  # no longer than a step: nothing to skip
        levels = torch.linspace(top, low, steps, dtype=torch.float64)
    else:
        levels = torch.cat([places[:1], torch.linspace(high, low, rest, dtype=torch.float64)])
    inner = levels.exp().tolist()[1:]
    return (float(nsr[0]), *inner[:-1], max(inner[-1], float(nsr[-1])))


def _crossing(places: Tensor, values: Tensor, threshold: float) -> float:
    """Where rising values first reach the threshold, by interpolation of their logarithm; an end where they do not."""
    reached = (values >= threshold).nonzero()
    if len(reached) == 0:
        return float(places[-1])
    i = int(reached[0])
    if i == 0:
        return float(places[0])
    before, after = (float(v.clamp_min(1e-12).log()) for v in (values[i - 1], values[i]))
    weight = (math.log(threshold) - before) / (after - before)
    return float(places[i - 1] + weight * (places[i] - places[i - 1]))


def _by_band(error: Tensor) -> Tensor:
    """Mean square of errors (B, *shape) by octave of the radial wavenumber, or by entry for what is no image: (bands,)."""
    if error.ndim < 3 or min(error.shape[-2:]) < 2 * _FIRST_BAND:
        return error.double().square().mean(0).flatten()
    power = torch.fft.fft2(error.double(), norm="ortho").abs().square()
    power = power.reshape(-1, *error.shape[-2:]).mean(0)
    height, width = error.shape[-2:]
    k = min(height, width) * torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.fftfreq(width, dtype=torch.float64)[None, :],
    ).to(power.device)
    count = max(int(math.log2(min(height, width) / 2 / _FIRST_BAND)), 0) + 1
    band = (k.clamp_min(_FIRST_BAND / 2) / _FIRST_BAND).log2().floor().long() + 1
    band = band.clamp(0, count).flatten()
    total = power.new_zeros(count + 1).index_add_(0, band, power.flatten())
    return total / torch.bincount(band, minlength=count + 1).clamp_min(1)


def pilot(model: ScoreModel, draws: int) -> tuple[ScoreModel, Tensor, Counter]:
    """The model of a pilot's draws, their ids, and a counter of its calls: some rows where data have a batch axis."""
    rows = model.rows
    ids = torch.arange(draws)
    if rows is not None:
        ids = torch.linspace(0, rows - 1, min(draws, rows)).long()
    counter = Counter(len(ids))
    return counted(model.select(ids), counter), ids, counter


def check_inner(name: str, sampler: Sampler) -> None:
    """Raises ValueError unless the sampler's steps stand being long."""
    if not isinstance(sampler, DPMSolver | Heun | PredictorCorrector):
        raise ValueError(
            f"{name}({sampler!r}): expected DPMSolver, Heun or PredictorCorrector, whose steps are exact where the "
            "denoiser does not change; Euler-Maruyama's are not, and other samplers choose levels themselves."
        )


def unprepared(name: str) -> ValueError:
    """What to raise where levels are asked for that only a model decides."""
    return ValueError(
        f"{name} has no levels before it has seen a model; expected `prepared(model)`, which `dp.sample` calls, and its answer "
        "used instead."
    )
