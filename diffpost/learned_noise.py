r"""Noise known through a score model: SLIC (Legin et al. 2023, arXiv:2302.03046).

A score model eta of blank sky gives s_eta(r) = d log p(r)/dr, and with r = y - A(x)

    grad_x log p(y | x) = -A'(x)^T s_eta(y - A(x))

(their equation 4). A score model knows p_eta blurred: at noise-to-signal ratio nu its score is that of r + scale nu z.
So a Gaussian part of variance v that comes on top of the noise is a question of where the score is evaluated,

    n = n_eta + e,   e ~ N(0, v):      s(r) = s_eta(r; scale nu = sqrt(v)),

exactly, if v is the same everywhere. For a covariance diag(v_i), or diag(q_k) in Fourier space, datum i, or mode k, is
taken from the score at its own v_i or q_k, interpolated in log v between ``levels`` of them, as T(v) = (c + v) s(v), c the
noise's variance: T hardly changes with v. That is exact, but for the interpolation, if p_eta has independent pixels, or
is Gaussian and stationary for q; otherwise it is right where v varies little over the noise's correlation length, and
the score is not quite a gradient.

Without a Gaussian part a temperature is needed all the same: what is used is p_eta blurred by a little (``temperature``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self, final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffpost.line_integral import integral_between
from diffpost.noise import GaussianNoise, Noise
from diffpost.noise_flow import Flow, Perturbation
from diffpost.operators.base import Shape, as_double, numel, on_grid
from diffpost.scale_mixture import ScaleMixtureScore
from diffpost.score import GaussianScore, ScoreModel
from diffpost.tiling import fitted

__all__ = ["LearnedNoise"]

_TEMPERATURE = 0.1  # of networks, whose score is poor where there is hardly any noise
_DRAWS = 32  # from which the variance of a model that does not tell it is measured
_EQUAL = 1e-6
_COARSE = 1.5  # steps of the flow for each e-fold of temperature, for rough draws


@final
class LearnedNoise(Noise):
    """The noise that a score model has learned, perhaps with Gaussian noise on top.

    Exact as far as the model is, for p_eta blurred by ``temperature`` and a Gaussian part that is white; for other
    Gaussian parts see above. A posterior takes it by the guidance ``SLIC`` and the chains ``MALA`` and ``Langevin``;
    guidances that need a covariance refuse it.

    Args:
        score_model: of the noise, in the units that its scale and offset give; mean zero is not assumed. Data of
            another size than its images are done by ``with_shape`` where the model can, else in overlapping tiles
            (:class:`TiledScore <diffpost.tiling.TiledScore>`), whose error is stated there.
        plus: Gaussian noise on top, of any kind but a dense covariance, in the units of the data. ``LearnedNoise + GaussianNoise`` is the
            same. Signal-dependent noise is the variance at a fixed estimate of the signal: it does not follow x.
        temperature: standard deviation of the blur, as a share of the noise's; None is the process's lowest for models in
            closed form and 0.1 for networks. It adds its square to the variance where ``plus`` has less.
        surrogate: Gaussian noise that is like this, ``plus`` not counted: for proposals, warm starts and the end of the
            flow. None takes the model's own where it is Gaussian, otherwise white noise of its variance, from the
            model, its card ("noise_std", in network units), or 32 draws.
        levels: at which a score is evaluated where the Gaussian part is not white.
        steps: of the probability flow, in log_prob and sample; four evaluations each.
        exact_trace: data up to which log_prob takes the trace of the Jacobian exactly; above, Hutchinson's estimate.
        probes: of that estimate.
        seed: of the probes.
        nodes: evaluations at most along the line of ``log_ratio``, 2^k + 1.

    Raises:
        ValueError: numbers out of range; a scale that differs between pixels; ``plus`` of a dense covariance.
    """

    def __init__(
        self,
        score_model: ScoreModel,
        plus: GaussianNoise | None = None,
        *,
        temperature: float | None = None,
        surrogate: GaussianNoise | None = None,
        levels: int = 8,
        steps: int = 32,
        exact_trace: int = 64,
        probes: int = 8,
        seed: int = 0,
        nodes: int = 33,
    ) -> None:
        if min(levels, probes) < 2 or steps < 4 or nodes < 5 or (nodes - 1) & (nodes - 2):
            raise ValueError(
                f"LearnedNoise(levels={levels}, probes={probes}, steps={steps}, nodes={nodes}): expected at least 2 levels "
                "and probes, 4 steps, and 5, 9, 17, ... nodes."
            )
        if temperature is not None and not 0 < temperature < math.inf:
            raise ValueError(
                f"LearnedNoise(temperature={temperature}): expected a positive number or None."
            )
        scale = as_double(score_model.scale).reshape(-1)
        if bool((scale != scale[0]).any()):
            raise ValueError(
                "LearnedNoise: the model's scale differs between pixels; expected one number, so that its own "
                "perturbation is white in the units of the data."
            )
        self.score_model = score_model
        self.plus = plus
        self.temperature = temperature
        self.levels, self.steps, self.exact_trace, self.probes = levels, steps, exact_trace, probes
        self.seed, self.nodes = seed, nodes
        self._given = surrogate
        self._measured: Tensor | None = None
        self._scale = abs(float(scale[0]))
        self._own = _perturbation(plus)
        self._variance: float | None = None
        self._fitted: dict[Shape, ScoreModel] = {}

    def __repr__(self) -> str:
        more = "" if self.plus is None else f", plus={self.plus!r}"
        return f"LearnedNoise({self.score_model!r}{more})"

    def __add__(self, other: GaussianNoise) -> LearnedNoise:
        """With independent Gaussian noise on top."""
        if not isinstance(other, GaussianNoise):
            return NotImplemented
        if self.plus is not None:
            raise ValueError(
                f"LearnedNoise: there is {self.plus!r} already; add up the variances and give them as one."
            )
        changed = copy.copy(self)
        changed.plus, changed._own = other, _perturbation(other)
        return changed

    __radd__ = __add__

    # what is known of it -----------------------------------------------------------------------

    @property
    def blur(self) -> float:
        """Standard deviation of the blur, in the units of the data."""
        lowest, highest = (self._scale * nsr for nsr in self.score_model.sde.nsr_range)
        if self.temperature is None and self.score_model.analytic:
            return lowest
        share = _TEMPERATURE if self.temperature is None else self.temperature
        return min(max(share * math.sqrt(self.own_variance), lowest), highest)

    @property
    def own_variance(self) -> float:
        """Mean variance of a datum, the Gaussian part not counted."""
        if self._variance is None:
            self._variance = self._find_variance()
        return self._variance

    def _find_variance(self) -> float:
        model = self.score_model
        if self._given is not None:
            return float(self._given.variance.mean())
        if isinstance(model, GaussianScore):
            return self._scale**2 * float(model.eigenvalues.mean())
        if isinstance(model, ScaleMixtureScore):
            return self._scale**2 * model.variance
        card: dict[str, Any] = getattr(model, "card", {})
        if "noise_std" in card:
            return (self._scale * float(card["noise_std"])) ** 2
        kind = torch.promote_types(model.dtype, torch.float32)
        generator = torch.Generator().manual_seed(self.seed)
        z = torch.randn(_DRAWS, *model.shape, generator=generator, dtype=torch.float64)
        low = self._scale * model.sde.nsr_range[0]
        z = z.to(model.device, kind)
        draws = self._flow(Perturbation.white(low**2)).backward(z, self._mean(z))
        return float(draws.double().var())

    @property
    def variance(self) -> Tensor:
        own = torch.tensor(self.own_variance, dtype=torch.float64)
        return own if self.plus is None else own + self.plus.variance

    def surrogate(self, shape: Shape) -> GaussianNoise:
        model = self.score_model
        own: GaussianNoise | None = self._given
        if own is None and isinstance(model, GaussianScore) and tuple(shape) == model.shape:
            values = self._scale**2 * model.eigenvalues
            if model._kind == "power":
                own = GaussianNoise(power=values + 1e-12 * values.max())
            elif model._kind == "var":
                own = GaussianNoise(var=values)
        if own is None and self._measured is not None and len(shape) >= 2:
            own = GaussianNoise(power=on_grid(self._measured)((shape[-2], shape[-1])))
        if own is None:
            own = GaussianNoise(var=self.own_variance)
        if self.plus is None:
            return own
        first, second = own.spectrum(shape), self.plus.spectrum(shape)
        if first is not None and second is not None and max(first.ndim, second.ndim) > 1:
            return GaussianNoise(power=first + second)
        return GaussianNoise(var=own.variance + self.plus.variance)

    def with_spectrum(self, draws: int = 128) -> LearnedNoise:
        """The same noise, whose surrogate has its power spectrum: the mean periodogram of draws of the model's own size.

        A Gaussian model's own spectrum is taken as it is; a surrogate that was given stays, and so does that of models that
        are not of images. For data of another size it is interpolated in frequency.

        Args:
            draws: from which it is measured; each mode to about draws^-1/2.

        Raises:
            ValueError: fewer than 8 draws.
        """
        if draws < 8:
            raise ValueError(f"with_spectrum(draws={draws}): expected 8 or more.")
        model = self.score_model
        if self._given is not None or len(model.shape) < 2 or min(model.shape[-2:]) < 4:
            return self
        alone, changed = self.without_plus(), copy.copy(self)
        if isinstance(model, GaussianScore) and model._kind == "power":
            power = self._scale**2 * model.eigenvalues + self.blur**2
            changed._measured = power.expand(model.shape).reshape(-1, *model.shape[-2:]).mean(0)
            return changed
        x = alone.rough_draws((draws, *model.shape), self.seed).double()
        off = (x - x.mean()).reshape(-1, *model.shape[-2:])
        changed._measured = torch.fft.fft2(off, norm="ortho").abs().square().mean(0)
        return changed

    def rough_draws(self, shape: Sequence[int], seed: int) -> Tensor:
        """As ``sample``, in float32, by no more steps of the flow than a spectrum or a moment to a per cent needs."""
        other = copy.copy(self)
        span = math.log(self._scale * self.score_model.sde.nsr_range[1] / self.blur)
        other.steps = max(4, math.ceil(_COARSE * span))
        return other.sample(shape, seed, torch.float32)

    def without_plus(self) -> LearnedNoise:
        """The same without Gaussian noise on top."""
        alone = copy.copy(self)
        alone.plus, alone._own = None, _perturbation(None)
        return alone

    def chi2(self, r: Tensor) -> Tensor:
        """-(r - m) . s(r), (B,), m the origin of the model's units: its expectation is the number of data for any noise, by
        parts, and for a Gaussian of that mean it is (r - m)^T Sigma^-1 (r - m).
        """
        return (
            -((r - self._mean(r)) * self.score(r))
            .flatten(1)
            .sum(1, dtype=torch.float64)
            .to(r.dtype)
        )

    def ndata(self, shape: Shape) -> int | Tensor:
        return numel(shape) if self.plus is None else self.plus.ndata(shape)

    def masked(self, shape: Shape) -> Tensor | None:
        return None if self.plus is None else self.plus.masked(shape)

    def check(self, shape: Shape) -> None:
        if self.plus is not None:
            self.plus.check(shape)
        self._model(tuple(shape[1:]))

    def select(self, ids: Tensor, shape: Shape) -> LearnedNoise:
        if self.plus is None:
            return self
        chosen = self.plus.select(ids, shape)
        if chosen is self.plus:
            return self
        other = copy.copy(self)
        other.plus, other._own = chosen, _perturbation(chosen)
        return other

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        move = getattr(self.score_model, "to", None)
        if move is None:
            return self
        other = copy.copy(self)
        other.score_model, other._fitted = move(device=device, dtype=dtype), {}
        return other

    # the score ---------------------------------------------------------------------------------

    def score(self, r: Tensor) -> Tensor:
        return self.score_with(r, None)

    def score_with(self, r: Tensor, more: Perturbation | None) -> Tensor:
        """d/dr of log (p * N(0, K)): the score of this noise with a Gaussian of covariance K on top.

        What a matched temperature needs: the data of an image that is known to a covariance C have such noise, K = A C A^T.
        Exact as the Gaussian part is (see the module); where one is diag(v_i) and the other diag(q_k), the mean of q
        is added to v.

        Args:
            r: (B, *data).
            more: K, or None for nothing.
        """
        self._check_residual(r)
        level = self._own if more is None else self._own.plus(more)
        return self._at(r, level.floored(self.blur**2))

    def _at(self, r: Tensor, level: Perturbation) -> Tensor:
        """The score with all of K in ``level``, nothing added."""
        gone = level.masked
        if gone is not None:
            r = r.masked_fill(gone.to(r.device), 0.0)
        low, high = level.ends(r)
        if bool((high <= low * (1 + _EQUAL)).all()):
            out = self._white(r, low)
        else:
            out = self._interpolated(r, level, low, high)
        return out if gone is None else out.masked_fill(gone.to(r.device), 0.0)

    def _interpolated(self, r: Tensor, level: Perturbation, low: Tensor, high: Tensor) -> Tensor:
        span = (high / low).log().clamp_min(_EQUAL)
        wide = [-1, *[1] * (r.ndim - 1)]
        values = level.values.to(r.device)
        place = (values.log() - low.log().reshape(wide)) / span.reshape(wide)
        place = (place * (self.levels - 1)).nan_to_num(posinf=0.0)
        centre = self.own_variance
        total: Tensor | float = 0.0
        for j in range(self.levels):
            weight = (1 - (place - j).abs()).clamp_min(0.0).to(r.dtype)
            if not bool((weight > 0).any()):
                continue
            v = low * (span * (j / (self.levels - 1))).exp()
            part = self._white(r, v) * (centre + v).to(r.dtype).reshape(wide)
            total = total + weight * (torch.fft.fft2(part) if level.spectral else part)
        scaled = total / (centre + values).to(r.dtype)
        return torch.fft.ifft2(scaled).real if level.spectral else torch.as_tensor(scaled)

    def _white(self, r: Tensor, v: Tensor) -> Tensor:
        """d log p_v/dr with a white Gaussian part of variance v, (1,) or (B,)."""
        model = self._model(tuple(r.shape[1:]))
        lowest, highest = model.sde.nsr_range
        wanted = v.double().sqrt() / self._scale
        nsr = wanted.clamp(lowest, highest)
        t = model.sde.t_of_nsr(nsr).clamp(model.sde.t_min, model.sde.t_max)
        t = t[0] if len(t) == 1 else t
        images = r.reshape(len(r), *model.shape)
        u = model.to_model(images)
        alpha = model.sde.alpha(t).to(u).reshape(-1, *[1] * (u.ndim - 1))
        found = alpha * model.score(alpha * u, t) / _number(model.scale)
        if bool((wanted > highest * (1 + 1e-9)).any()):
            # hotter than the model goes: there it is Gaussian
            hot = (self._mean(r).reshape(1, *model.shape) - images) / (self.own_variance + v).to(
                u
            ).reshape(-1, *[1] * (u.ndim - 1))
            above = (wanted > highest).reshape(-1, *[1] * (u.ndim - 1))
            found = torch.where(above, hot, found)
        return found.reshape(r.shape)

    def _model(self, shape: Shape) -> ScoreModel:
        found = self._fitted.get(shape)
        if found is None:
            found = self._fitted[shape] = fitted(self.score_model, shape)
        return found

    def _mean(self, like: Tensor) -> Tensor:
        """The origin of the model's units, (1, *data)."""
        shape = tuple(like.shape[1:])
        model = self._model(shape)
        zero = torch.zeros(1, *model.shape, dtype=like.dtype, device=like.device)
        return model.to_physical(zero).reshape(1, *shape)

    def _check_residual(self, r: Tensor) -> None:
        if self.plus is not None:
            self.plus.check(tuple(r.shape))

    # densities ---------------------------------------------------------------------------------

    def _flow(self, level: Perturbation) -> Flow:
        highest = self._scale * self.score_model.sde.nsr_range[1]
        return Flow(self._at, level, highest**2, self.steps)

    def log_prob(self, r: Tensor) -> Tensor:
        """log p(r), (B,), by the probability flow (:mod:`diffpost.noise_flow`); ``log_prob_error`` tells how well.

        Its gradient, where autograd asks, is ``score``, which costs one evaluation and not those of the flow.
        """
        found: Tensor = _LogProb.apply(r, self)
        return found

    def log_prob_error(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """log p(r) and the standard error of Hutchinson's trace, both (B,); the error is 0 where the trace is exact.

        The error of ``steps`` is not in it: compare two of them.
        """
        self._check_residual(r)
        level = self._own.floored(self.blur**2)
        count = numel(tuple(r.shape[1:]))
        probes = None if count <= self.exact_trace else self.probes
        end, gained, error = self._flow(level).forward(r.detach(), probes, self.seed)
        return self._hot_log_prob(end, level) + gained, error

    def _hot_log_prob(self, r: Tensor, level: Perturbation) -> Tensor:
        """log p at the end of the flow, where the noise is a small part of the Gaussian, (B,) float64."""
        off = (r - self._mean(r)).double()
        hot = self._flow(level).hottest
        values = (hot.values + self.own_variance).to(r.device)
        modes = torch.fft.fft2(off, norm="ortho").abs() if hot.spectral else off
        square = modes.square()
        terms = -0.5 * (square / values + values.log() + math.log(2 * math.pi))
        if hot.masked is not None:
            terms = terms.masked_fill(hot.masked.to(r.device), 0.0)
        return terms.expand(r.shape).flatten(1).sum(1)

    def log_ratio(self, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """log p(end) - log p(start) by the integral of the score along the straight line, and its estimated error.

        Minus the same number backwards. Entries in doubt are refined to ``nodes`` evaluations.
        """

        def score(r: Tensor, ids: Tensor) -> Tensor:
            return self.select(ids, tuple(r.shape[1:])).score(r)

        return integral_between(score, start.detach(), end.detach(), self.nodes - 1)

    def sample(
        self,
        shape: Sequence[int],
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """New noise: the probability flow backwards from normals, and the Gaussian part; 0 where masked."""
        kind = dtype or torch.get_default_dtype()
        generator = torch.Generator().manual_seed(seed)
        shape = tuple(shape)
        own = self.score_model.shape
        # data may lack the axis of one channel
        single = len(shape) < len(own) or (len(shape) == len(own) and shape[:-2] == own[:-2])
        full = (1, *shape) if single else shape
        z = torch.randn(full, generator=generator, dtype=torch.float64)
        compute = torch.promote_types(kind, torch.float32)
        clean = Perturbation.white(self.blur**2)
        z = z.to(self.score_model.device, compute)
        x = self._flow(clean).backward(z, self._mean(z))
        if self.plus is not None:
            e = torch.randn(full, generator=generator, dtype=torch.float64)
            x = x + self.plus.color(e.to(x))
            gone = self.plus.masked(tuple(full[1:]))
            x = x if gone is None else x.masked_fill(gone.to(x.device), 0.0)
        return (x[0] if single else x).to(device=device, dtype=kind)


def _number(value: float | Tensor) -> float:
    return float(torch.as_tensor(value).reshape(-1)[0])


def _perturbation(plus: GaussianNoise | None) -> Perturbation:
    if plus is None:
        return Perturbation.white(0.0)
    if plus.size is not None:
        raise ValueError(
            f"LearnedNoise(plus={plus!r}): a dense covariance has no level of the score; expected std, var, weight or "
            "power."
        )
    if plus.weight() is not None:
        return Perturbation(plus.variance)
    return Perturbation(plus.spectrum(tuple(plus.variance.shape)), spectral=True)  # type: ignore[arg-type]


class _LogProb(torch.autograd.Function):
    """log p by the flow, with the score for its gradient."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, noise: LearnedNoise) -> Tensor:
        ctx.save_for_backward(r)
        ctx.noise = noise
        return noise.log_prob_error(r)[0].to(r.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        (r,) = ctx.saved_tensors
        score = ctx.noise.score(r)
        return weight.reshape(-1, *[1] * (r.ndim - 1)) * score, None
