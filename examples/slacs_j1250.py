"""Reconstructs SLACS J1250+0523 (HST ACS F814W) with the lens' own light in the image, and compares its lens with the published one.

    python examples/slacs_j1250.py [--prior galaxies-32] [--samples 16] [--chains 4] [--draws 100] [--out FOLDER] [--resume]

Data by name from the registry: 0.05" pixels, the light of the lens not subtracted, two companions replaced by noise, which
are masked here. Light is two Sérsic profiles about the middle of the mass, fitted together with an isothermal ellipsoid in
external shear and the source. The published model is an elliptical power law in external shear by Shajib et al. (2021,
MNRAS 503, 2380), whose mean slope is 1.92. Prints the table of docs/lensing.md and draws its picture.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from astropy.io import fits

from diffpost.io.datasets import fetch
from diffpost.jobs.lens_outputs import write_lens
from diffpost.jobs.outputs import OutputFolder
from diffpost.lens import LensResult, reconstruct_lens
from diffpost.plot.lens_summary import lens_summary

NAME = "slacs1250+0523"
GONE = 1e3  # noise above which the authors marked companions; 0 is outside of their mask
MODEL = {
    "pixel": 0.05,
    "mask": {"inner": 0.3, "outer": 2.4},
    "oversample": 1,
    "bin": 2,
    "source": {"size": 32, "pixel": 0.05},
    "mass": {
        "main": {
            "profile": "SIE",
            "x0": {"normal": [0, 0.03]},
            "y0": {"normal": [0, 0.03]},
            "q": {"uniform": [0.5, 1.0]},
            "phi": {"circular": math.pi},
            "Rein": {"uniform": [0.8, 1.5]},
        },
        "shear": {
            "profile": "ExternalShear",
            "gamma_1": {"normal": [0, 0.05]},
            "gamma_2": {"normal": [0, 0.05]},
        },
    },
    "light": {
        "bulge": {
            "profile": "Sersic",
            "centre": "main",
            "q": {"uniform": [0.5, 1.0]},
            "phi": {"circular": math.pi},
            "n": {"normal": [4, 1], "within": [1, 7]},
            "Re": {"lognormal": [0.5, 0.5]},
            "flux": {"lognormal": [1000, 1]},
        },
        "halo": {
            "profile": "Sersic",
            "centre": "main",
            "q": {"uniform": [0.5, 1.0]},
            "phi": {"circular": math.pi},
            "n": {"normal": [1, 0.5], "within": [0.4, 4]},
            "Re": {"lognormal": [2, 0.5]},
            "flux": {"lognormal": [1000, 1]},
        },
    },
}
# Shajib et al. (2021), 68% errors (plus, minus)
PUBLISHED = {
    "theta_E": (1.1192, 0.0047, 0.0032),
    "q": (0.9073, 0.0220, 0.0272),
    "shear": (0.0203, 0.0069, 0.0187),
}


def derived(result: LensResult) -> dict[str, torch.Tensor]:
    """The published quantities of every draw."""
    draws = dict(zip(result.joint.names, result.joint.flat.T, strict=True))
    return {
        "theta_E": draws["main.Rein"],
        "q": draws["main.q"],
        "shear": torch.hypot(draws["shear.gamma_1"], draws["shear.gamma_2"]),
    }


def table(result: LensResult) -> str:
    """The parameters beside the published ones, in Markdown."""
    lines = ["| | here | Shajib et al. 2021 |", "|---|---|---|"]
    for name, values in derived(result).items():
        low, middle, high = torch.quantile(
            values, torch.tensor([0.16, 0.5, 0.84]).double()
        ).tolist()
        value, plus, minus = PUBLISHED[name]
        lines.append(
            f"| {name} | {middle:.4f} +{high - middle:.4f} −{middle - low:.4f} | "
            f"{value:.4f} +{plus:.4f} −{minus:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="SLACS J1250+0523, end to end.")
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=None)
    parser.add_argument("--restarts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("slacs-j1250"))
    parser.add_argument("--resume", action="store_true", help="Go on with an interrupted run.")
    parser.add_argument("--picture", type=Path, help="Also draw the summary into this file.")
    arguments = parser.parse_args()

    folder = OutputFolder(arguments.out)
    folder.check(resume=arguments.resume)
    data, noise, psf = (fetch(f"{NAME}-{part}") for part in ("data", "noise", "psf"))
    std = fits.getdata(noise).astype(float)
    result = reconstruct_lens(
        data,
        psf,
        np.where((std > 0) & (std < GONE), std, np.inf),
        model=MODEL,
        prior=arguments.prior,
        samples=arguments.samples,
        chains=arguments.chains,
        draws=arguments.draws,
        warmup=arguments.warmup,
        restarts=arguments.restarts,
        seed=arguments.seed,
        batch_size=4,
        checkpoint=folder.start(resume=arguments.resume),
        title="SLACS J1250+0523",
        announce=print,
    )
    write_lens(folder, result)
    if arguments.picture is not None:
        lens_summary(result, arguments.picture)
    metrics = result.metrics
    chi2, mu, light = (metrics[k] for k in ("reduced_chi2", "magnification", "lens_light_flux"))
    print(table(result))
    print(f"reduced chi2 inside the mask: {chi2['draws']:.3f} (1 +- {chi2['expected_std']:.3f})")
    print(f"magnification {mu['mean']:.1f} +- {mu['std']:.1f}")
    print(f"lens light on the image grid {light['mean']:.1f} +- {light['std']:.1f} e-/s")
    print(f"R-hat {metrics['rhat']:.3f}, effective size {metrics['ess']:.0f}")
    print(f"shift under the prior itself: {metrics['shift']}")
    print(f"seconds: {result.timings}")


if __name__ == "__main__":
    main()
