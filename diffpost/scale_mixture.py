r"""Independent pixels with heavy tails: Gaussians whose variance is itself random.

    p(x) = prod_i sum_k w_k N(x_i; 0, v_k)

Seen through alpha and sigma each pixel is sum_k w_k N(0, alpha^2 v_k + sigma^2), so score, denoiser and density are in
closed form at every noise level (:mod:`diffpost.mixture` has mixtures of whole images). Outliers are two components.
Laplace's and Student's distributions are integrals over v of such Gaussians (Andrews & Mallows 1974, J. R. Stat. Soc.
B 36, 99), which a trapezoidal rule in log v turns into a sum: not the distribution itself but one whose density is
that to a relative accuracy that the constructors state.
"""

from __future__ import annotations

import math
from typing import Self, final

import torch
from torch import Tensor

from diffpost.random import EXACT_STREAM, normal, uniform
from diffpost.score import _Analytic
from diffpost.sde import SDE

__all__ = ["ScaleMixtureScore"]


@final
class ScaleMixtureScore(_Analytic):
    """Independent pixels, each sum_k w_k N(0, v_k).

    Args:
        weights: (K,), not negative; they are divided by their sum.
        var: (K,) variances, positive.
        shape: of one image; ``with_shape`` takes any other.
        sde: the forward process.

    Raises:
        ValueError: weights or variances of another shape, negative, or not finite.
    """

    def __init__(self, weights: Tensor, var: Tensor, shape: tuple[int, ...], sde: SDE) -> None:
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.var = torch.as_tensor(var, dtype=torch.float64)
        if self.weights.ndim != 1 or self.weights.shape != self.var.shape or not len(self.weights):
            raise ValueError(
                f"ScaleMixtureScore: got weights {tuple(self.weights.shape)} and var {tuple(self.var.shape)}; expected "
                "(K,) both."
            )
        total = float(self.weights.sum())
        good = bool((self.weights >= 0).all()) and 0 < total < math.inf
        if not good or not bool((self.var > 0).all() & self.var.isfinite().all()):
            raise ValueError(
                "ScaleMixtureScore: expected weights that are not negative, not all zero, and positive variances, all "
                "finite."
            )
        self.weights = self.weights / total
        self.sde = sde
        self.shape = tuple(int(side) for side in shape)
        self._dtype, self._device = torch.get_default_dtype(), self.var.device

    def __repr__(self) -> str:
        return f"ScaleMixtureScore({len(self.var)} of shape {self.shape}, sde={self.sde})"

    @staticmethod
    def outliers(
        std: float, shape: tuple[int, ...], sde: SDE, *, share: float = 0.05, factor: float = 10.0
    ) -> ScaleMixtureScore:
        """Pixels of standard deviation std, and a share of ``factor`` times that."""
        if not (std > 0 and 0 < share < 1 and factor > 0):
            raise ValueError(
                f"outliers(std={std}, share={share}, factor={factor}): expected positive numbers and a share below 1."
            )
        weights = torch.tensor([1 - share, share], dtype=torch.float64)
        var = torch.tensor([std**2, (factor * std) ** 2], dtype=torch.float64)
        return ScaleMixtureScore(weights, var, shape, sde)

    @staticmethod
    def laplace(std: float, shape: tuple[int, ...], sde: SDE) -> ScaleMixtureScore:
        """Laplace's distribution of this standard deviation, p(x) ~ exp(-sqrt(2) |x|/std).

        Its variances are exponential. The density is right to 1e-3 where std/50 < |x| < 10 std; nearer the cusp is
        rounded.
        """
        if not 0 < std < math.inf:
            raise ValueError(f"laplace(std={std}): expected a positive number.")
        v = torch.logspace(math.log10(1e-5), math.log10(60.0), 64, dtype=torch.float64)
        return ScaleMixtureScore(v * torch.exp(-v), std**2 * v, shape, sde)

    @staticmethod
    def student_t(dof: float, width: float, shape: tuple[int, ...], sde: SDE) -> ScaleMixtureScore:
        """Student's t of these degrees of freedom, ``width`` times the standard one.

        Its variances are inverse gamma. The density is right to 1e-3 where |x| < 100 width, for dof >= 2.

        Raises:
            ValueError: dof below 2, whose variance does not exist however the sum is cut off, or width not positive.
        """
        if not (2 <= dof < math.inf and 0 < width < math.inf):
            raise ValueError(
                f"student_t(dof={dof}, width={width}): expected dof of at least 2 and a positive width."
            )
        v = torch.logspace(-2, 6, 96, dtype=torch.float64) * dof / 2
        weights = (dof / (2 * v)) ** (dof / 2) * torch.exp(-dof / (2 * v))
        return ScaleMixtureScore(weights, width**2 * v, shape, sde)

    @property
    def variance(self) -> float:
        """Of a pixel."""
        return float(self.weights @ self.var)

    def with_shape(self, shape: tuple[int, ...]) -> Self:
        other = self.to()
        other.shape = tuple(int(side) for side in shape)
        return other

    def _terms(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and alpha, wide; the components' variances at t and responsibilities, with an axis K at the end."""
        alpha, sigma2 = (s[..., None] for s in self._schedule(x, t))
        total = alpha**2 * self.var + sigma2
        wide = x.double()[..., None]
        logits = self.weights.log() - 0.5 * (wide.square() / total + total.log())
        return wide, alpha, total, logits

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        wide, alpha, total, logits = self._terms(x, t)
        gain = (logits.softmax(-1) * alpha * self.var / total).sum(-1)
        return (wide[..., 0] * gain).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        wide, _, total, logits = self._terms(x, t)
        return (-wide[..., 0] * (logits.softmax(-1) / total).sum(-1)).to(x.dtype)

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        _, _, _, logits = self._terms(x, t)
        pixel = logits.logsumexp(-1) - 0.5 * math.log(2 * math.pi)
        return pixel.flatten(1).sum(1).to(x.dtype)

    def sample(self, n: int, seed: int = 0) -> Tensor:
        ids = torch.arange(n, device=self.device)
        u = uniform(seed, ids, 0, self.shape, torch.float64)
        edges = self.weights.cumsum(0)
        component = torch.searchsorted(edges, u * edges[-1], right=True).clamp_max(
            len(self.var) - 1
        )
        z = normal(seed, ids, 0, self.shape, torch.float64, stream=EXACT_STREAM)
        return (self.var[component].sqrt() * z).to(self.dtype)
