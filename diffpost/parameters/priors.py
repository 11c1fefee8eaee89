r"""Priors of single parameters, and the coordinate in which chains see them.

Every prior is a smooth, increasing map of a standard normal z,

    theta = F^-1(Phi(z)),        log p(z) = log N(z; 0, 1) = log p(theta) + log d theta/dz,

with F its distribution function and Phi that of the normal. So bounds are at infinity, every parameter has the scale of
its prior, and a flat likelihood gives back a standard normal, in which chains have nothing to adapt to. Only an angle
is different: it has no bounds but a period, and z is the angle in units of its standard deviation, unwrapped.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

__all__ = ["Circular", "LogNormal", "Normal", "Prior", "Uniform"]

_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
_LEAST_TAIL = 1e-300  # whose quantile is finite
_LEAST_MASS = 1e-9  # of a normal within its bounds; below, the bounds are surely a mistake


class Prior(ABC):
    """The distribution of one parameter."""

    @property
    @abstractmethod
    def support(self) -> tuple[float, float]:
        """Between which values the density is positive."""

    @abstractmethod
    def log_prob(self, theta: Tensor) -> Tensor:
        """log p(theta), any shape; -inf outside the support."""

    @abstractmethod
    def constrain(self, z: Tensor) -> Tensor:
        """theta of the unconstrained coordinate z, any shape."""

    @abstractmethod
    def unconstrain(self, theta: Tensor) -> Tensor:
        """z of theta; infinite on the bounds, NaN outside."""

    @abstractmethod
    def log_jacobian(self, z: Tensor) -> Tensor:
        """log d theta/dz at z."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As :class:`ParameterPrior <diffpost.parameters.prior.ParameterPrior>` reads it."""

    @property
    def period(self) -> float | None:
        """After which values repeat, or None."""
        return None

    @property
    def z_period(self) -> float | None:
        """The period in z."""
        return None

    def log_prob_z(self, z: Tensor) -> Tensor:
        """log p(z) = log p(theta(z)) + log_jacobian(z)."""
        return -0.5 * z.square() - _LOG_ROOT_2PI


@final
@dataclass(frozen=True)
class Uniform(Prior):
    """Flat from low to high.

    Args:
        low, high: the bounds.

    Raises:
        ValueError: not finite, or low not below high.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"Uniform({self.low}, {self.high}): expected two finite numbers, the lower first."
            )

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    def log_prob(self, theta: Tensor) -> Tensor:
        inside = (theta >= self.low) & (theta <= self.high)
        # 0 * theta keeps the gradient, which is 0
        return torch.where(inside, 0 * theta - math.log(self.high - self.low), -math.inf)

    def constrain(self, z: Tensor) -> Tensor:
        tail = (self.high - self.low) * torch.special.ndtr(_lower(z))  # from the nearer bound
        return torch.where(z > 0, self.high - tail, self.low + tail)

    def unconstrain(self, theta: Tensor) -> Tensor:
        width = self.high - self.low
        below, above = (theta - self.low) / width, (self.high - theta) / width
        tail = torch.special.ndtri(torch.minimum(below, above))
        return torch.where(below > above, -tail, tail)

    def log_jacobian(self, z: Tensor) -> Tensor:
        return math.log(self.high - self.low) - 0.5 * z.square() - _LOG_ROOT_2PI

    def to_dict(self) -> dict[str, Any]:
        return {"uniform": [self.low, self.high]}


@final
@dataclass(frozen=True)
class Normal(Prior):
    """A normal distribution, cut at bounds if there are any.

    Args:
        mean, std: before it is cut.
        low, high: the bounds.

    Raises:
        ValueError: mean or std not finite, std not positive, low not below high, or bounds between which
            less than 1e-9 of the distribution lies.
    """

    mean: float
    std: float
    low: float = -math.inf
    high: float = math.inf
    _cut: tuple[float, float, float, bool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"Normal({self.mean}, {self.std}): expected a finite mean and a positive std."
            )
        if not self.low < self.high:
            raise ValueError(
                f"Normal(low={self.low}, high={self.high}): expected the lower bound first."
            )
        a, b = (self.low - self.mean) / self.std, (self.high - self.mean) / self.std
        # A tail is cut precisely where it is the lower one, so what lies above the mean is mirrored.
        mirrored = a + b > 0  # a + b is NaN for no bounds at all
        if mirrored:
            a, b = -b, -a
        below, above = _ndtr(a), _ndtr(-b)
        mass = _ndtr(b) - below
        if not mass > _LEAST_MASS:
            raise ValueError(
                f"Normal({self.mean}, {self.std}) within [{self.low}, {self.high}]: the bounds leave {mass:.2g} of the "
                "distribution; move its mean, or take a uniform prior."
            )
        object.__setattr__(self, "_cut", (below, above, mass, mirrored))

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def _free(self) -> bool:
        return math.isinf(self.low) and math.isinf(self.high)

    def log_prob(self, theta: Tensor) -> Tensor:
        value = -0.5 * ((theta - self.mean) / self.std).square() - _LOG_ROOT_2PI
        value = value - math.log(self.std) - math.log(self._cut[2])
        inside = (theta >= self.low) & (theta <= self.high)
        return torch.where(inside, value, -math.inf)

    def constrain(self, z: Tensor) -> Tensor:
        if self._free:
            return self.mean + self.std * z
        below, above, mass, mirrored = self._cut
        z = -z if mirrored else z
        left = z <= 0
        outside = torch.where(left, z.new_tensor(below), z.new_tensor(above))
        tail = outside + mass * torch.special.ndtr(_lower(z))
        q = torch.special.ndtri(tail.clamp_min(_LEAST_TAIL))
        q = torch.where(left, q, -q)
        theta = self.mean + self.std * (-q if mirrored else q)
        return theta.clamp(self.low, self.high)  # of rounding errors at the bounds

    def unconstrain(self, theta: Tensor) -> Tensor:
        q = (theta - self.mean) / self.std
        if self._free:
            return q
        below, above, mass, mirrored = self._cut
        q = -q if mirrored else q
        lower = (torch.special.ndtr(q) - below) / mass
        upper = (torch.special.ndtr(-q) - above) / mass
        z = torch.special.ndtri(torch.minimum(lower, upper))
        z = torch.where(lower > upper, -z, z)
        return -z if mirrored else z

    def log_jacobian(self, z: Tensor) -> Tensor:
        if self._free:
            return torch.full_like(z, math.log(self.std))
        return self.log_prob_z(z) - self.log_prob(self.constrain(z))

    def to_dict(self) -> dict[str, Any]:
        within = {} if self._free else {"within": [self.low, self.high]}
        return {"normal": [self.mean, self.std]} | within


@final
@dataclass(frozen=True)
class LogNormal(Prior):
    """The logarithm is normal, cut at bounds if there are any.

    Args:
        median: before it is cut; positive.
        sigma: standard deviation of the natural logarithm: 0.1 is about 10%.
        low, high: the bounds of the parameter itself.

    Raises:
        ValueError: median or sigma not positive and finite, a negative lower bound, or as :class:`Normal`.
    """

    median: float
    sigma: float
    low: float = 0.0
    high: float = math.inf
    _log: Normal = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (0 < self.median < math.inf and 0 < self.sigma < math.inf):
            raise ValueError(
                f"LogNormal({self.median}, {self.sigma}): expected a positive median and sigma."
            )
        if not 0 <= self.low < self.high:
            raise ValueError(
                f"LogNormal(low={self.low}, high={self.high}): expected 0 <= low < high."
            )
        low = math.log(self.low) if self.low > 0 else -math.inf
        log = Normal(math.log(self.median), self.sigma, low, math.log(self.high))
        object.__setattr__(self, "_log", log)

    @property
    def support(self) -> tuple[float, float]:
        return self.low, self.high

    def log_prob(self, theta: Tensor) -> Tensor:
        inside = (theta > 0) & (theta >= self.low) & (theta <= self.high)
        log = torch.where(inside, theta, self.median).log()
        return torch.where(inside, self._log.log_prob(log) - log, -math.inf)

    def constrain(self, z: Tensor) -> Tensor:
        theta = self._log.constrain(z).exp()
        return theta.clamp(self.low, self.high)

    def unconstrain(self, theta: Tensor) -> Tensor:
        return self._log.unconstrain(theta.log())

    def log_jacobian(self, z: Tensor) -> Tensor:
        return self._log.log_jacobian(z) + self._log.constrain(z)

    def to_dict(self) -> dict[str, Any]:
        within = {} if self._log._free else {"within": [self.low, self.high]}
        return {"lognormal": [self.median, self.sigma]} | within


@final
@dataclass(frozen=True)
class Circular(Prior):
    """Flat on a circle: an angle that repeats after a period, in which no direction is a bound.

    Chains see an unwrapped angle, so one whose posterior is narrow never meets a jump; draws are brought back to within
    half a period of their circular mean.

    Args:
        period: after which the operator repeats: 180 for the position angle of an ellipse in degrees, pi in radians.
        low: where the first period begins, from which draws of the prior are taken.

    Raises:
        ValueError: not finite, or a period that is not positive.
    """

    period_: float
    low: float = 0.0

    def __init__(self, period: float, low: float = 0.0) -> None:
        object.__setattr__(self, "period_", period)
        object.__setattr__(self, "low", low)
        if not (0 < period < math.inf and math.isfinite(low)):
            raise ValueError(
                f"Circular({period}, low={low}): expected a positive period and a finite low."
            )

    def __repr__(self) -> str:
        return f"Circular({self.period_}, low={self.low})"

    @property
    def period(self) -> float:
        return self.period_

    @property
    def z_period(self) -> float:
        return math.sqrt(12)  # of a uniform number of unit variance

    @property
    def support(self) -> tuple[float, float]:
        return -math.inf, math.inf

    @property
    def _unit(self) -> float:
        return self.period_ / self.z_period

    def log_prob(self, theta: Tensor) -> Tensor:
        """-log period: the density on the circle, at any winding."""
        return torch.full_like(theta, -math.log(self.period_))

    def constrain(self, z: Tensor) -> Tensor:
        return self.low + self._unit * z

    def unconstrain(self, theta: Tensor) -> Tensor:
        return (theta - self.low) / self._unit

    def log_jacobian(self, z: Tensor) -> Tensor:
        return torch.full_like(z, math.log(self._unit))

    def log_prob_z(self, z: Tensor) -> Tensor:
        return torch.full_like(z, -math.log(self.z_period))

    def to_dict(self) -> dict[str, Any]:
        return {"circular": [self.period_, self.low]}


def _lower(z: Tensor) -> Tensor:
    """-|z|, but with the slope -1 or 1 at 0 too."""
    return torch.where(z > 0, -z, z)


def _ndtr(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))
