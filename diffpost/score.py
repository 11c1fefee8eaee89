r"""Score models: anything that can be sampled.

At noise level t a distribution p(x_0) is seen through x_t = alpha x_0 + sigma z.  A score model
knows the score grad log p_t(x) or, what is the same by Tweedie's formula (Robbins 1956; Efron 2011,
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
from typing import TYPE_CHECKING, Self, final

import torch
from torch import Tensor

from diffpost.mixture import Mixture
from diffpost.random import EXACT_STREAM, normal, uniform
from diffpost.sde import SDE, as_time, expand

if TYPE_CHECKING:
    from diffpost.guidance.covariance import Covariance

__all__ = [
    "GaussianMixtureScore",
    "GaussianScore",
    "ScoreModel",
    "denoiser_of_score",
    "score_of_denoiser",
]


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
        analytic: whether Jacobian products are in closed form, at the price of an evaluation or less.
    """

    sde: SDE
    shape: tuple[int, ...]
    scale: float | Tensor = 1.0
    offset: float | Tensor = 0.0
    analytic: bool = False

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
            tangent: Tensor = torch.func.jvp(lambda y: self.denoise(y, t), (x,), (v,))[1]
            return tangent

        return self.denoise(x, t), jvp

    def jacobian_spectrum(self, x: Tensor, t: Tensor) -> Tensor | None:
        """Eigenvalues of J if it is diagonal under the orthonormal FFT2 of the last two axes.

        Broadcastable to x, or None. Solves with the covariance sigma^2/alpha J are then exact and
        need no VJP.
        """
        return None

    def error_covariance(self) -> Covariance | None:
        """A model of Cov[x_0 | x_t] that was measured with this prior, or None."""
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

    def noise_seed(self, seed: int) -> int:
        """Of the noise with which `diffpost.sample` draws; a posterior's differs, lest draws share that of their truth."""
        return seed


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


class _Analytic(ScoreModel):
    """A distribution in closed form.  It computes in float64 whatever the dtype of x."""

    _dtype: torch.dtype
    _device: torch.device
    analytic = True

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    @abstractmethod
    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """log p_t(x), (B,); of the clean distribution p_0 where t is None."""

    @abstractmethod
    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n clean draws in model units, (n, *shape); draw i depends on (seed, i) alone."""

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A copy on `device` whose draws and default inputs are of `dtype`."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.to(device))
        other._device = self._device if device is None else torch.empty(0, device=device).device
        other._dtype = self._dtype if dtype is None else dtype
        return other

    def _schedule(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor]:
        """alpha and sigma^2 in float64, shaped to multiply x; 1 and 0 where t is None."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"got x of shape {tuple(x.shape)}; expected (B, *{self.shape})")
        if t is None:
            return x.new_ones((), dtype=torch.float64), x.new_zeros((), dtype=torch.float64)
        t = as_time(t, x)
        wide = x.new_empty((), dtype=torch.float64).expand(x.shape)  # a shape, no memory
        return expand(self.sde.alpha(t), wide), expand(self.sde.sigma(t) ** 2, wide)


@final
class GaussianScore(_Analytic):
    """N(m, C), with D = m + J (x - alpha m) and J = alpha C (alpha^2 C + sigma^2)^-1 constant in x.

    Args:
        mean: (*shape), m.
        var: variance of independent pixels, a number or a tensor broadcastable to shape.
        cov: (d, d) covariance of the flattened image; decomposed once.
        power: eigenvalues of the covariance of a stationary field under the orthonormal FFT2 of the
            last two axes, broadcastable to shape; a white field of variance v has power v. Equal
            at k and -k, as the field is real.
        sde: the forward process.

    Attributes:
        eigenvalues: of the covariance, float64: (*shape) in the case of cov, else as var or power.

    Raises:
        ValueError: not exactly one of var, cov, power; a shape that does not fit; a variance that
            is negative or not finite; a cov that is not symmetric, or a power not even.
    """

    def __init__(
        self,
        mean: Tensor,
        *,
        var: float | Tensor | None = None,
        cov: Tensor | None = None,
        power: Tensor | None = None,
        sde: SDE,
    ) -> None:
        given = {"var": var, "cov": cov, "power": power}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1:
            raise ValueError(f"GaussianScore: got {names}; expected exactly one of {list(given)}")
        self.mean = _floating(mean)
        self.sde = sde
        self.shape = tuple(self.mean.shape)
        self._dtype, self._device = self.mean.dtype, self.mean.device
        self._kind = names[0]
        self._basis = torch.empty(0, dtype=torch.float64, device=self.device)
        values = torch.as_tensor(given[names[0]], dtype=torch.float64, device=self.device)
        if cov is not None:
            values, self._basis = _eigen(values, self.mean.numel())
            values = values.reshape(self.shape)
        elif not _broadcasts(values.shape, self.shape):
            raise ValueError(
                f"got {names[0]} of shape {tuple(values.shape)}; "
                f"expected broadcastable to {self.shape}"
            )
        elif power is not None:
            _check_even(values, self.shape)
        _check_variance(names[0], values)
        self.eigenvalues = values

    def __repr__(self) -> str:
        return f"GaussianScore({self._kind}, shape={self.shape}, sde={self.sde})"

    def _apply(self, factor: Tensor, v: Tensor) -> Tensor:
        """The matrix with the covariance's eigenvectors and eigenvalues `factor`, times v."""
        if self._kind == "var":
            return factor * v
        if self._kind == "cov":
            flat = v.flatten(1) @ self._basis * factor.reshape(-1, v[0].numel())
            return (flat @ self._basis.T).reshape(v.shape)
        half = factor[..., : v.shape[-1] // 2 + 1]
        spectrum = torch.fft.rfft2(v, norm="ortho") * half
        return torch.fft.irfft2(spectrum, s=v.shape[-2:], norm="ortho")

    def _gain(self, alpha: Tensor, sigma2: Tensor) -> Tensor:
        """Eigenvalues of J, alpha v/(alpha^2 v + sigma^2); 0 without variance and noise."""
        total = alpha**2 * self.eigenvalues + sigma2
        return torch.where(total > 0, alpha * self.eigenvalues / total, torch.zeros_like(total))

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma2 = self._schedule(x, t)
        mean = self.mean.double()
        return (mean + self._apply(self._gain(alpha, sigma2), x - alpha * mean)).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma2 = self._schedule(x, t)
        precision = 1 / (alpha**2 * self.eigenvalues + sigma2)
        return -self._apply(precision, x - alpha * self.mean.double()).to(x.dtype)

    def denoise_vjp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        gain = self._gain(*self._schedule(x, t))
        return self.denoise(x, t), lambda v: self._apply(gain, v.double()).to(v.dtype)

    def denoise_jvp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.denoise_vjp(x, t)  # J is symmetric

    def jacobian_spectrum(self, x: Tensor, t: Tensor) -> Tensor | None:
        flat = len(self.shape) >= 2 and all(n == 1 for n in self.eigenvalues.shape[-2:])
        if self._kind == "cov" or (self._kind == "var" and not flat):
            return None
        gain = self._gain(*self._schedule(x, t)).to(x.dtype)
        return gain.reshape(1, 1) if gain.ndim < 2 else gain  # one number for all modes

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        alpha, sigma2 = self._schedule(x, t)
        total = alpha**2 * self.eigenvalues + sigma2
        residual = x - alpha * self.mean.double()
        chi2 = (residual * self._apply(1 / total, residual)).flatten(1).sum(1)
        logdet = total.log().expand(x.shape).flatten(1).sum(1)
        return (-0.5 * (chi2 + logdet + self.mean.numel() * math.log(2 * math.pi))).to(x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        ids = torch.arange(n, device=self.device)
        z = normal(seed, ids, 0, self.shape, torch.float64, stream=EXACT_STREAM)
        return (self.mean.double() + self._apply(self.eigenvalues.sqrt(), z)).to(self.dtype)


@final
class GaussianMixtureScore(_Analytic):
    """sum_k w_k N(m_k, v_k), with the exact denoiser, score and Jacobian at every t.

    With s_k = alpha^2 v_k + sigma^2, g_k = -(x - alpha m_k)/s_k the score of component k and r_k
    the probability that x came from it, score = sum_k r_k g_k and

        J = sum_k r_k alpha v_k/s_k + sigma^2/alpha sum_k r_k (g_k - score)(g_k - score)^T.

    The r_k are a softmax of float64 logarithms, so that they stand when every density underflows.
    A variance of 0 makes a component a point, whose score exists where sigma(t) > 0.

    Args:
        means: (K, *shape).
        weights: (K,), not negative; they are divided by their sum.
        var: a number, one variance for each component (K,), or any shape broadcastable to
            (K, *shape); (K,) is taken for components even where shape ends in K.
        sde: the forward process.

    Raises:
        ValueError: shapes that do not fit, weights or variances negative or not finite.
    """

    def __init__(self, means: Tensor, weights: Tensor, var: float | Tensor, sde: SDE) -> None:
        self.means = _floating(means)
        count = self.means.shape[0] if self.means.ndim > 1 else 0
        self.weights = torch.as_tensor(weights, dtype=torch.float64, device=self.means.device)
        if count == 0 or self.weights.shape != (count,):
            raise ValueError(
                f"got means {tuple(self.means.shape)} and weights {tuple(self.weights.shape)}; "
                "expected (K, *shape) and (K,)"
            )
        total = self.weights.sum()
        if not (bool((self.weights >= 0).all()) and 0 < float(total) < math.inf):
            raise ValueError("got weights that are negative, not finite or all zero")
        self.sde = sde
        self.shape = tuple(self.means.shape[1:])
        self._dtype, self._device = self.means.dtype, self.means.device
        values = torch.as_tensor(var, dtype=torch.float64, device=self.device)
        _check_variance("var", values)
        if values.ndim == 0 or values.shape == (count,):
            values = values.expand(count)[:, None]
        elif _broadcasts(values.shape, tuple(self.means.shape)):
            values = values.expand(self.means.shape).flatten(1)
        else:
            raise ValueError(
                f"got var of shape {tuple(values.shape)}; expected a number, ({count},) or a shape "
                f"broadcastable to {tuple(self.means.shape)}"
            )
        self._var = values  # (K, 1) or (K, d)
        self._log_weights = (self.weights / total).log()
        flat = self.means.double().flatten(1)
        self._centre = flat.mean(0)  # squares of differences from it cancel less
        self._offsets = flat - self._centre

    @property
    def variance(self) -> Tensor:
        """Variances of the components, float64: (K, 1), or (K, d) over the flattened pixels."""
        return self._var

    def __repr__(self) -> str:
        return f"GaussianMixtureScore({len(self.means)} of shape {self.shape}, sde={self.sde})"

    def _mixture(self, x: Tensor, t: Tensor | None) -> Mixture:
        alpha, sigma2 = (s.reshape(-1, 1, 1).to(self.device) for s in self._schedule(x, t))
        u = x.double().flatten(1) - alpha[:, 0] * self._centre
        return Mixture(u, self._offsets, self._var, self._log_weights, alpha, sigma2)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        denoised = self._centre + self._mixture(x, t).mean()
        return denoised.reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        return self._mixture(x, t).score().reshape(x.shape).to(x.dtype)

    def denoise_vjp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        mixture = self._mixture(x, t)
        denoised = (self._centre + mixture.mean()).reshape(x.shape).to(x.dtype)

        def product(v: Tensor) -> Tensor:
            return mixture.jacobian(v.double().flatten(1)).reshape(v.shape).to(v.dtype)

        return denoised, product

    def denoise_jvp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.denoise_vjp(x, t)  # J is symmetric

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        constant = 0.5 * self.means[0].numel() * math.log(2 * math.pi)
        return (self._mixture(x, t).logits.logsumexp(1) - constant).to(x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        ids = torch.arange(n, device=self.device)
        u = uniform(seed, ids, 0, (1,), torch.float64)[:, 0]
        edges = self._log_weights.exp().cumsum(0)
        component = torch.searchsorted(edges, u * edges[-1], right=True)
        z = normal(seed, ids, 0, (self.means[0].numel(),), torch.float64, stream=EXACT_STREAM)
        x = self._centre + self._offsets[component] + self._var[component].sqrt() * z
        return x.reshape(n, *self.shape).to(self.dtype)


def _floating(x: Tensor) -> Tensor:
    x = torch.as_tensor(x)
    return x if x.dtype.is_floating_point else x.to(torch.get_default_dtype())


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    pairs = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(n in (1, m) for n, m in pairs)


def _check_variance(name: str, values: Tensor) -> None:
    if not (bool(values.isfinite().all()) and bool((values >= 0).all())):
        raise ValueError(
            f"got {name} with eigenvalues or variances from {float(values.min()):g} to "
            f"{float(values.max()):g}; expected finite numbers that are not negative"
        )


def _check_even(power: Tensor, shape: tuple[int, ...]) -> None:
    if len(shape) < 2:
        raise ValueError(f"got a power spectrum for the shape {shape}; expected at least two axes")
    full = power.expand(*torch.broadcast_shapes(power.shape, shape[-2:]))
    mirrored = full.flip(-2, -1).roll((1, 1), (-2, -1))
    if not torch.allclose(full, mirrored, rtol=1e-5, atol=1e-7 * float(full.abs().max())):
        raise ValueError(
            "got a power spectrum that differs between k and -k; a real field's does not. "
            "Give it in the layout of fft2, with k = 0 first."
        )


def _eigen(cov: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,) and eigenvectors (d, d); negative round-off becomes 0."""
    if cov.shape != (d, d):
        raise ValueError(f"got cov of shape {tuple(cov.shape)}; expected ({d}, {d})")
    largest = float(cov.abs().max())
    if not torch.allclose(cov, cov.T, rtol=1e-5, atol=1e-7 * largest):
        raise ValueError("got a cov that is not symmetric; expected a covariance matrix")
    values, basis = torch.linalg.eigh(0.5 * (cov + cov.T))
    round_off = (values < 0) & (values > -1e-6 * values[-1].abs())
    return torch.where(round_off, torch.zeros_like(values), values), basis
