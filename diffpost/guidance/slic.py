r"""Learned noise in a posterior: the noise score at the temperature of the image.

At noise level t the data's residual is not n alone but n + A e, with e the error of what is known of x_0. If that is
N(0, r_t^2 I), the residual has noise of covariance r_t^2 A A^T on top, and

    grad log p_t(y | x) = -A^T s_eta(y - A x_hat; r_t^2 A A^T),

the noise score at a *matched* temperature. Where A A^T = c I that is the noise model's own perturbation, at the level
of variance c r_t^2: nothing is approximated on the side of the data. Where A A^T is diagonal over pixels or Fourier
modes (masks; a PSF by FFT), every pixel or mode takes the score at its own level (:mod:`diffpost.learned_noise`).
"""

from __future__ import annotations

import weakref
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance, per_entry, squared_nsr, tweedie_factor
from diffpost.guidance.choice import choose
from diffpost.guidance.gain import finest_std
from diffpost.learned_noise import LearnedNoise
from diffpost.likelihood import Likelihood
from diffpost.noise_flow import Perturbation
from diffpost.operators.base import LinearOperator, on_grid
from diffpost.score import ScoreModel
from diffpost.sde import as_time, expand

__all__ = ["SLIC", "default_guidance", "with_surrogate"]

_STABLE = 0.5  # of the standard deviation to which the data fix the image at best


@final
class SLIC(Guidance):
    """The likelihood of learned noise, at the matched temperature.

    Source: Legin et al. (2023, arXiv:2302.03046), whose score is taken near t = 0; the matched temperature is the
    convolved likelihood of Remy et al. (2022, arXiv:2201.05561) with the noise's own score for a Gaussian's.

        variance=None   p(x_0 | x_t) = N(x/alpha, nsr^2 I), as :class:`Convolved <diffpost.guidance.convolved.Convolved>`
        variance=v      p(x_0 | x_t) = N(D, r_t^2 I), r_t^2 = v nsr^2/(v + nsr^2), as
                        :class:`PiGDM <diffpost.guidance.pigdm.PiGDM>`

    Exact for any noise where A A^T is a multiple of I, and for stationary Gaussian noise, up to interpolation, where A A^T is stationary (a
    periodic convolution), each for a flat prior or, with ``variance``, a white Gaussian one of that variance.
    Elsewhere approximate at finite t and exact as t goes to 0. A convolution with a zero boundary is taken to be
    periodic in A A^T; an operator whose A A^T has no structure has no matched temperature.

    ``warm`` makes it the last stage of another guidance: above the noise-to-signal ratio ``below`` that one sees the
    noise's Gaussian surrogate. The end is then as exact as that of any guidance, and what was decided above ``below``
    was decided by the surrogate. Without structure in A A^T, and for joint data, the score below is the coldest.

    A chain makes no approximation at all: MALA, started here, tests by the line integrals of both scores and has
    p_nu(u) p(y | u) as its target, for any operator and prior.

    Costs an evaluation of the prior, one or, where A A^T is not white, up to ``levels`` of the noise model, and one VJP with ``variance``.

    Args:
        variance: v, in the prior's own units; None is a flat prior.
        warm: guidance that sees the surrogate first; None is none.
        below: noise-to-signal ratio, in the prior's units, from which on the noise score is used, with ``warm``. None is
            half the standard deviation to which the data fix the image at best.

    Raises:
        ValueError: variance or below not positive, below without warm; when used, noise that is not learned, or no
            structure in A A^T and no ``warm``.
    """

    def __init__(
        self,
        variance: float | None = None,
        *,
        warm: Guidance | None = None,
        below: float | None = None,
    ) -> None:
        if variance is not None and not variance > 0:
            raise ValueError(f"SLIC(variance={variance}): expected a positive number or None.")
        if below is not None and (warm is None or not below > 0):
            raise ValueError(
                f"SLIC(below={below}, warm={warm}): expected a positive noise-to-signal ratio, and a guidance for above."
            )
        self.variance = variance
        self.warm = warm
        self.below = below
        self._surrogates: weakref.WeakKeyDictionary[Likelihood, tuple[Likelihood, float]] = (
            weakref.WeakKeyDictionary()
        )

    def __repr__(self) -> str:
        return f"SLIC(variance={self.variance}, warm={self.warm!r}, below={self.below})"

    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        if self.warm is None:
            return self._matched(prior, likelihood, x, t)
        gaussian, below = self._surrogate(likelihood, x)
        early = (prior.sde.nsr(as_time(t, x)) > below).expand(len(x)).to(x.device)
        if bool(early.all()):
            return self.warm.posterior_denoise(prior, gaussian, x, t)
        late = self._matched(prior, likelihood, x, t)
        if not bool(early.any()):
            return late
        first = self.warm.posterior_denoise(prior, gaussian, x, t)
        return torch.where(per_entry(early, x) > 0, first, late)

    def _surrogate(self, likelihood: Likelihood, x: Tensor) -> tuple[Likelihood, float]:
        found = self._surrogates.get(likelihood)
        if found is None:
            gaussian = with_surrogate(likelihood)
            below = self.below
            if below is None:
                rows = likelihood.rows
                blank = torch.zeros_like(x[:1] if rows is None else x)
                below = _STABLE * (finest_std(gaussian, blank) or 0.0)
            found = self._surrogates[likelihood] = (gaussian, below)
        return found

    def _matched(self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor) -> Tensor:
        s = squared_nsr(prior.sde, x, t)
        if self.variance is None:
            denoised = prior.denoise(x, t)
            u = x / expand(prior.sde.alpha(as_time(t, x)), x)
            return denoised + expand(s, x) * self._gradient(likelihood, u, s)
        denoised, vjp = prior.denoise_vjp(x, t)
        s = torch.where(s > 0, 1 / (1 / self.variance + 1 / s), s)
        gradient = self._gradient(likelihood, denoised, s)
        return denoised + tweedie_factor(prior.sde, x, t) * vjp(gradient)

    def _gradient(self, likelihood: Likelihood, u: Tensor, s: Tensor) -> Tensor:
        """-A^T s_eta(y - A u; s A A^T)."""
        linear = likelihood.operator.linearize(u)
        residual = likelihood.residual(u)
        noise = likelihood.noise
        if not isinstance(noise, LearnedNoise):
            if noise.is_gaussian or self.warm is None:
                raise ValueError(
                    f"SLIC: got {noise!r}; expected LearnedNoise. For Gaussian noise take MomentMatching; for joint data "
                    "of both kinds SLIC(warm=MomentMatching()), and MALA after it."
                )
            return -linear.adjoint(noise.score(residual))
        matched = perturbation_of(linear, u, residual, s)
        if matched is None and self.warm is None:
            raise ValueError(
                f"SLIC: A A^T of {linear!r} is diagonal neither over pixels nor over Fourier modes, so no temperature of "
                "the noise model matches it. Take SLIC(warm=MomentMatching()), and MALA after it, which is exact."
            )
        return -linear.adjoint(noise.score_with(residual, matched))


def perturbation_of(
    linear: LinearOperator, u: Tensor, data: Tensor, s: Tensor
) -> Perturbation | None:
    """s A A^T for s () or (B,), where it is diagonal over data (B, *data) or modes; otherwise None."""
    shape, size = tuple(u.shape[1:]), tuple(data.shape[1:])
    s = s.to(data.device).double().reshape(-1, *[1] * len(size))
    diagonal = linear.gram_diagonal(shape)
    if diagonal is not None:
        values = diagonal.double().to(data.device)
        if bool((values == values.reshape(-1)[0]).all()):
            values = values.reshape(-1)[0]
        return Perturbation(s * values)
    spectrum = linear.gram_spectrum(shape)
    if spectrum is None and len(size) >= 2:
        one = torch.ones(1, 1, dtype=torch.float64, device=data.device)
        spectrum = linear.near_spectrum(shape, on_grid(one), (size[-2], size[-1]))
        if spectrum is not None and tuple(spectrum.shape[-2:]) != size[-2:]:
            spectrum = None
    if spectrum is None:
        return None
    return Perturbation(s * spectrum.double().to(data.device).clamp_min(0.0), spectral=True)


def with_surrogate(likelihood: Likelihood) -> Likelihood:
    """The same data with Gaussian noise that is like theirs; itself where it is Gaussian.

    Raises:
        ValueError: a noise that knows none.
    """
    if likelihood.noise.is_gaussian:
        return likelihood
    gaussian = likelihood.noise.surrogate(likelihood.data_shape)
    return Likelihood(likelihood.y, likelihood.operator, gaussian, batched=likelihood.batched)


def default_guidance(prior: ScoreModel, likelihood: Likelihood) -> Guidance:
    """What a posterior takes when no guidance is named: moment matching, with SLIC for its last stage where noise is
    learned.
    """
    if likelihood.noise.is_gaussian:
        return choose(prior, likelihood).guidance
    return SLIC(warm=choose(prior, with_surrogate(likelihood)).guidance)
