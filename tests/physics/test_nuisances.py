"""Gains, offset and scale of visibilities: derivatives, closed forms, and posteriors that cover the truth of simulated data."""

import itertools
import math

import pytest
import torch

from diffpost.physics import AntennaGains, Grid, OffsetAndScale

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def ends(antennas, times):
    """Baselines of all antennas at each time, half of them the other way round, and the number of the time."""
    pairs = torch.tensor(list(itertools.combinations(range(antennas), 2)))
    first, second = pairs.T.repeat(1, times)
    turned = rand(len(first)) < 0.5
    number = torch.arange(times).repeat_interleave(len(pairs))
    return torch.where(turned, second, first), torch.where(turned, first, second), number


def baselines(m):
    """Some 1e5 wavelengths: a resolution of about 0.5 arcsec."""
    return (randn(2, m, seed=5) * 1e5).unbind()


def gains_of(antennas=5, times=4, intervals=2):
    first, second, number = ends(antennas, times)
    interval = None if intervals == 1 else number * intervals // times
    return AntennaGains(first, second, amplitude_std=0.1, phase_std=math.radians(20), interval=interval)  # fmt: skip


NUISANCES = {
    "gains": gains_of(),
    "constant gains": gains_of(intervals=1),
    "offset and scale": OffsetAndScale(*baselines(40), offset_std=0.1, scale_std=0.2),
}


def simulated(nuisance, batch, snr, seed):
    """Truths from the prior, model visibilities of unequal amplitudes, data, and weights."""
    truth = nuisance.prior_draw(seed, torch.arange(batch))
    m = math.prod(nuisance.uv)
    model = randn(batch, m, 2, seed=seed + 1) * (0.5 + rand(m, 1, seed=seed))
    sigma = (0.5 + rand(m, seed=seed + 2)) / snr
    vis = nuisance.apply(truth, model) + sigma[:, None] * randn(batch, m, 2, seed=seed + 3)
    return truth, model, vis, sigma**-2


@pytest.mark.parametrize("nuisance", NUISANCES.values(), ids=NUISANCES.keys())
def test_jacobian(nuisance):
    """J^T W r and J^T W J against central differences of h(theta) m in float64."""
    theta, model, vis, weight = simulated(nuisance, 3, 10.0, 1)
    step = 1e-6
    columns = []
    for g in range(nuisance.groups):
        for p in range(nuisance.size):
            off = torch.zeros(nuisance.groups, nuisance.size, dtype=F64)
            off[g, p] = step
            up, down = (nuisance.apply(theta + sign * off, model) for sign in (1, -1))
            columns.append(((up - down) / (2 * step)).flatten(1))
    j = torch.stack(columns, 2)
    w = weight.repeat_interleave(2)
    residual = (vis - nuisance.apply(theta, model)).flatten(1)
    complex_ = torch.view_as_complex(vis - nuisance.apply(theta, model))
    gradient, curvature = nuisance._normal(
        theta, torch.view_as_complex(model), complex_, weight[None]
    )
    expected = (j.mT @ (w * residual)[..., None])[..., 0]
    torch.testing.assert_close(gradient.flatten(1), expected, rtol=1e-6, atol=1e-4)
    full = j.mT @ (w[:, None] * j)
    blocks = torch.stack([torch.block_diag(*c) for c in curvature])  # groups share no visibility
    torch.testing.assert_close(blocks, full, rtol=1e-6, atol=1e-3)


def test_scale_is_exactly_gaussian():
    """(sum w Re conj(m) V + 1/s^2)/(sum w |m|^2 + 1/s^2), in one step, and chi^2 by hand."""
    nuisance = OffsetAndScale(*baselines(30), scale_std=0.3)
    _, model, vis, weight = simulated(nuisance, 4, 1.0, 2)
    found = nuisance.fit(vis, weight, model)
    precision = (weight * model.square().sum(-1)).sum(1) + 0.3**-2
    mean = ((weight * (model * vis).sum(-1)).sum(1) + 0.3**-2) / precision
    torch.testing.assert_close(found.theta[:, 0, 2], mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.covariance[:, 0, 2, 2], 1 / precision, rtol=1e-12, atol=0)
    assert not found.theta[:, 0, :2].any() and not found.covariance[:, 0, :2].any()
    assert found.iterations == 1 and bool(found.converged.all())
    left = (weight * (vis - mean[:, None, None] * model).square().sum(-1)).sum(1)
    torch.testing.assert_close(found.chi2, left)
    draws = found.draw(3)
    assert not draws[..., :2].any()


def test_offset_moves_east_and_north():
    """An image moved by (dl, dm) is what the data of the original show with that offset: x runs to the west."""
    pytest.importorskip("finufft", reason="needs finufft")
    from diffpost.physics import Visibilities

    u, v = baselines(40)
    image = rand(1, 1, 8, 8)
    nuisance = OffsetAndScale(u, v, offset_std=0.2)
    theta = torch.tensor([[[0.05, -0.03, 1.0]]], dtype=F64)
    here = Visibilities(u, v, Grid(8, 0.1))(image)
    there = Visibilities(u, v, Grid(8, 0.1, centre=(-0.05, -0.03)))(image)
    torch.testing.assert_close(nuisance.apply(theta, here), there, rtol=0, atol=1e-8)
    found = nuisance.fit(there, torch.full((40,), 1e8, dtype=F64), here)
    torch.testing.assert_close(found.theta, theta, rtol=0, atol=1e-5)


@pytest.mark.parametrize("nuisance", NUISANCES.values(), ids=NUISANCES.keys())
def test_the_posterior_covers_the_truth(nuisance):
    """(truth - fit)^T C^-1 (truth - fit) over 400 simulated sets of data is chi^2 with as many degrees of freedom as parameters.

    At a signal-to-noise ratio of about 30 the posterior is Gaussian within the Monte Carlo error (4.5 standard errors, 7% for 10
    parameters). Rejected: half of the noise, and the wrong sign of a phase.
    """
    n = 400
    truth, model, vis, weight = simulated(nuisance, n, 30.0, 7)
    free = nuisance.groups * nuisance.size

    def excess(found, truth):
        d = (truth - found.theta)[..., None]
        chi2 = (d.mT @ torch.linalg.solve(found.covariance, d)).sum((1, 2, 3))
        error = math.sqrt(2 * free / n)
        return (float(chi2.mean()) - free) / error, (float(chi2.var()) / (2 * free) - 1) / math.sqrt((2 + 12 / free) / n)  # fmt: skip

    found = nuisance.fit(vis, weight, model)
    assert bool(found.converged.all()) and found.iterations < 12
    mean, spread = excess(found, truth)
    assert abs(mean) < 4.5 and abs(spread) < 4.5
    left = 2 * math.prod(nuisance.uv)
    assert float(found.chi2.mean()) < left
    assert excess(nuisance.fit(vis, 4 * weight, model), truth)[0] > 20
    mirror = torch.tensor([1.0, -1.0], dtype=F64)
    assert excess(nuisance.fit(vis * mirror, weight, model * mirror), truth)[0] > 100


@pytest.mark.parametrize("nuisance", NUISANCES.values(), ids=NUISANCES.keys())
def test_draws(nuisance):
    """Of the covariance claimed, the same whatever the batch, and with the density claimed."""
    _, model, vis, weight = simulated(nuisance, 1, 5.0, 3)
    n = 4000
    found = nuisance.fit(vis.expand(n, -1, -1), weight, model.expand(n, -1, -1))
    draws = found.draw(1, step=2)
    again = nuisance.fit(vis, weight, model).draw(1, torch.tensor([17]), step=2)
    torch.testing.assert_close(again[0], draws[17], rtol=1e-10, atol=1e-12)
    assert (found.draw(1, step=3) - draws).abs().min() > 0
    z = (draws - found.theta)[..., None]
    white = (z.mT @ torch.linalg.solve(found.covariance, z))[..., 0, 0]  # (n, G)
    p, error = nuisance.size, math.sqrt(2 * nuisance.size / n)
    assert ((white.mean(0) - p).abs() < 4.5 * error).all()
    density = found.log_prob(draws) + 0.5 * white
    assert (density - density[0]).abs().max() < 1e-8
    drawn = nuisance.prior_draw(5, torch.arange(n))
    spread = drawn.std(0) / nuisance.prior_std
    assert ((spread - 1).abs() < 4.5 / math.sqrt(2 * n)).all()
    assert ((drawn.mean(0) - nuisance.prior_mean).abs() < 4.5 * nuisance.prior_std / math.sqrt(n)).all()  # fmt: skip


@pytest.mark.parametrize("nuisance", NUISANCES.values(), ids=NUISANCES.keys())
def test_corrected_data(nuisance):
    """The same chi^2 of the same model; data of weight 0 do not matter, whatever they are."""
    truth, model, vis, weight = simulated(nuisance, 3, 5.0, 4)
    data, w = nuisance.corrected(vis, weight, truth)
    ours = (w * (data - model).square()).sum((1, 2))
    theirs = (weight[:, None] * (vis - nuisance.apply(truth, model)).square()).sum((1, 2))
    torch.testing.assert_close(ours, theirs)
    prior = (((truth - nuisance.prior_mean) / nuisance.prior_std) ** 2).sum(-1)
    total = nuisance.log_posterior(truth, vis, weight, model)
    torch.testing.assert_close(total.sum(1), -0.5 * (theirs + prior.sum(1)))
    masked, gone = weight.clone(), vis.clone()
    masked[3], gone[:, 3] = 0.0, math.nan
    found = nuisance.fit(gone, masked, model)
    gone[:, 3] = 7.0
    torch.testing.assert_close(found.theta, nuisance.fit(gone, masked, model).theta)
    assert (found.theta - nuisance.fit(vis, weight, model).theta).abs().max() > 0


def test_gains_of_antennas():
    """V_ij = g_i conj(g_j) m; the phase that all share stays at the prior, and an antenna without data as well."""
    first, second, _ = ends(4, 1)
    nuisance = AntennaGains(first, second, amplitude_std=0.1, phase_std=0.3, antennas=5)
    theta = nuisance.prior_draw(1, torch.arange(2))
    g, h = nuisance.gains(theta), nuisance.factor(theta)
    for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        torch.testing.assert_close(h[:, k], g[:, 0, i] * g[:, 0, j].conj())
    ones = torch.tensor([1.0, 0.0], dtype=F64).expand(2, len(first), 2)
    found = nuisance.fit(nuisance.apply(theta, ones), torch.full((len(first),), 1e6), ones)
    phase = found.theta[:, 0, 5:9] - theta[:, 0, 5:9]
    assert (phase - phase.mean(1, keepdim=True)).abs().max() < 1e-3
    covariance = found.covariance[:, 0]
    same = torch.zeros(10, dtype=F64)
    same[5:9] = 0.25
    assert float((same @ covariance[0] @ same).sqrt()) == pytest.approx(0.3 / 2, rel=1e-6)
    assert float(covariance[0, 4, 4].sqrt()) == pytest.approx(0.1, rel=1e-9)
    assert not found.theta[:, 0, [4, 9]].any()


def test_channels():
    """Visibilities with an axis of channels are those of one axis."""
    first, second, _ = ends(4, 2)
    wide = AntennaGains(first.expand(3, -1), second.expand(3, -1))
    flat = AntennaGains(first.repeat(3), second.repeat(3))
    _, model, vis, weight = simulated(flat, 2, 5.0, 1)
    shaped = [a.reshape(2, 3, -1, 2) for a in (vis, model)]
    found = wide.fit(shaped[0], weight.reshape(3, -1), shaped[1])
    expected = flat.fit(vis, weight, model)
    torch.testing.assert_close(found.theta, expected.theta)
    data, w = wide.corrected(shaped[0], weight.reshape(3, -1), found.theta)
    assert data.shape == (2, 3, 12, 2) and w.shape == (2, 3, 12, 1)
    torch.testing.assert_close(data.flatten(1, 2), flat.corrected(vis, weight, found.theta)[0])
    one = wide.fit(shaped[0][0], weight.reshape(3, -1), shaped[1])  # the same data for both models
    torch.testing.assert_close(one.theta[0], found.theta[0])


def test_large_phases_converge():
    """Phases of a turn and a half between antennas, from a start half a radian away, and never a step down."""
    nuisance = AntennaGains(*ends(5, 3)[:2], amplitude_std=0.5, phase_std=10.0)
    truth, model, vis, weight = simulated(nuisance, 20, 20.0, 9)
    start = truth + 0.5 * randn(*truth.shape, seed=1)
    found = nuisance.fit(vis, weight, model, start)
    assert bool(found.converged.all())
    before = nuisance.log_posterior(start, vis, weight, model)
    at_truth = nuisance.log_posterior(truth, vis, weight, model)
    now = nuisance.log_posterior(found.theta, vis, weight, model)
    assert (now > before).all() and (now > at_truth).all()
    short = nuisance.fit(vis, weight, model, start, max_iter=1)
    assert short.iterations == 1 and not short.converged.any()


def test_refused():
    first, second, number = ends(4, 2)
    gains = AntennaGains(first, second)
    _, model, vis, weight = simulated(gains, 2, 5.0, 1)
    bad = vis.clone()
    bad[0, 0] = math.nan
    for make, message in (
        (lambda: AntennaGains(first, second[1:]), "same shape"),
        (lambda: AntennaGains(first, first), "one antenna"),
        (lambda: AntennaGains(first, second, antennas=2), "up to 3 of 2"),
        (lambda: AntennaGains(first, second, phase_std=-1.0), "standard deviations"),
        (lambda: AntennaGains(first, second, phase_std=torch.ones(3)), "one for each"),
        (lambda: AntennaGains(first, second, interval=number[1:]), "intervals of shape"),
        (lambda: AntennaGains(first, second, interval=number - 1), "numbers from 0"),
        (lambda: OffsetAndScale(*baselines(3), offset_std=math.inf), "standard deviations"),
        (lambda: OffsetAndScale(torch.ones(3), torch.ones(2)), "same shape"),
        (lambda: gains.fit(bad, weight, model), "not finite"),
        (lambda: gains.fit(vis, -weight, model), "negative"),
        (lambda: gains.fit(vis, weight, model[0]), "model visibilities"),
        (lambda: gains.fit(vis, weight, model * math.inf), "NaN or infinite"),
        (lambda: gains.fit(vis[:, 1:], weight, model), "got visibilities"),
        (lambda: gains.factor(torch.zeros(2, 1, 7)), "got theta"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
