r"""The spectrum of a prior's denoising error, measured once and kept in its card.

The covariance of the clean image given the noisy one, C_t = Cov[x_0 | x_t], is the covariance of the
denoiser's error x_0 - D(x_t, t).  Averaged over images of a stationary family it is diagonal under the
Fourier transform, so a table of error power by noise level and spatial frequency stands in for the
Jacobian of the network in moment matching, at no evaluation a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffpost.guidance import SpectralCovariance
from diffpost.random import normal
from diffpost.score import ScoreModel

__all__ = ["covariance_from_card", "error_spectrum"]


@torch.no_grad()
def error_spectrum(
    prior: ScoreModel,
    images: Tensor,
    *,
    levels: int = 24,
    bins: int = 16,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean power of the denoising error by noise-to-signal ratio and radial frequency.

    Parameters
    ----------
    prior: the denoiser; images: (N, C, H, W) clean images in its units that it has not seen in training.
    levels: noise levels, uniform in log nsr over the prior's process; bins: of frequency, in cycles
        per pixel, equally wide up to the corner.

    Returns
    -------
    nsr (levels), k (bins) and variance (levels, bins) as lists: what `SpectralCovariance` takes and JSON holds.

    Raises
    ------
    ValueError: for images that are not a batch of images.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(
            f"got images of shape {tuple(images.shape)}; expected (N, C, H, W), N >= 2"
        )
    height, width = images.shape[-2:]
    k = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :])
    edges = torch.linspace(0, float(k.max()) + 1e-6, bins + 1)
    which = torch.bucketize(k.flatten(), edges[1:-1], right=True)
    counts = torch.bincount(which, minlength=bins).double()
    grid = prior.sde.time_grid(levels - 1).flip(0)
    numbers = torch.arange(len(images))
    table = []
    for step, t in enumerate(grid):
        total = torch.zeros(height * width, dtype=torch.float64)
        for part in numbers.split(batch_size):
            clean = images[part]
            z = normal(seed, part, step, tuple(clean.shape[1:]))
            error = clean - prior.denoise(prior.sde.perturb(clean, t, z), t)
            power = torch.fft.fft2(error.double(), norm="ortho").abs().square()
            total += power.mean(1).sum(0).flatten()
        table.append(torch.zeros(bins, dtype=torch.float64).index_add_(0, which, total) / counts)
    variance = torch.stack(table) / len(images)
    kept = counts > 0  # a small frame leaves bins empty
    centres = (edges[1:] + edges[:-1]) / 2
    return {
        "nsr": prior.sde.nsr(grid).tolist(),
        "k": centres[kept].tolist(),
        "variance": variance[:, kept].tolist(),
    }


def covariance_from_card(card: Mapping[str, Any]) -> SpectralCovariance | None:
    """The covariance that a prior's card holds under `error_spectrum`, or None."""
    table = card.get("error_spectrum")
    if table is None:
        return None
    return SpectralCovariance(*(torch.tensor(table[key]) for key in ("nsr", "k", "variance")))
