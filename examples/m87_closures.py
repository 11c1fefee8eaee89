"""Images M87 at 227 GHz by closure phases and log closure amplitudes alone, and measures the ring.

    python examples/m87_closures.py [--days 095 096 100 101] [--samples 12] [--prior galaxies-32] [--out m87-closures]

Closures do not change with the gains of the antennas, so that it does not matter that the EHT's public data are self-calibrated to
images with a ring (examples/m87_ring.py), but for the phases that averages in time take from it.  They know neither the total flux,
which is here that of the prior's own images, nor the place of the ring, so that a prior of galaxies puts its brightest spot in the
middle.  Scans are averaged in parts of at most five minutes that all baselines share, and 2% of each amplitude are added to the noise,
as there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from m87_ring import CELL, DATES, SIZE, SYSTEMATIC, ring
from matplotlib import pyplot as plt

import diffpost as dp
from diffpost.io.datasets import fetch
from diffpost.io.uv import read_visibilities
from diffpost.io.uv_averaging import averaged
from diffpost.physics import Closures, Grid, Visibilities, scan_numbers


def likelihood(day: str) -> dp.Likelihood:
    """Of images (1, 32, 32) in any unit, by the closures of a day's low band."""
    data = read_visibilities(fetch(f"m87-{day}-lo"))
    parts = scan_numbers(torch.from_numpy(data.time.copy()), gap=60.0, longest=300.0)
    data, _ = averaged(data, interval=parts.numpy(), radius=CELL * SIZE / 2)
    weight = 1 / (1 / data.weight + (SYSTEMATIC * np.abs(data.vis)) ** 2)
    u, v, w, time, first, second = (
        torch.from_numpy(a.copy())
        for a in (data.u, data.v, weight, data.time, data.antenna1, data.antenna2)
    )
    vis = torch.view_as_real(torch.from_numpy(data.vis.copy()))
    closures = Closures(vis, w, first, second, time)
    return closures.likelihood(Visibilities(u, v, Grid(SIZE, CELL)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", nargs="+", default=list(DATES), choices=list(DATES))
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--moves", type=int, default=60)
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--out", type=Path, default=Path("m87-closures"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    prior = dp.load_prior(arguments.prior)
    prior = prior.with_affine(1.0, 0.0)  # the prior's own unit: closures do not know the flux
    # moment matching linearises the closures; the chain's target is their likelihood itself
    sampler = dp.MALA(arguments.moves, start=dp.DPMSolver(32, eta=1.0), nsr=0.01)
    figure, panels = plt.subplots(
        2, len(arguments.days), squeeze=False, figsize=(2.6 * len(arguments.days), 5.4)
    )
    half = CELL * SIZE / 2 * 1e6
    print(
        "| day | closure phases, log amplitudes | diameter [uas]: median (16%, 84%) | scatter of the radii | chi2 of a draw |"
    )
    print("|---|---|---|---|---|")
    for column, day in enumerate(arguments.days):
        like = likelihood(day)
        draws = dp.sample(
            dp.Posterior(prior, like), n=arguments.samples, sampler=sampler, seed=0, progress=False
        )
        images = draws.x[:, 0].double().numpy()
        found = np.array([ring(image, CELL * 1e6) for image in images])
        low, middle, high = np.percentile(found[:, 0], [16, 50, 84])
        chi2 = like.chi2(draws.x.double()) / like.ndata
        closures = like.operator.outer
        print(
            f"| {DATES[day]} | {len(closures.phases)}, {len(closures.log_amplitudes)} | {middle:.1f} ({low:.1f}, {high:.1f}) | "
            f"{np.median(found[:, 2]):.2f} | "
            f"{float(chi2.mean()):.2f} ± {float(chi2.std()):.2f} |",
            flush=True,
        )
        draws.save(arguments.out / f"{day}.zarr", overwrite=True)
        for row, image, name in ((0, images.mean(0), "mean"), (1, images[0], "a draw")):
            panel = panels[row, column]
            panel.imshow(image, origin="lower", cmap="inferno", extent=(half, -half, -half, half))
            panel.set_title(f"{DATES[day]}, {name}", fontsize=9)
            panel.tick_params(labelsize=7)
            panel.set_xlabel("east [µas]", fontsize=8)
        panels[0, 0].set_ylabel("north [µas]", fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.out / "closures.png", dpi=90)


if __name__ == "__main__":
    main()
