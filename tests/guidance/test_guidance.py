"""Guidances against the exact posterior denoiser of a Gaussian prior, and against autograd."""

import math

import pytest
import torch

from diffpost.guidance import (
    DPS,
    Convolved,
    IsotropicCovariance,
    LocalCovariance,
    MomentMatching,
    PiGDM,
    SpectralCovariance,
)
from diffpost.instrument import Counter, counted
from diffpost.likelihood import Likelihood
from diffpost.linalg import ConvergenceWarning, gmres
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Mask, Matrix, Operator
from diffpost.posterior import Posterior
from diffpost.score import GaussianMixtureScore, GaussianScore
from diffpost.sde import EDM, VP

D, M = 6, 4
F64 = torch.float64


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense_problem(prior_cov=None, sde=None, rows=None):
    mean = rand(D, seed=1)
    if prior_cov is None:
        root = rand(D, D, seed=2)
        prior_cov = root @ root.T + 0.2 * torch.eye(D, dtype=F64)
    matrix = rand(M, D, seed=3)
    root = rand(M, M, seed=4)
    noise_cov = 0.1 * (root @ root.T) + 0.05 * torch.eye(M, dtype=F64)
    y = rand(M, seed=5) if rows is None else rand(rows, M, seed=5)
    prior = GaussianScore(mean, cov=prior_cov, sde=sde or EDM())
    return (
        prior,
        Likelihood(y, Matrix(matrix), GaussianNoise(cov=noise_cov)),
        prior_cov,
        matrix,
        noise_cov,
    )


def exact_denoise(prior, prior_cov, matrix, noise_cov, y, x, t):
    """E[x_0 | x_t = x, y], by conditioning the Gaussian x_0 on both."""
    nu2 = prior.sde.nsr(t) ** 2
    u = x / prior.sde.alpha(t)
    precision = (
        prior_cov.inverse()
        + matrix.T @ noise_cov.inverse() @ matrix
        + torch.eye(D, dtype=F64) / nu2
    )
    right = prior_cov.inverse() @ prior.mean + u / nu2 + y @ noise_cov.inverse() @ matrix
    return torch.linalg.solve(precision, right.T).T


TIMES = [0.02, 0.3, 0.9]


def time(sde, fraction):
    """A time between the ends of the process, in log nsr."""
    low, high = (
        math.log(float(sde.nsr(torch.tensor(v, dtype=F64)))) for v in (sde.t_min, sde.t_max)
    )
    return sde.t_of_nsr(torch.tensor(math.exp(low + fraction * (high - low)), dtype=F64))


@pytest.mark.parametrize("fraction", TIMES)
@pytest.mark.parametrize("sde", [EDM(), VP()], ids=["EDM", "VP"])
@pytest.mark.parametrize("rows", [None, 3])
def test_moment_matching_is_exact_on_a_gaussian(fraction, sde, rows):
    prior, like, cov, matrix, noise = dense_problem(sde=sde, rows=rows)
    t = time(sde, fraction)
    x = sde.alpha(t) * rand(3, D, seed=8) + sde.sigma(t) * rand(3, D, seed=9)
    got = Posterior(prior, like, MomentMatching(tol=1e-10)).denoise(x, t)
    want = exact_denoise(prior, cov, matrix, noise, like.y, x, t)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fraction", TIMES)
def test_exact_on_a_white_prior(fraction):
    """PiGDM and the isotropic covariance are exact when the prior is white, with its variance and
    no other.
    """
    prior, like, cov, matrix, noise = dense_problem(prior_cov=0.7 * torch.eye(D, dtype=F64))
    t = time(prior.sde, fraction)
    x = prior.sde.alpha(t) * rand(3, D, seed=8) + prior.sde.sigma(t) * rand(3, D, seed=9)
    want = exact_denoise(prior, cov, matrix, noise, like.y, x, t)
    exact = [
        PiGDM(variance=0.7, tol=1e-10),
        MomentMatching(covariance=IsotropicCovariance(0.7), tol=1e-10),
        MomentMatching(covariance=IsotropicCovariance(0.7), tol=1e-10, differentiate=False),
    ]
    for guidance in exact:
        got = Posterior(prior, like, guidance).denoise(x, t)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    if fraction > 0.5:
        wrong = Posterior(prior, like, PiGDM(variance=0.2, tol=1e-10)).denoise(x, t)
        assert (wrong - want).abs().max() > 1e-2


@pytest.mark.parametrize("fraction", TIMES)
def test_convolved_is_exact_on_a_flat_prior_only(fraction):
    for variance, exact in ((1e9, True), (1.0, False)):
        prior, like, cov, matrix, noise = dense_problem(
            prior_cov=variance * torch.eye(D, dtype=F64)
        )
        t = time(prior.sde, fraction)
        x = prior.sde.alpha(t) * rand(3, D, seed=8) + prior.sde.sigma(t) * rand(3, D, seed=9)
        want = exact_denoise(prior, cov, matrix, noise, like.y, x, t)
        got = Posterior(prior, like, Convolved(tol=1e-10)).denoise(x, t)
        close = torch.allclose(got, want, rtol=1e-4, atol=1e-4)
        assert close == exact or fraction < 0.5


def field(size=16, rows=None, noise=None):
    k = torch.hypot(
        torch.fft.fftfreq(size, dtype=F64)[:, None], torch.fft.fftfreq(size, dtype=F64)[None, :]
    )
    power = (k * size).clamp_min(1) ** -3.0
    power = power / power.mean()
    prior = GaussianScore(torch.zeros(1, size, size, dtype=F64), power=power, sde=EDM())
    axis = torch.arange(-4, 5).double()
    psf = torch.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / 4)
    shape = (1, size, size) if rows is None else (rows, 1, size, size)
    like = Likelihood(
        rand(*shape, seed=1),
        Convolve(psf / psf.sum(), boundary="periodic"),
        noise or GaussianNoise(std=0.1),
    )
    return prior, like, power, k


class Plain(GaussianScore):
    """The same prior without the knowledge of its Jacobian's spectrum."""

    def jacobian_spectrum(self, x, t):
        return None


@pytest.mark.parametrize("fraction", TIMES)
def test_fast_path_is_the_solve(fraction):
    """On a stationary field the Fourier solve and conjugate gradients on VJPs agree."""
    prior, like, power, _ = field()
    t = time(prior.sde, fraction)
    x = prior.sde.sigma(t) * rand(2, 1, 16, 16, seed=4) + rand(2, 1, 16, 16, seed=5)
    fast = Posterior(prior, like, MomentMatching()).denoise(x, t)
    plain = Plain(prior.mean, power=power, sde=prior.sde)
    slow = Posterior(plain, like, MomentMatching(tol=1e-9, max_iter=400)).denoise(x, t)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fraction", TIMES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("differentiate", [True, False])
def test_spectral_covariance(fraction, masked, differentiate):
    """A table of the exact spectra gives what the exact covariance gives, also with masked
    pixels.
    """
    weight = torch.full((16, 16), 100.0, dtype=F64)
    weight[3:6, 4:9] = 0
    prior, like, power, k = field(noise=GaussianNoise(weight=weight) if masked else None)
    table = exact_table(power, k)
    t = time(prior.sde, fraction)
    x = prior.sde.sigma(t) * rand(2, 1, 16, 16, seed=4) + rand(2, 1, 16, 16, seed=5)
    want = Posterior(prior, like, MomentMatching(tol=1e-9, max_iter=400)).denoise(x, t)
    guidance = MomentMatching(tol=1e-9, max_iter=400, covariance=table, differentiate=differentiate)
    got = Posterior(prior, like, guidance).denoise(x, t)
    assert (got - want).abs().max() < 0.01 * want.abs().max()


def exact_table(power, k):
    """The posterior covariance of a stationary Gaussian field as a table over levels and k."""
    levels = torch.logspace(-3, 2, 60, dtype=F64)
    radii, inverse = k.reshape(-1).round(decimals=9).unique(return_inverse=True)
    by_k = torch.zeros(len(radii), dtype=F64).scatter(0, inverse, power.reshape(-1))
    s = levels[:, None] ** 2
    return SpectralCovariance(levels, radii, s * by_k / (s + by_k))


def test_preconditioner_saves_vjps():
    """A model of the covariance changes the number of VJPs and not the answer."""
    prior, like, power, k = field()
    plain = Plain(prior.mean, power=power, sde=prior.sde)
    x, t = 3 * rand(2, 1, 16, 16, seed=4), torch.tensor(3.0, dtype=F64)
    answers, products = [], []
    for model in (None, exact_table(power, k)):
        counter = Counter()
        guidance = MomentMatching(tol=1e-9, max_iter=400, precondition=model)
        posterior = counted(Posterior(plain, like, guidance), counter)
        answers.append(posterior.denoise(x, t))
        products.append(counter.vjps)
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-6, atol=1e-6)
    assert products[1] < products[0] / 2


def test_spectral_covariance_interpolates():
    """Exact at the nodes, for another image size, falling as nsr^2 below the table and constant
    above.
    """
    levels = torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    k = torch.tensor([0.0, 0.25, 0.5], dtype=F64)
    variance = torch.tensor([[0.01, 0.005, 0.002], [1.0, 0.1, 0.01], [50.0, 0.2, 0.02]], dtype=F64)
    cov = SpectralCovariance(levels, k, variance)
    prior = GaussianScore(torch.zeros(1, 8, 12, dtype=F64), var=1.0, sde=EDM())
    like = torch.zeros(2, 1, 8, 12, dtype=F64)
    at = lambda t: cov.spectrum(like, prior, torch.tensor(t, dtype=F64))  # noqa: E731
    middle = at(1.0)
    assert middle.shape == (1, 1, 8, 12)
    torch.testing.assert_close(middle[0, 0, 0, 0], variance[1, 0])
    torch.testing.assert_close(middle[0, 0, 2, 0], variance[1, 1])
    torch.testing.assert_close(middle[0, 0, 4, 6], variance[1, 2])  # the corner is beyond the table
    torch.testing.assert_close(at(0.01), 0.01 * at(0.1))
    torch.testing.assert_close(at(40.0), at(10.0))
    both = cov.spectrum(like, prior, torch.tensor([1.0, 10.0], dtype=F64))
    torch.testing.assert_close(both[1:], at(10.0))
    v = rand(2, 1, 8, 12)
    here = cov.at(like[:1], prior, torch.tensor(1.0))
    symmetric = (here.apply(v[:1]) * v[1:]).sum()
    torch.testing.assert_close(symmetric, (here.apply(v[1:]) * v[:1]).sum())
    with pytest.raises(ValueError, match="expected"):
        SpectralCovariance(levels, k, variance.T[:2])
    with pytest.raises(ValueError, match="increase"):
        SpectralCovariance(levels.flip(0), k, variance)


def local_table(amplitude, brightness=(0.1, 1.0, 10.0), spectrum=(1.0, 1.0), smoothing=1.0):
    levels = torch.tensor([0.1, 1.0], dtype=F64)
    k = torch.tensor([0.0, 0.5], dtype=F64)
    correlations = SpectralCovariance(levels, k, torch.tensor([spectrum, spectrum], dtype=F64))
    table = torch.tensor(amplitude, dtype=F64)
    return LocalCovariance(correlations, levels, torch.tensor(brightness), table, smoothing)


def test_local_covariance_interpolates():
    """Exact at the nodes, log-linear between them, proportional to nsr below the table."""
    cov = local_table([[0.01, 0.02, 0.08], [0.1, 0.4, 0.8]])
    prior = GaussianScore(torch.zeros(1, 8, 8, dtype=F64), var=1.0, sde=EDM())
    flat = lambda value: torch.full((1, 1, 8, 8), value, dtype=F64)  # noqa: E731
    at = lambda value, t: float(cov.gain(flat(value), prior, torch.tensor(t))[0, 0, 3, 3])  # noqa: E731
    assert at(1.0, 1.0) == pytest.approx(0.4)
    assert at(-1.0, 1.0) == pytest.approx(0.4)  # brightness is of the absolute value
    assert at(10**0.5, 1.0) == pytest.approx((0.4 * 0.8) ** 0.5)
    assert at(1.0, 10**-0.5) == pytest.approx((0.4 * 0.02) ** 0.5, rel=1e-6)
    assert at(1.0, 0.01) == pytest.approx(0.1 * 0.02)
    assert at(1.0, 30.0) == pytest.approx(0.4)
    assert at(100.0, 1.0) == pytest.approx(0.8) and at(0.0, 1.0) == pytest.approx(0.1)
    # Entries of a batch have their own gain, and may have their own time.
    both = torch.cat([flat(1.0), flat(10.0)])
    gain = cov.gain(both, prior, torch.tensor([1.0, 0.1], dtype=F64))
    torch.testing.assert_close(gain[:, 0, 0, 0], torch.tensor([0.4, 0.08], dtype=F64))
    with pytest.raises(ValueError, match="expected"):
        local_table([[0.1, 0.2], [0.1, 0.2]])
    with pytest.raises(ValueError, match="positive"):
        local_table([[0.1, 0.2, 0.0], [0.1, 0.2, 0.3]])
    with pytest.raises(ValueError, match="increase"):
        local_table([[0.1, 0.2, 0.3]] * 2, brightness=(1.0, 1.0, 2.0))


def test_constant_local_covariance_is_spectral():
    """Without a dependence on brightness it is the stationary covariance with the same spectrum."""
    prior, like, power, k = field()
    t = torch.tensor(1.0, dtype=F64)
    x = rand(2, 1, 16, 16, seed=4)
    spectral = exact_table(power, k)
    mean = spectral.spectrum(x, prior, t).mean()
    local = LocalCovariance(
        spectral,
        torch.tensor([0.5, 1.0, 2.0]),
        torch.tensor([0.1, 1.0]),
        mean.sqrt().expand(3, 2),
        1.0,
    )
    answers = [
        Posterior(
            prior, like, MomentMatching(tol=1e-10, max_iter=400, covariance=c, differentiate=False)
        ).denoise(x, t)
        for c in (spectral, local)
    ]
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_local_covariance_solves(masked):
    """(Sigma + A G S G A^T)^-1 against a dense matrix."""
    n = 24
    y, x = torch.meshgrid(*[torch.arange(n, dtype=F64) - n / 2] * 2, indexing="ij")
    source = 10 * torch.exp(-(y**2 + x**2) / 30)[None, None]
    cov = local_table([[1e-3, 0.03, 0.5], [1e-3, 0.03, 0.5]], spectrum=(8.0, 0.5))
    prior = GaussianScore(torch.zeros(1, n, n, dtype=F64), var=1.0, sde=EDM())
    here = cov.at(source, prior, torch.tensor(1.0))
    psf = torch.exp(-(y**2 + x**2) / 4)[n // 2 - 4 : n // 2 + 5, n // 2 - 4 : n // 2 + 5]
    operator = Convolve(psf / psf.sum()).bind((1, n, n))
    std = 0.01 * (1 + torch.exp(-(x**2) / 50))[None]
    if masked:
        std[:, 4:9, 12:20] = torch.inf
    like = Likelihood(torch.zeros(1, n, n, dtype=F64), operator, GaussianNoise(std=std))
    eye = torch.eye(n * n, dtype=F64).reshape(-1, 1, n, n)
    matrix = operator.adjoint(eye)
    blocks = [
        operator(cov.at(source.expand(len(part), -1, -1, -1), prior, torch.tensor(1.0)).apply(part))
        for part in matrix.split(64)
    ]
    kept = std.flatten().isfinite()
    dense = torch.cat(blocks).flatten(1)[kept][:, kept] + std.flatten()[kept].square().diag()
    r = rand(1, 1, n, n, seed=3)
    want = torch.linalg.solve(dense, r.flatten()[kept])
    report = here.solve(like, operator, r, 1e-11, 2000)
    got = report.x.flatten()
    torch.testing.assert_close(got[kept], want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))
    assert not got[~kept].any()


def test_accuracy_stops_where_the_update_is_known_well_enough():
    """The error of D_y is below the asked share of the standard deviation, for fewer products."""
    n = 24
    y, x = torch.meshgrid(*[torch.arange(n, dtype=F64) - n / 2] * 2, indexing="ij")
    bright = 3 * torch.exp(-torch.hypot(y, x) / 3)[None, None]
    cov = local_table([[0.002, 0.02, 0.2]] * 2, spectrum=(4.0, 0.5))
    prior = GaussianScore(bright[0], var=1e-12, sde=EDM())
    psf = torch.exp(-(y**2 + x**2) / 8)[n // 2 - 6 : n // 2 + 7, n // 2 - 6 : n // 2 + 7]
    operator = Convolve(psf / psf.sum())
    data = operator(bright * (1 + 0.1 * rand(1, 1, n, n)))[0]
    like = Likelihood(data, operator, GaussianNoise(std=0.002)).bind((1, n, n))
    t = torch.tensor(1.0, dtype=F64)
    here = cov.at(bright, prior, t)

    def solved(**settings):
        guidance = MomentMatching(max_iter=5000, covariance=cov, differentiate=False, **settings)
        linear = like.operator.linearize(bright)
        report = here.solve(
            like, linear, like.residual(bright), guidance.tol, 5000, guidance.solver
        )
        return Posterior(prior, like, guidance).denoise(bright, t), report.iterations

    exact, most = solved(tol=1e-10)
    for accuracy in (0.3, 0.1, 0.03):
        rough, products = solved(tol=1e-10, accuracy=accuracy)
        error = ((rough - exact) / here.gain).square().mean().sqrt()
        assert error < accuracy, accuracy
        assert products < most / 2
    with pytest.raises(ValueError, match="0 < accuracy < 1"):
        MomentMatching(accuracy=1.5)
    with pytest.raises(ValueError, match="energy norm"):
        MomentMatching(accuracy=0.1, solver=gmres)


def trace_of(like, here, n):
    """tr (Sigma + A C A^T)^-1 A C A^T by dense matrices, over the data that are not masked."""
    operator = like.operator.bind((1, n, n))
    images = operator.adjoint(torch.eye(n * n, dtype=F64).reshape(-1, 1, n, n))
    signal = operator(here(images)).flatten(1)
    weight = like.noise.weight().expand(1, n, n).flatten()
    kept = weight > 0
    signal = signal[kept][:, kept]
    return float(torch.linalg.solve(signal + (1 / weight[kept]).diag(), signal).trace())


def test_effective_data_is_the_trace():
    """Exact where all is stationary; within a tenth for a gain that varies over several pixels."""
    prior, like, power, k = field()
    n, t = 16, torch.tensor(0.7, dtype=F64)
    x = rand(1, 1, n, n)
    flat = exact_table(power, k).at(x, prior, t)
    linear, r = like.operator.bind((1, n, n)), torch.zeros(1, 1, n, n, dtype=F64)
    got = float(flat.effective_data(like, linear, r))
    assert got == pytest.approx(trace_of(like, flat.apply, n), rel=1e-3)

    y, x = torch.meshgrid(*[torch.arange(n, dtype=F64) - n / 2] * 2, indexing="ij")
    bright = 3 * torch.exp(-(y**2 + x**2) / 40)[None, None]
    std = torch.full((1, n, n), 0.02, dtype=F64)
    std[:, :4] = torch.inf
    masked = Likelihood(torch.zeros(1, n, n, dtype=F64), like.operator, GaussianNoise(std=std))
    cov = local_table([[0.001, 0.02, 0.2]] * 2, spectrum=(4.0, 0.5))
    here = cov.at(bright.expand(n * n, -1, -1, -1), prior, t)
    got = cov.at(bright, prior, t).effective_data(masked, linear, r)
    exact = trace_of(masked, here.apply, n)
    assert float(got) == pytest.approx(exact, rel=0.1) and 10 < exact < 190
    # Every entry has its own.
    both = cov.at(torch.cat([bright, 0.1 * bright]), prior, t)
    pair = both.effective_data(masked, linear, r.expand(2, -1, -1, -1))
    torch.testing.assert_close(pair[:1], got)
    assert pair[1] < 0.5 * pair[0]


@pytest.mark.parametrize("kind", ["white", "stationary", "local"])
def test_enlarging_stops_at_what_a_flat_prior_leaves(kind):
    """However large the factor, as for a wrong PSF: nsr^2, or what it was; each entry by its own factor."""
    prior = GaussianScore(torch.zeros(1, 8, 8, dtype=F64), var=1.0, sde=EDM())
    table = {
        "white": IsotropicCovariance(0.01),
        "stationary": SpectralCovariance(
            torch.tensor([0.1, 1.0]), torch.tensor([0.0, 0.5]), torch.tensor([[0.04, 4e-4]] * 2)
        ),
        "local": local_table([[0.01, 0.02, 0.08]] * 2),
    }[kind]
    images = torch.ones(2, 1, 8, 8, dtype=F64)
    t = torch.tensor(0.1, dtype=F64)
    here = table.at(images, prior, t)
    larger = here.enlarged(torch.tensor([1.5, 1e6], dtype=F64))
    point = torch.zeros_like(images)
    point[..., 4, 4] = 1.0
    before, after = (c.apply(point)[:, 0, 4, 4] for c in (here, larger))
    assert after[1] < 0.1**2 * 1.01 or kind == "stationary"  # that has modes beyond nsr^2 already
    assert after[1] > after[0] > before[0] == before[1]
    if kind == "local":
        assert float(after[0]) == pytest.approx(1.5 * float(before[0]))
    if kind == "stationary":
        power = larger.power.expand(2, 1, 8, 8)
        torch.testing.assert_close(power[1].max(), here.power.max())
        assert float(power[1].min()) == pytest.approx(0.01)


def test_a_covariance_that_is_too_small_is_enlarged():
    """A table of a fifth of the true variance, enlarged by the residual, comes close to the exact answer; the right
    one is left alone."""
    _, like, power, k = field()
    prior = GaussianScore(torch.zeros(1, 16, 16, dtype=F64), power=power, sde=EDM())
    t = torch.tensor(0.5, dtype=F64)
    clean = prior.sample(8, seed=5).to(F64)
    y = like.operator(clean) + 0.1 * rand(8, 1, 16, 16, seed=6)
    like = Likelihood(y, like.operator, GaussianNoise(std=torch.tensor(0.1, dtype=F64)))
    x = clean + 0.5 * rand(8, 1, 16, 16, seed=7)
    right = exact_table(power, k)
    small = SpectralCovariance(right.nsr, right.k, 0.2 * right.table)

    def answer(table, enlarge):
        guidance = MomentMatching(
            tol=1e-8, max_iter=2000, covariance=table, differentiate=False, enlarge=enlarge
        )
        return Posterior(prior, like, guidance).denoise(x, t)

    exact = answer(right, False)
    error = lambda got: float((got - exact).square().mean().sqrt())  # noqa: E731
    assert error(answer(small, True)) < 0.5 * error(answer(small, False))
    assert error(answer(right, True)) < 0.1 * error(answer(small, False))
    # Entries are enlarged on their own: one that fits keeps its answer beside others that do not.
    alone = Posterior(
        prior,
        like.select(torch.tensor([3])),
        MomentMatching(
            tol=1e-8, max_iter=2000, covariance=small, differentiate=False, enlarge=True
        ),
    ).denoise(x[3:4], t)
    torch.testing.assert_close(alone[0], answer(small, True)[3], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="needs a covariance"):
        MomentMatching(enlarge=True)
    white = IsotropicCovariance(1.0)
    with pytest.raises(ValueError, match="differentiate=False"):
        MomentMatching(covariance=white, enlarge=True)
    guidance = MomentMatching(covariance=white, differentiate=False, enlarge=True)
    posterior = Posterior(dense_problem()[0], dense_problem()[1], guidance)
    with pytest.raises(ValueError, match="trace is not known"):
        posterior.denoise(rand(1, D), t)


class Squared(Operator):
    """A nonlinear operator: x + x^2/4, flattened to the first four values."""

    def __call__(self, x):
        return (x + x**2 / 4)[:, :M]

    def output_shape(self, input_shape):
        return (M,)


def test_dps_without_norm_is_the_gradient():
    """sigma^2/alpha grad_x log p(y | D(x)), by autograd, through a nonlinear operator and a mixture
    prior.
    """
    prior = GaussianMixtureScore(
        rand(3, D, seed=2), torch.tensor([0.2, 0.3, 0.5]).double(), 0.2, VP()
    )
    like = Likelihood(rand(3, M, seed=5), Squared(), GaussianNoise(std=0.3))
    t = torch.tensor(0.3, dtype=F64)
    x = rand(3, D, seed=6).requires_grad_()
    (gradient,) = torch.autograd.grad(like.bind((D,)).log_prob(prior.denoise(x, t)).sum(), x)
    factor = prior.sde.sigma(t) ** 2 / prior.sde.alpha(t)
    want = prior.denoise(x, t) + 0.5 * factor * gradient
    got = Posterior(prior, like, DPS(scale=0.5, normalise=False)).denoise(x.detach(), t)
    torch.testing.assert_close(got, want.detach(), rtol=1e-8, atol=1e-8)


def test_dps_norm_is_per_entry():
    """With the norm, the shift does not grow with the residual, and an entry does not see its
    neighbours'.
    """
    prior, like, *_ = dense_problem(rows=3)
    t = torch.tensor(2.0, dtype=F64)
    x = rand(3, D, seed=6)
    guidance = DPS(scale=0.3)
    base = prior.denoise(x, t)
    shift = Posterior(prior, like, guidance).denoise(x, t) - base
    y = like.y.clone()
    linear = Matrix(rand(M, D, seed=3))
    y[1] = linear(base)[1] + 50 * (y[1] - linear(base)[1])
    far = Posterior(prior, Likelihood(y, linear, like.noise), guidance).denoise(x, t) - base
    torch.testing.assert_close(far, shift, rtol=1e-9, atol=1e-9)


def test_nonlinear_operator_is_linearised():
    """Moment matching with A linearised at D, by dense matrices."""
    prior, _, cov, _, _ = dense_problem()
    like = Likelihood(rand(2, M, seed=5), Squared(), GaussianNoise(std=0.3))
    t = torch.tensor(0.8, dtype=F64)
    x = rand(2, D, seed=6)
    denoised = prior.denoise(x, t)
    c = 0.64 * cov @ torch.linalg.inv(cov + 0.64 * torch.eye(D, dtype=F64))
    want = []
    for b in range(2):
        a = torch.diag(1 + denoised[b] / 2)[:M]
        r = like.y[b] - Squared()(denoised)[b]
        want.append(
            denoised[b]
            + c @ a.T @ torch.linalg.solve(0.09 * torch.eye(M, dtype=F64) + a @ c @ a.T, r)
        )
    got = Posterior(prior, like, MomentMatching(tol=1e-10)).denoise(x, t)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "guidance",
    [
        Convolved(),
        DPS(),
        PiGDM(),
        MomentMatching(tol=1e-8),
        MomentMatching(covariance=IsotropicCovariance(1.0), differentiate=False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_entries_are_independent(guidance, dtype):
    """Entry b sees row b of the data, its own x, its own time, and nothing else; dtype follows
    x.
    """
    prior = GaussianMixtureScore(
        rand(2, D, seed=2).to(dtype), torch.tensor([0.4, 0.6], dtype=dtype), 0.3, EDM()
    )
    y = rand(3, M, seed=5).to(dtype)
    posterior = Posterior(
        prior, Likelihood(y, Matrix(rand(M, D, seed=3).to(dtype)), GaussianNoise(std=0.4)), guidance
    )
    x = rand(3, D, seed=7).to(dtype)
    t = torch.tensor([0.1, 1.0, 5.0], dtype=F64)
    whole = posterior.denoise(x, t)
    assert whole.dtype == dtype and whole.shape == x.shape
    tolerance = 1e-4 if dtype == torch.float32 else 1e-7
    for b in range(3):
        alone = posterior.select(torch.tensor([b])).denoise(x[b : b + 1], t[b])
        torch.testing.assert_close(alone, whole[b : b + 1], rtol=tolerance, atol=tolerance)


def test_physical_units():
    """A prior with an affine map: the posterior in physical units is that of the rescaled
    problem.
    """
    prior, like, _, matrix, noise = dense_problem()
    scaled = prior.with_affine(3.0, -0.5)
    physical = Likelihood(
        like.y * 3 + Matrix(matrix)(torch.full((1, D), -0.5, dtype=F64))[0],
        like.operator,
        GaussianNoise(cov=9 * noise),
    )
    x, t = rand(2, D, seed=7), torch.tensor(0.7, dtype=F64)
    a = Posterior(prior, like, MomentMatching(tol=1e-10)).denoise(x, t)
    b = Posterior(scaled, physical, MomentMatching(tol=1e-10)).denoise(x, t)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("fraction", TIMES)
def test_posterior_as_a_prior(fraction):
    """The posterior of the posterior is that of the joint data, as guidance differentiates through it."""
    prior, first, *_ = dense_problem()
    second = Likelihood(rand(2, seed=11), Matrix(rand(2, D, seed=12)), GaussianNoise(std=0.3))
    guidance = MomentMatching(tol=1e-10)
    t = time(prior.sde, fraction)
    x = prior.sde.sigma(t) * rand(3, D, seed=9) + rand(3, D, seed=8)
    joint = Posterior(prior, first + second, guidance).denoise(x, t)
    chained = Posterior(Posterior(prior, first, guidance), second, guidance).denoise(x, t)
    torch.testing.assert_close(chained, joint, rtol=1e-5, atol=1e-6)


def test_unconverged_solve_warns():
    prior, like, power, _ = field()
    plain = Plain(prior.mean, power=power, sde=prior.sde)
    posterior = Posterior(plain, like, MomentMatching(tol=1e-9, max_iter=2))
    with pytest.warns(ConvergenceWarning):
        posterior.denoise(10 * rand(1, 1, 16, 16), torch.tensor(10.0))


def test_masked_data_are_ignored():
    """Data of infinite variance do not matter, whatever their value."""
    prior, like, *_ = field()
    mask = torch.ones(16, 16, dtype=F64)
    mask[4:8, 4:8] = 0
    y = like.y.clone()
    x, t = rand(1, 1, 16, 16, seed=3), torch.tensor(0.5, dtype=F64)
    results = []
    for value in (0.0, 1e3):
        y[..., 4:8, 4:8] = value
        masked = Likelihood(y, like.operator, GaussianNoise(weight=100 * mask))
        results.append(
            Posterior(prior, masked, MomentMatching(tol=1e-9, max_iter=400)).denoise(x, t)
        )
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    by_mask = Likelihood(y * mask, Mask(mask) @ like.operator, GaussianNoise(std=0.1))
    other = Posterior(prior, by_mask, MomentMatching(tol=1e-9, max_iter=400)).denoise(x, t)
    torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DPS(scale=0),
        lambda: PiGDM(variance=-1.0),
        lambda: MomentMatching(tol=0),
        lambda: MomentMatching(differentiate=False),
        lambda: IsotropicCovariance(0.0),
    ],
)
def test_bad_arguments(make):
    with pytest.raises(ValueError):
        make()


def test_shapes_are_checked():
    prior, like, *_ = dense_problem()
    with pytest.raises(ValueError, match="expected 6"):
        Posterior(GaussianScore(torch.zeros(D + 1, dtype=F64), var=1.0, sde=EDM()), like)
    rows = Posterior(prior, dense_problem(rows=3)[1])
    with pytest.raises(ValueError, match="3 rows and x has 2"):
        rows.denoise(rand(2, D), torch.tensor(1.0))
    assert rows.select(torch.tensor([2, 0])).denoise(rand(2, D), torch.tensor(1.0)).shape == (2, D)


def test_a_model_that_is_off_matters_at_the_noise_of_the_data_unless_matched_there():
    """White prior of unit variance, data with noise 0.1, and a model of C_t that is 0.7 of the truth.

    128 draws of 256 pixels: a relative error of the variance of 0.8%.
    """
    from diffpost.sample import sample
    from diffpost.samplers import DPMSolver

    prior = GaussianScore(torch.zeros(1, 16, 16, dtype=F64), var=1.0, sde=EDM())
    like = Likelihood(rand(1, 16, 16, seed=7), Mask(torch.ones(1, 16, 16)), GaussianNoise(std=0.1))
    nsr = torch.logspace(-3, 2, 60, dtype=F64)
    small = SpectralCovariance(
        nsr,
        torch.tensor([0.0, 1.0], dtype=F64),
        (0.7 * nsr**2 / (1 + nsr**2))[:, None].expand(-1, 2),
    )

    def variance(**settings):
        guidance = MomentMatching(tol=1e-8, covariance=small, differentiate=False, **settings)
        posterior = Posterior(prior, like, guidance)
        draws = sample(posterior, 128, DPMSolver(48, eta=1.0), seed=3, progress=False)
        return float(draws.x.var(0).mean()) / (0.01 / 1.01), draws.vjps

    ratio, products = variance(match_below=1.0)
    assert abs(ratio - 1) < 0.04
    assert 8 < products < 40
    ratio, products = variance()
    assert ratio > 1.15 and products == 0
    for wrong in (
        {"match_below": 0.0},
        {"match_below": 0.1, "differentiate": True},
    ):
        with pytest.raises(ValueError, match="expected a positive noise-to-signal ratio"):
            MomentMatching(covariance=small, **{"differentiate": False, **wrong})


def test_the_choice_matches_near_the_noise_of_the_data():
    """10 x 0.02 of data in units in which the prior's 1 is 5; the same for one mask and many data."""
    from diffpost.guidance.choice import finest
    from diffpost.io.checkpoints import load_prior

    prior = load_prior("galaxies-32").with_affine(5.0, 0.0)
    psf = torch.ones(3, 3) / 9
    like = Likelihood(torch.zeros(1, 32, 32), Convolve(psf), GaussianNoise(std=0.1))
    assert finest(prior, like) == pytest.approx(0.02, rel=0.05)
    from diffpost.guidance.choice import choose

    assert choose(prior, like).guidance.match_below == pytest.approx(0.2, rel=0.05)
    std = torch.full((1, 32, 32), torch.inf)
    hidden = Likelihood(torch.zeros(1, 32, 32), Convolve(psf), GaussianNoise(std=std))
    assert choose(prior, hidden).guidance.match_below is None
