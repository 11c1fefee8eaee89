"""`diffpost image`: from the options to the folder, and what is told at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from diffpost.jobs import options
from diffpost.jobs.console import bad_input, console, keeping, line
from diffpost.jobs.options import plain

if TYPE_CHECKING:
    from rich.console import Console

    from diffpost.imaging import ImagingResult
    from diffpost.jobs.outputs import OutputFolder

__all__ = ["IMAGE_HELP", "image", "run_image"]

IMAGE_HELP = (
    "[bold]Examples[/bold]\n\n"
    "[green]diffpost image target.uvfits --cell 0.03 --size 64 --out target[/green]\n\n"
    "One field and two spectral windows of a measurement set, averaged over 30 s and 4 channels, with the weights that "
    "the data themselves have:\n\n"
    "[green]diffpost image a.ms --field M87 --spw 0,1 --average 30,4 --recalibrate common --cell 0.05 --size 96 "
    "--out m87[/green]\n\n"
    "The longest baseline sets the largest cell, half its resolution, and the error for a larger one names it "
    "(docs/interferometry.md)."
)

_SAME = (
    "cell",
    "size",
    "stokes",
    "uv_unit",
    "frequency",
    "conjugate",
    "recalibrate",
    "systematic",
    "scale",
)


def image(
    vis: options.Visibilities,
    cell: options.Cell,
    size: options.ImageSize,
    out: options.RequiredOut,
    center: options.PhaseOffset = None,
    prior: options.Prior = options.PRIOR,
    samples: options.Draws = options.DRAWS,
    seed: options.Seed = 0,
    steps: options.Steps = None,
    batch_size: options.Batch = options.BATCH,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    form: options.VisFormat = None,
    field: options.VisField = None,
    spw: options.Spw = None,
    stokes: options.Stokes = "pseudoI",
    uv_unit: options.UvUnit = None,
    frequency: options.Frequency = None,
    conjugate: options.Conjugate = False,
    average: options.Average = None,
    recalibrate: options.Recalibrate = None,
    systematic: options.Systematic = 0.0,
    primary_beam: options.PrimaryBeam = None,
    scale: options.ImageScale = None,
) -> None:
    """Posterior samples of the sky behind the visibilities of an interferometer.

    VIS is UVFITS, a CASA measurement set, or a table of u, v, re, im, weight (.npz, .npy, .csv). The visibilities themselves are
    fitted: no gridding, no CLEAN.
    """
    given = dict(locals())
    with bad_input():
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(out)
        folder.check(overwrite=overwrite, resume=resume)
        arguments = {name: plain(value) for name, value in given.items()}
        with keeping(folder):
            run_image(given, folder, console(), sys.argv, arguments, resume=resume)


def run_image(
    given: Mapping[str, Any],
    folder: OutputFolder,
    screen: Console,
    command: list[str],
    arguments: dict[str, Any],
    *,
    resume: bool,
) -> None:
    """Run an imaging job by the options of the command line, and write its folder.

    Raises
    ------
    FileNotFoundError, ValueError: as `diffpost.imaging.image_visibilities`; before anything is written.
    """
    import time

    from diffpost.deconvolve import load, sampler_of
    from diffpost.imaging import check_size, set_up_imaging, solve_imaging
    from diffpost.jobs.imaging import prepare_imaging
    from diffpost.jobs.imaging_outputs import imaging_record, write_imaging

    def say(text: str) -> None:
        screen.print(line(text))

    start = time.perf_counter()
    prior = load(given["prior"])
    check_size(prior, given["size"])
    problem = prepare_imaging(
        given["vis"],
        **{name: given[name] for name in _SAME},
        center=_pair(given["center"], "--center", (0.0, 0.0)),
        form=given["form"],
        field=_field(given["field"]),
        spw=_windows(given["spw"]),
        average=_average(given["average"]),
        primary_beam=given["primary_beam"],
    )
    problem, prior = set_up_imaging(problem, prior)
    for note in problem.notes:
        say(note)
    told = len(problem.notes)
    checkpoint = folder.start(resume=resume)
    result = solve_imaging(
        problem,
        prior,
        samples=given["samples"],
        sampler=None if given["steps"] is None else sampler_of(given["steps"]),
        seed=given["seed"],
        batch_size=given["batch_size"],
        checkpoint=checkpoint,
        prepared=time.perf_counter() - start,
        title=problem.data.target or Path(given["vis"]).name,
        announce=say,
    )
    for note in result.notes[told:]:
        say(note)
    vis = Path(given["vis"])
    record = imaging_record(
        result,
        command=command,
        arguments=arguments,
        inputs={"visibilities": str(vis)} if vis.is_file() else {},
        prior=given["prior"],
    )
    write_imaging(folder, result, record)
    _report(screen, result, folder.path)


def _pair(text: str | None, option: str, default: Any) -> Any:
    if text is None:
        return default
    try:
        first, second = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"cannot read {option} {text!r}; expected two numbers, such as 0.5,-1"
        ) from None
    return first, second


def _average(text: str | None) -> tuple[float, int] | None:
    if text is None:
        return None
    seconds, channels = _pair(text if "," in text else f"{text},1", "--average", None)
    if channels != int(channels):
        raise ValueError(
            f"cannot read --average {text!r}; expected seconds and a whole number of channels, such as 30,4"
        )
    return seconds, int(channels)


def _field(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdigit() else text


def _windows(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"cannot read --spw {text!r}; expected numbers from 0, such as 0,2"
        ) from None


def _report(screen: Console, result: ImagingResult, path: Path) -> None:
    metrics = result.metrics
    chi2, flux, rest = metrics["reduced_chi2"], metrics["flux"], metrics["residual_image"]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "found", "expected"):
        table.add_column(name, style="bold cyan" if not name else "", no_wrap=True)
    error = f"{chi2['expected_std']:.2g}"
    if chi2["mean_expected"] is not None:
        table.add_row(
            "reduced χ² of the mean",
            f"{chi2['mean']:.4f}",
            f"{chi2['mean_expected']:.4f} ± {error}",
        )
    table.add_row("reduced χ² of a draw", f"{chi2['draws']:.4f}", f"1 ± {error}")
    table.add_row("of an empty sky", f"{chi2['empty_sky']:.4f}", "")
    table.add_row("rms of the residual dirty image", f"{rest['rms']:.2f}", "1")
    spread = "" if flux["std"] is None else f" ± {flux['std']:.2g}"
    table.add_row("flux of the image", f"{flux['mean']:.4g}{spread} Jy", "")
    screen.print()
    screen.print(table)
    if abs(chi2["draws"] - 1) > max(5 * chi2["expected_std"], 0.02):
        screen.print(
            "\n[yellow]The reduced χ² is not what the weights promise[/yellow]: they may be off (try --recalibrate common), "
            f"or {'calibration errors are left' if chi2['draws'] > 1 else 'data are correlated'}."
        )
    screen.print(
        f"\n{len(result.samples)} draws in {result.timings['sample']:.0f} s, in [bold]{escape(str(path))}[/bold]: summary.png, "
        "mean/median/std/q16/q84/iqr.fits, samples.fits, samples.zarr, dirty.fits, beam.fits, residual.fits, visibilities.fits, run.json"
    )
