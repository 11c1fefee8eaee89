"""The lens job on a simulated lens with a Gaussian field as the source, through the function and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from astropy.io import fits
from typer.testing import CliRunner

pytest.importorskip("caustics", reason="caustics is not installed")

import diffpost as dp
from diffpost.cli import app
from diffpost.io.checkpoints import save_prior
from diffpost.jobs.lens_setup import binned, lens_scene, read_description
from diffpost.jobs.problem import prepare
from diffpost.lens import LensResult, _warnings, reconstruct_lens
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.physics import Grid, Lens, LensLight, read_lens_model
from diffpost.samples import Samples

SIDE, PIXEL, SOURCE = 32, 0.12, 12
NOISE = 0.05
TRUTH = {"main.Rein": 1.2, "main.q": 0.75}
MODEL: dict[str, Any] = {
    "pixel": PIXEL,
    "mask": {"inner": 0.3, "outer": 1.8},
    "source": {"size": SOURCE, "pixel": 0.12, "centre": [0.0, 0.0]},
    "oversample": 1,
    "mass": {
        "main": {
            "profile": "SIE",
            "q": {"uniform": [0.5, 0.95]},
            "phi": 0.4,
            "Rein": {"normal": [1.1, 0.15], "within": [0.5, 2.0]},
        }
    },
}
TRUTH_ORDER = ("main.q", "main.Rein")  # as the model has them
KNOWN = {**MODEL, "mass": {"main": {"profile": "SIE", "q": 0.75, "phi": 0.4, "Rein": 1.2}}}


def prior() -> dp.GaussianScore:
    """A field with a falling spectrum about a round galaxy."""
    k = np.hypot(np.fft.fftfreq(SOURCE)[:, None], np.fft.fftfreq(SOURCE)[None]) * SOURCE
    power = (1 + k) ** -5.0
    power *= 0.15**2 / power.mean()
    x, y = Grid(SOURCE, 0.12).coordinates()
    mean = torch.exp(-(x**2 + y**2) / (2 * 0.25**2))[None].float()
    return dp.GaussianScore(mean, power=torch.from_numpy(power[None]).float(), sde=dp.EDM())


def star() -> np.ndarray:
    axis = np.arange(9) - 4
    psf = np.exp(-0.5 * (axis[:, None] ** 2 + axis**2))
    return psf / psf.sum()


def simulated() -> tuple[np.ndarray, torch.Tensor]:
    """The image, and its source."""
    generator = torch.Generator().manual_seed(5)
    source = dp.sample(prior(), 1, dp.DPMSolver(16, eta=1.0), 3, progress=False).x[0]
    lens = Lens(
        read_lens_model({"mass": KNOWN["mass"]}).mass, Grid(SIDE, PIXEL), Grid(SOURCE, 0.12)
    )
    clean = (dp.Convolve(torch.from_numpy(star()).float()) @ lens)(source[None])[0, 0]
    image = clean + NOISE * torch.randn(clean.shape, generator=generator)
    return image.double().numpy(), source


def run(**options: Any) -> LensResult:
    settings: dict[str, Any] = {
        "model": MODEL,
        "prior": prior(),
        "samples": 8,
        "chains": 4,
        "draws": 40,
        "warmup": 20,
        "restarts": 2,
        "sampler": dp.DPMSolver(12, eta=1.0),
        "progress": False,
    }
    image, _ = simulated()
    return reconstruct_lens(image, star(), NOISE, **(settings | options))


@pytest.fixture(scope="module")
def result() -> LensResult:
    return run()


def test_the_lens_and_its_source_are_found(result: LensResult, tmp_path: Path) -> None:
    mean, std = result.joint.mean, result.joint.std
    for name, truth in TRUTH.items():
        i = result.joint.names.index(name)
        assert abs(float(mean[i]) - truth) < 5 * float(std[i]) < 0.25, name
    chi2 = result.metrics["reduced_chi2"]
    assert abs(chi2["draws"] - 1) < 5 * chi2["expected_std"]
    _, source = simulated()
    off = (result.mean - source[0].double().numpy()) / result.std
    assert np.sqrt(np.mean(off**2)) < 2.5
    flux = result.metrics["source_flux"]
    assert abs(flux["mean"] - float(source.sum())) < 5 * max(flux["std"], 0.5)
    assert np.isnan(result.residual).sum() > 0
    result.save(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["inferred"]["gaussian_exact"] is True
    assert set(record["metrics"]["shift"]) == set(TRUTH)
    with pytest.raises(FileExistsError, match="overwrite"):
        result.save(tmp_path / "out")


def test_turns_give_the_parameters_that_the_evidence_gives_where_that_is_exact(
    result: LensResult, tmp_path: Path
) -> None:
    """The prior is Gaussian and nothing is binned: both are the joint posterior, 4 Monte Carlo errors apart at most."""
    options = {"samples": 8, "turns": 24, "draws": 12, "checkpoint": tmp_path / "parts"}
    turned = run(**options)
    assert turned.joint.names == (*TRUTH_ORDER, "source.flux")
    assert turned.joint.theta.shape == (8, 24, 3)
    for name in TRUTH:
        a, b = (d.joint.theta[..., d.joint.names.index(name)] for d in (turned, result))
        error = [
            v.std() / d.joint.ess[d.joint.names.index(name)].sqrt()
            for v, d in ((a, turned), (b, result))
        ]
        assert abs(float(a.mean() - b.mean())) < 4 * float(torch.hypot(*error)), name
        assert 0.6 < float(a.std() / b.std()) < 1.6
    chi2 = turned.metrics["reduced_chi2"]
    assert abs(chi2["draws"] - 1) < 5 * chi2["expected_std"]
    assert turned.metrics["shift"] is None and turned.inferred["turns"] == 24
    flux = turned.joint.theta[:, -1, 2]
    torch.testing.assert_close(turned.samples.x.double().sum((1, 2, 3)), flux)
    again = run(**options)
    assert torch.equal(again.joint.theta, turned.joint.theta)
    with pytest.raises(ValueError, match="at least 4 turns"):
        run(turns=3)
    with pytest.raises(ValueError, match="of a fixed lens"):
        run(turns=8, fixed=True)


def test_a_known_lens_leaves_the_source_alone_and_a_seed_gives_the_same_draws() -> None:
    few = {"model": KNOWN, "samples": 3, "draws": 6, "warmup": 3, "restarts": 1, "chains": 2}
    one, again = run(**few), run(**few, batch_size=2)
    assert one.joint.names == ("source.flux",)
    torch.testing.assert_close(one.samples.x, again.samples.x, atol=1e-3, rtol=1e-3)
    assert abs(one.metrics["reduced_chi2"]["draws"] - 1) < 0.3
    held = run(**(few | {"model": MODEL}), fixed=True)
    assert held.joint.names == ("source.flux",)
    assert held.median_lens is not None


def test_binning_keeps_the_light_and_hides_what_is_partly_masked() -> None:
    image, _ = simulated()
    scene = lens_scene(
        prepare(image, star(), NOISE, background="none"), read_description({**KNOWN, "bin": 2})
    )
    coarse = binned(scene, 2)
    assert coarse.grid.extent == pytest.approx(scene.grid.extent)
    assert float(coarse.psf.sum()) == pytest.approx(1.0)
    rows, columns = (coarse.seen).nonzero()[0].tolist()
    block = scene.y[0, 2 * rows : 2 * rows + 2, 2 * columns : 2 * columns + 2]
    assert float(coarse.y[0, rows, columns]) == pytest.approx(float(block.sum()), rel=1e-5)
    assert float(coarse.std[0, rows, columns]) == pytest.approx(2 * NOISE, rel=1e-5)
    assert 4 * int(coarse.seen.sum()) < int(scene.seen.sum())


# The lens' own light ----------------------------------------------------------------------------

LIGHT = {
    "glow": {
        "profile": "Sersic",
        "centre": "main",
        "q": "main.q",
        "phi": "main.phi",
        "n": 1.5,
        "Re": {"lognormal": [0.5, 0.3]},
        "flux": {"lognormal": [100.0, 1.0]},
    }
}
LIT = {**MODEL, "mask": {"outer": 1.8}, "light": LIGHT}
BRIGHT = {"glow.Re": 0.4, "glow.flux": 150.0}


def lit() -> np.ndarray:
    """The image with a lens that shines, of rays that are finer than the job's."""
    image, _ = simulated()
    part = LIGHT["glow"] | {"q": 0.75, "phi": 0.4, "Re": 0.4, "flux": 150.0}
    model = read_lens_model({"mass": KNOWN["mass"], "light": {"glow": part}})
    assert model.light is not None
    light = LensLight(model.light, Grid(SIDE, PIXEL, oversample=4))
    seen = dp.Convolve(torch.from_numpy(star()))(light.images({"any": torch.zeros(1).double()}))
    return image + seen[0, 0].numpy()


def shining(**options: Any) -> LensResult:
    settings: dict[str, Any] = {
        "model": LIT,
        "prior": prior(),
        "samples": 8,
        "draws": 40,
        "warmup": 30,
        "restarts": 4,
        "sampler": dp.DPMSolver(12, eta=1.0),
        "progress": False,
    }
    return reconstruct_lens(lit(), star(), NOISE, **(settings | options))


@pytest.mark.parametrize("bins", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_light_of_the_lens_is_found_with_its_source(bins: int, tmp_path: Path) -> None:
    result = shining(model={**LIT, "bin": bins})
    mean, std = result.joint.mean, result.joint.std
    assert set(result.joint.names) == {*TRUTH, *BRIGHT, "source.flux"}
    for name, truth in (TRUTH | BRIGHT).items():
        i = result.joint.names.index(name)
        assert abs(float(mean[i]) - truth) < 5 * float(std[i]) < 0.25 * truth, name
    chi2 = result.metrics["reduced_chi2"]
    assert abs(chi2["draws"] - 1) < (5 if bins == 1 else 10) * chi2["expected_std"]
    _, source = simulated()
    off = (result.mean - source[0].double().numpy()) / result.std
    assert np.sqrt(np.mean(off**2)) < 2.5
    light = result.metrics["lens_light_flux"]
    assert abs(light["mean"] - 140) < 15  # of 150, a part is beyond the grid
    # every draw has the light of its own theta
    lights = result.lights
    assert lights is not None and result.light is not None and result.joint.samples is not None
    told = result.joint.samples.extras["theta"][:, result.joint.names.index("glow.flux")]
    assert float(torch.corrcoef(torch.stack([told, lights.sum((1, 2))]))[0, 1]) > 0.9
    assert set(result.metrics["shift"]) == set(TRUTH | BRIGHT)
    if bins == 2:
        result.save(tmp_path / "out")
        names = {p.name for p in (tmp_path / "out").iterdir()}
        assert {"lens_light.fits", "summary.png", "corner.png", "parameters.csv"} <= names
        model, bright, data, residual = (
            fits.getdata(tmp_path / "out" / f"{name}.fits")
            for name in ("model", "lens_light", "data", "residual")
        )
        np.testing.assert_allclose((data - model) / NOISE, residual, rtol=1e-3, atol=1e-3)
        assert np.nansum(bright) == pytest.approx(light["mean"], rel=0.05)
        record = json.loads((tmp_path / "out" / "run.json").read_text())
        assert record["model"]["light"]["glow"]["n"] == 1.5
        assert record["metrics"]["lens_light_flux"]["std"] > 0
    # control: the same sources without the light do not fit
    dark = result.residual + result.light / NOISE
    assert np.nanmean(dark**2) > 2


def test_light_about_a_known_lens_and_light_that_is_held() -> None:
    known = {**LIT, "mass": KNOWN["mass"]}
    few = {"samples": 8, "draws": 15, "warmup": 15, "restarts": 2}
    one = shining(model=known, **few)
    assert set(one.joint.names) == {*BRIGHT, "source.flux"}
    for name, truth in BRIGHT.items():
        i = one.joint.names.index(name)
        assert abs(float(one.joint.mean[i]) - truth) < 5 * float(one.joint.std[i]), name
    assert abs(one.metrics["reduced_chi2"]["draws"] - 1) < 0.3
    assert set(one.metrics["shift"]) == set(BRIGHT)
    right = LIGHT["glow"] | {"Re": {"lognormal": [0.4, 0.1]}, "flux": {"lognormal": [150, 0.1]}}
    held = shining(model={**known, "light": {"glow": right}}, fixed=True, **few | {"samples": 2})
    assert held.joint.names == ("source.flux",)
    assert held.lights is not None and float(held.lights.std(0).max()) == 0.0
    assert held.metrics["shift"] is None
    assert abs(held.metrics["reduced_chi2"]["draws"] - 1) < 0.3


# The command line -------------------------------------------------------------------------------

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image.fits with world coordinates, psf.fits, lens.yaml, and an untrained network as the prior."""
    path = tmp_path_factory.mktemp("lens")
    image, _ = simulated()
    hdu = fits.PrimaryHDU(image.astype(np.float32))
    step = PIXEL / 3600
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 150.0, "CRVAL2": 2.0}
    cards |= {"CRPIX1": 16.5, "CRPIX2": 16.5, "CD1_1": -step, "CD2_2": step, "BUNIT": "electron/s"}
    hdu.header.update(cards)
    hdu.writeto(path / "image.fits")
    fits.PrimaryHDU(star()).writeto(path / "psf.fits")
    model = {k: v for k, v in KNOWN.items() if k != "pixel"}
    model["source"] = {"size": 16, "pixel": 0.09, "centre": [0.0, 0.0]}
    (path / "lens.yaml").write_text(yaml.safe_dump(model))
    settings = {"kind": "unet", "channels": 1, "patch": 2, "widths": [8, 8], "blocks": [1, 1]}
    torch.manual_seed(0)
    net = build_network({**settings, "embedding": 16})
    save_prior(path / "tiny", NetworkScore(net, dp.EDM(), (1, 16, 16), 0.5, card={"name": "tiny"}))
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    words = [
        "lens",
        str(folder / "image.fits"),
        "--psf",
        str(folder / "psf.fits"),
        "--out",
        str(out),
    ]
    words += ["--noise-std", str(NOISE), "--model", str(folder / "lens.yaml")]
    words += ["--prior", str(folder / "tiny"), "--samples", "4", "--steps", "4", "--chains", "2"]
    words += ["--draws", "8", "--warmup", "5", "--restarts", "1", "--batch-size", "2"]
    return [*words, *more]


def test_an_interrupted_command_goes_on_to_the_same_draws(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = runner.invoke(app, command(folder, tmp_path / "whole"))
    assert done.exit_code == 0, done.output
    whole = Samples.load(tmp_path / "whole" / "samples.zarr")
    names = {p.name for p in (tmp_path / "whole").iterdir()}
    assert {"run.json", "parameters.csv", "corner.png", "summary.png", "model.fits"} <= names
    assert {"source_mean.fits", "source_std.fits", "source_samples.fits", "chains.zarr"} <= names
    header = fits.getheader(tmp_path / "whole" / "source_mean.fits")
    assert header["CTYPE1"] == "RA---TAN"
    assert abs(abs(header.get("CDELT1", 1) * header.get("PC1_1", 1)) * 3600 - 0.09) < 1e-6
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["metrics"]["rhat"] > 0 and record["inputs"]["model"]["sha256"]
    assert record["metrics"]["magnification"]["mean"] > 1

    from diffpost import resume

    save, saved = resume.RunFolder.save, []

    def interrupt(self: resume.RunFolder, *args: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *args)  # type: ignore[arg-type]

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(resume.RunFolder, "save", interrupt)
        stopped = runner.invoke(app, command(folder, out))
    assert stopped.exit_code == 130 and "--resume" in stopped.stderr
    refused = runner.invoke(app, command(folder, out))
    assert refused.exit_code == 2 and "--resume" in refused.stderr
    goes_on = runner.invoke(app, command(folder, out, "--resume"))
    assert goes_on.exit_code == 0, goes_on.output
    torch.testing.assert_close(Samples.load(out / "samples.zarr").x, whole.x)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"masss": {}}, "mass"),
        ({"mass": {"main": {"profile": "SIEE"}}}, "'SIE'"),
        ({"mass": {"main": {**KNOWN["mass"]["main"], "rein": 1.0}}}, "'Rein'"),
        ({"mass": {"main": {**KNOWN["mass"]["main"], "q": 1.5}}}, "valid range"),
        ({"mass": {"main": {"profile": "NFW", "mass": 1e13, "c": 5.0}}}, "redshifts"),
        ({"mask": {"inner": 5.0, "outer": 9.0}}, "hides every pixel"),
        ({"mask": {"iner": 0.3}}, "'inner'"),
        ({"mask": {"inner": 2.0, "outer": 1.0}}, "inner < outer"),
        ({"source": {"size": 13}}, "multiple of"),
        ({"source": {"pixel": -1}}, "source.pixel"),
        ({"light": {"glow": {"profile": "Sersick"}}}, "'Sersic'"),
        ({"light": {"glow": {**LIGHT["glow"], "re": 1.0}}}, "'Re'"),
        ({"pixel": 0.5}, "WCS"),
        ({"oversample": 0}, "oversample"),
    ],
)
def test_bad_models_are_told_and_leave_nothing(
    folder: Path, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    model = yaml.safe_load((folder / "lens.yaml").read_text()) | change
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(model))
    got = runner.invoke(
        app, command(folder, tmp_path / "out", "--model", str(tmp_path / "bad.yaml"))
    )
    assert got.exit_code == 2, got.output
    assert text in got.stderr
    assert not (tmp_path / "out").exists()


def test_bad_files_are_told_and_leave_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.yaml").write_text("mass: [")

    def file(name: str, values: np.ndarray) -> str:
        fits.PrimaryHDU(values).writeto(tmp_path / name)
        return str(tmp_path / name)

    small, none = file("small.fits", np.ones((5, 5))), file("zero.fits", np.zeros((SIDE, SIDE)))
    blank = file("nan.fits", np.full((SIDE, SIDE), np.nan))
    for more, *texts in (
        (("--mask", small), "mask has shape (5, 5)", "expected", f"({SIDE}, {SIDE})"),
        (("--mask", blank), "hides every pixel", "mend --mask", "nonzero pixels are not used"),
        (("--weight", small), "give one of them"),
        (("--model", str(tmp_path / "text.yaml")), "not YAML"),
        (("--model", str(tmp_path / "none.yaml")), "no lens model"),
        (("--samples", "99"), "chains x draws"),
        (("--psf", file("cube.fits", np.ones((3, 9, 9)))), "a cube of 3 images", "choose one by"),
        (("--psf", file("line.fits", np.ones(9))), "line.fits holds no image", "two-dimensional"),
        (("--psf", none), "the PSF is zero everywhere", "expected the image of a point source"),
        (("--psf", blank), "the PSF is NaN everywhere", "expected the image of a point source"),
        (("--psf", file("dark.fits", -star())), "the PSF sums to -1", "expected positive flux"),
        (("--noise", small), "has 5 x 5 pixels", f"the image {SIDE} x {SIDE}", "of one shape"),
        (("--noise", none), f"has {SIDE**2} pixels that are zero or negative", "inf or NaN"),
        (("--noise", blank), "no finite pixel", "--noise-std"),
    ):
        words = command(folder, tmp_path / "out", *more)
        if more[0] == "--noise":
            at = words.index("--noise-std")
            del words[at : at + 2]
        got = runner.invoke(app, words)
        assert got.exit_code == 2, got.output
        said = " ".join(got.stderr.split())
        assert all(text in said for text in texts), (more, said)
        assert not (tmp_path / "out").exists()


def test_what_is_finished_outlives_an_error_at_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is not the input's, such as a missing package of the pictures."""

    def missing(*_: object, **__: object) -> None:
        raise ImportError("no module for pictures")

    def again(*_: object, **__: object) -> None:
        raise AssertionError("what was finished is computed again")

    out = tmp_path / "out"
    few = ("--samples", "2", "--draws", "4", "--warmup", "2")
    with monkeypatch.context() as patch:
        patch.setattr(dp.plot, "corner", missing)
        failed = runner.invoke(app, command(folder, out, *few))
    assert isinstance(failed.exception, ImportError)
    assert [item.name for item in out.iterdir()] == [".partial"]
    assert [item.name for item in tmp_path.iterdir()] == ["out"]  # nothing half written beside it
    with monkeypatch.context() as patch:
        patch.setattr("diffpost.parameters.checkpoint.Checkpoint.save", again)
        patch.setattr("diffpost.resume.RunFolder.save", again)
        goes_on = runner.invoke(app, command(folder, out, *few, "--resume"))
    assert goes_on.exit_code == 0, goes_on.output
    assert (out / "run.json").exists() and not (out / ".partial").exists()


def test_an_image_without_world_coordinates_needs_a_pixel() -> None:
    with pytest.raises(ValueError, match=r"pixel: 0\.05"):
        run(model={k: v for k, v in KNOWN.items() if k != "pixel"})


def test_a_source_grid_that_is_too_small_is_told() -> None:
    """Above 1% of the flux, counted here ray by ray (one a pixel)."""
    quick = {"samples": 1, "draws": 4, "warmup": 3, "chains": 2, "restarts": 1}
    for pixel, warned in ((0.09, True), (0.18, False)):
        told: list[str] = []
        model = {**KNOWN, "source": {"size": 12, "pixel": pixel, "centre": [0.0, 0.0]}}
        found = run(model=model, sampler=dp.DPMSolver(3), announce=told.append, **quick)
        outside = found.metrics["flux_outside"]
        x, y = found.scene.grid.coordinates()
        beta = found.system.lens.trace(x.flatten(), y.flatten())[0].abs().amax(0)
        light = torch.where(found.scene.seen, found.scene.y[0], 0.0).flatten()
        light = torch.where(light > 3 * NOISE, light, 0.0)
        lost = float(light[beta > 6 * pixel].sum() / light.sum())
        assert outside == pytest.approx(lost, abs=1e-6)
        assert (outside > 0.01) is warned
        said = [line for line in told if "outside the source grid" in line]
        assert len(said) == warned
        if warned:
            assert f"{outside:.1%}" in said[0] and "enlarge it (source.size" in said[0]
    assert _warnings({"rhat": 1.0, "flux_outside": 0.0099}) == []
    assert "1.1%" in _warnings({"rhat": 1.0, "flux_outside": 0.0111})[0]


def test_a_known_lens_sees_the_modes_of_the_source_once():
    """The evidence shows them anew in every evaluation, as views of the same memory."""
    from diffpost.jobs.lens_system import FLUX, KnownLens
    from diffpost.operator import Matrix

    seen = []

    class Counted(Matrix):
        def __call__(self, x):
            seen.append(len(x))
            return super().__call__(x)

    operator = Counted(torch.arange(12.0).reshape(3, 4).double())
    family = KnownLens(operator, (4,), (3,))
    images = torch.eye(4, dtype=torch.float64)
    flux = torch.tensor([2.0, 3.0], dtype=torch.float64)
    for _ in range(5):
        parts = [family.columns({FLUX: flux}, part) for part in images.split(2)]
        both = torch.cat(parts)
        assert torch.equal(both, flux[None, :, None] * operator.matrix.T[:, None])
    assert seen == [2, 2]
