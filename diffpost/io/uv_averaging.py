r"""Fewer visibilities, and honest weights.

**Averaging** replaces the visibilities of a baseline within a time and channel interval by their weighted mean, at the weighted
mean of their u and v.  A source at the direction s (radians from the phase centre) then has, of its amplitude,

    |1 - <exp(-2 pi i d . s)>| <= 2 pi^2 <(d . s)^2> <= 2 pi^2 |s|^2 lambda_max(<d d^T>),

too little, where d is what an averaged baseline is away from the mean: <d> = 0 leaves no term of first order, and
|exp(-i x) - 1 + i x| <= x^2/2.  `Smearing` holds this bound.

**Weights.**  Neighbouring visibilities of a baseline see the same sky, so of their difference, over the standard deviation that
the weights promise, each part is N(0, f) where the noise variance is f times what the weights say.  With
z = |V_2 - V_1|^2/(2 (sigma_1^2 + sigma_2^2)) of pairs that share no visibility, z/f is exponential: the mean of n has expectation f and
standard error f/sqrt(n); the median is robust against outliers and has, as the k-th of n = 2k - 1 (David & Nagaraja 2003, Order
Statistics, section 2.5),

    E = f sum_{j=k}^{n} 1/j,        Var = f^2 sum_{j=k}^{n} 1/j^2,

so that dividing by the sum leaves no bias at any n.  Sky that changes from one visibility to the next is taken for noise: pairs must
lie close in time, and the factor is an upper bound where the source is bright and resolved.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from diffpost.io.uv import VisibilityData

__all__ = ["Recalibration", "Smearing", "averaged", "recalibrated"]

Array = NDArray[np.float64]

_ARCSEC = np.pi / 180 / 3600
_DAY = 86400.0
_LEAST = 8  # pairs from which a baseline has a factor of its own
_GAP = 3.0  # times the usual interval between neighbours


@final
@dataclass(frozen=True)
class Smearing:
    """What averaging may have done to a source at `radius` arcsec from the phase centre.

    before, after: numbers of visibilities; largest: bound of the lost share of its amplitude over all averages; typical: the
    mean of the bounds, weighted by the weights.
    """

    radius: float
    before: int
    after: int
    largest: float
    typical: float


def averaged(
    data: VisibilityData,
    *,
    seconds: float = 0.0,
    channels: int = 1,
    radius: float,
    interval: NDArray[np.int64] | None = None,
) -> tuple[VisibilityData, Smearing]:
    """The data averaged in time and frequency, baseline by baseline.

    Parameters
    ----------
    seconds: length of an interval; 0 does not average in time. Intervals begin at each baseline's first visibility, and again
        after each gap.
    channels: how many neighbouring channels (of the file's numbers) become one.
    radius: arcsec from the phase centre to which the bound is stated.
    interval: (m,) number of the interval of each visibility, instead of `seconds`, such as `physics.scan_numbers` gives. It is the same
        for all baselines, and so are the times of the averages, which closures need.

    Raises
    ------
    ValueError: data without antennas, or without times or channels where they are averaged; values out of range.
    """
    if not seconds >= 0 or channels < 1 or not radius >= 0:
        raise ValueError(
            f"averaged: got {seconds} seconds, {channels} channels and a radius of {radius}; expected 0 or more, 1 or more, 0 or more"
        )
    baseline = data.baseline
    if baseline is None:
        raise ValueError(
            "averaged: the data do not tell antennas, so baselines cannot be told apart"
        )
    if interval is not None and (seconds > 0 or np.shape(interval) != (len(data),)):
        raise ValueError(
            f"averaged: got intervals of shape {np.shape(interval)} and {seconds} seconds; expected a number for each of {len(data)} "
            "visibilities, and 0 seconds"
        )
    if seconds > 0 and data.time is None:
        raise ValueError("averaged: the data have no times; average channels only (0 seconds)")
    if channels > 1 and data.channel is None:
        raise ValueError("averaged: the data have no channels; average in time only (1 channel)")
    m = len(data)
    channel = np.zeros(m, dtype=np.int64) if data.channel is None else data.channel // channels
    # As given, not sorted by number: (a, b) and (b, a) have opposite signs and stay apart.
    first, second = data.antenna1, data.antenna2
    if first is None or second is None:
        raise ValueError("averaged: the data have one antenna of each pair")
    pair = first * (int(second.max()) + 1) + second
    time = np.zeros(m) if data.time is None else data.time * _DAY
    order = np.lexsort((time, channel, pair))
    new = np.ones(m, dtype=bool)
    p, c, t = pair[order], channel[order], time[order]
    series = np.r_[True, (np.diff(p) != 0) | (np.diff(c) != 0)]
    if interval is not None:
        order = np.lexsort((time, interval, channel, pair))
        p, c, k = pair[order], channel[order], np.asarray(interval)[order]
        new = np.r_[True, (np.diff(p) != 0) | (np.diff(c) != 0) | (np.diff(k) != 0)]
    elif seconds > 0:
        new = _intervals(t, series, seconds)
    elif data.time is not None:
        new = series | np.r_[True, np.diff(t) != 0]
    group = np.empty(m, dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    n = int(group.max()) + 1
    weight: Array = np.bincount(group, data.weight, n).astype(np.float64)

    def mean(values: Array | None) -> Array | None:
        return None if values is None else np.bincount(group, data.weight * values, n) / weight

    u, v = mean(data.u), mean(data.v)
    vis_re, vis_im = mean(data.vis.real), mean(data.vis.imag)
    if u is None or v is None or vis_re is None or vis_im is None:
        raise ValueError("averaged: no u, v or V")
    du, dv = data.u - u[group], data.v - v[group]
    a, b, ab = (
        np.bincount(group, data.weight * q, n) / weight for q in (du * du, dv * dv, du * dv)
    )
    spread = 0.5 * (a + b) + np.sqrt(0.25 * (a - b) ** 2 + ab**2)  # largest eigenvalue
    bound = 2 * np.pi**2 * (radius * _ARCSEC) ** 2 * spread
    at = np.empty(n, dtype=np.int64)
    at[group[order[::-1]]] = order[::-1]  # the first of each
    middle = mean(data.time)
    if interval is not None and data.time is not None:
        _, label = np.unique(interval, return_inverse=True)
        middle = (np.bincount(label, data.time) / np.bincount(label))[label[at]]
    out = replace(
        data,
        u=u,
        v=v,
        w=mean(data.w),
        vis=vis_re + 1j * vis_im,
        weight=weight,
        antenna1=first[at],
        antenna2=second[at],
        time=middle,
        exposure=_span(group, n, time, data.exposure, data.channel),
        frequency=mean(data.frequency),
        channel=None if data.channel is None else channel[at],
        bandwidth=_band(group, n, data.frequency, data.bandwidth),
    )
    told = Smearing(radius, m, n, float(bound.max()), float((weight * bound).sum() / weight.sum()))
    length = f"{seconds:g} s" if interval is None else "given intervals"
    note = (
        f"averaged {m} visibilities to {n} ({length}, {channels} channel(s)): a source {radius:.3g} arcsec from the phase "
        f"centre loses at most {told.largest:.2g} of its amplitude ({told.typical:.1g} as a rule)"
    )
    return out.told(note), told


def _intervals(time: Array, series: NDArray[np.bool_], seconds: float) -> NDArray[np.bool_]:
    """Where a new interval begins: at each series, and at the first time `seconds` or more after the last beginning."""
    new = series.copy()
    slack = seconds * (1 - 1e-6)
    starts = np.flatnonzero(series)
    for begin, end in zip(starts, np.r_[starts[1:], len(time)], strict=True):
        part = time[begin:end]
        at = 0
        while at < len(part):
            new[begin + at] = True
            at = int(np.searchsorted(part, part[at] + slack, side="left"))
    return new


def _span(
    group: NDArray[np.int64],
    n: int,
    time: Array,
    exposure: Array | None,
    channel: NDArray[np.int64] | None,
) -> Array | None:
    """Seconds of exposure of an average: those of one of its channels."""
    if exposure is None:
        return None
    different = np.ones(n) if channel is None else _count_distinct(group, channel, n)
    return np.bincount(group, exposure, n) / different


def _band(
    group: NDArray[np.int64], n: int, frequency: Array | None, width: Array | None
) -> Array | None:
    """Hz from the lower edge of the lowest channel of an average to the upper edge of the highest."""
    if frequency is None or width is None:
        return (
            width
            if width is None
            else np.bincount(group, width, n) / np.bincount(group, minlength=n)
        )
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, group, frequency - width / 2)
    np.maximum.at(high, group, frequency + width / 2)
    return high - low


def _count_distinct(group: NDArray[np.int64], values: NDArray[np.int64], n: int) -> Array:
    pairs = np.unique(np.stack([group, values], 1), axis=0)
    return np.bincount(pairs[:, 0], minlength=n).astype(np.float64)


# Weights ----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Recalibration:
    """By how much the noise differs from what the weights say.

    factor: of the variance; above 1 the weights are too large. error: its standard error if the noise is Gaussian and one factor
        holds for all; pairs: of visibilities that were compared.
    baselines: (antenna 1, antenna 2, factor, error, pairs) of each that has a factor of its own.
    """

    factor: float
    error: float
    pairs: int
    baselines: tuple[tuple[int, int, float, float, int], ...] = ()


def recalibrated(
    data: VisibilityData,
    *,
    between: str = "time",
    per_baseline: bool = False,
    robust: bool = True,
    gap: float | None = None,
) -> tuple[VisibilityData, Recalibration]:
    """The data with weights that agree with the scatter of neighbours.

    Parameters
    ----------
    between: "time" compares neighbouring times of a baseline and channel, "channel" neighbouring channels of a baseline and time.
    per_baseline: a factor for each baseline with at least 8 pairs; the others have the common one.
    robust: by the median, not the mean.
    gap: seconds at most between neighbours in time; default: three times the usual interval.

    Raises
    ------
    ValueError: data without antennas, times or channels, or without a pair.
    """
    if between not in ("time", "channel"):
        raise ValueError(f"recalibrated: got between={between!r}; expected 'time' or 'channel'")
    if data.antenna1 is None or data.antenna2 is None:
        raise ValueError("recalibrated: the data do not tell antennas, so neighbours are not known")
    if data.time is None or (between == "channel" and data.channel is None):
        raise ValueError(
            f"recalibrated: the data have no {'times' if data.time is None else 'channels'}, so neighbours are not known"
        )
    one, other = _neighbours(data, between, gap)
    if not len(one):
        raise ValueError(
            f"recalibrated: no two visibilities of a baseline are neighbours in {between}"
            + (" (allow a longer gap)" if between == "time" else "")
        )
    variance = 1 / data.weight
    z = np.abs(data.vis[one] - data.vis[other]) ** 2 / (2 * (variance[one] + variance[other]))
    factor, error = _factor(z, robust)
    scale = np.full(len(data), factor)
    found = []
    if per_baseline:
        pair = data.antenna1 * (int(data.antenna2.max()) + 1) + data.antenna2
        for number in np.unique(pair):
            part = z[pair[one] == number]
            if len(part) >= _LEAST:
                rows = pair == number
                its, its_error = _factor(part, robust)
                scale[rows] = its
                at = int(np.argmax(rows))
                found.append(
                    (int(data.antenna1[at]), int(data.antenna2[at]), its, its_error, len(part))
                )
    if not (scale > 0).all():
        raise ValueError(
            "recalibrated: neighbours do not differ at all, so the noise cannot be measured"
        )
    note = (
        f"weights divided by {factor:.4g} ± {error:.2g}: the noise variance over what they said, by {len(z)} pairs of neighbours in "
        f"{between}"
    )
    if found:
        spread = [row[2] for row in found]
        note += f"; {len(found)} baselines have their own, {min(spread):.3g} to {max(spread):.3g}"
    out = replace(data, weight=data.weight / scale).told(note)
    return out, Recalibration(factor, error, len(z), tuple(found))


def _neighbours(
    data: VisibilityData, between: str, gap: float | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of pairs, each row in one pair at most."""
    m = len(data)
    if data.antenna1 is None or data.antenna2 is None or data.time is None:
        raise ValueError("neighbours: no antennas or times")
    pair = data.antenna1 * (int(data.antenna2.max()) + 1) + data.antenna2
    channel = np.zeros(m, dtype=np.int64) if data.channel is None else data.channel
    time = data.time * _DAY
    if between == "time":
        order = np.lexsort((time, channel, pair))
        same = (np.diff(pair[order]) == 0) & (np.diff(channel[order]) == 0)
        step = np.diff(time[order])
        positive = step[same & (step > 0)]
        if gap is None:
            gap = _GAP * float(np.median(positive)) if len(positive) else 0.0
        joined = same & (step > 0) & (step <= gap)
    else:
        order = np.lexsort((channel, time, pair))
        same = (np.diff(pair[order]) == 0) & (np.abs(np.diff(time[order])) < 1e-3)
        joined = same & (np.diff(channel[order]) == 1)
    # Within a run of joined rows every other link is taken, which leaves each row in one pair.
    number = np.arange(m - 1)
    begin = np.maximum.accumulate(np.where(joined & ~np.r_[False, joined[:-1]], number, -1))
    taken = joined & ((number - begin) % 2 == 0)
    at = np.flatnonzero(taken)
    return order[at], order[at + 1]


def _factor(z: Array, robust: bool) -> tuple[float, float]:
    """f and its standard error, from values that are exponential with mean f."""
    n = len(z)
    if not robust:
        mean = float(z.mean())
        return mean, mean / n**0.5
    # Of an even number one is left out: a median is then one order statistic, whose moments are exact.
    if n % 2 == 0:
        z, n = z[: n - 1], n - 1
    k = (n + 1) // 2
    parts = 1 / np.arange(k, n + 1)
    value = float(np.median(z)) / float(parts.sum())
    return value, value * float(np.sqrt((parts**2).sum())) / float(parts.sum())
