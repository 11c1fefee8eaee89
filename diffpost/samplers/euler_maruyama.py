"""Euler-Maruyama on the reverse-time SDE.

The reverse of dx = f(x, t) dt + g(t) dw is dx = [f - g^2 grad log p_t] dt + g dw, with time running
backwards (Song et al. 2021, arXiv:2011.13456, eq. 6). The scheme freezes the bracket over a step:

    x_s = x_t + [f(x_t, t) - g(t)^2 score(x_t, t)] (s - t) + g(t) sqrt(t - s) z.

First order in the step: the variance of a Gaussian mode is off by a fraction of about the spacing
of the grid in log nsr, so it wants hundreds of steps. It is here as the yardstick that papers use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from diffpost.samplers.base import CLEAN, NoiseSource, Sampler, State
from diffpost.score import ScoreModel


@final
@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Reverse SDE by Euler-Maruyama (Song et al. 2021, arXiv:2011.13456, eq. 6 and appendix E).

    x_s = x_t + [f(x_t, t) - g(t)^2 score] (s - t) + g(t) sqrt(t - s) z; the last step returns the
    denoiser's mean. Costs ``steps`` evaluations. Arguments as in :class:`Sampler`.
    """

    def step(
        self, model: ScoreModel, state: State, t: Tensor, s: Tensor, noise: NoiseSource
    ) -> State:
        x = state.x
        if s == CLEAN:
            return State(model.denoise(x, t).to(x.dtype))
        sde = model.sde
        dt = float(s - t)
        g = float(sde.diffusion(t))
        velocity = sde.drift(x, t) - g**2 * model.score(x, t).to(x.dtype)
        return State(x + velocity * dt + g * (-dt) ** 0.5 * noise(x))
