"""Image and gains in turns on Gaussian fields, whose images are drawn exactly, against truths, and against ignoring gains."""

import itertools
import math

import pytest
import torch

import diffpost as dp
from diffpost.linalg import ConvergenceWarning
from diffpost.physics import AntennaGains, Grid, OffsetAndScale, posterior_step, self_calibrate

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import Visibilities

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


class Field:
    """A Gaussian field on n x n pixels of 0.1 arcsec, five antennas at some times, and exact draws of its posterior."""

    def __init__(self, n, times, sigma):
        self.grid, self.sigma = Grid(n, 0.1), sigma
        pairs = torch.tensor(list(itertools.combinations(range(5), 2)))
        self.first, self.second = pairs.T.repeat(1, times)
        place = randn(5, times, 2, seed=3) * 1.5e5
        self.number = number = torch.arange(times).repeat_interleave(len(pairs))
        u, v = (place[self.first, number] - place[self.second, number]).clamp(-9e5, 9e5).T
        self.u, self.v, self.m = u, v, len(u)
        self.operator = Visibilities(u, v, self.grid)
        x, y = (c.reshape(-1) for c in self.grid.coordinates())
        mean = torch.exp(-(x**2 + y**2) / (2 * (0.02 * n) ** 2))
        self.mean = mean / mean.sum()  # 1 Jy
        apart = (x[:, None] - x) ** 2 + (y[:, None] - y) ** 2
        smooth = torch.exp(-apart / (2 * 0.2**2)) + 1e-6 * torch.eye(n * n, dtype=F64)
        self.cov = 0.5 * self.mean[:, None] * smooth * self.mean
        self.root = torch.linalg.cholesky(self.cov)
        self.matrix = self.operator(torch.eye(n * n, dtype=F64).reshape(-1, 1, n, n)).flatten(1).T
        self.weight = torch.full((self.m,), sigma**-2, dtype=F64)

    def skies(self, count, seed):
        return self.mean + randn(count, len(self.mean), seed=seed) @ self.root.T

    def seen(self, sky):
        return (sky @ self.matrix.T).reshape(len(sky), self.m, 2)

    def draw(self, likelihood, seed):
        """x0 + K A^T (A K A^T + Sigma)^-1 (y - A x0 - e): prior and noise drawn, then the update."""
        y = likelihood.y.flatten(1)
        weight = likelihood.noise.weight().expand(likelihood.y.shape).flatten(1)
        var = 1 / weight.clamp_min(1e-6)
        x = self.skies(len(y), seed % 2**62)
        noise = randn(*y.shape, seed=(seed + 1) % 2**62) * var.sqrt()
        back = self.cov @ self.matrix.T
        covariance = self.matrix @ back + torch.diag_embed(var)
        gain = torch.linalg.solve(covariance, (y - x @ self.matrix.T - noise)[..., None])[..., 0]
        return (x + gain @ back.T).reshape(-1, 1, *self.grid.shape)

    def given(self, vis):
        """The likelihood without nuisances."""
        noise = dp.GaussianNoise(weight=self.weight[:, None].expand(len(vis), -1, 1))
        return dp.Likelihood(vis, self.operator, noise, batched=True)


def within(values, expected, sigmas=4.5):
    """Whether the mean over skies is as expected, by their own scatter."""
    return abs(float(values.mean()) - expected) < sigmas * float(values.std()) / math.sqrt(len(values))  # fmt: skip


def test_gains_come_back():
    """16 skies of 16 x 16 pixels and five antennas with gains off by 10% and 20 degrees, the first one's amplitude known to 2%.

    Over truths of the prior, a draw of (image, gains) is distributed as the truth is: chi^2 of the data is their number, and what
    posterior means are off by is what draws claim. Ignoring gains fails both.
    """
    field = Field(16, times=4, sigma=0.1)
    amplitude = torch.tensor([0.02, 0.1, 0.1, 0.1, 0.1])
    gains = AntennaGains(
        field.first, field.second, amplitude_std=amplitude, phase_std=math.radians(20)
    )
    skies, more = 16, 3  # more chains of the first sky
    truth, theta = field.skies(skies, 5), gains.prior_draw(11, torch.arange(skies))
    clean = field.seen(truth)
    vis = gains.apply(theta, clean) + field.sigma * randn(*clean.shape, seed=8)
    rows = torch.cat([torch.zeros(more, dtype=torch.long), torch.arange(skies)])
    run = {"chains": len(rows), "sweeps": 80, "warmup": 20, "seed": 1, "progress": False}
    out = self_calibrate(vis[rows], field.weight, field.operator, gains, field.draw, **run)
    assert out.images.shape == (len(rows), 80, 1, 16, 16)
    assert out.theta[0].shape == (len(rows), 80, 1, 10)
    assert not out.unconverged.any() and float(out.acceptance.min()) > 0.6
    told = out.convergence(slice(0, more + 1))
    assert max(float(c.rhat.max()) for c in told.values()) < 1.2
    assert min(float(c.ess.min()) for c in told.values()) > 20

    data = 2 * field.m
    mine = slice(more, None)
    chi2 = out.chi2[mine].mean(1)
    assert within(chi2, data)
    images = out.images[mine].flatten(2)
    error = (truth - images.mean(1)).square().sum(1)
    claimed = images.var(1).sum(1)
    ratio = error / claimed
    assert within(ratio, 1.0)
    found = out.theta[0][mine, :, 0]
    pulls = (theta[:, 0] - found.mean(1)).square() / found.var(1)
    assert within(pulls.mean(1), 1.0)

    ignored = torch.stack([field.draw(field.given(vis), s) for s in range(40)], 1).flatten(2)
    left = (vis.flatten(1)[:, None] - ignored @ field.matrix.T).square().sum(2) / field.sigma**2
    off = (truth - ignored.mean(1)).square().sum(1)
    assert not within(left.mean(1), data) and float(left.mean()) > 2 * data
    assert not within(off / ignored.var(1).sum(1), 1.0)
    assert float(off.mean()) > 1.3 * float(error.mean())


def test_several_nuisances_and_seeds():
    """Offset and scale beside phases of each antenna at each time; the same seed gives the same chains, whatever runs beside them."""
    field = Field(8, times=3, sigma=0.05)
    parts = [
        AntennaGains(
            field.first, field.second, amplitude_std=0.0, phase_std=0.2, interval=field.number
        ),
        OffsetAndScale(field.u, field.v, offset_std=0.02, scale_std=0.05),
    ]
    skies = 24
    truth = field.skies(skies, 1)
    thetas = [p.prior_draw(k, torch.arange(skies)) for k, p in enumerate(parts)]
    vis = field.seen(truth)
    for part, theta in zip(parts, thetas, strict=True):
        vis = part.apply(theta, vis)
    vis = vis + field.sigma * randn(*vis.shape, seed=2)
    vis[:, 4], field.weight[4] = math.nan, 0.0
    run = {"sweeps": 32, "warmup": 10, "thin": 4, "progress": False}
    out = self_calibrate(vis, field.weight, field.operator, parts, field.draw, **run, chains=skies)
    assert out.images.shape[:2] == (skies, 8) and out.acceptance.shape == (skies, 2)
    assert within(out.chi2.mean(1), 2 * (field.m - 1))
    assert not out.theta[0][..., :5].any()  # a standard deviation of 0 fixes amplitudes

    def few(seed, exact=True, start=None):
        short = {"chains": 3, "sweeps": 2, "warmup": 0, "progress": False, "start": start}
        return self_calibrate(vis[:3], field.weight, field.operator, parts, field.draw, seed=seed, exact=exact, **short)  # fmt: skip

    one, same, other = few(0), few(0), few(1)
    torch.testing.assert_close(one.theta[1], same.theta[1], rtol=0, atol=0)
    assert (one.chi2 - other.chi2).abs().min() > 0
    begun = few(0, exact=False, start=[t[:3] for t in thetas])
    assert bool((begun.acceptance == 1).all())
    assert (begun.theta[1] - one.theta[1])[:, 0, 0, 0].abs().min() > 0


def test_images_of_a_posterior():
    """The library's sampler as the image step: mean and variance of exact draws, rows with data and weights of their own."""
    field = Field(8, times=2, sigma=0.05)
    n, scale = 64, float(field.mean.max())
    prior = dp.GaussianScore(
        (field.mean / scale).reshape(1, 8, 8), cov=field.cov / scale**2, sde=dp.EDM(2e-3, 80.0)
    ).with_affine(scale, 0.0)
    vis = field.seen(field.skies(1, 1)) + field.sigma * randn(1, field.m, 2, seed=2)
    gains = AntennaGains(field.first, field.second)
    corrected, weight = gains.corrected(vis, field.weight, 3 * gains.prior_draw(1, torch.arange(2)))
    rows = torch.arange(2).repeat_interleave(n)
    noise = dp.GaussianNoise(weight=weight[rows])
    likelihood = dp.Likelihood(corrected[rows], field.operator, noise, batched=True)
    step = posterior_step(prior, dp.MomentMatching(), dp.DPMSolver(16, eta=1.0))
    found = step(likelihood, 3).double().reshape(2, n, -1)
    exact = field.draw(likelihood, 5).reshape(2, n, -1)
    floor = exact.var(1).sum(1) * 2 / n  # of the difference of two means of n draws
    gap = (found.mean(1) - exact.mean(1)).square().sum(1)
    assert (gap < 3 * floor).all()
    assert (
        found.mean(1)[0] - exact.mean(1)[1]
    ).square().sum() > 6 * floor.sum()  # each its own row
    spread = found.var(1).sum(1) / exact.var(1).sum(1)
    assert ((spread - 1).abs() < 0.3).all()
    with pytest.raises(ValueError, match="batch axis"):
        step(dp.Likelihood(vis[0], field.operator, dp.GaussianNoise(std=1.0), batched=False), 0)


def test_refused():
    field = Field(8, times=2, sigma=0.05)
    gains = AntennaGains(field.first, field.second)
    other = OffsetAndScale(field.u[1:], field.v[1:], scale_std=0.1)
    vis = field.seen(field.skies(1, 1))[0]

    def run(parts=gains, step=field.draw, operator=field.operator, **more):
        keywords = {"chains": 2, "sweeps": 2, "warmup": 1, "progress": False} | more
        return self_calibrate(vis, field.weight, operator, parts, step, **keywords)

    def broken(likelihood, seed):
        x = field.draw(likelihood, seed)
        x[1] = math.nan
        return x

    for make, message in (
        (lambda: run(sweeps=0), "sweeps=0"),
        (lambda: run([]), "at least one"),
        (lambda: run([gains, other]), "same shape"),
        (lambda: run(operator=Visibilities(field.u[1:], field.v[1:], field.grid)), "makes data"),
        (lambda: run(start=[gains.prior_draw(0, torch.arange(3))]), "2 chains"),
        (lambda: run(step=lambda likelihood, seed: field.skies(3, 0)), "one for each chain"),
        (lambda: run(step=broken), r"chains \[1\] are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_fits_that_do_not_converge_are_told(monkeypatch):
    field = Field(8, times=2, sigma=0.05)
    gains = AntennaGains(field.first, field.second)
    fit = AntennaGains.fit
    monkeypatch.setattr(AntennaGains, "fit", lambda *a, **k: fit(*a, **k, max_iter=1))
    vis = field.seen(field.skies(1, 1))[0]
    run = {"chains": 2, "sweeps": 2, "warmup": 1, "progress": False}
    with pytest.warns(ConvergenceWarning, match="4 of 4 fits"):
        out = self_calibrate(vis, field.weight, field.operator, gains, field.draw, **run)
    assert torch.equal(out.unconverged, torch.full((2, 1), 2))
