"""`diffpost demo` from end to end, with the prior and the image that ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS
from typer.testing import CliRunner

from diffpost.cli import app
from diffpost.deconvolve import build_likelihood, load
from diffpost.jobs.demo import demo_target
from diffpost.jobs.fit import fit_metrics
from diffpost.jobs.problem import prepare
from diffpost.jobs.setup import set_up
from diffpost.samples import Samples

CENTRE = (99.5, 100.5)  # of the cutout, in pixels of the dwarf's image
BAND = 0.15


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "dwarf"
    command = ["demo", "--target", "dwarf", "--samples", "2", "--out", str(folder)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return folder


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def misfit(metrics: dict[str, Any]) -> float:
    """Reduced chi2 of the mean over blank sky's, less 1: 3217 pixels leave it 2.5% of scatter if they
    are independent, and twice that for the correlation that drizzling left."""
    chi2 = metrics["reduced_chi2"]
    return float(chi2["mean"] / chi2["sky"] - 1)


def test_residuals_are_those_of_blank_sky(demo: Path) -> None:
    metrics = record(demo)["metrics"]
    assert metrics["pixels"] > 3000
    assert abs(misfit(metrics)) < BAND
    assert abs(metrics["reduced_chi2"]["target"] / metrics["reduced_chi2"]["sky"] - 1) < 2 * BAND
    for axis in ("x", "y"):
        correlation = metrics["residual_autocorrelation"]
        assert correlation[axis] == pytest.approx(correlation["sky"], abs=0.1)
    assert metrics["flux"]["model_over_data"] == pytest.approx(1, abs=0.01)
    assert metrics["largest_residual"] < 5
    # The files say the same.
    residual = fits.getdata(demo / "residual.fits").astype(np.float64)
    assert np.nanmean(residual**2) == pytest.approx(metrics["reduced_chi2"]["mean"], rel=1e-4)


@pytest.mark.slow
def test_the_whole_spiral_is_explained(tmp_path: Path) -> None:
    """112 pixels of galaxy on a grid of 128, larger than the prior's 64: no structure is left, no flux lost."""
    command = ["demo", "--samples", "2", "--out", str(tmp_path / "spiral")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    metrics = record(tmp_path / "spiral")["metrics"]
    assert metrics["pixels"] > 11000
    assert abs(misfit(metrics)) < BAND
    for axis in ("x", "y"):  # blank sky's is the drizzle's
        correlation = metrics["residual_autocorrelation"]
        assert correlation[axis] == pytest.approx(correlation["sky"], abs=0.12)
    assert metrics["flux"]["model_over_data"] == pytest.approx(1, abs=0.01)


def test_those_figures_would_tell_a_wrong_image(demo: Path) -> None:
    """Negative controls: the draws moved by a pixel, and 2% brighter."""
    target = demo_target("dwarf")
    problem = prepare(target.image, target.psf, target.noise, **target.keywords)
    setup = set_up(problem, load("galaxies-64"))
    likelihood = build_likelihood(setup.problem, setup.grid)
    draws = Samples.load(demo / "samples.zarr")

    def metrics(x: torch.Tensor) -> dict[str, Any]:
        return fit_metrics(setup.problem, setup.grid, likelihood, replace(draws, x=x))

    assert misfit(metrics(draws.x)) == pytest.approx(misfit(record(demo)["metrics"]), abs=1e-3)
    assert misfit(metrics(draws.x.roll(1, dims=-1))) > 2 * BAND
    assert metrics(1.02 * draws.x)["flux"]["model_over_data"] > 1.01


def test_the_maps_are_where_the_image_is_on_the_sky(demo: Path) -> None:
    path = demo_target("dwarf").image
    with fits.open(path) as hdus:
        hdu = next(h for h in hdus if getattr(h, "data", None) is not None)
        whole, there = np.asarray(hdu.data, dtype=np.float64), WCS(hdu.header)
    with fits.open(demo / "mean.fits") as hdus:
        mean, here = np.asarray(hdus[0].data, dtype=np.float64), WCS(hdus[0].header)
    assert mean.shape == (64, 64)
    sky = there.pixel_to_world(*CENTRE)
    separation = here.pixel_to_world(31.5, 31.5).separation(sky).arcsec
    assert separation < 1e-4
    # Negative control: half a pixel of 0.06" is seen.
    assert here.pixel_to_world(32.0, 31.5).separation(sky).arcsec == pytest.approx(0.03, rel=0.05)
    # And so are the pixels: the data used, and the background put back, are the image's there.
    data = fits.getdata(demo / "data.fits") + fits.getdata(demo / "background.fits")
    first = np.rint([float(c) for c in there.world_to_pixel(here.pixel_to_world(0, 0))]).astype(int)
    cut = whole[first[1] : first[1] + 64, first[0] : first[0] + 64]
    used = np.isfinite(data)
    assert np.abs(data - cut)[used].max() < 1e-4 * np.nanmax(cut)
    # The brightest pixels of mean and data are neighbours.
    peaks = [np.unravel_index(np.nanargmax(m), m.shape) for m in (mean, np.where(used, data, -1))]
    assert np.abs(np.subtract(*peaks)).max() <= 1
