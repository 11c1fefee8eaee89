"""Averaging with its bound, and weights from neighbours, on simulated data."""

from __future__ import annotations

import numpy as np
import pytest

from diffpost.io.uv import VisibilityData
from diffpost.io.uv_averaging import averaged, recalibrated

ARCSEC = np.pi / 180 / 3600


def observation(
    times: int = 60, channels: int = 4, antennas: int = 6, seed: int = 0, noise: float = 0.0, factor=1.0, source=(1.0, -0.6)
) -> VisibilityData:  # fmt: skip
    """Earth rotation of random antennas at 10 s intervals; a point source of 1 Jy; `factor` is what weights do not know."""
    g = np.random.default_rng(seed)
    place = g.normal(size=(antennas, 2)) * 300.0  # metres
    nu = 230e9 + 2e8 * np.arange(channels)
    rows = []
    for t in range(times):
        angle = 7.3e-5 * 10 * t
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for a in range(antennas):
            for b in range(a + 1, antennas):
                uv = turn @ (place[a] - place[b])
                for c in range(channels):
                    rows.append(
                        (*(uv * nu[c] / 299792458.0), a, b, 59000 + 10 * t / 86400, nu[c], c)
                    )
    u, v, a, b, time, frequency, channel = np.array(rows).T
    order = g.permutation(len(u))  # a file need not be sorted
    u, v, a, b, time, frequency, channel = (
        q[order] for q in (u, v, a, b, time, frequency, channel)
    )
    sigma = g.uniform(0.5, 1.0, len(u))
    vis = np.exp(-2j * np.pi * (u * source[0] + v * source[1]) * ARCSEC)
    spread = sigma * np.sqrt(
        np.broadcast_to(factor if np.isscalar(factor) else factor[a.astype(int)], sigma.shape)
    )
    vis = vis + noise * spread * (g.normal(size=len(u)) + 1j * g.normal(size=len(u)))
    return VisibilityData(
        u, v, vis, sigma**-2.0, antenna1=a, antenna2=b, time=time, exposure=np.full(len(u), 10.0),
        frequency=frequency, channel=channel, bandwidth=np.full(len(u), 2e8),
    )  # fmt: skip


def test_averages_are_weighted_means_that_keep_all_weight() -> None:
    data = observation(times=10, channels=4, antennas=3)
    out, told = averaged(data, seconds=30, channels=2, radius=1.0)
    assert (told.before, told.after) == (10 * 4 * 3, 4 * 2 * 3)
    assert out.weight.sum() == pytest.approx(data.weight.sum(), rel=1e-13)
    assert (out.weight * out.vis).sum() == pytest.approx((data.weight * data.vis).sum(), rel=1e-12)
    assert out.exposure.max() == 30.0
    assert out.bandwidth.max() == pytest.approx(4e8)
    rows = (
        (data.antenna1 == 0)
        & (data.antenna2 == 2)
        & (data.channel < 2)
        & (data.time < 59000 + 25 / 86400)
    )
    assert rows.sum() == 6
    one = (
        (out.antenna1 == 0)
        & (out.antenna2 == 2)
        & (out.channel == 0)
        & (out.time < 59000 + 25 / 86400)
    )
    w = data.weight[rows]
    assert out.u[one][0] == pytest.approx((w * data.u[rows]).sum() / w.sum(), rel=1e-13)
    assert out.vis[one][0] == pytest.approx((w * data.vis[rows]).sum() / w.sum(), rel=1e-13)
    alone, told = averaged(data, radius=1.0)
    assert (len(alone), told.largest) == (len(data), pytest.approx(0.0, abs=1e-25))


def test_the_bound_of_smearing_holds_and_is_not_idle() -> None:
    """The closed form of point sources in 24 directions at the averaged u, v, against the averages: within the bound in all, and
    above 0.8 of it in one; sources twice as far out break it."""
    for seconds, channels in [(300.0, 1), (0.0, 4), (200.0, 2)]:
        radius, lost = 3.0, []
        for angle in np.linspace(0, np.pi, 24, endpoint=False):
            for far in (1.0, 2.0):
                place = far * radius * np.array([np.cos(angle), np.sin(angle)])
                data = observation(times=30, channels=4, antennas=4, source=place)
                out, told = averaged(data, seconds=seconds, channels=channels, radius=radius)
                phase = out.u * place[0] + out.v * place[1]
                lost.append(np.abs(out.vis - np.exp(-2j * np.pi * phase * ARCSEC)).max())
        assert max(lost[::2]) <= told.largest
        assert max(lost[::2]) > 0.8 * told.largest
        assert max(lost[1::2]) > told.largest


def test_averaging_needs_what_it_averages_over() -> None:
    data = observation(times=2, channels=1)
    bare = VisibilityData(data.u, data.v, data.vis, data.weight)
    with pytest.raises(ValueError, match="antennas"):
        averaged(bare, seconds=10, radius=1)
    untimed = VisibilityData(data.u, data.v, data.vis, data.weight, antenna1=data.antenna1, antenna2=data.antenna2)  # fmt: skip
    with pytest.raises(ValueError, match="no times"):
        averaged(untimed, seconds=10, radius=1)
    with pytest.raises(ValueError, match="no channels"):
        averaged(untimed, channels=2, radius=1)
    with pytest.raises(ValueError, match="no times"):
        recalibrated(untimed)
    with pytest.raises(ValueError, match="0 or more"):
        averaged(data, seconds=-1, radius=1)


@pytest.mark.parametrize("between", ["time", "channel"])
@pytest.mark.parametrize("robust", [True, False])
def test_the_factor_of_wrong_weights_is_found(between: str, robust: bool) -> None:
    """Weights 4 times too large: within 3 of the errors stated, which the next test confirms; weights that were right (factor
    1) are told apart by 20 errors."""
    data = observation(noise=1.0, factor=4.0, source=(0.0, 0.0))
    out, found = recalibrated(data, between=between, robust=robust)
    assert found.pairs == 1800
    assert abs(found.factor - 4.0) < 3 * found.error
    assert found.factor - 1.0 > 20 * found.error
    np.testing.assert_allclose(out.weight, data.weight / found.factor)
    assert f"{found.factor:.4g}" in out.notes[-1]


def test_the_estimator_has_no_bias_at_any_number() -> None:
    """Means over 40,000 data sets of few pairs: f to 4 standard errors, and the error stated is the scatter to 3%. A median over its
    large-sample value ln 2 would be off by 20% at 3 pairs: rejected."""
    from diffpost.io.uv_averaging import _factor

    g = np.random.default_rng(1)
    for n in (3, 4, 7, 16):
        z = g.exponential(2.5, (40000, n))
        values = np.array([_factor(row, robust=True) for row in z])
        scatter = values[:, 0].std()
        assert abs(values[:, 0].mean() - 2.5) < 4 * scatter / 200
        assert values[:, 1].mean() == pytest.approx(scatter, rel=0.03)
        if n == 3:
            naive = np.median(z, 1) / np.log(2)
            assert abs(naive.mean() - 2.5) > 20 * naive.std() / 200


def test_outliers_hardly_move_the_robust_factor() -> None:
    data = observation(noise=1.0, source=(0.0, 0.0))
    vis = data.vis.copy()
    vis[::60] += 100.0
    spoilt = VisibilityData(**{**_rows(data), "vis": vis})
    _, robust = recalibrated(spoilt)
    _, mean = recalibrated(spoilt, robust=False)
    assert robust.factor < 1.15
    assert mean.factor > 50


def test_baselines_have_factors_of_their_own() -> None:
    factors = np.array([1.0, 9.0, 1.0, 4.0, 1.0, 1.0])  # by the first antenna of a baseline
    data = observation(noise=1.0, factor=factors, source=(0.0, 0.0), times=120)
    out, found = recalibrated(data, per_baseline=True)
    assert len(found.baselines) == 15
    for a, _, factor, error, pairs in found.baselines:
        assert pairs == 240
        assert abs(factor - factors[a]) < 4 * error
    one = out.weight / data.weight
    assert one[data.antenna1 == 1].max() < 0.2 < one[data.antenna1 == 0].min()


def test_far_neighbours_are_no_pairs() -> None:
    data = observation(times=4, channels=1, antennas=2)
    far = VisibilityData(**{**_rows(data), "time": 59000 + np.argsort(np.argsort(data.time)) * 1.0})
    with pytest.raises(ValueError, match="longer gap"):
        recalibrated(far, gap=100.0)
    assert recalibrated(data, gap=11.0)[1].pairs == 2
    with pytest.raises(ValueError, match="expected 'time' or 'channel'"):
        recalibrated(data, between="antenna")


def _rows(data: VisibilityData) -> dict:
    names = ("u", "v", "vis", "weight", "antenna1", "antenna2", "time", "exposure", "frequency", "channel", "bandwidth")  # fmt: skip
    return {name: getattr(data, name) for name in names}


def test_intervals_that_all_baselines_share() -> None:
    """A baseline that begins late has the same intervals and times as the others; its own, by seconds."""
    data = observation(times=12, channels=1, antennas=3, noise=1.0)
    late = (data.antenna1 == 0) & (data.antenna2 == 1) & (data.time < 59000 + 15 / 86400)
    data = data.select(~late)
    number = np.floor((data.time - 59000) * 86400 / 40 + 0.01).astype(np.int64)
    out, told = averaged(data, radius=1.0, interval=number)
    assert told.after == 9 and len(np.unique(out.time)) == 3
    assert "given intervals" in out.notes[-1]
    first = (data.antenna1 == 0) & (data.antenna2 == 1) & (number == 0)
    mine = (out.antenna1 == 0) & (out.antenna2 == 1) & (out.time == out.time.min())
    assert first.sum() == 2 and mine.sum() == 1
    assert out.weight[mine][0] == pytest.approx(data.weight[first].sum())
    assert out.vis[mine][0] == pytest.approx(np.average(data.vis[first], weights=data.weight[first]))  # fmt: skip
    apart, _ = averaged(data, radius=1.0, seconds=40)
    assert len(np.unique(apart.time)) > 3
    with pytest.raises(ValueError, match="0 seconds"):
        averaged(data, radius=1.0, seconds=40, interval=number)
    with pytest.raises(ValueError, match="intervals of shape"):
        averaged(data, radius=1.0, interval=number[1:])
