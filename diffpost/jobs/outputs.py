"""The folder that a job writes.

Everything is written into a folder beside the destination and moved into place when complete, so that
a folder that has a `run.json` is whole.  While a job runs, the destination holds `.partial` with the
finished draws, from which the same call goes on; a finished job removes it.

    run.json       arguments, versions, hashes, what was inferred, how well it fits, timings
    summary.png    data, mean, standard deviation, residual, four draws
    mean.fits std.fits q16.fits q50.fits q84.fits     maps over the cutout
    samples.fits   the draws over the cutout, as a cube
    samples.zarr   the draws on the whole grid of the model, for `Samples.load`
    residual.fits  (data - model of the posterior mean) / sigma
    data.fits      the cutout as used: background-subtracted, masked pixels NaN
    background.fits, mask.fits     what was subtracted; 1 = no data, 2 = neighbour
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from diffpost._version import __version__
from diffpost.io.fits import write_cube, write_map

if TYPE_CHECKING:
    from diffpost.deconvolve import DeconvolutionResult
    from diffpost.score import ScoreModel

__all__ = ["OutputFolder", "file_hash", "run_record", "versions"]

_PACKAGES = ("torch", "numpy", "scipy", "astropy", "photutils", "zarr", "matplotlib")


@final
class OutputFolder:
    """The destination of a job.

    path: the folder; it need not exist.
    record: the file that a finished job has written.
    """

    def __init__(self, path: str | os.PathLike[str], record: str = "run.json") -> None:
        self.path = Path(path).resolve()
        self.record = record

    @property
    def partial(self) -> Path:
        """Where finished draws wait while a job runs."""
        return self.path / ".partial"

    @property
    def finished(self) -> bool:
        return (self.path / self.record).exists()

    @property
    def unfinished(self) -> bool:
        return self.partial.is_dir() and any(self.partial.iterdir())

    def check(self, *, overwrite: bool = False, resume: bool = False) -> None:
        """Whether a job may write here; nothing is touched.

        Raises
        ------
        FileExistsError: it may not, saying what to do.
        """
        path = self.path
        if not path.exists():
            parent = path.parent
            while not parent.exists():
                parent = parent.parent
            if not os.access(parent, os.W_OK) or not parent.is_dir():
                raise PermissionError(f"cannot write into {parent}; choose another --out")
            return
        if not path.is_dir():
            raise FileExistsError(f"{path} is a file; choose a folder for --out")
        others = [item for item in path.iterdir() if item.name != ".partial"]
        if others and not self.finished:
            raise FileExistsError(
                f"the folder {path} holds other files; choose an empty or a new one for --out"
            )
        if self.finished and not overwrite:
            if resume and not self.unfinished:
                raise FileExistsError(
                    f"the run in {path} is finished, there is nothing to resume; --overwrite does it "
                    "again"
                )
            raise FileExistsError(
                f"the folder {path} holds results; choose another --out, or --overwrite to replace "
                "them once the new ones are complete"
            )
        if self.unfinished and not (resume or overwrite):
            raise FileExistsError(
                f"the folder {path} holds an unfinished run; --resume continues it, --overwrite starts "
                "afresh"
            )

    def start(self, *, resume: bool = False) -> Path:
        """Make the folder for finished draws, emptied unless the run is resumed."""
        if self.partial.exists() and not resume:
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        return self.partial

    def write(self, result: DeconvolutionResult, record: dict[str, Any] | None = None) -> None:
        """Write every product of a deconvolution and move them into place.

        Raises
        ------
        OSError: the disk is full or not writable; finished draws and older results are untouched.
        """
        self.publish_with(lambda new: _write_products(result, new), record or run_record(result))

    def publish_with(self, products: Callable[[Path], None], record: dict[str, Any]) -> None:
        """`publish` what `products` writes, and after it the record as JSON."""

        def fill(new: Path) -> None:
            products(new)
            (new / self.record).write_text(json.dumps(record, indent=2) + "\n")

        self.publish(fill)

    def publish(self, fill: Callable[[Path], None]) -> None:
        """Let `fill` write a new folder, the record last, and move it into place.

        Raises
        ------
        OSError: the disk is full or not writable; finished draws and older results are untouched.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f".{self.path.name}.new-{os.getpid()}")
        try:
            new.mkdir()
            fill(new)
            self._swap(new)
        except OSError as error:
            raise self.explain(error) from None
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def explain(self, error: OSError) -> OSError:
        """The same error, saying what is kept and what to do where the disk is full."""
        text = str(error).lower()
        full = error.errno == errno.ENOSPC or "no space left" in text or "not enough space" in text
        if not full or "--resume" in text:
            return error
        return OSError(
            errno.ENOSPC,
            f"the disk of {self.path} is full; finished draws are kept in {self.partial}, older results "
            "are as they were: make room and repeat the command with --resume",
        )

    def _swap(self, new: Path) -> None:
        if not self.path.exists():
            new.rename(self.path)
            return
        old = self.path.with_name(f".{self.path.name}.old-{os.getpid()}")
        self.path.rename(old)
        try:
            new.rename(self.path)
        except BaseException:
            old.rename(self.path)
            raise
        # Whatever else somebody put beside the older results stays.
        ours = {item.name for item in self.path.iterdir()} | {".partial"}
        for item in old.iterdir():
            if item.name not in ours:
                item.rename(self.path / item.name)
        shutil.rmtree(old, ignore_errors=True)


def _write_products(result: DeconvolutionResult, folder: Path) -> None:
    from diffpost import plot

    problem = result.problem
    fine, coarse, unit = problem.model_header, problem.header, problem.unit
    cards = {
        "NDRAWS": (len(result.samples), "posterior draws"),
        "OVERSAMP": (problem.oversample, "map pixels per image pixel, one side"),
    }
    per = "unit of the image" if problem.surface_brightness else "flux per pixel of this map"
    images = result.images
    maps = {
        "mean": (result.mean, "posterior mean"),
        "std": (result.std, "posterior standard deviation (unbiased)"),
    }
    quantiles = result.quantile([0.16, 0.5, 0.84])
    for name, values in zip(("q16", "q50", "q84"), quantiles, strict=True):
        maps[name] = (values, f"{name[1:]}% quantile of the posterior draws")
    for name, (values, text) in maps.items():
        write_map(
            folder / f"{name}.fits", values, fine, unit=unit, comment=f"{text}; {per}", cards=cards
        )
    write_cube(
        folder / "samples.fits",
        images,
        fine,
        unit=unit,
        comment=f"posterior draws; {per}",
        cards=cards,
    )
    write_map(
        folder / "residual.fits",
        result.residual,
        coarse,
        unit="",
        comment="(data - model of the posterior mean) / sigma; NaN: not used",
    )
    write_map(
        folder / "data.fits",
        problem.data,
        coarse,
        unit=unit,
        comment="the data as used: background subtracted; NaN: not used",
    )
    write_map(
        folder / "background.fits",
        problem.background,
        coarse,
        unit=unit,
        comment="the background that was subtracted from the data",
    )
    neighbours = problem.scene.segments > 1
    mask = np.where(problem.seen, 0, np.where(neighbours, 2, 1))
    write_map(
        folder / "mask.fits",
        mask,
        coarse,
        unit="",
        comment="0: used; 1: no data, or around a neighbour; 2: neighbour",
    )
    result.samples.save(folder / "samples.zarr")
    chi2 = result.metrics["reduced_chi2"]
    correlation = result.metrics["residual_autocorrelation"]
    sky_chi2, sky_correlation = (
        "" if found["sky"] is None else f" (blank sky {found['sky']:.2f})"
        for found in (chi2, correlation)
    )
    subtitle = (
        f"{len(result.samples)} draws, {result.samples.calls} network evaluations each   ·   reduced "
        f"χ² of the mean {chi2['mean']:.2f}{sky_chi2}   ·   residual autocorrelation "
        f"{0.5 * (correlation['x'] + correlation['y']):.2f}{sky_correlation}"
    )
    whitened = result.metrics.get("whitened_chi2")
    if whitened is not None:
        subtitle += f"   ·   whitened χ² of a draw {whitened['draws']:.2f}"
    plot.summary(
        result.samples,
        result.likelihood,
        path=folder / "summary.png",
        region=result.grid.region,
        pixel_scale=problem.pixel_scale,
        header=problem.header,
        unit=unit,
        title=result.title,
        subtitle=subtitle,
    )


def run_record(
    result: DeconvolutionResult,
    *,
    command: list[str] | None = None,
    arguments: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    prior: str | None = None,
) -> dict[str, Any]:
    """What made a result, as JSON values; the same arguments and versions reproduce it.

    inputs: name -> path of the files that were read; their hashes are recorded.
    """
    problem, info = result.problem, dict(result.samples.info)
    return {
        **asked(command, arguments, inputs),
        "seed": info.get("seed"),
        "samples": len(result.samples),
        "calls_per_draw": result.samples.calls,
        "jacobian_products_per_draw": result.samples.vjps,
        "guidance": repr(result.guidance),
        "sampler": repr(result.sampler),
        "prior": prior_record(result.prior, prior),
        "noise_model": None if problem.noise_model is None else problem.report["noise"],
        "inferred": {
            "scale": float(torch.as_tensor(result.prior.scale).double().mean()),
            "offset": float(torch.as_tensor(result.prior.offset).double().mean()),
            **problem.report,
        },
        "cutout": {
            "x0": problem.corner[0],
            "y0": problem.corner[1],
            "width": problem.data.shape[1],
            "height": problem.data.shape[0],
            "oversample": problem.oversample,
        },
        "grid": {
            "shape": list(result.grid.shape),
            "top": result.grid.top,
            "left": result.grid.left,
        },
        "unit": problem.unit,
        "notes": list(problem.notes),
        "metrics": result.metrics,
        "timings": result.timings,
        **computed_on(result.prior),
    }


def asked(
    command: list[str] | None, arguments: dict[str, Any] | None, inputs: dict[str, str] | None
) -> dict[str, Any]:
    """How a record begins: the version, the time, what was asked and of which files."""
    return {
        "diffpost": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "arguments": arguments or {},
        "inputs": {
            name: {"path": path, "sha256": file_hash(path)} for name, path in (inputs or {}).items()
        },
    }


def prior_record(prior: ScoreModel, name: str | None) -> dict[str, Any]:
    """What a record says of a prior; `name` that it was asked for by."""
    from diffpost.deconvolve import prior_hash

    return {
        "name": name or (getattr(prior, "card", None) or {}).get("name"),
        "sha256": prior_hash(prior),
        "shape": list(prior.shape),
    }


def computed_on(prior: ScoreModel) -> dict[str, Any]:
    """How a record ends: the packages and the machine."""
    return {
        "versions": versions(),
        "machine": {
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "device": str(prior.device),
        },
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
