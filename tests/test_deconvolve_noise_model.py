"""Deconvolution under a noise model: exact Gaussian scores against the Gaussian posterior, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from typer.testing import CliRunner

from diffpost.cli import app
from diffpost.deconvolve import DeconvolutionResult, build_operator, deconvolve
from diffpost.io.checkpoints import save_prior
from diffpost.jobs.noise_model import expectations, judged
from diffpost.jobs.problem import prepare
from diffpost.jobs.setup import set_up
from diffpost.learned_noise import LearnedNoise
from diffpost.lens import reconstruct_lens
from diffpost.likelihood import Likelihood
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.noise import BlockNoise, GaussianNoise
from diffpost.operator import Crop, Identity
from diffpost.samplers import MALA, DPMSolver
from diffpost.samples import Samples
from diffpost.scale_mixture import ScaleMixtureScore
from diffpost.score import GaussianScore
from diffpost.sde import EDM

F64 = torch.float64
SIDE, GRID = 12, 20
SDE = EDM(1e-3, 50.0)
STD = 0.6
DRAWS = 60
SLOPE = -2.0  # of the noise's power


def star(n: int, sigma: float = 1.2) -> np.ndarray:
    yy, xx = np.mgrid[:n, :n] - n // 2
    out = np.exp(-(yy**2 + xx**2) / (2 * sigma**2))
    return out / out.sum()


def field(n: int, slope: float, rms: float) -> torch.Tensor:
    k = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None, :]) * n
    p = (1 + k) ** slope
    return torch.from_numpy(rms**2 * p / p.mean())[None]


POWER = field(SIDE, SLOPE, STD)


def prior() -> GaussianScore:
    return GaussianScore(torch.zeros(1, GRID, GRID), power=field(GRID, -2.0, 1.0), sde=EDM())


def noise(std: float = STD, n: int = SIDE) -> LearnedNoise:
    """Correlated noise by its exact score."""
    return LearnedNoise(GaussianScore(torch.zeros(1, n, n), power=field(n, SLOPE, std), sde=SDE))


def settings(**changed: object) -> dict[str, object]:
    usual: dict[str, object] = {
        "prior": prior(),
        "samples": DRAWS,
        "batch_size": DRAWS,
        "background": "none",
        "keep_neighbours": True,
        "progress": False,
    }
    return usual | changed


def run(image: np.ndarray, **changed: object) -> DeconvolutionResult:
    return deconvolve(image, star(9), **settings(**changed))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """A draw of the prior, seen through the PSF, with noise of the known spectrum."""
    blank = prepare(np.random.default_rng(0).normal(size=(SIDE, SIDE)), star(9), 1.0)
    setup = set_up(blank, prior())
    rows, columns = setup.grid.data_region(1)
    seen = build_operator(setup.problem)(prior().sample(1, seed=3))[0, 0, rows, columns]
    added = GaussianNoise(power=POWER).sample((1, SIDE, SIDE), 4, F64)[0]
    return (seen + added).double().numpy()


START = DPMSolver(16, eta=1.0)


@pytest.fixture(scope="module")
def learned(image: np.ndarray) -> DeconvolutionResult:
    return run(image, noise_model=noise(), sampler=MALA(8, START, nsr=0.05))


def against(found: DeconvolutionResult, covariance: torch.Tensor) -> tuple[float, float]:
    """Spread and offset of draws in units of the exact posterior's, each 1 if right: the mean square of the whitened
    deviations from the exact mean, and the square of their mean, times the draws.
    """
    n = GRID**2
    eye = torch.eye(n, dtype=F64).reshape(n, 1, GRID, GRID)
    rows, columns = found.grid.data_region(1)
    seen, y = found.likelihood.operator(eye), found.likelihood.y.double()
    if seen.shape[-1] > SIDE:
        seen, y = seen[..., rows, columns], y[..., rows, columns]
    a = seen.flatten(1).T
    modes = torch.fft.fft2(eye, norm="ortho") * field(GRID, -2.0, 1.0)
    c = torch.fft.ifft2(modes, norm="ortho").real.flatten(1)
    gain = c @ a.T @ torch.linalg.inv(a @ c @ a.T + covariance)
    mean = gain @ y.flatten()
    root = torch.linalg.cholesky(torch.linalg.inv(c - gain @ a @ c))
    white = (found.samples.x.double().flatten(1) - mean) @ root
    return float(white.square().mean()), float(white.mean(0).square().mean()) * len(white)


def covariance_of(power: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(SIDE**2, dtype=F64).reshape(-1, 1, SIDE, SIDE)
    return torch.fft.ifft2(torch.fft.fft2(eye) * power).real.flatten(1)


def right(found: DeconvolutionResult) -> bool:
    """Whether draws are of the posterior under the noise of the known spectrum: spread and offset within 4.5 standard errors
    of independent draws, and 4% of the spread for the sampler's steps and the blur.
    """
    spread, offset = against(found, covariance_of(POWER))
    d, n = GRID**2, len(found.samples)
    return abs(spread - 1) < 4.5 * math.sqrt(2 / (n * d)) + 0.04 and abs(
        offset - 1
    ) < 4.5 * math.sqrt(2 / d)


# the posterior ---------------------------------------------------------------------------------


def test_correlated_noise_by_its_score_gives_the_gaussian_posterior(
    learned: DeconvolutionResult, image: np.ndarray
) -> None:
    assert right(learned)
    # negative controls: noise of twice the standard deviation, and white noise of the same
    assert not right(run(image, noise_model=noise(2 * STD), moves=0))
    assert not right(run(image, noise=STD))


def test_the_chain_mends_what_a_wrong_surrogate_did(image: np.ndarray) -> None:
    """White noise in place of the spectrum: only the scores know it."""
    model = noise().score_model
    poor = LearnedNoise(model, surrogate=GaussianNoise(std=STD))
    assert not right(run(image, noise_model=poor, moves=0))
    mended = run(image, noise_model=poor, sampler=MALA(24, START, nsr=0.05))
    assert right(mended) and mended.metrics["chain"]["acceptance"] > 0.3


def test_white_noise_by_its_score_agrees_with_the_job_under_gaussian_noise(
    image: np.ndarray,
) -> None:
    """Independent draws by both, seen through the PSF in the cutout, where the noise decides how wide they are: the square
    of the difference of the means over its expectation, and the ratio of the widths.
    """

    def seen(found: DeconvolutionResult) -> torch.Tensor:
        data = found.likelihood.operator(found.samples.x)
        rows, columns = found.grid.data_region(1)
        return (data[..., rows, columns] if data.shape[-1] > SIDE else data).double()

    def compared(std: float) -> tuple[float, float]:
        model = GaussianScore(torch.zeros(1, SIDE, SIDE), var=std**2, sde=SDE)
        a = seen(run(image, noise_model=LearnedNoise(model), sampler=MALA(6, START, nsr=0.05)))
        width, wide = b.var(0).mean(), a.var(0).mean()
        difference = (a.mean(0) - b.mean(0)).square().mean()
        return float(difference / (width + wide) * DRAWS), float(wide / width) ** 0.5

    b = seen(run(image, noise=STD, seed=1))
    # some eleven modes decide: over seeds the offset is 1.1 +- 0.4, beyond 3.4 once in 10,000, and the ratio scatters by 0.03
    offset, ratio = compared(STD)
    assert offset < 3.4 and ratio == pytest.approx(1, abs=0.12)
    offset, ratio = compared(2 * STD)  # negative control
    assert offset > 3.4 or ratio > 1.12


def test_the_operator_ends_in_a_crop_and_metrics_know_the_correlation(
    learned: DeconvolutionResult,
) -> None:
    assert learned.likelihood.data_shape == (1, SIDE, SIDE)
    assert isinstance(learned.likelihood.operator.outer, Crop)  # type: ignore[attr-defined]
    assert learned.residual.shape == (SIDE, SIDE) and np.isfinite(learned.residual).all()
    known = covariance_of(POWER)[0] / STD**2
    expected = learned.metrics["residual_autocorrelation"]["expected"]
    assert expected["x"] == pytest.approx(float(known[1]), abs=1e-4)
    assert expected["y"] == pytest.approx(float(known[SIDE]), abs=1e-4)
    found = learned.metrics["whitened_chi2"]
    limit = 5 * math.sqrt(2 / SIDE**2)
    assert abs(found["draws"] - 1) < limit and abs(found["expected"] - 1) < limit
    # a draw's residual is 1 by the model; that of the mean is less, by what the draws scatter
    assert found["mean"] < found["draws"]
    assert 0 < found["expected_std"] < 3 * math.sqrt(2 / SIDE**2)


def test_of_a_chain_what_is_told(learned: DeconvolutionResult) -> None:
    chain = learned.metrics["chain"]
    assert chain["levels"] == [{"nsr": 0.05, "moves": 8}] and 0 < chain["step_size"] <= 1
    assert chain["acceptance_min"] <= chain["acceptance"] <= 1
    assert json.dumps(learned.metrics)


def test_more_noise_on_top_is_the_sources_own(image: np.ndarray) -> None:
    out = run(image, noise_model=noise(), psf_error=0.1, moves=4, samples=4)
    plus = out.problem.noise_model.plus  # type: ignore[union-attr]
    assert isinstance(plus, GaussianNoise)
    extra = plus.variance[0].numpy()
    assert extra.max() > 1e-3 and extra.argmax() == out.problem.std.argmax()
    assert np.allclose(out.problem.std**2, STD**2 + extra, rtol=1e-4)
    assert run(image, noise_model=noise(), moves=0, samples=2).problem.noise_model.plus is None  # type: ignore[union-attr]


def test_the_same_draws_after_an_interruption_and_no_other_run_in_the_folder(
    image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpost import resume

    save = resume.RunFolder.save
    saved: list[int] = []

    def interrupt(self: resume.RunFolder, *args: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *args)  # type: ignore[arg-type]

    some: dict[str, object] = {
        "samples": 3,
        "batch_size": 1,
        "sampler": MALA(4, DPMSolver(6, eta=1.0), nsr=0.05),
    }
    whole = run(image, noise_model=noise(), **some)
    with monkeypatch.context() as patch:
        patch.setattr(resume.RunFolder, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(image, noise_model=noise(), checkpoint=tmp_path, **some)
    with pytest.raises(ValueError, match="another run"):
        run(image, noise_model=noise(1.01 * STD), checkpoint=tmp_path, **some)
    resumed = run(image, noise_model=noise(), checkpoint=tmp_path, **some)
    assert torch.equal(resumed.samples.x, whole.samples.x)
    assert torch.equal(resumed.samples.extras["acceptance"], whole.samples.extras["acceptance"])


# what it refuses -------------------------------------------------------------------------------


def sky(n: int = 48, std: float = 0.1) -> np.ndarray:
    """A galaxy in the middle of white sky."""
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[:n, :n] - (n - 1) / 2
    return 30 * np.exp(-(yy**2 + xx**2) / 12) / 12 + std * rng.normal(size=(n, n))


def near(image: np.ndarray, **changed: object) -> object:
    options: dict[str, object] = {"cutout": (23.5, 23.5, SIDE), "background": "none"}
    return prepare(image, star(9), **(options | changed))  # type: ignore[arg-type]


def test_masked_pixels_are_refused_with_what_to_do() -> None:
    data = sky()
    data[20, 22] = np.nan
    with pytest.raises(
        ValueError, match=r"1 pixels of the cutout are masked: 1 without data.*--noise-std"
    ):
        near(data, noise_model=noise(0.1))
    yy, xx = np.mgrid[:48, :48]
    beside = sky() + 20 * np.exp(-((yy - 23) ** 2 + (xx - 33) ** 2) / 4)
    with pytest.raises(ValueError, match="of neighbours; --keep-neighbours"):
        near(beside, noise_model=noise(0.1, 24), cutout=(23.5, 23.5, 24))
    near(beside, noise_model=noise(0.1, 24), cutout=(23.5, 23.5, 24), keep_neighbours=True)
    # masked pixels outside of the cutout do not matter
    data = sky()
    data[2, 2] = np.nan
    near(data, noise_model=noise(0.1))


def test_a_model_of_other_noise_than_the_skys_is_refused_or_told() -> None:
    with pytest.raises(
        ValueError, match=r"is 0\.4 and that of the image's blank sky 0\.1.*--sky-std"
    ):
        near(sky(), noise_model=noise(0.4))
    with pytest.raises(ValueError, match=r"is 0\.04 and"):
        near(sky(), noise_model=noise(0.04))
    told = near(sky(), noise_model=noise(0.15)).notes  # type: ignore[attr-defined]
    assert any("error bars will be wrong" in note for note in told)
    told = near(sky(), noise_model=noise(0.1)).notes  # type: ignore[attr-defined]
    assert not any("error bars will be wrong" in note for note in told)


def test_one_noise_only() -> None:
    with pytest.raises(ValueError, match="noise model and also a Gaussian noise"):
        near(sky(), noise_model=noise(0.1), noise=0.1)
    with pytest.raises(ValueError, match="noise model and also a Gaussian noise"):
        near(sky(), noise_model=noise(0.1), weight=np.full((48, 48), 100.0))
    with pytest.raises(ValueError, match="sky_std without a noise model"):
        near(sky(), sky_std=0.1)
    with pytest.raises(ValueError, match="scale it by load_noise"):
        near(sky(), noise_model=noise(0.1), sky_std=0.1)


def test_a_lens_is_not_reconstructed_under_a_noise_model() -> None:
    main = {"profile": "SIE", "q": 0.8, "phi": 0.0, "Rein": 1.0}
    model = {"mass": {"main": main}, "pixel": 0.05}
    with pytest.raises(ValueError, match="lenses are reconstructed under Gaussian noise"):
        reconstruct_lens(sky(), star(9), model=model, prior=prior(), noise_model=noise())


def test_moves_are_of_learned_noise(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Gaussian noise needs none"):
        run(image, noise=STD, moves=8)
    with pytest.raises(ValueError, match="got 1 moves of a chain; expected 0"):
        run(image, noise_model=noise(), moves=1)
    with pytest.raises(ValueError, match="one or the other"):
        run(image, noise_model=noise(), moves=4, sampler=DPMSolver(4))


def test_the_chains_noise_can_always_be_taken_out(image: np.ndarray) -> None:
    """Where the data are as precise as the process, the last level stays above its lowest, from which nothing leads down."""
    coarse = GaussianScore(prior().mean, power=prior().eigenvalues, sde=EDM(0.3, 80.0))
    out = run(image, prior=coarse, noise_model=noise(), moves=4, samples=2)
    assert isinstance(out.sampler, MALA) and out.sampler.nsr == 0.6
    assert bool(out.samples.x.isfinite().all())
    fine = run(image, noise_model=noise(), moves=4, samples=2).sampler
    assert isinstance(fine, MALA) and isinstance(fine.start, MALA)
    assert fine.nsr is not None and fine.start.nsr is not None
    assert fine.nsr == pytest.approx(fine.start.nsr / 4, rel=0.01)
    assert fine.reverse is not None and fine.start.reverse is not None


def untrained(card: dict[str, object], size: int = 32, data: float = 1.0) -> NetworkScore:
    """Near zero, a network's output leaves the preconditioning, which is the score of white noise of ``data``."""
    config = {"kind": "unet", "channels": 1, "patch": 2, "embedding": 8}
    config |= {"widths": [8], "blocks": [1]}
    torch.manual_seed(0)
    return NetworkScore(build_network(config), EDM(), (1, size, size), data, card=card)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("noise-models")
    about = {"unit": "electron / s", "per_field": False}
    base: dict[str, object] = {"name": "tiny", "noise_std": 1.0}
    save_prior(root / "run" / "prior", untrained({**base, "noise": about}, 16).with_affine(0.1))
    fields = {**base, "noise": {"unit": "electron / s", "per_field": True}}
    save_prior(root / "fields", untrained(fields, 16).with_affine(0.7))
    save_prior(root / "prior", untrained({"name": "a prior"}, data=0.5))
    return root


def test_folders_of_models(folders: Path) -> None:
    def of(name: str, image: np.ndarray, **more: object) -> DeconvolutionResult:
        return near(image, noise_model=folders / name, **more)  # type: ignore[return-value]

    for name in ("run", "run/prior"):
        assert of(name, sky()).report["noise"]["std"] == pytest.approx(0.1, rel=1e-5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not a model of noise"):
        of("prior", sky())
    scaled = of("run", sky(std=0.3), sky_std=0.3)
    assert scaled.report["noise"]["std"] == pytest.approx(0.3, rel=1e-5)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="expected a positive number"):
        of("run", sky(), sky_std=-1.0)
    # one that has no depth takes the sky's
    measured = of("fields", sky(std=0.3)).report["noise"]  # type: ignore[attr-defined]
    assert measured["std"] == pytest.approx(0.3, rel=0.03) and len(measured["sha256"]) == 64
    with pytest.raises(ValueError, match="--sky-std"):
        of("fields", sky(SIDE), cutout=(7.5, 7.5, SIDE))


def written(folder: Path, unit: str = "electron / s", std: float = 0.1) -> list[str]:
    hdu = fits.PrimaryHDU(sky(std=std).astype(np.float32))
    hdu.header["BUNIT"] = unit
    hdu.writeto(folder / "image.fits", overwrite=True)
    fits.PrimaryHDU(star(9).astype(np.float32)).writeto(folder / "psf.fits", overwrite=True)
    card = {"name": "tiny", "flux_scale": {"rule": "smoothed_peak", "smoothing": 1.28}}
    save_prior(folder / "galaxies", untrained(dict(card), data=0.5))
    words = f"deconvolve {folder}/image.fits --psf {folder}/psf.fits --prior {folder}/galaxies --cutout 23,23,{SIDE}"
    return [*words.split(), "--steps", "4", "--samples", "2"]


def test_the_command(folders: Path, tmp_path: Path) -> None:
    base = [*written(tmp_path), "--noise-model", str(folders / "run")]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*base, "--moves", "4", "--out", str(out)])
    assert done.exit_code == 0, done.output
    for word in ("noise: of the model", "whitened χ²", "Chains of 2 + 2 moves"):
        assert word in done.output
    record = json.loads((out / "run.json").read_text())
    assert (
        record["noise_model"]["name"].endswith("run") and len(record["noise_model"]["sha256"]) == 64
    )
    assert record["noise_model"]["unit"] == "electron / s"
    assert record["sampler"].startswith("MALA(steps=2, start=MALA(steps=2, start=DPMSolver(steps=4")
    assert record["metrics"]["whitened_chi2"]["draws"] > 0
    assert (out / "summary.png").stat().st_size > 10_000
    # the same by the API
    same = deconvolve(
        tmp_path / "image.fits",
        tmp_path / "psf.fits",
        prior=tmp_path / "galaxies",
        noise_model=folders / "run",
        cutout=(23, 23, SIDE),
        samples=2,
        sampler=None,
        moves=4,
        steps=4,
        progress=False,
    )
    assert torch.allclose(Samples.load(out / "samples.zarr").x, same.samples.x, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--noise-std", "0.1"], "got --noise-std and --noise-model; give one of them"),
        (["--noise", "rms.fits"], "got --noise and --noise-model; give one of them"),
        (["--exptime", "-1"], "got an exposure time of -1"),
        (["--moves", "1"], "expected 0 (no chain), or 4 or more"),
    ],
)
def test_the_command_refuses(folders: Path, tmp_path: Path, more: list[str], told: str) -> None:
    base = [*written(tmp_path), "--noise-model", str(folders / "run"), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*base, *more])
    assert done.exit_code == 2 and told in " ".join(done.stderr.split())
    assert not (tmp_path / "o" / "run.json").exists()


def test_the_command_refuses_another_unit(folders: Path, tmp_path: Path) -> None:
    base = [*written(tmp_path, "MJy/sr"), "--out", str(tmp_path / "o")]
    done = CliRunner().invoke(app, [*base, "--noise-model", str(folders / "run")])
    told = " ".join(done.stderr.split())
    assert done.exit_code == 2 and "'electron / s'" in told and "'MJy/sr'" in told


# the noise itself ------------------------------------------------------------------------------


def test_a_measured_spectrum_is_the_models() -> None:
    """A Gaussian that does not tell its spectrum, so that it is measured: 512 draws give each mode to 6%."""
    power = field(8, -1.0, STD)
    eye = torch.eye(64, dtype=F64).reshape(-1, 1, 8, 8)
    dense = torch.fft.ifft2(torch.fft.fft2(eye) * power).real.flatten(1)
    model = GaussianScore(torch.full((1, 8, 8), 0.3, dtype=F64), cov=dense, sde=SDE)
    plain = LearnedNoise(model)
    assert plain.surrogate((1, 8, 8)).spectrum((1, 8, 8)).numel() == 1  # type: ignore[union-attr]
    found = plain.with_spectrum(512).surrogate((1, 8, 8)).spectrum((1, 8, 8))
    assert found is not None
    error = (found / power - 1).abs()
    assert float(error.max()) < 4.5 * math.sqrt(2 / 512) + 0.02  # real modes scatter most
    assert float((found / power.mean() - 1).abs().max()) > 1  # negative control: a white surrogate
    # of another size, by interpolation: the variance stays
    other = plain.with_spectrum(512).surrogate((1, 12, 12))
    assert float(other.variance.mean()) == pytest.approx(STD**2, rel=0.1)
    with pytest.raises(ValueError, match="expected 8 or more"):
        plain.with_spectrum(2)


def test_chi2_of_any_noise() -> None:
    power = field(8, -1.0, STD)
    model = GaussianScore(torch.zeros(1, 8, 8, dtype=F64), power=power, sde=SDE)
    r = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64)
    exact = GaussianNoise(power=power + 1e-6)
    torch.testing.assert_close(LearnedNoise(model).chi2(r), exact.chi2(r), rtol=1e-4, atol=0)
    outliers = LearnedNoise(ScaleMixtureScore.outliers(0.3, (1, 8, 8), SDE))
    own = outliers.sample((400, 1, 8, 8), 1, F64)
    values = outliers.chi2(own)
    error = float(values.std()) / 20
    assert abs(float(values.mean()) - 64) < 4.5 * error + 0.5  # the flow's own error
    doubled = outliers.chi2(2 * own)  # negative control
    assert abs(float(doubled.mean()) - 64) > 9 * error + 1
    joint = BlockNoise([LearnedNoise(model), exact], [(1, 8, 8), (1, 8, 8)])
    both = torch.cat([r.flatten(1), r.flatten(1)], 1)
    torch.testing.assert_close(joint.chi2(both), 2 * exact.chi2(r), rtol=1e-4, atol=0)
    like = Likelihood(r[0], Identity(), LearnedNoise(model))
    torch.testing.assert_close(
        like.chi2(torch.zeros_like(r[:1])), exact.chi2(r[:1]), rtol=1e-4, atol=0
    )


def test_expectations_by_simulation() -> None:
    model = noise(n=SIDE).with_spectrum()
    known = expectations(model, (1, SIDE, SIDE))
    draws = GaussianNoise(power=POWER).sample((2000, 1, SIDE, SIDE), 5, F64)
    reduced = draws.square().mean((1, 2, 3)) / STD**2
    assert float(reduced.std()) == pytest.approx(known["chi2_std"], rel=0.08)
    assert known["chi2_std"] > 1.1 * math.sqrt(2 / SIDE**2)  # what white noise would have
    own = judged(model, draws[:1].float(), draws[:32].float())
    assert own["draws"] == pytest.approx(1, abs=4.5 * math.sqrt(2 / (32 * SIDE**2)) + 0.01)
    wrong = judged(noise(2 * STD), draws[:1].float(), draws[:32].float())  # negative control
    assert wrong["draws"] == pytest.approx(0.25, abs=0.03)
