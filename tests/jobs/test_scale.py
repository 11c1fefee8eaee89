"""The flux that a prior calls 1: the rule in its card, and what it reads off a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from diffpost.io.checkpoints import load_prior
from diffpost.jobs.scale import SmoothedPeak, infer_scale, rule_of_card

SMOOTHING = 1.28


def gaussian(shape: tuple[int, int], sigma: float) -> np.ndarray:
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    middle = (yy - shape[0] // 2) ** 2 + (xx - shape[1] // 2) ** 2
    out = np.exp(-middle / (2 * sigma**2))
    return out / out.sum()


@pytest.mark.parametrize("oversample", [1, 2])
@pytest.mark.parametrize("size", [1.5, 4.0])
def test_the_flux_scale_is_the_smoothed_peak_before_the_psf(size: float, oversample: int) -> None:
    rng = np.random.default_rng(4)
    yy, xx = np.mgrid[:192, :192]
    fine = np.exp(-np.hypot(yy - 97.5, xx - 97.5) / (3 * size))
    sharp = fine.reshape(64, 3, 64, 3).sum((1, 3))
    kernel = gaussian((21, 21), 1.3)
    data = gaussian_filter(sharp, 1.3) + 0.002 * sharp.max() * rng.normal(size=(64, 64))
    scale, report = infer_scale(
        data, kernel, 0.002 * sharp.max(), oversample=oversample, smoothing=SMOOTHING
    )
    width = SMOOTHING / oversample
    truth = gaussian_filter(sharp, width).max() / oversample**2
    blurred = gaussian_filter(data, width).max() / oversample**2
    assert scale == pytest.approx(truth, rel=0.15)
    # Negative control: the peak as observed is farther off.
    assert abs(blurred / truth - 1) > abs(scale / truth - 1)
    assert report["psf_correction"] > 1


def test_a_target_without_light_has_no_scale() -> None:
    with pytest.raises(ValueError, match="no positive flux"):
        infer_scale(-np.ones((32, 32)), gaussian((5, 5), 1.0), 1.0, smoothing=SMOOTHING)


def test_the_rule_is_the_card_s() -> None:
    stated = {"flux_scale": {"rule": "smoothed_peak", "smoothing": 0.64}, "title": "galaxies"}
    assert rule_of_card(stated) == SmoothedPeak(0.64)
    assert rule_of_card({"title": "galaxies"}) is None
    assert rule_of_card({}) is None
    assert rule_of_card(None) is None


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("smoothed_peak", "expected {'rule': 'smoothed_peak'"),
        ({"rule": "median", "smoothing": 1.0}, "'median'.*give --scale"),
        ({"rule": "smoothed_peak"}, "expected {'rule': 'smoothed_peak'"),
        ({"rule": "smoothed_peak", "smoothing": 1.0, "share": 2}, "'share'"),
        ({"rule": "smoothed_peak", "smoothing": 0}, "smoothing of 0"),
        ({"rule": "smoothed_peak", "smoothing": "1"}, "smoothing of '1'"),
        ({"rule": "smoothed_peak", "smoothing": float("nan")}, "smoothing of nan"),
    ],
)
def test_a_rule_that_is_not_known_is_told(stated: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule_of_card({"flux_scale": stated})


@pytest.mark.parametrize(("name", "side"), [("galaxies-64", 64), ("galaxies-32", 32)])
def test_the_shipped_priors_smooth_by_two_per_cent_of_their_frame(name: str, side: int) -> None:
    rule = rule_of_card(load_prior(name).card)  # type: ignore[attr-defined]
    assert rule is not None
    assert rule.smoothing == pytest.approx(0.02 * side)
