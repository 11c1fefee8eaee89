"""The loss of a training image and the noise level that it is disturbed with (see diffpost.training)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffpost.networks.precondition import edm_coefficients
from diffpost.random import normal, uniform
from diffpost.training_config import NoiseLevels

__all__ = ["NOISE_STREAM", "denoising_loss", "noise_levels"]

_LEVELS, NOISE_STREAM = 1, 2  # random streams of a training image


def noise_levels(config: NoiseLevels, seed: int, numbers: Tensor) -> Tensor:
    """Noise-to-signal ratio of each training image, (B,) float64."""
    z = normal(seed, numbers, 0, (1,), dtype=torch.float64, stream=_LEVELS)[:, 0]
    pick, spread = uniform(seed, numbers, 1, (2,), dtype=torch.float64, stream=_LEVELS).unbind(1)
    bell = torch.exp(config.log_mean + config.log_std * z)
    flat = config.low * (config.high / config.low) ** spread
    return torch.where(pick < config.flat, flat, bell).clamp(config.low, config.high)


def denoising_loss(
    net: nn.Module,
    clean: Tensor,
    nsr: Tensor,
    noise: Tensor,
    sigma_data: float,
    *,
    middle: int | None = None,
) -> Tensor:
    """Weighted denoising error of each image, (B,): 1 is what predicting from c_skip alone costs.

    `middle` counts the error in a central square of that side only.
    """
    c_skip, c_out, c_in, c_noise = edm_coefficients(nsr, sigma_data)
    shape = (-1, *[1] * (clean.ndim - 1))
    disturbed = clean.double() + nsr.view(shape) * noise.double()
    target = (clean.double() - c_skip.view(shape) * disturbed) / c_out.view(shape)
    output = net((c_in.view(shape) * disturbed).float(), c_noise.float())
    error = (output.float() - target.float()).square()
    if middle is not None:
        top, left = ((side - middle) // 2 for side in error.shape[-2:])
        error = error[..., top : top + middle, left : left + middle]
    return error.flatten(1).mean(1)
