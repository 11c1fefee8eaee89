r"""Operators that depend on a few parameters, and the likelihood of image and parameters together.

    y = A(theta) x + b(theta) + n,

where A is linear for every theta: a lens of unknown mass, a PSF of unknown width, gains. b is what the parameters alone
put into the data, such as the light of the lens. A batch of parameters makes one operator whose entry b has theta_b, so
one batch of images holds chains of different parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.noise import Noise
from diffpost.operator import Identity
from diffpost.operators.base import LinearOperator, Shape
from diffpost.parameters.chains import LogDensity
from diffpost.parameters.prior import ParameterPrior

__all__ = ["OperatorFamily", "ParametricLikelihood", "Values"]

Values = Mapping[str, Tensor]
"""Parameters by name, each (B,)."""


class OperatorFamily(ABC):
    """Linear operators by their parameters.

    Attributes:
        names: of the parameters that ``at`` takes.
        input_shape: of one image.
        data_shape: of its data.
    """

    names: tuple[str, ...]
    input_shape: Shape
    data_shape: Shape

    @abstractmethod
    def at(self, values: Values) -> LinearOperator:
        """A(theta) for a batch of parameters.

        Entry b of a batch (B, *input_shape) meets values[...][b]; ``select`` takes entries of it. In the dtype and on
        the device of the image.
        """

    def apply(self, values: Values, x: Tensor) -> Tensor:
        """A(theta_b) x_b, (B, *input_shape) to (B, *data), differentiable in values and images.

        By ``at``; override it where that is not differentiable in the values. Where these are out of range, NaN rather
        than an error, for chains to reject.
        """
        return self.at(values)(x)

    def background(self, values: Values) -> Tensor | None:
        """b(theta), (B, *data), or None for nothing."""
        return None

    def columns(self, values: Values, images: Tensor) -> Tensor:
        """A(theta_b) of the same K images for every b: (K, *input_shape) to (K, B, *data).

        Differentiable in the values. By ``torch.func.vmap`` over ``apply``; override it where operations that vmap does
        not know, such as sparse products, or something faster, are at hand.
        """
        batch = len(next(iter(values.values())))

        def one(image: Tensor) -> Tensor:
            return self.apply(values, image.expand(batch, *image.shape))

        found: Tensor = torch.func.vmap(one)(images)
        return found


@final
class ParametricLikelihood:
    """p(y | x, theta) for y = A(theta) x + b(theta) + n.

    Args:
        y: (*data), the same for all chains, or (B, *data), a row for each chain.
        family: A and b.
        noise: of n; Gaussian.

    Attributes:
        y: (1 or B, *data), 0 where masked.

    Raises:
        ValueError: noise that is not Gaussian, or data of a shape that the family does not make.
    """

    def __init__(self, y: Tensor, family: OperatorFamily, noise: Noise) -> None:
        if not isinstance(noise, Noise) or not noise.is_gaussian:
            raise ValueError(
                f"ParametricLikelihood: got {noise!r}; expected Gaussian noise, whose covariance the chains use. "
                "Parameters alone, without an image, have any noise by ModelledData."
            )
        self.family = family
        self.noise = noise
        data = tuple(family.data_shape)
        y = torch.as_tensor(y)
        if tuple(y.shape) != data and tuple(y.shape[1:]) != data:
            raise ValueError(
                f"ParametricLikelihood: y has shape {tuple(y.shape)}, but the operators make data of shape {data} of "
                f"images {tuple(family.input_shape)}; expected y of that shape, or (B, *{data}) with a row a chain."
            )
        self.data_shape: Shape = data
        self.rows = None if tuple(y.shape) == data else len(y)
        # checked and cleared of what is masked as any data are
        bare = Likelihood(y, Identity(), noise, batched=self.rows is not None)
        self.y = bare.y if self.rows is not None else bare.y[None]

    def __repr__(self) -> str:
        return f"ParametricLikelihood(y {tuple(self.y.shape)}, {self.family!r}, {self.noise!r})"

    def select(self, ids: Tensor) -> ParametricLikelihood:
        """That of rows ids of y; itself where y has no rows."""
        if self.rows is None:
            return self
        noise = self.noise.select(ids, self.data_shape)
        return ParametricLikelihood(self.y[ids.to(self.y.device)], self.family, noise)

    def at(self, values: Values) -> Likelihood:
        """p(y | x, theta_b) of an image, with a row for each theta.

        Raises:
            ValueError: data with rows, and another number of parameters.
        """
        return Likelihood(self.data(values), self.family.at(values), self.noise, batched=True)

    def data(self, values: Values) -> Tensor:
        """y - b(theta), (B, *data), 0 where masked."""
        batch = len(next(iter(values.values())))
        if self.rows not in (None, batch):
            raise ValueError(
                f"ParametricLikelihood: the data have {self.rows} rows and there are {batch} parameters; expected one "
                "for each row. Use select(ids) for a part of them."
            )
        background = self.family.background(values)
        y = self.y.expand(batch, *self.data_shape)
        return self._hidden(y if background is None else y.to(background) - background)

    def residual(self, values: Values, x: Tensor) -> Tensor:
        """y - A(theta) x - b(theta), 0 where masked: x (B, *shape) to (B, *data); differentiable."""
        model = self.family.apply(values, x)
        return self._hidden(self.data(values).to(model) - model)

    def log_prob(self, values: Values, x: Tensor) -> Tensor:
        """log p(y | x, theta), x (B, *shape) to (B,); differentiable in both."""
        return self.noise.log_prob(self.residual(values, x))

    def given(self, prior: ParameterPrior, x: Tensor) -> LogDensity:
        """log p(y | x_b, theta(z_b)) + log p(z_b) of unconstrained coordinates z (B, P), for images x (B, *shape)."""

        def log_density(z: Tensor) -> Tensor:
            return self.log_prob(prior.values(prior.constrain(z)), x) + prior.log_prob_z(z)

        return log_density

    def _hidden(self, r: Tensor) -> Tensor:
        gone = self.noise.masked(self.data_shape)
        return r if gone is None else r.masked_fill(gone.to(r.device), 0.0)

    def check(self, prior: ParameterPrior) -> None:
        """Raises a ValueError unless the prior has just the parameters of the operators."""
        prior.check_names(self.family.names, "the operator")
