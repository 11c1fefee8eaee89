"""The scripts of examples/ run, and say what the documents say."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

_FOLDER = Path(__file__).parents[1] / "examples"


def test_the_oracle_table_is_made() -> None:
    script = [sys.executable, str(_FOLDER / "oracle_table.py")]
    done = subprocess.run(
        [*script, "--draws", "8", "--only", "what the job does"],
        check=True,
        capture_output=True,
        text=True,
    )
    rows = [line for line in done.stdout.splitlines() if "what the job does" in line]
    assert len(rows) == 3
    for line in rows:
        cells = [cell.strip() for cell in line.split("|")]
        assert 0.6 < float(cells[3]) < 1.4  # error of the mean of 8 draws over its floor


def test_the_benchmarks_resume_and_write_their_tables(tmp_path: Path) -> None:
    """Three results; the second run repeats only the one whose line was cut off; the page gets their numbers."""
    docs, out = tmp_path / "docs", tmp_path / "out"
    docs.mkdir()
    shutil.copy(_FOLDER.parent / "docs" / "benchmarks.md", docs)
    script = [sys.executable, "-m", "examples.benchmarks", "--docs", str(docs), "--out", str(out)]

    def run(*more: str) -> str:
        done = subprocess.run(
            [*script, *more], check=True, capture_output=True, text=True, cwd=_FOLDER.parent
        )
        return done.stdout

    chosen = ("--only", "ring", "exact/MomentMatching, 100/Convolved, 100", "seed 0")
    assert len(run(*chosen).splitlines()) == 3
    results = out / "results.jsonl"
    results.write_text(results.read_text()[:-20])
    assert len(run(*chosen).splitlines()) == 1
    assert run(*chosen) == ""
    run("--tables")
    page = (docs / "benchmarks.md").read_text()
    lens = page[page.index("<!-- table lens -->") :]
    rows = [line.split("|") for line in lens.splitlines() if line.startswith("| ")]
    ratio = {row[1].strip(): float(row[2]) for row in rows[1:] if "---" not in row[1]}
    assert 0.5 < ratio["MomentMatching"] < 1.5 < 1.55 < ratio["Convolved"] < 4
    assert (docs / "images" / "pareto.png").stat().st_size > 10_000
    assert run(*chosen) == ""  # the page's own results count too


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(
    "DIFFPOST_DATA" not in os.environ, reason="set DIFFPOST_DATA to the folder of real data"
)
def test_hsc_comes_closer_to_hst_than_richardson_lucy(example: Callable[[str], ModuleType]) -> None:
    """Galaxy B of docs/deconvolution.md, two draws, against 100 iterations; the data as the control."""
    hsc = example("hsc_galaxies")
    field = hsc.read_field()
    assert field.offset == pytest.approx((-0.45, 0.07), abs=0.02)
    settings = argparse.Namespace(prior="galaxies-64", samples=2, seed=0, inflate=1.0)
    draws = hsc.draws(field, "B", settings)
    wide = np.pad(field.seen, hsc.PAD, mode="reflect")
    steps = [(np.arange(n * hsc.FINER) - 1) / hsc.FINER for n in wide.shape]
    grid = np.meshgrid(*steps, indexing="ij")
    fine = hsc.map_coordinates(wide, grid, order=3, mode="nearest")
    psf = hsc.sampled(field.hsc_psf.data, hsc.FINER)
    lucy = hsc.richardson_lucy(np.clip(fine, 1e-6, None), psf, num_iter=100, clip=False)
    where, width = hsc.aperture(field, "B"), 0.15 / 2.3548 / field.pixel
    truth = gaussian_filter(field.truth, width)

    def error(image: np.ndarray) -> float:
        return float(hsc.compare(gaussian_filter(image, width), truth, where).error)

    ours = error(draws.mean(0))
    theirs, data = (error(field.through_hst(x, -hsc.PAD, -hsc.PAD)) for x in (lucy, fine))
    assert ours < 0.12 and ours < 0.65 * theirs < 0.5 * data
