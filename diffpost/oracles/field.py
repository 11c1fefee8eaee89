"""A stationary Gaussian field under a PSF.

A stationary Gaussian field x with power P(k) under the orthonormal FFT, blurred by a periodic PSF
of transfer a(k), with white noise of variance s^2, has independent posterior modes:

    v(k) = 1/(1/P(k) + |a(k)|^2/s^2),      m(k) = v(k) a(k)* y(k)/s^2.

Its scales differ by a factor of a thousand in standard deviation: the large ones are set by the
data, the small ones by the prior, so a sampler that loses variance anywhere, or a guidance that
weighs the data wrongly, shows in one of the bands of k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve
from diffpost.posterior import Posterior
from diffpost.score import GaussianScore
from diffpost.sde import EDM, SDE

BANDS = ((0.0, 4.0), (4.0, 12.0), (12.0, math.inf))
"""Bands of the radial integer wavenumber k, [low, high)."""


@final
@dataclass(frozen=True)
class FieldReport:
    """Draws against the exact posterior.

    Attributes:
        mean_error: RMS over pixels of (mean of the draws - exact posterior mean).
        floor: its expectation for as many exact, independent draws, sqrt(mean variance/n).
        ratios: for each band, sample variance per mode over the exact one, averaged over modes.
        errors: standard deviation of each ratio for exact draws, sqrt(2/((n - 1) modes)).
    """

    mean_error: float
    floor: float
    ratios: tuple[float, ...]
    errors: tuple[float, ...]


@final
@dataclass(frozen=True)
class FieldOracle:
    """A Gaussian field seen through a PSF, and its exact posterior.

    Attributes:
        prior: the field's score model, images (1, size, size).
        likelihood: the blurred, noisy data.
        truth: (1, size, size) the field behind the data.
        mean: (1, size, size) exact posterior mean, float64.
        variance: (size, size) exact posterior variance per mode of the orthonormal FFT2, float64.
        wavenumber: (size, size) radial integer wavenumber of each mode.
    """

    prior: GaussianScore
    likelihood: Likelihood
    truth: Tensor
    mean: Tensor
    variance: Tensor
    wavenumber: Tensor

    def posterior(self, guidance: Guidance | None = None) -> Posterior:
        """The posterior as a score model; None is moment matching, exact here."""
        return Posterior(self.prior, self.likelihood, guidance)

    def exact_draws(self, n: int, seed: int = 0) -> Tensor:
        """(n, 1, size, size) independent draws of the exact posterior, float64."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(n, *self.mean.shape, generator=generator, dtype=torch.float64)
        return self.mean + filtered_by(z, self.variance.sqrt())

    def report(self, x: Tensor, bands: Sequence[tuple[float, float]] = BANDS) -> FieldReport:
        """Compares draws (n, 1, size, size), n of at least 2, with the exact posterior."""
        x = x.detach().cpu().double()
        n = len(x)
        mean = x.mean(0)
        deviations = torch.fft.fft2(x - mean, norm="ortho")
        ratio = deviations.abs().square().sum((0, 1)) / (n - 1) / self.variance
        inside = [(self.wavenumber >= low) & (self.wavenumber < high) for low, high in bands]
        return FieldReport(
            mean_error=float((mean - self.mean).square().mean().sqrt()),
            floor=float((self.variance.mean() / n).sqrt()),
            ratios=tuple(float(ratio[b].mean()) for b in inside),
            errors=tuple(math.sqrt(2 / ((n - 1) * int(b.sum()))) for b in inside),
        )


def gaussian_field(
    size: int = 64,
    index: float = -3.0,
    psf_sigma: float = 2.0,
    noise: float = 0.1,
    seed: int = 0,
    sde: SDE | None = None,
    dtype: torch.dtype = torch.float32,
) -> FieldOracle:
    """A field of unit rms with P(k) proportional to max(k, 1)^index, blurred and noisy.

    Args:
        size: pixels on a side.
        index: of the power spectrum, k in integer wavenumbers.
        psf_sigma: of the periodic Gaussian PSF, pixels.
        noise: standard deviation of the white noise, in units of the field's rms.
        seed: of the field and its noise.
        sde: process of the prior; None is EDM().
        dtype: of prior and data; the exact posterior is float64.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    k = torch.hypot(frequency[:, None], frequency[None, :])
    power = k.clamp_min(1) ** index
    power = power / power.mean()

    psf, transfer = gaussian_psf(size, psf_sigma)
    shape = (1, size, size)
    truth = filtered_by(torch.randn(shape, generator=generator, dtype=torch.float64), power.sqrt())
    y = filtered_by(truth, transfer)
    y = y + noise * torch.randn(shape, generator=generator, dtype=torch.float64)
    variance = 1 / (1 / power + transfer.square() / noise**2)
    return FieldOracle(
        prior=GaussianScore(
            torch.zeros(shape, dtype=dtype), power=power.to(dtype), sde=sde or EDM()
        ),
        likelihood=Likelihood(
            y.to(dtype), Convolve(psf.to(dtype), boundary="periodic"), GaussianNoise(std=noise)
        ),
        truth=truth,
        mean=filtered_by(y, variance * transfer / noise**2),
        variance=variance,
        wavenumber=k,
    )


def gaussian_psf(size: int, sigma: float) -> tuple[Tensor, Tensor]:
    """A Gaussian PSF (n, n) of an odd side, cut at 6 sigma or the frame, and its transfer function (size, size)."""
    half = min(math.ceil(6 * sigma), (size - 1) // 2)
    offsets = torch.arange(-half, half + 1).double()
    profile = torch.exp(-0.5 * (offsets / sigma) ** 2)
    profile = profile / profile.sum()
    frequency = torch.fft.fftfreq(size, dtype=torch.float64)
    transfer = torch.cos(2 * math.pi * torch.outer(frequency, offsets)) @ profile
    return torch.outer(profile, profile), torch.outer(transfer, transfer)


def filtered_by(x: Tensor, factor: Tensor) -> Tensor:
    """x with every mode of its FFT2 multiplied by ``factor``; real."""
    return torch.fft.ifft2(torch.fft.fft2(x) * factor).real
