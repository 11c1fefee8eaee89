r"""The flux scale of a target: the flux per model pixel that a prior calls 1.

A prior is trained in units of its own, and only its maker knows what they mean: the card says it,

    "flux_scale": {"rule": "smoothed_peak", "smoothing": 1.28}

meaning that the peak of the target, smoothed by a Gaussian of 1.28 model pixels, is 1.  `infer_scale`
reads that peak off the data, with the light that the PSF took from it put back by a Wiener filter.
Without a rule nothing is inferred.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

__all__ = ["CARD_KEY", "SmoothedPeak", "infer_scale", "rule_of_card"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

CARD_KEY = "flux_scale"


@final
@dataclass(frozen=True)
class SmoothedPeak:
    """The rule that the peak of the target is 1, smoothed by a Gaussian of `smoothing` model pixels.

    Raises
    ------
    ValueError: a smoothing that is not positive.
    """

    smoothing: float

    def __post_init__(self) -> None:
        value = self.smoothing
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ValueError(f"got a smoothing of {value!r}; expected a positive number of pixels")


def rule_of_card(card: Mapping[str, Any] | None) -> SmoothedPeak | None:
    """The rule that a prior's card states, None where it states none.

    Raises
    ------
    ValueError: a rule that is not known, or that lacks its numbers.
    """
    stated = None if card is None else card.get(CARD_KEY)
    if stated is None:
        return None
    try:
        known = stated["rule"] == "smoothed_peak" and set(stated) == {"rule", "smoothing"}
    except (TypeError, KeyError):
        known = False
    if not known:
        raise ValueError(
            f"the prior's card has {CARD_KEY} = {stated!r}; expected "
            "{'rule': 'smoothed_peak', 'smoothing': pixels}. Mend the card, or give --scale"
        )
    try:
        return SmoothedPeak(stated["smoothing"])
    except ValueError as error:
        raise ValueError(f"the prior's card, {CARD_KEY}: {error}") from error


def infer_scale(
    residual: Array,
    kernel: Array,
    std: float,
    target: Mask | None = None,
    *,
    oversample: int = 1,
    smoothing: float,
) -> tuple[float, dict[str, Any]]:
    r"""Flux per pixel of the model that a prior calls 1.

    It is the peak of the image smoothed by a Gaussian of `smoothing` model pixels, times what the PSF
    took from that peak.  The latter is the ratio of the peaks of a Wiener estimate
    conj(P) S / (|P|^2 S + N) Y, with S(k) proportional to (1 + (k h)^2)^-3, the spectrum of an
    exponential disc of the target's size h, before and after the PSF; it is kept within 1 and 3.
    The shipped priors saw amplitudes of 0.5 to 1.6 of it; docs/deconvolution.md says what an error of it does.

    Parameters
    ----------
    residual: (h, w) background-subtracted data, NaN or 0 where there is none.
    kernel: PSF at the sampling of the data, odd sides, sum 1.
    std: a typical standard deviation of the noise.
    target: pixels among which the peak is sought; default: all.
    oversample: model pixels per image pixel, along a side; smoothing: in model pixels.

    Raises
    ------
    ValueError: no light: the smoothed peak is not positive.
    """
    data = np.where(np.isfinite(residual), residual, 0.0)
    width = smoothing / oversample
    where = np.ones(data.shape, dtype=bool) if target is None or not target.any() else target
    seen = gaussian_filter(data, width)
    peak = float(seen[where].max())
    noise = std / (2 * np.pi**0.5 * max(width, 0.3))
    if not peak > 0:
        raise ValueError(
            "the target has no positive flux above the background, so its flux scale cannot be "
            "inferred; check the cutout, or give --scale (flux of the smoothed peak per pixel)"
        )
    at = np.unravel_index(int(np.argmax(np.where(where, seen, -np.inf))), data.shape)
    before, after = _wiener_peaks(data, kernel, std, where, (int(at[0]), int(at[1])), width)
    correction = float(np.clip(before / after, 1.0, 3.0)) if after > 0 else 1.0
    scale = peak * correction / oversample**2
    return scale, {
        "smoothed_peak": peak,
        "psf_correction": correction,
        "peak_signal_to_noise": peak / noise if noise > 0 else float("inf"),
    }


def _wiener_peaks(
    data: Array, kernel: Array, std: float, where: Mask, at: tuple[int, int], width: float
) -> tuple[float, float]:
    h, w = data.shape
    shape = (h + kernel.shape[0], w + kernel.shape[1])
    light = np.clip(np.where(where, data, 0.0), 0, None)
    yy, xx = np.mgrid[:h, :w]
    radius = np.hypot(yy - at[0], xx - at[1])
    total = light.sum()
    order = np.argsort(radius, axis=None)
    growth = np.cumsum(light.ravel()[order])
    half = float(radius.ravel()[order][int(np.argmax(growth >= 0.5 * total))])
    scale_length = max(half / 1.678, 0.5)  # of an exponential disc with this half-light radius
    placed = np.zeros(shape)
    top, left = ((n - k) // 2 for n, k in zip(shape, kernel.shape, strict=True))
    placed[top : top + kernel.shape[0], left : left + kernel.shape[1]] = kernel
    placed = np.roll(
        placed, (-top - kernel.shape[0] // 2, -left - kernel.shape[1] // 2), axis=(0, 1)
    )
    p = np.fft.rfft2(placed)
    ky = np.fft.fftfreq(shape[0])[:, None]
    kx = np.fft.rfftfreq(shape[1])[None, :]
    k2 = (2 * np.pi) ** 2 * (ky**2 + kx**2)
    spectrum = total**2 * (1 + k2 * scale_length**2) ** -3
    gain = np.conj(p) * spectrum / (np.abs(p) ** 2 * spectrum + std**2 * h * w + 1e-300)
    estimate = gain * np.fft.rfft2(data, shape)
    window = np.exp(-0.5 * k2 * width**2)
    sharp = np.fft.irfft2(estimate * window, shape)[:h, :w]
    blurred = np.fft.irfft2(estimate * window * p, shape)[:h, :w]
    reach = int(np.ceil(3 * max(width, 1)))
    near = np.s_[
        max(at[0] - reach, 0) : at[0] + reach + 1, max(at[1] - reach, 0) : at[1] + reach + 1
    ]
    return float(sharp[near].max()), float(blurred[near].max())
