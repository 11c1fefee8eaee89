r"""A mildly nonlinear problem in two dimensions, its posterior by quadrature.

The image of a compact source at x = (a, b) behind a mass of unit Einstein radius stands at

    theta_+- = (|x| +- sqrt(|x|^2 + 4))/2    in the direction of x

(the point-mass lens, e.g. Narayan & Bartelmann 1996, astro-ph/9606001, equation 20). The data are the position of
the outer image and the separation of both; the prior is N(m, s^2 I), with m off the axis so that the map is mildly
nonlinear within it and bends the posterior. Behind the mass itself, where the image is a ring, it is strongly so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Operator
from diffpost.operators.base import Shape
from diffpost.score import GaussianScore
from diffpost.sde import EDM, SDE

_SOFTENING = 0.05  # of |x|, so that the map is smooth where the source is behind the mass
_CENTRE = (0.8, 0.4)


@final
class PointLens(Operator):
    """x (B, 2) to (B, 3): the outer image's position, and the separation of both images."""

    input_shape = (2,)
    data_shape = (3,)

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != (2,):
            raise ValueError(
                f"PointLens: got a source of shape {tuple(input_shape)}; expected (2,)"
            )
        return (3,)

    def __call__(self, x: Tensor) -> Tensor:
        radius = (x.square().sum(1, keepdim=True) + _SOFTENING**2).sqrt()
        separation = (radius.square() + 4).sqrt()
        outer = 0.5 * (radius + separation) / radius * x
        return torch.cat([outer, separation], 1)

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> PointLens:
        return self


@final
@dataclass(frozen=True)
class RingOracle:
    """The point lens and the moments of its posterior.

    Attributes:
        prior, likelihood: the problem, images (2,), data (3,).
        truth: (2,).
        mean: (2,) exact posterior mean.
        cov: (2, 2) exact posterior covariance.
        log_evidence: log p(y).
        nodes: (N, 2) a grid of the plane.
        mass: (N,) posterior probability of each node's cell.
    """

    prior: GaussianScore
    likelihood: Likelihood
    truth: Tensor
    mean: Tensor
    cov: Tensor
    log_evidence: float
    nodes: Tensor
    mass: Tensor

    def exact_draws(self, n: int, seed: int = 0) -> Tensor:
        """(n, 2) independent draws, to a cell of the grid."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.mass, n, replacement=True, generator=generator)
        step = (self.nodes[1] - self.nodes[0]).abs().max()
        jitter = torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.5
        return self.nodes[chosen] + step * jitter


def ring(
    spread: float = 0.4,
    noise: float = 0.2,
    seed: int = 0,
    sde: SDE | None = None,
    centre: tuple[float, float] = _CENTRE,
) -> RingOracle:
    """The problem in float64, with its posterior on a grid of 1201 x 1201 nodes over +-6 prior deviations.

    Args:
        spread: s, of the prior, in Einstein radii.
        noise: standard deviation of each datum.
        seed: of truth and noise.
        sde: process of the prior; None is EDM(0.001, 80).
        centre: m; (0, 0) makes the problem hard.
    """
    generator = torch.Generator().manual_seed(seed)
    lens = PointLens()
    middle = torch.tensor(centre, dtype=torch.float64)
    truth = middle + spread * torch.randn(2, generator=generator, dtype=torch.float64)
    y = lens(truth[None])[0] + noise * torch.randn(3, generator=generator, dtype=torch.float64)
    prior = GaussianScore(middle, var=spread**2, sde=sde or EDM(1e-3, 80.0))
    likelihood = Likelihood(y, lens, GaussianNoise(std=noise), batched=False)
    axis = torch.linspace(-6 * spread, 6 * spread, 1201, dtype=torch.float64)
    nodes = middle + torch.cartesian_prod(axis, axis)
    logp = prior.log_prob(nodes) + likelihood.log_prob(nodes)
    mass = logp.softmax(0)
    mean = mass @ nodes
    centred = nodes - mean
    cell = 2 * (axis[1] - axis[0]).log()
    return RingOracle(
        prior,
        likelihood,
        truth,
        mean,
        (mass[:, None] * centred).T @ centred,
        float(logp.logsumexp(0) + cell),
        nodes,
        mass,
    )
