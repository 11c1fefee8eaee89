r"""Parameters of a model of the data, without an image prior, under any noise: y = m(theta) + n.

    log p(theta | y) = log p_n(y - m(theta)) + log p(theta) + const

Gaussian noise knows its density; noise with a learned score s (:mod:`diffpost.learned_noise`; Legin et al. 2023,
arXiv:2302.03046) knows the gradient, -m'(theta)^T s(y - m(theta)), by which trajectories move, and differences of the
density, the line integral of s from one residual to the other, by which they are accepted. So chains are exact as far as
the score is the gradient of one density, for any model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from diffpost.noise import Noise
from diffpost.parameters.family import Values
from diffpost.parameters.prior import ParameterPrior

__all__ = ["ModelledData"]


@final
class ModelledData:
    """log p(theta(z) | y) of unconstrained coordinates z, up to a constant: a target for :func:`run_chains`.

    Called, it gives (B,) whose gradient is right. For learned noise its *value* is not: ``log_ratio`` is what kernels
    then accept by, and :class:`HMC <diffpost.parameters.hmc.HMC>` knows that; kernels without gradients do not.

    Args:
        y: (*data), or (B, *data) with a row for each chain.
        model: m(values), parameters by name (B,) to (B, *data); differentiable.
        noise: any with a score; learned noise costs an evaluation for a gradient and five or more for a ratio.
        prior: of the parameters.
        batched: whether y has rows.

    Raises:
        ValueError: data that are not finite, or noise that knows neither densities nor differences of them.
    """

    def __init__(
        self,
        y: Tensor,
        model: Callable[[Values], Tensor],
        noise: Noise,
        prior: ParameterPrior,
        *,
        batched: bool = False,
    ) -> None:
        self.y = y if batched else y[None]
        if not bool(self.y.isfinite().all()):
            raise ValueError(
                "ModelledData: y holds values that are not finite; mask them by the noise"
            )
        self.gaussian = noise.is_gaussian
        if not self.gaussian and not hasattr(noise, "log_ratio"):
            raise ValueError(
                f"ModelledData: got {noise!r}; expected GaussianNoise or LearnedNoise, which tell differences of log p"
            )
        self.noise, self.model, self.prior = noise, model, prior
        self.evaluations = 0  # of the noise's score, over all entries

    def residual(self, z: Tensor) -> Tensor:
        """y - m(theta(z)), (B, *data)."""
        found = self.model(self.prior.values(self.prior.constrain(z)))
        if len(self.y) not in (1, len(found)) or found.shape[1:] != self.y.shape[1:]:
            raise ValueError(
                f"ModelledData: the model made {tuple(found.shape)} of {len(z)} parameters for data "
                f"{tuple(self.y.shape)}; expected the same shape"
            )
        return self.y.to(found) - found

    def __call__(self, z: Tensor) -> Tensor:
        r = self.residual(z)
        if self.gaussian:
            return self.noise.log_prob(r).to(z) + self.prior.log_prob_z(z)
        # the gradient of s(r) . r with s held is that of log p
        held = r.detach()
        self.evaluations += len(held)
        with torch.no_grad():
            score = self.noise.score(held)
        return (score * r).flatten(1).sum(1).to(z) + self.prior.log_prob_z(z)

    def log_ratio(self, start: Tensor, end: Tensor) -> Tensor:
        """log p(end | y) - log p(start | y), (B, P) twice to (B,); not finite where a model is not."""
        with torch.no_grad():
            first, last = self.residual(start), self.residual(end)
            step = self.prior.log_prob_z(end) - self.prior.log_prob_z(start)
            if self.gaussian:
                return (self.noise.log_prob(last) - self.noise.log_prob(first)).to(start) + step
            wrong = ~last.flatten(1).isfinite().all(1)
            last = torch.where(wrong.reshape(-1, *[1] * (last.ndim - 1)), first, last)
            gain, _ = self.noise.log_ratio(first, last)
            return torch.where(wrong, -torch.inf, gain.to(start)) + step
