r"""Noise measured on the blank sky of a drizzled image: its scatter, its correlation, and what white noise makes of it.

A linear estimate of a sum of K coefficients c with prior N(0, 1) from data B c + n takes n for white, of variance D, and claims the
covariance C = (1 + B^T D^-1 B)^-1.  If n has the covariance S instead, its true one is C (1 + B^T D^-1 S D^-1 B) C.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve
from scipy.signal import correlate

__all__ = ["blank_sky", "correlation_of", "honesty", "inflation_of", "recalibrated"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def correlation_of(values: Array, sky: Mask, reach: int) -> Array:
    """Correlation of sky pixels of values (h, w) with those up to `reach` away: (2 reach + 1, 2 reach + 1), 1 in the middle."""
    v = np.where(sky, values - values[sky].mean(), 0.0)
    pairs = correlate(sky.astype(float), sky.astype(float), method="fft")
    products = correlate(v, v, method="fft") / np.maximum(pairs, 1)
    middle = tuple(slice(n - 1 - reach, n + reach) for n in values.shape)
    found: Array = products[middle] / products[values.shape[0] - 1, values.shape[1] - 1]
    return found


def inflation_of(correlation: Array) -> float:
    """By what the scatter is multiplied, so that white noise errs on sums as noise of this correlation: adjacent pixels count."""
    k = correlation.shape[0] // 2
    return math.sqrt(max(float(correlation[k - 1 : k + 2, k - 1 : k + 2].sum()), 1.0))


def blank_sky(data: Array, sky: Mask) -> tuple[float, float, Mask]:
    """Level and scatter of the sky, and its pixels within 4 of that scatter."""
    level = float(np.median(data[sky]))
    scatter = float(1.4826 * np.median(np.abs(data[sky] - level)))
    sky = sky & (np.abs(data - level) < 4 * scatter)
    return level, float(data[sky].std()), sky


def recalibrated(
    given: Array, data: Array, sky: Mask, inflation: float, light: Array
) -> tuple[Array, float]:
    """The noise map (h, w) for the likelihood, and by what the given one exceeds the scatter of the sky.

    A map that varies on the sky is scaled to the scatter of data (h, w) there, times the inflation.  One that was cut at a floor
    above the sky tells nothing there: its square is fitted as a line in the light (h, w) where it rises above, and that slope, the
    photons' own noise, is added to the scatter's square.
    """
    ratio = 1 / float((data[sky] / given[sky]).std())
    floor = float(given.min())
    if np.mean(given[sky] < 1.001 * floor) < 0.5:
        return given * (inflation / ratio), ratio
    bright = (given > 1.02 * floor) & (light > 0)
    slope = 0.0
    if bright.sum() > 10:
        slope = max(float(np.polyfit(light[bright], given[bright] ** 2, 1)[0]), 0.0)
    level = inflation * float(data[sky].std())
    return np.sqrt(level**2 + slope * np.maximum(light, 0.0)), ratio


def honesty(columns: Array, noise: Array, scatter: Array, correlation: Array, of: Array) -> float:
    """True over claimed standard deviation of a linear estimate under white noise, where the noise is correlated.

    columns: (K, h, w) data of K modes with coefficients N(0, 1); noise: (h, w) that the estimate takes for white, infinite where
    nothing is seen; scatter: (h, w) what the noise is, with this correlation; of: (K,) the sum of coefficients asked for.
    """
    seen = np.isfinite(noise)
    w = np.where(seen, columns / np.where(seen, noise, 1.0), 0.0)
    v = np.where(seen, w * scatter / np.where(seen, noise, 1.0), 0.0)
    flat = w.reshape(len(w), -1)
    claimed = np.linalg.inv(np.eye(len(w)) + flat @ flat.T)
    mixed = np.stack([convolve(one, correlation, mode="constant") for one in v])
    noise_part = v.reshape(len(v), -1) @ mixed.reshape(len(v), -1).T
    true = claimed @ (np.eye(len(w)) + noise_part) @ claimed
    return float(np.sqrt((of @ true @ of) / (of @ claimed @ of)))
