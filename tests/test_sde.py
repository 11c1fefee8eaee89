"""Forward processes against automatic differentiation, their own equations and score_models."""

import itertools
import json
import math

import pytest
import torch

from diffpost.sde import EDM, TSVE, VE, VP, as_time, expand, sde_from_dict

PROCESSES = [
    VE(),
    VE(sigma_min=1e-3, sigma_max=300.0, T=2.0, t_min=1e-3),
    VP(),
    VP(beta_min=0.5, beta_max=5.0, t_min=1e-3, t_max=2.0),
    VP(beta_min=2.0, beta_max=2.0),
    TSVE(),
    TSVE(sigma_min=1e-3, sigma_max=1e3, t_star=0.3, beta=8.0),
    TSVE(sigma_min=1e-3, sigma_max=1e3, t_star=0.3, beta=8.0, T=2.0),
    TSVE(sigma_min=1e-2, sigma_max=1e2, t_star=0.4, beta=5.0, ramp="silu"),
    TSVE(sigma_min=1e-2, sigma_max=1e2, t_star=0.4, beta=5.0, ramp="hardswish", sharpness=20.0),
    EDM(),
]
every_process = pytest.mark.parametrize("sde", PROCESSES, ids=repr)


def times(sde, n=41):
    """Inside the range, both ends included, but not on the kinks of a ramp."""
    t = torch.linspace(sde.t_min, sde.t_max, n, dtype=torch.float64)
    if isinstance(sde, TSVE):
        kinks = torch.tensor([-3.0, 0.0, 3.0]).double() / sde.sharpness + sde.t_star
        t = t[((t / sde.T)[:, None] - kinks).abs().min(1).values > 1e-6]
    return t


def derivative(f, t):
    t = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad((f(t) + 0 * t).sum(), t)
    return slope


@every_process
def test_derivatives_agree_with_autograd(sde):
    t = times(sde)
    torch.testing.assert_close(
        sde.log_alpha_dot(t), derivative(lambda s: sde.alpha(s).log(), t), rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(
        sde.sigma2_dot(t), derivative(lambda s: sde.sigma(s) ** 2, t), rtol=1e-10, atol=1e-14
    )
    f = derivative(lambda s: sde.alpha(s).log(), t)
    g2 = derivative(lambda s: sde.sigma(s) ** 2, t) - 2 * f * sde.sigma(t) ** 2
    torch.testing.assert_close(sde.diffusion(t) ** 2, g2, rtol=1e-9, atol=1e-14)
    x = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sde.drift(x, t), f[:, None] * x, rtol=1e-10, atol=1e-12)


@every_process
def test_drift_and_diffusion_generate_the_schedules(sde):
    """The moments of dx = f x dt + g dw obey m' = f m and V' = 2 f V + g^2; RK4 from t_min on."""
    one = torch.ones(1, 1, dtype=torch.float64)

    def slope(t, m, v):
        t = torch.tensor(t, dtype=torch.float64)
        f, g = float(sde.drift(one, t)), float(sde.diffusion(t))
        return f * m, 2 * f * v + g * g

    middle = 0.5 * (sde.t_min + sde.t_max)
    grid = torch.linspace(sde.t_min, middle, 601, dtype=torch.float64).tolist()
    start = torch.tensor(sde.t_min, dtype=torch.float64)
    variance = 0.7
    m = float(sde.alpha(start))
    v = float(sde.alpha(start) ** 2 * variance + sde.sigma(start) ** 2)
    for t, s in itertools.pairwise(grid):
        h = s - t
        a = slope(t, m, v)
        b = slope(t + h / 2, m + h / 2 * a[0], v + h / 2 * a[1])
        c = slope(t + h / 2, m + h / 2 * b[0], v + h / 2 * b[1])
        d = slope(s, m + h * c[0], v + h * c[1])
        m += h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
        v += h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
    end = torch.tensor(middle, dtype=torch.float64)
    # A jump of f inside an RK4 step, of the order of beta, costs that step its order.
    ramp = sde.ramp if isinstance(sde, TSVE) else None
    tolerance = {"relu": 3e-3, "hardswish": 3e-3}.get(ramp, 1e-8)
    assert m == pytest.approx(float(sde.alpha(end)), rel=tolerance)
    exact = float(sde.alpha(end) ** 2 * variance + sde.sigma(end) ** 2)
    assert v == pytest.approx(exact, rel=tolerance)


@every_process
def test_inversions_round_trip(sde):
    t = times(sde, 1001)
    torch.testing.assert_close(sde.t_of_nsr(sde.nsr(t)), t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sde.t_of_sigma(sde.sigma(t)), t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sde.nsr(t), sde.sigma(t) / sde.alpha(t), rtol=1e-9, atol=0)
    torch.testing.assert_close(sde.snr(t) * sde.nsr(t) ** 2, torch.ones_like(t))
    assert (sde.nsr(t).diff() > 0).all()


def test_inversions_are_accurate_at_small_noise():
    """The naive 1 - exp(-I) would leave four digits of sigma^2 at t = 1e-12."""
    sde = VP(t_min=1e-13)
    t = torch.tensor([1e-12], dtype=torch.float64)
    torch.testing.assert_close(sde.sigma(t) ** 2, 0.1 * t, rtol=1e-10, atol=0)
    torch.testing.assert_close(sde.t_of_sigma(sde.sigma(t)), t, rtol=1e-10, atol=0)
    torch.testing.assert_close(sde.t_of_nsr(sde.nsr(t)), t, rtol=1e-10, atol=0)
    naive = 1 - torch.exp(-0.1 * t)
    assert abs(float(naive / (0.1 * t)) - 1) > 1e-5


@pytest.mark.parametrize("ramp,beta", [("relu", 20.0), ("silu", 8.0), ("hardswish", 6.0)])
def test_sigma_that_does_not_increase_has_no_inverse(ramp, beta):
    sde = TSVE(sigma_min=1e-2, sigma_max=50.0, beta=beta, ramp=ramp)
    assert (sde.sigma(times(sde, 2001)).diff() < 0).any()
    with pytest.raises(ValueError, match="does not increase"):
        sde.t_of_sigma(torch.tensor(1.0, dtype=torch.float64))
    t = times(sde)
    torch.testing.assert_close(sde.t_of_nsr(sde.nsr(t)), t, rtol=1e-10, atol=1e-10)


def theirs(sde):
    foreign = pytest.importorskip("score_models.sde")
    if isinstance(sde, VE):
        return foreign.VESDE(sigma_min=sde.sigma_min, sigma_max=sde.sigma_max, T=sde.T)
    if isinstance(sde, VP):
        return foreign.VPSDE(beta_min=sde.beta_min, beta_max=sde.beta_max, T=sde.t_max)
    return foreign.TSVESDE(
        sigma_min=sde.sigma_min,
        sigma_max=sde.sigma_max,
        t_star=sde.t_star,
        beta=sde.beta,
        T=sde.T,
        beta_fn=sde.ramp,
        alpha=sde.sharpness,
    )


@pytest.mark.parametrize("sde", [s for s in PROCESSES if not isinstance(s, EDM)], ids=repr)
@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_schedules_are_those_of_score_models(sde, dtype, tolerance):
    other = theirs(sde)
    t = times(sde)
    if isinstance(sde, VP) and dtype == torch.float32:
        t = t[1:]  # at t_min score_models' sigma has lost half of its digits in float32
    mu, sigma = other.marginal_prob_scalars(t.to(dtype))
    torch.testing.assert_close(sde.alpha(t), mu.double(), rtol=tolerance, atol=0)
    # An exponent of up to 10 carries its own rounding into sigma.
    torch.testing.assert_close(sde.sigma(t), sigma.double(), rtol=3 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "sde", [s for s in PROCESSES if not isinstance(s, EDM) and s.t_max == 1.0], ids=repr
)
def test_drift_and_diffusion_are_those_of_score_models(sde):
    """At T = 1; at another T score_models' diffusions of VE and TSVE lack a factor of 1/sqrt(T)."""
    other = theirs(sde)
    t = times(sde)
    x = torch.randn(len(t), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(sde.drift(x, t), other.drift(t, x), rtol=1e-9, atol=1e-12)
    g = other.diffusion(t, x)[:, 0]
    torch.testing.assert_close(sde.diffusion(t), g, rtol=1e-9, atol=1e-12)


@every_process
def test_time_grid(sde):
    grid = sde.time_grid(20)
    assert grid.shape == (21,) and grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[0] == sde.t_max and grid[-1] == sde.t_min
    steps = sde.nsr(grid).log().diff()
    torch.testing.assert_close(steps, steps.mean().expand(20), rtol=1e-6, atol=0)

    karras = sde.nsr(sde.time_grid(20, rho=7)) ** (1 / 7)
    steps = karras.diff()
    torch.testing.assert_close(steps, steps.mean().expand(20), rtol=1e-6, atol=0)

    low, high = 0.05, 2.0
    part = sde.nsr(sde.time_grid(5, nsr_min=low, nsr_max=high))
    assert float(part[0]) == pytest.approx(high) and float(part[-1]) == pytest.approx(low)
    ends = sde.nsr(torch.tensor([sde.t_min, sde.t_max], dtype=torch.float64)).tolist()
    torch.testing.assert_close(sde.time_grid(1, *ends), sde.time_grid(1), rtol=1e-9, atol=0)


def test_time_grid_of_edm_is_that_of_karras():
    """Equation 5 with its published ends: 80, ..., 0.002."""
    n, rho, low, high = 18, 7, 0.002, 80.0
    i = torch.arange(n, dtype=torch.float64)
    expected = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    torch.testing.assert_close(EDM().time_grid(n - 1, rho=7), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 4, "rho": 0.0}, "positive"),
        ({"steps": 4, "nsr_max": 100.0}, "wider range"),
        ({"steps": 4, "nsr_min": 1e-9}, "wider range"),
        ({"steps": 4, "nsr_min": 0.0}, "wider range"),
        ({"steps": 4, "nsr_min": 2.0, "nsr_max": 1.0}, "nsr_min < nsr_max"),
        ({"steps": 4, "nsr_max": math.nan}, "nsr_min < nsr_max"),
    ],
)
def test_time_grid_refuses(arguments, words):
    with pytest.raises(ValueError, match=words):
        EDM().time_grid(**arguments)


@every_process
def test_dictionaries_round_trip_through_json(sde):
    again = sde_from_dict(json.loads(json.dumps(sde.to_dict())))
    assert again == sde and hash(again) == hash(sde) and type(again) is type(sde)


@pytest.mark.parametrize(
    "values,words",
    [
        ({"name": "Cosine"}, "expected 'VE', 'VP', 'TSVE' or 'EDM'"),
        ({}, "None"),
        ({"name": "EDM", "sigma": 3.0}, r"\['sigma'\]"),
        ({"name": "EDM", "sigma_min": 3.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
    ],
)
def test_dictionaries_that_are_no_process(values, words):
    with pytest.raises(ValueError, match=words):
        sde_from_dict(values)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VE(sigma_min=0.0),
        lambda: VE(sigma_min=2.0, sigma_max=1.0),
        lambda: VE(sigma_max=math.inf),
        lambda: VE(t_min=-0.1),
        lambda: VE(T=0.0),
        lambda: VP(beta_min=0.0),
        lambda: VP(beta_min=3.0, beta_max=1.0),
        lambda: VP(t_min=0.0),
        lambda: VP(t_min=1.0),
        lambda: TSVE(beta=-1.0),
        lambda: TSVE(t_star=math.nan),
        lambda: TSVE(ramp="tanh"),
        lambda: TSVE(sharpness=0.0),
        lambda: EDM(sigma_min=-1.0),
        lambda: EDM(sigma_min=math.nan),
    ],
)
def test_construction_refuses(build):
    with pytest.raises(ValueError, match="expected"):
        build()


@every_process
def test_perturb_and_the_dtype_of_schedules(sde):
    generator = torch.Generator().manual_seed(0)
    x0, z = torch.randn(2, 4, 1, 3, 3, generator=generator)
    t = sde.t_of_nsr(torch.tensor([0.05, 0.1, 1.0, 2.0], dtype=torch.float64))
    x = sde.perturb(x0, t, z)
    assert x.dtype == torch.float32 and x.shape == x0.shape
    for b in range(4):
        alone = sde.perturb(x0[b : b + 1], t[b], z[b : b + 1])
        torch.testing.assert_close(x[b : b + 1], alone)
        direct = float(sde.alpha(t[b])) * x0[b] + float(sde.sigma(t[b])) * z[b]
        torch.testing.assert_close(x[b], direct, rtol=1e-6, atol=1e-6)
    for f in (sde.alpha, sde.sigma, sde.nsr, sde.diffusion, sde.log_alpha_dot, sde.sigma2_dot):
        for dtype in (torch.float32, torch.float64):
            value = f(t.to(dtype))
            assert value.dtype == dtype and value.shape == (4,)
            assert f(t[0].to(dtype)).shape == ()


def test_expand_and_as_time():
    x = torch.zeros(3, 2, 5)
    assert expand(torch.ones(3, dtype=torch.float64), x).shape == (3, 1, 1)
    assert expand(torch.ones(3, dtype=torch.float64), x).dtype == torch.float32
    assert (expand(torch.tensor(2.0, dtype=torch.float64), x) * x).dtype == torch.float32
    for shape in [(1,), (2,), (3, 1)]:
        with pytest.raises(ValueError, match=r"expected \(\) or \(3,\)"):
            expand(torch.ones(shape), x)
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5, 0.5])):
        assert as_time(t, x).dtype == torch.float64
