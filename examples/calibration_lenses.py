"""Are joint posteriors of a lens and its source calibrated?  Simulated lenses, sampled in turns of source and lens.

    python examples/calibration_lenses.py --out runs/lenses [--simulations 208]     # goes on where it stopped
    python examples/calibration_lenses.py --out runs/lenses --table                 # of the batches that are there

A source of `galaxies-32` (32 pixels of 0.06 arcsec) is seen through an isothermal ellipsoid in external shear, whose
seven parameters are drawn from their priors, on 64 pixels of 0.08 arcsec behind a PSF of one pixel, with noise of a
twentieth of what the prior calls 1. Two chains of `sample_blocked` a lens begin at the true lens, which is a draw of the
posterior itself: a sampler that is right stays there, one that is not leaves within the sweeps that are dropped. (With
the source known the lens is known up to 2.5 times better than without it, so that a sweep forgets a sixth or more.)
Draws are `--thin` sweeps apart. The table gives the ranks of the truth (SBC) and the coverage of all parameters with the
source's flux (TARP), about a reference point that the data give: the centroid and the mean radius of their light.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import caustics
import numpy as np
import torch
from torch import Tensor

import diffpost as dp
from diffpost.diagnostics import coverage, sbc
from diffpost.parameters import (
    Circular,
    Normal,
    ParameterPrior,
    ParametricLikelihood,
    Uniform,
    sample_blocked,
)
from diffpost.physics import Grid, Lens, LensFamily
from diffpost.random import normal
from diffpost.samplers import DPMSolver

BATCH, CHAINS, NOISE = 16, 2, 0.05
IMAGE, SOURCE = Grid(64, pixel=0.08), Grid(32, pixel=0.06)
PRIOR = ParameterPrior(
    {
        "main.x0": Normal(0.0, 0.08),
        "main.y0": Normal(0.0, 0.08),
        "main.q": Uniform(0.5, 0.95),
        "main.phi": Circular(math.pi),
        "main.Rein": Normal(1.3, 0.1),
        "shear.gamma_1": Normal(0.0, 0.04),
        "shear.gamma_2": Normal(0.0, 0.04),
    }
)
NAMES = ("θ_E", "e_1", "e_2", "shear_1", "shear_2", "x_0", "y_0", "log flux of the source")


def family() -> LensFamily:
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    parts = [
        caustics.SIE(cosmology, name="main"),
        caustics.ExternalShear(cosmology, name="shear", x0=0.0, y0=0.0),
    ]
    lens = Lens(caustics.SinglePlane(cosmology, parts, name="mass"), IMAGE, SOURCE)
    offsets = torch.arange(7, dtype=torch.float64) - 3
    psf = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 2)
    return LensFamily(lens, dp.Convolve(psf / psf.sum()))


def numbers(theta: Tensor, flux: Tensor) -> Tensor:
    """What is compared, in the order of NAMES: theta (..., 7) and flux (...) to (..., 8)."""
    x0, y0, q, phi, radius, first, second = theta.unbind(-1)
    e = (1 - q) / (1 + q)
    shape = (e * torch.cos(2 * phi), e * torch.sin(2 * phi))
    return torch.stack([radius, *shape, first, second, x0, y0, flux.log()], -1)


def reference(y: Tensor) -> Tensor:
    """(x_0, y_0, θ_E) that the light of data (n, 1, H, W) suggests: its centroid and its mean distance from there."""
    x_axis, y_axis = (a.double() for a in IMAGE.coordinates())
    light = torch.where(y > 3 * NOISE, y, 0.0)[:, 0]
    total = light.sum((1, 2)).clamp_min(1e-9)
    x = (light * x_axis).sum((1, 2)) / total
    y0 = (light * y_axis).sum((1, 2)) / total
    radius = torch.hypot(x_axis - x[:, None, None], y_axis - y0[:, None, None])
    return torch.stack([x, y0, (light * radius).sum((1, 2)) / total], -1)


def run_batch(number: int, prior: dp.ScoreModel, options: argparse.Namespace) -> dict[str, Tensor]:
    """Truths and draws of the lenses of one batch, in the order of NAMES."""
    lenses = family()
    seed = 1000 * number
    ids = torch.arange(BATCH)
    source = dp.sample(prior, BATCH, DPMSolver(256, eta=1.0), seed=seed, progress=False).x.double()
    theta = PRIOR.sample(BATCH, seed=seed + 1)
    clean = lenses.apply(PRIOR.values(theta), source)
    y = clean + NOISE * normal(seed + 2, ids, 0, tuple(clean.shape[1:]), torch.float64)
    likelihood = ParametricLikelihood(
        y.repeat_interleave(CHAINS, 0), lenses, dp.GaussianNoise(std=NOISE)
    )
    draws = sample_blocked(
        likelihood,
        PRIOR,
        prior,
        theta.repeat_interleave(CHAINS, 0),
        sweeps=options.sweeps,
        warmup=options.warmup,
        thin=options.thin,
        group=CHAINS,
        sampler=DPMSolver(options.steps, eta=1.0),
        seed=seed + 3,
        checkpoint=options.out / f"chains-{number:03d}",
    )
    samples = draws.samples
    if samples is None:
        raise RuntimeError("the sources were not kept")
    flux = samples.x.double().sum((1, 2, 3)).clamp_min(1e-6)
    kept = numbers(samples.extras["theta"], flux).reshape(BATCH, -1, len(NAMES))
    true_flux = source.sum((1, 2, 3)).clamp_min(1e-6)
    misfit = []
    for part in torch.arange(len(samples.x)).split(64):
        residual = likelihood.select(samples.extras["chain"][part]).residual(
            PRIOR.values(samples.extras["theta"][part]), samples.x[part].double()
        )
        misfit.append((residual / NOISE).square().mean((1, 2, 3)))
    return {
        "truth": numbers(theta, true_flux),
        "draws": kept,
        "reference": reference(y),
        "chi2": torch.cat(misfit).reshape(BATCH, -1),
        "true_chi2": ((y - clean) / NOISE).square().mean((1, 2, 3)),
        "acceptance": draws.acceptance.reshape(BATCH, CHAINS),
        "nonfinite": draws.nonfinite.reshape(BATCH, CHAINS),
    }


def table(out: Path) -> None:
    """Prints the table of docs/lensing.md, and draws its picture if asked."""
    files = sorted(out.glob("batch-*.npz"))
    parts = [dict(np.load(path)) for path in files]
    found = {name: torch.from_numpy(np.concatenate([p[name] for p in parts])) for name in parts[0]}
    truth, draws = found["truth"], found["draws"]
    ranks = sbc(draws, truth)
    scale = truth.std(0)
    points = truth.roll(1, 0).clone()  # of another lens, but for what the data suggest
    points[:, [5, 6, 0]] = found["reference"]
    curve = coverage(draws / scale, truth / scale, points / scale)
    error = draws.mean(1) - truth
    pull = error / draws.std(1)
    # the mean of n draws is off by 1/n of their variance more
    claimed = ((1 + 1 / draws.shape[1]) * draws.var(1)).mean(0).sqrt()
    print(f"{len(truth)} lenses, {draws.shape[1]} draws of each")
    print("| | SBC p | mean offset, σ | error / claimed | median error bar |")
    print("|---|---|---|---|---|")
    for i, name in enumerate(NAMES):
        ratio = float(error[:, i].square().mean().sqrt() / claimed[i])
        offset, scatter = float(pull[:, i].mean()), float(pull[:, i].std()) / math.sqrt(len(pull))
        print(
            f"| {name} | {float(ranks.p_value[i]):.2g} | {offset:+.2f} ± {scatter:.2f} | {ratio:.2f} | "
            f"{float(draws.std(1)[:, i].median()):.4f} |"
        )
    print(f"TARP p = {float(curve.p_value):.2g}")
    print(
        f"reduced chi2: truths {float(found['true_chi2'].mean()):.4f}, draws {float(found['chi2'].mean()):.4f}; "
        f"acceptance {float(found['acceptance'].mean()):.2f}, failed moves {int(found['nonfinite'].sum())}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulations", type=int, default=208)
    parser.add_argument("--sweeps", type=int, default=24)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--thin", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24, help="noise levels of a source draw")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    if not options.table:
        prior = dp.load_prior("galaxies-32")
        options.out.mkdir(parents=True, exist_ok=True)
        for number in range(math.ceil(options.simulations / BATCH)):
            path = options.out / f"batch-{number:03d}.npz"
            if path.exists():
                continue
            found = {k: v.numpy() for k, v in run_batch(number, prior, options).items()}
            partial = path.with_suffix(".partial.npz")
            np.savez(partial, **found)
            partial.replace(path)
            print(path, flush=True)
    table(options.out)


if __name__ == "__main__":
    main()
