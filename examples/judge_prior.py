"""Judge a trained galaxy prior against held-out galaxies.

    python examples/judge_prior.py diffpost/priors/galaxies-64 --data DATA --out docs/images

DATA is the folder that examples/prepare_galaxies.py wrote.  Draws samples of the prior, takes as many
held-out crops as its card says, and compares them: pictures side by side, the distributions of size,
concentration, ellipticity and asymmetry (two-sample Kolmogorov-Smirnov), and PQMass (Lemos et al. 2024,
arXiv:2402.04355), with the same comparison between two halves of the held-out crops as a control.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from pqm import pqm_pvalue
from scipy.stats import ks_2samp

import diffpost as dp
from diffpost.morphology import measure
from diffpost.networks.precondition import NetworkScore
from diffpost.random import normal
from diffpost.training_config import TrainConfig
from diffpost.training_data import CropStream
from diffpost.training_loss import denoising_loss


def heldout_crops(
    config: TrainConfig, data: Path, count: int, size: int, seed: int = 1
) -> torch.Tensor:
    """Crops of the held-out frames, cut as in training."""
    values = config.to_dict()
    for source in values["heldout"]:
        source["path"] = str(data / Path(source["path"]).name)
    return CropStream(TrainConfig.from_dict(values).heldout, seed=seed).batch(0, count, size)


def show(samples: np.ndarray, truth: np.ndarray, path: Path, rows: int = 5) -> None:
    """Held-out galaxies on the left, samples on the right, one asinh stretch for all."""
    figure, axes = plt.subplots(rows, 2 * rows + 1, figsize=(11, 5.5))
    for row in axes:
        for axis in row:
            axis.axis("off")
    for k in range(rows * rows):
        for images, column in ((truth, 0), (samples, rows + 1)):
            axis = axes[k // rows, column + k % rows]
            axis.imshow(
                np.arcsinh(images[k] / 0.01), cmap="gray", vmin=-1.5, vmax=5, origin="lower"
            )
    axes[0, rows // 2].set_title("held-out galaxies")
    axes[0, rows + 1 + rows // 2].set_title("samples of the prior")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.92, 0.03, 0.03)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def compare(samples: torch.Tensor, truth: torch.Tensor, path: Path) -> dict[str, float]:
    """Histograms of the four measures; returns the Kolmogorov-Smirnov p-value of each."""
    ours, theirs = measure(samples), measure(truth)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3))
    pvalues = {}
    for axis, name in zip(axes, ours, strict=True):
        a, b = (values[name][values[name].isfinite()].numpy() for values in (ours, theirs))
        pvalues[name] = float(ks_2samp(a, b).pvalue)
        bins = np.linspace(*np.percentile(np.concatenate([a, b]), [0.5, 99.5]), 25)
        axis.hist(b, bins, density=True, color="0.75", label="held-out")
        axis.hist(a, bins, density=True, histtype="step", color="C3", lw=2, label="samples")
        axis.set(xlabel=f"{name} (KS p = {pvalues[name]:.2g})", yticks=[])
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return pvalues


def pqmass(a: torch.Tensor, b: torch.Tensor, repeats: int = 20) -> float:
    """Median PQMass p-value over random tessellations; uniform in [0, 1] for equal distributions."""
    x, y = (v.flatten(1).numpy() for v in (a, b))
    return float(np.median(pqm_pvalue(x, y, num_refs=50, re_tessellation=repeats)))


def large_frames(config: TrainConfig, data: Path, zoom: float) -> CropStream:
    """The held-out frames that are large enough for crops of 128 pixels, shrunk alike and centred."""
    [large] = [s for s in config.heldout if Path(s.path).name.startswith("gz2")]
    path = str(data / Path(large.path).name)
    return CropStream((replace(large, path=path, zoom=(zoom, zoom), centred=1.0),), seed=2)


def losses_by_size(
    prior: NetworkScore, config: TrainConfig, data: Path, sizes: tuple[int, ...], count: int = 64
) -> dict[int, dict[str, float]]:
    """Held-out denoising loss by frame size and noise level, on the frames that are large enough.

    At every size the frames are shrunk alike, so a larger crop holds the same galaxy with more around it.
    A loss (1 at the start of training) that grows with the size says where the prior stops to hold.
    """
    stream = large_frames(config, data, zoom=0.7)
    numbers, table = torch.arange(count), {}
    for size in sizes:
        clean = stream.batch(0, count, size)
        noise = normal(0, numbers, 0, tuple(clean.shape[1:]))
        row = {}
        for level in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0):
            with torch.no_grad():
                parts = [
                    denoising_loss(
                        prior.net,
                        clean[part],
                        torch.full((len(part),), level, dtype=torch.float64),
                        noise[part],
                        prior.sigma_data,
                        middle=min(sizes),
                    )
                    for part in numbers.split(16)
                ]
            row[f"{level:g}"] = round(float(torch.cat(parts).mean()), 4)
        table[size] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prior", help="name or folder of a prior")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared galaxies")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--larger", type=int, nargs="*", default=[], help="sides of larger samples")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    prior = dp.load_prior(options.prior)
    config = TrainConfig.from_dict(prior.card["training"]["config"])
    size, name = prior.shape[-1], Path(options.prior).name
    truth = heldout_crops(config, options.data, options.samples, size)
    draws = dp.sample(
        prior, options.samples, dp.DPMSolver(options.steps, eta=1.0), seed=0, batch_size=64
    )
    show(draws.x[:, 0].numpy(), truth[:, 0].numpy(), options.out / f"{name}-samples.png")
    for side in options.larger:
        wide = dp.sample(
            prior.with_shape((1, side, side)), 9, dp.DPMSolver(options.steps, eta=1.0), seed=1
        )
        # Galaxies that fill the larger frame as others fill the smaller.
        frames = large_frames(config, options.data, zoom=side / 300).batch(0, 9, side)
        path = options.out / f"{name}-samples-{side}.png"
        show(wide.x[:, 0].numpy(), frames[:, 0].numpy(), path, rows=3)
    half = options.samples // 2
    verdict = {
        "prior": name,
        "images_seen": prior.card["training"]["images_seen"],
        "samples": options.samples,
        "ks_pvalues": compare(draws.x, truth, options.out / f"{name}-morphology.png"),
        "pqmass_pvalue": pqmass(draws.x, truth),
        "pqmass_pvalue_control": pqmass(truth[:half], truth[half:]),
        "heldout_loss_of_the_middle_by_size": losses_by_size(
            prior, config, options.data, (size, 3 * size // 2, 2 * size)
        ),
    }
    print(json.dumps(verdict, indent=2))


if __name__ == "__main__":
    main()
