"""`diffpost lens`: from the options to the folder, and what is told at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from diffpost.jobs.console import line
from diffpost.jobs.options import hdu_of
from diffpost.jobs.outputs import OutputFolder

if TYPE_CHECKING:
    from rich.console import Console

    from diffpost.lens import LensResult

__all__ = ["run_lens"]

_SAME = (
    "model",
    "mask",
    "prior",
    "samples",
    "chains",
    "draws",
    "warmup",
    "restarts",
    "turns",
    "fixed",
)
_TARGET = ("weight", "cutout", "center", "size", "plane", "psf_plane", "background", "exptime")


def run_lens(
    given: Mapping[str, Any],
    folder: OutputFolder,
    console: Console,
    command: list[str],
    arguments: dict[str, Any],
    *,
    resume: bool,
) -> None:
    """Run a lens job by the options of the command line, and write its folder.

    Raises
    ------
    FileNotFoundError, ValueError: as `diffpost.lens.reconstruct_lens`.
    """
    try:
        from diffpost.lens import reconstruct_lens
    except ImportError as error:
        raise ValueError(str(error)) from error
    from diffpost.deconvolve import sampler_of
    from diffpost.jobs.lens_outputs import lens_record, write_lens
    from diffpost.jobs.lens_setup import read_description

    read_description(given["model"])  # before anything is made
    noise = given["noise"] if given["noise"] is not None else given["noise_std"]
    fresh = not folder.path.exists()
    checkpoint = folder.start(resume=resume)
    try:
        result = reconstruct_lens(
            given["image"],
            given["psf"],
            noise,
            **{name: given[name] for name in (*_SAME, *_TARGET)},
            hdu=hdu_of(given["hdu"]),
            psf_error=given["psf_error"],
            sampler=None if given["steps"] is None else sampler_of(given["steps"]),
            seed=given["seed"],
            batch_size=given["batch_size"],
            checkpoint=checkpoint,
            title=Path(given["image"]).name,
            announce=lambda text: console.print(line(text)),
        )
    except (ValueError, FileNotFoundError):
        _clear(folder, fresh)
        raise
    inputs = {
        name: str(given[name])
        for name in ("image", "psf", "noise", "weight", "mask", "model")
        if given[name] is not None
    }
    record = lens_record(
        result, command=command, arguments=arguments, inputs=inputs, prior=given["prior"]
    )
    write_lens(folder, result, record)
    _report(console, result, folder.path)


def _clear(folder: OutputFolder, fresh: bool) -> None:
    """Leave no empty folder behind where nothing had been computed."""
    if any(folder.partial.rglob("*.npz")):
        return
    for item in sorted(folder.partial.rglob("*"), reverse=True):
        item.rmdir() if item.is_dir() else item.unlink()
    folder.partial.rmdir()
    if fresh:
        folder.path.rmdir()


def _report(console: Console, result: LensResult, path: Path) -> None:
    metrics = result.metrics
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "median", "-", "+", "R-hat", "effective"):
        table.add_column(name, style="bold cyan" if not name else "", no_wrap=True)
    for row in result.joint.table():
        table.add_row(
            row["name"],
            f"{row['q50']:.5g}",
            f"{row['q50'] - row['q16']:.2g}",
            f"{row['q84'] - row['q50']:.2g}",
            f"{row['rhat']:.3f}",
            f"{row['ess']:.0f}",
        )
    console.print()
    console.print(table)
    chi2, flux, mu = metrics["reduced_chi2"], metrics["source_flux"], metrics["magnification"]

    def spread(values: dict[str, Any]) -> str:
        return "" if values["std"] is None else f" ± {values['std']:.2g}"

    unit = escape(result.scene.problem.unit or "")
    console.print(
        f"\nreduced χ² of a draw {chi2['draws']:.3f} (1.00 ± {chi2['expected_std']:.2f})   source flux "
        f"{flux['mean']:.4g}{spread(flux)} {unit}   magnification {mu['mean']:.3g}{spread(mu)}"
    )
    console.print(
        f"\n{len(result.samples)} sources in [bold]{escape(str(path))}[/bold]: summary.png, corner.png, parameters.csv, "
        "source_mean/std/samples.fits, samples.zarr, chains.zarr, model.fits, residual.fits, run.json"
    )
