"""Noise: the density of y - A(x).

For Gaussian noise of covariance Sigma over m data,

    log p(r) = -1/2 (r^T Sigma^-1 r + log det Sigma + m log 2 pi),     d log p/dr = -Sigma^-1 r.

All algebra goes through a whitening W with W^T W = Sigma^-1: (Sigma + s A A^T)^-1 = W^T (I + s W A
A^T W^T)^-1 W. A datum that was not taken has infinite variance: its row of W is zero, everything
stays finite, and it enters neither m nor the determinant. Fluxes may be 1e-20 in their unit, so
standard deviations, not variances, are what is kept and applied: squares would leave the range of
float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self, final

import torch
from torch import Tensor

from diffpost.gaussian import Dense, Independent, Stationary, standard_deviation
from diffpost.operators.base import Shape, as_double, numel

__all__ = ["BlockNoise", "GaussianNoise", "Noise"]


class Noise(ABC):
    """The distribution of residuals r = y - A(x), shaped (B, *data).

    ``log_prob``, ``score`` and ``sample`` are what every noise answers. The covariance algebra
    (``whiten`` and what follows from it) belongs to noises that have one.
    """

    @abstractmethod
    def log_prob(self, r: Tensor) -> Tensor:
        """log p(r), normalised over the data that are not masked: (B, *data) to (B,)."""

    @abstractmethod
    def score(self, r: Tensor) -> Tensor:
        """d log p/dr: (B, *data) to (B, *data)."""

    @abstractmethod
    def sample(
        self,
        shape: Sequence[int],
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A draw of this shape, (*data) or (B, *data), from a generator seeded by seed; 0 where
        masked.
        """

    @abstractmethod
    def ndata(self, shape: Shape) -> int | Tensor:
        """How many of the data (*shape) are not masked; (B,) where that differs between entries."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """Variance of each datum, float64, broadcastable to the data; infinite where masked."""

    @property
    def is_gaussian(self) -> bool:
        """Whether residuals are Gaussian, whatever their covariance."""
        return False

    def log_ratio(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """log p(end) - log p(start) of residuals (B, *data), and the estimate of its error; both (B,) float64.

        What a Metropolis test asks for. Here of ``log_prob``, without error; a noise that knows its score better than its
        density integrates that along the straight line.
        """
        value = self.log_prob(end).double() - self.log_prob(start).double()
        return value, torch.zeros_like(value)

    def surrogate(self, shape: Shape) -> Noise:
        """Gaussian noise of data (*shape) that is near this one: itself where it is Gaussian.

        Proposals and warm starts use it; no density does.

        Raises:
            ValueError: none is known.
        """
        raise ValueError(
            f"{self!r} has no Gaussian noise that stands in for it; give it a `surrogate`."
        )

    def check(self, shape: Shape) -> None:  # noqa: B027  some noises take any shape
        """Raises ValueError unless residuals may have this shape, (B, *data)."""

    @property
    def size(self) -> int | None:
        """Number of data, where the noise fixes it."""
        return None

    def whiten(self, r: Tensor) -> Tensor:
        """W r with W^T W = Sigma^-1, shaped as r."""
        raise NotImplementedError(f"{self!r} has no covariance to whiten by.")

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        """W^T v, shaped as v."""
        raise NotImplementedError(f"{self!r} has no covariance to whiten by.")

    def color(self, z: Tensor) -> Tensor:
        """A root of Sigma times z, shaped as z: a draw of the noise for standard normals z, 0 where masked."""
        raise NotImplementedError(f"{self!r} has no covariance to colour by.")

    def precision(self, r: Tensor) -> Tensor:
        """Sigma^-1 r, 0 where masked."""
        return self.whiten_adjoint(self.whiten(r))

    def chi2(self, r: Tensor) -> Tensor:
        """r^T Sigma^-1 r: (B,)."""
        return _sum(self.whiten(r).square())

    def masked(self, shape: Shape) -> Tensor | None:
        """Which of the data carry nothing, boolean, broadcastable to (B, *shape); None if all
        count.
        """
        return None

    def weight(self) -> Tensor | None:
        """Inverse variances, float64, if the data are independent; otherwise None."""
        return None

    def spectrum(self, shape: Shape) -> Tensor | None:
        """Eigenvalues of Sigma under the FFT2 of data (*shape), if it is diagonal there; otherwise
        None.
        """
        return None

    def select(self, ids: Tensor, shape: Shape) -> Noise:
        """The noise of these entries of a batch of data (B, *shape): itself if all have the same."""
        return self

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A copy there, for speed only."""
        return self


def _sum(values: Tensor) -> Tensor:
    """Sum over all but the first axis, accumulated in float64, in the dtype of the values."""
    return values.flatten(1).sum(1, dtype=torch.float64).to(values.dtype)


@final
class GaussianNoise(Noise):
    """Gaussian noise of mean zero. Exactly one argument.

    Args:
        std: standard deviation; a number, or a tensor broadcastable to the data (*data), or with an
            axis of its own for a batch of data, (B, *data). Infinite masks a datum.
        var: variance, likewise.
        weight: inverse variance, likewise; zero masks a datum.
        cov: (m, m) covariance of the flattened data.
        power: eigenvalues of the covariance under the orthonormal FFT2 of the last two axes (the
            mean of |FFT|^2), broadcastable to the data: stationary noise. P(k) = P(-k), as the
            noise is real.

    Raises:
        ValueError: none or several arguments; a negative, zero or NaN variance; a covariance that
            is not symmetric and positive definite.
    """

    def __init__(
        self,
        std: float | Tensor | None = None,
        var: float | Tensor | None = None,
        weight: float | Tensor | None = None,
        cov: Tensor | None = None,
        power: Tensor | None = None,
    ) -> None:
        given = {
            name: value
            for name, value in (
                ("std", std),
                ("var", var),
                ("weight", weight),
                ("cov", cov),
                ("power", power),
            )
            if value is not None
        }
        if len(given) != 1:
            raise ValueError(
                f"GaussianNoise: got {', '.join(given) or 'nothing'}; expected exactly one of std, var, weight, "
                "cov and power."
            )
        ((self._kind, value),) = given.items()
        values = as_double(value)
        values = values.detach()
        self._model: Independent | Dense | Stationary
        if self._kind == "cov":
            self._model = Dense(values)
        elif self._kind == "power":
            self._model = Stationary(values)
        else:
            self._model = Independent(standard_deviation(self._kind, values))

    def __repr__(self) -> str:
        size = tuple(self.variance.shape)
        inside = f"{float(self.variance) ** 0.5:.4g}" if not size else f"{size}"
        return (
            f"GaussianNoise(std={inside})" if not size else f"GaussianNoise({self._kind} {inside})"
        )

    @property
    def is_gaussian(self) -> bool:
        return True

    @property
    def variance(self) -> Tensor:
        return self._model.variance

    def check(self, shape: Shape) -> None:
        self._model.check(tuple(shape))

    @property
    def size(self) -> int | None:
        return self._model.size if isinstance(self._model, Dense) else None

    def whiten(self, r: Tensor) -> Tensor:
        return self._model.whiten(r)

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        return self._model.whiten_adjoint(v)

    def color(self, z: Tensor) -> Tensor:
        return self._model.color(z)

    def score(self, r: Tensor) -> Tensor:
        return -self.precision(r)

    def surrogate(self, shape: Shape) -> GaussianNoise:
        return self

    def log_prob(self, r: Tensor) -> Tensor:
        chi2 = self.chi2(r)
        return self._model.log_normalisation(r).to(r.dtype) - 0.5 * chi2

    def sample(
        self,
        shape: Sequence[int],
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
        kind = dtype or torch.get_default_dtype()
        return self._model.color(z).to(device=device, dtype=kind)

    def ndata(self, shape: Shape) -> int | Tensor:
        masked = self.masked(shape)
        if masked is None:
            return numel(shape)
        front = masked.shape[: max(masked.ndim - len(shape), 0)]
        count = (~masked).expand(*front, *shape).reshape(-1, numel(shape)).sum(1)
        return int(count[0]) if bool((count == count[0]).all()) else count

    def masked(self, shape: Shape) -> Tensor | None:
        return self._model.masked

    def weight(self) -> Tensor | None:
        return self._model.weight if isinstance(self._model, Independent) else None

    def spectrum(self, shape: Shape) -> Tensor | None:
        return self._model.spectrum(tuple(shape))

    def select(self, ids: Tensor, shape: Shape) -> GaussianNoise:
        if not isinstance(self._model, Independent) or self._model.std.ndim <= len(shape):
            return self
        std = self._model.std
        return self if std.shape[0] == 1 else GaussianNoise(std=std[ids.to(std.device)])


@final
class BlockNoise(Noise):
    """Independent noises of joint data: (B, m) is the flattened data of each, one after the other.

    Args:
        noises: of each part.
        shapes: of the data of each part, without the batch axis.
    """

    def __init__(self, noises: Sequence[Noise], shapes: Sequence[Shape]) -> None:
        if not noises or len(noises) != len(shapes):
            raise ValueError(
                f"BlockNoise: got {len(noises)} noises and {len(shapes)} shapes of data."
            )
        self.noises = tuple(noises)
        self.shapes = tuple(map(tuple, shapes))

    def __repr__(self) -> str:
        return f"BlockNoise({list(self.noises)!r})"

    def check(self, shape: Shape) -> None:
        for noise, part in zip(self.noises, self.shapes, strict=True):
            noise.check((shape[0], *part))

    @property
    def is_gaussian(self) -> bool:
        return all(noise.is_gaussian for noise in self.noises)

    @property
    def size(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """How many data each part has."""
        return [numel(shape) for shape in self.shapes]

    def _parts(self, r: Tensor) -> list[Tensor]:
        if r.ndim != 2 or r.shape[1] != sum(self.sizes):
            raise ValueError(
                f"{self!r}: got {tuple(r.shape)}; expected joint data (B, {sum(self.sizes)})."
            )
        pieces = zip(r.split(self.sizes, 1), self.shapes, strict=True)
        return [piece.reshape(-1, *shape) for piece, shape in pieces]

    def _each(self, r: Tensor, act: Callable[[Noise, Tensor], Tensor]) -> Tensor:
        parts = zip(self.noises, self._parts(r), strict=True)
        return torch.cat([act(noise, part).flatten(1) for noise, part in parts], 1)

    def whiten(self, r: Tensor) -> Tensor:
        return self._each(r, lambda noise, part: noise.whiten(part))

    def whiten_adjoint(self, v: Tensor) -> Tensor:
        return self._each(v, lambda noise, part: noise.whiten_adjoint(part))

    def color(self, z: Tensor) -> Tensor:
        return self._each(z, lambda noise, part: noise.color(part))

    def precision(self, r: Tensor) -> Tensor:
        return self._each(r, lambda noise, part: noise.precision(part))

    def score(self, r: Tensor) -> Tensor:
        return self._each(r, lambda noise, part: noise.score(part))

    def log_prob(self, r: Tensor) -> Tensor:
        terms = [
            noise.log_prob(part) for noise, part in zip(self.noises, self._parts(r), strict=True)
        ]
        return torch.stack(terms).sum(0)

    def chi2(self, r: Tensor) -> Tensor:
        terms = [noise.chi2(part) for noise, part in zip(self.noises, self._parts(r), strict=True)]
        return torch.stack(terms).sum(0)

    def log_ratio(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.noises, self._parts(start), self._parts(end), strict=True)
        found = [noise.log_ratio(a, b) for noise, a, b in pairs]
        value, error = (torch.stack(part).sum(0) for part in zip(*found, strict=True))
        return value, error

    def surrogate(self, shape: Shape) -> BlockNoise:
        if self.is_gaussian:
            return self
        parts = zip(self.noises, self.shapes, strict=True)
        return BlockNoise([noise.surrogate(part) for noise, part in parts], self.shapes)

    def sample(
        self,
        shape: Sequence[int],
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        front = tuple(shape)[:-1]
        if len(front) > 1 or not shape or shape[-1] != sum(self.sizes):
            raise ValueError(
                f"{self!r}: got shape {tuple(shape)}; expected ([B,] {sum(self.sizes)})."
            )
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(self.noises),), generator=generator).tolist()
        draws = [
            noise.sample((*front, *part), each, dtype, device).reshape(*front, -1)
            for noise, part, each in zip(self.noises, self.shapes, seeds, strict=True)
        ]
        return torch.cat(draws, -1)

    def ndata(self, shape: Shape) -> int | Tensor:
        counts: list[Any] = [n.ndata(s) for n, s in zip(self.noises, self.shapes, strict=True)]
        total: int | Tensor = sum(counts)
        return total

    @property
    def variance(self) -> Tensor:
        return self._join([noise.variance for noise in self.noises])

    def masked(self, shape: Shape) -> Tensor | None:
        masks = [n.masked(s) for n, s in zip(self.noises, self.shapes, strict=True)]
        if all(mask is None for mask in masks):
            return None
        return self._join([torch.zeros((), dtype=torch.bool) if m is None else m for m in masks])

    def weight(self) -> Tensor | None:
        weights = [noise.weight() for noise in self.noises]
        known = [w for w in weights if w is not None]
        return self._join(known) if len(known) == len(weights) else None

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        """Values of each part, broadcastable to its data, as values of the joint data."""
        rows = []
        for value, shape in zip(values, self.shapes, strict=True):
            if value.ndim == 1 and value.numel() == numel(shape):  # a covariance's, already flat
                value = value.reshape(shape)
            front = value.shape[: max(value.ndim - len(shape), 0)]
            rows.append(value.expand(*front, *shape).reshape(-1, numel(shape)))
        entries = max(len(row) for row in rows)
        joint = torch.cat([row.expand(entries, -1) for row in rows], 1)
        return joint[0] if entries == 1 else joint

    def select(self, ids: Tensor, shape: Shape) -> BlockNoise:
        chosen = [n.select(ids, s) for n, s in zip(self.noises, self.shapes, strict=True)]
        return BlockNoise(chosen, self.shapes)
