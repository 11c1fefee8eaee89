"""The light of a lens: in words, its image against closed forms, its gradients."""

from __future__ import annotations

import math

import pytest
import torch
import yaml

pytest.importorskip("caustics", reason="caustics is not installed")

import diffpost as dp
from diffpost.physics import Grid, Lens, LensFamily, LensLight, lens_light, read_lens_model
from diffpost.physics import light_model as module

F64 = torch.float64
SIE = {
    "profile": "SIE",
    "x0": {"normal": [0, 0.05]},
    "q": 0.7,
    "phi": {"circular": math.pi},
    "Rein": 1,
}
SERSIC = {"profile": "Sersic", "q": 0.7, "phi": 0.4, "n": 2.0, "Re": 0.5, "flux": 100.0}
OPEN = {
    "profile": "Sersic",
    "x0": "main.x0",
    "y0": {"normal": [0, 0.05]},
    "q": {"uniform": [0.3, 1]},
    "phi": "main.phi",
    "n": {"uniform": [0.5, 6]},
    "Re": {"lognormal": [0.5, 0.3]},
    "flux": {"lognormal": [100, 1]},
}
POINT = {
    "profile": "Gaussian",
    "centre": "glow",
    "sigma": {"uniform": [0.1, 1]},
    "flux": {"uniform": [1, 9]},
}


def model(light, main=SIE):
    return read_lens_model({"mass": {"main": main}, "light": light})


def psf():
    axis = torch.arange(-3, 4, dtype=F64)
    kernel = torch.exp(-0.5 * axis**2)
    kernel = torch.outer(kernel, kernel)
    return kernel / kernel.sum()


def of(light, values, **grid):
    """Flux per pixel (ny, nx) of one light."""
    image = Grid(40, **({"pixel": 0.05, "oversample": 2} | grid))
    seen = LensLight(model(light).light, image)
    return seen.images({k: torch.tensor([v], dtype=F64) for k, v in values.items()})[0, 0]


# In words --------------------------------------------------------------------------------------


def test_the_example_of_the_module_is_read():
    text = module.__doc__.split("Sersic is")[0]
    spec = yaml.safe_load(
        "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    )
    found = model(spec["light"])
    own = ("bulge.q", "bulge.n", "bulge.Re", "bulge.flux", "point.flux")
    assert found.prior.names == ("main.x0", "main.phi", *own)
    assert set(found.light.names) == set(found.prior.names)
    bulge, point = found.light.parts
    assert bulge.values["x0"] == point.values["x0"] == "main.x0"
    assert bulge.values["y0"] == 0.0 and point.values["q"] == 1.0
    assert bulge.core == pytest.approx((0.0, 0.0, 0.1))
    held = found.light.held(dict.fromkeys(found.light.names, 0.5))
    assert held.names == () and held.parts[0].values["phi"] == 0.5


def test_a_tie_to_a_number_is_that_number():
    found = model({"glow": SERSIC | {"q": "main.q", "phi": 0.0, "y0": "main.y0"}})
    assert found.light.parts[0].values["q"] == 0.7
    assert found.prior.names == ("main.x0", "main.phi")


@pytest.mark.parametrize(
    ("light", "said"),
    [
        ([], "one mapping a component"),
        ({"glow": 3}, "expected `profile`, one of Sersic, Gaussian"),
        ({"glow": {"profile": "Sersci"}}, "did you mean 'Sersic'"),
        ({"glow": SERSIC | {"nn": 1}}, "no parameter 'nn'; did you mean 'n'"),
        ({"glow": {**SERSIC, "q": 1.4}}, "valid range is 0.0 to 1.0"),
        ({"glow": {**SERSIC, "n": {"normal": [4, 1]}}}, "bound it by within"),
        ({"glow": {**SERSIC, "n": {"unifrm": [1, 4]}}}, "did you mean 'uniform'"),
        ({"glow": {**SERSIC, "x0": "mian.x0"}}, "did you mean 'main.x0'"),
        ({"glow": {**SERSIC, "n": "main.phi"}}, "reaches from"),
        ({"glow": {**SERSIC, "x0": True}}, "expected a number"),
        ({"glow": {**SERSIC, "flux": float("nan")}}, "finite"),
        ({"glow": {k: v for k, v in SERSIC.items() if k != "flux"}}, "also takes flux"),
        ({"glow": {**SERSIC, "Ie": 1.0}}, "Ie and flux"),
        ({"glow": {**SERSIC, "centre": "mian"}}, "did you mean 'main'"),
        ({"glow": {**SERSIC, "centre": "main", "x0": 0.0}}, "centre and x0"),
        ({"glow": {**SERSIC, "angle_system": "polar"}}, "Sersic of caustics says"),
        ({"glow": {**SERSIC, "s": -1}}, "0 or more"),
        ({"main": SERSIC}, "main_light"),
        ({"source": SERSIC}, "source_light"),
    ],
)
def test_mistakes_are_named(light, said):
    with pytest.raises(ValueError, match=said):
        model(light)


def test_bad_grids_and_missing_values_are_told():
    light = model({"glow": OPEN}).light
    with pytest.raises(ValueError, match="a Grid"):
        LensLight(light, 40)
    with pytest.raises(ValueError, match=r"no value for main\.x0"):
        LensLight(light, Grid(8, pixel=0.1)).data({"glow.q": torch.ones(1)})
    lens = Lens(model({"glow": OPEN}).mass, Grid(8, pixel=0.1), Grid(8, pixel=0.1))
    with pytest.raises(ValueError, match="ends at the same data"):
        LensFamily(lens, light=LensLight(light, Grid(16, pixel=0.1)))


# Its image -------------------------------------------------------------------------------------


def test_a_gaussian_is_the_integral_over_pixels():
    found = of({"glow": {"profile": "Gaussian", "sigma": 0.2, "flux": 7.0}}, {"main.x0": 0.0})
    edge = (torch.arange(41, dtype=F64) - 20) * 0.05
    line = 0.5 * torch.erf(edge / (0.2 * math.sqrt(2))).diff()
    expected = 7.0 * torch.outer(line, line)
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-3 * float(expected.max()))
    finer = of(
        {"glow": {"profile": "Gaussian", "sigma": 0.2, "flux": 7.0}}, {"main.x0": 0.0}, oversample=8
    )
    torch.testing.assert_close(finer, expected, rtol=0, atol=2e-4 * float(expected.max()))


@pytest.mark.parametrize("system", ["q_phi", "e1_e2"])
@pytest.mark.parametrize("n", [0.5, 1.0, 2.0])
def test_the_flux_is_that_of_the_whole_profile(n, system):
    shape = (
        {"q": 0.7, "phi": 0.4}
        if system == "q_phi"
        else {"angle_system": system, "e1": 0.1, "e2": 0.05}
    )
    light = {"profile": "Sersic", "n": n, "Re": 0.1, "flux": 100.0, "x0": 0.013, **shape}
    found = of({"glow": light}, {"main.x0": 0.0})
    assert float(found.sum()) == pytest.approx(100.0, rel=5e-3)  # the rest lies outside


def test_ie_is_the_brightness_at_re_and_parts_add_up():
    round_ = {"profile": "Sersic", "n": 1.0, "Re": 0.525, "Ie": 3.0, "y0": 0.025}
    found = of({"glow": round_}, {"main.x0": 0.0}, oversample=4)
    # the middle of pixel [20, 9] is 0.525 arcsec left of (0, 0.025)
    assert float(found[20, 9]) == pytest.approx(3.0 * 0.05**2, rel=1e-3)
    both = of({"glow": round_, "more": SERSIC}, {"main.x0": 0.0}, oversample=4)
    more = of({"more": SERSIC}, {"main.x0": 0.0}, oversample=4)
    # pixels that are cut finer for one of them are so for both
    torch.testing.assert_close(both, found + more, rtol=1e-3, atol=0)


def test_the_cusp_of_n_4_is_integrated(monkeypatch):
    """The worst pixel about the middle, against 200 x 200 rays, for a middle that meets a ray of the grid and one that does not."""
    light = {**SERSIC, "n": 4.0, "Re": 1.0, "q": 1.0, "phi": 0.0}

    def worst():
        errors = []
        for x0 in (0.0125, 0.02):
            found = of({"glow": light | {"x0": x0, "y0": 0.0125}}, {"main.x0": 0.0})
            k = module.caustics.func.k_sersic(torch.tensor(4.0, dtype=F64))
            off = (torch.arange(200, dtype=F64) - 99.5) * 0.05 / 200
            x, y = torch.meshgrid(0.025 + off, 0.025 + off, indexing="xy")
            r = torch.hypot(x - x0, y - 0.0125)
            norm = 2 * math.pi * 4 * k.exp() * k**-8 * math.gamma(8)
            exact = (100 / norm * torch.exp(-k * (r**0.25 - 1))).mean() * 0.05**2
            errors.append(abs(float(found[20, 20] / exact) - 1))
        return max(errors)

    assert worst() < 5e-3
    monkeypatch.setattr(lens_light, "_FINER", 1)
    assert worst() > 5e-2


def test_gradients_in_all_parameters_and_in_parts(monkeypatch):
    """In float64 against central differences; parts that are traced again on the way back give the same."""
    light = LensLight(
        model({"glow": OPEN, "point": POINT}).light,
        Grid(24, pixel=0.1, oversample=2),
        dp.PixelBin(2) @ dp.Convolve(psf()),
    )
    order = (
        *("main.x0", "glow.y0", "glow.q", "main.phi", "glow.n", "glow.Re", "glow.flux"),
        *("point.sigma", "point.flux"),
    )
    assert set(light.names) == set(order)
    at = torch.tensor(
        [
            [0.013, -0.021, 0.7, 0.4, 2.2, 0.4, 90.0, 0.3, 4.0],
            [-0.03, 0.04, 0.5, 1.4, 1.1, 0.6, 50.0, 0.4, 6.0],
        ],
        dtype=F64,
    )
    probe = torch.randn(2, 1, 12, 12, dtype=F64, generator=torch.Generator().manual_seed(0))

    def along(theta):
        return (light.data(dict(zip(order, theta.unbind(1), strict=True))) * probe).sum((1, 2, 3))

    leaf = at.clone().requires_grad_()
    (slope,) = torch.autograd.grad(along(leaf).sum(), leaf)
    for i in range(at.shape[1]):
        step = torch.zeros_like(at)
        step[:, i] = 1e-6
        found = (along(at + step) - along(at - step)) / 2e-6
        torch.testing.assert_close(slope[:, i], found, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(lens_light, "_CHUNK", 500)
    torch.testing.assert_close(along(leaf), along(at), rtol=1e-12, atol=0)
    (again,) = torch.autograd.grad(along(leaf).sum(), leaf)
    torch.testing.assert_close(again, slope, rtol=1e-10, atol=1e-10)


def test_the_middle_has_a_gradient_where_it_meets_a_ray():
    light = LensLight(model({"glow": OPEN}).light, Grid(9, pixel=0.1))
    values = dict.fromkeys(light.names, 0.0) | {
        "glow.q": 0.7,
        "glow.n": 4.0,
        "glow.Re": 0.5,
        "glow.flux": 9.0,
    }
    leaf = {k: torch.tensor([v], dtype=F64, requires_grad=True) for k, v in values.items()}
    seen = light.data(leaf)
    slopes = torch.autograd.grad(seen.square().sum(), list(leaf.values()))
    assert all(bool(s.isfinite().all()) for s in slopes)


# In the family ---------------------------------------------------------------------------------


def test_a_family_adds_the_light_and_rejects_what_is_out_of_range():
    found = model({"glow": OPEN})
    grids = Grid(24, pixel=0.1), Grid(8, pixel=0.1)
    response = dp.Convolve(psf())
    light = LensLight(found.light, grids[0], response)
    family = LensFamily(Lens(found.mass, *grids), response, light=light)
    assert set(family.names) == set(found.prior.names)
    theta = found.prior.sample(3, seed=1)
    theta[1, found.prior.names.index("glow.n")] = 20.0
    values = found.prior.values(theta)
    y = torch.ones(1, 24, 24, dtype=F64)
    like = dp.parameters.ParametricLikelihood(y, family, dp.GaussianNoise(std=1.0))
    data = like.data(values)
    assert bool(data[1].isnan().all()) and bool(data[[0, 2]].isfinite().all())
    torch.testing.assert_close(data[[0, 2]], y - light.data(values)[[0, 2]])
    assert float(light.data(values)[0].sum()) > 0.5 * float(values["glow.flux"][0])
    x = torch.zeros(3, 1, 8, 8, dtype=F64)
    assert float(like.log_prob(values, x)[1].nan_to_num(nan=-math.inf)) == -math.inf
    bare = LensFamily(Lens(found.mass, *grids), response)
    assert bare.background(values) is None
