"""Which guidance and which sampler, and why: from the size of the data, the structure of the operator, and a pilot run.

Few data: particles with exact weights (twisted SMC) reach the posterior whatever its shape, at a Jacobian product for
every datum and step. Many data: the weights would collapse, so moment matching, which is exact for Gaussian priors,
with chains after it where the prior is cheap enough to evaluate. The pilot tells whether the choice works on these
data: whether the particles survive, whether the draws reach the data, and whether the process begins above the
widest scale of the prior.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from diffpost.guidance import Guidance, choose
from diffpost.guidance.choice import tabulated
from diffpost.likelihood import Likelihood
from diffpost.networks.denoising_error import covariance_from_table, denoising_error
from diffpost.operators.base import LinearOperator
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import (
    MALA,
    CollapseWarning,
    DPMSolver,
    RangeWarning,
    Sampler,
    TwistedSMC,
)
from diffpost.samplers.scales import warn_of_precision, warn_of_range
from diffpost.score import GaussianScore, ScoreModel

__all__ = ["Recommendation", "recommend"]

_STEPS = 32
_FEW_ANALYTIC, _FEW_NETWORK = (
    64,
    8,
)  # data for which a product each, in every step of every particle, is cheap
_PILOT_PARTICLES, _PILOT_STEPS = 64, 64
_PILOT_DRAWS = 4
_TABLE_DRAWS = 32


@final
@dataclass(frozen=True)
class Recommendation:
    """What to sample with, and why.

    Attributes:
        guidance, sampler: for ``Posterior`` and ``sample``.
        reasons: sentences, one for every decision.
        pilot: what the pilot measured: ``seconds`` of one denoiser call on one image, ``reduced_chi2`` of its draws
            or ``ess``, the least effective share of its particles.
        posterior: prior and data with the guidance.
    """

    guidance: Guidance
    sampler: Sampler
    reasons: tuple[str, ...]
    posterior: Posterior
    pilot: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"guidance: {self.guidance!r}", f"sampler:  {self.sampler!r}"]
        lines += [f"- {reason}" for reason in self.reasons]
        lines += [f"pilot: {', '.join(f'{k} {v:.3g}' for k, v in self.pilot.items())}"]
        return "\n".join(lines)


@torch.no_grad()
def recommend(prior: ScoreModel, likelihood: Likelihood, seed: int = 0) -> Recommendation:
    """Picks guidance and sampler for a prior and data.

    Args:
        prior: the score model of images.
        likelihood: the data, in physical units.
        seed: of the pilot: about 50 to 200 evaluations of a few images, and for a prior of images whose denoising
            errors are not known, 1,500 more, to measure them.

    Returns:
        Recommendation: print it to see why.

    Raises:
        ValueError: the operator does not take images of the prior's shape.
    """
    reasons: list[str] = []
    choice = choose(prior, likelihood)
    guidance, why = choice.guidance, choice.why
    many = _count(likelihood)
    if not _knows_its_errors(prior) and many > _FEW_ANALYTIC and len(prior.shape) == 3:
        guidance = _measured(prior, seed)
        why = (
            f"the errors of the prior's denoiser were measured on {_TABLE_DRAWS} draws of itself and stand in for the "
            "Jacobian"
        )
    posterior = Posterior(prior, likelihood, guidance)
    likelihood = posterior.likelihood
    seconds = _seconds(prior)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RangeWarning)
        warn_of_range(prior, "recommend")
        blank = torch.zeros(likelihood.rows or 1, *prior.shape, dtype=prior.dtype)
        warn_of_precision(prior, posterior.data, blank.to(prior.device), "recommend")
    reasons += [str(w.message) for w in caught if issubclass(w.category, RangeWarning)]
    if not isinstance(posterior.likelihood.operator, LinearOperator):
        reasons.append(
            "the operator is nonlinear: it is linearised at the denoised image of every step"
        )
    particles = _particles(posterior, seed, reasons)
    if particles is not None:
        pilot = {"seconds": seconds, "ess": particles[1]}
        return Recommendation(guidance, particles[0], tuple(reasons), posterior, pilot)
    reasons.append(f"moment matching: {why}")
    sampler, chi2 = _solver(posterior, seed, reasons)
    pilot = {"seconds": seconds, "reduced_chi2": chi2}
    return Recommendation(guidance, sampler, tuple(reasons), posterior, pilot)


def _count(likelihood: Likelihood) -> int:
    """How many data are not masked, of the fullest row."""
    count = likelihood.ndata
    return int(count.max()) if isinstance(count, Tensor) else int(count)


def _knows_its_errors(prior: ScoreModel) -> bool:
    return prior.analytic or prior.error_covariance() is not None


def _measured(prior: ScoreModel, seed: int) -> Guidance:
    """Moment matching with a table measured on the prior's own draws."""
    draws = sample(prior, _TABLE_DRAWS, DPMSolver(24, eta=1.0), seed=seed, progress=False)
    images = prior.to_model(draws.x.to(prior.device)).cpu()
    table = denoising_error(prior, images, bins=min(16, min(prior.shape[-2:]) // 2), seed=seed)
    return tabulated(covariance_from_table(table))


def _seconds(prior: ScoreModel) -> float:
    """Of one denoiser call on one image of a batch of four."""
    dtype = torch.promote_types(prior.dtype, torch.float32)
    rows = 4 if prior.rows is None else prior.rows
    x = torch.zeros(rows, *prior.shape, dtype=dtype, device=prior.device)
    t = prior.sde.time_grid(2)[1]
    spent = []
    for _ in range(2):  # the first call also sets things up
        begin = time.perf_counter()
        float(prior.denoise(x, t).sum())
        spent.append(time.perf_counter() - begin)
    return spent[-1] / rows


def _particles(
    posterior: Posterior, seed: int, reasons: list[str]
) -> tuple[TwistedSMC, float] | None:
    """Twisted SMC, if the data are few and a pilot's particles survive, and their least effective share."""
    prior, likelihood = posterior.prior, posterior.likelihood
    linear = isinstance(likelihood.operator, LinearOperator)
    count = _count(likelihood)
    few = _FEW_ANALYTIC if prior.analytic else _FEW_NETWORK
    if isinstance(prior, GaussianScore) and linear:
        return None  # moment matching is exact
    if not likelihood.noise.is_gaussian:
        return None
    if count > few:
        reasons.append(
            f"{count} data are more than {few}: particles would collapse, or cost a Jacobian product for each"
        )
        return None
    if likelihood.rows is not None:
        reasons.append(
            "every draw has data of its own; for particles, repeat each row by likelihood.repeat(particles)"
        )
        return None
    sampler = TwistedSMC(_PILOT_PARTICLES, _PILOT_STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draws = sample(posterior, _PILOT_PARTICLES, sampler, seed=seed, progress=False)
    share = float(draws.extras["ess"].min()) / _PILOT_PARTICLES
    error = float(draws.extras["log_evidence_error"][0])
    if any(issubclass(w.category, CollapseWarning) for w in caught):
        reasons.append(
            f"{count} data are few, but {_PILOT_PARTICLES} particles collapsed in the pilot (effective share {share:.2g})"
        )
        return None
    good = share > 0.3 and error < 0.3
    chosen = TwistedSMC(256, 100) if good else TwistedSMC(1024, 299)
    reasons.append(
        f"particles with exact weights, as {count} data are few: in the pilot {_PILOT_PARTICLES} of them kept an "
        f"effective share of {share:.2g} and log evidence to {error:.2g}, so {chosen.particles} in {chosen.steps} "
        f"steps are advised; n must be a multiple of {chosen.particles}"
    )
    return chosen, share


def _solver(posterior: Posterior, seed: int, reasons: list[str]) -> tuple[Sampler, float]:
    """The multistep solver, checked by whether a few draws reach the data."""
    prior, likelihood = posterior.prior, posterior.likelihood
    linear = isinstance(likelihood.operator, LinearOperator)
    exact = isinstance(prior, GaussianScore) and linear
    chosen = DPMSolver(_STEPS, eta=1.0)
    reduced = _reduced_chi2(posterior, chosen, seed)
    allowed = 1 + 5 * math.sqrt(2 / max(_count(likelihood), 1))
    if not exact and reduced > allowed:
        chosen = DPMSolver(2 * _STEPS, eta=1.0)
        before, reduced = reduced, _reduced_chi2(posterior, chosen, seed)
        reasons.append(
            f"{_STEPS} steps left a reduced chi2 of {before:.3g}, {2 * _STEPS} leave {reduced:.3g} "
            f"(at most {allowed:.3g} was expected)"
        )
        if reduced > allowed:
            reasons.append(
                "the draws do not reach the data: noise or operator may be wrong, the truth unlike what the prior "
                "knows, or the guidance too weak; look at the residuals, or end with MALA"
            )
    elif exact:
        reasons.append(
            "the prior is Gaussian and the operator linear, so nothing is approximated but time"
        )
    else:
        reasons.append(
            f"{_STEPS} steps with noise re-injected, which forgets the errors of earlier steps: {_PILOT_DRAWS} draws "
            f"of a pilot reach the data, reduced chi2 {reduced:.3g}"
        )
    if prior.analytic and not exact and likelihood.noise.is_gaussian:
        reasons.append(
            "evaluations are cheap, so chains of 60 moves after it repair what moment matching gets wrong locally; "
            "they do not move draws between modes"
        )
        return MALA(60, start=chosen), reduced
    return chosen, reduced


def _reduced_chi2(posterior: Posterior, sampler: Sampler, seed: int) -> float:
    """Mean over a few draws of chi2/m."""
    rows = posterior.rows
    ids = torch.arange(_PILOT_DRAWS if rows is None else min(rows, _PILOT_DRAWS))
    part = posterior.select(ids)
    x = sample(part, len(ids), sampler, seed=seed, progress=False).x.to(posterior.device)
    count = part.likelihood.ndata
    expected = count.to(x.device) if isinstance(count, Tensor) else count
    return float((part.likelihood.chi2(x) / expected).mean())
