"""Closures against their definition and closed forms: invariance, derivatives, the noise of simulated data, and what is refused."""

import itertools
import math

import pytest
import torch

import diffpost as dp
from diffpost.operators.base import Linearized
from diffpost.physics import Grid

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import AntennaGains, Closures, Visibilities, scan_numbers

F64 = torch.float64
ARCSEC = math.pi / 180 / 3600


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def array(antennas, times, seed=0):
    """Antennas of every visibility, half of the baselines the other way round, and times a minute apart; u, v of 1e5 wavelengths."""
    pairs = torch.tensor(list(itertools.combinations(range(antennas), 2)))
    first, second = pairs.T.repeat(1, times)
    turned = rand(len(first), seed=seed) < 0.5
    first, second = torch.where(turned, second, first), torch.where(turned, first, second)
    number = torch.arange(times, dtype=F64).repeat_interleave(len(pairs))
    place = randn(antennas, times, 2, seed=seed + 1) * 1e5
    u, v = (place[first, number.long()] - place[second, number.long()]).T
    return u, v, first, second, 57854 + number / 1440


def visibilities(snr, seed):
    """Of unit amplitude and any phase, with the weights of these signal-to-noise ratios."""
    turn = 2 * math.pi * rand(len(snr), seed=seed)
    return torch.view_as_real(torch.polar(torch.ones_like(turn), turn)), snr.square()


def gained(vis, first, second, group, seed):
    """Each antenna with its own gain in each group, of a factor of about 3 and of any phase."""
    shape = (int(group.max()) + 1, int(first.max().maximum(second.max())) + 1)
    gain = torch.polar(randn(*shape, seed=seed).exp(), 2 * math.pi * rand(*shape, seed=seed))
    factor = gain[group, first] * gain[group, second].conj()
    return torch.view_as_real(torch.view_as_complex(vis) * factor)


@pytest.mark.parametrize("antennas", [3, 4, 5, 8])
def test_minimal_sets(antennas):
    """(n - 1)(n - 2)/2 closure phases and n (n - 3)/2 amplitudes at a time (Blackburn et al. 2020), each as it is defined."""
    times = 2
    _, _, first, second, time = array(antennas, times)
    vis, weight = visibilities(10 + 90 * rand(len(first)), 1)
    vis = vis * (1 + rand(len(first), 1, seed=2))
    closures = Closures(vis, weight, first, second, time)
    assert len(closures.triangles) == times * (antennas - 1) * (antennas - 2) // 2
    assert len(closures.quadrangles) == times * antennas * (antennas - 3) // 2
    assert closures.missing == (0, 0) and closures.used == len(first)
    complex_ = torch.view_as_complex(vis)
    for s, half in ((slice(0, len(first) // 2), 0), (slice(len(first) // 2, None), 1)):
        table = {}
        for i, j, value in zip(first[s].tolist(), second[s].tolist(), complex_[s], strict=True):
            table[i, j], table[j, i] = value, value.conj()
        t, q = len(closures.triangles) // times, len(closures.quadrangles) // times
        for psi, (i, j, k) in zip(closures.phases[half * t :][:t], closures.triangles[half * t :].tolist(), strict=False):  # fmt: skip
            assert math.cos(psi - torch.angle(table[i, j] * table[j, k] * table[k, i])) > 1 - 1e-12
        for ln, (i, j, k, m) in zip(closures.log_amplitudes[half * q :][:q], closures.quadrangles[half * q :].tolist(), strict=False):  # fmt: skip
            ratio = table[i, j] * table[k, m] / (table[i, k] * table[j, m])
            assert float(ln) == pytest.approx(float(ratio.abs().log()), abs=1e-12)


def test_baselines_that_are_missing():
    """Without diagonal baselines a ring of antennas has a closure that no triangle shows: it is counted, not made up."""
    first, second = torch.tensor([0, 1, 2, 0, 0, 0]), torch.tensor([1, 2, 3, 3, 4, 2])
    vis, weight = visibilities(torch.full((6,), 20.0, dtype=F64), 0)
    time = torch.zeros(6)
    closures = Closures(vis, weight, first, second, time)
    assert (len(closures.phases), len(closures.log_amplitudes)) == (2, 1)
    assert closures.missing == (0, 0) and closures.used == 5
    faint = weight.clone()
    faint[5] = 4.0  # 0-2 is below the cut: only 0-1-2-3-0 is left, of even length
    amplitude = Closures(vis, faint, first, second, time)
    assert (len(amplitude.phases), len(amplitude.log_amplitudes)) == (0, 1)
    assert amplitude.missing == (1, 0)


def test_gains_cancel():
    """Exactly, for any gain of each antenna at each time and channel; gains of baselines do not."""
    _, _, first, second, time = array(6, 4)
    first, second, time = (a.expand(2, -1) for a in (first, second, time))
    snr = 10 + 90 * rand(2, first.shape[1])
    vis, weight = visibilities(snr.reshape(-1), 1)
    vis, weight = vis.reshape(2, -1, 2), weight.reshape(2, -1)
    closures = Closures(vis, weight, first, second, time)
    group = scan_numbers(time, 1.0) + 4 * torch.arange(2)[:, None]
    other = gained(vis, first, second, group, 3)
    assert closures(other[None]).abs().max() < 1e-10  # 1e-12 rad at the largest ratio of 100
    again = Closures(other, weight * 0 + 1e4, first, second, time, amplitude=torch.ones(2, 60))
    assert (again(vis[None])).abs().max() < 1e-9
    model = randn(3, *vis.shape, seed=5)
    seen = torch.stack([gained(m, first, second, group, 7 + k) for k, m in enumerate(model)])
    torch.testing.assert_close(closures(seen), closures(model), rtol=0, atol=1e-9)
    noisy = vis * (1 + 0.1 * rand(*vis.shape[:-1], 1, seed=9))
    assert closures(noisy[None]).abs().max() > 1


def test_symmetric_sources_and_points():
    """Closure phases of 0 for a source that is its own mirror image about any place; no closures at all of a point."""
    u, v, first, second, time = array(6, 3)
    grid = Grid((9, 12), 0.2, centre=(0.3, -0.7))
    operator = Visibilities(u, v, grid, accuracy=1e-13)
    ones = torch.view_as_real(torch.ones(len(u), dtype=torch.complex128))
    closures = Closures(ones, torch.full((len(u),), 1e4), first, second, time) @ operator
    half = rand(1, 1, *grid.shape)
    symmetric = half + half.flip(-2, -1)
    point = torch.zeros(1, 1, *grid.shape, dtype=F64)
    point[..., 2, 7] = 0.3
    angle, size = closures.outer.closures(operator(torch.cat([symmetric, point, half])))
    turns = angle / math.pi  # a symmetric source may be negative somewhere: 0 or 180 degrees
    assert (turns[0] - turns[0].round()).abs().max() < 1e-9
    assert angle[1].abs().max() < 1e-9 and size[1].abs().max() < 1e-9
    assert (turns[2] - turns[2].round()).abs().max() > 0.01 and size[0].abs().max() > 0.1
    around = torch.exp(-(sum(c**2 for c in Grid(9, 0.1).coordinates()) / 0.02))[None, None].double()
    positive = Visibilities(u, v, Grid(9, 0.1), accuracy=1e-13)(around)
    assert closures.outer.closures(positive)[0].abs().max() < 1e-9


def test_derivatives():
    """Differences, autograd and the dot test, through the image and across the cut of the phase."""
    u, v, first, second, time = array(5, 3)
    grid = Grid(8, 0.2)
    operator = Visibilities(u, v, grid)
    x, d = 0.3 + rand(2, 1, 8, 8), randn(2, 1, 8, 8, seed=2)
    vis = -operator(x)[0] + 0.1 * randn(len(u), 2, seed=3)  # phases are half a turn away
    closures = Closures(vis, torch.full((len(u),), 1e3), first, second, time)
    seen = closures @ operator
    linear = seen.linearize(x)
    assert linear.dot_test((1, 8, 8)) < 1e-13
    assert closures.linearize(operator(x)).dot_test(closures.input_shape) < 1e-13
    step = 1e-6
    numeric = (seen(x + step * d) - seen(x - step * d)) / (2 * step)
    jumps = numeric.abs() > 1e4  # a difference that straddles the cut
    assert jumps.float().mean() < 0.05
    torch.testing.assert_close(linear(d)[~jumps], numeric[~jumps], rtol=1e-6, atol=1e-5)
    reference = Linearized(seen, x)
    torch.testing.assert_close(linear(d), reference(d), rtol=1e-9, atol=1e-9)
    w = randn(*numeric.shape, seed=4)
    torch.testing.assert_close(linear.adjoint(w), reference.adjoint(w), rtol=1e-9, atol=1e-9)
    one = linear.select(torch.tensor([1]))
    torch.testing.assert_close(one(d[1:]), linear(d)[1:])
    like = closures.likelihood(operator)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(z).sum(), z)
    torch.testing.assert_close(like.score(x), gradient, rtol=1e-9, atol=1e-9)
    assert seen(x.float()).dtype == torch.float32


def test_phases_go_to_the_nearest_turn():
    """A closure phase of 179 degrees observed and one of -179 in the model differ by 2 degrees."""
    turn = torch.tensor([179.0, 0, 0], dtype=F64).deg2rad()
    vis = torch.view_as_real(torch.polar(torch.ones(3, dtype=F64), turn))
    model = torch.view_as_real(torch.polar(torch.ones(3, dtype=F64), -turn))
    ends = torch.tensor([0, 1, 0]), torch.tensor([1, 2, 2])
    closures = Closures(vis, torch.full((3,), 100.0), *ends, torch.zeros(3), amplitude=torch.ones(3))  # fmt: skip
    expected = math.radians(2) / math.sqrt(3 / 100)
    assert float(closures(model[None])) == pytest.approx(expected, rel=1e-9)
    assert closures.likelihood(dp.Identity()).ndata == 1


def test_the_noise():
    """Thermal noise at 10 to 100 times less than the signal: whitened closures have unit variance and no correlation.

    The second order of ln(1 + n/V) adds rho^-4 to the variance of rho^-2, 0.2% here, less than the Monte Carlo error (0.3%). Rejected:
    closures without their covariance, of the same variances, and noise of half or twice the variance.
    """
    _, _, first, second, time = array(6, 3)
    snr = 10 ** (1 + rand(len(first), seed=1))
    vis, weight = visibilities(snr, 2)
    closures = Closures(vis, weight, first, second, time, amplitude=torch.ones_like(snr))
    draws = 4000
    data = vis + randn(draws, *vis.shape, seed=3) / snr[:, None]
    white = closures(data)
    k = white.shape[1]
    assert k == 3 * (10 + 9)
    chi2 = white.square().sum(1)

    def excess(chi2):
        """Of the mean and of the variance of chi^2, in standard errors."""
        mean = (float(chi2.mean()) - k) / math.sqrt(2 * k / draws)
        spread = (float(chi2.var()) / (2 * k) - 1) / math.sqrt((2 + 12 / k) / draws)
        return mean, spread

    mean, spread = excess(chi2)
    assert abs(mean) < 4.5 and abs(spread) < 4.5
    covariance = white.T @ white / draws
    assert (covariance - torch.eye(k, dtype=F64)).abs().max() < 5.5 * math.sqrt(2 / draws)
    assert white.mean(0).abs().max() < 4.5 / math.sqrt(draws)
    psi, ln = closures.closures(data)
    own = torch.cat([psi - closures.phases, ln - closures.log_amplitudes], 1)
    own = torch.remainder(own + math.pi, 2 * math.pi) - math.pi
    diagonal = (own.square() / own.square().mean(0)).sum(1)
    assert abs(excess(diagonal)[0]) < 1e-6 and excess(diagonal)[1] > 6
    assert excess(chi2 / 2)[0] < -50 and excess(2 * chi2)[0] > 50


def test_a_minimal_set_says_as_much_as_all_closures():
    """chi^2 of the ten triangles of five antennas, by the pseudo-inverse of their covariance of rank 6; likewise of quadrangles."""
    pairs = list(itertools.combinations(range(5), 2))
    first, second = torch.tensor(pairs).T
    snr = 10 + 90 * rand(10, seed=1)
    vis, weight = visibilities(snr, 2)
    closures = Closures(vis, weight, first, second, torch.zeros(10), amplitude=torch.ones(10))
    data = vis + randn(10, 2, seed=3) / snr[:, None]
    error = (torch.view_as_complex(data) / torch.view_as_complex(vis)).log()
    d, q = [], []
    for i, j, k in itertools.combinations(range(5), 3):
        d.append([(pair in ((i, j), (j, k))) - (pair == (i, k)) for pair in pairs])
    for i, j, k, m in itertools.permutations(range(5), 4):
        up, down = ({i, j}, {k, m}), ({i, k}, {j, m})
        q.append([(set(pair) in up) - (set(pair) in down) for pair in pairs])
    white = closures(data[None])[0].square()
    expected = []
    for matrix, part in ((d, error.imag), (q, error.real)):
        rows = torch.tensor(matrix, dtype=F64)
        inverse = torch.linalg.pinv(rows / weight @ rows.T, rtol=1e-10, hermitian=True)
        expected.append(float((rows @ part) @ inverse @ (rows @ part)))
    assert float(white[:6].sum()) == pytest.approx(expected[0], rel=1e-8)
    assert float(white[6:].sum()) == pytest.approx(expected[1], rel=1e-8)


def test_free_gains_leave_what_closures_see():
    """chi^2 of the best gains without a prior is that of the closures (Blackburn et al. 2020), to first order in the noise: 0.1% here."""
    _, _, first, second, time = array(6, 2)
    snr = 1000 * (1 + rand(len(first), seed=1))
    vis, weight = visibilities(snr, 2)
    number = scan_numbers(time, 1.0)
    free = AntennaGains(first, second, amplitude_std=100.0, phase_std=100.0, interval=number)
    model = vis + randn(3, *vis.shape, seed=3) / snr[:, None]
    closures = Closures(vis, weight, first, second, time, amplitude=torch.ones_like(snr))
    fitted = free.fit(vis, weight, model)
    torch.testing.assert_close(fitted.chi2, closures(model).square().sum(1), rtol=5e-3, atol=0)
    without = (weight[:, None] * (vis - model).square()).sum((1, 2))
    assert (without > 1.2 * fitted.chi2).all()


def test_noise_of_the_data_themselves():
    """Variances from observed amplitudes, debiased: chi^2 of the truth within 4.5 standard errors and 3 rho^-2 at rho = 10."""
    _, _, first, second, time = array(5, 40)
    snr = torch.full((len(first),), 10.0, dtype=F64)
    vis, weight = visibilities(snr, 2)
    chi2, k = 0.0, 0
    for seed in range(5):  # sets of data, each with closures of its own
        data = vis + randn(*vis.shape, seed=seed) / snr[:, None]
        white = Closures(data, weight, first, second, time)(vis[None])
        chi2, k = chi2 + float(white.square().sum()), k + white.shape[1]
    assert k == 5 * 40 * (6 + 5)
    assert abs(chi2 / k - 1) < 4.5 * math.sqrt(2 / k) + 0.03


def test_log_amplitudes_have_no_bias():
    """E ln |V| - ln A = E_1(rho^2/2)/2; the debiased |V|^2 - sigma^2 of amplitudes is off by -1/(2 rho^2)."""
    scipy = pytest.importorskip("scipy.special")
    draws = 1_000_000
    noise = randn(draws, 2, seed=1)
    for rho in (2.0, 3.0, 6.0):
        size = (torch.tensor([rho, 0.0], dtype=F64) + noise).norm(dim=1)
        bias = float((size / rho).log().mean())
        error = float((size / rho).log().std()) / math.sqrt(draws)
        assert abs(bias - scipy.exp1(rho**2 / 2) / 2) < 4.5 * error
    debiased = 0.5 * (size.square() - 1).log() - math.log(6.0)
    assert float(debiased.mean()) == pytest.approx(-1 / 72, rel=0.15)  # 10% by the next order


def test_scans():
    seconds = torch.tensor([0.0, 10, 20, 500, 510, 1000], dtype=F64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    time = 57854 + seconds / 86400
    expected = torch.tensor([0, 0, 0, 1, 1, 2])
    assert torch.equal(scan_numbers(time[order], 60.0), expected[order])
    assert torch.equal(scan_numbers(time, 1.0), torch.arange(6))
    steady = 57854 + torch.cat([10.0 * torch.arange(60, dtype=F64), torch.tensor([1000.0])]) / 86400
    halves = scan_numbers(steady, 60.0, longest=300.0)
    assert halves.bincount().tolist() == [30, 30, 1]
    assert torch.equal(scan_numbers(steady, 60.0, longest=601.0), (steady > steady[59]).long())
    with pytest.raises(ValueError, match="positive"):
        scan_numbers(time, 0.0)
    with pytest.raises(ValueError, match="positive"):
        scan_numbers(time, 1.0, longest=0.0)
    with pytest.raises(ValueError, match="finite"):
        scan_numbers(time * math.nan, 1.0)


def test_refused():
    u, v, first, second, time = array(4, 2)
    m = len(u)
    vis, weight = visibilities(torch.full((m,), 20.0, dtype=F64), 0)
    bad = vis.clone()
    bad[0, 0] = math.nan
    closures = Closures(vis, weight, first, second, time)
    for make, message in (
        (lambda: Closures(torch.view_as_complex(vis), weight, first, second, time), "real parts"),
        (lambda: Closures(bad, weight, first, second, time), "NaN"),
        (lambda: Closures(vis, -weight, first, second, time), "negative"),
        (lambda: Closures(vis, weight, first[:-1], second, time), "broadcasts"),
        (lambda: Closures(vis, weight, first, second, time * 0), "twice"),
        (lambda: Closures(vis, weight, first, second, torch.arange(m)), "no three of them"),
        (lambda: Closures(vis, weight / 400, first, second, time), "no three of them"),
        (lambda: Closures(vis, weight, first, second, time, min_snr=-1.0), "min_snr"),
        (lambda: Closures(vis, weight, first, second, time, amplitude=0 * weight), "positive"),
        (lambda: closures(vis[None, :-1]), "got visibilities"),
        (lambda: closures.linearize(vis[None]).adjoint(vis[None]), "adjoint got"),
        (lambda: closures.likelihood(Visibilities(u[1:], v[1:], Grid(8, 0.2))), "got visibilities"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    bad_weight = weight.clone()
    bad_weight[0] = 0.0
    assert Closures(bad, bad_weight, first, second, time).used == m - 1
    many = array(21, 1)
    vis, weight = visibilities(torch.full((len(many[0]),), 20.0, dtype=F64), 0)
    with pytest.raises(ValueError, match="at most 20"):
        Closures(vis, weight, *many[2:])
