"""`diffpost image` end to end on simulated visibilities: products, coordinates, fits, resumption, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

import diffpost as dp
from diffpost.cli import app
from diffpost.imaging import baseline_chi2, check_size, image_visibilities, solve_imaging
from diffpost.io.datasets import fetch
from diffpost.io.uv import VisibilityData
from diffpost.io.uvfits import write_uvfits
from diffpost.jobs.imaging import dirty_beam, dirty_image, prepare_imaging
from diffpost.jobs.imaging_scale import infer_imaging_scale
from diffpost.samples import Samples

pytest.importorskip("finufft", reason="needs finufft")
pytest.importorskip("diffpost.physics.visibilities", reason="needs the operator of visibilities")

ARCSEC = np.pi / 180 / 3600
CELL, SIZE = 0.1, 32
RA, DEC = 83.0, -5.0
PLACE = (0.45, -0.65)  # of the source, arcsec to the east and north
runner = CliRunner()


def observation(
    noise: float = 1.0, flux: float = 0.05, seed: int = 0, times: int = 12
) -> VisibilityData:
    """Seven antennas for two hours; a Gaussian source of 0.15 arcsec (sigma); each visibility has a standard deviation of 2 mJy."""
    g = np.random.default_rng(seed)
    place = g.normal(size=(7, 2)) * 250e3
    rows = []
    for t in range(times):
        angle = 0.26 * t / 6
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        for a in range(7):
            for b in range(a + 1, 7):
                rows.append((*(turn @ (place[a] - place[b])), a, b, 59000 + t / 144))
    u, v, a, b, time = np.array(rows).T
    phase = -2j * np.pi * (u * PLACE[0] + v * PLACE[1]) * ARCSEC
    vis = flux * np.exp(phase - 2 * (np.pi * 0.15 * ARCSEC) ** 2 * (u**2 + v**2))
    sigma = np.full(len(u), 2e-3)
    vis = vis + noise * sigma * (g.normal(size=len(u)) + 1j * g.normal(size=len(u)))
    return VisibilityData(
        u, v, vis, sigma**-2.0, antenna1=a, antenna2=b, time=time, exposure=np.full(len(u), 30.0),
        frequency=np.full(len(u), 230e9), bandwidth=np.full(len(u), 1e8), channel=np.zeros(len(u)), ra=RA, dec=DEC, target="blob",
    )  # fmt: skip


def invoke(vis: Path, out: Path, *more: str):
    return runner.invoke(
        app,
        ["image", str(vis), "--cell", str(CELL), "--size", str(SIZE), "--prior", "galaxies-32", "--out", str(out), *more],
    )  # fmt: skip


@pytest.fixture(scope="module")
def vis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vis") / "blob.uvfits"
    write_uvfits(observation(), path)
    return path


@pytest.fixture(scope="module")
def run(vis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    done = invoke(vis, out, "--samples", "3", "--steps", "12", "--seed", "5")
    assert done.exit_code == 0, done.output
    return out


def test_every_product_is_there_and_tells_what_it_is(run: Path) -> None:
    names = {item.name for item in run.iterdir()}
    maps = ("mean", "median", "std", "q16", "q84", "iqr")
    assert names == {
        *(f"{name}.fits" for name in maps), "samples.fits", "samples.zarr", "dirty.fits", "beam.fits", "residual.fits",
        "visibilities.fits", "summary.png", "run.json",
    }  # fmt: skip
    draws = Samples.load(run / "samples.zarr").x[:, 0].numpy()
    cube = fits.getdata(run / "samples.fits")
    np.testing.assert_allclose(cube, draws, rtol=1e-6)
    read = {name: fits.open(run / f"{name}.fits")[0] for name in maps}
    for item in read.values():
        assert item.header["BUNIT"] == "Jy/pixel"
        assert item.header["CTYPE1"] == "RA---SIN"
    np.testing.assert_allclose(read["mean"].data, draws.mean(0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(read["std"].data, draws.std(0, ddof=1), rtol=1e-3, atol=1e-9)
    low, high = np.quantile(draws, [0.16, 0.84], axis=0)
    np.testing.assert_allclose(read["iqr"].data, high - low, rtol=1e-3, atol=1e-8)
    record = json.loads((run / "run.json").read_text())
    assert record["inputs"]["visibilities"]["sha256"]
    assert record["visibilities"]["used"] == 252
    assert record["prior"]["name"] == "galaxies-32"
    assert record["seed"] == 5
    assert fits.getheader(run / "dirty.fits")["BUNIT"] == "Jy/beam"
    with fits.open(run / "visibilities.fits") as hdus:
        assert len(hdus["VIS"].data) == 252
        assert len(hdus["BASELINES"].data) == 21
        assert hdus["BASELINES"].data["COUNT"].sum() == 252
        assert hdus["BINS"].data["COUNT"].sum() == 252


def test_the_source_is_where_it_was_put_on_the_sky(run: Path) -> None:
    with fits.open(run / "mean.fits") as hdus:
        image, wcs = hdus[0].data.astype(float), WCS(hdus[0].header)
    centre = SkyCoord(RA, DEC, unit="deg")
    east, north = PLACE
    x, y = wcs.world_to_pixel(centre.spherical_offsets_by(east * dp_arcsec(), north * dp_arcsec()))
    light = np.where(image > 0.2 * image.max(), image, 0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    assert abs((light * columns).sum() / light.sum() - x) < 0.35
    assert abs((light * rows).sum() / light.sum() - y) < 0.35
    # Conventions by hand: x = -east on a grid about the phase centre.
    assert x == pytest.approx((SIZE - 1) / 2 - east / CELL, abs=1e-3)
    assert y == pytest.approx((SIZE - 1) / 2 + north / CELL, abs=1e-3)


def dp_arcsec():
    from astropy import units

    return units.arcsec


def test_draws_fit_the_visibilities_to_their_noise(run: Path) -> None:
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    chi2 = metrics["reduced_chi2"]
    assert chi2["expected_std"] == pytest.approx(252**-0.5)
    assert abs(chi2["draws"] - 1) < 4 * chi2["expected_std"]
    assert (
        chi2["empty_sky"] - 1 > 20 * chi2["expected_std"]
    )  # the control: a sky without the source
    assert 0.5 < metrics["residual_image"]["rms"] < 1.5
    assert metrics["flux"]["mean"] > 0.03
    # Nearer to the visibilities without noise than the data are, by more than half.
    table = fits.getdata(run / "visibilities.fits", "VIS")
    truth = observation(noise=0.0).vis
    off = [np.abs(table[name] - truth) ** 2 for name in ("MODEL", "DATA")]
    assert off[0].mean() < 0.25 * off[1].mean()


def test_a_kept_draw_is_not_drawn_again_and_a_lost_one_comes_back(tmp_path: Path) -> None:
    prior = dp.load_prior("galaxies-32")
    problem = prepare_imaging(observation(), cell=CELL, size=SIZE, scale=5e-3)
    fitted = prior.with_affine(5e-3, 0.0)
    settings = {
        "samples": 3,
        "sampler": dp.DPMSolver(4, eta=1.0),
        "batch_size": 1,
        "progress": False,
    }
    whole = solve_imaging(problem, fitted, checkpoint=tmp_path / "a", **settings)
    first = sorted((tmp_path / "a").glob("rows-*"))
    assert len(first) == 3
    first[1].unlink()
    again = solve_imaging(problem, fitted, checkpoint=tmp_path / "a", **settings)
    assert torch.equal(again.samples.x, whole.samples.x)
    other = replace(problem, data=observation(seed=1))
    with pytest.raises(ValueError, match="another run"):
        solve_imaging(other, fitted, checkpoint=tmp_path / "a", **settings)


def test_finished_results_are_not_written_over(run: Path, vis: Path) -> None:
    before = {item.name: item.stat().st_mtime_ns for item in run.iterdir()}
    done = invoke(vis, run)
    assert done.exit_code == 2
    assert "--overwrite" in done.output
    assert {item.name: item.stat().st_mtime_ns for item in run.iterdir()} == before


def test_bad_input_ends_with_two_and_writes_nothing(vis: Path, tmp_path: Path) -> None:
    data = observation()
    flagged = tmp_path / "flagged.csv"
    flagged.write_text("u,v,re,im,weight\n1e5,2e5,1,1,0\n")
    bad = tmp_path / "nan.npz"
    np.savez(bad, u=data.u, v=data.v, vis=data.vis * np.nan, weight=data.weight)
    metres = tmp_path / "metres.npz"
    np.savez(metres, u=data.u * 1.3e-3, v=data.v * 1.3e-3, vis=data.vis, weight=data.weight)
    cut = tmp_path / "cut.uvfits"
    cut.write_bytes(vis.read_bytes()[:9000])
    cases = [
        ([str(tmp_path / "none.uvfits")], "no visibilities"),
        ([str(flagged)], "1 weight zero"),
        ([str(bad)], "252 not a number"),
        ([str(metres)], "metres"),
        ([str(cut)], "cut off"),
        ([str(vis), "--stokes", "RR"], "has no RR; it holds I"),
        ([str(vis), "--size", "36"], "multiples of 8, such as 32 or 40"),
        ([str(vis), "--size", "72"], "used up to 64"),
        ([str(vis), "--cell", "0.6"], "arcsec"),
        ([str(vis), "--cell", "-1"], "positive"),
        ([str(vis), "--average", "30,x"], "--average"),
        ([str(vis), "--center", "3"], "--center"),
        ([str(vis), "--recalibrate", "all"], "common or baseline"),
        ([str(vis), "--spw", "4"], "expected 0 to 0"),
        ([str(vis), "--format", "miriad"], "expected one of"),
        ([str(vis), "--prior", "none"], "no prior"),
    ]
    for more, text in cases:
        out = tmp_path / "out"
        done = runner.invoke(
            app,
            [
                "image",
                "--cell",
                "0.1",
                "--size",
                "32",
                "--prior",
                "galaxies-32",
                "--out",
                str(out),
                *more,
            ],
        )
        words = " ".join(done.output.split())
        assert done.exit_code == 2, (more, done.output)
        assert text in words, (more, words)
        assert not out.exists(), more


def test_sizes_that_a_prior_has_not() -> None:
    prior = dp.load_prior("galaxies-32")
    check_size(prior, 32)
    check_size(prior, 64)
    with pytest.raises(ValueError, match="multiples of 8, such as 40 or 48"):
        check_size(prior, 44)
    with pytest.raises(ValueError, match="used up to 64"):
        check_size(prior, 128)
    gauss = dp.GaussianScore(torch.zeros(1, 16, 16), var=1.0, sde=dp.EDM(0.002, 80.0))
    with pytest.raises(ValueError, match="tied to the shape"):
        check_size(gauss, 24)


def test_dirty_image_and_beam_in_closed_form() -> None:
    """A source at the middle of a pixel peaks at its flux there; the noise is that of the weights, to 5 standard errors."""
    data = observation(noise=0.0)
    point = replace(
        data, vis=0.02 * np.exp(-2j * np.pi * (data.u * 0.25 + data.v * -0.35) * ARCSEC)
    )
    problem = prepare_imaging(point, cell=CELL, size=SIZE)
    image = dirty_image(problem)
    at = np.unravel_index(np.argmax(image), image.shape)
    assert at == (round((SIZE - 1) / 2 - 3.5), round((SIZE - 1) / 2 - 2.5))
    assert image[at] == pytest.approx(0.02, rel=1e-5)
    beam, grid = dirty_beam(problem)
    middle = grid.shape[0] // 2
    assert beam.shape == (33, 33)
    assert beam[middle, middle] == pytest.approx(1.0, rel=1e-6)
    np.testing.assert_allclose(beam, beam[::-1, ::-1], atol=1e-6)
    values = []
    for seed in range(40):
        noisy = replace(problem, data=replace(point, vis=observation(seed=seed, flux=0.0).vis))
        values.append(dirty_image(noisy)[5, 9] / data.noise)
    assert abs(np.mean(np.square(values)) - 1) < 5 * (2 / 40) ** 0.5


def test_the_flux_scale_of_simulated_galaxies() -> None:
    """Within the amplitudes that the prior was trained on (0.5 to 1.6 of its unit) for draws of it as truths, bright and faint; a scale
    that ignored the resolution, the dirty peak, is off by more than 3."""
    prior = dp.load_prior("galaxies-32")
    sky = dp.sample(prior, 3, dp.DPMSolver(16, eta=1.0), seed=3, progress=False).x.double()
    for signal in (30, 150):
        for i in range(3):
            problem = prepare_imaging(observation(), cell=CELL, size=SIZE)
            with torch.no_grad():
                vis = torch.view_as_complex(
                    problem.operator(sky[i : i + 1])[0].contiguous()
                ).numpy()
            clean = replace(problem, data=replace(problem.data, vis=vis))
            factor = signal * problem.data.noise / dirty_image(clean).max()
            noise = observation(flux=0.0, seed=i).vis
            noisy = replace(problem, data=replace(problem.data, vis=factor * vis + noise))
            scale, _ = infer_imaging_scale(noisy, 0.64)
            peak = factor * gaussian_filter(sky[i, 0].numpy(), 0.64).max()
            assert 1 / 1.6 < scale / peak < 2, (signal, i)
            assert dirty_image(noisy).max() / peak > 3
    empty = replace(problem, data=observation(flux=0.0))
    with pytest.raises(ValueError, match="no source"):
        infer_imaging_scale(empty, 0.64)


def test_a_bad_baseline_is_told() -> None:
    data = observation(noise=1.0)
    vis = data.vis.copy()
    bad = (data.antenna1 == 2) & (data.antenna2 == 5)
    vis[bad] += 0.05
    clean = observation(noise=0.0).vis
    rows = {(a, b): chi2 for a, b, _, chi2, _ in baseline_chi2(replace(data, vis=vis), clean)}
    assert rows.pop((2, 5)) > 50
    assert max(rows.values()) < 1 + 5 * 12**-0.5


def test_averaging_and_weights_reach_the_record(vis: Path, tmp_path: Path) -> None:
    problem = prepare_imaging(
        vis, cell=CELL, size=SIZE, average=(1300.0, 1), recalibrate="baseline", center=(0.5, -0.5), primary_beam=5.0,
    )  # fmt: skip
    assert len(problem.data) == 4 * 21
    assert problem.report["averaging"]["before"] == 252
    assert problem.report["weights"]["pairs"] == 126
    assert problem.grid.centre == (-0.5, -0.5)
    at = problem.grid.to_pixel(0.0, 0.0)
    assert problem.primary_beam is not None
    assert problem.primary_beam[round(at[1]), round(at[0])] > 0.99
    x, y = problem.grid.coordinates()
    half = np.exp(-4 * np.log(2) * float(x[3, 4] ** 2 + y[3, 4] ** 2) / 25)
    assert problem.primary_beam[3, 4] == pytest.approx(half)
    assert problem.report["primary_beam"] == 5.0
    none = prepare_imaging(vis, cell=CELL, size=SIZE, primary_beam="0.00")
    assert none.primary_beam is None and none.report["primary_beam"] is None
    words = " ".join(problem.notes)
    assert "weights divided by" in words
    assert "loses at most" in words


def test_a_systematic_error_grows_with_the_amplitude(vis: Path) -> None:
    plain = prepare_imaging(vis, cell=CELL, size=SIZE).data
    wide = prepare_imaging(vis, cell=CELL, size=SIZE, systematic=0.1)
    expected = 1 / plain.weight + 0.01 * np.abs(plain.vis) ** 2
    np.testing.assert_allclose(1 / wide.data.weight, expected, rtol=1e-12)
    assert "10.00%" in " ".join(wide.notes)
    with pytest.raises(ValueError, match="share of the amplitude"):
        prepare_imaging(vis, cell=CELL, size=SIZE, systematic=-1.0)


def test_draws_of_a_gaussian_sky_are_the_exact_posterior() -> None:
    """Against dense linear algebra, whitened by the exact covariance: the mean of 128 draws is off by 1 +- 0.09 of its Monte Carlo error
    (squared, over 256 pixels), their scatter is the exact one to 2.5%; the posterior of noise twice as strong is rejected."""
    n, cell, count = 16, 0.1, 128
    problem = prepare_imaging(observation(), cell=cell, size=n)
    at = np.arange(n * n)
    far = ((at[:, None] // n - at // n) ** 2 + (at[:, None] % n - at % n) ** 2) / (2 * 1.5**2)
    cov = torch.from_numpy(4e-7 * (np.exp(-far) + 0.01 * np.eye(n * n)))
    scale = float(cov[0, 0] ** 0.5)
    sky = dp.GaussianScore(
        torch.zeros(1, n, n), cov=(cov / scale**2).float(), sde=dp.EDM(2e-3, 80.0)
    ).with_affine(scale, 0.0)
    sampler = dp.DPMSolver(48, eta=1.0)
    result = solve_imaging(problem, sky, samples=count, sampler=sampler, progress=False)
    draws = torch.from_numpy(result.images).reshape(count, -1)
    with torch.no_grad():
        columns = problem.operator(torch.eye(n * n, dtype=torch.float64).reshape(-1, 1, n, n))
    matrix = columns.reshape(n * n, -1).T

    def departures(noisier: float) -> tuple[float, float]:
        weight = (problem.weight / noisier**2).expand(-1, 2).reshape(-1)
        precision = torch.linalg.inv(cov) + matrix.T @ (weight[:, None] * matrix)
        exact = torch.linalg.solve(precision, matrix.T @ (weight * problem.y.reshape(-1)))
        root = torch.linalg.cholesky(precision).T  # root x is white
        off = root @ (draws.mean(0) - exact)
        return float(count * (off**2).mean()), float((draws @ root.T).var(0).mean())

    mean, scatter = departures(1.0)
    assert mean < 1 + 4 * (2 / n**2) ** 0.5
    assert abs(scatter - 1) < 0.025
    mean, scatter = departures(2.0)
    assert mean > 2 or abs(scatter - 1) > 0.05


@pytest.mark.data
@pytest.mark.slow
def test_spt0346_is_fitted_to_its_noise() -> None:
    result = image_visibilities(
        fetch("spt0346-visibilities"), cell=0.1, size=40, center=(0.5, 0.0), prior="galaxies-32", samples=2, progress=False,
    )  # fmt: skip
    chi2 = result.metrics["reduced_chi2"]
    assert chi2["empty_sky"] == pytest.approx(1.852, abs=1e-3)
    assert chi2["draws"] < 1.06
    assert result.metrics["residual_image"]["rms"] < 1.5
