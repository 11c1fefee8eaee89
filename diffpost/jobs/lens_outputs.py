"""What a lens job writes, besides what is said in `diffpost.jobs.outputs`.

run.json           arguments, versions, hashes, what was inferred, how well it fits, timings
parameters.csv     mean, standard deviation, quantiles, R-hat and effective sample size of every parameter
chains.zarr        all draws of the parameters, and the sources, for `JointSamples.load`
corner.png         the parameters; summary.png: data, model, residual, source
source_mean.fits source_std.fits source_samples.fits     on the source plane
samples.zarr       the sources, for `Samples.load`
data.fits model.fits residual.fits     on the image plane, with the input's world coordinates
lens_light.fits    likewise, the lens' own light, if it is modelled; the model holds it too
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from astropy.io import fits

from diffpost.io.fits import write_cube, write_map
from diffpost.jobs.outputs import OutputFolder, asked, computed_on, prior_record

if TYPE_CHECKING:
    from diffpost.lens import LensResult

__all__ = ["lens_record", "write_lens"]


def write_lens(
    folder: OutputFolder, result: LensResult, record: dict[str, Any] | None = None
) -> None:
    """Write every product of a lens job and move them into place.

    Raises
    ------
    OSError: the disk is full or not writable; finished parts and older results are untouched.
    """
    folder.publish_with(lambda new: _products(result, new), record or lens_record(result))


def lens_record(
    result: LensResult,
    *,
    command: list[str] | None = None,
    arguments: dict[str, Any] | None = None,
    inputs: dict[str, str] | None = None,
    prior: str | None = None,
) -> dict[str, Any]:
    """What made a result, as JSON values; the same arguments and versions reproduce it."""
    problem, image, source = result.scene.problem, result.scene.grid, result.source
    return {
        **asked(command, arguments, inputs),
        "model": _plain(result.description.spec),
        "samples": len(result.samples),
        "chains": result.joint.theta.shape[0],
        "draws": result.joint.theta.shape[1],
        "parameters_by": dict(result.joint.info),
        "guidance": repr(result.guidance),
        "sampler": result.sampler,
        "calls_per_draw": result.samples.calls,
        "prior": {
            **prior_record(result.prior, prior),
            "scale": float(torch.as_tensor(result.prior.scale).double().mean()),
        },
        "inferred": {**result.inferred, **problem.report},
        "image_grid": {"shape": list(image.shape), "pixel": image.pixel, "centre": image.centre},
        "source_grid": {
            "shape": list(source.shape),
            "pixel": source.pixel,
            "centre": source.centre,
        },
        "unit": problem.unit,
        "notes": list(result.notes),
        "metrics": result.metrics,
        "timings": result.timings,
        **computed_on(result.prior),
    }


def _products(result: LensResult, folder: Path) -> None:
    from diffpost import plot
    from diffpost.plot.lens_summary import lens_summary

    scene, source = result.scene, result.source
    unit = scene.problem.unit
    header = source.to_wcs().to_header() if source.sky is not None else fits.Header()
    cards = {
        "NDRAWS": (len(result.samples), "posterior draws"),
        "PIXARCS": (source.pixel, "arcsec, side of a source pixel"),
        "CENTREX": (source.centre[0], "arcsec from the cutout's middle, along rows"),
        "CENTREY": (source.centre[1], "arcsec from the cutout's middle, up columns"),
    }
    for name, values, text in (
        ("mean", result.mean, "posterior mean of the source"),
        ("std", result.std, "posterior standard deviation of the source"),
    ):
        comment = f"{text}; flux per pixel of this map"
        write_map(
            folder / f"source_{name}.fits", values, header, unit=unit, comment=comment, cards=cards
        )
    write_cube(
        folder / "source_samples.fits",
        result.images,
        header,
        unit=unit,
        comment="posterior draws of the source; flux per pixel of this map",
        cards=cards,
    )
    plane = scene.header
    maps = [
        ("data", scene.part(scene.y[0]), unit, "the data as used; NaN: not used"),
        ("model", result.model, unit, "mean of the draws' images; NaN: not used"),
        ("residual", result.residual, "", "(data - model) / sigma; NaN: not used"),
    ]
    if result.light is not None:
        text = "mean of the draws' light of the lens, behind the PSF; NaN: not used"
        maps.append(("lens_light", result.light, unit, text))
    for name, values, its, text in maps:
        write_map(folder / f"{name}.fits", values, plane, unit=its, comment=text)
    result.samples.save(folder / "samples.zarr")
    result.joint.save(folder / "chains.zarr")
    result.joint.write_table(folder / "parameters.csv")
    plot.corner(result.joint, path=folder / "corner.png")
    lens_summary(result, folder / "summary.png")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
