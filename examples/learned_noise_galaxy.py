"""Two galaxies of COSMOS-Web deconvolved under learned noise and under Gaussian noise: what changes in the posterior.

    python examples/learned_noise_galaxy.py runs/f115w [--samples 16] [--moves 48] [--out FOLDER] [--image FILE.png]

The run is a folder of `diffpost train-noise` on the stamps of JWST F115W (noise-f115w) with the field COSJ095921+020638 held
out. The image is that field's, from which the model has seen nothing, with the PSF that comes with it; a bright galaxy and a
faint one near its lens are deconvolved by `diffpost.deconvolve` under

* a diagonal Gaussian of the blank sky's standard deviation,
* the job's own: the same, inflated for the correlation of adjacent pixels,
* a stationary Gaussian of the noise model's power spectrum,
* the noise model,

the last two by the same chains, so that they differ by what is not Gaussian in the noise only. Told are the flux and the
half-light radius of the draws in the cutout, mean and standard deviation, and how well the residuals fit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import diffpost as dp
from diffpost.deconvolve import DeconvolutionResult, deconvolve
from diffpost.io.datasets import fetch
from diffpost.jobs.noise_model import noise_model_of
from diffpost.jobs.target import read_scene
from diffpost.morphology import half_light_radius

FIELD = "cosj095921+020638-f115w"
TARGETS = {"bright": (83.0, 236.0, 36), "faint": (351.0, 222.0, 32)}  # x, y, size in pixels
KINDS = {
    "diagonal": "Gaussian, diagonal",
    "inflated": "Gaussian, diagonal, inflated",
    "stationary": "Gaussian, the model's power spectrum",
    "learned": "learned",
}
PIXEL = 0.03  # arcsec


def noise_options(
    kind: str, run: Path, image: NDArray[Any], at: tuple[float, float, int], moves: int
) -> dict[str, Any]:
    """The keywords of `deconvolve` for a kind of noise."""
    if kind == "inflated":
        return {}
    x, y, size = at
    scene = read_scene(image, (x, y))
    found, _ = noise_model_of(run, None, None, image - scene.background, scene.sky, [])
    if kind == "diagonal":
        return {"noise": found.own_variance**0.5}
    if kind == "learned":
        return {"noise_model": found, "moves": moves}
    shape = (1, size, size)
    power = found.surrogate(shape).spectrum(shape)
    if power is None:
        raise ValueError(f"{found!r} has no power spectrum")
    gaussian = dp.GaussianScore(torch.zeros(shape), power=power, sde=dp.EDM(1e-4, 100.0))
    return {"noise_model": dp.LearnedNoise(gaussian), "moves": moves}


def told(result: DeconvolutionResult) -> dict[str, Any]:
    """Flux and half-light radius (arcsec) of the draws over the cutout, and how well they fit."""
    images = torch.from_numpy(result.images)
    flux = images.sum((1, 2))
    size = half_light_radius(images) * PIXEL
    rows = {"flux": flux, "radius": size}
    return {
        **{name: [float(v.mean()), float(v.std())] for name, v in rows.items()},
        "mean_rms_std": float(np.sqrt((result.std**2).mean())),
        "peak_std": float(result.std.max()),
        "metrics": result.metrics,
        "seconds": result.timings["sample"],
    }


def picture(results: dict[str, Any], maps: dict[str, Any], path: Path) -> None:
    """Data, and mean and standard deviation under each noise, a row for each galaxy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(KINDS)
    figure, axes = plt.subplots(
        2 * len(TARGETS), 1 + len(kinds), figsize=(13, 5.2 * len(TARGETS)), constrained_layout=True
    )
    for i, target in enumerate(TARGETS):
        data = maps[target]["data"]
        noise = results[target]["learned"]["noise"]
        top = max(maps[target][kind]["mean"].max() for kind in kinds)
        wide = max(maps[target][kind]["std"].max() for kind in kinds)

        def asinh(values: NDArray[Any], soft: float) -> NDArray[Any]:
            return np.asarray(np.arcsinh(values / soft))

        first = axes[2 * i, 0]
        first.imshow(asinh(data, 2 * noise), origin="lower", cmap="magma")
        first.set_title(f"{target}: data", fontsize=10)
        axes[2 * i + 1, 0].axis("off")
        for j, kind in enumerate(kinds, 1):
            found = maps[target][kind]
            axes[2 * i, j].imshow(
                asinh(found["mean"], 2 * noise),
                origin="lower",
                cmap="magma",
                vmin=0,
                vmax=asinh(top, 2 * noise),
            )
            axes[2 * i, j].set_title(f"mean: {KINDS[kind]}", fontsize=8)
            axes[2 * i + 1, j].imshow(
                asinh(found["std"], noise / 4),
                origin="lower",
                cmap="viridis",
                vmin=0,
                vmax=asinh(wide, noise / 4),
            )
            flux, error = results[target][kind]["flux"]
            axes[2 * i + 1, j].set_title(
                f"standard deviation; flux {flux:.1f} ± {error:.1f}", fontsize=8
            )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the noise model's run")
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--moves", type=int, default=48)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument(
        "--only", nargs="*", metavar="TARGET/KIND", help="for example faint/learned"
    )
    parser.add_argument("--out", type=Path, default=Path("learned-noise-galaxy"))
    parser.add_argument("--image", type=Path, default=None, help="where the picture goes")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with np.load(fetch(FIELD)) as content:
        image, psf = content["data"].astype(np.float64), content["psf"].astype(np.float64)
    kept = given.out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for target, at in TARGETS.items():
        for kind in KINDS:
            if given.only and f"{target}/{kind}" not in given.only:
                continue
            if kind in results.get(target, {}):
                continue
            result = deconvolve(
                image,
                psf,
                prior=given.prior,
                samples=given.samples,
                cutout=at,
                keep_neighbours=True,
                batch_size=given.batch,
                progress=False,
                checkpoint=given.out / f"{target}-{kind}",
                **noise_options(kind, given.run, image, at, given.moves),
            )
            found = told(result) | {"noise": float(np.median(result.problem.std))}
            results.setdefault(target, {})[kind] = found
            np.savez(
                given.out / f"{target}-{kind}.npz",
                mean=result.mean,
                std=result.std,
                data=result.problem.data,
                draws=result.images,
            )
            kept.write_text(json.dumps(results, indent=1))
            print(target, kind, json.dumps(found), flush=True)
    if any(kind not in results.get(target, {}) for target in TARGETS for kind in KINDS):
        return
    maps: dict[str, Any] = {}
    for target in TARGETS:
        maps[target] = {}
        for kind in KINDS:
            with np.load(given.out / f"{target}-{kind}.npz") as content:
                maps[target][kind] = {name: content[name] for name in ("mean", "std")}
                maps[target]["data"] = content["data"]
        base = maps[target]["stationary"]
        for kind in KINDS:
            mean = maps[target][kind]["mean"]
            moved = np.sqrt(((mean - base["mean"]) ** 2).mean() / (base["std"] ** 2).mean())
            wide = np.sqrt((maps[target][kind]["std"] ** 2).mean() / (base["std"] ** 2).mean())
            print(f"{target} {kind}: mean moves by {moved:.3f} std, width {wide:.3f}")
    picture(results, maps, given.image or given.out / "learned_noise_galaxy.png")


if __name__ == "__main__":
    main()
