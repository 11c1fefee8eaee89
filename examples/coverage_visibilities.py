"""Are images from visibilities calibrated?  Simulated skies seen with the baselines and weights of SPT0346-52.

    python examples/coverage_visibilities.py --out runs/coverage [--simulations 208] [--samples 16]

Skies are drawn from `galaxies-32`, on 32 pixels of 0.12 arcsec, with total fluxes of 13 to 60 mJy (80% of them; the target has 16), and observed with
the 21,669 baselines and weights of ALMA; an interrupted run goes on. The data enter through their sufficient statistic (`diffpost.physics.compress`), whose noise is
white, so that it can be simulated directly. Draws are made as `diffpost image` makes them; the report is that of
`diffpost calibrate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import diffpost as dp
from diffpost.calibrate import calibrate
from diffpost.io.datasets import fetch
from diffpost.io.uv import read_visibilities
from diffpost.physics import Grid, Visibilities, compress

CELL, SIZE = 0.12, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulations", type=int, default=208)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--peak", type=float, default=5e-4, help="Jy/pixel that the prior calls 1")
    options = parser.parse_args()
    data = read_visibilities(fetch("spt0346-visibilities"))
    u, v = torch.from_numpy(data.u.copy()), torch.from_numpy(data.v.copy())
    weight = torch.from_numpy(data.weight.copy())[:, None]
    seen = Visibilities(u, v, Grid(SIZE, CELL))
    blank = dp.Likelihood(
        torch.zeros(seen.data_shape, dtype=torch.float64), seen, dp.GaussianNoise(weight=weight)
    )
    modes = compress(blank).operator
    prior = dp.load_prior("galaxies-32").with_affine(options.peak, 0.0)
    result = calibrate(
        prior,
        modes,
        dp.GaussianNoise(std=1.0),
        simulations=options.simulations,
        samples=options.samples,
        batch_size=256,
        controls=True,
        checkpoint=options.out.with_name(options.out.name + ".rows"),
    )
    print(f"{modes!r}, {result.simulations} skies, {options.samples} draws of each")
    for test in result.tests:
        print(f"{test.name}: p = {test.p_value:.3g}{', rejected' if test.rejected else ''}")
    print("offsets in standard deviations:", result.offsets())
    print("error over what is claimed: {:.3f} +- {:.3f}".format(*result.error_over_spread))
    print("rejected controls:", {k: any(t.rejected for t in v) for k, v in result.controls.items()})
    result.save(options.out)


if __name__ == "__main__":
    main()
