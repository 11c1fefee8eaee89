r"""Forward processes and time grids.

A forward process turns an image into noise,

    dx = f(t) x dt + g(t) dw,        x_t = alpha(t) x_0 + sigma(t) z,        z ~ N(0, I),

with t = 0 clean.  The schedules alpha and sigma are what is chosen; drift and diffusion follow,

    f = d log(alpha)/dt,        g^2 = d sigma^2/dt - 2 f sigma^2

(Song et al. 2021, arXiv:2011.13456, equations 29-33; Karras et al. 2022, arXiv:2206.00364,
appendix B).  Divided by alpha, every process is u = x_0 + nsr z with nsr = sigma/alpha, the
noise-to-signal ratio: processes differ only in how they label noise levels by t and how they scale
x.  Grids are therefore laid out in nsr.  Schedules are meant for float64: nsr spans several
decades, and t near an end of its range does not resolve them in float32.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["EDM", "SDE", "TSVE", "VE", "VP", "as_time", "expand", "sde_from_dict"]


def expand(t: Tensor, x: Tensor) -> Tensor:
    """A schedule's value, () or (B,), in the dtype of x (B, ...) and shaped to multiply it.

    Raises:
        ValueError: t is neither () nor (B,).
    """
    if t.ndim == 0:
        # A scalar on the CPU multiplies tensors of any device without a transfer.
        return t.to(x.dtype) if t.device.type == "cpu" else t.to(device=x.device, dtype=x.dtype)
    if t.ndim != 1 or t.shape[0] != x.shape[0]:
        raise ValueError(
            f"got a time or schedule of shape {tuple(t.shape)} for a batch of shape "
            f"{tuple(x.shape)}; expected () or ({x.shape[0] if x.ndim else 'B'},)"
        )
    return t.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """t as float64 for the schedules of a batch x; (B,) on the device of x, () where it is."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return t if t.ndim == 0 else t.to(x.device)


class SDE(ABC):
    """A forward process x_t = alpha(t) x_0 + sigma(t) z on t_min <= t <= t_max.

    Schedules take t of any shape and answer in its shape, dtype and device.  Processes are
    immutable and compare by value.
    """

    @property
    @abstractmethod
    def t_min(self) -> float:
        """Smallest time, where images are considered clean."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """Largest time, where images are considered noise."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the image at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise at t, in the units of x."""

    @abstractmethod
    def log_alpha_dot(self, t: Tensor) -> Tensor:
        """d log(alpha)/dt."""

    @abstractmethod
    def sigma2_dot(self, t: Tensor) -> Tensor:
        """d sigma^2/dt."""

    @abstractmethod
    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        """The time at which sigma/alpha is `nsr`."""

    @abstractmethod
    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which the noise has standard deviation `sigma`."""

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma/alpha."""
        return self.sigma(t) / self.alpha(t)

    @property
    def nsr_range(self) -> tuple[float, float]:
        """Noise-to-signal ratios at t_min and t_max."""
        ends = torch.tensor([self.t_min, self.t_max], dtype=torch.float64)
        low, high = self.nsr(ends).tolist()
        return low, high

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2/sigma^2, in variance."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        """f(t) x, (B, *shape)."""
        return expand(self.log_alpha_dot(t), x) * x

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), with g^2 = d sigma^2/dt - 2 d log(alpha)/dt sigma^2."""
        return (self.sigma2_dot(t) - 2 * self.log_alpha_dot(t) * self.sigma(t) ** 2).sqrt()

    def perturb(self, x0: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """alpha(t) x0 + sigma(t) z, for x0 and z (B, *shape) and t () or (B,)."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * z

    def time_grid(
        self,
        steps: int,
        nsr_min: float | None = None,
        nsr_max: float | None = None,
        rho: float | None = None,
    ) -> Tensor:
        """Decreasing times, (steps + 1,) float64, both ends included.

        Args:
            steps: number of intervals.
            nsr_min, nsr_max: noise-to-signal ratios of the ends; None is that of t_min or t_max.
            rho: None spaces nsr uniformly in its logarithm, a number uniformly in nsr^(1/rho)
                (Karras et al. 2022, arXiv:2206.00364, equation 5, which takes 7).

        Raises:
            ValueError: steps < 1, rho not positive, or ends outside the process or not increasing.
        """
        if steps < 1:
            raise ValueError(f"time_grid(steps={steps}): expected at least 1.")
        if rho is not None and not 0 < rho < math.inf:
            raise ValueError(
                f"time_grid(rho={rho}): expected a positive number, or None for log spacing."
            )
        lowest, highest = self.nsr_range
        low = lowest if nsr_min is None else float(nsr_min)
        high = highest if nsr_max is None else float(nsr_max)
        slack = 1e-9  # a limit that went through t_of_nsr comes back with round-off
        if not (lowest * (1 - slack) <= low < high <= highest * (1 + slack)):
            raise ValueError(
                f"time_grid(nsr_min={nsr_min}, nsr_max={nsr_max}): expected nsr_min < nsr_max "
                f"within {lowest:g} to {highest:g}, the noise-to-signal ratios of {self}. "
                "Choose other ends, or a process with a wider range."
            )
        w = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        if rho is None:
            nsr = torch.exp(math.log(low) + w * (math.log(high) - math.log(low)))
        else:
            nsr = (low ** (1 / rho) + w * (high ** (1 / rho) - low ** (1 / rho))) ** rho
        times = self.t_of_nsr(nsr)
        # The ends exactly, without the round-off of nsr and back.
        if nsr_max is None:
            times[0] = self.t_max
        if nsr_min is None:
            times[-1] = self.t_min
        return times.clamp(self.t_min, self.t_max)

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters as JSON values; `sde_from_dict` reads them."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {"name": type(self).__name__, **{f.name: getattr(self, f.name) for f in fields}}


@final
@dataclass(frozen=True)
class VE(SDE):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^(t/T).

    Song et al. 2021, arXiv:2011.13456, equation 31; score_models' VESDE.

    Args:
        sigma_min, sigma_max: noise at t = 0 and t = T.
        T: largest time.
        t_min: smallest time.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and 0 <= t_min < T.
    """

    sigma_min: float = 1e-2
    sigma_max: float = 50.0
    T: float = 1.0
    t_min: float = 0.0

    def __post_init__(self) -> None:
        _check_increasing(self, "sigma_min", "sigma_max", positive=True)
        _check_increasing(self, "t_min", "T", positive=False)

    @property
    def t_max(self) -> float:
        return self.T

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min) / self.T

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + self._rate * t)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma2_dot(self, t: Tensor) -> Tensor:
        return 2 * self._rate * self.sigma(t) ** 2

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return (nsr.log() - math.log(self.sigma_min)) / self._rate

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self.t_of_nsr(sigma)


@final
@dataclass(frozen=True)
class VP(SDE):
    """Variance preserving: alpha = exp(-I/2), sigma^2 = 1 - alpha^2, I the integral of beta(t).

    beta(t) = beta_min + (beta_max - beta_min) t, Song et al. 2021, arXiv:2011.13456, equations
    32-33; score_models' VPSDE.

    Args:
        beta_min, beta_max: beta at t = 0 and t = 1.
        t_min: smallest time; positive, since there is no noise at 0.
        t_max: largest time.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max and 0 < t_min < t_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"{self}: expected 0 < beta_min <= beta_max, both finite.")
        _check_increasing(self, "t_min", "t_max", positive=True)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t) * t

    def _t_of_integral(self, integral: Tensor) -> Tensor:
        # The root of the quadratic in the form that does not cancel for small t.
        curvature = 2 * (self.beta_max - self.beta_min)
        return 2 * integral / (self.beta_min + (self.beta_min**2 + curvature * integral).sqrt())

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def nsr(self, t: Tensor) -> Tensor:
        return torch.expm1(self._integral(t)).sqrt()

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    def sigma2_dot(self, t: Tensor) -> Tensor:
        return self._beta(t) * torch.exp(-self._integral(t))

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return self._t_of_integral(torch.log1p(nsr**2))

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-(sigma**2)))


@final
@dataclass(frozen=True)
class TSVE(SDE):
    """Truncated scaled variance exploding, as in score_models 0.5.11.

    log(alpha) = -beta r(t/T - t_star), sigma = alpha sigma_min (sigma_max/sigma_min)^(t/T), with r
    the positive part: the process VE until t_star, from where x shrinks so that its noise grows
    more slowly, or not at all. sigma/alpha is that of VE.

    Args:
        sigma_min, sigma_max: noise-to-signal ratio at t = 0 and t = T.
        t_star: where the scaling sets in, in units of T.
        beta: its slope.
        T: largest time.
        t_min: smallest time.
        ramp: r, one of "relu", "silu", "hardswish" (score_models' `beta_fn`); the smooth ones are
            r(z) = f(k z)/k.
        sharpness: k (score_models' `alpha`).

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, 0 <= t_min < T, 0 <= t_star, 0 <= beta and
            sharpness > 0, or for another ramp.
    """

    sigma_min: float = 1e-2
    sigma_max: float = 50.0
    t_star: float = 0.5
    beta: float = 1.0
    T: float = 1.0
    t_min: float = 0.0
    ramp: Literal["relu", "silu", "hardswish"] = "relu"
    sharpness: float = 30.0

    def __post_init__(self) -> None:
        _check_increasing(self, "sigma_min", "sigma_max", positive=True)
        _check_increasing(self, "t_min", "T", positive=False)
        if not (0 <= self.beta < math.inf and 0 <= self.t_star < math.inf):
            raise ValueError(f"{self}: expected beta and t_star finite and not negative.")
        if self.ramp not in ("relu", "silu", "hardswish") or not 0 < self.sharpness < math.inf:
            raise ValueError(
                f"{self}: expected the ramp 'relu', 'silu' or 'hardswish' and a positive sharpness."
            )

    @property
    def t_max(self) -> float:
        return self.T

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min) / self.T

    def _log_alpha(self, t: Tensor) -> Tensor:
        z = t / self.T - self.t_star
        if self.ramp == "relu":
            return -self.beta * functional.relu(z)
        smooth = functional.silu if self.ramp == "silu" else functional.hardswish
        return -self.beta * smooth(self.sharpness * z) / self.sharpness

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_alpha(t) + math.log(self.sigma_min) + self._rate * t)

    def nsr(self, t: Tensor) -> Tensor:
        return torch.exp(math.log(self.sigma_min) + self._rate * t)

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        z = t / self.T - self.t_star
        if self.ramp == "relu":
            slope = (z > 0).to(t.dtype)
        elif self.ramp == "silu":
            gate = torch.sigmoid(self.sharpness * z)
            slope = gate * (1 + self.sharpness * z * (1 - gate))
        else:
            k = self.sharpness * z
            slope = torch.where(k.abs() <= 3, (2 * k + 3) / 6, (k > 3).to(t.dtype))
        return -self.beta / self.T * slope

    def sigma2_dot(self, t: Tensor) -> Tensor:
        return 2 * (self._rate + self.log_alpha_dot(t)) * self.sigma(t) ** 2

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return (nsr.log() - math.log(self.sigma_min)) / self._rate

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which the noise is `sigma`, from sigma(t_min) to sigma(t_max).

        Raises:
            ValueError: sigma(t) does not increase throughout (beta too large), so there may be two.
        """
        rate = self._rate * self.T
        steepest = {"relu": 1.0, "silu": 1.0998393194, "hardswish": 1.5}[self.ramp]
        if self.beta * steepest >= rate:
            raise ValueError(
                f"{self}: sigma does not increase where beta (times {steepest:g}) is at least "
                f"log(sigma_max/sigma_min) = {rate:g}; use t_of_nsr."
            )
        if self.ramp != "relu":
            return _bisect(self.sigma, sigma, self.t_min, self.t_max)
        level = sigma.log() - math.log(self.sigma_min)  # rate z, then (rate - beta) z + beta t_star
        z = torch.where(
            level <= rate * self.t_star,
            level / rate,
            (level - self.beta * self.t_star) / (rate - self.beta),
        )
        return z * self.T


@final
@dataclass(frozen=True)
class EDM(SDE):
    """alpha = 1, sigma = t: time is the noise level itself.

    Karras et al. 2022, arXiv:2206.00364, section 3.

    Args:
        sigma_min, sigma_max: ends of the range.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 2e-3
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_increasing(self, "sigma_min", "sigma_max", positive=True)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def log_alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma2_dot(self, t: Tensor) -> Tensor:
        return 2 * t

    def t_of_nsr(self, nsr: Tensor) -> Tensor:
        return nsr.clone()

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


def sde_from_dict(values: Mapping[str, Any]) -> SDE:
    """The process that `SDE.to_dict` wrote.

    Raises:
        ValueError: an unknown name or parameter.
    """
    given = dict(values)
    name = given.pop("name", None)
    classes: dict[str, type[SDE]] = {"VE": VE, "VP": VP, "TSVE": TSVE, "EDM": EDM}
    cls = classes.get(str(name))
    if cls is None:
        raise ValueError(f"got a process named {name!r}; expected 'VE', 'VP', 'TSVE' or 'EDM'")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if not given.keys() <= known:
        unknown = sorted(given.keys() - known)
        raise ValueError(f"got {unknown} for {name}; expected parameters among {sorted(known)}")
    return cls(**given)


def _check_increasing(sde: SDE, low: str, high: str, *, positive: bool) -> None:
    a, b = getattr(sde, low), getattr(sde, high)
    if not (a < b < math.inf and (a > 0 or (a == 0 and not positive))):
        raise ValueError(f"{sde}: expected 0 {'<' if positive else '<='} {low} < {high}, finite.")


def _bisect(f: Callable[[Tensor], Tensor], value: Tensor, low: float, high: float) -> Tensor:
    """t with f(t) = value for an increasing f; an end for values outside [f(low), f(high)]."""
    target = value.to(torch.float64)
    a, b = torch.full_like(target, low), torch.full_like(target, high)
    for _ in range(60):
        middle = 0.5 * (a + b)
        below = f(middle) < target
        a, b = torch.where(below, middle, a), torch.where(below, b, middle)
    return (0.5 * (a + b)).to(value.dtype)
