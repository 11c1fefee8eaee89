"""What a noise model generates, against held-out stamps, in numbers.

In units of the model's standard deviation: the power spectrum in rings of spatial frequency, as a ratio with the
standard error that follows from both samples, and the moments of one pixel. Held-out stamps of another depth show in the
standard deviation first, so the ratio is also told with both brought to the same total power.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from diffpost.learned_noise import LearnedNoise
from diffpost.networks.precondition import NetworkScore

__all__ = ["NoiseSummary", "radial_power", "summarise"]

_RINGS = 8
_STEPS = 12
_DRAWS = 128


@final
@dataclass(frozen=True)
class NoiseSummary:
    """Generated noise and held-out stamps.

    Attributes:
        frequency: middles of the rings, cycles a pixel.
        power_ratio, power_error: mean power of what was generated over that of the stamps, brought to the same total, and
            its standard error.
        std, skewness, kurtosis: of a pixel, [generated, held out]; the kurtosis is the excess.
        draws, stamps: how many.
    """

    frequency: list[float]
    power_ratio: list[float]
    power_error: list[float]
    std: list[float]
    skewness: list[float]
    kurtosis: list[float]
    draws: int
    stamps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        ratios = ", ".join(f"{r:.2f}" for r in self.power_ratio)
        return (
            f"generated against held out: std {self.std[0]:.3f}, {self.std[1]:.3f}; skewness {self.skewness[0]:.2f}, "
            f"{self.skewness[1]:.2f}; excess kurtosis {self.kurtosis[0]:.2f}, {self.kurtosis[1]:.2f}; power from large to "
            f"small scales, same total: {ratios} (± {max(self.power_error):.2f})"
        )


def radial_power(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean power of each stamp (n, h, w) in rings of frequency, (n, 8), and the rings' middles in cycles a pixel."""
    h, w = values.shape[1:]
    power = np.abs(np.fft.fft2(values, norm="ortho")) ** 2
    k = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w))
    edges = np.linspace(0, 0.5, _RINGS + 1)
    ring = np.digitize(k, edges) - 1
    ring[k == 0] = -1
    found = np.stack([power[:, ring == i].mean(1) for i in range(_RINGS)], 1)
    return found, 0.5 * (edges[1:] + edges[:-1])


def generate(model: NetworkScore, shape: tuple[int, ...], n: int, seed: int) -> NDArray[Any]:
    """n draws of the shape (1, h, w), in units of the model's standard deviation, blurred by 0.1 of it."""
    noise = LearnedNoise(model.with_affine(1.0, 0.0), steps=_STEPS)
    parts = [
        noise.sample((min(64, n - i), *shape), seed + i, dtype=torch.float32)
        for i in range(0, n, 64)
    ]
    found: NDArray[Any] = torch.cat(parts).numpy()[:, 0]
    return found


def summarise(model: NetworkScore, heldout: NDArray[np.float32], seed: int = 0) -> NoiseSummary:
    """Compare 128 draws with held-out stamps (n, 1, h, w) in units of the model's standard deviation."""
    real = heldout[:, 0].astype(np.float64)
    drawn = generate(model, heldout.shape[1:], _DRAWS, seed).astype(np.float64)
    (a, frequency), (b, _) = radial_power(drawn), radial_power(real)
    total = [x.std() for x in (drawn, real)]
    a, b = a / total[0] ** 2, b / total[1] ** 2
    means = a.mean(0), b.mean(0)
    ratio = means[0] / means[1]
    relative = [x.std(0) / x.mean(0) / max(len(x), 1) ** 0.5 for x in (a, b)]
    return NoiseSummary(
        frequency=frequency.tolist(),
        power_ratio=ratio.tolist(),
        power_error=(ratio * np.hypot(*relative)).tolist(),
        std=[float(t) for t in total],
        skewness=[float(stats.skew(x, None)) for x in (drawn, real)],
        kurtosis=[float(stats.kurtosis(x, None)) for x in (drawn, real)],
        draws=len(drawn),
        stamps=len(real),
    )
