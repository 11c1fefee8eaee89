"""Pseudoinverse-guided diffusion (Song et al. 2023): an isotropic posterior of x_0."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance, squared_nsr, tweedie_factor
from diffpost.likelihood import Likelihood
from diffpost.score import ScoreModel


@final
class PiGDM(Guidance):
    """p(x_0 | x_t) = N(D, r_t^2 I) with r_t^2 = v nsr^2 / (v + nsr^2).

    Source: Song, Vahdat, Mardani & Kautz (2023, "Pseudoinverse-guided diffusion models for inverse
    problems", ICLR), section 3.2:

        grad_x log p_t(y | x) = J^T A^T (Sigma + r_t^2 A A^T)^-1 (y - A D).

    Their r_t^2 = sigma^2/(1 + sigma^2) is v = 1, data of unit variance. A nonlinear A is linearised
    at D.

    Exact for a white Gaussian prior of variance v. For images, whose large scales vary far more
    than v and whose small scales far less, the covariance is too small on large scales and too
    large on small ones. The shift of a mode of true variance c is c/r_t^2 times what data of high
    signal-to-noise ask for: where c is many times r_t^2, samplers overshoot and diverge, and v
    must be raised towards the variance of the largest scales.

    Costs one denoiser evaluation and one VJP, and a solve with Sigma + r_t^2 A A^T.

    Args:
        variance: v, the prior's variance per pixel in the prior's own units; None is 1.
        tol: relative tolerance of the solve where it is iterative.

    Raises:
        ValueError: variance not positive.
    """

    def __init__(self, variance: float | None = None, tol: float = 1e-6) -> None:
        if variance is not None and not variance > 0:
            raise ValueError(f"PiGDM(variance={variance}): expected a positive number or None.")
        self.variance = 1.0 if variance is None else float(variance)
        self.tol = tol

    def __repr__(self) -> str:
        return f"PiGDM(variance={self.variance}, tol={self.tol})"

    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        denoised, vjp = prior.denoise_vjp(x, t)
        s = squared_nsr(prior.sde, x, t)
        s = torch.where(s > 0, 1 / (1 / self.variance + 1 / s), s)
        linear = likelihood.operator.linearize(denoised)
        report = likelihood.solve_operator(linear, likelihood.residual(denoised), s, tol=self.tol)
        return denoised + tweedie_factor(prior.sde, x, t) * vjp(linear.adjoint(report.x))
