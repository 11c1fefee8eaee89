"""What a problem and a prior settle between them: flux scale, grid, and the PSF on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpost.deconvolve import build_operator
from diffpost.jobs.problem import Problem, prepare
from diffpost.jobs.scale import SmoothedPeak
from diffpost.jobs.setup import set_up
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.sde import EDM

SIDE = 16


def prior(card: dict[str, object] | None = None) -> NetworkScore:
    """An untrained network, which takes sides divisible by 4."""
    config = {"kind": "unet", "patch": 2, "widths": [8, 8], "blocks": [1, 1], "embedding": 8}
    return NetworkScore(build_network(config), EDM(), (1, SIDE, SIDE), 0.5, card=card)


def gaussian(n: int, sigma: float) -> np.ndarray:
    yy, xx = np.mgrid[:n, :n] - n // 2
    out = np.exp(-(yy**2 + xx**2) / (2 * sigma**2))
    return out / out.sum()


def problem(psf: np.ndarray, **options: object) -> Problem:
    image = 100 * gaussian(SIDE, 2.0) + 0.05 * np.random.default_rng(0).normal(size=(SIDE, SIDE))
    return prepare(image, psf, 0.05, background="none", **options)  # type: ignore[arg-type]


def test_the_flux_scale_follows_the_rule_of_the_prior() -> None:
    found = {}
    for smoothing in (0.64, 1.28, 3.0):
        card = {"flux_scale": {"rule": "smoothed_peak", "smoothing": smoothing}}
        setup = set_up(problem(gaussian(9, 0.8)), prior(card=card))
        found[smoothing] = setup.problem.scale
        assert setup.prior.scale == setup.problem.scale
        assert any(f"smoothed by {smoothing:g} model pixels" in n for n in setup.problem.notes)
        # Without the PSF, whose light is put back: a Gaussian galaxy of sigma^2 4 - 0.64.
        truth = 100 / (2 * np.pi * (4 - 0.64 + smoothing**2))
        assert setup.problem.scale == pytest.approx(truth, rel=0.1)
        # The same rule, given instead of stated.
        given = set_up(problem(gaussian(9, 0.8), scale=SmoothedPeak(smoothing)), prior())
        assert given.problem.scale == setup.problem.scale
    assert found[0.64] > 1.1 * found[1.28] > 1.2 * found[3.0]
    # What is given goes before the card; without a rule the prior's own units stand.
    given = set_up(problem(gaussian(9, 0.8), scale=7.0), prior(card=card))
    assert (given.problem.scale, given.prior.scale) == (7.0, 7.0)
    own = set_up(problem(gaussian(9, 0.8)), prior(card={"title": "none"}).with_affine(3.0, -1.0))
    assert own.problem.scale is None
    assert (own.prior.scale, own.prior.offset) == (3.0, -1.0)
    assert any(
        "states no rule" in note and "3 per model pixel" in note for note in own.problem.notes
    )
    with pytest.raises(ValueError, match="prior's card has flux_scale"):
        set_up(problem(gaussian(9, 0.8)), prior(card={"flux_scale": 3}))


@pytest.mark.parametrize("oversample", [1, 2])
def test_a_psf_larger_than_the_cutout_is_used_whole(oversample: int) -> None:
    wide = gaussian(41, 5.0)
    setup = set_up(problem(wide, oversample=oversample), prior())
    kernel = setup.problem.psf.kernel
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    assert min(kernel.shape) >= 41 * oversample - oversample
    assert "lost" not in setup.problem.psf.report
    assert any("larger than the cutout of" in note for note in setup.problem.notes)
    # What a source at one corner of the cutout sends to the other is there, to its closed form.
    k, grid = oversample, setup.grid
    x = torch.zeros(1, 1, *grid.shape, dtype=torch.float64)
    x[0, 0, grid.top : grid.top + k, grid.left : grid.left + k] = 1.0 / k**2
    seen = build_operator(setup.problem)(x.float())[0, 0][grid.data_region(k)]
    here, there = float(seen[0, 0]), float(seen[12, 12])
    assert there / here == pytest.approx(float(np.exp(-(12**2) / 5.0**2)), rel=0.03)
    assert here == pytest.approx(wide.max(), rel=0.02)
    # Negative control: trimmed to the cutout, which is 16 pixels wide, it would not get there.
    trimmed = setup.problem.psf.kernel.shape[0] // 2
    assert trimmed > 7 * oversample


def test_a_psf_that_the_model_cannot_hold_is_trimmed_and_told_or_refused() -> None:
    # A fifth of the light in a wide plateau. With a margin of 4 the grid has 24 pixels, which joins
    # offsets up to 23.
    wings = 0.8 * gaussian(61, 1.0) + 0.2 / 61**2
    wings /= wings.sum()
    with pytest.raises(ValueError, match=r"larger than the model can hold \(47 x 47\)"):
        set_up(problem(wings, psf_background=0.0), prior(), margin=4)
    faint = 0.95 * gaussian(61, 1.0) + 0.05 / 61**2
    setup = set_up(problem(faint / faint.sum(), psf_background=0.0), prior(), margin=4)
    assert setup.problem.psf.kernel.shape == (47, 47)
    assert setup.problem.psf.kernel.sum() == pytest.approx(1, abs=1e-12)
    assert setup.problem.psf.report["lost"] == pytest.approx(0.05 * (1 - 47**2 / 61**2), rel=0.01)
    assert any("trimmed to 47 x 47 model pixels" in note for note in setup.problem.notes)
    # Setting up again changes nothing.
    again = set_up(setup.problem, prior(), margin=4)
    assert np.array_equal(again.problem.psf.kernel, setup.problem.psf.kernel)
    assert again.grid == setup.grid


def test_a_grid_out_of_proportion_is_refused() -> None:
    plain = problem(gaussian(9, 1.0))
    flat = np.full((1401, 1401), 1401.0**-2)
    wide = replace(plain, psf=replace(plain.psf, kernel=flat, native=flat))
    with pytest.raises(ValueError, match="check the PSF's background"):
        set_up(wide, prior())
    # Negative control: half as wide is large, but in proportion to what a cutout may have.
    half = replace(plain, psf=replace(plain.psf, native=flat[350:-350, 350:-350] * 4))
    assert max(set_up(half, prior()).grid.shape) < 1024
    with pytest.raises(ValueError, match="margin of -1"):
        set_up(problem(gaussian(9, 1.0)), prior(), margin=-1)


def test_a_kept_neighbour_that_is_brighter_sets_the_scale() -> None:
    """Else the prior would be asked for amplitudes that it has never seen."""
    yy, xx = np.mgrid[:64, :64]
    image = 0.05 * np.random.default_rng(0).normal(size=(64, 64))
    for x, flux in ((22.0, 1.0), (46.0, 8.0)):
        image += flux * np.exp(-((yy - 32.0) ** 2 + (xx - x) ** 2) / (2 * 2.5**2))
    psf, rule = gaussian(9, 0.8), SmoothedPeak(1.28)
    common = {"cutout": (22.0, 32.0, 64), "background": "none", "scale": rule}
    alone, both = (
        prepare(image, psf, 0.05, keep_neighbours=keep, **common)  # type: ignore[arg-type]
        for keep in (False, True)
    )
    assert alone.scaled(rule).scale == pytest.approx(1.0, rel=0.25)
    assert both.scaled(rule).scale == pytest.approx(8.0, rel=0.25)
