"""The interface of the integrators.

A score model defines, at every noise level, where clean images lie (``denoise``); a sampler turns
pure noise into a clean image by integrating a reverse-time equation down a grid of levels. With
u = x/alpha and nu = sigma/alpha (the noise-to-signal ratio) every process of ``diffpost.sde``
becomes u = x_0 + nu z, so one formula serves all of them. In lambda = -log nu the reverse-time
family that keeps the right marginals is (Xue et al. 2023, arXiv:2309.05019)

    du = -(1 + tau^2) (u - D(u, nu)) d lambda + tau nu sqrt(2) dW,

with D the denoiser: tau = 0 is the probability-flow ODE and tau = 1 the reverse SDE of Song et al.

The grid is uniform in log nu unless ``rho`` asks for Karras' spacing. Its two ends matter: a mode
of prior variance v starts with a fraction v/(v + nu_max^2) of its variance missing and ends,
because the last step returns the denoiser's mean, with a fraction nu_min^2/(v + nu_min^2) missing.
Choose nu_max well above the largest and nu_min well below the smallest standard deviation that
matters.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffpost.score import ScoreModel
from diffpost.sde import SDE

NoiseSource = Callable[..., Tensor]
"""``noise(like, stream=0)``: standard normals of the shape, dtype and device of ``like``."""


CLEAN = -math.inf
"""The time of the clean image. Not 0: some processes have noise sigma_min left at t = 0."""


@dataclass(frozen=True)
class State:
    """What an integrator carries from one level to the next.

    Attributes:
        x: the process at the current time, (B, *shape), at least float32. After the last step it is
            the clean sample.
        history: (log nsr, denoiser output) of earlier levels, newest first, for multistep methods.
        log_weights: (B,) importance weights of particle methods, or None.
        extras: what a sampler tells of every draw beside the draw, by name, each (B, ...).
    """

    x: Tensor
    history: tuple[tuple[float, Tensor], ...] = ()
    log_weights: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampler(ABC):
    """An integrator: ``steps`` levels of noise, then the clean image.

    Args:
        steps: number of noise levels, at least 2; the denoiser is evaluated at each of them.
        nsr_min, nsr_max: ends of the grid in noise-to-signal ratio; None takes the process's own.
        rho: None for levels uniform in log nsr, otherwise the exponent of Karras et al. (2022), eq.
            5.

    Raises:
        ValueError: fewer than 2 steps.
    """

    steps: int
    nsr_min: float | None = field(default=None, kw_only=True)
    nsr_max: float | None = field(default=None, kw_only=True)
    rho: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 2:
            raise ValueError(
                f"{type(self).__name__}(steps={self.steps!r}): expected an integer of at least 2."
            )

    @property
    def group(self) -> int:
        """Draws that are made together: n and every batch are whole groups of consecutive draws."""
        return 1

    def prepared(self, model: ScoreModel) -> Sampler:
        """This sampler with what it decides from the model decided; ``sample`` asks for it once, before it starts."""
        return self

    def times(self, sde: SDE) -> Tensor:
        """Times of the levels, (steps + 1,) float64 on the CPU, decreasing; the last is CLEAN."""
        grid = sde.time_grid(self.steps - 1, self.nsr_min, self.nsr_max, self.rho)
        grid = grid.detach().to("cpu", torch.float64)
        return torch.cat([grid, grid.new_full((1,), CLEAN)])

    def init(self, model: ScoreModel, noise: NoiseSource, n: int) -> State:
        """n states at the first level: x = sigma(t) z."""
        t = self.times(model.sde)[0]
        dtype = torch.promote_types(model.dtype, torch.float32)
        like = torch.zeros(n, *model.shape, dtype=dtype, device=model.device)
        return State(noise(like) * float(model.sde.sigma(t)))

    @abstractmethod
    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        """From time t to the earlier time s; s = CLEAN ends at the clean image."""


def run_down(
    sampler: Sampler, model: ScoreModel, state: State, noise: Callable[[int], NoiseSource]
) -> Tensor:
    """The clean images at the end of all steps from a state at the first level, ``noise(i)`` for step i."""
    times = sampler.times(model.sde)
    for i in range(len(times) - 1):
        state = sampler.step(model, state, times[i], times[i + 1], noise(i))
    return state.x


def levels(sde: SDE, t: Tensor) -> tuple[float, float]:
    """(alpha, nsr) at t as Python numbers. t lives on the CPU, so the device is not waited for."""
    return float(sde.alpha(t)), float(sde.nsr(t))


def denoise_u(model: ScoreModel, u: Tensor, t: Tensor, alpha: float) -> Tensor:
    """D(u, nu): the model's denoiser at x = alpha u, in the dtype of the state."""
    return model.denoise(alpha * u, t).to(u.dtype)
