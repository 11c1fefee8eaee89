"""Noise known by its score against noise known in closed form: densities, gradients, draws, Gaussian parts, tiles."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from diffpost.learned_noise import LearnedNoise
from diffpost.likelihood import Likelihood
from diffpost.line_integral import integral_between
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.noise import BlockNoise, GaussianNoise
from diffpost.noise_flow import Perturbation
from diffpost.operator import Convolve, Identity
from diffpost.operators.base import Operator
from diffpost.scale_mixture import ScaleMixtureScore
from diffpost.score import GaussianMixtureScore, GaussianScore
from diffpost.sde import EDM, VP
from diffpost.tiling import TiledScore, fitted

F64 = torch.float64
SDE = EDM(1e-3, 50.0)
SHAPE = (1, 3, 4)
M = math.prod(SHAPE)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def spectrum(height, width, slope=1.0):
    ky = torch.fft.fftfreq(height, 1 / height, dtype=F64)[:, None]
    kx = torch.fft.fftfreq(width, 1 / width, dtype=F64)
    return (1 + ky**2 + kx**2) ** -slope


POWER = spectrum(3, 4)
FIELD = GaussianScore(torch.zeros(SHAPE, dtype=F64), power=POWER, sde=SDE)
EXACT = GaussianNoise(power=POWER + 1e-6)  # the model at its lowest noise
TAILS = {
    "outliers": ScaleMixtureScore.outliers(0.7, SHAPE, SDE),
    "laplace": ScaleMixtureScore.laplace(0.7, SHAPE, SDE),
    "student": ScaleMixtureScore.student_t(3.0, 0.7, SHAPE, SDE),
}
COLD = SDE.t_of_nsr(torch.tensor(1e-3, dtype=F64))


# the density -----------------------------------------------------------------------------------


def test_gaussian_noise_learned_is_gaussian_noise():
    """Score to rounding, the ODE's density to its steps, ratios by the line."""
    noise = LearnedNoise(FIELD, steps=48)
    r, other = EXACT.sample((3, *SHAPE), 1, F64), EXACT.sample((3, *SHAPE), 2, F64)
    torch.testing.assert_close(noise.score(r), EXACT.score(r), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(noise.log_prob(r), EXACT.log_prob(r), rtol=0, atol=5e-3)
    want, _ = EXACT.log_ratio(r, other)
    got, error = noise.log_ratio(r, other)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    back, _ = noise.log_ratio(other, r)
    torch.testing.assert_close(back, -got, rtol=1e-12, atol=1e-12)
    assert (error < 1e-9).all()
    wrong = GaussianNoise(power=1.2 * POWER)  # negative control
    assert ((noise.log_prob(r) - wrong.log_prob(r)).abs() > 0.1).all()
    assert noise.surrogate(SHAPE).log_prob(r).allclose(EXACT.log_prob(r), atol=1e-3)


def test_steps_converge_to_fourth_order():
    r = EXACT.sample((2, *SHAPE), 1, F64)
    want = EXACT.log_prob(r)
    errors = [
        float((LearnedNoise(FIELD, steps=n).log_prob(r) - want).abs().max()) for n in (12, 24, 48)
    ]
    assert errors[0] > 8 * errors[1] > 64 * errors[2]


def test_hutchinson_states_its_error():
    """Within 4.5 of the stated errors of the exact trace in 30 sets of probes, and scattered as they say."""
    r = EXACT.sample((1, *SHAPE), 1, F64)
    exact, none = LearnedNoise(FIELD, steps=6).log_prob_error(r)
    assert float(none) == 0
    pulls = []
    for seed in range(30):
        noise = LearnedNoise(FIELD, steps=6, exact_trace=4, probes=12, seed=seed)
        value, error = noise.log_prob_error(r)
        pulls.append(float((value - exact) / error))
    scatter = np.std(pulls)
    assert max(map(abs, pulls)) < 4.5 and abs(np.mean(pulls)) < 4.5 / math.sqrt(30)
    assert 0.7 < scatter < 1.4  # Student's t of 11 degrees of freedom: 1.10, +- 0.15
    # independent pixels: signs times a diagonal Jacobian give the trace itself
    tails = TAILS["outliers"]
    few = LearnedNoise(tails, exact_trace=4, probes=2, steps=16)
    r = tails.sample(2, 3).double()
    value, error = few.log_prob_error(r)
    torch.testing.assert_close(value, LearnedNoise(tails, steps=16).log_prob(r))
    assert (error < 1e-9).all()


@pytest.mark.parametrize("name", TAILS)
def test_heavy_tails(name):
    """The flow finds their density, the line its differences; Gaussian noise of the same variance does not."""
    model = TAILS[name]
    noise = LearnedNoise(model, steps=48, nodes=129)
    r, other = model.sample(3, 1).double(), model.sample(3, 2).double()
    want = model.log_prob(r, COLD)
    torch.testing.assert_close(noise.log_prob(r), want, rtol=0, atol=0.01)
    got, error = noise.log_ratio(r, other)
    gap = (got - model.log_prob(other, COLD) + want).abs()
    assert (gap < 0.05).all() and (gap <= error + 1e-6).all()
    gaussian = GaussianNoise(var=model.variance)
    assert ((gaussian.log_prob(r) - want).abs() > 0.1).any()  # negative control
    torch.testing.assert_close(noise.variance, torch.tensor(model.variance, dtype=F64))


def test_scale_mixtures_are_what_they_stand_for():
    x = torch.tensor([0.05, 0.3, 1.0, 3.0, 6.0], dtype=F64)
    pairs = (
        (ScaleMixtureScore.laplace(1.3, (1,), SDE), scipy.stats.laplace(scale=1.3 / math.sqrt(2))),
        (ScaleMixtureScore.student_t(3, 1.3, (1,), SDE), scipy.stats.t(3, scale=1.3)),
        (ScaleMixtureScore.student_t(2, 1.3, (1,), SDE), scipy.stats.t(2, scale=1.3)),
    )
    for model, law in pairs:
        got = model.log_prob(x[:, None])
        np.testing.assert_allclose(got.numpy(), law.logpdf(x.numpy()), atol=1e-3)
        draws = model.with_shape((4000,)).sample(1, seed=1).double().numpy().ravel()
        assert scipy.stats.kstest(draws, law.cdf).pvalue > 1e-3
        assert scipy.stats.kstest(1.2 * draws, law.cdf).pvalue < 1e-3  # negative control
    far = torch.tensor([[60.0]], dtype=F64)
    law = pairs[1][1]
    assert abs(float(pairs[1][0].log_prob(far)) - law.logpdf(60.0)) < 1e-3


@pytest.mark.parametrize("sde", [SDE, VP()], ids=type)
@pytest.mark.parametrize("name", TAILS)
def test_scale_mixture_scores_are_gradients(name, sde):
    model = TAILS[name]
    model = ScaleMixtureScore(model.weights, model.var, (3,), sde)
    t = torch.tensor([0.02, 0.3, 0.9], dtype=F64)
    x = rand(3, 3, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(x, t).sum(), x)
    torch.testing.assert_close(model.score(x.detach(), t), gradient, rtol=1e-9, atol=1e-9)
    alpha, sigma = (f(t)[:, None] for f in (sde.alpha, sde.sigma))
    want = (x + sigma**2 * gradient) / alpha
    torch.testing.assert_close(model.denoise(x, t), want, rtol=1e-6, atol=1e-8)


def test_draws_have_the_covariance():
    """By the flow backwards; 1.1 times them are refused."""
    noise = LearnedNoise(FIELD)
    n = 300
    r = noise.sample((n, *SHAPE), seed=1, dtype=F64)
    bound = 5 * math.sqrt(2 * n * M)
    assert abs(float(EXACT.chi2(r).sum()) - n * M) < bound
    assert abs(float(EXACT.chi2(1.1 * r).sum()) - n * M) > bound
    white = EXACT.whiten(r).reshape(n, M)
    gap = (white.T @ white / n - torch.eye(M, dtype=F64)) * math.sqrt(n)
    assert gap.abs().max() < 5.5 * math.sqrt(2)
    again = noise.sample((n, *SHAPE), seed=1, dtype=F64)
    torch.testing.assert_close(r, again)
    assert noise.sample(SHAPE, seed=1).shape == SHAPE
    assert noise.sample(SHAPE, seed=1).dtype == torch.float32


def test_draws_of_heavy_tails_and_a_gaussian_part():
    model = TAILS["student"]
    noise = LearnedNoise(model) + GaussianNoise(std=0.5)
    draws = noise.sample((200, *SHAPE), seed=2, dtype=F64).flatten().numpy()
    reference = model.sample(200, seed=3).double() + 0.5 * rand(200, *SHAPE, seed=4)
    assert scipy.stats.ks_2samp(draws, reference.flatten().numpy()).pvalue > 1e-3
    bare = model.sample(200, seed=3).double().flatten().numpy()
    assert scipy.stats.ks_2samp(draws, bare).pvalue < 1e-3  # negative control


# gradients -------------------------------------------------------------------------------------


def differences(function, x, step=1e-4):
    """Central differences of function (B,) in every element of x (1, ...)."""
    eye = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape[1:])
    return torch.cat([(function(x + step * e) - function(x - step * e)) / (2 * step) for e in eye])


class Squares(Operator):
    """x -> x + x^2/4: a nonlinear model of the data."""

    def __call__(self, x):
        return x + 0.25 * x.square()

    def output_shape(self, input_shape):
        return tuple(input_shape)

    def __repr__(self):
        return "Squares()"


def test_the_gradient_in_x_is_that_of_the_density():
    """-J^T s(y - A x) for a nonlinear A, by finite differences of the flow's log p, in float64."""
    model = TAILS["outliers"].with_shape((1, 2, 2))
    noise = LearnedNoise(model, temperature=0.1, steps=48) + GaussianNoise(std=0.3)
    like = Likelihood(rand(1, 2, 2, seed=1), Squares(), noise)
    x = rand(1, 1, 2, 2, seed=2)
    got = like.score(x)
    torch.testing.assert_close(differences(like.log_prob, x), got.flatten(), rtol=1e-3, atol=1e-3)
    leaf = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(like.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(auto, got, rtol=1e-9, atol=1e-9)
    wrong = Likelihood(like.y, Squares(), GaussianNoise(var=noise.variance)).score(x)
    assert (wrong - got).abs().max() > 0.1  # negative control


def test_the_likelihood_score_of_correlated_noise():
    psf = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.5, 0.2], [0.0, 0.1, 0.0]], dtype=F64)
    y, x = rand(*SHAPE, seed=1), rand(2, *SHAPE, seed=2)
    learned = Likelihood(y, Convolve(psf), LearnedNoise(FIELD))
    exact = Likelihood(y, Convolve(psf), EXACT)
    torch.testing.assert_close(learned.score(x), exact.score(x), rtol=1e-8, atol=1e-8)
    white = Likelihood(y, Convolve(psf), GaussianNoise(var=float(POWER.mean())))
    assert (white.score(x) - exact.score(x)).abs().max() > 0.5  # negative control


# Gaussian parts --------------------------------------------------------------------------------


def test_a_white_part_is_exact():
    """Outliers, broadened by exactly its variance."""
    model, extra = TAILS["outliers"], 0.6
    noise = LearnedNoise(model, steps=24) + GaussianNoise(std=extra)
    broad = ScaleMixtureScore(model.weights, model.var + extra**2, SHAPE, SDE)
    r = broad.sample(3, 1).double()
    leaf = r.clone().requires_grad_()
    value = broad.log_prob(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(noise.score(r), gradient, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(noise.log_prob(r), value.detach(), rtol=0, atol=5e-3)
    assert (LearnedNoise(model).score(r) - gradient).abs().max() > 0.3  # negative control
    torch.testing.assert_close(noise.variance, torch.tensor(model.variance + extra**2, dtype=F64))


def test_a_map_of_variances_over_independent_pixels():
    """Exact but for the interpolation, which falls with the square of the levels."""
    model = TAILS["outliers"]
    var = torch.exp(2 * rand(*SHAPE, seed=5))
    r = 2 * rand(3, *SHAPE, seed=6)

    def exact(leaf):
        total = model.var + var[..., None]
        terms = model.weights.log() - 0.5 * (
            leaf[..., None].square() / total + total.log() + math.log(2 * math.pi)
        )
        return terms.logsumexp(-1).flatten(1).sum(1)

    leaf = r.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact(leaf).sum(), leaf)
    errors = []
    for levels in (8, 16, 32):
        noise = LearnedNoise(model, levels=levels) + GaussianNoise(var=var)
        errors.append(float((noise.score(r) - gradient).abs().max() / gradient.abs().max()))
    assert errors[0] < 0.06 and errors[2] < 0.006
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]
    noise = LearnedNoise(model, levels=32, steps=24) + GaussianNoise(var=var)
    torch.testing.assert_close(noise.log_prob(r), exact(r), rtol=0, atol=0.1)
    flat = LearnedNoise(model, steps=24) + GaussianNoise(var=var.mean())
    assert ((flat.log_prob(r) - exact(r)).abs() > 0.5).all()  # negative control
    per_row = GaussianNoise(var=torch.stack([var, 2 * var, var]))
    rows = LearnedNoise(model, levels=32) + per_row
    torch.testing.assert_close(rows.score(r)[[0, 2]], noise.score(r)[[0, 2]])
    chosen = rows.select(torch.tensor([1]), SHAPE)
    torch.testing.assert_close(chosen.score(r[1:2]), rows.score(r)[1:2])


def test_a_power_spectrum_over_stationary_gaussian_noise():
    """Exact for any two spectra but for the interpolation."""
    extra = 3 * spectrum(3, 4, slope=2.0) + 0.01
    want = GaussianNoise(power=POWER + extra)
    r = want.sample((3, *SHAPE), 1, F64)
    errors = []
    for levels in (8, 32):
        noise = LearnedNoise(FIELD, levels=levels, steps=24) + GaussianNoise(power=extra)
        gap = noise.score(r) - want.score(r)
        errors.append(float(gap.abs().max() / want.score(r).abs().max()))
    assert errors[0] < 0.05 and errors[1] < 0.1 * errors[0]
    torch.testing.assert_close(noise.log_prob(r), want.log_prob(r), rtol=0, atol=0.05)
    torch.testing.assert_close(noise.surrogate(SHAPE).score(r), want.score(r), rtol=1e-6, atol=1e-6)
    white = LearnedNoise(FIELD) + GaussianNoise(var=extra.mean())
    assert (white.score(r) - want.score(r)).abs().max() > 0.1  # negative control


def test_matched_temperatures_add_up():
    """score_with: white on white, modes on white, and the mean of modes on a map."""
    r = rand(2, *SHAPE, seed=3)
    noise = LearnedNoise(FIELD, levels=48) + GaussianNoise(var=0.2)
    got = noise.score_with(r, Perturbation.white(0.3))
    want = GaussianNoise(power=POWER + 0.5).score(r)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    modes = 2 * spectrum(3, 4, 1.5)
    got = noise.score_with(r, Perturbation(modes, spectral=True))
    want = GaussianNoise(power=POWER + 0.2 + modes).score(r)
    torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    # hotter than the model goes, it is Gaussian
    got = noise.score_with(r, Perturbation.white(1e6))
    torch.testing.assert_close(got, -r / 1e6, rtol=1e-3, atol=0)
    batch = noise.score_with(
        r, Perturbation(torch.tensor([0.3, 1.3], dtype=F64).reshape(2, 1, 1, 1))
    )
    alone = noise.score_with(r[1:], Perturbation.white(1.3))
    torch.testing.assert_close(batch[1:], alone, rtol=1e-9, atol=1e-9)


def test_masked_data():
    """Infinite variance: no score, no count, whatever they hold."""
    model = TAILS["laplace"]
    gone = torch.zeros(SHAPE, dtype=torch.bool)
    gone[0, 1, 2:] = True
    var = torch.where(gone, torch.inf, 0.04).double()
    noise = LearnedNoise(model, steps=24) + GaussianNoise(var=var)
    broad = ScaleMixtureScore(model.weights, model.var + 0.04, (1,), SDE)
    r = rand(2, *SHAPE, seed=4)
    want = broad.log_prob(r[:, ~gone].reshape(-1, 1)).reshape(2, -1).sum(1)
    for junk in (0.0, 1e3, math.nan):
        r[:, gone] = junk
        assert (noise.score(r)[:, gone] == 0).all() and noise.score(r).isfinite().all()
        torch.testing.assert_close(noise.log_prob(r), want, rtol=0, atol=0.01)
    assert noise.ndata(SHAPE) == M - 2
    assert (noise.sample((2, *SHAPE), 0)[:, gone] == 0).all()
    assert Likelihood(r[0], Identity(), noise).ndata == M - 2


def test_units_and_offsets():
    """Residuals in the units of the data; a mean that is not zero is part of the noise."""
    model = TAILS["outliers"].with_affine(1e-3, 0.2)
    noise = LearnedNoise(model, steps=24)
    u = TAILS["outliers"].sample(2, 1).double()
    r = 1e-3 * u + 0.2
    plain = LearnedNoise(TAILS["outliers"], steps=24)
    torch.testing.assert_close(1e-3 * noise.score(r), plain.score(u), rtol=1e-6, atol=1e-6)
    shift = M * math.log(1e3)
    torch.testing.assert_close(noise.log_prob(r), plain.log_prob(u) + shift, rtol=1e-6, atol=1e-5)
    draws = noise.sample((50, *SHAPE), 0, F64)
    assert abs(float(draws.mean()) - 0.2) < 5 * 1e-3 * math.sqrt(model.variance / draws.numel())


def test_entries_do_not_see_each_other():
    noise = LearnedNoise(TAILS["laplace"], steps=8, nodes=33)
    r, other = rand(3, *SHAPE, seed=1), rand(3, *SHAPE, seed=2)
    torch.testing.assert_close(noise.log_prob(r)[1:2], noise.log_prob(r[1:2]))
    torch.testing.assert_close(
        noise.log_ratio(r, other)[0][1:2], noise.log_ratio(r[1:2], other[1:2])[0]
    )


def test_the_line_refines_only_where_needed():
    calls = []

    def score(r, ids):
        calls.append(len(r))
        return torch.where(ids[:, None] == 1, -torch.sign(r), -r)

    start, end = torch.tensor([[1.0], [1.0]], dtype=F64), torch.tensor([[2.0], [-0.3]], dtype=F64)
    value, error = integral_between(score, start, end, most=16)
    assert calls == [10, 4, 8]
    torch.testing.assert_close(value[0], torch.tensor(-1.5, dtype=F64))
    assert error[0] < 1e-12 and abs(float(value[1]) - 0.7) <= float(error[1])


def test_joint_data():
    parts = [LearnedNoise(FIELD, steps=24), GaussianNoise(std=2.0)]
    noise = BlockNoise(parts, [SHAPE, (3,)])
    assert not noise.is_gaussian and noise.surrogate((M + 3,)).is_gaussian
    r, other = rand(2, M + 3, seed=1), rand(2, M + 3, seed=2)
    exact = BlockNoise([EXACT, parts[1]], [SHAPE, (3,)])
    torch.testing.assert_close(noise.score(r), exact.score(r), rtol=1e-7, atol=1e-7)
    got, want = noise.log_ratio(r, other)[0], exact.log_ratio(r, other)[0]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    both = Likelihood(rand(*SHAPE), Identity(), parts[0]) + Likelihood(
        rand(*SHAPE), Identity(), parts[1]
    )
    assert both.score(rand(2, *SHAPE)).shape == (2, *SHAPE)


# sizes -----------------------------------------------------------------------------------------


def correlation(side, length):
    """A covariance of pixels side x side that falls with distance, not periodic."""
    place = torch.arange(side, dtype=F64)
    line = torch.exp(-0.5 * ((place[:, None] - place) / length) ** 2)
    return torch.kron(line, line) + 0.3 * torch.eye(side**2, dtype=F64)


def test_tiles_against_the_whole_image():
    """A field of known covariance: the score of 32 pixels from tiles of 16, the closer the more they overlap."""
    whole = GaussianScore(torch.zeros(1, 32, 32, dtype=F64), cov=correlation(32, 1.0), sde=SDE)
    tile = GaussianScore(torch.zeros(1, 16, 16, dtype=F64), cov=correlation(16, 1.0), sde=SDE)
    r = whole.sample(4, 1)
    want = LearnedNoise(whole).score(r)
    errors = []
    for overlap in (0, 8, 12, 14):
        got = LearnedNoise(TiledScore(tile, (1, 32, 32), overlap)).score(r)
        errors.append(float((got - want).abs().max() / want.std()))
    assert errors[0] > 0.3  # negative control: tiles side by side
    assert errors[0] > 20 * errors[1] > 100 * errors[2] and errors[3] < 1e-3
    default = LearnedNoise(tile).score(r)  # overlaps by half a tile on its own
    assert float((default - want).abs().max() / want.std()) == pytest.approx(errors[1])
    odd = TiledScore(tile, (1, 37, 23), 8).score(rand(2, 1, 37, 23), COLD)
    assert odd.shape == (2, 1, 37, 23) and odd.isfinite().all()


def network(size=16):
    net = build_network(
        {"kind": "unet", "channels": 1, "patch": 1, "widths": [8, 8], "blocks": [1, 1]}
    )
    torch.manual_seed(0)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return NetworkScore(net, SDE, (1, size, size), 0.5, card={"noise_std": 0.5})


def test_networks_take_any_size():
    """By their own convolutions where the stride allows, in two overlapping tiles an axis where it does not."""
    model = network()
    assert isinstance(fitted(model, (1, 20, 22)), NetworkScore)
    odd = fitted(model, (1, 21, 22))
    assert isinstance(odd, TiledScore) and odd.model.shape == (1, 20, 22)
    t = torch.tensor(0.3, dtype=F64)
    x = torch.randn(2, 1, 21, 22, generator=torch.Generator().manual_seed(1))
    got = odd.score(x, t)
    top = odd.model.score(x[..., :20, :], t)
    torch.testing.assert_close(got[..., :10, :], top[..., :10, :], rtol=1e-4, atol=1e-5)
    noise = LearnedNoise(model)
    assert noise.blur == pytest.approx(0.05)  # a tenth of the noise
    for shape in ((1, 21, 22), (16, 16)):
        assert noise.score(torch.zeros(2, *shape)).shape == (2, *shape)
    assert noise.sample((2, 1, 18, 20), 0).shape == (2, 1, 18, 20)
    with pytest.raises(ValueError, match="divisible"):
        noise.score(torch.zeros(2, 1, 1, 16))


def test_a_network_without_a_card_is_measured():
    model = network(8)
    model.card = {}
    noise = LearnedNoise(model, steps=8)
    assert 0.01 < noise.own_variance < 10 and noise.blur > SDE.sigma_min
    assert LearnedNoise(model, surrogate=GaussianNoise(std=2.0)).own_variance == pytest.approx(4)


# errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LearnedNoise(FIELD, levels=1), "expected at least 2 levels"),
        (lambda: LearnedNoise(FIELD, nodes=6), "nodes"),
        (lambda: LearnedNoise(FIELD, temperature=0.0), "positive"),
        (lambda: LearnedNoise(FIELD.with_affine(torch.ones(SHAPE) + POWER)), "scale differs"),
        (lambda: LearnedNoise(FIELD) + GaussianNoise(cov=torch.eye(M)), "dense covariance"),
        (lambda: LearnedNoise(FIELD) + GaussianNoise(std=1.0) + GaussianNoise(std=1.0), "already"),
        (lambda: LearnedNoise(FIELD).check((1, 2, 3, 4)), "expected the same but"),
        (lambda: LearnedNoise(FIELD).score(torch.zeros(1, 1, 3, 3)), "smaller than a tile"),
        (lambda: TiledScore(FIELD, (1, 8, 8), overlap=3), "expected 0 to 2"),
        (lambda: TiledScore(FIELD, (2, 8, 8)), "same axes"),
        (lambda: ScaleMixtureScore(torch.ones(2), torch.ones(3), (1,), SDE), r"\(K,\)"),
        (lambda: ScaleMixtureScore(torch.ones(2), torch.zeros(2), (1,), SDE), "positive variances"),
        (lambda: ScaleMixtureScore.student_t(1.0, 1.0, (1,), SDE), "at least 2"),
        (lambda: ScaleMixtureScore.outliers(1.0, (1,), SDE, share=1.0), "share"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_covariance_is_not_pretended():
    """What needs one says that there is none."""
    with pytest.raises(NotImplementedError, match="no covariance"):
        LearnedNoise(FIELD).whiten(torch.zeros(1, *SHAPE))


def test_mixtures_of_images_are_noise_too():
    """Any score model: here two kinds of frames."""
    means = torch.stack([torch.full((2,), -1.0), torch.full((2,), 1.0)]).double()
    model = GaussianMixtureScore(means, torch.tensor([0.3, 0.7]), 0.04, SDE)
    noise = LearnedNoise(model, steps=160)
    r = rand(4, 2, seed=1)
    torch.testing.assert_close(noise.log_prob(r), model.log_prob(r, COLD), rtol=0, atol=0.05)
