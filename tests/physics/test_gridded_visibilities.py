"""Visibilities averaged in cells: against loops, dense linear algebra and closed forms, and what averaging costs."""

import math
import pickle
from dataclasses import replace

import pytest
import torch

import diffpost as dp
from diffpost.operators.algebra import Scaled
from diffpost.physics import Grid, SkyFrame

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import GriddedVisibilities, Visibilities

F64 = torch.float64
ARCSEC = math.pi / 180 / 3600
LIMIT = 0.5 / (0.1 * ARCSEC)  # the longest baseline that pixels of 0.1 arcsec resolve
GRIDS = {
    "even": Grid(8, 0.1),
    "off centre": Grid((7, 10), 0.1, centre=(0.3, -0.2)),
    "rotated": Grid((9, 6), 0.1, centre=(0.1, 0.05), sky=SkyFrame(10.0, 20.0, 33.0)),
    "mirrored": Grid(8, 0.1, sky=SkyFrame(10.0, 20.0, -70.0, mirrored=True)),
}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix(operator):
    """(data, pixels)."""
    shape = operator.input_shape
    n = shape[-1] * shape[-2]
    return operator(torch.eye(n, dtype=F64).reshape(n, *shape)).flatten(1).T


def frame(grid):
    return ((-1.0, 0.0), (0.0, 1.0)) if grid.sky is None else grid.sky.matrix


def cells_of(grid):
    """u and v of all cells whose frequencies a grid resolves, both ends included: (m,)."""
    rows, columns = (
        torch.arange(-(n // 2), n // 2 + 1, dtype=F64) / (n * grid.pixel * ARCSEC)
        for n in grid.shape
    )
    down, right = (k.reshape(-1) for k in torch.meshgrid(rows, columns, indexing="ij"))
    (ex, ey), (nx, ny) = frame(grid)
    return ex * right + ey * down, nx * right + ny * down


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_averages_by_a_loop(grid):
    """Each visibility, seen from the middle of the image, joins the nearest middle of a cell, or its conjugate the nearest to -(u, v)."""
    m = 60
    u, v = (rand(2, m, seed=1) * 2 - 1) * 0.62 * LIMIT
    weight = rand(m, seed=2)
    weight[:5] = 0.0
    vis = randn(2, m, 2, seed=3)
    vis[:, :5] = math.nan  # of weight 0
    operator = GriddedVisibilities(u, v, weight, grid)
    (ex, ey), (nx, ny) = frame(grid)
    x, y = grid.centre
    l0, m0 = (ex * x + ey * y) * ARCSEC, (nx * x + ny * y) * ARCSEC
    sums = torch.zeros(2, len(operator.u), dtype=torch.complex128)
    weights = torch.zeros(len(operator.u), dtype=F64)
    joined = []
    for k in range(5, m):
        near = torch.hypot(operator.u - u[k], operator.v - v[k])
        far = torch.hypot(operator.u + u[k], operator.v + v[k])
        turned = torch.view_as_complex(vis[:, k]) * torch.exp(
            2j * math.pi * (u[k] * l0 + v[k] * m0)
        )
        c = int(torch.minimum(near, far).argmin())
        sums[:, c] += weight[k] * (turned if near[c] <= far[c] else turned.conj())
        weights[c] += weight[k]
        joined.append(c)
        # no further than half a cell along rows and columns
        assert min(near[c], far[c]) < 0.71 / (min(grid.shape) * grid.pixel * ARCSEC)
    assert operator.count.tolist() == torch.bincount(torch.tensor(joined)).tolist()
    expected = torch.view_as_real(sums / weights)
    counts = operator.weight > 0
    torch.testing.assert_close(operator.weight, weights[:, None] * counts)
    torch.testing.assert_close(operator.average(vis), expected * counts)
    torch.testing.assert_close(operator.average(vis[1]), expected[1] * counts)
    assert operator.average(vis.float()).dtype == torch.float32


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_equal_to_the_exact_operator_at_the_middles_of_cells(grid):
    """All cells, the conjugate ones and the ends of an even grid too: as many data as pixels, nothing counted twice."""
    u, v = cells_of(grid)
    operator = GriddedVisibilities(u, v, 1 + rand(len(u)), grid)
    x = randn(2, 1, *grid.shape, seed=3)
    counts = operator.weight > 0
    assert int(counts.sum()) == grid.shape[0] * grid.shape[1]
    torch.testing.assert_close(operator.average(operator.exact(x)), operator(x), rtol=0, atol=1e-8)
    there = Visibilities(operator.u, operator.v, replace(grid, centre=(0.0, 0.0)), accuracy=1e-13)
    torch.testing.assert_close(operator(x), there(x) * counts, rtol=0, atol=1e-10)
    assert operator.gridding_error(x).rms.max() < 1e-7
    assert operator.dot_test(operator.input_shape) < 1e-14
    assert operator(x.float()).dtype == torch.float32
    torch.testing.assert_close(operator(x.float()).double(), operator(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pickle.loads(pickle.dumps(operator))(x), operator(x))
    gram = matrix(operator) @ matrix(operator).T
    torch.testing.assert_close(
        gram, operator.gram_diagonal(operator.input_shape).reshape(-1).diag()
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_a_point_source(grid):
    """S exp(-2 pi i (u l + v m)), (l, m) from the middle of the image; another pixel is not the same."""
    u, v = cells_of(grid)
    operator = GriddedVisibilities(u, v, torch.ones(len(u)), grid)
    columns, rows = grid.coordinates()
    (ex, ey), (nx, ny) = frame(grid)
    x, y = columns[2, 3], rows[2, 3]
    l, m = (ex * x + ey * y) * ARCSEC, (nx * x + ny * y) * ARCSEC  # noqa: E741
    vis = torch.view_as_real(0.7 * torch.exp(-2j * math.pi * (u * l + v * m)))
    x, y = x - grid.centre[0], y - grid.centre[1]
    l, m = (ex * x + ey * y) * ARCSEC, (nx * x + ny * y) * ARCSEC  # noqa: E741
    expected = 0.7 * torch.exp(-2j * math.pi * (operator.u * l + operator.v * m))
    expected = torch.view_as_real(expected) * (operator.weight > 0)
    image = torch.zeros(1, 1, *grid.shape, dtype=F64)
    image[0, 0, 2, 3] = 0.7
    torch.testing.assert_close(operator.average(vis), expected)
    torch.testing.assert_close(operator(image)[0], expected)
    assert (operator(image.roll(1, -1))[0] - expected).norm() > 0.1 * expected.norm()


def test_gridding_error_of_a_point_source():
    """One visibility a cell, off its middle by d: 2 S |sin(pi d l)| of its noise, and the more the further."""
    grid = Grid(16, 0.1)
    width = 1 / (16 * 0.1 * ARCSEC)
    k = torch.arange(1.0, 7.0, dtype=F64) * width
    image = torch.zeros(1, 1, 16, 16, dtype=F64)
    image[0, 0, 8, 12] = 0.05
    l = -grid.axes()[0][12] * ARCSEC  # noqa: E741
    weight = 100 + 50 * rand(6)
    found = []
    for off in (0.0, 0.1, 0.2, 0.4):
        operator = GriddedVisibilities(k + off * width, 0 * k + 2 * width, weight, grid)
        error = operator.gridding_error(image)
        expected = 2 * 0.05 * (math.pi * off * width * l).sin().abs() * weight.sqrt()
        # either part of a datum counts: the modulus over both of them
        torch.testing.assert_close(error.cells[0], expected / math.sqrt(2), rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(error.chi2[0], expected.square().sum(), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(error.rms[0], (error.chi2[0] / 12).sqrt())
        found.append(float(error.rms))
    assert found[0] < 1e-7
    assert 1.9 < found[2] / found[1] < 2.1  # in proportion, nearly
    assert found[3] > 1.8 * found[2]


def observed(noise=1.0, m=3000, n=32, seed=0):
    """Baselines mostly short, and weights that differ."""
    u, v = (randn(2, m, seed=seed) * 0.4 * LIMIT).clamp(-LIMIT, LIMIT)
    return GriddedVisibilities(u, v, (0.5 + rand(m, seed=seed + 1)) / noise**2, Grid(n, 0.1))


def field(n):
    line = torch.fft.fftfreq(n, dtype=F64) * n
    k = torch.hypot(line[:, None], line[None, :]).clamp_min(1)
    power = k**-3
    return power / power.mean()


@pytest.mark.parametrize("factor", [1.0, 2e-3])
def test_solves_against_dense(factor):
    """With Sigma + s A A^T directly, with Sigma + A P A^T in one iteration; also for images in other units."""
    gridded = observed(noise=factor)
    operator = gridded if factor == 1 else Scaled(factor, gridded)
    noise = gridded.noise()
    like = dp.Likelihood(torch.zeros(gridded.data_shape, dtype=F64), operator, noise)
    rows = matrix(operator)
    weight = gridded.weight.reshape(-1)
    live = weight > 0
    r = randn(2, *gridded.data_shape, seed=5) * factor
    power = field(32)
    eye = torch.eye(1024, dtype=F64).reshape(-1, 32, 32)
    cov = torch.fft.ifft2(torch.fft.fft2(eye) * power).real.reshape(1024, 1024)
    for report, middle in (
        (like.solve_operator(operator, r, 0.3), 0.3 * rows @ rows.T),
        (like.solve_spectral(operator, r, power, tol=1e-10), rows @ cov @ rows.T),
    ):
        dense = (middle + torch.diag(1 / weight))[live][:, live]
        expected = torch.linalg.solve(dense, r.flatten(1)[:, live].T).T
        got = report.x.flatten(1)
        assert (got[:, live] - expected).norm() < 1e-8 * expected.norm()
        assert not got[:, ~live].any()
        assert report.iterations <= 1
    assert (~live).sum() >= 1


def test_a_primary_beam():
    """It multiplies the image; A A^T is then full, and solves iterate to the same answer as dense linear algebra."""
    bare = observed(m=200, n=12)
    beam = torch.exp(-((torch.arange(12, dtype=F64) - 5.5) ** 2) / 40)
    beam = beam[:, None] * beam
    operator = GriddedVisibilities(
        bare.exact.u, bare.exact.v, 1 + rand(200), bare.grid, primary_beam=beam
    )
    x = randn(2, 1, 12, 12)
    torch.testing.assert_close(operator(x), bare(x * beam))
    assert operator.dot_test((1, 12, 12)) < 1e-14
    assert operator.gram_diagonal((1, 12, 12)) is None
    rows = matrix(operator)
    live = operator.weight.reshape(-1) > 0
    dense = 0.3 * rows @ rows.T + torch.diag(1 / operator.weight.reshape(-1))
    r = randn(2, *operator.data_shape)
    like = dp.Likelihood(torch.zeros(operator.data_shape, dtype=F64), operator, operator.noise())
    got = like.solve(r, 0.3, tol=1e-10).flatten(1)[:, live]
    expected = torch.linalg.solve(dense[live][:, live], r.flatten(1)[:, live].T).T
    assert (got - expected).norm() < 1e-8 * expected.norm()


def repeated(seed=0, least=3, most=40):
    """Baselines at the middles of cells, each cell's several times and partly with the opposite sign: no gridding error."""
    grid = Grid(16, 0.1)
    u, v = cells_of(grid)
    generator = torch.Generator().manual_seed(seed)
    times = torch.randint(least, most, u.shape, generator=generator)
    u, v = u.repeat_interleave(times), v.repeat_interleave(times)
    sign = torch.randint(2, u.shape, generator=generator) * 2.0 - 1.0
    return GriddedVisibilities(u * sign, v * sign, 0.5 + rand(len(u), seed=seed + 1), grid)


def simulated(operator, factor, rows, seed=3):
    """A sky, and visibilities whose noise variance is `factor` (m,) over what the weights say."""
    x = randn(1, 1, *operator.grid.shape, seed=seed)
    weight = operator._weights
    noise = randn(rows, len(weight), 2, seed=seed + 1) * (factor / weight)[:, None].sqrt()
    return x, operator.exact(x) + noise


def off(chi2, count):
    """By how many Monte Carlo errors the mean of chi^2 is off its expectation."""
    return float((chi2.mean() - count) / (chi2.std() / math.sqrt(len(chi2))))


def test_noise_by_the_weights():
    """A weight is that of each part: chi^2 of the truth is the number of parts that count, within 4.5 errors of 200 simulations."""
    operator = repeated()
    x, vis = simulated(operator, torch.ones(len(operator.exact.u), dtype=F64), 200)
    like = operator.likelihood(vis)
    assert like.ndata == 256
    chi2 = like.chi2(x.expand(200, -1, -1, -1))
    assert abs(off(chi2, 256)) < 4.5
    half = operator.likelihood(vis, dp.GaussianNoise(weight=operator.weight / 2))
    assert abs(off(half.chi2(x.expand(200, -1, -1, -1)), 256)) > 20
    single = operator.likelihood(vis[7])
    torch.testing.assert_close(single.chi2(x), chi2[7:8])


def test_noise_by_the_scatter():
    """Weights that are wrong by factors from 1 to 5 over the cells: the scatter finds each, the weights' own noise is rejected."""
    operator = repeated(least=8, most=12)
    cell = operator._cell
    factor = 1 + 4 * rand(len(operator.u), seed=9)
    x, vis = simulated(operator, factor[cell], 200)
    found = operator.scatter(vis)
    assert bool(found.own.all())
    # each cell's factor is unbiased, and its error is that of chi^2 with nu degrees of freedom
    freedom = (operator.count - 1) * (operator.weight > 0).sum(-1)
    z = (found.factor.mean(0) / factor - 1) / (2 / (200 * freedom)).sqrt()
    assert z.abs().max() < 4.5
    assert 0.8 < float(z.square().mean()) < 1.2
    images = x.expand(200, -1, -1, -1)
    by_scatter = operator.likelihood(vis, found.noise).chi2(images)
    assert abs(off(by_scatter, 256)) < 4.5
    assert off(operator.likelihood(vis).chi2(images), 256) > 20
    # without nu/(nu - 2) chi^2 would be too large by 2/nu
    plain = dp.GaussianNoise(weight=operator.weight / found.factor[..., None])
    assert off(operator.likelihood(vis, plain).chi2(images), 256) > 4.5


def test_few_visibilities_take_the_common_factor():
    operator = repeated(least=1, most=12)
    few = operator.count < 12
    x, vis = simulated(operator, torch.full((len(operator.exact.u),), 2.5, dtype=F64), 200)
    found = operator.scatter(vis, least=12)
    torch.testing.assert_close(found.own, ~few)
    assert 20 < int(few.sum()) < len(few) - 20
    expected = found.common[:, None].expand(-1, int(few.sum()))
    torch.testing.assert_close(found.factor[:, few], expected)
    assert abs(off(found.common, 2.5)) < 4.5
    chi2 = operator.likelihood(vis, found.noise).chi2(x.expand(200, -1, -1, -1))
    assert abs(off(chi2, 256)) < 4.5
    single = operator.scatter(vis[3], least=12)
    torch.testing.assert_close(single.factor, found.factor[3])
    torch.testing.assert_close(single.noise.weight(), found.noise.weight()[3])


def dense_posterior(power, like):
    """Covariance and mean by dense linear algebra."""
    n = power.shape[-1]
    rows, weight = matrix(like.operator), like.operator.weight.reshape(-1)
    eye = torch.eye(n * n, dtype=F64).reshape(-1, n, n)
    inverse = torch.fft.ifft2(torch.fft.fft2(eye) / power).real.reshape(n * n, n * n)
    cov = torch.linalg.inv(inverse + rows.T @ (weight[:, None] * rows))
    return cov @ (rows.T @ (weight * like.y.reshape(-1))), cov


def test_the_posterior_of_a_gaussian_field():
    """At 32 x 32, where cells say much and nothing: mean and variances by the posterior's denoiser are those of dense linear
    algebra to 1e-6, and 128 draws meet them within Monte Carlo error; draws for other noise do not.
    """
    power = field(32)
    prior = dp.GaussianScore(torch.zeros(1, 32, 32, dtype=F64), power=power, sde=dp.EDM(1e-3, 1e3))
    operator = observed(noise=60.0)
    truth = prior.sample(1, seed=7)
    vis = operator.exact(truth) + randn(1, 3000, 2, seed=8) / operator._weights[:, None].sqrt()
    like = operator.likelihood(vis[0])
    mean, cov = dense_posterior(power, like)
    modes = torch.fft.fft2(cov.reshape(-1, 32, 32)).reshape(-1, 1024).T.reshape(-1, 32, 32)
    share = torch.fft.ifft2(modes).reshape(1024, 1024).diagonal().real / power.reshape(-1)
    assert float(share.min()) < 0.1  # of the prior's variance is left
    assert float(share.max()) > 0.99
    guidance = dp.MomentMatching(tol=1e-10)
    posterior = dp.Posterior(prior, like, guidance)
    top = torch.tensor(1e3, dtype=F64)
    # at noise s the posterior is that of one more datum, x of variance s^2, whose weight is 1e-6 here
    eye = torch.eye(1024, dtype=F64).reshape(-1, 1, 32, 32)
    with torch.no_grad():
        at_zero = posterior.denoise(torch.zeros(1, 1, 32, 32, dtype=F64), top)
        moved = posterior.denoise(1e6 * eye, top) - at_zero
    assert (at_zero.reshape(-1) - mean).norm() < 1e-5 * mean.norm()
    assert (moved.flatten(1) - cov).norm() < 1e-5 * cov.norm()

    def off_by(likelihood):
        """The mean's error over its Monte Carlo floor, and the ratio of the variances."""
        made = dp.Posterior(prior, likelihood, dp.MomentMatching())
        x = dp.sample(made, 128, dp.DPMSolver(32), seed=3, progress=False).x.flatten(1).double()
        floor = math.sqrt(float(cov.trace()) / 128)
        return float((x.mean(0) - mean).norm()) / floor, float(x.var(0).sum() / cov.trace())

    error, ratio = off_by(like)
    # the ratio scatters by (2/127 tr C^2)^1/2/tr C
    chance = math.sqrt(2 / 127 * float(cov.square().sum())) / float(cov.trace())
    assert error < 1.3
    assert abs(ratio - 1) < 0.02 + 4 * chance
    error, ratio = off_by(operator.likelihood(vis[0], dp.GaussianNoise(weight=operator.weight / 9)))
    assert error > 1.3
    assert abs(ratio - 1) > 0.02 + 4 * chance


def test_refused():
    operator = observed(m=50, n=8)
    u, v, grid = operator.exact.u, operator.exact.v, operator.grid
    one = torch.ones(50)
    vis = randn(50, 2)
    bad = vis.clone()
    bad[3] = math.nan
    same = GriddedVisibilities(u[:1].expand(10), v[:1].expand(10), one[:10], grid)
    alone = GriddedVisibilities(u[:1], v[:1], one[:1], grid)
    for make, message in (
        (lambda: GriddedVisibilities(u, v, one[:9], grid), "got weights of shape"),
        (lambda: GriddedVisibilities(u, v, -one, grid), "not negative"),
        (lambda: GriddedVisibilities(u, v, 0 * one, grid), "all 50 weights are 0"),
        (lambda: GriddedVisibilities(u, v, one, Grid(8, 1.0)), "the cell is at most"),
        (lambda: GriddedVisibilities(u, v, one, grid, torch.ones(4, 4)), "primary beam"),
        (lambda: operator(torch.zeros(1, 1, 4, 4)), "got images"),
        (lambda: operator.adjoint(torch.zeros(1, 50, 2)), "adjoint got"),
        (lambda: operator.average(vis[:9]), "got visibilities of shape"),
        (lambda: operator.average(bad), "1 visibilities are NaN"),
        (lambda: operator.scatter(vis, least=3), "at least 4"),
        (lambda: same.scatter(vis[:1].expand(10, 2)), "do not differ at all"),
        (lambda: alone.scatter(vis[:1]), "0 degrees of freedom"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
