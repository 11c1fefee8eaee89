r"""The flux scale of an image behind visibilities: Jy per pixel that a prior calls 1.

A prior's card says what its 1 is: the peak of the target, smoothed by a Gaussian of so many pixels
(:mod:`diffpost.jobs.scale`).  Visibilities have no image to read that peak off, so one is made: the mean of the posterior under a
Gaussian field

    x = E F^(-1) S^(1/2) z,    S(q) = F^2 (1 + (2 pi q h)^2)^(-3),    z ~ N(0, I),

the spectrum of an exponential disc of total flux F and scale length h, both fitted to the visibilities' powers,
E|V(q)|^2 = S(q) + 2 sigma^2 (Whittle's likelihood), and E an envelope where the light is: flat at first, then the first image itself, smoothed.
What resolution and noise take from the peak, an image of that disc itself through the same steps tells, and it is put back.
The system (I + S^(1/2) F E N E F^(-1) S^(1/2)) z = ... with N = A^T W A is solved by conjugate gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffpost.jobs.imaging import ImagingProblem, dirty_image
from diffpost.linalg import cg

__all__ = ["disc_spectrum", "infer_imaging_scale", "wiener_image"]

Array = NDArray[np.float64]

_ARCSEC = math.pi / 180 / 3600
_FITTED = 20_000  # visibilities, evenly spread, by which the spectrum is fitted
_FLOOR = 0.05  # of the envelope's peak
_MOST = 4.0  # correction


def infer_imaging_scale(problem: ImagingProblem, smoothing: float) -> tuple[float, dict[str, Any]]:
    """Jy per pixel of the smoothed peak, and what led to it.

    smoothing: standard deviation of the Gaussian, in pixels.

    Raises
    ------
    ValueError: no light: the smoothed peak is not above the noise.
    """
    flux, length = disc_spectrum(problem)
    image = wiener_image(problem, flux, length)
    disc = _disc(problem, flux, length)
    seen = gaussian_filter(wiener_image(problem, flux, length, disc), smoothing).max()
    lost = float(
        np.clip(gaussian_filter(disc, smoothing).max() / max(float(seen), 1e-300), 1.0, _MOST)
    )
    peak = lost * float(gaussian_filter(image, smoothing).max())
    dirty = dirty_image(problem)
    signal = float(dirty.max()) / problem.data.noise
    if not (peak > 0 and signal > 4):
        raise ValueError(
            f"the dirty image peaks at {signal:.2g} times its noise, so there is no source by which the flux scale could be inferred; "
            "give --scale (flux of the smoothed peak per pixel), or image another place (--center)"
        )
    return peak, {
        "flux_of_disc": flux,
        "scale_length": length,
        "correction": lost,
        "dirty_peak_signal_to_noise": signal,
    }


def disc_spectrum(problem: ImagingProblem) -> tuple[float, float]:
    """Flux (Jy) and scale length (arcsec) of the disc whose mean powers are likeliest."""
    data = problem.data
    rows = slice(None, None, max(1, len(data) // _FITTED))
    q = 2 * np.pi * data.distance[rows] * _ARCSEC
    power, noise = np.abs(data.vis[rows]) ** 2, 2 / data.weight[rows]
    fluxes = np.geomspace(0.3, 30, 60) * math.sqrt(max(float((power - noise).mean()), float(noise.min())))  # fmt: skip
    lengths = np.geomspace(0.25 * problem.grid.pixel, 0.25 * problem.grid.shape[0] * problem.grid.pixel, 40)  # fmt: skip
    best = (math.inf, 0.0, 0.0)
    for length in lengths:
        shape = (1 + (q * length) ** 2) ** -3
        for flux in fluxes:
            expected = flux**2 * shape + noise
            value = float((np.log(expected) + power / expected).sum())
            if value < best[0]:
                best = (value, float(flux), float(length))
    return best[1], best[2]


def _disc(problem: ImagingProblem, flux: float, length: float) -> Array:
    """(size, size) exponential disc in the middle of the image, Jy/pixel, its cusp averaged over pixels."""
    n, fine = problem.grid.shape[0], 5
    at = (np.arange(n * fine) - (n * fine - 1) / 2) * problem.grid.pixel / fine
    light = np.exp(-np.hypot(at[:, None], at[None, :]) / length)
    binned = light.reshape(n, fine, n, fine).sum((1, 3))
    found: Array = flux * binned / binned.sum()
    return found


def wiener_image(
    problem: ImagingProblem, flux: float, length: float, sky: Array | None = None
) -> Array:
    """(size, size) posterior mean under the disc's field, Jy/pixel; the second of two envelopes.

    sky: (size, size) an image to be seen without noise, in the data's place.
    """
    n, pixel = problem.grid.shape[0], problem.grid.pixel
    k = 2 * np.pi * np.fft.fftfreq(n, pixel)
    spectrum = (1 + (k[:, None] ** 2 + k[None, :] ** 2) * length**2) ** -3
    # Of each mode of the orthonormal transform: E|V|^2 = n^2 times it.
    root = torch.from_numpy(np.sqrt(spectrum) * flux / n)
    weight = problem.weight
    normal = _normal(problem)
    with torch.no_grad():
        if sky is None:
            right = problem.operator.adjoint((weight * problem.y)[None])[0, 0].double()
        else:
            right = normal(torch.from_numpy(sky))
    envelope = torch.ones(n, n, dtype=torch.float64)
    image = np.zeros((n, n))
    for _ in range(2):
        e = envelope

        def forward(z: Tensor, e: Tensor = e) -> Tensor:
            return e * torch.fft.ifft2(root * torch.fft.fft2(z)).real

        def back(x: Tensor, e: Tensor = e) -> Tensor:
            return torch.fft.ifft2(root * torch.fft.fft2(e * x)).real

        def system(z: Tensor, forward: Any = forward, back: Any = back) -> Tensor:
            return z + back(normal(forward(z)))

        with torch.no_grad():
            solved = cg(system, back(right)[None], tol=1e-3, max_iter=300).x[0]
            image = forward(solved).numpy()
        light = gaussian_filter(np.clip(image, 0, None), max(1.0, length / pixel))
        if not light.max() > 0:
            break
        light = np.maximum(np.sqrt(light / light.max()), _FLOOR)
        envelope = torch.from_numpy(light / math.sqrt(float((light**2).mean())))
    return image


def _normal(problem: ImagingProblem) -> Any:
    """A^T W A of an image (..., size, size)."""
    made = problem.operator.normal(problem.weight[:, 0])  # type: ignore[attr-defined]

    def apply(x: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[-2:])
        return made(flat).reshape(x.shape).double()

    return apply
