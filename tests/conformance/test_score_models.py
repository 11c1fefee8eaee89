"""What every score model must pass; a new one is added to CASES and nowhere else.

The checks are functions of a model, so that the end of this file can show that each of them rejects a
model that is broken in its own way.
"""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from diffpost.guidance import DPS, Convolved, MomentMatching, PiGDM
from diffpost.instrument import Counter, counted
from diffpost.likelihood import Likelihood
from diffpost.networks import UNet
from diffpost.networks.precondition import NetworkScore
from diffpost.networks.score_models import SigmaHeadScore
from diffpost.noise import GaussianNoise
from diffpost.operator import Mask
from diffpost.posterior import Posterior
from diffpost.score import GaussianMixtureScore, GaussianScore, ScoreModel
from diffpost.sde import EDM, SDE, TSVE, VE, VP

BATCH = 4
NSR = (0.03, 0.3, 1.5, 8.0)


def generator():
    return torch.Generator().manual_seed(7)


def even_power(*shape):
    power = torch.rand(shape, generator=generator(), dtype=torch.float64) + 0.1
    return 0.5 * (power + power.flip(-2, -1).roll((1, 1), (-2, -1)))


def gaussian(kind, shape=(2, 4, 5)):
    def build(sde, dtype):
        mean = torch.randn(shape, generator=generator(), dtype=torch.float64).to(dtype)
        if kind == "var":
            return GaussianScore(mean, var=mean.abs() + 0.1, sde=sde)
        if kind == "scalar":
            return GaussianScore(mean, var=0.4, sde=sde)
        if kind == "power":
            return GaussianScore(mean, power=even_power(*shape[-2:]), sde=sde)
        d = mean.numel()
        root = torch.randn(d, d, generator=generator(), dtype=torch.float64) / math.sqrt(d)
        return GaussianScore(mean, cov=root @ root.T, sde=sde)

    return build


def mixture(var_shape, shape=(1, 3, 4), components=5):
    def build(sde, dtype):
        g = generator()
        means = 2 * torch.randn(components, *shape, generator=g, dtype=torch.float64)
        weights = torch.rand(components, generator=g, dtype=torch.float64)
        var = 0.1 + torch.rand(var_shape, generator=g, dtype=torch.float64)
        return GaussianMixtureScore(means.to(dtype), weights, var, sde)

    return build


def network(sde, dtype):
    net = UNet(widths=(8, 16), blocks=(1, 1), embedding=16).to(dtype)
    g = generator()
    for parameter in net.parameters():  # as if trained: the last layer starts at zero
        nn.init.normal_(parameter, std=0.1, generator=g)
    return NetworkScore(net, sde, (1, 8, 8), 0.5, scale=3.0, offset=-1.0)


class Head(nn.Module):
    """A network called as score_models calls its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 1, 1, 3, 3, generator=generator()) / 3)

    def forward(self, t, x):
        hidden = torch.tanh(
            nn.functional.conv2d(x, self.weight[0], padding=1) + t.reshape(-1, 1, 1, 1)
        )
        return nn.functional.conv2d(hidden, self.weight[1], padding=1) - x / (1 + x**2)


def sigma_head(sde, dtype):
    return SigmaHeadScore(Head().to(dtype), sde, (1, 5, 6))


def watched(sde, dtype):
    return counted(gaussian("power")(sde, dtype), Counter())


def posterior(prior, guidance):
    def build(sde, dtype):
        model = prior(sde, dtype)
        operator = Mask(torch.rand(model.shape, generator=generator()).gt(0.3).to(dtype))
        y = torch.randn(model.shape, generator=generator(), dtype=torch.float64).to(dtype)
        return Posterior(model, Likelihood(y, operator, GaussianNoise(std=0.5)), guidance)

    return build


@dataclasses.dataclass(frozen=True)
class Case:
    """A score model.

    Attributes:
        build: of a process and a dtype.
        symmetric: whether J is symmetric, as it is for the denoiser of a distribution; networks and
            guidances only come near one.
    """

    build: Callable[[SDE, torch.dtype], ScoreModel]
    symmetric: bool = True


CASES = {
    "Gaussian var": Case(gaussian("var")),
    "Gaussian scalar var": Case(gaussian("scalar")),
    "Gaussian vector": Case(gaussian("var", (7,))),
    "Gaussian power": Case(gaussian("power")),
    "Gaussian cov": Case(gaussian("cov")),
    "mixture": Case(mixture(())),
    "mixture var (K,)": Case(mixture((5,))),
    "mixture var (K, shape)": Case(mixture((5, 1, 3, 4))),
    "mixture vector": Case(mixture((), (6,))),
    "network": Case(network, symmetric=False),
    "sigma head": Case(sigma_head, symmetric=False),
    "counted": Case(watched),
    "posterior Convolved": Case(posterior(mixture(()), Convolved()), symmetric=False),
    "posterior DPS": Case(posterior(mixture(()), DPS()), symmetric=False),
    "posterior PiGDM": Case(posterior(mixture(()), PiGDM()), symmetric=False),
    "posterior MomentMatching": Case(
        posterior(mixture(()), MomentMatching(tol=1e-12, max_iter=100)), symmetric=False
    ),
}
PROCESSES = {"EDM": EDM(), "VE": VE(), "VP": VP(), "TSVE": TSVE(beta=4.0, t_star=0.4)}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_process = pytest.mark.parametrize("sde", PROCESSES.values(), ids=PROCESSES.keys())


def inputs(model, dtype=torch.float64, seed=0):
    """A batch from p_t at four noise levels: x, t (B,) and two directions."""
    g = torch.Generator().manual_seed(seed)
    x0, z, v, w = torch.randn(4, BATCH, *model.shape, generator=g, dtype=torch.float64)
    t = model.sde.t_of_nsr(torch.tensor(NSR, dtype=torch.float64))
    return model.sde.perturb(x0, t, z).to(dtype), t, v.to(dtype), w.to(dtype)


def inner(a, b):
    return (a * b).flatten(1).sum(1)


def assert_close(a, b, tolerance):
    """Entries agree to `tolerance` of the largest value in each entry of the batch."""
    scale = b.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (b.ndim - 1))
    assert bool(torch.isfinite(a).all()), "not finite"
    worst = float(((a - b).abs() / scale).max())
    assert worst < tolerance, f"relative difference {worst:.2g}, allowed {tolerance:.2g}"


def answers(model, x, t, v):
    denoised, vjp = model.denoise_vjp(x, t)
    again, jvp = model.denoise_jvp(x, t)
    return {
        "denoise": model.denoise(x, t),
        "score": model.score(x, t),
        "denoised of the vjp": denoised,
        "vjp": vjp(v),
        "denoised of the jvp": again,
        "jvp": jvp(v),
    }


def check_shapes_and_dtypes(model):
    for dtype in (torch.float32, torch.float64):
        x, t, v, _ = inputs(model, dtype)
        before = x.clone()
        for time in (t, t[1], t.float(), t[1].float()):
            for name, value in answers(model, x, time, v).items():
                assert value.shape == x.shape, f"{name}: {tuple(value.shape)}"
                assert value.dtype == dtype, f"{name}: {value.dtype} of x in {dtype}"
                assert value.device == x.device and not value.requires_grad, name
                assert bool(torch.isfinite(value).all()), f"{name} is not finite"
        assert torch.equal(x, before), "x was changed"
        with pytest.raises(ValueError, match="expected"):
            model.denoise(x, t[:2])
    one, t, v, _ = (a[:1] for a in inputs(model))
    for name, value in answers(model, one, t, v).items():
        assert value.shape == one.shape, f"{name} of a batch of one"


def check_a_scalar_time_is_the_same_time_for_all(model):
    x, t, v, _ = inputs(model)
    for level in t:
        same = answers(model, x, level.expand(BATCH), v)
        for name, value in answers(model, x, level, v).items():
            assert_close(value, same[name], 1e-9)


def check_entries_are_independent(model):
    """Alone, among others, and among neighbours that are absurd, an entry has the same answer."""
    x, t, v, _ = inputs(model)
    together = answers(model, x, t, v)
    for b in range(BATCH):
        part = slice(b, b + 1)
        alone = answers(model, x[part], t[part], v[part])
        absurd_x, absurd_v = torch.full_like(x, 1e4), torch.full_like(v, -1e4)
        absurd_x[b], absurd_v[b] = x[b], v[b]
        crowded = answers(model, absurd_x, t, absurd_v)
        for name, value in together.items():
            assert_close(value[part], alone[name], 1e-9)
            assert_close(crowded[name][part], alone[name], 1e-9)


def check_tweedie(model):
    x, t, _, _ = inputs(model)
    score, denoised = model.score(x, t), model.denoise(x, t)
    alpha, sigma = (
        f(t).reshape(-1, *[1] * (x.ndim - 1)) for f in (model.sde.alpha, model.sde.sigma)
    )
    # Compared in x, since (alpha D - x)/sigma^2 cancels at small sigma.
    assert_close(alpha * denoised - sigma**2 * score, x, 1e-10)


def check_products_are_those_of_the_jacobian(model):
    """By central differences, whose error is of order step^2 = 1e-10, and by the dot test."""
    x, t, v, w = inputs(model)
    size = model.sde.sigma(t).reshape(-1, *[1] * (x.ndim - 1))
    step = 1e-5 * size
    slope = (model.denoise(x + step * w, t) - model.denoise(x - step * w, t)) / (2 * step)
    denoised, vjp = model.denoise_vjp(x, t)
    again, jvp = model.denoise_jvp(x, t)
    expected = model.denoise(x, t)
    assert_close(denoised, expected, 1e-10)
    assert_close(again, expected, 1e-10)
    assert_close(jvp(w), slope, 1e-5)
    left, right = inner(vjp(v), w), inner(v, jvp(w))
    size = inner(v.abs(), jvp(w).abs())
    assert float(((left - right) / size).abs().max()) < 1e-9, "the dot test fails"
    # Callable again, with another vector, after which the first answer still holds.
    first = vjp(v)
    assert_close(vjp(2 * w + v) - 2 * vjp(w), first, 1e-9)
    assert_close(vjp(v), first, 1e-12)


def check_the_jacobian_is_symmetric(model):
    x, t, v, w = inputs(model)
    _, vjp = model.denoise_vjp(x, t)
    left, right = inner(vjp(v), w), inner(v, vjp(w))
    assert float(((left - right) / inner(v.abs(), vjp(w).abs())).abs().max()) < 1e-9
    assert bool((inner(vjp(v), v) > 0).all()), "a covariance is positive"


def check_the_vjp_can_be_differentiated(model):
    """A posterior over this model, used as a prior, needs the derivative of <J(x)^T v, v> in x."""
    x, t, v, w = inputs(model)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((model.denoise_vjp(y, t)[1](v) * v).sum() + (0 * y).sum(), y)
    step = 1e-4 * model.sde.sigma(t).reshape(-1, *[1] * (x.ndim - 1))
    up, down = (inner(model.denoise_vjp(x + s * step * w, t)[1](v), v) for s in (1, -1))
    slope = (up - down) / (2 * step.flatten())
    scale = inner(v, v) / model.sde.sigma(t)
    assert float(((inner(gradient, w) - slope) / scale).abs().max()) < 1e-5


def check_units_and_selection(model):
    x, t, _, _ = inputs(model)
    scale = torch.full(model.shape[-1:], 2.5)
    other = model.with_affine(scale, -0.5)
    assert type(other) is type(model) and other.scale is scale and other.offset == -0.5
    assert model.scale is not scale
    torch.testing.assert_close(other.to_physical(x), 2.5 * x - 0.5)
    torch.testing.assert_close(other.to_model(other.to_physical(x)), x)
    torch.testing.assert_close(model.to_model(model.to_physical(x)), x)
    assert other.to_physical(x.float()).dtype == torch.float32
    if not isinstance(model, Posterior):  # which sees its data, in physical units, anew
        assert_close(other.denoise(x, t), model.denoise(x, t), 1e-12)
    for bad in (0.0, math.nan, torch.zeros(model.shape), torch.ones(3, *model.shape)):
        with pytest.raises(ValueError, match="scale"):
            model.with_affine(bad)
    same = model.with_shape(model.shape)
    assert same.shape == model.shape
    torch.testing.assert_close(same.denoise(x, t), model.denoise(x, t), rtol=1e-12, atol=1e-12)
    assert model.rows is None
    part = model.select(torch.tensor([2, 0]))
    torch.testing.assert_close(
        part.denoise(x[[2, 0]], t[[2, 0]]), model.denoise(x, t)[[2, 0]], rtol=1e-9, atol=1e-9
    )


def check_float32_is_the_rounding_of_float64(model):
    x, t, v, _ = inputs(model)
    exact = answers(model, x, t, v)
    for name, value in answers(model, x.float(), t, v.float()).items():
        if name != "score":  # amplifies the rounding of x by 1/nsr
            assert_close(value.double(), exact[name], 1e-4)


def check_the_spectrum_of_the_jacobian(model):
    x, t, v, _ = inputs(model)
    spectrum = model.jacobian_spectrum(x, t)
    if spectrum is None:
        return
    product = torch.fft.ifft2(spectrum * torch.fft.fft2(v)).real
    assert_close(product, model.denoise_vjp(x, t)[1](v), 1e-9)


EVERYWHERE = [
    check_tweedie,
    check_products_are_those_of_the_jacobian,
    check_entries_are_independent,
    check_the_spectrum_of_the_jacobian,
]
ONCE = [
    check_shapes_and_dtypes,
    check_a_scalar_time_is_the_same_time_for_all,
    check_the_vjp_can_be_differentiated,
    check_units_and_selection,
    check_float32_is_the_rounding_of_float64,
]


@every_case
@every_process
@pytest.mark.parametrize("check", EVERYWHERE, ids=lambda f: f.__name__)
def test_in_every_process(case, sde, check):
    check(case.build(sde, torch.float64))


@every_case
@pytest.mark.parametrize("check", ONCE, ids=lambda f: f.__name__)
def test_in_one_process(case, check):
    check(case.build(EDM(), torch.float64))


@every_case
def test_symmetry(case):
    if not case.symmetric:
        pytest.skip("only the denoiser of a distribution has a symmetric Jacobian")
    check_the_jacobian_is_symmetric(case.build(VP(), torch.float64))


@every_case
def test_a_model_in_float32(case):
    model = case.build(EDM(), torch.float32)
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    check_shapes_and_dtypes(model)


class Broken(ScoreModel):
    """A Gaussian whose answers are wrong in one way."""

    def __init__(self, fault):
        self.exact = gaussian("scalar")(EDM(), torch.float64)
        self.fault = fault
        self.sde, self.shape = self.exact.sde, self.exact.shape

    @property
    def dtype(self):
        return torch.float64

    @property
    def device(self):
        return torch.device("cpu")

    def denoise(self, x, t):
        denoised = self.exact.denoise(x, t)
        if self.fault == "norm over the batch":
            return denoised * (1 + 1e-3 * x.norm().tanh())
        if self.fault == "mean over the batch":
            return denoised + 1e-6 * x.mean(0)
        if self.fault == "dtype":
            return denoised.float()
        if self.fault == "time of the first":
            return self.exact.denoise(x, t.reshape(-1)[0])
        if self.fault == "not symmetric":
            return denoised + 0.1 * x.roll(1, -1)
        if self.fault == "negative":
            return -denoised
        if self.fault == "half precision inside" and x.dtype == torch.float32:
            return self.exact.denoise(x.bfloat16(), t).to(x.dtype)
        return denoised

    def score(self, x, t):
        score = super().score(x, t)
        return 1.001 * score if self.fault == "score" else score

    def denoise_vjp(self, x, t):
        if self.fault == "detached":  # J depends on x, and does not say so
            return self.exact.denoise(x, t), lambda v: x.detach() ** 2 * v
        denoised, vjp = super().denoise_vjp(x, t)
        if self.fault == "vjp":
            return denoised, lambda v: vjp(v).roll(1, -1)
        return denoised, vjp

    def jacobian_spectrum(self, x, t):
        spectrum = self.exact.jacobian_spectrum(x, t)
        return 1.001 * spectrum if self.fault == "spectrum" else spectrum

    def with_affine(self, scale, offset=0.0):
        if self.fault != "shared units":
            return super().with_affine(scale, offset)
        super().with_affine(scale, offset)
        self.scale, self.offset = scale, offset
        return self


@pytest.mark.parametrize(
    "fault,check",
    [
        ("norm over the batch", check_entries_are_independent),
        ("mean over the batch", check_entries_are_independent),
        ("time of the first", check_entries_are_independent),
        ("dtype", check_shapes_and_dtypes),
        ("score", check_tweedie),
        ("vjp", check_products_are_those_of_the_jacobian),
        ("not symmetric", check_the_jacobian_is_symmetric),
        ("negative", check_the_jacobian_is_symmetric),
        ("spectrum", check_the_spectrum_of_the_jacobian),
        ("shared units", check_units_and_selection),
        ("detached", check_the_vjp_can_be_differentiated),
        ("half precision inside", check_float32_is_the_rounding_of_float64),
    ],
)
def test_the_checks_reject_broken_models(fault, check):
    check(Broken("none"))
    with pytest.raises(AssertionError):
        check(Broken(fault))
