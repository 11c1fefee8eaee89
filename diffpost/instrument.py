"""Score models that watch another: counts of evaluations, and which term first fails to be
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.posterior import Posterior
from diffpost.score import ScoreModel


@final
@dataclass
class Counter:
    """Evaluations of a denoiser for each draw.

    Attributes:
        draws: in the batch; a call on k times as many images counts k times. 0 counts every call once.
        calls: of the denoiser or the score.
        vjps: products with its Jacobian, transposed or not.
    """

    draws: int = 0
    calls: float = 0
    vjps: int = 0

    def evaluated(self, x: Tensor) -> None:
        """Adds a call on x (B, ...)."""
        self.calls += len(x) / self.draws if self.draws else 1

    @property
    def per_draw(self) -> int:
        """The calls, rounded up: where only some entries of a batch need one, it is a fraction."""
        return math.ceil(self.calls - 1e-6)


class NonFiniteError(FloatingPointError):
    """A state became infinite or NaN.

    Attributes:
        term: what produced it.
        t: time of the evaluation.
        entries: (B,) which entries of the batch.
    """

    def __init__(self, message: str, term: str, t: Tensor, entries: Tensor) -> None:
        super().__init__(message)
        self.term = term
        self.t = t
        self.entries = entries


def counted(model: ScoreModel, counter: Counter) -> ScoreModel:
    """The same model, counting evaluations of the innermost prior, also those that a guidance
    makes.
    """
    if isinstance(model, Posterior):
        return model.with_prior(counted(model.prior, counter))
    return Counted(model, counter)


class Wrapped(ScoreModel):
    """A model that answers as another, in its units."""

    def __init__(self, inner: ScoreModel) -> None:
        self.inner = inner
        self.sde = inner.sde
        self.shape = inner.shape
        self.scale = inner.scale
        self.offset = inner.offset
        self.analytic = inner.analytic

    def __repr__(self) -> str:
        return repr(self.inner)

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device


@final
class Counted(Wrapped):
    """Counts evaluations and Jacobian products."""

    def __init__(self, inner: ScoreModel, counter: Counter) -> None:
        super().__init__(inner)
        self.counter = counter

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        self.counter.evaluated(x)
        return self.inner.denoise(x, t)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        self.counter.evaluated(x)
        return self.inner.score(x, t)

    def denoise_vjp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.counter.evaluated(x)
        denoised, product = self.inner.denoise_vjp(x, t)
        return denoised, self._count(product)

    def denoise_jvp(self, x: Tensor, t: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        self.counter.evaluated(x)
        denoised, product = self.inner.denoise_jvp(x, t)
        return denoised, self._count(product)

    def jacobian_spectrum(self, x: Tensor, t: Tensor) -> Tensor | None:
        return self.inner.jacobian_spectrum(x, t)

    def _count(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def counting(v: Tensor) -> Tensor:
            self.counter.vjps += 1
            return product(v)

        return counting


@final
class Probe(Wrapped):
    """Raises :class:`NonFiniteError` as soon as an answer is not finite, naming the term at
    fault.
    """

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.inner.denoise(x, t)
        self._check(out, x, t)
        return out

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.inner.score(x, t)
        self._check(out, x, t)
        return out

    def _check(self, out: Tensor, x: Tensor, t: Tensor) -> None:
        bad = _not_finite(out)
        if not bool(bad.any()):
            return
        term = "the denoiser"
        if isinstance(self.inner, Posterior):
            for name, value in self.inner.terms(x, t).items():
                if bool(_not_finite(value).any()):
                    term = name
                    break
        raise NonFiniteError(f"{term} is not finite", term=term, t=t, entries=bad)


def _not_finite(x: Tensor) -> Tensor:
    return ~torch.isfinite(x).flatten(1).all(1)
