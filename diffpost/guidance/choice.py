"""Which guidance a posterior takes when none is named: moment matching, with C_t as prior and data allow.

Moment matching is exact for Gaussian priors and linear operators and the least biased of the guidances elsewhere. What
differs is where C_t comes from: in closed form where the prior has one; from the table of denoising errors that
training leaves in the prior's card, at no Jacobian product a step until the noise is near
that of the data; from the Jacobian itself where the data are few; and otherwise white, of a variance above that of any mode, which follows the data slowly. (With a smaller one, smooth
modes are moved too far in every step and the trajectory breaks up.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from diffpost.guidance.base import Guidance
from diffpost.guidance.covariance import Covariance, IsotropicCovariance
from diffpost.guidance.gain import finest_std
from diffpost.guidance.moment_matching import MomentMatching
from diffpost.likelihood import Likelihood
from diffpost.operators.base import LinearOperator, numel
from diffpost.score import ScoreModel
from diffpost.structured import counts_effective_data

__all__ = ["Choice", "choose", "tabulated"]

# Linear solves: a twentieth of the standard deviation at a noise level is forgotten at the next, and on a
# bright target takes several times fewer iterations than a residual of 0.1% would.
_TOL, _MAX_ITER, _ACCURACY = 1e-3, 1000, 0.05
_WHITE = 10.0  # in the prior's own units squared
_LATE = 10.0  # times the data's finest standard deviation: noise from which on the table is matched
_FEW = 64  # data for which a Jacobian product for each in every step is acceptable


@final
@dataclass(frozen=True)
class Choice:
    """A guidance and why, in one sentence."""

    guidance: Guidance
    why: str


def tabulated(
    covariance: Covariance, *, enlarge: bool = False, match_below: float | None = None
) -> MomentMatching:
    """Moment matching with a table of denoising errors in the Jacobian's place."""
    return MomentMatching(
        tol=_TOL,
        max_iter=_MAX_ITER,
        covariance=covariance,
        differentiate=False,
        accuracy=_ACCURACY,
        enlarge=enlarge,
        match_below=match_below,
    )


def finest(prior: ScoreModel, likelihood: Likelihood) -> float | None:
    """The standard deviation to which the data fix the image at best, in the prior's units; None where they say nothing,
    or differently for every image.
    """
    if not isinstance(likelihood.operator, LinearOperator):
        return None
    rows = likelihood.rows
    blank = torch.zeros(
        1 if rows is None else rows,
        *prior.shape,
        dtype=torch.promote_types(prior.dtype, torch.float32),
        device=prior.device,
    )
    scale = float(torch.as_tensor(prior.scale).double().abs().max())
    std = finest_std(likelihood, blank)
    return None if std is None else std / scale


def choose(prior: ScoreModel, likelihood: Likelihood) -> Choice:
    """The guidance for a prior and data, from their structure; the prior is not evaluated, the operator a few times."""
    if prior.analytic:
        return Choice(
            MomentMatching(max_iter=_MAX_ITER),
            "the prior knows its Jacobian in closed form, so the covariance of moment matching is exact",
        )
    covariance = prior.error_covariance()
    if covariance is not None:
        operator = likelihood.operator
        known = isinstance(operator, LinearOperator) and counts_effective_data(
            operator, likelihood.noise, tuple(prior.shape), likelihood.data_shape
        )
        precise = finest(prior, likelihood)
        late = None if precise is None else float(f"{_LATE * precise:.3g}")
        return Choice(
            tabulated(covariance, enlarge=known, match_below=late),
            "the prior keeps a table of its denoising errors, which stands in for the Jacobian at one network call a "
            "step and no product with it until the noise is near that of the data",
        )
    if numel(likelihood.data_shape) <= _FEW:
        return Choice(
            MomentMatching(max_iter=_MAX_ITER),
            f"there are at most {_FEW} data, so the Jacobian itself is affordable",
        )
    guidance = MomentMatching(
        tol=_TOL, max_iter=_MAX_ITER, covariance=IsotropicCovariance(_WHITE), accuracy=_ACCURACY
    )
    return Choice(
        guidance,
        "the prior has neither a closed form nor a table of its denoising errors, so its errors are taken to be white; "
        "dp.recommend measures such a table",
    )
