"""The measured error spectrum of a Gaussian field is its posterior covariance, in closed form."""

import json

import pytest
import torch

from diffpost.networks.error_spectrum import covariance_from_card, error_spectrum
from diffpost.score import GaussianScore
from diffpost.sde import EDM


def field(n=32):
    k = torch.hypot(torch.fft.fftfreq(n)[:, None], torch.fft.fftfreq(n)[None, :])
    power = 1.0 / (0.05 + k) ** 2
    return k, power, GaussianScore(torch.zeros(1, n, n), power=power, sde=EDM(0.01, 50.0))


def test_the_spectrum_of_a_gaussian_field_is_exact():
    k, power, prior = field()
    images = torch.stack([prior.sample(1, seed=s)[0] for s in range(64)])
    table = error_spectrum(prior, images, levels=5, bins=8)
    for nsr, row in zip(table["nsr"], table["variance"], strict=True):
        expected = power * nsr**2 / (power + nsr**2)
        for i, value in enumerate(row):
            low, high = i * float(k.max()) / 8, (i + 1) * float(k.max()) / 8
            inside = (k >= low) & (k < high + 1e-6 * (i == 7))
            exact = float(expected[inside].mean())
            # Power of a real field: relative error of one mode sqrt(2), and pairs k, -k are one.
            error = exact * (2 / (64 * int(inside.sum()) / 2)) ** 0.5
            spread = float(expected[inside].max() / expected[inside].min())
            assert abs(value - exact) < 5 * error * spread, (nsr, i)
    # Control: a denoiser that is wrong by 10% leaves more error than the posterior variance.
    worse = GaussianScore(torch.zeros(1, 32, 32), power=4 * power, sde=prior.sde)
    middle = error_spectrum(worse, images, levels=5, bins=8)["variance"][2]
    assert sum(middle) > 1.02 * sum(table["variance"][2])


def test_the_card_gives_the_covariance_back():
    _, _, prior = field()
    images = prior.sample(8)
    card = json.loads(json.dumps({"error_spectrum": error_spectrum(prior, images, levels=4)}))
    covariance = covariance_from_card(card)
    v = torch.randn(2, 1, 48, 48)  # another size than it was measured at
    assert covariance.apply(v, prior, torch.tensor(1.0)).shape == v.shape
    assert covariance_from_card({}) is None
    with pytest.raises(ValueError, match="expected \\(N, C, H, W\\)"):
        error_spectrum(prior, torch.zeros(3, 8, 8))
