"""Reconstructs COSMOS-Web lenses (JWST NIRCam) with the lens' light subtracted, beside the reconstructions of PyAutoLens.

    python examples/cosmos_web.py [--lens NAME ...] [--bands F150W ...] [--turns 30] [--samples 12] [--out FOLDER] [--resume]

Four lenses in F150W, or those named; of several bands, the first finds the lens and its posterior is the prior of the lens in
the others.  Data by name from the registry, which has no address for them: without the files the script says how they are
assembled (COWLS: Nightingale et al. 2025).  A lens that is finished in --out is not run again, only its table and picture made.

The noise maps are too large for the scatter of blank sky, where neighbouring pixels are correlated; both are measured on the
sky of the same image.  The likelihood takes white noise of this scatter, made larger by the root of the summed correlations of
adjacent pixels, so that sums over some pixels err as they do on the sky.  chi2 is told in units of the scatter itself.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.visualization import AsinhStretch, ImageNormalize
from cosmos_web_noise import blank_sky, correlation_of, honesty, inflation_of, recalibrated
from numpy.typing import NDArray
from slacs import parser_of, run

import diffpost as dp
from diffpost.io.datasets import DatasetUnavailable, fetch
from diffpost.io.fits import read_image
from diffpost.jobs.lens_inference import source_gaussian
from diffpost.jobs.lens_setup import read_description
from diffpost.jobs.target import read_scene
from diffpost.parameters import JointSamples
from diffpost.physics import Grid, Lens
from diffpost.physics.critical import caustic_curves, critical_curves
from diffpost.plot.figures import INK, MUTED, new_figure, write
from diffpost.plot.images import colour_bar

Array = NDArray[np.float64]

SHEAR = ("gamma_1", "gamma_2")
HALO = 2.7  # arcsec about the lens, where no sky is taken
LAYOUT = {"left": 0.03, "right": 0.99, "top": 0.9, "bottom": 0.05, "wspace": 0.14, "hspace": 0.22}
AXES = "axes in arcsec; surface brightness in the unit of the data; PyAutoLens, mean and draws in the same colours"
RESIDUAL = {"vmin": -5, "vmax": 5, "cmap": "RdBu_r"}
BACKGROUND = 7  # pixels, the reach of correlations by which error bars are judged
NANOJANSKY = 1e15 * math.radians(1 / 3600) ** 2  # of 1 MJy/sr on a square arcsec


@dataclass(frozen=True)
class Target:
    """A lens: theta_E (in PyAutoLens' convention) and shear by COWLS, radii of the mask, and the source's grid, in arcsec.

    The grid is where PyAutoLens' source is bright; nothing else of that source is used.
    """

    theta_E: float
    shear: tuple[float, float]
    radii: tuple[float, float]
    size: int
    pixel: float
    centre: tuple[float, float]


LENSES = {
    "COSJ100024+015334": Target(0.7706, (0.0294, 0.0187), (0.3, 1.4), 48, 0.028, (0.05, 0.05)),
    "COSJ095921+020638": Target(0.7754, (-0.0999, -0.0890), (0.3, 1.2), 48, 0.02, (0.0, 0.04)),
    "COSJ100024+021749": Target(0.7301, (-0.1174, -0.1671), (0.4, 1.45), 32, 0.05, (0.15, 0.0)),
    "COSJ095914+021219": Target(1.5043, (0.0791, -0.0316), (0.5, 2.5), 32, 0.05, (-0.05, 0.35)),
}


@dataclass(frozen=True)
class Field:
    """One lens in one band: arrays (h, w) in the unit of the files, presumably MJy/sr, and what blank sky says.

    data: without the lens' light and the sky; noise: that of the likelihood; masked: other galaxies.
    scatter: of blank sky; ratio: of the noise map to it; inflation: of white noise for the correlations (2k + 1, 2k + 1).
    lensed, source, error: PyAutoLens' lensed source (h, w), and its source with its error, square, on pixels of `fine` arcsec.
    """

    data: Array
    noise: Array
    masked: NDArray[np.bool_]
    psf: Array
    pixel: float
    scatter: float
    ratio: float
    inflation: float
    correlation: Array
    lensed: Array
    source: Array
    error: Array | None
    fine: float


@dataclass(frozen=True)
class Found:
    """A finished run, as read from its folder: images and sources in flux per pixel of their grids."""

    record: dict[str, Any]
    joint: JointSamples
    maps: dict[str, Array]
    image: Grid
    source: Grid
    lens: Lens
    theta: dict[str, Array]

    @property
    def median(self) -> torch.Tensor:
        """(P,) of the lens."""
        return torch.tensor([np.median(self.theta[n]) for n in self.lens.parameters])


def load(name: str, band: str) -> Field:
    """A lens in a band, with the noise measured on its sky."""
    with np.load(fetch(f"{name.lower()}-{band.lower()}")) as file:
        part = {k: np.asarray(file[k], float) for k in file.files if k != "psf_71x71"}
    pixel = float(part["pixscale"])
    h, w = part["data"].shape
    y, x = (np.indices((h, w)) - np.array([h // 2, w // 2])[:, None, None]) * pixel
    scene = read_scene(part["data"], (w // 2, h // 2), background="none")
    away = scene.sky & (np.hypot(x, y) > HALO)
    level, scatter, sky = blank_sky(part["data"], away)
    data = part["data"] - level
    correlation = correlation_of(data, sky, BACKGROUND)
    inflation = inflation_of(correlation)
    light = part["lens_light"] + part["source_light"]
    noise, ratio = recalibrated(part["noise_map"], data, sky, inflation, light)
    return Field(
        data=data - part["lens_light"],
        noise=noise,
        masked=part["mask_extra_galaxies"] > 0,
        psf=part["psf"] / part["psf"].sum(),
        pixel=pixel,
        scatter=scatter,
        ratio=ratio,
        inflation=inflation,
        correlation=correlation,
        lensed=part["source_light"],
        source=part["source_reconstruction"],
        error=part.get("source_reconstruction_noise_map"),
        fine=float(part["source_pixscale"]),
    )


def model_of(target: Target, pixel: float, before: Found | None) -> dict[str, Any]:
    """The job's model; before: the run in another band, whose posterior is the prior of all but the centre."""
    about = dict(zip(SHEAR, target.shear, strict=True))
    free: dict[str, Any] = {
        "q": {"uniform": [0.2, 1.0]},
        "phi": {"circular": math.pi},
        "Rein": {"normal": [target.theta_E, 0.05 * target.theta_E]},
        **{name: {"normal": [value, 0.05]} for name, value in about.items()},
    }
    if before is not None:
        for name in free:
            draws = before.theta[f"{'shear' if name in SHEAR else 'main'}.{name}"]
            free[name] = {"normal": [float(draws.mean()), float(draws.std())]}
        free["q"]["within"] = [0.2, 1.0]
    free["Rein"]["within"] = [0.5 * target.theta_E, 2 * target.theta_E]
    centre = {"normal": [0, 0.05]}  # bands are registered to some hundredths of an arcsec
    main = {k: v for k, v in free.items() if k not in SHEAR}
    shear = {k: v for k, v in free.items() if k in SHEAR}
    return {
        "pixel": pixel,
        "mask": dict(zip(("inner", "outer"), target.radii, strict=True)),
        "oversample": 2,
        "bin": 2 if pixel < 0.05 else 1,
        "source": {"size": target.size, "pixel": target.pixel, "centre": list(target.centre)},
        "mass": {
            "main": {"profile": "SIE", "x0": centre, "y0": centre, **main},
            "shear": {"profile": "ExternalShear", **shear},
        },
    }


def cut(field: Field, radius: float) -> tuple[slice, slice]:
    """The middle of the arrays, a little more than this radius in arcsec."""
    reach = math.ceil(radius / field.pixel) + 4
    return tuple(slice(n // 2 - reach, n // 2 + reach + 1) for n in field.data.shape)  # type: ignore[return-value]


def read_found(folder: Path) -> Found:
    """A finished run."""
    record = json.loads((folder / "run.json").read_text())
    joint = JointSamples.load(folder / "chains.zarr")
    names = ("data", "model", "residual", "source_mean", "source_std")
    image, source = (
        Grid(tuple(g["shape"]), g["pixel"], tuple(g["centre"]))
        for g in (record["image_grid"], record["source_grid"])
    )
    lens = Lens(read_description(record["model"]).model.mass, image, source)
    theta = dict(zip(joint.names, joint.flat.T.numpy(), strict=True))
    maps = {name: read_image(folder / f"{name}.fits").data for name in names}
    return Found(record, joint, maps, image, source, lens, theta)


def as_published(found: Found) -> dict[str, Array]:
    """theta_E and shear of the draws as PyAutoLens states them; its isothermal ellipse has b/(1 + q) in front, ours b/2 √q."""
    q = found.theta["main.q"]
    theta_E = found.theta["main.Rein"] * (1 + q) / (2 * np.sqrt(q))
    return {"theta_E": theta_E, **{name: found.theta[f"shear.{name}"] for name in SHEAR}}


def orientations(found: Found, field: Field) -> dict[str, float]:
    """Reduced chi2, in units of the scatter, of their source through our median lens, in its eight orientations about (0, 0)."""
    grid = Grid(field.source.shape, field.fine)
    lens = dp.Convolve(torch.from_numpy(field.psf)) @ Lens(
        read_description(found.record["model"]).model.mass, found.image, grid
    ).at(found.median)
    data, noise = on_grid(found, field, field.data), on_grid(found, field, field.noise)
    seen = usable(found, field)
    results = {}
    for turns in itertools.product((False, True), repeat=3):
        axes = [name for name, done in zip(("T", "y", "x"), turns, strict=True) if done]
        source = field.source.T if turns[0] else field.source
        source = np.flip(source, [i for i in (0, 1) if turns[i + 1]])
        flux = torch.from_numpy(source.copy())[None, None] * (field.fine / field.pixel) ** 2
        z = ((data - lens(flux)[0, 0].numpy()) / noise)[seen] * field.inflation
        results[" ".join(axes) or "as it is"] = float(np.mean(z**2))
    return results


def on_grid(found: Found, field: Field, values: Array) -> Array:
    """The part of values (h, w) that lies on the run's image grid; both are about the middle pixel."""
    h, w = values.shape
    ny, nx = found.image.shape
    top = h // 2 + round(found.image.centre[1] / field.pixel - (ny - 1) / 2)
    left = w // 2 + round(found.image.centre[0] / field.pixel - (nx - 1) / 2)
    return values[top : top + ny, left : left + nx]


def on_cut(found: Found, field: Field) -> tuple[float, float, float, float]:
    """Extent of the maps of a run: the part of its image grid that lies in the cutout."""
    rows, _ = cut(field, found.record["model"]["mask"]["outer"])
    half = (rows.stop - rows.start) / 2 * field.pixel
    left, right, bottom, top = found.image.extent
    return max(left, -half), min(right, half), max(bottom, -half), min(top, half)


def usable(found: Found, field: Field) -> NDArray[np.bool_]:
    """(ny, nx), pixels that the run used."""
    x, y = found.image.coordinates()
    r = torch.hypot(x, y).numpy()
    mask = found.record["model"]["mask"]
    used = (r >= mask["inner"]) & (r <= mask["outer"])
    return used & ~on_grid(found, field, field.masked)


def their_flux(found: Found, field: Field) -> tuple[float, float, float]:
    """Of their source: on our grid, its error if the errors of its pixels were independent, and on the whole of theirs."""
    area = (field.fine / field.pixel) ** 2
    x, y = (c.numpy() for c in Grid(field.source.shape, field.fine).coordinates())
    left, right, bottom, top = found.source.extent
    ours = (x > left) & (x < right) & (y > bottom) & (y < top)
    error = math.nan if field.error is None else area * float(np.linalg.norm(field.error[ours]))
    return area * float(field.source[ours].sum()), error, area * float(field.source.sum())


def correlation_matters(found: Found, field: Field, prior: str) -> tuple[float, float]:
    """True over claimed error of the source's flux, with the noise of the likelihood and with white noise of the bare scatter.

    Of a Gaussian of sources in the prior's place, through the median lens.
    """
    size = found.source.shape[0]
    stand_in = source_gaussian(dp.load_prior(prior), size, 0)
    modes = stand_in.gaussian.scaled_modes * float(np.mean(found.theta["source.flux"]))
    fine = modes.repeat_interleave(stand_in.bins, -1).repeat_interleave(stand_in.bins, -2)
    lens = dp.Convolve(torch.from_numpy(field.psf)) @ found.lens.at(found.median)
    columns = lens(fine.double() / stand_in.bins**2)[:, 0].numpy()
    noise = np.where(usable(found, field), on_grid(found, field, field.noise), np.inf)
    flux = modes.double().sum((-3, -2, -1)).numpy()
    bare = noise / field.inflation
    scatter = np.where(np.isfinite(noise), bare, 0.0)
    return tuple(honesty(columns, n, scatter, field.correlation, flux) for n in (noise, bare))  # type: ignore[return-value]


def row(name: str, band: str, prior: str, found: Found, field: Field) -> dict[str, str]:
    """Everything measured of one lens in one band, by name."""
    metrics, target = found.record["metrics"], LENSES[name]
    published = (target.theta_E, *target.shear)
    cells = {"lens": name, "band": band}
    for (key, draws), value in zip(as_published(found).items(), published, strict=True):
        low, middle, high = np.quantile(draws, (0.16, 0.5, 0.84))
        cells[key] = f"{middle:.4f} +{high - middle:.4f} −{middle - low:.4f}; {value:.4f}"
    seen = usable(found, field)
    noise = on_grid(found, field, field.noise) / field.inflation
    off = on_grid(found, field, field.data - field.lensed)
    here, error, whole = their_flux(found, field)
    flux, mu = metrics["source_flux"], metrics["magnification"]
    ours = metrics["reduced_chi2"]["draws"] * field.inflation**2
    unit = NANOJANSKY * field.pixel**2
    inflated, bare = correlation_matters(found, field, prior)
    turned = orientations(found, field)
    return cells | {
        "chi2; theirs": f"{ours:.3f}; {np.mean((off / noise)[seen] ** 2):.3f} ({seen.sum()} pixels)",
        "magnification": f"{mu['mean']:.2f} ± {mu['std']:.2f}",
        "flux": f"{flux['mean']:.2f} ± {flux['std']:.2f} ({unit * flux['mean']:.0f} nJy)",
        "their flux": f"{here:.2f}, on their whole grid {whole:.2f}",
        "its error, were pixels independent": "no map" if math.isnan(error) else f"{error:.1f}",
        "R-hat, size": f"{metrics['rhat']:.2f}, {metrics['ess']:.0f}",
        "outside": f"{metrics['flux_outside']:.2%}",
        "map over scatter": f"{field.ratio:.2f}",
        "correlation": f"{field.correlation[BACKGROUND, BACKGROUND + 1]:.2f}, "
        f"{field.correlation[BACKGROUND + 1, BACKGROUND]:.2f}, inflation {field.inflation:.2f}",
        "true over claimed error": f"{inflated:.2f}, without inflation {bare:.2f}",
        "their source, turned": "; ".join(f"{k} {v:.2f}" for k, v in turned.items()),
    }


def stretched(values: Array, floor: float) -> ImageNormalize:
    """Colours from this far below zero to the brightest pixels."""
    top = max(float(np.nanpercentile(values, 99.9)), 3 * floor)
    return ImageNormalize(vmin=-floor, vmax=top, stretch=AsinhStretch(0.2))


def picture(path: Path, title: str, found: Found, field: Field) -> None:
    """Data, model, residual, source mean and std; PyAutoLens' source and four draws. Surface brightness in the unit of the data."""
    per = (field.pixel / found.source.pixel) ** 2  # flux per source pixel as brightness
    curves = [line.numpy() for line in critical_curves(found.lens, found.median)]
    caustics = [line.detach().numpy() for line in caustic_curves(found.lens, found.median)]
    image, source = on_cut(found, field), found.source.extent
    theirs = Grid(field.source.shape, field.fine).extent
    maps = found.maps
    mean, std = per * maps["source_mean"], per * maps["source_std"]
    arcs = {"norm": stretched(maps["data"], 2 * field.scatter), "cmap": "magma"}
    bright = {"norm": stretched(mean, 0.02 * float(mean.max())), "cmap": "magma"}
    panels = [
        ("Data", maps["data"], image, arcs),
        ("Model, mean of draws", maps["model"], image, arcs),
        ("Residual over the scatter", maps["residual"] * field.inflation, image, RESIDUAL),
        ("Source, mean", mean, source, bright),
        ("Source, std", std, source, {"norm": stretched(std, 0.0), "cmap": "viridis"}),
        ("Source, PyAutoLens", field.source, theirs, bright),
    ]
    for i, x in enumerate(found.joint.samples.x[:4, 0]):
        panels.append((f"Source, draw {i + 1}", per * x.numpy(), source, bright))
    figure = new_figure(19, 9.3)
    axes = figure.subplots(2, 5, gridspec_kw=LAYOUT).flat
    for ax, (name, values, extent, how) in zip(axes, panels, strict=True):
        shown = ax.imshow(values, origin="lower", extent=extent, interpolation="nearest", **how)
        ax.set_facecolor("#d9d9de")
        ax.set_title(name, fontsize=12, color=INK, loc="left")
        ax.tick_params(labelsize=8.5, colors=MUTED)
        lines, window = (curves, image) if extent is image else (caustics, source)
        for line in lines:
            ax.plot(line[:, 0], line[:, 1], color="#5fd3ff", linewidth=0.8)
        ax.set_xlim(window[:2])
        ax.set_ylim(window[2:])
        ticks = [-4, -2, 0, 2, 4] if how is RESIDUAL else None
        colour_bar(figure, ax, shown, "", ticks, below=0.12)
    figure.text(0.03, 0.955, title, fontsize=16, color=INK, weight="bold")
    figure.text(0.3, 0.955, AXES, fontsize=11, color=MUTED)
    write(figure, path, dpi=75)


def main() -> None:
    parser = parser_of("COSMOS-Web lenses", "cosmos-web", restarts=4)
    parser.add_argument("--lens", nargs="+", choices=LENSES, default=list(LENSES), metavar="NAME")
    parser.add_argument("--bands", nargs="+", default=["F150W"], metavar="BAND")
    parser.add_argument("--steps", type=int, default=32, help="of a source draw")
    arguments = parser.parse_args()
    for name in arguments.lens:
        before = None
        for band in arguments.bands:
            target, folder = LENSES[name], arguments.out / f"{name}-{band}".lower()
            try:
                field = load(name, band)
            except DatasetUnavailable as error:
                raise SystemExit(f"{name} in {band}: {error}") from None
            if not (folder / "run.json").exists():
                part = cut(field, target.radii[1])
                run(
                    arguments,
                    folder,
                    f"{name}, {band}",
                    field.data[part],
                    field.psf,
                    field.noise[part],
                    model_of(target, field.pixel, before),
                    sampler=dp.DPMSolver(arguments.steps, eta=1.0),
                    mask=field.masked[part].astype(float),
                    psf_background=0.0,
                    recentre_psf=False,  # theirs is not, and centres are to be compared
                )
            found = read_found(folder)
            before = before or found
            cells = row(name, band, arguments.prior, found, field)
            print("\n".join(f"{k}: {v}" for k, v in cells.items()), "\n")
            picture(arguments.out / f"lens-{folder.name}.png", f"{name}, {band}", found, field)


if __name__ == "__main__":
    main()
