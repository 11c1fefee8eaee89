"""The command line, end to end on tiny images with a tiny untrained network as the prior."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from astropy.io import fits
from typer.testing import CliRunner

from diffpost.cli import app
from diffpost.io.checkpoints import save_prior
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.samples import Samples
from diffpost.sde import EDM

runner = CliRunner()
SIDE = 24


def star(n: int, sigma: float) -> np.ndarray:
    yy, xx = np.mgrid[:n, :n] - n // 2
    out = np.exp(-(yy**2 + xx**2) / (2 * sigma**2))
    return out / out.sum()


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: with its output near zero, nearly a white Gaussian prior."""
    config = {
        "kind": "unet",
        "channels": 1,
        "patch": 2,
        "widths": [8, 8],
        "blocks": [1, 1],
        "embedding": 16,
    }
    torch.manual_seed(0)
    card = {
        "name": "tiny",
        "not_for": "anything but tests",
        "flux_scale": {"rule": "smoothed_peak", "smoothing": 1.28},
    }
    model = NetworkScore(build_network(config), EDM(), (1, 32, 32), 0.5, card=card)
    folder = tmp_path_factory.mktemp("prior") / "tiny"
    save_prior(folder, model)
    return folder


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """image.fits and psf.fits: a Gaussian galaxy on empty sky."""
    rng = np.random.default_rng(0)
    image = 200 * star(SIDE, 2.5) + 0.1 * rng.normal(size=(SIDE, SIDE))
    hdu = fits.PrimaryHDU(image.astype(np.float32))
    hdu.header["BUNIT"] = "electron / s"
    hdu.writeto(tmp_path / "image.fits")
    fits.PrimaryHDU(5 * np.roll(star(16, 1.2), -1, axis=1)).writeto(tmp_path / "psf.fits")
    return tmp_path


def command(folder: Path, prior: Path, *more: str, out: str = "out") -> list[str]:
    return [
        "deconvolve",
        str(folder / "image.fits"),
        "--psf",
        str(folder / "psf.fits"),
        "--noise-std",
        "0.1",
        "--prior",
        str(prior),
        "--samples",
        "3",
        "--steps",
        "4",
        "--out",
        str(folder / out),
        *more,
    ]


def test_deconvolve_writes_its_products_and_reruns_reproduce(inputs: Path, prior: Path) -> None:
    done = runner.invoke(app, command(inputs, prior))
    assert done.exit_code == 0, done.output
    for word in ("normalised", "centroid", "noise", "flux scale", "reduced χ²", "summary.png"):
        assert word in done.output
    record = json.loads((inputs / "out" / "run.json").read_text())
    assert record["arguments"]["samples"] == 3
    assert record["inputs"]["image"]["sha256"]
    assert not (inputs / "out" / ".partial").exists()
    first = Samples.load(inputs / "out" / "samples.zarr")
    # Other batches, another folder: the same draws.
    again = runner.invoke(app, command(inputs, prior, "--batch-size", "2", out="again"))
    assert again.exit_code == 0, again.output
    second = Samples.load(inputs / "again" / "samples.zarr")
    assert torch.allclose(first.x, second.x, atol=1e-4)
    other = runner.invoke(app, command(inputs, prior, "--seed", "1", out="other"))
    assert other.exit_code == 0
    third = Samples.load(inputs / "other" / "samples.zarr")
    assert not torch.allclose(first.x, third.x, atol=1e-2)


def test_an_existing_folder_is_left_alone_without_overwrite(inputs: Path, prior: Path) -> None:
    assert runner.invoke(app, command(inputs, prior)).exit_code == 0
    before = {p: p.stat().st_mtime_ns for p in (inputs / "out").rglob("*")}
    refused = runner.invoke(app, command(inputs, prior))
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert {p: p.stat().st_mtime_ns for p in (inputs / "out").rglob("*")} == before
    resumed = runner.invoke(app, command(inputs, prior, "--resume"))
    assert resumed.exit_code == 2
    assert "nothing to resume" in resumed.stderr
    assert runner.invoke(app, command(inputs, prior, "--overwrite")).exit_code == 0


def test_an_interrupted_job_says_how_to_go_on_and_does(
    inputs: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpost import resume

    save = resume.RunFolder.save
    saved = []

    def interrupt(self: resume.RunFolder, *args: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *args)  # type: ignore[arg-type]

    one_by_one = ("--batch-size", "1")
    with monkeypatch.context() as patch:
        patch.setattr(resume.RunFolder, "save", interrupt)
        stopped = runner.invoke(app, command(inputs, prior, *one_by_one))
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert [p.name for p in (inputs / "out").iterdir()] == [".partial"]
    refused = runner.invoke(app, command(inputs, prior, *one_by_one))
    assert refused.exit_code == 2
    assert "unfinished" in refused.stderr
    # Other arguments are another run.
    changed = runner.invoke(app, command(inputs, prior, *one_by_one, "--resume", "--seed", "5"))
    assert changed.exit_code == 2
    resumed = runner.invoke(app, command(inputs, prior, *one_by_one, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    whole = runner.invoke(app, command(inputs, prior, *one_by_one, out="whole"))
    assert whole.exit_code == 0
    assert torch.equal(
        Samples.load(inputs / "out" / "samples.zarr").x,
        Samples.load(inputs / "whole" / "samples.zarr").x,
    )


def test_a_full_disk_keeps_the_finished_draws(
    inputs: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffpost.jobs.outputs.write_map", full)
        failed = runner.invoke(app, command(inputs, prior))
    assert failed.exit_code == 2
    assert "is full" in failed.stderr
    assert [p.name for p in (inputs / "out").iterdir()] == [".partial"]

    # Astropy reports a full disk without an error number; a batch may hit it as well.
    def bare(*args: object, **kwargs: object) -> None:
        raise OSError("Not enough space on disk: requested 4096, available 0.")

    for place in ("diffpost.jobs.outputs.write_map", "diffpost.resume.RunFolder.save"):
        with monkeypatch.context() as patch:
            patch.setattr(place, bare)
            failed = runner.invoke(app, command(inputs, prior, "--overwrite"))
        assert failed.exit_code == 2
        assert "is full" in failed.stderr
    assert runner.invoke(app, command(inputs, prior)).exit_code == 2
    assert runner.invoke(app, command(inputs, prior, "--resume")).exit_code == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "there is no file"),
        ("text", "cannot read"),
        ("truncated", "cannot read"),
        ("table", "holds no image"),
        ("nan", "NaN everywhere"),
        ("psf zero", "zero everywhere"),
        ("psf wide", "larger than the model can hold"),
        ("rms zero", "zero or negative"),
        ("rms shape", "one shape"),
        ("cutout", "cannot read --cutout"),
        ("two noises", "one of them"),
        ("prior", ""),
        ("truncated prior", ""),
    ],
)
def test_bad_input_ends_with_code_2_and_writes_nothing(
    inputs: Path, prior: Path, fault: str, message: str, tmp_path: Path
) -> None:
    image, psf = inputs / "image.fits", inputs / "psf.fits"
    arguments = command(inputs, prior)
    rms = ["--noise", str(inputs / "rms.fits")]
    without_std = [a for a in arguments if a not in ("--noise-std", "0.1")]
    match fault:
        case "missing":
            image.unlink()
        case "text":
            image.write_text("no FITS")
        case "truncated":
            image.write_bytes(image.read_bytes()[:4000])
        case "table":
            image.unlink()
            fits.BinTableHDU.from_columns([fits.Column("a", "E", array=[1.0])]).writeto(image)
        case "nan":
            fits.PrimaryHDU(np.full((24, 24), np.nan)).writeto(image, overwrite=True)
        case "psf zero":
            fits.PrimaryHDU(np.zeros((9, 9))).writeto(psf, overwrite=True)
        case "psf wide":
            # A tenth of the light is farther out than the model reaches for the other nine.
            wings = 0.89 * star(401, 1.2) + 0.11 / 401**2
            fits.PrimaryHDU(wings).writeto(psf, overwrite=True)
        case "rms zero":
            fits.PrimaryHDU(np.zeros((24, 24))).writeto(inputs / "rms.fits")
            arguments = without_std + rms
        case "rms shape":
            fits.PrimaryHDU(np.ones((24, 23))).writeto(inputs / "rms.fits")
            arguments = without_std + rms
        case "cutout":
            arguments += ["--cutout", "12;12;16"]
        case "two noises":
            arguments += rms
        case "prior":
            arguments[arguments.index("--prior") + 1] = "no-such-prior"
        case "truncated prior":
            import shutil

            broken = tmp_path / "broken"
            shutil.copytree(prior, broken)
            weights = broken / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:500])
            arguments[arguments.index("--prior") + 1] = str(broken)
    failed = runner.invoke(app, arguments)
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr.replace("\n", " ")
    assert "Traceback" not in failed.output
    assert not (inputs / "out").exists()


def test_help_teaches_with_examples() -> None:
    top = runner.invoke(app, ["--help"])
    assert top.exit_code == 0
    for word in ("diffpost demo", "deconvolve", "info", "train", "--psf"):
        assert word in top.output
    one = runner.invoke(app, ["deconvolve", "--help"])
    assert "Examples" in one.output
    assert "--oversample" in one.output
    assert runner.invoke(app, ["--version"]).output.startswith("diffpost ")
    assert runner.invoke(app, ["deconvolve"]).exit_code == 2


def test_deconvolve_and_demo_share_their_options() -> None:
    from typer.main import get_command

    commands = get_command(app).commands  # type: ignore[attr-defined]
    first, second = (
        {p.name: p for p in commands[name].params if p.name != "help"}
        for name in ("deconvolve", "demo")
    )
    shared = set(first) & set(second)
    own = {"out", "prior", "samples", "seed", "steps", "batch_size", "resume", "overwrite"}
    assert shared == own
    assert set(second) - shared == {"target"}
    for name in shared:
        one, two = first[name], second[name]
        assert (one.opts, one.help) == (two.opts, two.help)
        if name != "out":  # which deconvolve requires
            assert (one.default, one.required) == (two.default, two.required)


def test_info_prints_the_card(prior: Path) -> None:
    told = runner.invoke(app, ["info", str(prior)])
    assert told.exit_code == 0, told.output
    assert "anything but tests" in told.output
    assert "(1, 32, 32)" in told.output
    missing = runner.invoke(app, ["info", "no-such-prior"])
    assert missing.exit_code == 2


def test_the_demo_targets_are_shipped() -> None:
    from diffpost.jobs.demo import demo_target

    for name in ("spiral", "dwarf"):
        target = demo_target(name)
        assert target.image.exists()
        assert target.psf.exists()
    wrong = runner.invoke(app, ["demo", "--target", "elephant"])
    assert wrong.exit_code == 2
    assert "spiral or dwarf" in wrong.stderr


def test_the_command_runs_as_a_process(inputs: Path, prior: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "diffpost.cli", *command(inputs, prior, "--samples", "1")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (inputs / "out" / "run.json").exists()
    refused = subprocess.run(
        [sys.executable, "-m", "diffpost.cli", *command(inputs, prior)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_training_starts_from_a_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "train.npy", rng.normal(size=(8, 16, 16)).astype(np.float32))
    (tmp_path / "mine.yaml").write_text(
        "data: [{path: train.npy}]\n"
        "network: {kind: unet, channels: 1, patch: 2, widths: [8, 8], blocks: [1, 1], embedding: 16}\n"
        "stages: [{images: 8, crop: 16, batch: 4}]\n"
        "sample_images: 0\n"
    )
    run = ["train", str(tmp_path), "--config", str(tmp_path / "mine.yaml")]
    done = runner.invoke(app, [*run, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert runner.invoke(app, ["info", str(tmp_path / "run" / "prior")]).exit_code == 0
    missing = runner.invoke(app, ["train", str(tmp_path / "none"), "--out", str(tmp_path / "r")])
    assert missing.exit_code == 2
