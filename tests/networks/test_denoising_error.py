"""The measured denoising error of a Gaussian field is its posterior covariance, in closed form."""

import json

import pytest
import torch

import diffpost as dp
from diffpost.networks.denoising_error import covariance_from_card, denoising_error
from diffpost.score import GaussianScore
from diffpost.sde import EDM


def field(n=32):
    k = torch.hypot(torch.fft.fftfreq(n)[:, None], torch.fft.fftfreq(n)[None, :])
    power = 1.0 / (0.05 + k) ** 2
    return k, power, GaussianScore(torch.zeros(1, n, n), power=power, sde=EDM(0.01, 50.0))


def test_the_error_of_a_gaussian_field_is_exact():
    """Its size does not depend on brightness, and its spectrum is that of the posterior covariance."""
    k, power, prior = field()
    images = torch.stack([prior.sample(1, seed=s)[0] for s in range(64)])
    table = denoising_error(prior, images, levels=5, bins=8)
    covariance = covariance_from_card({"denoising_error": table})
    for level, nsr in enumerate(table["nsr"]):
        expected = power * nsr**2 / (power + nsr**2)
        exact = float(expected.mean().sqrt())
        # The nodes that pixels reach; the others repeat their neighbours.
        amplitude = torch.tensor(table["amplitude"][level])
        assert ((amplitude / exact - 1).abs() < 0.1).all(), nsr
        here = covariance.at(images[:1], prior, prior.sde.t_of_nsr(torch.tensor(nsr)))
        got = here.power.reshape(32, 32)
        for i in range(8):
            low, high = i * float(k.max()) / 8, (i + 1) * float(k.max()) / 8
            inside = (k >= low) & (k < high + 1e-6 * (i == 7))
            wanted, value = float(expected[inside].mean()), float(got[inside].mean())
            # Power of a real field: relative error of one mode sqrt(2), and pairs k, -k are one.
            error = wanted * (2 / (64 * int(inside.sum()) / 2)) ** 0.5
            spread = float(expected[inside].max() / expected[inside].min())
            assert abs(value - wanted) < 5 * error * spread + 0.1 * wanted, (nsr, i)
    # Control: a denoiser that is wrong leaves more error than the posterior variance.
    worse = GaussianScore(torch.zeros(1, 32, 32), power=power / 16, sde=prior.sde)
    mean = [
        torch.tensor(t["amplitude"][2]).mean()
        for t in (denoising_error(worse, images, levels=5, bins=8), table)
    ]
    assert mean[0] > 1.02 * mean[1]


def _least_ratio(prior, power, k):
    """Least ratio of the measured variance to the exact one over levels and bands, on draws of the table's own seed."""
    draws = dp.sample(prior, 64, dp.DPMSolver(24, eta=1.0), seed=0, progress=False).x
    covariance = covariance_from_card({"denoising_error": denoising_error(prior, draws, bins=8)})
    found = []
    for nsr in (0.3, 0.5, 0.7, 1.0, 1.5):
        here = covariance.at(draws[:1], prior, prior.sde.t_of_nsr(torch.tensor(nsr)))
        exact = power * nsr**2 / (power + nsr**2)
        ratio = here.power.reshape(32, 32) / exact
        found += [float(ratio[(k > a) & (k < a + 0.08)].mean()) for a in (0.15, 0.25, 0.35)]
    return min(found)


def test_draws_of_the_same_seed_are_no_worse(monkeypatch):
    """A draw holds its sampler's noise: the same numbers, added to it again, would leave too small an error.

    About 300 modes in a band of 64 draws: 1%; the sampler's own variances are off by 1 to 2%.
    """
    k, power, prior = field()
    assert _least_ratio(prior, power, k) > 0.95
    monkeypatch.setattr("diffpost.networks.denoising_error._STREAM", 0)
    assert _least_ratio(prior, power, k) < 0.9


def test_the_size_of_the_error_follows_the_brightness():
    """Images that are bright on one half and dark on the other, whose bright half alone varies."""
    n = 16
    sizes = torch.full((1, n, n), 1e-3)
    sizes[..., : n // 2] = 0.5
    mean = torch.zeros(1, n, n)
    mean[..., : n // 2] = 4.0
    prior = GaussianScore(mean, var=sizes.square(), sde=EDM(0.01, 50.0))
    table = denoising_error(prior, prior.sample(64), levels=5)
    nsr = table["nsr"][2]
    faint, bright = table["amplitude"][2][0], table["amplitude"][2][-1]
    assert faint < 0.1 * bright  # the border between both is smooth
    assert bright == pytest.approx((1 / (0.5**-2 + nsr**-2)) ** 0.5, rel=0.1)


def test_the_card_gives_the_covariance_back():
    _, _, prior = field()
    images = prior.sample(8)
    card = json.loads(json.dumps({"denoising_error": denoising_error(prior, images, levels=4)}))
    covariance = covariance_from_card(card)
    v = torch.randn(2, 1, 48, 48)  # another size than it was measured at
    assert covariance.at(v, prior, torch.tensor(1.0)).apply(v).shape == v.shape
    assert covariance_from_card({}) is None
    with pytest.raises(ValueError, match="expected \\(N, C, H, W\\)"):
        denoising_error(prior, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="zero everywhere"):
        denoising_error(prior, torch.zeros(3, 1, 8, 8))
