"""The analytic score models against densities, quadrature and draws; the base class."""

import math

import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from diffpost.score import (
    GaussianMixtureScore,
    GaussianScore,
    denoiser_of_score,
    score_of_denoiser,
)
from diffpost.sde import EDM, TSVE, VE, VP

DOUBLE = torch.float64
PROCESSES = [EDM(), VE(), VP(), TSVE(beta=4.0, t_star=0.4)]
every_process = pytest.mark.parametrize("sde", PROCESSES, ids=lambda s: type(s).__name__)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=DOUBLE)


def rand(*shape, seed=0):
    return torch.rand(shape, generator=generator(seed), dtype=DOUBLE)


def even_power(height, width):
    power = rand(height, width) + 0.05
    return 0.5 * (power + power.flip(-2, -1).roll((1, 1), (-2, -1)))


def circulant(power):
    """The dense covariance with eigenvalues `power` under the orthonormal FFT2, column by column."""
    d = power.numel()
    columns = torch.eye(d, dtype=DOUBLE).reshape(d, *power.shape)
    return torch.fft.ifft2(power * torch.fft.fft2(columns)).real.reshape(d, d)


def gaussians(sde=EDM()):  # noqa: B008
    """Each kind of Gaussian with its dense covariance."""
    out = {}
    mean = randn(2, 3, 4, seed=1)
    var = rand(2, 3, 4, seed=2) + 0.05
    out["var"] = GaussianScore(mean, var=var, sde=sde), torch.diag(var.flatten())
    out["channel var"] = (
        GaussianScore(mean, var=torch.tensor([0.5, 2.0], dtype=DOUBLE)[:, None, None], sde=sde),
        torch.diag(torch.tensor([0.5, 2.0], dtype=DOUBLE).repeat_interleave(12)),
    )
    root = randn(24, 24, seed=3) / 5
    out["cov"] = GaussianScore(mean, cov=root @ root.T, sde=sde), root @ root.T
    for size in [(3, 4), (4, 3), (5, 5), (6, 2)]:
        power = even_power(*size)
        field = torch.block_diag(circulant(power), circulant(power))
        out[f"power {size}"] = (
            GaussianScore(randn(2, *size, seed=4), power=power, sde=sde),
            field,
        )
    return out


every_gaussian = pytest.mark.parametrize("name", gaussians().keys())


@every_process
@every_gaussian
def test_gaussian_against_its_dense_covariance(sde, name):
    model, cov = gaussians(sde)[name]
    d = cov.shape[0]
    x = 2 * randn(3, *model.shape, seed=5)
    t = sde.t_of_nsr(torch.tensor([0.05, 0.7, 6.0], dtype=DOUBLE))
    for b in range(3):
        alpha, sigma = float(sde.alpha(t[b])), float(sde.sigma(t[b]))
        total = alpha**2 * cov + sigma**2 * torch.eye(d, dtype=DOUBLE)
        marginal = MultivariateNormal(alpha * model.mean.flatten(), total)
        residual = x[b].flatten() - alpha * model.mean.flatten()
        score = -torch.linalg.solve(total, residual)
        denoised = model.mean.flatten() + alpha * cov @ torch.linalg.solve(total, residual)
        jacobian = alpha * cov @ torch.linalg.inv(total)
        torch.testing.assert_close(
            model.log_prob(x, t)[b], marginal.log_prob(x[b].flatten()), rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(model.score(x, t)[b].flatten(), score, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(model.denoise(x, t)[b].flatten(), denoised, rtol=1e-8, atol=1e-8)
        _, vjp = model.denoise_vjp(x[b : b + 1].expand(d, *model.shape), t[b])
        rows = vjp(torch.eye(d, dtype=DOUBLE).reshape(d, *model.shape)).reshape(d, d)
        torch.testing.assert_close(rows, jacobian, rtol=1e-8, atol=1e-10)
    clean = MultivariateNormal(model.mean.flatten(), cov)
    torch.testing.assert_close(
        model.log_prob(x), clean.log_prob(x.flatten(1)), rtol=1e-6, atol=1e-6
    )


def mixtures(sde=EDM(), spread=3.0):  # noqa: B008
    """Each kind of mixture with the dense variances (K, d)."""
    means = spread * randn(5, 1, 2, 3, seed=1)
    weights = rand(5, seed=2) + 0.1
    out = {}
    for shape in [(), (5,), (5, 1, 2, 3), (1, 2, 3), (5, 1, 1, 1), (5, 1, 1, 3)]:
        var = rand(*shape, seed=3) + 0.2
        dense = var.reshape(5, 1, 1, 1) if shape == (5,) else var
        dense = dense.expand(5, 1, 2, 3).reshape(5, 6)
        out[str(shape)] = GaussianMixtureScore(means, weights, var, sde), dense
    return out


every_mixture = pytest.mark.parametrize("name", mixtures().keys())


def mixture_density(model, var, alpha, sigma):
    total = alpha**2 * var + sigma**2
    parts = MultivariateNormal(alpha * model.means.flatten(1), torch.diag_embed(total))
    return MixtureSameFamily(Categorical(model.weights), parts)


@every_process
@every_mixture
def test_mixture_against_its_density(sde, name):
    model, var = mixtures(sde)[name]
    t = sde.t_of_nsr(torch.tensor([0.05, 0.7, 6.0, 20.0], dtype=DOUBLE))
    x = sde.perturb(model.sample(4, seed=1), t, randn(4, 1, 2, 3, seed=2))
    for b in range(4):
        alpha, sigma = float(sde.alpha(t[b])), float(sde.sigma(t[b]))
        density = mixture_density(model, var, alpha, sigma)
        y = x[b].flatten().clone().requires_grad_()
        value = density.log_prob(y)
        (score,) = torch.autograd.grad(value, y)
        torch.testing.assert_close(model.log_prob(x, t)[b], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.score(x, t)[b].flatten(), score, rtol=1e-7, atol=1e-9)
        denoised = (x[b].flatten() + sigma**2 * score) / alpha
        torch.testing.assert_close(model.denoise(x, t)[b].flatten(), denoised, rtol=1e-7, atol=1e-7)
        # Tweedie's second order: sigma^2/alpha J = sigma^2/alpha^2 (1 + sigma^2 Hessian).
        hessian = torch.autograd.functional.hessian(density.log_prob, x[b].flatten())
        jacobian = (torch.eye(6, dtype=DOUBLE) + sigma**2 * hessian) / alpha
        _, vjp = model.denoise_vjp(x[b : b + 1].expand(6, 1, 2, 3), t[b])
        rows = vjp(torch.eye(6, dtype=DOUBLE).reshape(6, 1, 2, 3)).reshape(6, 6)
        torch.testing.assert_close(rows, jacobian, rtol=1e-6, atol=1e-6)
    clean = mixture_density(model, var, 1.0, 0.0)
    torch.testing.assert_close(
        model.log_prob(x[:2]), clean.log_prob(x[:2].flatten(1)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("kind", ["var", "cov", "power (3, 4)", "mixture"])
@every_process
def test_score_is_the_slope_of_the_log_density(sde, kind):
    """Central differences of the analytic log p_t, with Richardson's extrapolation."""
    model = mixtures(sde)["(5,)"][0] if kind == "mixture" else gaussians(sde)[kind][0]
    t = sde.t_of_nsr(torch.tensor([0.05, 0.7, 6.0], dtype=DOUBLE))
    x = sde.perturb(model.sample(3), t, randn(3, *model.shape))
    w = randn(3, *model.shape, seed=1)
    size = sde.sigma(t).reshape(-1, *[1] * len(model.shape))

    def slope(h):
        up, down = (model.log_prob(x + s * h * size * w, t) for s in (1, -1))
        return (up - down) / (2 * h * size.flatten())

    extrapolated = (4 * slope(5e-4) - slope(1e-3)) / 3
    directional = (model.score(x, t) * w).flatten(1).sum(1)
    torch.testing.assert_close(directional, extrapolated, rtol=1e-6, atol=1e-6)


def test_denoiser_is_the_posterior_mean_by_quadrature():
    """E[x_0 | x] and its variance on a line, integrated numerically without Tweedie's formula."""
    sde = VP()
    means = torch.tensor([[-2.0], [0.5], [3.0]], dtype=DOUBLE)
    model = GaussianMixtureScore(means, [0.2, 0.5, 0.3], torch.tensor([0.1, 0.5, 0.02]), sde)
    grid = torch.linspace(-8, 8, 200_001, dtype=DOUBLE)
    prior = model.log_prob(grid[:, None]).exp()
    for nsr in (0.05, 0.5, 5.0):
        t = sde.t_of_nsr(torch.tensor(nsr, dtype=DOUBLE))
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for x in (-1.0, 0.3, 2.0):
            weight = prior * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
            mean = (weight * grid).sum() / weight.sum()
            variance = (weight * (grid - mean) ** 2).sum() / weight.sum()
            at = torch.tensor([[x]], dtype=DOUBLE)
            denoised, vjp = model.denoise_vjp(at, t)
            assert float(denoised) == pytest.approx(float(mean), rel=1e-6, abs=1e-7)
            covariance = sigma**2 / alpha * vjp(torch.ones_like(at))
            assert float(covariance) == pytest.approx(float(variance), rel=1e-5)


def test_one_component_is_a_gaussian():
    mean, var = randn(1, 3, 4), rand(1, 3, 4) + 0.1
    one = GaussianMixtureScore(mean[None], [2.0], var[None], VP())
    other = GaussianScore(mean, var=var, sde=VP())
    x, t = randn(2, 1, 3, 4, seed=1), torch.tensor([0.1, 0.6], dtype=DOUBLE)
    for name in ("denoise", "score", "log_prob"):
        torch.testing.assert_close(getattr(one, name)(x, t), getattr(other, name)(x, t))
    torch.testing.assert_close(one.denoise_vjp(x, t)[1](x), other.denoise_vjp(x, t)[1](x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_mixture_in_800_dimensions_where_every_density_underflows(dtype):
    d, components = 800, 25
    rows = torch.arange(components)
    grid = torch.stack([8.0 * (rows % 5 - 2), 8.0 * (rows // 5 - 2)], 1).double()
    means = grid.repeat(1, d // 2)
    weights = rand(components, seed=4) + 0.1
    model = GaussianMixtureScore(means.to(dtype), weights, 1.0, EDM(2e-3, 1e4))
    for sigma in (2e-3, 0.5, 20.0, 1e4):
        t = torch.tensor(sigma, dtype=DOUBLE)
        x = (model.sample(6, seed=2).double() + sigma * randn(6, d, seed=3)).to(dtype)
        assert bool((model.log_prob(x, t) < -745).all())  # exp of it is 0, even in float64
        # Differences of logarithms of pairs of components, in extended precision.
        wide = x.double().numpy().astype("longdouble")
        m = means.to(dtype).double().numpy().astype("longdouble")
        chi2 = ((wide[:, None] - m) ** 2).sum(2) / (1 + sigma**2)
        logits = torch.log(weights).numpy() - 0.5 * chi2
        r = torch.as_tensor((logits - logits.max(1, keepdims=True)).astype("float64")).softmax(1)
        expected = (x.double() + sigma**2 * (r @ means)) / (1 + sigma**2)
        denoised = model.denoise(x, t)
        assert denoised.dtype == dtype
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(denoised.double(), expected, rtol=tolerance, atol=tolerance)
        for value in (model.score(x, t), model.denoise_vjp(x, t)[1](x)):
            assert bool(torch.isfinite(value).all())
        # Negative control: densities instead of their logarithms.
        naive = model.log_prob(x.double(), t).exp()
        assert bool((naive / naive).isnan().all())


def test_limits_of_the_noise_level():
    """Without noise the denoiser is x/alpha; drowned in noise it is the prior's mean."""
    sde = VP(t_max=8.0)
    mixture = mixtures(sde)["()"][0]
    average = (mixture.weights / mixture.weights.sum()) @ mixture.means.flatten(1)
    models = [(model, model.mean) for model, _ in gaussians(sde).values()]
    for model, mean in [*models, (mixture, average.reshape(mixture.shape))]:
        x = randn(2, *model.shape, seed=1)
        for t in (0.0, 1e-12):
            denoised = model.denoise(x, torch.tensor(t, dtype=DOUBLE))
            torch.testing.assert_close(denoised, x, rtol=1e-6, atol=1e-5)
        end = torch.tensor(8.0, dtype=DOUBLE)  # alpha = 1e-139
        torch.testing.assert_close(model.denoise(x, end), mean.expand_as(x))
    point = GaussianScore(torch.ones(3), var=0.0, sde=sde)
    clean = point.denoise(torch.zeros(2, 3), torch.tensor(0.0, dtype=DOUBLE))
    assert torch.equal(clean, torch.ones(2, 3))


def test_points_as_a_mixture():
    """Zero variance: the denoiser of a finite set of images."""
    points = 3 * randn(4, 6)
    model = GaussianMixtureScore(points, torch.ones(4), 0.0, EDM())
    x = points + 0.01 * randn(4, 6, seed=1)
    denoised = model.denoise(x, torch.tensor(0.05, dtype=DOUBLE))
    torch.testing.assert_close(denoised, points, rtol=1e-6, atol=1e-6)


def chi2_p(x, mean, cov):
    """p-value of draws being N(mean, cov), by the sum of their squared whitened residuals."""
    residual = x.double().flatten(1) - mean.flatten()
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), residual.T, upper=False)
    value = float((white**2).sum())
    return 2 * min(stats.chi2.cdf(value, white.numel()), stats.chi2.sf(value, white.numel()))


def covariance_p(x, mean, cov):
    """p-value of the largest whitened correlation; false alarms at the stated rate."""
    residual = x.double().flatten(1) - mean.flatten()
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(cov), residual.T, upper=False)
    n, d = white.shape[1], white.shape[0]
    rho = (white @ white.T / n).fill_diagonal_(0)
    mean_z = white.mean(1) * math.sqrt(n)
    largest = max(float(rho.abs().max()) * math.sqrt(n), float(mean_z.abs().max()))
    return min(1.0, (d * (d - 1) / 2 + d) * 2 * stats.norm.sf(largest))


@every_gaussian
def test_draws_of_a_gaussian(name):
    """At a false-alarm rate of 1e-4 for each of two tests; a wrong covariance must be rejected."""
    model, cov = gaussians()[name]
    x = model.sample(4000, seed=1)
    assert x.shape == (4000, *model.shape) and x.dtype == DOUBLE
    cov = cov + 1e-12 * torch.eye(len(cov), dtype=DOUBLE)
    assert chi2_p(x, model.mean, cov) > 1e-4
    assert covariance_p(x, model.mean, cov) > 1e-4
    assert chi2_p(x, model.mean, 1.05 * cov) < 1e-4  # negative controls
    assert covariance_p(x + 0.15 * cov.diag().sqrt().reshape(model.shape), model.mean, cov) < 1e-4
    torch.testing.assert_close(model.sample(7, seed=1), x[:7], rtol=1e-12, atol=1e-12)
    assert not torch.equal(model.sample(7, seed=2), x[:7])


@every_mixture
def test_draws_of_a_mixture(name):
    """Counts of components, and each component's draws, at a false-alarm rate of 1e-4 each."""
    far, var = mixtures(spread=300.0)[name]
    x = far.sample(5000, seed=3)
    component = torch.cdist(x.flatten(1), far.means.flatten(1)).argmin(1)
    counts = torch.bincount(component, minlength=5).double()
    expected = far.weights / far.weights.sum() * 5000
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-4
    wrong = expected.roll(1)
    assert stats.chisquare(counts.numpy(), wrong.numpy()).pvalue < 1e-4
    for k in range(5):
        draws = x[component == k]
        assert chi2_p(draws, far.means[k], torch.diag(var[k])) > 1e-4
        assert chi2_p(draws, far.means[k], 1.2 * torch.diag(var[k])) < 1e-4
    assert torch.equal(far.sample(9, seed=3), x[:9])


def test_a_component_without_weight_is_never_drawn():
    means = torch.tensor([[0.0], [50.0], [100.0]])
    model = GaussianMixtureScore(means, [0.0, 1.0, 0.0], 1.0, EDM())
    x = model.sample(2000)
    assert float(x.min()) > 40 and float(x.max()) < 60
    denoised = model.denoise(torch.tensor([[0.0]]), torch.tensor(1.0))
    assert float(denoised) == pytest.approx(25.0)


def test_the_spectrum_of_the_jacobian_exists_where_it_is_diagonal():
    x, t = torch.zeros(2, 1, 4, 4), torch.tensor([0.5, 2.0])
    mean = torch.zeros(1, 4, 4)
    sde = EDM()
    power = GaussianScore(mean, power=even_power(4, 4), sde=sde).jacobian_spectrum(x, t)
    assert power is not None and power.shape == (2, 1, 4, 4) and power.dtype == torch.float32
    white = GaussianScore(mean, var=2.0, sde=sde).jacobian_spectrum(x, t)
    assert white is not None
    torch.testing.assert_close(white.expand(2, 1, 4, 4)[:, 0, 0, 0], 2 / (2 + t**2))
    assert GaussianScore(mean, var=torch.rand(4, 4), sde=sde).jacobian_spectrum(x, t) is None
    assert GaussianScore(mean, cov=torch.eye(16), sde=sde).jacobian_spectrum(x, t) is None
    vector = GaussianScore(torch.zeros(7), var=2.0, sde=sde)
    assert vector.jacobian_spectrum(torch.zeros(2, 7), t) is None


def test_tweedie_both_ways():
    sde, x, score = TSVE(beta=3.0), randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1)
    for t in (torch.tensor(0.7, dtype=DOUBLE), torch.tensor([0.1, 0.5, 0.9], dtype=DOUBLE)):
        denoised = denoiser_of_score(sde, score, x, t)
        torch.testing.assert_close(score_of_denoiser(sde, denoised, x, t), score)
    single = denoiser_of_score(sde, score.float(), x.float(), torch.tensor(0.7))
    assert single.dtype == torch.float32


def test_models_move_between_dtypes():
    for model in (gaussians()["cov"][0], mixtures()["(5,)"][0]):
        small = model.to(dtype=torch.float32)
        assert small.dtype == torch.float32 and model.dtype == DOUBLE
        assert small.sample(3).dtype == torch.float32
        torch.testing.assert_close(small.sample(3).double(), model.sample(3), rtol=0, atol=1e-5)
        assert model.to("cpu").device == torch.device("cpu")


def test_units_may_be_tensors_and_a_shape_is_fixed():
    model = GaussianScore(torch.zeros(2, 4, 4), var=1.0, sde=EDM())
    scale = torch.tensor([2.0, 3.0])[:, None, None]
    other = model.with_affine(scale, torch.full((4, 4), -1.0))
    x = torch.ones(5, 2, 4, 4)
    assert torch.equal(other.to_physical(x)[:, 0], torch.full((5, 4, 4), 1.0))
    assert torch.equal(other.to_physical(x)[:, 1], torch.full((5, 4, 4), 2.0))
    with pytest.raises(ValueError, match="tied to the shape"):
        model.with_shape((2, 8, 8))
    with pytest.raises(ValueError, match="offset"):
        model.with_affine(1.0, math.inf)


MEAN = torch.zeros(1, 2, 2)
NAN = torch.full((2, 2), math.nan)
ODD = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: GaussianScore(MEAN, sde=EDM()), "exactly one"),
        (lambda: GaussianScore(MEAN, var=1.0, power=torch.ones(2, 2), sde=EDM()), "exactly one"),
        (lambda: GaussianScore(MEAN, var=-1.0, sde=EDM()), "not negative"),
        (lambda: GaussianScore(MEAN, var=NAN, sde=EDM()), "finite"),
        (lambda: GaussianScore(MEAN, var=torch.ones(3), sde=EDM()), "broadcastable"),
        (lambda: GaussianScore(MEAN, var=torch.ones(1, 1, 2, 2), sde=EDM()), "broadcastable"),
        (lambda: GaussianScore(MEAN, cov=torch.eye(3), sde=EDM()), r"expected \(4, 4\)"),
        (lambda: GaussianScore(MEAN, cov=torch.eye(4).roll(1, 0), sde=EDM()), "not symmetric"),
        (lambda: GaussianScore(MEAN, cov=-torch.eye(4), sde=EDM()), "not negative"),
        (lambda: GaussianScore(torch.zeros(1, 3, 3), power=ODD, sde=EDM()), "k and -k"),
        (lambda: GaussianScore(torch.zeros(3), power=torch.ones(3), sde=EDM()), "two axes"),
        (lambda: GaussianMixtureScore(torch.zeros(3), torch.ones(3), 1.0, EDM()), "expected"),
        (lambda: GaussianMixtureScore(torch.zeros(3, 2), torch.ones(2), 1.0, EDM()), "weights"),
        (lambda: GaussianMixtureScore(torch.zeros(2, 2), [1.0, -1.0], 1.0, EDM()), "negative"),
        (lambda: GaussianMixtureScore(torch.zeros(2, 2), [0.0, 0.0], 1.0, EDM()), "zero"),
        (lambda: GaussianMixtureScore(torch.zeros(2, 2), [1.0, 1.0], -1.0, EDM()), "not negative"),
        (
            lambda: GaussianMixtureScore(torch.zeros(2, 2), [1.0, 1.0], torch.ones(3), EDM()),
            "expected a number",
        ),
        (
            lambda: GaussianScore(MEAN, var=1.0, sde=EDM()).denoise(
                torch.zeros(2, 1, 3, 3), torch.tensor(1.0)
            ),
            "got x of shape",
        ),
    ],
)
def test_refuses(build, words):
    with pytest.raises(ValueError, match=words):
        build()
