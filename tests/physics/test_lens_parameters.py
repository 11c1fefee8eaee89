"""Lenses with free parameters: batches of them, derivatives, names and ranges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffpost as dp
from diffpost.physics import Grid, lensing

caustics = pytest.importorskip("caustics", reason="pip install caustics")

F64 = torch.float64
COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
IMAGE, SOURCE = Grid(16, pixel=0.25, oversample=2), Grid(12, pixel=0.15)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def plane(t: float | None = None):
    """An elliptical lens in external shear; the centre is known, the rest free."""
    if t is None:
        main = caustics.SIE(COSMOLOGY, name="main", x0=0.0, y0=0.0)
    else:
        main = caustics.EPL(COSMOLOGY, name="main", x0=0.0, y0=0.0, t=t)
    shear = caustics.ExternalShear(COSMOLOGY, name="shear", x0=0.0, y0=0.0)
    return caustics.SinglePlane(COSMOLOGY, [main, shear], name="plane")


NAMES = ("main.q", "main.phi", "main.Rein", "shear.gamma_1", "shear.gamma_2")
ONE = torch.tensor([0.7, 0.4, 1.2, 0.05, -0.03], dtype=F64)
THREE = ONE + torch.tensor([[0.0], [0.02], [-0.03]], dtype=F64)


def free(mass=None, image: Grid = IMAGE, **options) -> dp.physics.Lens:
    return dp.physics.Lens(mass or plane(), image, SOURCE, **options)


def smooth(batch: int = 1) -> Tensor:
    """A source that is resolved, so that its derivatives are those of what it stands for."""
    x, y = SOURCE.coordinates()
    blobs = [torch.exp(-((x - 0.1 * b) ** 2 + (y + 0.15) ** 2) / 0.16) for b in range(1, batch + 1)]
    return torch.stack(blobs)[:, None]


# names -----------------------------------------------------------------------------------------------


def test_free_parameters_are_named_with_what_caustics_knows() -> None:
    """Redshifts, which an Einstein radius does not need, are not among them."""
    lens = free()
    assert lens.parameters == NAMES
    q, phi, radius, gamma, _ = lens.details
    assert (q.lower, q.upper, q.cyclic, q.value) == (0, 1, False, None)
    assert phi.cyclic and phi.unit == "radians" and phi.upper == pytest.approx(math.pi)
    assert radius.unit == "arcsec" and (radius.lower, radius.upper) == (0, math.inf)
    assert (gamma.lower, gamma.upper) == (-math.inf, math.inf)
    assert "main.q" in repr(lens)


def test_a_lens_alone_has_plain_names_and_values_that_caustics_holds() -> None:
    sie = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, phi=0.25, Rein=1.5)
    sie.Rein.to_dynamic()
    lens = free(sie)
    assert lens.parameters == ("Rein", "q") or lens.parameters == ("q", "Rein")
    assert {p.name: p.value for p in lens.details} == {"q": None, "Rein": 1.5}


def test_redshifts_that_matter_are_parameters() -> None:
    mass = caustics.NFW(COSMOLOGY, x0=0.0, y0=0.0, mass=1e13, c=6.0)
    lens = free(mass)
    assert set(lens.parameters) == {"z_l", "z_s"}
    with pytest.raises(ValueError, match="Redshifts that this mass needs were not given"):
        lens(smooth())
    far = lens.at({"z_l": 0.3, "z_s": 2.0})(smooth())
    assert (far - lens.at({"z_l": 0.3, "z_s": 0.5})(smooth())).abs().max() > 1e-3


def test_several_values_of_one_parameter_and_models_of_one_name() -> None:
    multipole = caustics.Multipole(COSMOLOGY, m=(3, 4), x0=0.0, y0=0.0, phi_m=(0.1, 0.2))
    assert free(multipole).parameters == ("a_m[0]", "a_m[1]")
    spheres = [caustics.SIS(COSMOLOGY, x0=0.0, y0=0.0) for _ in range(2)]
    assert free(spheres).parameters == ("SIS_1.Rein", "SIS_2.Rein")


def test_bands_may_share_parameters() -> None:
    first = caustics.SIE(COSMOLOGY, name="r", x0=0.0, y0=0.0)
    second = caustics.SIE(COSMOLOGY, name="g", x0=0.0, y0=0.0, q=first.q, phi=first.phi)
    lens = free([first, second])
    assert sorted(lens.parameters) == ["g.Rein", "r.Rein", "r.phi", "r.q"]
    params = lens.vector({"r.q": 0.7, "r.phi": 0.4, "r.Rein": 1.2, "g.Rein": 0.8})
    x = rand(1, 2, 12, 12)
    alone = caustics.SIE(COSMOLOGY, x0=0.0, y0=0.0, phi=0.4, q=torch.tensor(0.7, dtype=F64))
    want = free(alone).at(torch.tensor([0.8], dtype=F64))(x[:, 1:])
    torch.testing.assert_close(lens.at(params)(x)[:, 1:], want, rtol=1e-6, atol=1e-7)


def test_vectors_by_name() -> None:
    lens = free()
    by_name = dict(zip(reversed(NAMES), ONE.flip(0).tolist(), strict=True))
    torch.testing.assert_close(lens.vector(by_name), ONE)
    rows = lens.vector({**by_name, "main.q": torch.tensor([0.5, 0.6])})
    assert rows.shape == (2, 5) and rows[:, 0].tolist() == pytest.approx([0.5, 0.6])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({**dict.fromkeys(NAMES, 0.5), "main.g": 1.0}, "'main.g'. Did you mean 'main.q'"),
        ({"main.q": 0.5}, "no value for main.phi, main.Rein"),
        (ONE[:4], r"got parameters of shape \(4,\); expected \(5,\) or \(B, 5\)"),
        (ONE * torch.tensor([2.0, 1, 1, 1, 1]), "main.q = 1.4; expected a value from 0 to 1"),
        (THREE * torch.tensor([[1.0], [-1.0], [1.0]]), "entry 1 of the batch"),
        (ONE * torch.tensor([1, 1, 0.0, 1, 1]), "main.Rein = 0; expected a value above 0"),
        (
            ONE * torch.tensor([1, 1, 1, math.nan, 1]),
            "shear.gamma_1 = nan; expected a value finite",
        ),
    ],
)
@pytest.mark.parametrize("use", ["at", "render"])
def test_parameters_that_are_wrong(params, message: str, use: str) -> None:
    lens = free()
    with pytest.raises(ValueError, match=message):
        lens.at(params) if use == "at" else lens.render(smooth(), params)


def test_what_is_valid() -> None:
    lens = free()
    outside = torch.stack([ONE, ONE * 2, ONE + torch.tensor([0, 9.0, 0, 0, 0])])
    assert lens.valid(outside).tolist() == [True, False, True]  # an angle repeats


def test_a_lens_with_free_parameters_is_not_an_operator() -> None:
    lens = free()
    for call in (
        lambda: lens(smooth()),
        lambda: lens.adjoint(rand(1, 1, 16, 16)),
        lambda: (dp.Identity() @ lens)(smooth()),
        lambda: lens.at(),
        lambda: lens.render(smooth()),
    ):
        with pytest.raises(ValueError, match=r"5 free parameters .* Use lens.at\(params\)"):
            call()
    with pytest.raises(ValueError, match="4 sources and 3 vectors"):
        lens.render(smooth(4), THREE)
    with pytest.raises(ValueError, match="batch of 2; expected 3"):
        lens.at(THREE)(smooth(2))
    with pytest.raises(ValueError, match="expected 0 to 2"):
        lens.at(THREE).select(torch.tensor([3]))


# the two paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_each_entry_has_its_own_lens(interpolation: str) -> None:
    """at(params), render(source, params) and lenses with values agree, entry by entry."""
    lens = free(interpolation=interpolation)
    operator, x = lens.at(THREE), rand(3, 2, 12, 12)
    assert operator.batch == 3 and operator.output_shape((2, 12, 12)) == (2, 16, 16)
    y = operator(x)
    torch.testing.assert_close(lens.render(x, THREE), y)
    assert operator.dot_test((2, 12, 12)) < 1e-14
    matrices = operator.to_dense()
    for b, params in enumerate(THREE):
        single = lens.at(params)
        assert single.batch is None
        torch.testing.assert_close(single(x[b : b + 1]), y[b : b + 1])
        torch.testing.assert_close(single.to_dense(), matrices[b])
        mass = plane()
        for name, value in zip(NAMES, params, strict=True):
            part, parameter = name.split(".")
            model = mass.lenses[0] if part == "main" else mass.lenses[1]
            setattr(model, parameter, value)
            getattr(model, parameter).to_static()
        fixed = dp.physics.Lens(mass, IMAGE, SOURCE, interpolation=interpolation)
        torch.testing.assert_close(fixed(x[b : b + 1]), y[b : b + 1])
    assert (y[0] - lens.at(THREE[1])(x[:1])[0]).abs().max() > 1e-3
    assert operator.dense((1, 12, 12)) is None


def test_entries_are_selected_and_repeated() -> None:
    operator, x = free().at(THREE), rand(3, 1, 12, 12)
    y = operator(x)
    ids = torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(operator.select(ids)(x[ids]), y[ids])
    torch.testing.assert_close(operator.select(ids).adjoint(y[ids]), operator.adjoint(y)[ids])
    assert operator.select(torch.arange(3)) is operator
    bands = free([plane(), plane(1.25)])
    params = bands.vector(dict.fromkeys(bands.parameters, 0.5)).expand(2, -1)
    both = bands.at(params + torch.tensor([[0.0], [0.1]]))
    x = rand(2, 2, 12, 12)
    torch.testing.assert_close(both.select(ids[1:2])(x[:1]), both(x)[:1])
    assert both.to_dense().shape == (2, 2, 256, 144) and both.dot_test((2, 12, 12)) < 1e-14


def test_one_source_or_one_lens_serves_a_batch() -> None:
    lens, x = free(), rand(3, 1, 12, 12)
    torch.testing.assert_close(
        lens.render(x[:1], THREE), lens.at(THREE)(x[:1].expand(3, -1, -1, -1))
    )
    for params in (ONE, ONE[None]):
        torch.testing.assert_close(lens.render(x, params), lens.at(ONE)(x))


def test_large_images_are_traced_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, x = free(), smooth(3)

    def look() -> list[Tensor]:
        source, params = x.clone().requires_grad_(), THREE.clone().requires_grad_()
        image = lens.render(source, params)
        gradients = torch.autograd.grad(image.square().sum(), (source, params))
        return [
            image,
            *gradients,
            lens.at(THREE)(x),
            lens.flux_outside(image[0, 0], THREE),
            torch.func.grad(lambda p: lens.render(x, p).square().sum())(THREE),
        ]

    whole = look()
    monkeypatch.setattr(lensing, "_CHUNK", 1000)
    for part, want in zip(look(), whole, strict=True):
        torch.testing.assert_close(part, want)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_types_follow(dtype: torch.dtype) -> None:
    lens = free()
    x = smooth(3).to(dtype)
    assert lens.render(x, THREE).dtype == dtype
    assert lens.at(THREE.to(dtype))(x).dtype == dtype
    want = lens.render(smooth(3), THREE)
    torch.testing.assert_close(lens.render(x, THREE.to(dtype)).double(), want, rtol=1e-4, atol=1e-4)


# derivatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("slope", [None, 1.25])
def test_gradients_are_those_of_finite_differences(interpolation: str, slope: float | None) -> None:
    lens = free(plane(slope), interpolation=interpolation)
    v = rand(3, 1, 16, 16, seed=5)

    def value(source: Tensor, params: Tensor) -> Tensor:
        return (lens.render(source, params) * v).sum((1, 2, 3))

    source, params = smooth(3).requires_grad_(), THREE.clone().requires_grad_()
    by_source, by_params = torch.autograd.grad(value(source, params).sum(), (source, params))
    step = 1e-6
    for i in range(5):
        move = step * torch.eye(5, dtype=F64)[i]
        with torch.no_grad():
            want = (value(source, params + move) - value(source, params - move)) / (2 * step)
        torch.testing.assert_close(by_params[:, i], want, rtol=1e-6, atol=1e-6)
        # entries do not see each other's parameters, and a wrong derivative would be seen
        assert not torch.allclose(by_params[:, i], 1.001 * want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(by_source, lens.at(THREE).adjoint(v))


def test_transforms_of_torch() -> None:
    lens, x = free(), smooth()
    want = lens.render(x, THREE)
    torch.testing.assert_close(torch.func.vmap(lambda p: lens.render(x, p)[0])(THREE), want)
    forward = torch.func.jacfwd(lambda p: lens.render(x, p).flatten())(ONE)
    backward = torch.func.jacrev(lambda p: lens.render(x, p).flatten())(ONE)
    torch.testing.assert_close(forward, backward)
    many = torch.func.vmap(torch.func.grad(lambda p: lens.render(x, p).square().sum()))(THREE)
    rows = THREE.clone().requires_grad_()
    torch.testing.assert_close(
        many, torch.autograd.grad(lens.render(x, rows).square().sum(), rows)[0]
    )
    with pytest.raises(ValueError, match=r"use render\(source, params\)"):
        torch.func.vmap(lambda p: lens.at(p)(x))(THREE)


def test_products_differentiate_and_transform() -> None:
    operator, x = free().at(THREE), rand(3, 1, 12, 12)
    torch.testing.assert_close(torch.func.jvp(operator, (x,), (2 * x,))[1], 2 * operator(x))
    v = rand(3, 1, 16, 16)
    torch.testing.assert_close(torch.func.vjp(operator, x)[1](v)[0], operator.adjoint(v))
    many = torch.stack([x, 3 * x], 1)
    torch.testing.assert_close(
        torch.func.vmap(operator, in_dims=1, out_dims=1)(many),
        torch.stack([operator(x), 3 * operator(x)], 1),
    )
    source = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(operator(source).pow(3).sum(), source, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), source)
    want = operator.adjoint(6 * operator(x) * operator(torch.ones_like(x)))
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("profile", ["SIE", "SIS", "EPL", "Multipole"])
def test_a_ray_on_the_centre_of_a_singular_lens(profile: str, dtype: torch.dtype) -> None:
    """Neither value nor gradient is lost, nor is the light of the source's middle seen there."""
    options = {
        "SIE": {"q": 0.7, "phi": 0.3, "Rein": 1.2},
        "SIS": {"Rein": 1.2},
        "EPL": {"q": 0.7, "phi": 0.3, "Rein": 1.2, "t": 1.0},
        "Multipole": {"m": 4, "a_m": 0.1, "phi_m": 0.2},
    }[profile]
    mass = getattr(caustics, profile)(COSMOLOGY, **options)
    lens = free(mass, image=Grid(15, pixel=0.2))
    assert lens.parameters == ("x0", "y0")
    params = torch.zeros(2, dtype=dtype, requires_grad=True)
    image = lens.render(smooth().to(dtype), params)
    (gradient,) = torch.autograd.grad(image.square().sum(), params)
    assert bool(image.isfinite().all()) and bool(gradient.isfinite().all())
    near = lens.render(smooth().to(dtype), torch.full((2,), 1e-3, dtype=dtype))
    if profile != "Multipole":  # its deflection has no limit there
        assert image[0, 0, 7, 7] < 0.1 * image.max()
    assert (image - near)[0, 0].abs().flatten().kthvalue(224).values < 0.02 * image.max()


def test_planes_in_the_order_of_their_redshifts() -> None:
    """A free redshift of a plane decides the order, so entries are traced one by one."""

    def planes(z: Tensor | None):
        near = caustics.SIE(COSMOLOGY, name="a", z_l=z, x0=0.0, y0=0.0, q=0.8, phi=0.1, Rein=0.8)
        far = caustics.SIE(COSMOLOGY, name="b", z_l=0.5, x0=0.1, y0=0.2, q=0.7, phi=1.0, Rein=0.5)
        return caustics.Multiplane(COSMOLOGY, [near, far], name="planes", z_s=2.0)

    lens, x = free(planes(None)), smooth()
    assert lens.parameters == ("a.z_l",)
    z = torch.tensor([[0.25], [0.75]], dtype=F64)
    rows = lens.render(x, z)
    for b in range(2):
        torch.testing.assert_close(rows[b : b + 1], free(planes(z[b, 0]))(x), rtol=1e-6, atol=1e-6)
    z.requires_grad_()
    assert torch.autograd.grad(lens.render(x, z).square().sum(), z)[0].abs().min() > 0
