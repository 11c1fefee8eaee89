r"""How wrong a prior's denoiser is, measured once and kept in its card.

The covariance of the clean image given the noisy one, C_t = Cov[x_0 | x_t], is the covariance of the
denoiser's error x_0 - D(x_t, t).  Two tables, measured on images that the prior was not trained on, stand
in for the Jacobian of the network in moment matching, at no evaluation a step: the standard deviation of
a pixel's error by noise level and by how bright D is there, and the power of the error over that
standard deviation by noise level and frequency (`diffpost.guidance.LocalCovariance`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffpost.guidance.covariance import (
    LocalCovariance,
    SpectralCovariance,
    between_nodes,
    local_brightness,
)
from diffpost.random import normal
from diffpost.score import ScoreModel

__all__ = ["CARD_KEY", "covariance_from_card", "covariance_from_table", "denoising_error"]

CARD_KEY = "denoising_error"

_SMOOTHING = 1.5  # pixels over which brightness is averaged
_RANGE = 2e4  # of the brightness table: the brightest pixel over the faintest node
_FEWEST = 2000.0  # pixels that a node of the table wants; neighbours' errors are alike
_SHARE = 0.005  # of the pixels, where images are few
_STREAM = 24_900  # of the noise: that of samplers is in draws of the same seed, whose errors would look small


@torch.no_grad()
def denoising_error(
    prior: ScoreModel,
    images: Tensor,
    *,
    levels: int = 24,
    bins: int = 16,
    nodes: int = 21,
    batch_size: int = 48,
    seed: int = 0,
) -> dict[str, Any]:
    """Size of the denoising error by noise-to-signal ratio and brightness, and its spectrum.

    Parameters
    ----------
    prior: the denoiser; images: (N, C, H, W) clean images in its units that it has not seen in training.
    levels: noise levels, uniform in log nsr over the prior's process; bins: of frequency, in cycles
        per pixel, equally wide up to the corner; nodes: of brightness, uniform in its logarithm.

    Returns
    -------
    nsr (levels), brightness (nodes), amplitude (levels, nodes), k (bins), spectrum (levels, bins), as lists,
    and smoothing: what `covariance_from_card` reads and JSON holds.

    Raises
    ------
    ValueError: for images that are not a batch of images, or that are zero everywhere.
    """
    if images.ndim != 4 or len(images) < 2:
        raise ValueError(
            f"got images of shape {tuple(images.shape)}; expected (N, C, H, W), N >= 2"
        )
    top = float(local_brightness(images, _SMOOTHING).max())
    if not top > 0:
        raise ValueError("got images that are zero everywhere; expected images with light in them")
    brightness = torch.logspace(math.log10(top / _RANGE), math.log10(top), nodes).double()
    images = images.cpu()
    height, width = images.shape[-2:]
    k = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None, :])
    edges = torch.linspace(0, float(k.max()) + 1e-6, bins + 1)
    which = torch.bucketize(k.flatten(), edges[1:-1], right=True)
    counts = torch.bincount(which, minlength=bins).double()
    grid = prior.sde.time_grid(levels - 1).flip(0)
    amplitudes, spectra = [], []
    for step, t in enumerate(grid):
        error, bright = _errors(prior, images, t, step, seed, batch_size)
        left, weight = between_nodes(bright, brightness)
        amplitude = _amplitudes(error, left, weight, nodes)
        logs = amplitude.log()
        gain = torch.exp((1 - weight) * logs[left] + weight * logs[left + 1])
        power = torch.fft.fft2(error / gain, norm="ortho").abs().square().mean((0, 1)).flatten()
        spectrum = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, power) / counts
        amplitudes.append(amplitude)
        spectra.append(spectrum)
    kept = counts > 0  # a small frame leaves bins empty
    return {
        "nsr": prior.sde.nsr(grid).tolist(),
        "brightness": brightness.tolist(),
        "amplitude": torch.stack(amplitudes).tolist(),
        "k": ((edges[1:] + edges[:-1]) / 2)[kept].tolist(),
        "spectrum": torch.stack(spectra)[:, kept].tolist(),
        "smoothing": _SMOOTHING,
    }


def _errors(
    prior: ScoreModel, images: Tensor, t: Tensor, step: int, seed: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """x_0 - D and the brightness of D for all images at one noise level, float64."""
    errors, bright = [], []
    for part in torch.arange(len(images)).split(batch_size):
        clean = images[part]
        z = normal(seed, part, step, tuple(clean.shape[1:]), stream=_STREAM)
        noisy = prior.sde.perturb(clean, t, z).to(prior.device)
        denoised = prior.denoise(noisy, t).double().cpu()
        errors.append(clean.double() - denoised)
        bright.append(local_brightness(denoised, _SMOOTHING))
    return torch.cat(errors), torch.cat(bright)


def _amplitudes(error: Tensor, left: Tensor, weight: Tensor, nodes: int) -> Tensor:
    """RMS error around each node of brightness; nodes that few pixels reach get their neighbour's."""
    squares = torch.zeros(nodes, dtype=torch.float64)
    counts = torch.zeros(nodes, dtype=torch.float64)
    for index, share in ((left, 1 - weight), (left + 1, weight)):
        squares.index_add_(0, index.flatten(), (share * error.square()).flatten())
        counts.index_add_(0, index.flatten(), share.flatten())
    good = torch.nonzero(counts >= min(_FEWEST, _SHARE * error.numel()))[:, 0]
    nearest = good[(torch.arange(nodes)[:, None] - good[None, :]).abs().argmin(1)]
    return (squares[nearest] / counts[nearest]).clamp_min(1e-300).sqrt()


def covariance_from_card(card: Mapping[str, Any]) -> LocalCovariance | None:
    """The covariance that a prior's card holds under `denoising_error`, or None."""
    table = card.get(CARD_KEY)
    return None if table is None else covariance_from_table(table)


def covariance_from_table(table: Mapping[str, Any]) -> LocalCovariance:
    """The covariance of what `denoising_error` measured."""
    nsr, k, spectrum, brightness, amplitude = (
        torch.tensor(table[key], dtype=torch.float64)
        for key in ("nsr", "k", "spectrum", "brightness", "amplitude")
    )
    correlations = SpectralCovariance(nsr, k, spectrum)
    return LocalCovariance(correlations, nsr, brightness, amplitude, float(table["smoothing"]))
