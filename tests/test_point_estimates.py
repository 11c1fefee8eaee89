"""The point estimates of examples/point_estimates.py on skies that are known."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("finufft", reason="needs finufft")
from diffpost.physics import Grid, Visibilities


@pytest.fixture(scope="module")
def estimates(example):
    return example("point_estimates")


@pytest.fixture(scope="module")
def two_sources(estimates):
    """2 and 1 mJy, seen by 600 baselines of a beam of about 3 pixels, with noise of 10 uJy a beam."""
    generator = torch.Generator().manual_seed(0)
    longest = 0.5 / (0.12 * math.pi / 180 / 3600)
    u, v = torch.randn(2, 600, generator=generator, dtype=torch.float64) * 0.25 * longest
    u, v = u.clamp(-longest, longest), v.clamp(-longest, longest)
    sky = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    sky[0, 0, 12, 9], sky[0, 0, 20, 21] = 2e-3, 1e-3
    weight = torch.full((600,), 1 / (600 * 1e-5**2), dtype=torch.float64)
    return estimates.observe(Visibilities(u, v, Grid(32, 0.12)), weight, sky, seed=1)


def test_clean_finds_two_sources(estimates, two_sources) -> None:
    """Fluxes to five times the noise, nothing above the depth is left, and flux is conserved; another beam does not do."""
    (image,), beam, noise = estimates.dirty(two_sources)
    assert noise == pytest.approx(1e-5)
    components, left = estimates.clean(image, beam, noise, 3.0)
    assert float(components[12, 9]) == pytest.approx(2e-3, abs=5e-5)
    assert float(components[20, 21]) == pytest.approx(1e-3, abs=5e-5)
    assert left.abs().max() < 3 * noise
    gaussian = estimates.fitted_beam(beam)
    restored = estimates.restored(two_sources, 3.0)
    expected = components.sum() + left.sum() / gaussian.sum()
    assert float(restored.sum()) == pytest.approx(float(expected), rel=1e-3)
    assert (gaussian - beam)[29:34, 29:34].abs().max() < 0.1
    wrong, _ = estimates.clean(image, estimates.fitted_beam(beam), noise, 3.0)
    assert abs(float(wrong.sum()) - 3e-3) > 2 * abs(float(components.sum()) - 3e-3)


def test_mpol_sees_the_sky_where_it_is(estimates, two_sources) -> None:
    """Its image has the sources in their pixels; the sky mirrored or turned is further from it."""
    pytest.importorskip(
        "mpol", reason="needs MPoL: pip install --no-deps MPoL fast-histogram torchkbnufft"
    )
    image, moved = estimates.rml(two_sources, "entropy", 1.0, 0.1)
    truth = two_sources.truth
    brightest = image.flatten().topk(2).indices.tolist()
    assert brightest == [12 * 32 + 9, 20 * 32 + 21]
    assert moved < 0.1
    assert float(estimates.error(image, truth)) < 0.3
    for other in (truth.flip(-1), truth.flip(-2), truth.flip(-1, -2), truth.roll(1, -1)):
        assert float(estimates.error(image, other)) > 0.6
