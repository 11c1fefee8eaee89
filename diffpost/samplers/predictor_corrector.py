"""Predictor-corrector sampling of Song et al. 2021.

The predictor is their reverse-diffusion step; with u = x/alpha, nu = sigma/alpha it is, for every
process, the one that they write for the variance-exploding SDE (Algorithm 2),

    u <- u + (nu_t^2 - nu_s^2) grad_u log p + sqrt(nu_t^2 - nu_s^2) z,

and the corrector is Langevin dynamics at the new level (Algorithms 4 and 5),

    u <- u + eps grad_u log p + sqrt(2 eps) z,      eps = 2 (snr ||z|| / ||grad_u log p||)^2.

Song's code averages both norms over the batch, so a draw depends on its neighbours. Here ||z|| is
its expectation sqrt(d) and ||grad|| is the entry's own norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.samplers.base import CLEAN, NoiseSource, Sampler, State, denoise_u, levels
from diffpost.score import ScoreModel


@final
@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    """Reverse diffusion with Langevin corrections (Song et al. 2021, arXiv:2011.13456, Alg. 2-5).

    Costs (steps - 1)(1 + corrector_steps) + 1 evaluations. First order, and the Langevin step keeps
    a bias of order snr^2 because its size depends on the state: a baseline, not a recommendation.
    The step follows the gradient's norm, which fluctuates by 1/sqrt(2 d): below some ten pixels it
    is erratic, so eps is never taken larger than nu^2, the largest step that Langevin dynamics on
    noise of that level stands.

    Args:
        corrector_steps: Langevin steps per level.
        snr: Song's signal-to-noise ratio r of the Langevin step (0.16 for their VE models).
        Others as in :class:`Sampler`.

    Raises:
        ValueError: corrector_steps < 0 or snr <= 0.
    """

    corrector_steps: int = 1
    snr: float = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.corrector_steps < 0 or not self.snr > 0:
            raise ValueError(
                f"PredictorCorrector(corrector_steps={self.corrector_steps}, snr={self.snr}): "
                "expected corrector_steps >= 0 and snr > 0."
            )

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        sde = model.sde
        alpha, nu = levels(sde, t)
        u = state.x / alpha
        denoised = denoise_u(model, u, t, alpha)
        if s == CLEAN:
            return State(denoised)
        alpha, new = levels(sde, s)
        removed = nu**2 - new**2
        u = u + removed / nu**2 * (denoised - u) + removed**0.5 * noise(u)
        for j in range(self.corrector_steps):
            gradient = (denoise_u(model, u, s, alpha) - u) / new**2
            flat = gradient.flatten(1)
            mean_square = flat.square().mean(1).clamp_min(torch.finfo(u.dtype).tiny)
            eps = (2 * self.snr**2 / mean_square).clamp_max(new**2)
            eps = eps.reshape(-1, *[1] * (u.ndim - 1))
            u = u + eps * gradient + (2 * eps).sqrt() * noise(u, stream=1 + j)
        return State(alpha * u)
