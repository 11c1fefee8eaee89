"""Lens and source of SPT0346-52 together, from ALMA's visibilities at 140 GHz, without an image in between.

    python examples/spt0346_lens.py [--prior galaxies-32] [--turns 30] [--samples 12] [--out spt0346-lens] [--picture FILE]

Data as in examples/spt0346.py. An isothermal ellipsoid in external shear before the baselines:

    V = Visibilities(lens(source; theta)) + n,

the visibilities by their sufficient statistic (`diffpost.physics.compress`), which is exact. First chains see a Gaussian of
sources, then source and lens take turns under the prior itself, as in `diffpost lens --turns`. Beside it stands the fit of
the same lens to ALMA's data at 345 GHz by visilens' authors (Hezaveh et al. 2013, ApJ 767, 132), as their examples give it.
The search for the mode begins at their ellipse, with three shears; from draws of the prior it needs many restarts.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import caustics
import torch

import diffpost as dp
from diffpost.diagnostics import chi2
from diffpost.io.datasets import fetch
from diffpost.io.uv import read_visibilities
from diffpost.jobs.lens_inference import fitted_prior, source_gaussian
from diffpost.jobs.lens_system import FLUX
from diffpost.parameters import (
    HMC,
    Circular,
    Evidence,
    JointSamples,
    LogNormal,
    Normal,
    ParameterPrior,
    ParametricLikelihood,
    Uniform,
    find_modes,
    sample_blocked,
    sample_collapsed,
)
from diffpost.parameters.collapsed import scattered
from diffpost.physics import Grid, Lens, LensFamily, Visibilities, compress
from diffpost.samplers import DPMSolver

EAST = 0.5  # arcsec of the lens from the phase centre
IMAGE = Grid(64, 0.06, centre=(-EAST, 0.0))
SOURCE = Grid(32, 0.05, centre=(-EAST + 0.1, 0.1))
LENS = {
    "main.x0": Normal(-EAST, 0.2),
    "main.y0": Normal(0.0, 0.2),
    "main.q": Uniform(0.2, 1.0),
    "main.phi": Circular(math.pi),
    "main.Rein": Uniform(0.7, 1.3),
    "shear.gamma_1": Normal(0.0, 0.1),
    "shear.gamma_2": Normal(0.0, 0.1),
}
# visilens' M = 2.811e11 Msun at z = 0.8 and 5.656 in its cosmology (WMAP9), e = 1 - q = 0.515, PA = 70.9 and shear 0.119
MIDDLE = {"main.x0": -EAST, "main.y0": 0.0, "shear.gamma_2": -0.05, FLUX: 3e-3}
BEGIN = {"main.q": 0.485, "main.phi": math.radians(70.9 + 90), "main.Rein": 0.979}
VISILENS = {"theta_E, arcsec": 0.979, "q": 0.485, "position angle, degrees": 70.9, "shear": 0.119}
FAINTEST = 1e-8  # information of a mode over the largest


def visibilities() -> dp.Likelihood:
    """Of an image on the grid."""
    data = read_visibilities(fetch("spt0346-visibilities"))
    u, v, weight = (torch.from_numpy(a.copy()) for a in (data.u, data.v, data.weight))
    parts = torch.view_as_real(torch.from_numpy(data.vis.copy()))
    return dp.Likelihood(parts, Visibilities(u, v, IMAGE), dp.GaussianNoise(weight=weight[:, None]))


def lens() -> Lens:
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    mass = [
        caustics.SIE(cosmology, name="main"),
        caustics.ExternalShear(cosmology, name="shear", x0=0.0, y0=0.0),
    ]
    return Lens(caustics.SinglePlane(cosmology, mass, name="mass"), IMAGE, SOURCE)


def quantities(joint: JointSamples) -> dict[str, torch.Tensor]:
    """What is compared, of every draw."""
    draws = dict(zip(joint.names, joint.flat.T, strict=True))
    return {
        "theta_E, arcsec": draws["main.Rein"],
        "q": draws["main.q"],
        # x is west and y is north
        "position angle, degrees": (draws["main.phi"].rad2deg() - 90) % 180,
        "shear": torch.hypot(draws["shear.gamma_1"], draws["shear.gamma_2"]),
    }


def report(title: str, joint: JointSamples) -> None:
    print(
        f"{title}: R-hat {float(joint.rhat.max()):.3f}, effective size {float(joint.ess.min()):.0f}"
    )
    for name, values in quantities(joint).items():
        low, middle, high = torch.quantile(
            values, torch.tensor([0.16, 0.5, 0.84]).double()
        ).tolist()
        print(
            f"| {name} | {middle:.3f} +{high - middle:.3f} −{middle - low:.3f} | {VISILENS[name]} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("spt0346-lens"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    full = visibilities()
    small = compress(full, rtol=FAINTEST)
    print(f"{2 * len(full.y)} numbers of visibilities in {small.operator!r}")
    family = LensFamily(lens(), small.operator)
    likelihood = ParametricLikelihood(small.y.reshape(-1), family, small.noise)
    prior = dp.load_prior(options.prior)
    stand_in = source_gaussian(prior, SOURCE.shape[0], 0)
    free = ParameterPrior({**LENS, FLUX: LogNormal(3e-3, 1.0)})
    evidence = Evidence(likelihood, free, stand_in.gaussian, amplitude=FLUX)
    options.out.mkdir(parents=True, exist_ok=True)
    places = [{**MIDDLE, **BEGIN, "shear.gamma_1": 0.1 * a} for a in (-1, 0, 1)]
    theta = torch.tensor([[place[n] for n in free.names] for place in places], dtype=torch.float64)
    modes = find_modes(evidence, free.unconstrain(theta), adam=60, bfgs=30)
    print(
        f"log densities of the modes: {[round(v, 1) for v in modes.log_prob.tolist()]}", flush=True
    )
    start = scattered(evidence, modes.z[:1].expand(4, -1), modes.covariance, seed=0)
    first = sample_collapsed(
        evidence,
        HMC(options.draws, 40, leapfrogs=3, covariance=modes.covariance),
        chains=4,
        start=free.constrain(start),
        images=0,
        checkpoint=options.out / "evidence",
    )
    report("Gaussian of sources", first)
    scaled, told = fitted_prior(prior, SOURCE.shape[0], evidence, first, stand_in)
    print(f"1 of the prior is {told['factor']:.3g} Jy per source pixel")
    of_lens = ParameterPrior(dict(LENS))
    begin = first.flat[torch.linspace(0, len(first) - 1, options.samples).round().long()]
    joint = sample_blocked(
        likelihood,
        of_lens,
        scaled,
        begin[:, [first.names.index(n) for n in of_lens.names]],
        sweeps=options.turns,
        warmup=max(5, options.turns // 2),
        sampler=DPMSolver(32, eta=1.0),
        seed=1,
        checkpoint=options.out / "turns",
    )
    report("under the prior", joint)
    joint.save(options.out / "joint.zarr", overwrite=True)
    samples = joint.samples
    if samples is None:
        raise RuntimeError("the sources were not kept")
    theta = samples.extras["theta"]
    images = []
    with torch.no_grad():
        for part in torch.arange(len(theta)).split(32):
            bare = LensFamily(family.lens)
            images.append(bare.apply(of_lens.values(theta[part]), samples.x[part].double()))
    image = torch.cat(images)
    fit = chi2(dp.Samples(image), full).reduced
    flux, lensed = (v.double().flatten(1).sum(1) for v in (samples.x, image))
    print(
        f"reduced chi2 of a draw {float(fit.mean()):.4f}, expected 1 ± {math.sqrt(2 / full.ndata):.4f}"
    )
    for name, values, unit in (
        ("flux of the source", 1e3 * flux, "mJy"),
        ("flux of the image", 1e3 * lensed, "mJy"),
        ("magnification", lensed / flux, ""),
    ):
        print(f"{name} {float(values.mean()):.3g} ± {float(values.std()):.2g} {unit}")
    if options.picture is not None:
        middle = joint.flat.median(0).values
        dp.plot.lens(
            family.lens,
            params=middle,
            image=image.mean(0),
            source=samples.x.double().mean(0),
            path=options.picture,
            title="SPT0346-52, ALMA 140 GHz: means of image and source",
        )


if __name__ == "__main__":
    main()
