r"""Whether noise may be turned and mirrored: a test of its power spectrum.

Noise whose distribution is that of its mirror images has P(k) = P(g k) for the symmetries g of the square; half a turn
is one for every real image. Two of them make the others, (ky, kx) -> (ky, -kx) and (ky, kx) -> (kx, ky). For each the
fractional difference of a stamp's periodogram,

    f_i(b) = mean over k in bin b of (P_i(k) - P_i(g k))/S(k),       S the mean spectrum, made symmetric,

has expectation 0, and flips its sign when the stamp is replaced by its image. So random signs on the stamps give the
exact null distribution of sum_b (mean_i f_i(b))^2 if stamps are independent. Not being rejected is not enough, or few
stamps would do: the anisotropy must also be shown to be small.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Isotropy", "isotropy"]

_SIGNS = 1999
_BINS = 6
_LEVEL = 0.05
_SMALL = 0.1  # fractional rms of P(k) - P(g k)


@final
@dataclass(frozen=True)
class Isotropy:
    """What the test found.

    Attributes:
        p_mirror, p_transpose: p-values.
        rms: fractional difference between P(k) and P(g k), root mean square over bins, freed of noise; the larger of the
            two.
        limit: its upper 95% limit, about.
        stamps: tested.
    """

    p_mirror: float
    p_transpose: float
    rms: float
    limit: float
    stamps: int

    @property
    def shown(self) -> bool:
        """Neither is rejected at 5% together, and the difference is below 10%."""
        return min(self.p_mirror, self.p_transpose) > _LEVEL / 2 and self.limit < _SMALL

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shown": self.shown}

    def __str__(self) -> str:
        found = (
            f"the power spectrum of {self.stamps} stamps and its mirror images differ by {100 * self.rms:.1f}% (below "
            f"{100 * self.limit:.0f}% at 95%; p = {self.p_mirror:.3f} mirrored, {self.p_transpose:.3f} transposed)"
        )
        if self.shown:
            return f"isotropy: {found}: stamps are turned and mirrored in training"
        why = "that is anisotropic" if self.limit >= _SMALL < self.rms else "not shown isotropic"
        return f"isotropy: {found}: {why}, stamps are only shifted in training"


def isotropy(values: NDArray[Any], seed: int = 0) -> Isotropy:
    """Test stamps (n, h, w), of which the largest square is used.

    Raises:
        ValueError: stamps smaller than 12 pixels, too small for the bins.
    """
    side = min(values.shape[1:])
    if side < 2 * _BINS:
        raise ValueError(f"got stamps of {values.shape[1:]}; expected at least {2 * _BINS} pixels")
    square = np.asarray(values[:, :side, :side], np.float64)
    square = square - square.mean((1, 2), keepdims=True)
    power = np.abs(np.fft.fft2(square)) ** 2
    half = (side - 1) // 2  # without the zero and Nyquist frequencies
    plus = power[:, 1 : half + 1, 1 : half + 1]
    minus = power[:, 1 : half + 1, : -half - 1 : -1]
    mean = (plus + minus).mean(0)
    mean = 0.25 * (mean + mean.T)
    edges = np.linspace(0, half, _BINS + 1).round().astype(int)[:-1]

    def binned(frames: NDArray[Any]) -> NDArray[Any]:
        sums = np.add.reduceat(np.add.reduceat(frames, edges, 1), edges, 2)
        size = np.diff([*edges, half])
        return sums / (size[:, None] * size)

    mirror = binned((plus - minus) / mean).reshape(len(values), -1)
    turned = binned(0.5 * (plus + minus - (plus + minus).swapaxes(1, 2)) / mean)
    rows, columns = np.triu_indices(_BINS, 1)
    transpose = turned[:, rows, columns]

    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0], (_SIGNS, len(values)))
    p, squares, limits = [], [], []
    for differences in (mirror, transpose):
        found = float(np.square(differences.mean(0)).mean())
        null = np.square(signs @ differences / len(values)).mean(1)
        p.append(float((1 + (null >= found * (1 - 1e-12)).sum()) / (1 + _SIGNS)))
        squares.append(max(found - float(null.mean()), 0.0))
        limits.append(max(found - float(np.quantile(null, 0.05)), float(null.std())))
    return Isotropy(p[0], p[1], max(squares) ** 0.5, max(limits) ** 0.5, len(values))
