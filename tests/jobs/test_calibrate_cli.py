"""`diffpost calibrate`, end to end with the shipped small prior, and all that may go wrong with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
from diffpost.sde import EDM

runner = CliRunner()
SIDE = 16


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny untrained network, 2 physical units to one of its own."""
    config = {
        "kind": "unet",
        "channels": 1,
        "patch": 2,
        "widths": [8, 8],
        "blocks": [1, 1],
        "embedding": 16,
    }
    torch.manual_seed(0)
    model = NetworkScore(build_network(config), EDM(), (1, SIDE, SIDE), 0.5, scale=2.0, card={})
    folder = tmp_path_factory.mktemp("prior") / "tiny"
    save_prior(folder, model)
    return folder


def command(folder: Path, prior: Path | str, *more: str) -> list[str]:
    settings = {
        "--prior": str(prior),
        "--noise-std": "0.1",
        "--simulations": "8",
        "--samples": "8",
        "--steps": "2",
        "--truth-steps": "2",
        "--out": str(folder / "out"),
    }
    words = ["calibrate", *(word for pair in settings.items() for word in pair)]
    return [*words, *([] if "--operator" in more else ["--operator", "psf:1.2"]), *more]


def tree(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_it_runs_on_a_shipped_prior(tmp_path: Path) -> None:
    done = runner.invoke(
        app, command(tmp_path, "galaxies-32", "--operator", "psf:1.5,bin:2", "--controls")
    )
    assert done.exit_code == 0, done.output
    for words in ("Gaussian PSF of sigma 1.5", "coverage", "half-light radius", "report.html"):
        assert words in done.output
    record = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert record["prior"]["name"] == "galaxies-32"
    assert record["arguments"]["noise_std"] == 0.1
    assert record["arguments"]["operator"] == ["psf:1.5,bin:2"]
    assert len(record["tests"]) == 5
    assert set(record["controls"]) == {"wider", "narrower", "shifted", "prior"}
    assert not (tmp_path / "out" / ".partial").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Gaussian PSF of sigma 1.5 px, then sums of 2 x 2 pixels" in page


def test_every_option_reaches_the_run(tmp_path: Path, prior: Path) -> None:
    y, x = np.mgrid[:11, :11] - 5.0
    fits.PrimaryHDU(np.exp(-(x**2 + y**2) / 4)).writeto(tmp_path / "psf.fits")
    truths = np.random.default_rng(0).normal(size=(9, 24, 24)).astype(np.float32)
    np.save(tmp_path / "truths.npy", truths)
    done = runner.invoke(
        app,
        command(
            tmp_path,
            prior,
            *("--operator", "bin:2", "--operator", "mask:0.2"),
            *("--psf", str(tmp_path / "psf.fits")),
            *("--truths", str(tmp_path / "truths.npy")),
            *("--size", "24", "--method", "convolved", "--level", "0.1", "--seed", "3"),
        ),
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert record["prior"]["shape"] == [1, 24, 24]
    assert record["guidance"].startswith("Convolved")
    assert record["level"] == 0.1
    assert record["seed"] == 3
    assert len(record["operator"]["words"]) == 3
    assert record["inputs"]["truths"]["sha256"]
    flux = np.load(tmp_path / "out" / "simulations.npz")["truth"][:, 0]
    assert set(np.round(flux, 3)) <= set(np.round(truths.sum((1, 2), dtype=np.float64), 3))


def test_the_noise_is_in_units_of_the_scale(tmp_path: Path, prior: Path) -> None:
    assert runner.invoke(app, command(tmp_path, prior)).exit_code == 0
    record = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert record["noise"] == "GaussianNoise(std=0.2)"


def test_results_are_left_alone_without_overwrite(tmp_path: Path, prior: Path) -> None:
    assert runner.invoke(app, command(tmp_path, prior)).exit_code == 0
    before = tree(tmp_path)
    refused = runner.invoke(app, command(tmp_path, prior, "--seed", "1"))
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    resumed = runner.invoke(app, command(tmp_path, prior, "--resume"))
    assert resumed.exit_code == 2
    assert "nothing to resume" in resumed.stderr
    # Bad input with --overwrite destroys nothing either.
    wrong = runner.invoke(app, command(tmp_path, prior, "--overwrite", "--method", "magic"))
    assert wrong.exit_code == 2
    assert tree(tmp_path) == before
    assert runner.invoke(app, command(tmp_path, prior, "--seed", "1", "--overwrite")).exit_code == 0
    assert tree(tmp_path) != before
    # A folder of something else is not touched even then.
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text("{}")
    at = command(tmp_path, prior, "--overwrite")
    at[at.index("--out") + 1] = str(other)
    assert runner.invoke(app, at).exit_code == 2
    assert [p.name for p in other.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--operator", "elephant"), "psf:SIGMA"),
        (("--operator", "bin:5"), "divisor"),
        (("--operator", "mask:0.5,bin:2"), "last"),
        (("--prior", "no-such-prior"), "no prior"),
        (("--method", "magic"), "moment-matching"),
        (("--noise-std", "0"), "positive"),
        (("--noise-std", "nan"), "positive"),
        (("--simulations", "3"), "at least 8"),
        (("--samples", "3"), "at least 8"),
        (("--level", "2"), "between 0 and 1"),
        (("--size", "15"), "divisible"),
        (("--psf", "no-such-file.fits"), "no-such-file.fits"),
        (("--truths", "no-such-folder"), "nothing at"),
        (("--truths", "WRONG"), "shape"),
        (("--truths", "FEW"), "truths for 8"),
        (("--device", "elephant"), "--device"),
        (("--device", "cuda:7"), "--device"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    tmp_path: Path, prior: Path, words: tuple[str, ...], message: str
) -> None:
    if words[1] in ("WRONG", "FEW"):
        shape = (9, SIDE + 2, SIDE) if words[1] == "WRONG" else (5, SIDE, SIDE)
        np.save(tmp_path / "truths.npy", np.zeros(shape, dtype=np.float32))
        words = (words[0], str(tmp_path / "truths.npy"))
    before = tree(tmp_path)
    failed = runner.invoke(app, command(tmp_path, prior, *words))
    assert failed.exit_code == 2, failed.output
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_an_operator_is_needed(tmp_path: Path, prior: Path) -> None:
    failed = runner.invoke(app, command(tmp_path, prior)[:-2])
    assert failed.exit_code == 2
    assert "--operator or --psf" in failed.stderr


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path: Path, prior: Path) -> None:
    arguments = command(tmp_path, prior, "--batch-size", "8", "--controls", "--steps", "6")
    partial = tmp_path / "out" / ".partial"
    process = subprocess.Popen(
        [sys.executable, "-m", "diffpost.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 100
        while not list(partial.glob("rows-*.npz")) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list(partial.glob("rows-*.npz")))
    assert 0 < done < 8
    assert not (tmp_path / "out" / "verdict.json").exists()
    assert runner.invoke(app, arguments).exit_code == 2
    before = tree(tmp_path)
    for other in (("--seed", "5"), ("--operator", "psf:1.3"), ("--noise-std", "0.2")):
        refused = runner.invoke(app, [*arguments, "--resume", *other])
        assert refused.exit_code == 2, other
        assert "another run" in refused.stderr
    assert tree(tmp_path) == before
    resumed = runner.invoke(app, [*arguments, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    at = arguments.index("--out") + 1
    whole = [*arguments[:at], str(tmp_path / "whole"), *arguments[at + 1 :]]
    assert runner.invoke(app, whole).exit_code == 0
    one, two = (np.load(tmp_path / name / "simulations.npz") for name in ("out", "whole"))
    assert set(one.files) == set(two.files)
    for name in one.files:
        assert np.array_equal(one[name], two[name]), name


def test_an_interruption_says_how_to_go_on(
    tmp_path: Path, prior: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("diffpost.resume.RunFolder.save", interrupt)
        stopped = runner.invoke(app, command(tmp_path, prior))
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr


def test_help_teaches_with_examples() -> None:
    told = runner.invoke(app, ["calibrate", "--help"])
    assert told.exit_code == 0
    for words in ("Examples", "psf:1.5", "--controls", "--truths", "report.html", "mask:SHARE"):
        assert words in told.output
    assert "calibrate" in runner.invoke(app, ["--help"]).output
