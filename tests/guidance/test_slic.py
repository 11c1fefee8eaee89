"""SLIC against closed forms: the matched temperature, its limits, and chains whose posterior is known by quadrature."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from diffpost.guidance import MomentMatching, default_guidance
from diffpost.guidance.slic import SLIC, with_surrogate
from diffpost.learned_noise import LearnedNoise
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Identity, Mask, Matrix, PixelBin
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import MALA, DPMSolver, Langevin, SplitGibbs
from diffpost.samplers.base import Sampler, State
from diffpost.scale_mixture import ScaleMixtureScore
from diffpost.score import GaussianScore
from diffpost.sde import EDM, VP

F64 = torch.float64
SDE = EDM(1e-3, 50.0)
SHAPE = (1, 6, 6)
TIMES = (0.01, 0.1, 0.5, 2.0, 20.0)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spectrum(side, slope=1.0):
    k = torch.fft.fftfreq(side, 1 / side, dtype=F64)
    return (1 + k[:, None] ** 2 + k**2) ** -slope


POWER = 0.3 * spectrum(6)
FIELD = GaussianScore(torch.zeros(SHAPE, dtype=F64), power=POWER, sde=SDE)
EXACT = GaussianNoise(power=POWER + 1e-6)
WHITE = GaussianScore(0.2 * torch.ones(SHAPE, dtype=F64), var=0.8, sde=SDE)
PSF = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.5, 0.2], [0.0, 0.1, 0.0]], dtype=F64)


def shift(guidance, prior, likelihood, x, t):
    """sigma^2/alpha grad log p_t(y | x)."""
    t = torch.tensor(t, dtype=F64)
    return guidance.posterior_denoise(prior, likelihood, x, t) - prior.denoise(x, t)


def worst(operator, noise, exact, guidance, prior=WHITE, times=TIMES):
    """Largest error of the guidance's shift against the exact Gaussian one, relative to its size."""
    y = rand(*operator.output_shape(SHAPE), seed=1)
    learned, known = Likelihood(y, operator, noise), Likelihood(y, operator, exact)
    errors = []
    for t in times:
        x = rand(2, *SHAPE, seed=2) * math.hypot(1, t)
        got = shift(guidance, prior, learned, x, t)
        want = shift(MomentMatching(tol=1e-10), prior, known, x, t)
        errors.append(float((got - want).abs().max() / want.abs().max()))
    return errors


# the matched temperature -----------------------------------------------------------------------


@pytest.mark.parametrize("operator", [Identity(), 0.7 * Identity(), PixelBin(2)], ids=repr)
def test_exact_where_a_at_is_white(operator):
    """A white Gaussian prior, correlated noise: the posterior's denoiser at every t."""
    side = 3 if isinstance(operator, PixelBin) else 6
    power = 0.3 * spectrum(side)
    model = GaussianScore(torch.zeros(1, side, side, dtype=F64), power=power, sde=SDE)
    exact = GaussianNoise(power=power + 1e-6)
    assert max(worst(operator, LearnedNoise(model), exact, SLIC(variance=0.8))) < 1e-4
    wrong = GaussianNoise(var=float(power.mean()))  # negative control
    assert max(worst(operator, LearnedNoise(model), wrong, SLIC(variance=0.8))) > 0.1


def test_a_psf_by_fft():
    """Stationary Gaussian noise: exact but for the interpolation between levels; periodic only in the middle of it."""
    periodic = Convolve(PSF, boundary="periodic")
    coarse = worst(periodic, LearnedNoise(FIELD), EXACT, SLIC(variance=0.8))
    fine = worst(periodic, LearnedNoise(FIELD, levels=40), EXACT, SLIC(variance=0.8))
    assert max(coarse) < 0.03 and max(fine) < 0.15 * max(coarse)
    white = SLIC(variance=0.8)  # negative control: the level of A A^T = I
    unmatched = worst(
        periodic, LearnedNoise(FIELD) + GaussianNoise(var=0.5), EXACT, white, times=(0.5, 2.0)
    )
    assert max(unmatched) > 0.1
    padded = worst(Convolve(PSF), LearnedNoise(FIELD, levels=40), EXACT, SLIC(variance=0.8))
    assert padded[0] < 1e-3 and padded[0] < 0.1 * max(padded)  # exact as t goes to 0


@pytest.mark.parametrize("sde", [SDE, VP()], ids=type)
@pytest.mark.parametrize("kind", ["outliers", "laplace", "student"])
def test_exact_for_heavy_tails_and_a_white_prior(kind, sde):
    """p_t(y | x) of one pixel by integrating over x_0 on a grid, and its slope by differences."""
    make = {
        "outliers": lambda: ScaleMixtureScore.outliers(0.3, (1,), SDE),
        "laplace": lambda: ScaleMixtureScore.laplace(0.5, (1,), SDE),
        "student": lambda: ScaleMixtureScore.student_t(3.0, 0.3, (1,), SDE),
    }
    model, v, y = make[kind](), 0.8, 1.1
    prior = GaussianScore(torch.zeros(1, dtype=F64), var=v, sde=sde)
    like = Likelihood(torch.tensor([y], dtype=F64), Identity(), LearnedNoise(model))
    x0 = torch.linspace(-7, 7, 40001, dtype=F64)
    log_noise = model.log_prob((y - x0)[:, None])
    for nsr in (0.05, 0.3, 1.5):
        t = sde.t_of_nsr(torch.tensor(nsr, dtype=F64))
        alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
        x = torch.tensor([[-0.4], [0.3], [1.6]], dtype=F64)

        def log_likelihood(x, alpha=alpha, sigma=sigma):
            joint = -0.5 * ((x - alpha * x0) / sigma) ** 2 - 0.5 * x0**2 / v
            return (joint + log_noise).logsumexp(1) - joint.logsumexp(1)

        h = 1e-4
        slope = (log_likelihood(x + h) - log_likelihood(x - h)) / (2 * h)
        want = sigma**2 / alpha * slope[:, None]
        got = shift(SLIC(variance=v), prior, like, x, float(t))
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)
        flat = shift(SLIC(), prior, like, x, float(t))
        if nsr > 1:  # negative controls: a flat prior, and Gaussian noise of that variance
            assert (flat - want).abs().max() > 0.05
        known = Likelihood(like.y, Identity(), GaussianNoise(var=model.variance))
        assert (shift(MomentMatching(), prior, known, x, float(t)) - want).abs().max() > 5e-4


def test_a_flat_prior_is_the_convolved_likelihood():
    """Nearly flat: variance 1e4."""
    wide = GaussianScore(torch.zeros(SHAPE, dtype=F64), var=1e4, sde=SDE)
    errors = worst(Identity(), LearnedNoise(FIELD), EXACT, SLIC(), wide, times=(0.1, 0.5, 2.0))
    assert max(errors) < 2e-3


def test_levels_of_a_mask():
    """Unseen pixels show the noise alone; every pixel has its own temperature, exactly for independent ones."""
    mask = torch.ones(SHAPE, dtype=F64)
    mask[0, 2:4] = 0
    model = ScaleMixtureScore(torch.ones(1), torch.tensor([0.3]), SHAPE, SDE)
    exact = GaussianNoise(var=0.3 + 1e-6)
    assert max(worst(Mask(mask), LearnedNoise(model), exact, SLIC(variance=0.8))) < 1e-4


# the last stage --------------------------------------------------------------------------------


def test_warm_above_and_learned_below():
    noise = LearnedNoise(FIELD)
    like = Likelihood(rand(*SHAPE, seed=1), Identity(), noise)
    warm = MomentMatching()
    guidance = SLIC(variance=0.8, warm=warm, below=0.3)
    x = rand(2, *SHAPE, seed=2)
    above = shift(guidance, WHITE, like, x, 0.5)
    torch.testing.assert_close(above, shift(warm, WHITE, with_surrogate(like), x, 0.5))
    under = shift(guidance, WHITE, like, x, 0.1)
    torch.testing.assert_close(under, shift(SLIC(variance=0.8), WHITE, like, x, 0.1))
    both = guidance.posterior_denoise(WHITE, like, x, torch.tensor([0.5, 0.1], dtype=F64))
    each = torch.stack([above[0], under[1]])
    torch.testing.assert_close(
        both - WHITE.denoise(x, torch.tensor([0.5, 0.1], dtype=F64)), each, rtol=1e-6, atol=1e-9
    )
    default = default_guidance(WHITE, like)
    assert isinstance(default, SLIC) and isinstance(default.warm, MomentMatching)
    _, below = default._surrogate(like, x)
    # half the standard deviation of the data's best mode
    assert below == pytest.approx(0.5 * math.sqrt(float(POWER.min())), rel=0.3)
    assert isinstance(Posterior(WHITE, like).guidance, SLIC)


def test_the_last_stage_samples():
    """A surrogate that is right but for small tails, then the score: draws of the Gaussian posterior."""
    like = Likelihood(rand(*SHAPE, seed=1), Identity(), LearnedNoise(FIELD))
    draws = sample(Posterior(WHITE, like), 200, DPMSolver(40, eta=1.0), progress=False)
    cov = 1 / (1 / 0.8 + 1 / (POWER + 1e-6))
    modes = torch.fft.fft2(like.y / 1.0, norm="ortho") / (POWER + 1e-6)
    prior = torch.fft.fft2(WHITE.mean, norm="ortho") / 0.8
    mean = torch.fft.ifft2(cov * (modes + prior), norm="ortho").real
    chi2 = (torch.fft.fft2(draws.x - mean, norm="ortho").abs().square() / cov).sum((1, 2, 3))
    expected, error = 36, math.sqrt(2 * 36 / 200)
    assert abs(float(chi2.mean()) - expected) < 4.5 * error + 0.05 * expected
    wide = draws.x + 0.5 * (draws.x - mean)  # negative control
    chi2 = (torch.fft.fft2(wide - mean, norm="ortho").abs().square() / cov).sum((1, 2, 3))
    assert abs(float(chi2.mean()) - expected) > 4.5 * error + 0.05 * expected


# chains ----------------------------------------------------------------------------------------


def rejects(draws, log_density, n_bins=12):
    """A chi^2 test of independent draws (n, 2) against a density on a grid, in equally likely bins of each coordinate
    and of their sum: the smallest p-value of the three, Bonferroni-corrected.
    """
    from scipy.stats import chisquare

    side = torch.linspace(-3, 3, 401, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    weight = log_density(grid).softmax(0).numpy()
    p_values = []
    for direction in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
        line = (grid @ torch.tensor(direction, dtype=F64)).numpy()
        order = np.argsort(line, kind="stable")
        cdf = np.cumsum(weight[order])
        edges = line[order][np.searchsorted(cdf, np.linspace(0, 1, n_bins + 1)[1:-1])] + 1e-9
        share = np.diff([0.0, *[weight[line <= e].sum() for e in edges], 1.0])
        found = np.histogram(
            (draws.double() @ torch.tensor(direction, dtype=F64)).numpy(),
            [-np.inf, *edges, np.inf],
        )[0]
        p_values.append(chisquare(found, len(draws) * share / share.sum()).pvalue)
    return 3 * min(p_values)


SIX = torch.tensor(
    [[1.0, 0.4], [-0.3, 0.8], [0.5, 0.5], [0.9, -0.6], [0.2, 1.0], [-0.7, 0.3]], dtype=F64
)


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Sampler):
    """Draws that are there already: what is tested is the chain's target, and not how fast it forgets its start."""

    draws: torch.Tensor | None = None

    def step(self, model, state, t, s, noise):
        return State(self.draws)


@pytest.mark.parametrize("kind", ["outliers", "laplace", "student"])
def test_mala_on_heavy_tails_against_quadrature(kind):
    """Two pixels, six data, one of them an outlier: 500 chains that begin at draws of the posterior on a grid keep to it
    in 40 moves. A false alarm in 10,000; Gaussian noise of the same variance, and dynamics without the test, do not.
    """
    nu = 0.05
    make = {
        "outliers": lambda: ScaleMixtureScore.outliers(0.2, (6,), SDE),
        "laplace": lambda: ScaleMixtureScore.laplace(0.5, (6,), SDE),
        "student": lambda: ScaleMixtureScore.student_t(2.5, 0.2, (6,), SDE),
    }
    model = make[kind]()
    noise = LearnedNoise(model, temperature=0.02, nodes=9)
    prior = GaussianScore(torch.zeros(2, dtype=F64), var=0.7, sde=SDE)
    y = torch.tensor([0.65, 0.1, 0.4, 2.6, 0.2, -0.3], dtype=F64)
    like = Likelihood(y, Matrix(SIX, (2,)), noise)
    blurred = ScaleMixtureScore(model.weights, model.var + noise.blur**2, (6,), SDE)

    def log_density(u):
        fit = blurred.log_prob(y - u @ SIX.T)
        return fit - 0.5 * u.square().sum(1) / (0.7 + nu**2)

    side = torch.linspace(-3, 3, 401, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    generator = torch.Generator().manual_seed(7)
    chosen = torch.multinomial(log_density(grid).softmax(0), 500, True, generator=generator)
    start = Given(2, draws=grid[chosen])
    posterior = Posterior(prior, like)
    draws = sample(posterior, 500, MALA(40, start, nsr=nu, burn_in=20), progress=False)
    assert rejects(draws.x, log_density) > 1e-4
    assert (draws.extras["acceptance"] > 0.1).double().mean() > 0.9
    assert (draws.x - start.draws).norm(dim=1).median() > 0.1  # chains have moved
    gaussian = Likelihood(y, like.operator, GaussianNoise(var=model.variance))
    wrong = sample(Posterior(prior, gaussian), 500, MALA(20, start, nsr=nu), progress=False)
    assert rejects(wrong.x, log_density) < 1e-6  # negative control
    if kind == "outliers":
        unadjusted = Langevin(30, start, nsr=nu, step_size=1.0)
        wrong = sample(posterior, 500, unadjusted, progress=False)
        assert rejects(wrong.x, log_density) < 1e-6  # negative control


def test_mala_on_correlated_noise():
    """Noise of a known power spectrum by its score: the Gaussian posterior; white noise is rejected."""
    nu = 0.05
    operator = Convolve(PSF)
    y = operator(WHITE.sample(1, seed=3))[0] + EXACT.sample(SHAPE, 4, F64)
    eye = torch.eye(36, dtype=F64).reshape(-1, *SHAPE)
    a = operator(eye).flatten(1).T
    precision = EXACT.precision(eye).flatten(1)
    cov = torch.linalg.inv(torch.eye(36, dtype=F64) / (0.8 + nu**2) + a.T @ precision @ a)
    root = torch.linalg.cholesky(torch.linalg.inv(cov))
    mean = cov @ (a.T @ precision @ y.flatten() + 0.2 / (0.8 + nu**2))

    def chi2(x):
        white = (x.flatten(1) - mean) @ root
        return float(white.square().mean()), float(white.mean(0).square().sum()) * len(x) / 36

    n, bounds = 150, (4.5 * math.sqrt(2 / (150 * 36)), 4.5 * math.sqrt(2 / 36))
    sampler = MALA(24, DPMSolver(12, eta=1.0), nsr=nu)
    noise = LearnedNoise(FIELD)
    draws = sample(Posterior(WHITE, Likelihood(y, operator, noise)), n, sampler, progress=False)
    spread, offset = chi2(draws.x)
    assert abs(spread - 1) < bounds[0] and abs(offset - 1) < bounds[1]
    # a surrogate that is wrong by a factor of 2 makes proposals worse, not draws
    poor = LearnedNoise(FIELD, surrogate=GaussianNoise(power=2 * POWER))
    longer = MALA(60, DPMSolver(12, eta=1.0), nsr=nu)
    draws = sample(Posterior(WHITE, Likelihood(y, operator, poor)), n, longer, progress=False)
    spread, offset = chi2(draws.x)
    assert abs(spread - 1) < bounds[0] and abs(offset - 1) < bounds[1]
    white = Likelihood(y, operator, GaussianNoise(var=float(POWER.mean())))
    draws = sample(Posterior(WHITE, white), n, sampler, progress=False)
    spread, offset = chi2(draws.x)
    assert abs(spread - 1) > bounds[0] and abs(offset - 1) > bounds[1]  # negative control


def test_joint_data_of_both_kinds():
    """Learned and Gaussian noise together: the warm stage and chains take them."""
    parts = Likelihood(rand(*SHAPE), Identity(), LearnedNoise(FIELD)) + Likelihood(
        rand(*SHAPE, seed=3), Convolve(PSF), GaussianNoise(std=0.5)
    )
    draws = sample(Posterior(WHITE, parts), 3, MALA(4, DPMSolver(8), nsr=0.05), progress=False)
    again = sample(
        Posterior(WHITE, parts), 3, MALA(4, DPMSolver(8), nsr=0.05), batch_size=2, progress=False
    )
    assert draws.x.isfinite().all() and draws.extras["trace_chi2"].shape == (3, 2)
    torch.testing.assert_close(again.x, draws.x, rtol=1e-5, atol=1e-6)


def test_errors():
    learned = Likelihood(rand(*SHAPE), Identity(), LearnedNoise(FIELD))
    gaussian = Likelihood(rand(*SHAPE), Identity(), EXACT)
    x, t = rand(1, *SHAPE), torch.tensor(0.3, dtype=F64)
    tails = ScaleMixtureScore.outliers(0.3, (36,), SDE)
    mixing = Likelihood(rand(36), Matrix(rand(36, 36), SHAPE), LearnedNoise(tails))
    for call, match in (
        (lambda: SLIC(variance=0.0), "positive"),
        (lambda: SLIC(below=0.1), "guidance for above"),
        (lambda: SLIC().posterior_denoise(WHITE, gaussian, x, t), "expected LearnedNoise"),
        (lambda: SLIC().posterior_denoise(WHITE, mixing, x, t), "no temperature"),
        (
            lambda: sample(
                Posterior(WHITE, learned), 1, SplitGibbs(4, coupling=0.1), progress=False
            ),
            "MALA and Langevin take any",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    cold = SLIC(warm=MomentMatching(), below=1.0).posterior_denoise(WHITE, mixing, x, t)
    assert cold.isfinite().all()
    with pytest.raises(NotImplementedError, match="no covariance"):
        MomentMatching().posterior_denoise(WHITE, learned, x, t)
