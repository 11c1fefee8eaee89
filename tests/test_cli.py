"""The command line, end to end on tiny images with a tiny untrained network as the prior."""

from __future__ import annotations

import errno
import json
import os
import shutil
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


def star(n: int, sigma: float, at: tuple[float, float] | None = None) -> np.ndarray:
    """A Gaussian of unit flux, at (y, x); default: pixel n // 2."""
    y, x = (n // 2, n // 2) if at is None else at
    yy, xx = np.mgrid[:n, :n]
    out = np.exp(-((yy - y) ** 2 + (xx - x) ** 2) / (2 * sigma**2))
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


def write_inputs(folder: Path) -> None:
    """image.fits and psf.fits: a Gaussian galaxy on empty sky."""
    rng = np.random.default_rng(0)
    image = 200 * star(SIDE, 2.5) + 0.1 * rng.normal(size=(SIDE, SIDE))
    hdu = fits.PrimaryHDU(image.astype(np.float32))
    hdu.header["BUNIT"] = "electron / s"
    hdu.writeto(folder / "image.fits")
    fits.PrimaryHDU(5 * np.roll(star(16, 1.2), -1, axis=1)).writeto(folder / "psf.fits")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prior: Path) -> Path:
    """A folder of results, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    write_inputs(folder)
    done = runner.invoke(app, command(folder, prior, "--samples", "1", "--steps", "2"))
    assert done.exit_code == 0, done.output
    return folder / "out"


def replaced(arguments: list[str], option: str, *values: str) -> list[str]:
    """The arguments with an option and its value taken out, and others put at the end."""
    at = arguments.index(option)
    return [*arguments[:at], *arguments[at + 2 :], *values]


def break_input(fault: str, inputs: Path, prior: Path, arguments: list[str]) -> list[str]:
    """Spoils one input, and returns the arguments to use."""
    image, psf, rms = (inputs / f"{name}.fits" for name in ("image", "psf", "rms"))

    def write(path: Path, data: np.ndarray, **header: object) -> None:
        hdu = fits.PrimaryHDU(data)
        hdu.header.update(header)
        hdu.writeto(path, overwrite=True)

    def with_map(data: np.ndarray, option: str = "--noise") -> list[str]:
        write(rms, data)
        return replaced(arguments, "--noise-std", option, str(rms))

    def with_prior() -> Path:
        shutil.copytree(prior, inputs / "broken")
        at = arguments.index("--prior") + 1
        arguments[at] = str(inputs / "broken")
        return inputs / "broken"

    whole = np.ones((SIDE, SIDE))
    what, _, kind = fault.partition(": ")
    match what, kind:
        case "image", "missing":
            image.unlink()
        case "image", "folder":
            image.unlink()
            image.mkdir()
        case "image", "text":
            image.write_text("no FITS")
        case "image", "truncated":
            image.write_bytes(image.read_bytes()[:4000])
        case "image", "table":
            column = fits.Column("a", "E", array=[1.0])
            fits.BinTableHDU.from_columns([column]).writeto(image, overwrite=True)
        case "image", "NaN":
            write(image, np.nan * whole)
        case "image", "NaN in the cutout":
            hole = fits.getdata(image)
            hole[4:13, 4:13] = np.nan
            write(image, hole)
            arguments += ["--cutout", "8,8,8"]
        case "image", "magnitudes":
            write(image, whole, BUNIT="mag/arcsec2")
        case "image", "cube":
            write(image, np.stack([whole, whole]))
        case "psf", "missing":
            psf.unlink()
        case "psf", "zero":
            write(psf, np.zeros((9, 9)))
        case "psf", "negative":
            write(psf, -star(9, 1.2))
        case "psf", "NaN":
            write(psf, np.full((9, 9), np.nan))
        case "psf", "wings":
            # A tenth of the light is farther out than the model reaches for the other nine.
            write(psf, 0.89 * star(401, 1.2) + 0.11 / 401**2)
        case "noise", "zero":
            return with_map(0 * whole)
        case "noise", "one zero":
            return with_map(np.where(np.arange(SIDE**2).reshape(SIDE, SIDE) == 7, 0.0, 0.1))
        case "noise", "negative":
            return with_map(-0.1 * whole)
        case "noise", "infinite":
            return with_map(np.inf * whole)
        case "noise", "shape":
            return with_map(whole[:, 1:])
        case "noise", "missing":
            return replaced(arguments, "--noise-std", "--noise", str(rms))
        case "noise", "the image":
            return replaced(arguments, "--noise-std", "--noise", str(image))
        case "noise", "number":
            return replaced(arguments, "--noise-std", "--noise-std", "0")
        case "noise", "twice":
            return [*arguments, "--weight", str(rms)]
        case "weight", "negative":
            return with_map(-whole, "--weight")
        case "weight", "zero":
            return with_map(0 * whole, "--weight")
        case "target", "cutout":
            arguments += ["--cutout", "12;12;16"]
        case "target", "off":
            arguments += ["--cutout", "40,12,16"]
        case "target", "no coordinates":
            arguments += ["--center", "3.5", "-30"]
        case "target", "background":
            arguments += ["--background", "wavy"]
        case "target", "scale":
            arguments += ["--scale", "-1"]
        case "prior", "unknown":
            return replaced(arguments, "--prior", "--prior", "no-such-prior")
        case "prior", "truncated weights":
            weights = with_prior() / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:500])
        case "prior", "corrupt weights":
            weights = with_prior() / "weights.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        case "prior", "missing weights":
            (with_prior() / "weights.safetensors").unlink()
        case "prior", "truncated card":
            card = with_prior() / "card.json"
            card.write_text(card.read_text()[:-30])
        case "prior", "unknown rule":
            card = with_prior() / "card.json"
            card.write_text(card.read_text().replace("smoothed_peak", "loudest_pixel"))
        case _:
            raise NotImplementedError(fault)
    return arguments


FAULTS = {
    "image: missing": "there is no file",
    "image: folder": "is a folder; expected a FITS image",
    "image: text": "cannot read",
    "image: truncated": "damaged or cut off",
    "image: table": "holds no image",
    "image: NaN": "NaN everywhere",
    "image: NaN in the cutout": "the cutout is NaN everywhere",
    "image: magnitudes": "is logarithmic",
    "image: cube": "choose one by --plane",
    "psf: missing": "there is no file",
    "psf: zero": "the PSF is zero everywhere",
    "psf: negative": "expected positive flux",
    "psf: NaN": "the PSF is NaN everywhere",
    "psf: wings": "larger than the model can hold",
    "noise: zero": "576 pixels that are zero or negative",
    "noise: one zero": "1 pixels that are zero or negative",
    "noise: negative": "576 pixels that are zero or negative",
    "noise: infinite": "no finite pixel",
    "noise: shape": "23 x 24 pixels and the image 24 x 24; they must be of one shape",
    "noise: missing": "there is no file",
    "noise: the image": "is the image itself",
    "noise: number": "expected a positive standard deviation",
    "noise: twice": "got --noise-std and --weight; give one of them",
    "weight: negative": "576 negative pixels",
    "weight: zero": "no positive pixel",
    "target: cutout": "cannot read --cutout",
    "target: off": "off the image",
    "target: no coordinates": "give the target in pixels",
    "target: background": "expected smooth, constant or none",
    "target: scale": "expected a positive flux",
    "prior: unknown": "no prior 'no-such-prior'",
    "prior: truncated weights": "truncated or corrupt",
    "prior: corrupt weights": "the weights are damaged",
    "prior: missing weights": "the prior is incomplete",
    "prior: truncated card": "not JSON",
    "prior: unknown rule": "'loudest_pixel'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_ends_with_code_2_and_writes_nothing(
    inputs: Path, prior: Path, finished: Path, fault: str
) -> None:
    shutil.copytree(finished, inputs / "out")
    before = tree(inputs / "out")
    arguments = break_input(fault, inputs, prior, command(inputs, prior, "--overwrite"))
    there = sorted(p.name for p in inputs.iterdir())
    failed = runner.invoke(app, arguments)
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1, failed.stderr
    assert FAULTS[fault] in failed.stderr
    assert "Traceback" not in failed.output
    # Older results stay as they were, and where there were none nothing is left.
    assert tree(inputs / "out") == before
    fresh = runner.invoke(app, replaced(arguments, "--out", "--out", str(inputs / "fresh")))
    assert fresh.exit_code == 2
    assert sorted(p.name for p in inputs.iterdir()) == there


TOLD = {
    "image: NaN in places": "18 pixels of the cutout have no data (NaN or off the image): masked",
    "image: infinite in places": "18 pixels of the cutout have no data (NaN or off the image): masked",
    "image: off the edge": "80 pixels of the cutout have no data (NaN or off the image): masked",
    "image: unknown units": "the unit BUNIT = 'frobs' is unknown; it is kept as it is",
    "image: no units": "states no units (BUNIT)",
    "image: error extension with zeros": "18 pixels around the target are zero, inf or NaN",
    "psf: unnormalised": "PSF: it summed to 5 and was normalised to 1",
    "psf: even": "PSF: its centroid (x, y) = (8.30, 9.20) was moved to the centre of the kernel",
    "psf: NaN in places": "PSF: 2 pixels are NaN or infinite",
    "psf: larger than the image": "larger than the cutout of 24 x 24",
    "noise: gaps": "18 pixels around the target have no finite standard deviation and are masked",
    "weight: gaps": "18 pixels around the target have no finite standard deviation and are masked",
    "prior: without a rule": "the prior states no rule to infer it by, so its own units stand: 1 per",
}


@pytest.mark.parametrize("case", TOLD)
def test_what_can_be_handled_is_told(inputs: Path, prior: Path, case: str) -> None:
    arguments = command(inputs, prior, "--samples", "1", "--steps", "2")
    image, psf, rms = (inputs / f"{name}.fits" for name in ("image", "psf", "rms"))
    with fits.open(image) as hdus:
        data, header = hdus[0].data.astype(np.float64), hdus[0].header.copy()
    gaps = np.zeros((SIDE, SIDE), dtype=bool)
    gaps[2:5, 3:9] = True
    noise = np.where(gaps, np.nan, 0.1)
    masked = 18 if TOLD[case].startswith("18 ") else 0
    match case:
        case "image: NaN in places":
            data[gaps] = np.nan
        case "image: infinite in places":
            data[gaps] = np.inf
        case "image: off the edge":
            # The corner (-2, -2): two rows and two columns of 21 are off.
            arguments += ["--cutout", "8,8,21"]
            masked = 21**2 - 19**2
        case "image: error extension with zeros":
            arguments = replaced(arguments, "--noise-std")
        case "noise: gaps":
            arguments = replaced(arguments, "--noise-std", "--noise", str(rms))
            fits.PrimaryHDU(noise).writeto(rms)
        case "weight: gaps":
            arguments = replaced(arguments, "--noise-std", "--weight", str(rms))
            fits.PrimaryHDU(np.where(gaps, 0.0, 100.0)).writeto(rms)
        case "image: unknown units":
            header["BUNIT"] = "frobs"
        case "image: no units":
            del header["BUNIT"]
        case "psf: unnormalised":
            fits.PrimaryHDU(5 * star(15, 1.2)).writeto(psf, overwrite=True)
        case "psf: even":
            fits.PrimaryHDU(star(18, 1.2, (9.2, 8.3))).writeto(psf, overwrite=True)
        case "psf: NaN in places":
            spoiled = star(15, 1.2)
            spoiled[0, :2] = np.nan
            fits.PrimaryHDU(spoiled).writeto(psf, overwrite=True)
        case "psf: larger than the image":
            fits.PrimaryHDU(star(61, 2.0)).writeto(psf, overwrite=True)
        case "prior: without a rule":
            shutil.copytree(prior, inputs / "other")
            card = json.loads((prior / "card.json").read_text())
            del card["flux_scale"]
            (inputs / "other" / "card.json").write_text(json.dumps(card))
            arguments = replaced(arguments, "--prior", "--prior", str(inputs / "other"))
    extensions = [fits.ImageHDU(np.nan_to_num(noise), name="ERR")] if "extension" in case else []
    fits.HDUList([fits.PrimaryHDU(data, header), *extensions]).writeto(image, overwrite=True)
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert TOLD[case] in done.output
    record = json.loads((inputs / "out" / "run.json").read_text())
    assert TOLD[case] in " ".join(record["notes"])
    given = {"image", "psf", *({"noise", "weight"} & {case.split(":")[0]})}
    assert {k for k, v in record["inputs"].items() if len(v["sha256"]) == 64} == given
    unused = int(np.isnan(fits.getdata(inputs / "out" / "data.fits")).sum())
    assert unused == record["inferred"]["masked_pixels"]
    assert unused == masked
    assert np.isfinite(fits.getdata(inputs / "out" / "mean.fits")).all()


def test_a_psf_of_even_size_off_its_centre_moves_nothing(inputs: Path, prior: Path) -> None:
    """The mean with a PSF shifted by parts of a pixel is that with the PSF in its place."""

    def mean(psf: np.ndarray, *more: str) -> np.ndarray:
        fits.PrimaryHDU(psf).writeto(inputs / "psf.fits", overwrite=True)
        done = runner.invoke(app, command(inputs, prior, "--overwrite", *more))
        assert done.exit_code == 0, done.output
        return np.asarray(fits.getdata(inputs / "out" / "mean.fits"), dtype=np.float64)

    centred = mean(star(19, 1.2))
    shifted = mean(star(20, 1.2, (9.63, 10.41)))
    assert np.abs(shifted - centred).max() < 0.02 * centred.max()
    # Negative control: with its centre left where it was, the image moves the other way.
    left = mean(star(20, 1.2, (9.63, 10.41)), "--keep-psf-center")
    assert np.abs(left - centred).max() > 0.1 * centred.max()


def test_broken_files_of_an_interrupted_run_are_told(
    inputs: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffpost import resume

    save, saved = resume.RunFolder.save, []

    def interrupt(self: resume.RunFolder, *args: object) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *args)  # type: ignore[arg-type]

    arguments = command(inputs, prior, "--samples", "2", "--steps", "2", "--batch-size", "1")
    with monkeypatch.context() as patch:
        patch.setattr(resume.RunFolder, "save", interrupt)
        assert runner.invoke(app, arguments).exit_code == 130
    partial = inputs / "out" / ".partial"
    (rows,) = partial.glob("rows-*.npz")
    whole = {p: p.read_bytes() for p in (rows, partial / "run.json")}
    for path, message in ((rows, "delete it"), (partial / "run.json", "does not describe a run")):
        for broken in (whole[path][: len(whole[path]) // 2], b""):
            path.write_bytes(broken)
            failed = runner.invoke(app, [*arguments, "--resume"])
            assert failed.exit_code == 2
            assert failed.stderr.startswith("error: ")
            assert message in failed.stderr
            assert path.read_bytes() == broken  # nothing was written over
        path.write_bytes(whole[path])
    assert runner.invoke(app, [*arguments, "--resume"]).exit_code == 0


def test_a_full_disk_leaves_older_results_and_the_command_can_be_repeated(
    inputs: Path, prior: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, inputs / "out")
    before = tree(inputs / "out")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = command(inputs, prior, "--overwrite", "--seed", "7")
    for place in (
        "diffpost.jobs.outputs.write_map",
        "diffpost.jobs.outputs.write_cube",
        "diffpost.samples.Samples.save",
        "diffpost.plot.summary",
        "pathlib.Path.mkdir",
        "numpy.savez",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            failed = runner.invoke(app, arguments)
        assert failed.exit_code == 2, place
        assert failed.stderr.count("\n") == 1
        assert "is full" in failed.stderr
        assert "repeat the command with --resume" in failed.stderr
        after = tree(inputs / "out")
        assert {k: v for k, v in after.items() if not k.startswith(".partial")} == before, place
        assert not list(inputs.glob(".out.*")), place
    repeated = runner.invoke(app, [*arguments, "--resume"])
    assert repeated.exit_code == 0, repeated.output
    assert json.loads((inputs / "out" / "run.json").read_text())["seed"] == 7
    assert not (inputs / "out" / ".partial").exists()


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
