"""Convolved likelihood: x_t/alpha as a noisy measurement of x_0, with no prior in between.

If the prior is flat on the scale of the noise, p(x_0 | x_t) = N(x_t/alpha, nsr^2 I), and the
likelihood of the data is the exact one convolved with that Gaussian. The seed papers of
strong-lensing reconstruction with score models use it (Adam et al. 2022, arXiv:2211.03812; Remy et
al. 2022, arXiv:2201.05561, for mass maps).
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from diffpost.guidance.base import Guidance, squared_nsr
from diffpost.likelihood import Likelihood
from diffpost.score import ScoreModel
from diffpost.sde import as_time, expand


@final
class Convolved(Guidance):
    """p_t(y | x) = N(y; A x/alpha, Sigma + nsr^2 A A^T).

    Source: Remy et al. (2022, arXiv:2201.05561) and Adam et al. (2022, arXiv:2211.03812),
        "convolved
    likelihood". A nonlinear A is linearised at x/alpha.

    Exact for a flat prior only. Otherwise the prior does not tell the data which part of x_t is
    noise, and the draws are biased towards the data in every mode whose prior variance is not far
    above nsr^2.

    Costs one denoiser evaluation, no VJP, and a solve with Sigma + nsr^2 A A^T, which is exact and
    fast for operators with structure.

    Args:
        tol: relative tolerance of the solve where it is iterative.
    """

    def __init__(self, tol: float = 1e-6) -> None:
        self.tol = tol

    def __repr__(self) -> str:
        return f"Convolved(tol={self.tol})"

    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        denoised = prior.denoise(x, t)
        s = squared_nsr(prior.sde, x, t)
        u = x / expand(prior.sde.alpha(as_time(t, x)), x)
        linear = likelihood.operator.linearize(u)
        report = likelihood.solve_operator(linear, likelihood.residual(u), s, tol=self.tol)
        return denoised + expand(s, x) * linear.adjoint(report.x)
