"""What an imaging job writes, besides what is said in `diffpost.jobs.outputs`.

run.json          arguments, versions, hashes, what was inferred, how well it fits, timings
summary.png       dirty image and beam, mean, standard deviation, four draws, residual, amplitude against baseline
mean.fits median.fits std.fits q16.fits q84.fits iqr.fits     maps of the sky in Jy/pixel; iqr is q84 - q16
samples.fits      the draws as a cube; samples.zarr: for `Samples.load`
dirty.fits beam.fits      naturally weighted, Jy/beam
residual.fits     dirty image of V - model of the posterior mean, in standard deviations of its noise
visibilities.fits tables: VIS (u, v, data, model, weight), BASELINES (chi-squared of each), BINS (amplitude against length)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from astropy.io import fits
from numpy.typing import NDArray

from diffpost.io.fits import write_cube, write_map
from diffpost.jobs.imaging import UNIT, dirty_beam, dirty_image, header_of
from diffpost.jobs.outputs import OutputFolder, asked, computed_on, prior_record

if TYPE_CHECKING:
    from diffpost.imaging import ImagingResult

__all__ = ["amplitude_bins", "imaging_record", "write_imaging"]

_BINS = 24


def write_imaging(
    folder: OutputFolder, result: ImagingResult, record: dict[str, Any] | None = None
) -> None:
    """Write every product of an imaging job and move them into place.

    Raises
    ------
    OSError: the disk is full or not writable; finished draws and older results are untouched.
    """
    folder.publish_with(lambda new: _products(result, new), record or imaging_record(result))


def imaging_record(
    result: ImagingResult,
    *,
    command: list[str] | None = None,
    arguments: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    prior: str | None = None,
) -> dict[str, Any]:
    """What made a result, as JSON values; the same arguments and versions reproduce it."""
    problem, info = result.problem, dict(result.samples.info)
    data = problem.data
    return {
        **asked(command, arguments, inputs),
        "seed": info.get("seed"),
        "samples": len(result.samples),
        "calls_per_draw": result.samples.calls,
        "jacobian_products_per_draw": result.samples.vjps,
        "guidance": repr(result.guidance),
        "sampler": repr(result.sampler),
        "prior": prior_record(result.prior, prior),
        "visibilities": {
            "format": data.form,
            "target": data.target,
            "used": len(data),
            "longest_baseline": data.longest,
            "phase_centre": [data.ra, data.dec],
            "dirty_noise": data.noise,
        },
        "inferred": {
            "scale": float(torch.as_tensor(result.prior.scale).double().mean()),
            "offset": float(torch.as_tensor(result.prior.offset).double().mean()),
            **problem.report,
        },
        "grid": {
            "shape": list(problem.grid.shape),
            "pixel": problem.grid.pixel,
            "centre": list(problem.grid.centre),
        },
        "unit": UNIT,
        "notes": list(result.notes),
        "metrics": result.metrics,
        "timings": result.timings,
        **computed_on(result.prior),
    }


def _products(result: ImagingResult, folder: Path) -> None:
    from diffpost.plot.imaging_summary import imaging_summary

    problem = result.problem
    header = problem.header
    cards = {"NDRAWS": (len(result.samples), "posterior draws")}
    low, median, high = result.quantile([0.16, 0.5, 0.84])
    maps = [
        ("mean", result.mean, "posterior mean"),
        ("median", median, "posterior median"),
        ("std", result.std, "posterior standard deviation (unbiased)"),
        ("q16", low, "16% quantile of the posterior draws"),
        ("q84", high, "84% quantile of the posterior draws"),
        ("iqr", high - low, "84% - 16% quantile of the posterior draws"),
    ]
    for name, values, text in maps:
        write_map(folder / f"{name}.fits", values, header, unit=UNIT, comment=text, cards=cards)
    write_cube(
        folder / "samples.fits", result.images, header, unit=UNIT, comment="posterior draws", cards=cards
    )  # fmt: skip
    noise = {"NOISE": (problem.data.noise, "Jy/beam, standard deviation of the dirty image")}
    write_map(
        folder / "dirty.fits",
        dirty_image(problem),
        header,
        unit="Jy/beam",
        comment="dirty image, natural weights, not divided by the primary beam",
        cards=noise,
    )
    beam, grid = dirty_beam(problem)
    write_map(
        folder / "beam.fits",
        beam,
        header_of(grid, problem.data),
        unit="",
        comment="dirty beam, natural weights, 1 at its middle",
    )
    write_map(
        folder / "residual.fits",
        result.residual_image,
        header,
        unit="",
        comment="dirty image of V - model of the posterior mean, in sigma",
        cards=noise,
    )
    _tables(result).writeto(folder / "visibilities.fits")
    result.samples.save(folder / "samples.zarr")
    imaging_summary(result, folder / "summary.png")


def amplitude_bins(result: ImagingResult) -> dict[str, NDArray[np.float64]]:
    """Amplitude against the length of the baseline, in bins of as many visibilities each.

    distance: weighted mean, wavelengths. data, model: root of the weighted mean of |V|^2, of the data less what noise adds, which may
    leave nothing (0). error: standard error of the data's. noise: of a coherent mean over the bin, (2/sum w)^1/2. chi2: reduced, of the
    residual.
    """
    data = result.problem.data
    order = np.argsort(data.distance, kind="stable")
    parts = np.array_split(order, min(_BINS, len(data)))
    rows = []
    for part in parts:
        w = data.weight[part]
        total, n = w.sum(), len(part)
        power = float((w * np.abs(data.vis[part]) ** 2).sum() / total)
        added = 2 * n / total  # sum w (2/w) / sum w
        model = float((w * np.abs(result.model[part]) ** 2).sum() / total)
        signal = max(power - added, 0.0)
        # w |V|^2 of noise has standard deviation 2 (of 2), and 2 sqrt(w |S|^2) from its product with the sky S
        scatter = float(np.sqrt((4 + 4 * w * np.abs(result.model[part]) ** 2).sum()) / total)
        chi2 = float((w * np.abs(data.vis[part] - result.model[part]) ** 2).sum() / (2 * n))
        error = scatter / (2 * np.sqrt(signal)) if signal > scatter else np.sqrt(scatter)
        rows.append((float((w * data.distance[part]).sum() / total), np.sqrt(signal), error, np.sqrt(model), np.sqrt(added / n), chi2, n))  # fmt: skip
    names = ("distance", "data", "error", "model", "noise", "chi2", "count")
    return dict(zip(names, np.array(rows, dtype=np.float64).T, strict=True))


def _tables(result: ImagingResult) -> fits.HDUList:
    from diffpost.imaging import baseline_chi2

    data, model = result.problem.data, result.model
    columns = [
        fits.Column("U", "D", array=data.u, unit="lambda"),
        fits.Column("V", "D", array=data.v, unit="lambda"),
        fits.Column("DATA", "M", array=data.vis, unit="Jy"),
        fits.Column("MODEL", "M", array=model, unit="Jy"),
        fits.Column("WEIGHT", "D", array=data.weight, unit="Jy-2"),
    ]
    for name, values, kind in (("ANT1", data.antenna1, "J"), ("ANT2", data.antenna2, "J"), ("TIME", data.time, "D")):  # fmt: skip
        if values is not None:
            columns.append(fits.Column(name, kind, array=values))
    hdus = [fits.PrimaryHDU(), fits.BinTableHDU.from_columns(columns, name="VIS")]
    rows = baseline_chi2(data, model)
    if rows:
        first, second, count, chi2, length = (np.array(column) for column in zip(*rows, strict=True))  # fmt: skip
        hdus.append(
            fits.BinTableHDU.from_columns(
                [
                    fits.Column("ANT1", "J", array=first),
                    fits.Column("ANT2", "J", array=second),
                    fits.Column("COUNT", "J", array=count),
                    fits.Column("LENGTH", "D", array=length, unit="lambda"),
                    fits.Column("CHI2", "D", array=chi2),
                    fits.Column("CHI2_ERR", "D", array=count**-0.5),
                ],
                name="BASELINES",
            )
        )
    bins = amplitude_bins(result)
    hdus.append(
        fits.BinTableHDU.from_columns(
            [fits.Column(name.upper(), "D", array=values) for name, values in bins.items()],
            name="BINS",
        )
    )
    return fits.HDUList(hdus)
