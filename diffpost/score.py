r"""Score models: anything that can be sampled.

At noise level t a distribution p(x_0) is seen through x_t = alpha x_0 + sigma z.  A score model knows
the score grad log p_t(x) or, what is the same by Tweedie's formula (Robbins 1956; Efron 2011,
equation 1.4), the denoiser

    D(x, t) = E[x_0 | x_t = x] = (x + sigma^2 score)/alpha,       score = (alpha D - x)/sigma^2.

Its Jacobian J = dD/dx gives the covariance, Cov[x_0 | x_t] = sigma^2/alpha J, hence is symmetric.
Networks, the analytic distributions below and posteriors are score models.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from diffpost.sde import SDE, as_time, expand

__all__ = ["ScoreModel", "denoiser_of_score", "score_of_denoiser"]


def score_of_denoiser(sde: SDE, denoised: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(alpha D - x)/sigma^2, (B, *shape)."""
    t = as_time(t, x)
    return (expand(sde.alpha(t), x) * denoised - x) / expand(sde.sigma(t) ** 2, x)


def denoiser_of_score(sde: SDE, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(x + sigma^2 score)/alpha, (B, *shape)."""
    t = as_time(t, x)
    return (x + expand(sde.sigma(t) ** 2, x) * score) / expand(sde.alpha(t), x)


class ScoreModel(ABC):
    """A distribution of images known through its denoiser at every noise level.

    Inputs are batches x (B, *shape) in model units and t, () or (B,).  Answers have the dtype of x,
    and entry b depends on entry b alone.

    Attributes:
        sde: the forward process.
        shape: of one image.
        scale, offset: x_physical = scale x_model + offset; floats, or tensors broadcastable to
            shape.
    """

    sde: SDE
    shape: tuple[int, ...]
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes best."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model lives, and where x must be."""

    @abstractmethod
    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t = x], (B, *shape)."""

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), (B, *shape); by Tweedie's formula unless a model knows it directly."""
        return score_of_denoiser(self.sde, self.denoise(x, t), x, t)

    def denoise_vjp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The denoised batch and v -> J^T v, J = dD/dx, which may be called repeatedly.

        Differentiable in x where autograd is recording and x requires a gradient (a posterior used
        as a prior); otherwise nothing is recorded outside.
        """
        nested = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            inside = x if nested else x.detach().requires_grad_()
            denoised = self.denoise(inside, t)

        def vjp(v: Tensor) -> Tensor:
            (gradient,) = torch.autograd.grad(
                denoised, inside, v, retain_graph=True, create_graph=nested
            )
            return gradient

        return (denoised if nested else denoised.detach()), vjp

    def denoise_jvp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The denoised batch and v -> J v, J = dD/dx, which may be called repeatedly.

        By forward-mode differentiation, which evaluates the denoiser once more for every product.
        """

        def jvp(v: Tensor) -> Tensor:
            _, tangent = torch.func.jvp(lambda y: self.denoise(y, t), (x,), (v,))
            return tangent

        return self.denoise(x, t), jvp

    def jacobian_spectrum(self, x: Tensor, t: Tensor) -> Tensor | None:
        """Eigenvalues of J where it is diagonal under the orthonormal FFT2 of the last two axes, else None.

        Broadcastable to x. Solves with the covariance sigma^2/alpha J are then exact and need no VJP.
        """
        return None

    def to_physical(self, x: Tensor) -> Tensor:
        """scale x + offset."""
        return _like(self.scale, x) * x + _like(self.offset, x)

    def to_model(self, x: Tensor) -> Tensor:
        """(x - offset)/scale."""
        return (x - _like(self.offset, x)) / _like(self.scale, x)

    def with_affine(self, scale: float | Tensor, offset: float | Tensor = 0.0) -> Self:
        """The same model with another map to physical units, x_physical = scale x_model + offset.

        Raises:
            ValueError: scale zero, either not finite, or not broadcastable to the model's shape.
        """
        for name, value in (("scale", scale), ("offset", offset)):
            _check_affine(name, value, self.shape)
        other = copy.copy(self)
        other.scale, other.offset = scale, offset
        return other

    def with_shape(self, shape: tuple[int, ...]) -> Self:
        """The same model for images of another size.

        Raises:
            ValueError: the model is tied to its shape, unless a class says otherwise.
        """
        shape = tuple(int(side) for side in shape)
        if shape != self.shape:
            raise ValueError(
                f"{type(self).__name__}.with_shape({shape}): the model is tied to the shape "
                f"{self.shape}; make one of the other shape."
            )
        return copy.copy(self)

    @property
    def rows(self) -> int | None:
        """Number of batch entries that the model's own data fix, or None: any number."""
        return None

    def select(self, ids: Tensor) -> Self:
        """The model of the batch entries `ids` (n,); itself, unless `rows` is a number."""
        return self


def _like(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.to(device=x.device, dtype=x.dtype) if isinstance(value, Tensor) else value


def _check_affine(name: str, value: float | Tensor, shape: tuple[int, ...]) -> None:
    if isinstance(value, Tensor):
        good = bool(value.isfinite().all()) and (name == "offset" or bool((value != 0).all()))
        size = tuple(value.shape)
        try:
            fits = torch.broadcast_shapes(size, shape) == torch.Size(shape)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(f"got {name} of shape {size}; expected broadcastable to {shape}")
    else:
        good = math.isfinite(value) and (name == "offset" or value != 0)
    if not good:
        wanted = "finite" if name == "offset" else "finite and not zero"
        raise ValueError(f"got {name} = {value}; expected {wanted}")
