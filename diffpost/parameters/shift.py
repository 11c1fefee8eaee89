r"""How far the parameters would move under the true prior of images.

For draws theta_i of the collapsed posterior p_G(theta | y) and x_i of p(x | theta_i, y), let

    g_i = grad_z [log p(y | x_i, theta(z_i)) + log p(z_i)].

By Fisher's identity, E[g | theta] = grad_z log p(theta | y): the score of the posterior under the prior that x was drawn
from. Averaged over p_G(theta | y) the score of p_G itself vanishes, and what is left is the mean gradient of the log
ratio r = log p(y | theta) - log p_G(y | theta). To first order in r the posterior's mean moves by

    Cov(z) E[g].

It needs nothing but the draws. Its noise is that of the gradients: 1/rho standard deviations over the root of the
number of images, if theta is known rho times better with the image than without it, and a sampler of images that is off
by a share f of their standard deviation adds f/rho, unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.parameters.chains import value_and_gradient
from diffpost.parameters.family import ParametricLikelihood
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.result import JointSamples

__all__ = ["EvidenceShift", "evidence_shift", "image_gradients"]

_BATCH = 64


@final
@dataclass(frozen=True)
class EvidenceShift:
    """The shift of each parameter's posterior mean, in its posterior standard deviations.

    Attributes:
        names: of the parameters.
        shift: (P,).
        error: (P,) its standard error.
    """

    names: tuple[str, ...]
    shift: Tensor
    error: Tensor

    def __str__(self) -> str:
        pairs = zip(self.names, self.shift.tolist(), self.error.tolist(), strict=True)
        return ", ".join(f"{name} {s:+.2f} +- {e:.2f} sigma" for name, s, e in pairs)


def evidence_shift(
    joint: JointSamples, likelihood: ParametricLikelihood, prior: ParameterPrior
) -> EvidenceShift:
    """How far theta of :func:`sample_collapsed <diffpost.parameters.collapsed.sample_collapsed>` is off, to first order.

    Zero within its error where the Gaussian of images is as good as the prior that the images were drawn from.

    Args:
        joint: collapsed draws with images of the prior in question.
        likelihood: p(y | x, theta).
        prior: of theta, without an amplitude of the Gaussian, whose column of theta is left out by its name.

    Raises:
        ValueError: no images, or fewer than 8.
    """
    if joint.samples is None or len(joint.samples) < 8:
        raise ValueError("evidence_shift: expected joint samples with at least 8 images.")
    columns = [joint.names.index(name) for name in prior.names]
    theta = joint.samples.extras["theta"][:, columns].double()
    z = prior.unconstrain(theta).to(likelihood.y.device)
    g = image_gradients(likelihood, prior, z, joint.samples.x).cpu()
    all_z = prior.unconstrain(joint.theta[..., columns].double()).flatten(0, 1)
    off = all_z - all_z.mean(0)
    covariance = off.T @ off / max(len(off) - 1, 1)
    moved = g @ covariance / covariance.diagonal().sqrt()
    return EvidenceShift(prior.names, moved.mean(0), moved.std(0) / len(g) ** 0.5)


def image_gradients(
    likelihood: ParametricLikelihood, prior: ParameterPrior, z: Tensor, x: Tensor
) -> Tensor:
    """grad_z [log p(y | x_i, theta(z_i)) + log p(z_i)], z (n, P) and x (n, *shape) to (n, P)."""
    gradients = []
    for part in torch.arange(len(z)).split(_BATCH):
        images = x[part.to(x.device)].to(z.device).double()
        log_density = likelihood.given(prior, images)
        gradients.append(value_and_gradient(log_density, z[part.to(z.device)])[1])
    return torch.cat(gradients)
