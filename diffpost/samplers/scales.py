r"""The noise levels between which a posterior is decided, from the model itself.

Above the widest scale of the prior an image is lost in the noise, and below the narrowest scale of the posterior the
noise is lost in the image. Both follow from the Jacobian of the denoiser, J = C_t/nsr^2 in u = x/alpha with C_t the
covariance of p(x_0 | x_t): a direction of variance v has the eigenvalue j = v/(v + nsr^2), so v = nsr^2 j/(1 - j),
with the largest j at the largest noise for the widest direction, and the largest 1 - j at the smallest noise for the
narrowest. Eigenvalues come by power iteration.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.gain import largest_eigenvalue, largest_gain
from diffpost.likelihood import Likelihood
from diffpost.samplers.base import levels
from diffpost.score import ScoreModel

__all__ = ["RangeWarning", "ends", "largest_gain", "narrowest", "widest"]

_STARTS = 4
_ABOVE = 8.0  # times the widest standard deviation: 1.6% of its variance is missing at the start
_LEAST_ABOVE = 4.0
_BELOW = 0.05  # times the narrowest standard deviation: 0.25% of its variance is missing at the end


@final
class RangeWarning(UserWarning):
    """A process does not reach the noise at which nothing of its images is left."""


def widest(model: ScoreModel) -> float:
    """Standard deviation of the model along its widest direction, in model units, seen at its largest noise.

    Right for a Gaussian; where the largest noise is not well above it, others look narrower than they are.
    """
    t = torch.tensor(model.sde.t_max, dtype=torch.float64)
    _, nu = levels(model.sde, t)
    x = _blank(model, _STARTS)
    x = model.denoise(x, t).to(x) * float(model.sde.alpha(t))
    _, vjp = model.denoise_vjp(x, t)
    alpha = float(model.sde.alpha(t))
    kept = min(max(largest_eigenvalue(lambda v: alpha * vjp(v), x), 0.0), 1 - 1e-6)
    return nu * math.sqrt(kept / (1 - kept))


def narrowest(model: ScoreModel, x: Tensor) -> float:
    """Standard deviation of the model along its narrowest direction at images x (B, *shape), in model units.

    0 where the smallest noise of the process does not resolve it, and at most 1000 times that noise, beyond which 1 - J
    is lost in rounding errors.
    """
    t = torch.tensor(model.sde.t_min, dtype=torch.float64)
    alpha, nu = levels(model.sde, t)
    _, vjp = model.denoise_vjp(alpha * x, t)
    left = max(largest_eigenvalue(lambda v: v - alpha * vjp(v), x), 1e-6)
    return nu * math.sqrt(max(1 / left - 1, 0.0))


def ends(
    prior: ScoreModel, likelihood: Likelihood, images: Callable[[int], Tensor], name: str
) -> tuple[float, float]:
    """nsr of the last and the first level that a posterior needs, within the prior's process.

    Args:
        prior: in its own units.
        likelihood: in the prior's units.
        images: n -> (n, *shape) rough draws of the prior, in its units.
        name: of who asks, for messages.
    """
    lowest, highest = prior.sde.nsr_range
    spread = warn_of_range(prior, name)
    rows = likelihood.rows
    if rows is not None:  # of many observations some
        ids = torch.linspace(0, rows - 1, min(_STARTS, rows)).long()
        likelihood = likelihood.select(ids)
    x = images(_STARTS if rows is None else len(ids))
    gain = warn_of_precision(prior, likelihood, x, name)
    width = narrowest(prior, x[:_STARTS])
    finest = 1 / math.sqrt(1 / width**2 + gain) if width > 0 else 0.0
    high = min(highest, _ABOVE * spread)
    low = min(max(lowest, _BELOW * finest), 0.1 * high)
    return _rounded(low, lowest, highest), _rounded(high, lowest, highest)


def warn_of_range(prior: ScoreModel, name: str) -> float:
    """The prior's widest standard deviation; a :class:`RangeWarning` where its process does not reach well above it."""
    _, highest = prior.sde.nsr_range
    spread = widest(prior)
    if spread * _LEAST_ABOVE > highest:
        warnings.warn(
            f"{name}: the prior is {spread:.3g} wide (standard deviation of its widest direction) and its process "
            f"ends at a noise-to-signal ratio of {highest:.3g}, where images are not lost in the noise yet; draws "
            f"will miss part of the prior. Take a process that reaches {_ABOVE * spread:.3g}.",
            RangeWarning,
            stacklevel=3,
        )
    return spread


def warn_of_precision(prior: ScoreModel, likelihood: Likelihood, x: Tensor, name: str) -> float:
    """The data's largest gain at images x (B, *shape); a :class:`RangeWarning` where the data are more precise than
    the smallest noise of the process, which is where every sampler ends.
    """
    lowest, _ = prior.sde.nsr_range
    gain = largest_gain(likelihood, x)
    if gain * lowest**2 > 1:
        warnings.warn(
            f"{name}: the data fix some direction of the image to {1 / math.sqrt(gain):.3g} (standard deviation, in the "
            f"prior's units) and its process ends at a noise-to-signal ratio of {lowest:.3g}; draws will scatter less "
            "than they should there. Take a process that goes lower, if the prior is known there.",
            RangeWarning,
            stacklevel=3,
        )
    return gain


def _rounded(value: float, low: float, high: float) -> float:
    """To three digits, so that rounding errors do not tell one run from another; within the range."""
    return min(max(float(f"{value:.3g}"), low), high)


def _blank(model: ScoreModel, n: int) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    return torch.zeros(n, *model.shape, dtype=dtype, device=model.device)
