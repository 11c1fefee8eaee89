r"""Images of one of two textures, of which blurred and noisy data may say which: a bimodal problem with known weights.

The prior is w N(0, P_1) + (1 - w) N(0, P_2), two stationary fields of one variance whose power leans to large and
to small scales. Under a periodic PSF with white noise the posterior is a mixture of two Gaussian fields, each as in
:mod:`diffpost.oracles.field`, with weights

    w'_j ~ w_j prod_k N(y(k); 0, |a(k)|^2 P_j(k) + s^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve
from diffpost.oracles.field import filtered_by, gaussian_psf
from diffpost.posterior import Posterior
from diffpost.score import GaussianScore, ScoreModel
from diffpost.sde import EDM, SDE


@final
class FieldMixture(ScoreModel):
    """sum_j w_j p_j for Gaussian fields p_j of one shape and process: D = sum_j r_j D_j, r_j ~ w_j p_j(x_t).

    Args:
        fields: the components.
        weights: (J,), divided by their sum.
    """

    analytic = True  # products are by autograd, through closed forms

    def __init__(self, fields: tuple[GaussianScore, ...], weights: Tensor) -> None:
        self.fields = fields
        self.weights = weights.double() / weights.double().sum()
        self.sde, self.shape = fields[0].sde, fields[0].shape

    def __repr__(self) -> str:
        return f"FieldMixture({len(self.fields)} fields of shape {self.shape}, sde={self.sde})"

    @property
    def dtype(self) -> torch.dtype:
        return self.fields[0].dtype

    @property
    def device(self) -> torch.device:
        return self.fields[0].device

    def responsibilities(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """P(field j | x_t = x), (B, J) float64; of clean images where t is None."""
        logp = torch.stack([field.log_prob(x.double(), t) for field in self.fields], 1)
        return (logp + self.weights.log()).softmax(1)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        r = self.responsibilities(x, t).to(x.dtype)
        means = torch.stack([field.denoise(x, t) for field in self.fields], 1)
        return (r.reshape(*r.shape, *[1] * (x.ndim - 1)) * means).sum(1)


@final
@dataclass(frozen=True)
class TextureOracle:
    """Two textures, data, and the exact posterior.

    Attributes:
        prior: the mixture as a score model, images (1, size, size).
        likelihood: the blurred, noisy data.
        truth: (1, size, size).
        weights: (2,) posterior weights of the textures.
        means: (2, 1, size, size) posterior means given each.
        variances: (2, size, size) posterior variances per mode of the orthonormal FFT2 given each.
        log_evidence: log p(y).
    """

    prior: FieldMixture
    likelihood: Likelihood
    truth: Tensor
    weights: Tensor
    means: Tensor
    variances: Tensor
    log_evidence: float

    def posterior(self, guidance: Guidance | None = None) -> Posterior:
        """The posterior as a score model; None is moment matching."""
        return Posterior(self.prior, self.likelihood, guidance)

    def exact_draws(self, n: int, seed: int = 0) -> Tensor:
        """(n, 1, size, size) independent draws of the exact posterior, float64."""
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, *self.means.shape[1:], generator=generator, dtype=torch.float64)
        return self.means[chosen] + filtered_by(z, self.variances[chosen][:, None].sqrt())

    def share(self, x: Tensor) -> Tensor:
        """Probability that a clean image (n, 1, size, size) is of the first texture, (n,)."""
        return self.prior.responsibilities(x)[:, 0]


def textures(
    size: int = 32,
    indices: tuple[float, float] = (-2.0, -2.6),
    weight: float = 0.5,
    psf_sigma: float = 1.5,
    noise: float = 0.5,
    seed: int = 0,
    sde: SDE | None = None,
    dtype: torch.dtype = torch.float64,
) -> TextureOracle:
    """Fields of unit rms with P(k) proportional to max(k, 1)^index, under a periodic Gaussian PSF.

    Args:
        size: pixels on a side.
        indices: of the two power spectra.
        weight: prior probability of the first.
        psf_sigma: of the PSF, pixels.
        noise: standard deviation of the white noise.
        seed: of texture, truth and noise.
        sde: process of the prior; None is EDM(0.001, 200).
        dtype: of prior and data.
    """
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    k = torch.hypot(frequency[:, None], frequency[None, :]).clamp_min(1)
    powers = torch.stack([k**index / (k**index).mean() for index in indices])
    prior_weights = torch.tensor([weight, 1 - weight], dtype=torch.float64)
    psf, transfer = gaussian_psf(size, psf_sigma)
    shape = (1, size, size)

    def normals() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    chosen = int(torch.multinomial(prior_weights, 1, generator=generator))
    truth = filtered_by(normals(), powers[chosen].sqrt())
    y = filtered_by(truth, transfer) + noise * normals()
    total = powers * transfer.square() + noise**2
    modes = torch.fft.fft2(y, norm="ortho").abs().square()
    logits = -0.5 * (modes / total + total.log() + math.log(2 * math.pi)).flatten(1).sum(1)
    logits = logits + prior_weights.log()
    variances = 1 / (1 / powers + transfer.square() / noise**2)
    process = EDM(1e-3, 200.0) if sde is None else sde
    mean = torch.zeros(shape, dtype=dtype)
    fields = tuple(GaussianScore(mean, power=power, sde=process) for power in powers)
    return TextureOracle(
        prior=FieldMixture(fields, prior_weights),
        likelihood=Likelihood(
            y.to(dtype), Convolve(psf.to(dtype), boundary="periodic"), GaussianNoise(std=noise)
        ),
        truth=truth,
        weights=logits.softmax(0),
        means=filtered_by(y, variances[:, None] * transfer / noise**2),
        variances=variances,
        log_evidence=float(logits.logsumexp(0)),
    )
