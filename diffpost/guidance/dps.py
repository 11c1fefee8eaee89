"""Diffusion posterior sampling (Chung et al. 2023): the likelihood at the denoised image."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance, per_entry, tweedie_factor
from diffpost.likelihood import Likelihood
from diffpost.score import ScoreModel
from diffpost.sde import as_time, expand


@final
class DPS(Guidance):
    """p_t(y | x) = p(y | D(x, t)): the posterior of x_0 is taken as a point.

    Source: Chung et al. (2023, arXiv:2209.14687), Theorem 1 and eq. 16 (``normalise=False``)

        grad_x log p_t(y | x) = scale J^T A^T Sigma^-1 (y - A D),

    and their Algorithm 1, which replaces the weight by one over the norm of the residual. Their
    step is tied to 1000 ancestral steps; here the same shift is spread evenly over log nsr
    (``normalise=True``),

        D_y = D + scale alpha J^T A^T W^T W r sqrt(m) / (||W r|| sqrt(w)),   r = y - A D,  W^T W =
        Sigma^-1,

    with m data of mean weight w, so that with white noise the shift per unit of log nsr is
    ``scale`` in units of the prior, however large the residual. The norm is each entry's own.

    Exact for no prior of positive width: C_t is left out. Without normalisation the gradient grows
    as C_t/Sigma and explicit integrators diverge unless their steps resolve it; with it, the result
    is a good image rather than a sample of the posterior, and its variance means nothing.

    Costs one denoiser evaluation and one VJP.

    Args:
        scale: strength of the guidance (zeta' in the paper); positive.
        normalise: divide by the norm of the residual.

    Raises:
        ValueError: scale not positive.
    """

    def __init__(self, scale: float = 1.0, normalise: bool = True) -> None:
        if not scale > 0:
            raise ValueError(f"DPS(scale={scale}): expected a positive number.")
        self.scale = scale
        self.normalise = normalise

    def __repr__(self) -> str:
        return f"DPS(scale={self.scale}, normalise={self.normalise})"

    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        denoised, vjp = prior.denoise_vjp(x, t)
        residual = likelihood.residual(denoised)
        weighted = likelihood.noise.precision(residual)
        gradient = vjp(likelihood.operator.linearize(denoised).adjoint(weighted))
        if not self.normalise:
            return denoised + self.scale * tweedie_factor(prior.sde, x, t) * gradient
        # chi^2 = r^T Sigma^-1 r; an exact fit has no direction left to move in
        chi2 = (residual * weighted).flatten(1).sum(1)
        weight = likelihood.noise.precision(torch.ones_like(residual)).flatten(1).sum(1)
        count = torch.as_tensor(likelihood.ndata, device=x.device)
        size = per_entry(count / (chi2 * weight).clamp_min(1e-30).sqrt(), x)
        return denoised + self.scale * expand(prior.sde.alpha(as_time(t, x)), x) * size * gradient
