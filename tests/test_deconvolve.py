"""The deconvolution job on simulated skies with a Gaussian prior, whose answer is known."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from astropy.wcs import WCS

from diffpost.deconvolve import DeconvolutionResult, deconvolve
from diffpost.jobs.fit import autocorrelation
from diffpost.jobs.outputs import OutputFolder
from diffpost.jobs.problem import prepare
from diffpost.jobs.scale import SmoothedPeak
from diffpost.operator import Convolve
from diffpost.samplers import DPMSolver
from diffpost.samples import Samples
from diffpost.score import GaussianScore
from diffpost.sde import EDM

SIDE = 24
SIGMA = 1.2


def power(n: int, slope: float = -3.0) -> torch.Tensor:
    """Eigenvalues of a power-law field with unit variance."""
    k = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None, :]) * n
    p = (1 + k) ** slope
    return torch.from_numpy(p / p.mean())[None]


def prior(n: int = 32, rms: float = 0.3) -> GaussianScore:
    return GaussianScore(torch.zeros(1, n, n), power=rms**2 * power(n).float(), sde=EDM())


def star(n: int, y: float, x: float, sigma: float = SIGMA) -> np.ndarray:
    yy, xx = np.mgrid[:n, :n]
    return np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * sigma**2)) / (2 * np.pi * sigma**2)


def galaxy(n: int = SIDE, flux: float = 500.0, sigma: float = 2.5) -> np.ndarray:
    """A round Gaussian galaxy, whose blurred image is known in closed form."""
    return flux * star(n, (n - 1) / 2, (n - 1) / 2, sigma)


def blurred(n: int = SIDE, flux: float = 500.0) -> np.ndarray:
    return galaxy(n, flux, float(np.hypot(2.5, SIGMA)))


def run(image: np.ndarray, noise: float, **options: object) -> DeconvolutionResult:
    settings: dict[str, object] = {
        "prior": prior(),
        "samples": 4,
        "sampler": DPMSolver(12),
        "progress": False,
        "background": "none",
        "scale": 20.0,
    }
    return deconvolve(image, star(17, 8, 8), noise, **(settings | options))  # type: ignore[arg-type]


def simulated(noise: float, seed: int = 0) -> np.ndarray:
    return blurred() + noise * np.random.default_rng(seed).normal(size=(SIDE, SIDE))


@pytest.fixture(scope="module")
def result() -> DeconvolutionResult:
    return run(simulated(0.1), 0.1, samples=16, sampler=DPMSolver(32))


def test_maps_are_of_the_cutout_and_the_same_seed_gives_the_same_draws(
    result: DeconvolutionResult,
) -> None:
    assert result.samples.x.shape == (16, 1, 32, 32)
    assert result.images.shape == (16, SIDE, SIDE)
    assert np.allclose(result.mean, result.images.mean(0), rtol=1e-5, atol=1e-5)
    assert result.std.shape == result.residual.shape == (SIDE, SIDE)
    again = run(simulated(0.1), 0.1, samples=16, sampler=DPMSolver(32), batch_size=5)
    assert torch.allclose(again.samples.x, result.samples.x, atol=1e-3)
    other = run(simulated(0.1), 0.1, samples=2, seed=1)
    assert not torch.allclose(other.samples.x[0], result.samples.x[0], atol=1e-2)


@pytest.mark.parametrize("oversample", [1, 2])
def test_flux_is_conserved_under_the_psf_to_a_per_cent(oversample: int) -> None:
    n = 32 * oversample
    out = run(
        simulated(0.1),
        0.1,
        oversample=oversample,
        prior=prior(n),
        scale=20.0 / oversample**2,
        samples=4,
        sampler=DPMSolver(32),
    )
    inside = galaxy().sum()
    assert out.mean.sum() == pytest.approx(inside, rel=0.01)
    assert out.metrics["flux"]["mean"] == pytest.approx(inside, rel=0.01)
    assert out.metrics["flux"]["model_over_data"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("oversample", [1, 2])
def test_an_off_centre_even_psf_leaves_positions_alone(oversample: int) -> None:
    rng = np.random.default_rng(5)
    at = (11.3, 12.6)
    wide = float(np.hypot(2.0, SIGMA))
    data = 500 * star(SIDE, *at, wide) + 0.1 * rng.normal(size=(SIDE, SIDE))
    out = deconvolve(
        data,
        7 * star(18, 8.37, 9.22),
        0.1,
        prior=prior(32 * oversample),
        oversample=oversample,
        samples=4,
        sampler=DPMSolver(32),
        progress=False,
        background="none",
        scale=20.0 / oversample**2,
    )
    yy, xx = np.mgrid[: SIDE * oversample, : SIDE * oversample]
    mean = out.mean * star(
        SIDE * oversample,
        (at[0] + 0.5) * oversample - 0.5,
        (at[1] + 0.5) * oversample - 0.5,
        3.0 * oversample,
    )
    y = ((mean * yy).sum() / mean.sum() + 0.5) / oversample - 0.5
    x = ((mean * xx).sum() / mean.sum() + 0.5) / oversample - 0.5
    assert y == pytest.approx(at[0], abs=0.02)
    assert x == pytest.approx(at[1], abs=0.02)


def test_chi2_of_draws_and_mean_meet_their_expectations() -> None:
    """The truth is drawn from the prior, so the posterior is right and chi2 must be, too."""
    noise = 0.5
    model = prior(rms=0.4).with_affine(20.0, 0.0)
    truth = model.to_physical(model.sample(1, seed=3)).double()
    kernel = star(17, 8, 8)
    blur = Convolve(torch.from_numpy(kernel / kernel.sum()))
    data = blur(truth)[0, 0, 4:-4, 4:-4].numpy()
    data = data + noise * np.random.default_rng(6).normal(size=data.shape)
    whole = {"prior": prior(rms=0.4), "keep_neighbours": True}
    out = run(data, noise, samples=32, sampler=DPMSolver(32), margin=4, **whole)
    chi2 = out.metrics["reduced_chi2"]
    error = 3 * chi2["expected_std"]
    assert chi2["expected_std"] == pytest.approx((2 / SIDE**2) ** 0.5)
    assert chi2["draws"] == pytest.approx(1, abs=error)
    assert chi2["mean"] == pytest.approx(chi2["mean_expected"], abs=error)
    assert chi2["mean"] < chi2["draws"]
    # Negative control: noise understated by a third.
    wrong = run(data, noise / 1.5, samples=8, sampler=DPMSolver(32), **whole)
    assert wrong.metrics["reduced_chi2"]["draws"] > 1 + error


def test_autocorrelation() -> None:
    rng = np.random.default_rng(0)
    white = rng.normal(size=(100, 100))
    white[3, :50] = np.nan
    assert abs(autocorrelation(white, 0, 1)) < 0.03
    both = white[:, 1:] + white[:, :-1]
    assert autocorrelation(both, 0, 1) == pytest.approx(0.5, abs=0.04)
    assert abs(autocorrelation(both, 1, 0)) < 0.03


def test_missing_pixels_are_masked_and_told() -> None:
    image = simulated(0.1)
    image[2:5, 3:9] = np.nan
    out = run(image, 0.1)
    assert np.isnan(out.residual[2:5, 3:9]).all()
    assert np.isfinite(out.mean).all()
    assert out.metrics["pixels"] == SIDE**2 - 18
    assert any("18 pixels of the cutout have no data" in note for note in out.notes)
    wild = image.copy()
    wild[~np.isfinite(image)] = np.inf
    assert torch.equal(run(wild, 0.1).samples.x, out.samples.x)
    rms = np.full_like(image, 0.1)
    rms[10, 10] = np.inf
    masked = run(simulated(0.1), rms)
    assert masked.metrics["pixels"] == SIDE**2 - 1


def field() -> np.ndarray:
    """The galaxy in the middle of a field of sky with a bright neighbour."""
    rng = np.random.default_rng(8)
    image = 3.0 + 0.2 * rng.normal(size=(120, 120))
    image[48:72, 48:72] += blurred()
    yy, xx = np.mgrid[:120, :120]
    image += 300 * np.exp(-((yy - 59) ** 2 + (xx - 76) ** 2) / 8) / (8 * np.pi)
    return image


def test_sky_noise_scale_and_neighbours_are_inferred() -> None:
    out = run(
        field(),
        None,  # type: ignore[arg-type]
        cutout=(59.5, 59.5, SIDE),
        background="smooth",
        scale=SmoothedPeak(1.28),
    )
    problem = out.problem
    noise = problem.report["noise"]
    assert noise["source"] == "sky"
    assert noise["std"] == pytest.approx(0.2, rel=0.15)
    assert np.median(problem.background) == pytest.approx(3.0, abs=0.1)
    assert not np.isfinite(problem.std[11, 20:]).all()
    assert any("neighbouring source" in note for note in out.notes)
    # The smoothed peak before the PSF: a Gaussian galaxy of sigma 2.5 smoothed by 1.28.
    assert problem.scale == pytest.approx(500 / (2 * np.pi * (2.5**2 + 1.28**2)), rel=0.15)
    kept = run(
        field(),
        None,  # type: ignore[arg-type]
        cutout=(59.5, 59.5, SIDE),
        background="smooth",
        keep_neighbours=True,
    )
    assert np.isfinite(kept.problem.std).all()


def test_poisson_noise_is_added_for_electron_rates(tmp_path: Path) -> None:
    hdu = fits.PrimaryHDU(field())
    hdu.header["BUNIT"], hdu.header["EXPTIME"] = "ELECTRONS/S", 1000.0
    hdu.writeto(tmp_path / "e.fits")
    options = {"cutout": (59.5, 59.5, SIDE), "background": "constant", "samples": 1}
    with_poisson = run(tmp_path / "e.fits", None, **options).problem  # type: ignore[arg-type]
    std = with_poisson.std
    peak = std[11, 11]
    sky = with_poisson.report["noise"]["std"]
    assert peak**2 - sky**2 == pytest.approx(blurred().max() / 1000, rel=0.2)
    hdu.header["BUNIT"] = "adu"
    hdu.writeto(tmp_path / "e.fits", overwrite=True)
    without = run(tmp_path / "e.fits", None, **options).problem  # type: ignore[arg-type]
    assert np.ptp(without.std[np.isfinite(without.std)]) == 0
    assert any("Poisson noise is not known" in note for note in without.notes)
    # A keyword and an extension come before the sky.
    hdu.header["RMS"] = 0.7
    hdu.writeto(tmp_path / "e.fits", overwrite=True)
    assert run(tmp_path / "e.fits", None, **options).problem.report["noise"]["std"] == 0.7  # type: ignore[arg-type]
    error = fits.ImageHDU(np.full((120, 120), 0.4), name="ERR")
    fits.HDUList([hdu, error]).writeto(tmp_path / "e.fits", overwrite=True)
    found = run(tmp_path / "e.fits", None, **options).problem  # type: ignore[arg-type]
    assert found.std[0, 0] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": np.full((24, 24), np.nan)}, "NaN everywhere"),
        ({"image": np.zeros((3, 24, 24))}, r"expected \(h, w\)"),
        ({"noise": np.where(np.eye(24) > 0, 0.0, 1.0)}, "24 pixels that are zero or negative"),
        ({"noise": -np.ones((24, 24))}, "576 pixels"),
        ({"noise": np.ones((23, 24))}, "one shape"),
        ({"noise": np.full((24, 24), np.inf)}, "no finite pixel"),
        ({"noise": -1.0}, "positive standard deviation"),
        ({"noise": 0.0}, "positive standard deviation"),
        ({"psf": np.zeros((9, 9))}, "zero everywhere"),
        ({"cutout": (100, 3, 8)}, "off the image"),
        ({"cutout": (10, 10, 4)}, "at least 8"),
        ({"cutout": (10, 10, 8), "size": 9}, "one or the other"),
        ({"center": (3.0, 4.0)}, "no celestial"),
        ({"oversample": 0}, "oversample = 0"),
        ({"scale": -1.0}, "positive flux"),
        ({"psf_error": -0.1}, "psf_error"),
        ({"exptime": -1.0, "noise": None, "image": "field"}, "exposure time"),
        ({"samples": 0}, "at least 1"),
    ],
)
def test_bad_inputs_are_refused_in_words(options: dict[str, object], message: str) -> None:
    options = dict(options)
    image = options.pop("image", simulated(0.1))
    if isinstance(image, str):
        image = field()
    noise = options.pop("noise", 0.1)
    psf = options.pop("psf", star(17, 8, 8))
    settings: dict[str, object] = {"prior": prior(), "samples": 1, "progress": False, "scale": 20.0}
    with pytest.raises(ValueError, match=message):
        deconvolve(image, psf, noise, **(settings | options))  # type: ignore[arg-type]


def test_priors_of_several_channels_are_refused() -> None:
    colour = GaussianScore(torch.zeros(3, 32, 32), var=1.0, sde=EDM())
    with pytest.raises(ValueError, match="one channel"):
        run(simulated(0.1), 0.1, prior=colour)


# The folder -----------------------------------------------------------------------------------


def image_file(path: Path, unit: str = "electron / s") -> Path:
    hdu = fits.PrimaryHDU(simulated(0.1).astype(np.float32))
    header = hdu.header
    header["CTYPE1"], header["CTYPE2"] = "RA---TAN", "DEC--TAN"
    header["CRPIX1"], header["CRPIX2"] = 5.5, 9.25
    header["CRVAL1"], header["CRVAL2"] = 3.58, -30.39
    header["CD1_1"], header["CD1_2"], header["CD2_1"], header["CD2_2"] = -1.6e-5, 2e-6, 2e-6, 1.6e-5
    header["BUNIT"] = unit
    hdu.writeto(path)
    return path


FILES = {
    "background.fits",
    "data.fits",
    "mask.fits",
    "mean.fits",
    "q16.fits",
    "q50.fits",
    "q84.fits",
    "residual.fits",
    "run.json",
    "samples.fits",
    "samples.zarr",
    "std.fits",
    "summary.png",
}


@pytest.mark.parametrize("unit", ["electron / s", "MJy/sr"])
def test_the_folder_holds_maps_with_coordinates_and_units(tmp_path: Path, unit: str) -> None:
    path = image_file(tmp_path / "image.fits", unit)
    out = run(
        path,  # type: ignore[arg-type]
        0.1,
        cutout=(12, 10, 16),
        oversample=2,
        prior=prior(64),
        scale=5.0,
    )
    folder = tmp_path / "deep" / "out"
    out.save(folder)
    assert {item.name for item in folder.iterdir()} == FILES
    assert sorted(item.name for item in (tmp_path / "deep").iterdir()) == ["out"]
    for name in ("mean", "std", "q16", "q50", "q84"):
        with fits.open(folder / f"{name}.fits") as hdus:
            assert hdus[0].data.shape == (32, 32)
            assert hdus[0].header["BUNIT"] == unit
            fine = WCS(hdus[0].header)
            mean = hdus[0].data if name == "mean" else mean  # noqa: F821
    # Image pixel (9, 7) is cutout pixel (9 - 5, 7 - 3), fine (8.5, 8.5).
    corner = out.problem.corner
    sky = WCS(fits.getheader(path)).all_pix2world([[9, 7]], 0)
    expected = [[2 * (9 - corner[0]) + 0.5, 2 * (7 - corner[1]) + 0.5]]
    assert np.allclose(fine.all_world2pix(sky, 0), expected, atol=1e-6)
    with fits.open(folder / "samples.fits") as hdus:
        assert hdus[0].data.shape == (4, 32, 32)
        assert np.allclose(hdus[0].data.mean(0), mean, rtol=1e-4, atol=1e-4)
    with fits.open(folder / "residual.fits") as hdus:
        assert hdus[0].data.shape == (16, 16)
        assert np.allclose(
            WCS(hdus[0].header).all_world2pix(sky, 0), [[9 - corner[0], 7 - corner[1]]]
        )
    # Flux per pixel adds up over fine pixels; surface brightness averages.
    total = fits.getdata(folder / "data.fits").sum()
    ratio = mean.sum() / total
    assert ratio == pytest.approx(4.0 if unit == "MJy/sr" else 1.0, rel=0.1)
    assert torch.equal(Samples.load(folder / "samples.zarr").x, out.samples.x)
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0
    assert record["metrics"]["reduced_chi2"]["draws_expected"] == 1
    assert record["inferred"]["scale"] == 5.0
    assert re.fullmatch("[0-9a-f]{64}", record["prior"]["sha256"])
    assert "torch" in record["versions"]
    assert (folder / "summary.png").read_bytes()[:4] == b"\x89PNG"


def test_results_are_replaced_only_when_asked_and_only_when_whole(
    tmp_path: Path, result: DeconvolutionResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    result.save(folder)
    (folder / "note.txt").write_text("mine")
    before = (folder / "run.json").read_text()
    with pytest.raises(FileExistsError, match="--overwrite"):
        result.save(folder)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffpost.jobs.outputs.write_cube", full)
        with pytest.raises(OSError, match="full"):
            result.save(folder, overwrite=True)
    assert (folder / "run.json").read_text() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out"]
    result.save(folder, overwrite=True)
    assert {item.name for item in folder.iterdir()} == FILES | {"note.txt"}
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="other files"):
        result.save(strangers, overwrite=True)


def test_an_unfinished_run_is_not_started_over_by_accident(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "out")
    folder.check()
    (folder.start() / "rows").write_text("a draw")
    with pytest.raises(FileExistsError, match="--resume"):
        folder.check()
    folder.check(resume=True)
    folder.check(overwrite=True)
    assert (folder.start(resume=True) / "rows").exists()
    assert not (folder.start() / "rows").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        OutputFolder(tmp_path / "file").check()


def test_an_interrupted_run_gives_the_same_draws(tmp_path: Path) -> None:
    whole = run(simulated(0.1), 0.1, samples=4, batch_size=2)
    kept = tmp_path / "partial"
    run(simulated(0.1), 0.1, samples=4, batch_size=2, checkpoint=kept)
    batches = sorted(kept.glob("rows-*.npz"))
    batches[-1].unlink()
    resumed = run(simulated(0.1), 0.1, samples=4, batch_size=2, checkpoint=kept)
    assert torch.equal(resumed.samples.x, whole.samples.x)
    with pytest.raises(ValueError, match="another run"):
        run(simulated(0.1, seed=1), 0.1, samples=4, batch_size=2, checkpoint=kept)


def test_a_prior_keeps_its_offset():
    """Data about 50 with a prior about 50: a prior shifted to 0 would pull the mean far away."""
    shifted = GaussianScore(torch.zeros(1, 32, 32), var=1.0, sde=EDM()).with_affine(1.0, 50.0)
    image = 50.0 + np.random.default_rng(0).normal(0.0, 10.0, (SIDE, SIDE))
    result = run(image, 10.0, prior=shifted, scale=1.0, keep_neighbours=True)
    assert abs(result.mean.mean() - 50.0) < 1.0


def chips(path: Path, sky: np.ndarray, error: np.ndarray) -> Path:
    planes = [fits.PrimaryHDU(), fits.ImageHDU(sky, name="SCI"), fits.ImageHDU(error, name="ERR")]
    fits.HDUList(planes).writeto(path)
    return path


def noisy_sky() -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 0.5, (SIDE, SIDE)) + blurred()


@pytest.mark.parametrize("plane", [0, 2])
def test_the_error_plane_of_a_cube_is_that_of_the_image(tmp_path: Path, plane: int) -> None:
    sky = np.stack([noisy_sky()] * 3)
    levels = (0.2, 0.4, 0.9)
    error = np.stack([np.full((SIDE, SIDE), level) for level in levels])
    problem = prepare(chips(tmp_path / "a.fits", sky, error), star(17, 8, 8), plane=plane)
    assert np.allclose(problem.std, levels[plane])
    assert any("noise: extension 2 (ERR) of the image" in note for note in problem.notes)
    assert not any("was not used" in note for note in problem.notes)
    # A single error image serves every plane; a cube of another length none, and that is told.
    one = prepare(chips(tmp_path / "b.fits", sky, error[1]), star(17, 8, 8), plane=plane)
    assert np.allclose(one.std, 0.4)
    two = prepare(chips(tmp_path / "c.fits", sky, error[:2]), star(17, 8, 8), plane=plane)
    assert two.report["noise"]["source"] == "sky"
    assert any("not used" in note and "holds 2 images" in note for note in two.notes)
    # A map that is named follows the plane as well.
    fits.PrimaryHDU(error).writeto(tmp_path / "rms.fits")
    image, rms = tmp_path / "b.fits", tmp_path / "rms.fits"
    assert np.allclose(prepare(image, star(17, 8, 8), rms, plane=plane).std, levels[plane])


def test_zeros_of_an_error_extension_are_masked_and_those_of_a_map_refused(tmp_path: Path) -> None:
    error = np.full((SIDE, SIDE), 0.5)
    error[3, 4:9] = 0.0
    error[5, 5] = np.nan
    problem = prepare(chips(tmp_path / "a.fits", noisy_sky(), error), star(17, 8, 8))
    assert np.isinf(problem.std[3, 4:9]).all()
    assert np.isnan(problem.data[3, 4:9]).all()
    assert np.isfinite(problem.std).sum() == SIDE**2 - 6
    assert any("6 pixels around the target are zero, inf or NaN" in note for note in problem.notes)
    # Negative controls: the same map, named; negative values; nothing left.
    with pytest.raises(ValueError, match="has 5 pixels that are zero or negative"):
        prepare(tmp_path / "a.fits", star(17, 8, 8), error)
    with pytest.raises(ValueError, match=r"extension 2 \(ERR\) .* 576 pixels that are negative"):
        prepare(chips(tmp_path / "b.fits", noisy_sky(), -np.ones((SIDE, SIDE))), star(17, 8, 8))
    with pytest.raises(ValueError, match="no finite pixel around the target"):
        prepare(chips(tmp_path / "c.fits", noisy_sky(), 0 * error), star(17, 8, 8))


def test_a_weight_map_is_the_inverse_variance(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rms = rng.uniform(0.05, 0.5, (SIDE, SIDE))
    weight = rms**-2
    weight[2, 3:7], weight[9, 9], weight[10, 9] = 0.0, np.nan, np.inf
    problem = prepare(simulated(0.1), star(17, 8, 8), weight=weight)
    masked = ~(np.isfinite(weight) & (weight > 0))
    assert masked.sum() == 6
    assert np.allclose(problem.std[~masked], rms[~masked], rtol=1e-12)
    assert np.isinf(problem.std[masked]).all()
    assert np.isnan(problem.data[masked]).all()
    assert any("6 pixels around the target have no finite" in note for note in problem.notes)
    # The same as the map of standard deviations, and of a cube the plane of the image.
    rms[masked] = np.inf
    assert np.array_equal(problem.std, prepare(simulated(0.1), star(17, 8, 8), rms).std)
    fits.PrimaryHDU(np.stack([simulated(0.1)] * 2)).writeto(tmp_path / "cube.fits")
    fits.PrimaryHDU(np.stack([weight, np.full_like(weight, 4.0)])).writeto(tmp_path / "ivm.fits")
    paths = (tmp_path / "cube.fits", star(17, 8, 8))
    assert (prepare(*paths, weight=tmp_path / "ivm.fits", plane=1).std == 0.5).all()
    for bad, message in (
        (-weight, "negative pixels.*goes to --noise"),
        (np.zeros_like(rms), "no positive pixel"),
        (weight[1:], "one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(simulated(0.1), star(17, 8, 8), weight=np.nan_to_num(bad, posinf=0.0))
    with pytest.raises(ValueError, match="a noise and a weight"):
        prepare(simulated(0.1), star(17, 8, 8), 0.1, weight=weight)


def test_an_image_is_not_its_own_noise(tmp_path: Path) -> None:
    path = chips(tmp_path / "a.fits", noisy_sky(), np.ones((SIDE, SIDE)))
    with pytest.raises(ValueError, match="is the image itself"):
        prepare(path, star(17, 8, 8), path)


def test_without_a_rule_the_priors_own_units_stand() -> None:
    own = prior(rms=1.0).with_affine(20.0, 0.5)
    out = run(simulated(0.1), 0.1, prior=own, scale=None)
    assert (float(out.prior.scale), float(out.prior.offset)) == (20.0, 0.5)
    (told,) = [note for note in out.notes if note.startswith("flux scale")]
    assert "states no rule" in told
    assert "20 per model pixel" in told
    assert out.problem.report["flux"] == {"own_units": True}
    # The same as asking for that scale, and not the same as another.
    given = run(simulated(0.1), 0.1, prior=own, scale=20.0)
    assert torch.equal(given.samples.x, out.samples.x)
    other = run(simulated(0.1), 0.1, prior=own, scale=5.0)
    assert not torch.allclose(other.samples.x, out.samples.x, atol=1e-2)


def test_the_error_extension_of_the_same_version_is_used(tmp_path):
    sky = np.random.default_rng(0).normal(0.0, 0.5, (SIDE, SIDE)) + blurred()
    hdus = [fits.PrimaryHDU()]
    for version, level in ((1, 0.2), (2, 0.9)):
        for name, data in (("SCI", sky), ("ERR", np.full((SIDE, SIDE), level))):
            hdus.append(fits.ImageHDU(data.astype(np.float32), name=name, ver=version))
    fits.HDUList(hdus).writeto(tmp_path / "chips.fits")
    for hdu, level in ((1, 0.2), (3, 0.9)):
        result = run(tmp_path / "chips.fits", None, hdu=hdu)
        assert np.median(result.problem.std) == pytest.approx(level, rel=1e-5)
