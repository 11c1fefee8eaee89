r"""What visibilities say about an image, in as many numbers as it has.

Under Gaussian noise of weights W the likelihood of x depends on the data through d = A^T W y and N = A^T W A alone,

    log p(y | x) = -1/2 x^T N x + x^T d + const.

With N = E diag(lambda) E^T, the data y' = lambda^{-1/2} E^T d of the operator R = lambda^{1/2} E^T, with noise of unit
variance, have the same d and N: the same posterior from at most as many data as pixels, whose R R^T = diag(lambda)
makes solves direct. Modes of lambda below ``rtol`` of the largest carry nothing and are left out.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operators.algebra import Compose
from diffpost.operators.base import LinearOperator, Operator, Parameter, Shape, numel
from diffpost.operators.nonlinear import NonlinearCompose
from diffpost.physics.visibilities import Visibilities

__all__ = ["Modes", "compress"]

_LARGEST = 64 * 64  # pixels of an image whose normal matrix is decomposed


@final
class Modes(LinearOperator):
    """R = diag(lambda)^(1/2) E^T: images (B, *shape) to (B, k), with R R^T = diag(lambda).

    Args:
        values: lambda, (k,), positive.
        vectors: E, (n, k), orthonormal columns over the flattened image.
        shape: of one image, n numbers.
    """

    def __init__(self, values: Tensor, vectors: Tensor, shape: Shape) -> None:
        self.values, self._image = values, tuple(shape)
        self._matrix = Parameter(vectors * values.sqrt())
        self._powers: Tensor | None = None

    def __repr__(self) -> str:
        return f"Modes({len(self.values)} of {numel(self._image)})"

    @property
    def input_shape(self) -> Shape:
        return self._image

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self._image:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}; expected {self._image}."
            )
        return (len(self.values),)

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return x.flatten(1) @ self._matrix.like(x)

    def adjoint(self, v: Tensor) -> Tensor:
        if v.ndim != 2 or v.shape[1] != len(self.values):
            raise ValueError(
                f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, {len(self.values)})."
            )
        return (v @ self._matrix.like(v).T).reshape(-1, *self._image)

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor | None:
        return self.values if weight is None else None

    def near_gram(self, input_shape: Shape, power: Tensor | None = None) -> Tensor | None:
        """lambda_i e_i^T P e_i: modes of the data are nearly of one frequency each."""
        if power is None:
            return self.values
        if self._powers is None:  # |FFT2 e_i|^2 lambda_i, (k, n)
            rows = self._matrix.value.T.reshape(-1, *self._image)
            modes = torch.fft.fft2(rows.double(), norm="ortho").abs().square()
            self._powers = modes.flatten(1)
        wide = power.double().expand(torch.broadcast_shapes(power.shape, self._image))
        return wide.reshape(-1, numel(self._image)) @ self._powers.T.to(power.device)


def compress(likelihood: Likelihood, rtol: float = 1e-10) -> Likelihood:
    """The same likelihood of at most as many data as the image has pixels.

    Its densities differ from those of the visibilities by a number that does not depend on the image; its score and all posteriors
    do not differ. chi^2 of the visibilities is that of the original.

    Args:
        likelihood: of ``Visibilities``, alone or after other operators (``Visibilities @ lens``), with independent Gaussian noise
            of the same weight for both parts of a datum and for all observations; y with or without a batch axis.
        rtol: modes whose information is less than this share of the largest are left out.

    Raises:
        ValueError: another operator or noise, an image of more than 64 x 64 pixels, or data without weight.
    """
    operator, inner = _outermost(likelihood.operator)
    weight = likelihood.noise.weight()
    shape = operator.data_shape
    if weight is None or weight.ndim > len(shape):
        raise ValueError(
            f"compress: got the noise {likelihood.noise!r}; expected independent Gaussian noise, the same for all observations."
        )
    pixels = numel(operator.input_shape)
    if pixels > _LARGEST:
        raise ValueError(
            f"compress: got images of {pixels} pixels; expected at most {_LARGEST}, whose normal matrix can be decomposed. Use the "
            "visibilities themselves."
        )
    weight = weight.expand(shape)
    matrix = operator.normal(weight).dense()
    values, vectors = torch.linalg.eigh(matrix)
    if not float(values[-1]) > 0:
        raise ValueError("compress: all visibilities have weight 0; there is nothing to fit.")
    kept = values > rtol * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    y = likelihood.y.double()
    batched = y.ndim > len(shape)
    rows = y if batched else y[None]
    pulled = operator.adjoint(torch.where(weight > 0, weight * rows, 0.0)).flatten(1)
    data = (pulled @ vectors / values.sqrt()).to(likelihood.y.dtype)
    modes: Operator = Modes(values, vectors, operator.input_shape)
    for part in inner:
        modes = modes @ part
    return Likelihood(data if batched else data[0], modes, GaussianNoise(std=1.0), batched=batched)


def _outermost(operator: Operator) -> tuple[Visibilities, list[Operator]]:
    """Visibilities and what comes before them, the outer first."""
    if isinstance(operator, Visibilities):
        return operator, []
    if isinstance(operator, Compose | NonlinearCompose):
        first, inner = _outermost(operator.outer)
        return first, [*inner, operator.inner]
    raise ValueError(
        f"compress: got {operator!r}; expected Visibilities, or Visibilities @ others."
    )
