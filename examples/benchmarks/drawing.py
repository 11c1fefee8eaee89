"""How a method is run: draws, what they cost, and what is told of a failure."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffpost.guidance import Guidance
from diffpost.instrument import NonFiniteError
from diffpost.likelihood import Likelihood
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import Sampler, TwistedSMC
from diffpost.score import ScoreModel

from .results import Record


@dataclass(frozen=True)
class Draws:
    """Draws of one method.

    Attributes:
        x: (n, *shape) float64.
        weights: (n,) or None.
        calls: denoiser evaluations per draw.
        vjps: products with its Jacobian per draw.
        told: further numbers to keep.
    """

    x: Tensor
    weights: Tensor | None
    calls: float
    vjps: float
    told: Record


@dataclass(frozen=True)
class Setting:
    """A problem as a method sees it.

    Attributes:
        prior, likelihood: the problem.
        ends: nsr of the last and the first level, the same for every method.
        n: draws.
        batch: of them computed together; None is all.
        seed: of the draws.
    """

    prior: ScoreModel
    likelihood: Likelihood
    ends: tuple[float, float]
    n: int
    batch: int | None = None
    seed: int = 1


Method = Callable[[Setting], Draws]


def found_ends(prior: ScoreModel, likelihood: Likelihood) -> tuple[float, float]:
    """The ends that TwistedSMC finds for itself; for few data."""
    prepared = TwistedSMC(2, 2).prepared(Posterior(prior, likelihood))
    if prepared.nsr_min is None or prepared.nsr_max is None:
        raise RuntimeError("TwistedSMC left its ends open")
    return prepared.nsr_min, prepared.nsr_max


def ours(
    guidance: Guidance | None, sampler: Callable[[Setting], Sampler], particles: int = 1
) -> Callable[[Setting], Draws]:
    """A guidance and a sampler of diffpost; of ``particles`` with weights one is kept, and the cost is theirs together."""

    def method(setting: Setting) -> Draws:
        posterior = Posterior(setting.prior, setting.likelihood, guidance)
        made = sample(
            posterior,
            particles * setting.n,
            sampler(setting),
            setting.seed,
            batch_size=setting.batch,
            progress=False,
        )
        told: Record = {}
        for name in ("acceptance", "log_evidence", "log_evidence_error"):
            if name in made.extras:
                told[name] = float(made.extras[name].mean())
        if "ess" in made.extras:
            told["least_ess"] = float(made.extras["ess"].min())
        kept = made if particles == 1 else made.resampled(setting.n, seed=setting.seed)
        weights = None if kept.log_weights is None else kept.weights
        calls, vjps = particles * made.calls, particles * made.vjps
        return Draws(kept.x.double(), weights, calls, vjps, told)

    return method


def judged(
    method: Method, setting: Callable[[], Setting], judge: Callable[[Draws], Record]
) -> Callable[[], Record]:
    """The numbers of a method on a problem: what ``judge`` says, the cost, and failures by name."""

    def run() -> Record:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            start = time.perf_counter()
            try:
                draws = method(setting())
            except (NonFiniteError, torch.linalg.LinAlgError) as error:
                return {"failed": type(error).__name__, "why": str(error)[:200]}
            seconds = time.perf_counter() - start
        cost: Record = {"calls": float(draws.calls), "vjps": float(draws.vjps), "seconds": seconds}
        loud = sorted({w.category.__name__ for w in heard if w.category is not DeprecationWarning})
        if loud:
            cost["warned"] = loud
        if not bool(draws.x.isfinite().all()):
            return {"failed": "not finite", **cost}
        return {**judge(draws), **draws.told, **cost}

    return run
