r"""A Gaussian of images by its modes.

    x = m + sum_k c_k s_k e_k,     c ~ N(0, I),

with orthonormal images e_k and standard deviations s_k: all of them, or those that hold nearly all of the variance. It
stands in for a prior of images where one needs p(y | theta) in closed form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import numel
from diffpost.score import GaussianScore

__all__ = ["GaussianImage"]

_DENSE = 4096  # pixels, above which a covariance matrix is refused


@final
@dataclass(frozen=True)
class GaussianImage:
    """N(m, sum_k s_k^2 e_k e_k^T), in physical units.

    Attributes:
        mean: (*shape) float64.
        modes: (K, *shape) float64, orthonormal.
        std: (K,) positive, largest first.

    Raises:
        ValueError: shapes that do not fit, modes that are not orthonormal, or a std that is not positive.
    """

    mean: Tensor
    modes: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "modes", "std"):
            object.__setattr__(self, name, getattr(self, name).detach().double())
        shape = tuple(self.mean.shape)
        if tuple(self.modes.shape[1:]) != shape or self.std.shape != self.modes.shape[:1]:
            raise ValueError(
                f"GaussianImage: mean {shape}, modes {tuple(self.modes.shape)} and std {tuple(self.std.shape)}; expected "
                "(*shape), (K, *shape) and (K,)."
            )
        if len(self.std) == 0 or not bool((self.std > 0).all() & self.std.isfinite().all()):
            raise ValueError("GaussianImage: expected at least one mode, and positive std.")
        flat = self.modes.flatten(1)
        gram = flat @ flat.T - torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
        if float(gram.abs().max()) > 1e-6:
            raise ValueError("GaussianImage: the modes are not orthonormal; take from_covariance.")

    def __repr__(self) -> str:
        return f"GaussianImage({len(self.std)} modes of {tuple(self.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mean.shape)

    @property
    def scaled_modes(self) -> Tensor:
        """s_k e_k, (K, *shape)."""
        return self.modes * self.std.reshape(-1, *[1] * self.mean.ndim)

    def images(self, c: Tensor) -> Tensor:
        """m + sum_k c_k s_k e_k: (B, K) to (B, *shape)."""
        flat = c.to(self.modes) @ self.scaled_modes.flatten(1)
        return self.mean + flat.reshape(len(c), *self.shape)

    def coordinates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """c of images (B, *shape), (B, K), and what the modes leave of x - m, (B, *shape)."""
        off = x.to(self.modes) - self.mean
        amplitudes = off.flatten(1) @ self.modes.flatten(1).T
        rest = off - (amplitudes @ self.modes.flatten(1)).reshape(off.shape)
        return amplitudes / self.std, rest

    def scaled(self, factor: float) -> GaussianImage:
        """The Gaussian of factor x."""
        if not 0 < factor < math.inf:
            raise ValueError(f"GaussianImage.scaled({factor}): expected a positive number.")
        return GaussianImage(factor * self.mean, self.modes, factor * self.std)

    def truncated(self, modes: int | None = None, share: float | None = None) -> GaussianImage:
        """With the first modes alone: so many, or as many as hold this share of the variance.

        Raises:
            ValueError: both or neither, or out of range.
        """
        if (modes is None) == (share is None):
            raise ValueError(
                "GaussianImage.truncated: expected either a number of modes or a share."
            )
        if share is not None:
            if not 0 < share <= 1:
                raise ValueError(
                    f"GaussianImage.truncated(share={share}): expected 0 < share <= 1."
                )
            held = self.std.square().cumsum(0)
            modes = int((held < share * held[-1] * (1 - 1e-12)).sum()) + 1
        if modes is None or not 1 <= modes <= len(self.std):
            raise ValueError(
                f"GaussianImage.truncated(modes={modes}): expected 1 to {len(self.std)} modes."
            )
        return GaussianImage(self.mean, self.modes[:modes], self.std[:modes])

    @staticmethod
    def from_covariance(mean: Tensor, cov: Tensor) -> GaussianImage:
        """Of a covariance (d, d) of the flattened image; modes of no variance are left out.

        Raises:
            ValueError: more than 4096 pixels, or not a covariance.
        """
        size = mean.numel()
        _check_size(size)
        if tuple(cov.shape) != (size, size) or bool(
            (cov - cov.T).abs().max() > 1e-6 * cov.abs().max()
        ):
            raise ValueError(
                f"GaussianImage: got a covariance {tuple(cov.shape)} for {size} pixels; expected a symmetric "
                f"({size}, {size})."
            )
        values, vectors = torch.linalg.eigh(0.5 * (cov + cov.T).double())
        keep = values.flip(0) > 1e-12 * values[-1]
        modes = vectors.T.flip(0)[keep]
        return GaussianImage(mean, modes.reshape(-1, *mean.shape), values.flip(0)[keep].sqrt())

    @staticmethod
    def from_power(mean: Tensor, power: Tensor) -> GaussianImage:
        """Of a stationary field: power of the orthonormal FFT2 of the last two axes, broadcastable to the image.

        The modes are cos + sin of 2 pi k x (Hartley), one for each k and channel.

        Raises:
            ValueError: more than 4096 pixels, or a power that is negative or differs between k and -k.
        """
        shape = tuple(mean.shape)
        _check_size(mean.numel())
        if mean.ndim < 2:
            raise ValueError(f"GaussianImage.from_power: got images {shape}; expected (..., H, W).")
        full = power.double().expand(shape).to(mean.device)
        mirrored = full.flip(-2, -1).roll((1, 1), (-2, -1))
        if bool((full < 0).any()) or not torch.allclose(full, mirrored, rtol=1e-4):
            raise ValueError(
                "GaussianImage.from_power: got a power that is negative or differs between k and -k."
            )
        height, width = shape[-2:]
        rows, columns = (
            torch.outer(n, n) / len(n)
            for n in (torch.arange(s, dtype=torch.float64) for s in (height, width))
        )
        phase = 2 * math.pi * (rows[:, None, :, None] + columns[None, :, None, :])
        waves = (phase.cos() + phase.sin()) / math.sqrt(height * width)
        waves = waves.reshape(height * width, height * width).to(mean.device)
        channels = numel(shape[:-2])
        eye = torch.eye(channels, dtype=torch.float64, device=mean.device)
        modes = torch.kron(eye, waves).reshape(-1, *shape)
        std, order = full.flatten().sqrt().sort(descending=True)
        keep = std > 1e-6 * std[0]
        return GaussianImage(mean, modes[order[keep]], std[keep])

    @staticmethod
    def from_score(score: GaussianScore) -> GaussianImage:
        """Of a Gaussian score model, exactly, in its physical units.

        Raises:
            ValueError: more than 4096 pixels, or a scale that differs between pixels.
        """
        scale = score.scale
        if isinstance(scale, Tensor):
            if not bool((scale == scale.reshape(-1)[0]).all()):
                raise ValueError(
                    "GaussianImage.from_score: the prior's scale differs between pixels; take from_covariance."
                )
            scale = float(scale.reshape(-1)[0])
        mean = score.to_physical(score.mean.double()[None])[0]
        size = score.mean.numel()
        _check_size(size)
        eye = torch.eye(size, dtype=torch.float64, device=score.device).reshape(-1, *score.shape)
        cov = score._apply(score.eigenvalues, eye).reshape(size, size)
        return GaussianImage.from_covariance(mean, scale**2 * cov)

    @staticmethod
    def from_draws(x: Tensor, share: float | None = None) -> GaussianImage:
        """Of the mean and covariance of draws (n, *shape), such as those of a diffusion prior.

        The sample covariance S is shrunk to (1 - a) S + a tr(S)/d I with a of Ledoit & Wolf (2004, J. Multivar. Anal.
        88, 365, section 3.3), which is the better the fewer draws there are for the pixels.

        Args:
            x: in physical units.
            share: of the variance that the modes kept should hold; None keeps all.

        Raises:
            ValueError: fewer than 2 draws, or more than 4096 pixels.
        """
        n, shape = len(x), tuple(x.shape[1:])
        size = numel(shape)
        _check_size(size)
        if n < 2:
            raise ValueError(f"GaussianImage.from_draws: got {n} draws; expected at least 2.")
        flat = x.detach().double().flatten(1)
        mean = flat.mean(0)
        off = flat - mean
        cov = off.T @ off / n
        level = cov.diagonal().mean()
        eye = torch.eye(size, dtype=cov.dtype, device=cov.device)
        distance = (cov - level * eye).square().sum()
        # sum_i |x_i x_i^T - S|^2 = sum_i |x_i|^4 - n |S|^2
        scatter = (off.square().sum(1).square().sum() - n * cov.square().sum()) / n**2
        a = float((scatter / distance).clamp(0, 1)) if float(distance) > 0 else 1.0
        shrunk = (1 - a) * cov + a * level * eye
        found = GaussianImage.from_covariance(mean.reshape(shape), shrunk)
        return found if share is None else found.truncated(share=share)


def _check_size(size: int) -> None:
    if size > _DENSE:
        raise ValueError(
            f"GaussianImage: got {size} pixels; a covariance of all of them is kept, so expected at most {_DENSE}. Bin "
            "the source, or give its modes."
        )
