"""Operators: the physics between an image and its data.

``Operator`` maps images (B, *shape) to data (B, *data); ``LinearOperator`` also has the adjoint. They
compose with ``@``, add with ``+``, scale with ``*``, and ``linearize(x)`` gives the derivative at x. The
likelihood needs A^T and solves with (noise + s A A^T); structure that makes these solves cheap
(diagonal over pixels or Fourier modes, an explicit matrix) is passed on through compositions where
that is exact.
"""

from diffpost.operators.algebra import Compose, Scaled, Stack, Sum, scaled_by
from diffpost.operators.base import Linearized, LinearOperator, Operator, Shape
from diffpost.operators.convolve import Convolve
from diffpost.operators.elementary import (
    Crop,
    Diagonal,
    Fourier,
    Identity,
    Mask,
    Matrix,
    PixelBin,
)
from diffpost.operators.nonlinear import (
    Affine,
    NonlinearCompose,
    NonlinearScaled,
    NonlinearStack,
    NonlinearSum,
    stack,
)

__all__ = [
    "Affine",
    "Compose",
    "Convolve",
    "Crop",
    "Diagonal",
    "Fourier",
    "Identity",
    "LinearOperator",
    "Linearized",
    "Mask",
    "Matrix",
    "NonlinearCompose",
    "NonlinearScaled",
    "NonlinearStack",
    "NonlinearSum",
    "Operator",
    "PixelBin",
    "Scaled",
    "Shape",
    "Stack",
    "Sum",
    "scaled_by",
    "stack",
]
