"""Priors of parameters: densities, coordinates, draws and the declarative form."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.priors import Circular, LogNormal, Normal, Uniform

F64 = torch.float64

PRIORS = {
    "uniform": Uniform(-0.5, 2.0),
    "normal": Normal(0.8, 0.1),
    "cut": Normal(0.8, 0.3, 0.2, 1.0),
    "half": Normal(-1.0, 2.0, low=0.0),
    "tail": Normal(0.0, 1.0, 4.0, 5.0),
    "left tail": Normal(0.0, 1.0, -5.0, -4.0),
    "lognormal": LogNormal(0.05, 0.5),
    "cut lognormal": LogNormal(1.0, 1.0, 0.5, 3.0),
}

REFERENCE = {
    "uniform": stats.uniform(-0.5, 2.5),
    "normal": stats.norm(0.8, 0.1),
    "cut": stats.truncnorm(-2, 2 / 3, 0.8, 0.3),
    "half": stats.truncnorm(0.5, math.inf, -1, 2),
    "tail": stats.truncnorm(4, 5),
    "left tail": stats.truncnorm(-5, -4),
    "lognormal": stats.lognorm(0.5, scale=0.05),
}


@pytest.mark.parametrize("name", PRIORS)
def test_density_integrates_to_one(name):
    prior = PRIORS[name]
    low, high = prior.support
    middle = float(prior.constrain(torch.tensor(0.0, dtype=F64)))
    density = lambda x: float(prior.log_prob(torch.tensor(x, dtype=F64)).exp())  # noqa: E731
    total = sum(
        integrate.quad(density, *ends, epsabs=1e-11)[0] for ends in ((low, middle), (middle, high))
    )
    assert total == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("name", REFERENCE)
def test_density_and_quantiles_agree_with_scipy(name):
    prior, reference = PRIORS[name], REFERENCE[name]
    p = np.array([1e-9, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1 - 1e-9])
    theta = prior.constrain(torch.special.ndtri(torch.tensor(p)))
    np.testing.assert_allclose(theta, reference.ppf(p), rtol=1e-6, atol=1e-9)
    inner = theta[1:-1]
    np.testing.assert_allclose(prior.log_prob(inner), reference.logpdf(inner.numpy()), atol=1e-6)
    outside = torch.tensor([prior.support[0] - 0.1, prior.support[1] + 0.1], dtype=F64)
    outside = outside[outside.isfinite()]
    assert bool((prior.log_prob(outside) == -math.inf).all())


@pytest.mark.parametrize("name", [*PRIORS, "circular"])
def test_coordinate_is_a_bijection_with_its_jacobian(name):
    prior = PRIORS.get(name, Circular(180.0, 20.0))
    z = torch.linspace(-4, 4, 41, dtype=F64)  # 0 among them, where two branches meet
    theta = prior.constrain(z)
    assert bool((theta.diff() > 0).all())
    torch.testing.assert_close(prior.unconstrain(theta), z, rtol=0, atol=2e-6)
    h = 1e-4
    slope = (prior.constrain(z + h) - prior.constrain(z - h)) / (2 * h)
    torch.testing.assert_close(prior.log_jacobian(z), slope.log(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        prior.log_prob_z(z), prior.log_prob(theta) + prior.log_jacobian(z), rtol=0, atol=1e-9
    )
    leaf = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.constrain(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, prior.log_jacobian(z).exp(), rtol=1e-7, atol=0)


def test_gradients_in_theta():
    prior = ParameterPrior(PRIORS)
    theta = prior.sample(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(prior.log_prob, theta)
    z = torch.randn(3, len(prior), dtype=F64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: prior.log_prob(prior.constrain(v)), z)


def test_far_coordinates_stay_finite_and_inside():
    prior = ParameterPrior(PRIORS)
    z = torch.tensor([-30.0, -9.0, 9.0, 30.0], dtype=F64)[:, None].expand(4, len(prior))
    z = z.clone().requires_grad_()
    theta = prior.constrain(z)
    (gradient,) = torch.autograd.grad(theta.sum() + prior.log_prob_z(z).sum(), z)
    assert bool(theta.isfinite().all() & gradient.isfinite().all())
    for i, p in enumerate(prior.priors):
        low, high = p.support
        assert bool(((theta[:, i] >= low) & (theta[:, i] <= high)).all())


def test_draws_have_the_distribution_and_a_wrong_one_is_found():
    prior = ParameterPrior(PRIORS | {"circular": Circular(180.0, 20.0)})
    draws = prior.sample(4000, seed=3).numpy()
    exact = REFERENCE | {"circular": stats.uniform(20, 180)}
    p = {
        name: stats.kstest(draws[:, prior.names.index(name)], exact[name].cdf).pvalue
        for name in exact
    }
    assert min(p.values()) > 1e-4, p
    wrong = stats.kstest(draws[:, prior.names.index("cut")], exact["normal"].cdf).pvalue
    assert wrong < 1e-10
    np.testing.assert_array_equal(prior.sample(7, seed=3), draws[:7])


def test_angles_are_unwrapped_about_their_mean():
    prior = ParameterPrior({"angle": Circular(180.0), "x": Uniform(0, 1)})
    theta = torch.tensor([[[1.0, 0.2], [179.0, 0.3]], [[-182.0, 0.4], [541.0, 0.5]]], dtype=F64)
    got = prior.unwrapped(theta)[..., 0]
    torch.testing.assert_close(
        got - got.mean(), torch.tensor([[1.25, -0.75], [-1.75, 1.25]], dtype=F64)
    )
    assert float(got.max() - got.min()) < 4


YAML = {
    "theta_E": {"uniform": [0.5, 2]},
    "q": {"normal": [0.8, 0.1], "within": [0.2, 1]},
    "z_lens": 0.155,
    "core": {"lognormal": ["5e-2", 0.5]},
    "angle": {"circular": 180},
}


def test_declarative_form_and_back():
    prior = ParameterPrior.from_dict(YAML)
    assert prior.names == ("theta_E", "q", "core", "angle")
    assert prior.fixed == {"z_lens": 0.155}
    assert prior["q"] == Normal(0.8, 0.1, 0.2, 1.0)
    again = ParameterPrior.from_dict(prior.to_dict())
    assert again.to_dict() == prior.to_dict()
    assert repr(again) == repr(prior)
    assert list(prior.values(prior.sample(2))) == list(YAML)
    assert prior.values(prior.sample(2))["z_lens"].tolist() == [0.155, 0.155]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"q": {"unifrom": [0, 1]}}, "did you mean 'uniform'"),
        ({"q": {"uniform": [1, 0]}}, "q: .*the lower first"),
        ({"q": {"uniform": 3}}, r"expected \[low, high\]"),
        ({"q": {"uniform": [0, 1], "within": [0, 1]}}, "not to uniform"),
        ({"q": {"normal": [0, 1], "within": 3}}, "low, high"),
        ({"q": {"normal": [0, -1]}}, "positive std"),
        ({"q": {"normal": [0, 1], "within": [20, 30]}}, "leave 2.8e-89 of"),
        ({"q": {"lognormal": [0, 1]}}, "positive median"),
        ({"q": {"circular": 0}}, "positive period"),
        ({"q": {"uniform": [0, 1], "normal": [0, 1]}}, "one kind of prior"),
        ({"q": "wide"}, "expected a number"),
        ({"q": True}, "expected a number"),
        ({"q": 3}, "no parameter has a prior"),
        ({}, "expected priors by name"),
        ({3: {"uniform": [0, 1]}}, "expected text"),
    ],
)
def test_bad_forms_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        ParameterPrior.from_dict(content)


def test_names_are_checked_against_an_operator():
    prior = ParameterPrior({"thetaE": Uniform(0, 1), "q": 0.8})
    with pytest.raises(
        ValueError, match="the lens has no parameter 'thetaE'; did you mean 'theta_E'"
    ):
        prior.check_names(["theta_E", "q"], "the lens")
    with pytest.raises(ValueError, match="also takes phi"):
        prior.check_names(["thetaE", "q", "phi"])
    with pytest.raises(KeyError, match="did you mean 'thetaE'"):
        prior["theta_E"]
    with pytest.raises(ValueError, match="a column for each of thetaE"):
        prior.values(torch.zeros(3, 2))
