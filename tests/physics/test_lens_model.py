"""A lens model in words: what caustics gets, what is free, and what a mistake is told."""

import math

import pytest
import torch
import yaml

pytest.importorskip("caustics", reason="caustics is not installed")

from diffpost.physics import Grid, Lens
from diffpost.physics import lens_model as module
from diffpost.physics.lens_model import read_lens_model

SIE = {"profile": "SIE", "q": 0.8, "phi": 0.3, "Rein": 1.2}


def one(**changes):
    return {"mass": {"main": {**SIE, **changes}}}


def test_the_example_of_the_module_is_read():
    text = "\n".join(line[4:] for line in module.__doc__.splitlines() if line.startswith("    "))
    model = read_lens_model(yaml.safe_load(text))
    assert set(model.prior.names) == {
        *(f"main.{name}" for name in ("x0", "y0", "e1", "e2", "Rein")),
        *(f"shear.{name}" for name in ("gamma_1", "gamma_2")),
    }
    lens = Lens(model.mass, Grid(8, pixel=0.5), Grid(8, pixel=0.5))
    assert lens.parameters == model.prior.names
    assert bool(lens.valid(model.prior.sample(50, seed=0)).all())


def test_a_known_lens_is_the_one_of_caustics():
    model = read_lens_model(one())
    assert model.prior is None
    import caustics

    given = caustics.SIE(
        cosmology=caustics.FlatLambdaCDM(), x0=0.0, y0=0.0, q=0.8, phi=0.3, Rein=1.2
    )
    grids = Grid(8, pixel=0.5), Grid(8, pixel=0.5)
    source = torch.rand(1, 1, 8, 8).double()
    expected = Lens(given, *grids)(source)
    torch.testing.assert_close(Lens(model.mass, *grids)(source), expected)
    other = Lens(read_lens_model(one(Rein=1.3)).mass, *grids)(source)
    assert (other - expected).abs().max() > 0.1 * expected.max()


def test_parts_share_a_centre():
    spec = one(x0={"normal": [0, 0.1]}, y0=0.05)
    spec["mass"]["halo"] = {"profile": "SIS", "centre": "main", "Rein": 0.2}
    model = read_lens_model(spec)
    assert model.prior.names == ("main.x0",)
    lens = Lens(model.mass, Grid(8, pixel=0.5), Grid(8, pixel=0.5))
    assert lens.parameters == ("main.x0",)
    apart = one(x0={"normal": [0, 0.1]}, y0=0.05)
    apart["mass"]["halo"] = {"profile": "SIS", "Rein": 0.2}
    source = torch.rand(1, 1, 8, 8).double()
    other = Lens(read_lens_model(apart).mass, Grid(8, pixel=0.5), Grid(8, pixel=0.5))
    assert not torch.allclose(lens.at([0.3])(source), other.at([0.3])(source))


def test_redshifts_scale_a_physical_mass():
    nfw = {"profile": "NFW", "mass": 1e13, "c": 5}
    spec = {"mass": {"halo": nfw}}
    grids = Grid(8, pixel=0.5), Grid(8, pixel=0.5)
    assert Lens(read_lens_model(spec).mass, *grids).parameters == ("z_s", "z_l")
    near, far = (
        Lens(read_lens_model({**spec, "redshifts": {"lens": 0.3, "source": z}}).mass, *grids)
        for z in (0.5, 2.0)
    )
    source = torch.rand(1, 1, 8, 8).double()
    assert not torch.allclose(near(source), far(source))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"mas": {}}, "expected a mapping with `mass`"),
        ({**one(), "ligth": {}}, "no setting 'ligth'"),
        ({"mass": {"main": {**SIE, "profile": "SIEE"}}}, "did you mean 'SIE'"),
        (one(Reinn=1), "no parameter 'Reinn'; did you mean 'Rein'"),
        ({"mass": {"main": {"profile": "SIE", "q": 1, "phi": 0}}}, "also takes Rein"),
        (one(q=2), "valid range is 0.0 to 1.0"),
        (one(q={"normal": [0.8, 0.1]}), "bound it by within"),
        (one(q={"unifrm": [0.8, 1]}), "did you mean 'uniform'"),
        (one(q="round"), "expected a number or a prior"),
        (one(angle_system="polar"), "SIE of caustics says"),
        ({"mass": {"main": SIE, "halo": {**SIE, "centre": "mian"}}}, "did you mean 'main'"),
        ({**one(), "redshifts": {"lens": 1.0, "source": 0.5}}, "0 <= lens < source"),
        ({**one(), "redshifts": {"lense": 1.0}}, "did you mean 'lens'"),
    ],
)
def test_mistakes_are_named(spec, said):
    with pytest.raises(ValueError, match=said):
        read_lens_model(spec)


def test_a_circular_angle_may_leave_the_range():
    model = read_lens_model(one(phi={"circular": [math.pi, -1.0]}))
    assert model.prior.names == ("main.phi",)
