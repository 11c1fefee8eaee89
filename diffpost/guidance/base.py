"""The interface of the guidances.

Given a prior with denoiser D(x, t) = E[x_0 | x_t = x] and data y = A(x_0) + n, Bayes' rule at noise
level t and Tweedie's formula give the denoiser of the posterior,

    D_y(x, t) = D(x, t) + sigma^2/alpha grad_x log p_t(y | x),   p_t(y | x) = int p(y | x_0) p(x_0 |
    x_t = x) dx_0.

The integral has no closed form in general; a guidance is an approximation of p(x_0 | x_t), usually
a Gaussian N(D, C_t), for which

    p_t(y | x) ~ N(y; A D, Sigma + A C_t A^T).

The exact covariance is C_t = sigma^2/alpha J with J = dD/dx (Tweedie's second order), and it
vanishes as t goes to 0, so every guidance that lets C_t vanish ends with the exact likelihood.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.score import ScoreModel
from diffpost.sde import SDE, as_time, expand


class Guidance(ABC):
    """An approximation of the likelihood of the data given a noisy image."""

    @abstractmethod
    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        """The posterior's denoiser, prior.denoise + sigma^2/alpha grad_x log p_t(y | x).

        Args:
            prior: denoiser without data.
            likelihood: the data, in the units of the prior (see ``Likelihood.pullback``). Data with
                a batch axis must have one row for each entry of x.
            x: (B, *shape) the process at time t.
            t: () or (B,) time.

        Returns:
            (B, *shape).
        """


def tweedie_factor(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """sigma^2/alpha at t, shaped to multiply x."""
    t = as_time(t, x)
    return expand(sde.sigma(t) ** 2 / sde.alpha(t), x)


def per_entry(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) shaped to multiply ``like`` (B, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def squared_nsr(sde: SDE, x: Tensor, t: Tensor) -> Tensor:
    """nsr^2 at t, float64: (), where t is, or (B,) on the device of x."""
    return sde.nsr(as_time(t, x)) ** 2
