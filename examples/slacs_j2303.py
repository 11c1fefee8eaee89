"""Reconstructs SLACS J2303+1422 (HST ACS F814W, lens light subtracted) and compares its lens with the published one.

    python examples/slacs_j2303.py [--prior galaxies-32] [--samples 16] [--chains 4] [--draws 100] [--out FOLDER] [--resume]

Data by name from the registry: 0.05" pixels, as prepared by PyAutoLens' authors. The published model is an elliptical
power law in external shear by Shajib et al. (2021, MNRAS 503, 2380), whose mean slope, 2.00, is that of the isothermal
ellipsoid taken here. Prints the table of docs/lensing.md and draws its picture.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from diffpost.io.datasets import fetch
from diffpost.jobs.lens_outputs import write_lens
from diffpost.jobs.outputs import OutputFolder
from diffpost.lens import LensResult, reconstruct_lens
from diffpost.plot.lens_summary import lens_summary

NAME = "slacs2303+1422"
MODEL = {
    "pixel": 0.05,
    "mask": {"inner": 0.8, "outer": 2.3},
    "oversample": 1,
    "bin": 2,
    "source": {"size": 32, "pixel": 0.05},
    "mass": {
        "main": {
            "profile": "SIE",
            "x0": {"normal": [0, 0.05]},
            "y0": {"normal": [0, 0.05]},
            "q": {"uniform": [0.3, 1.0]},
            "phi": {"circular": math.pi},
            "Rein": {"uniform": [1.2, 2.0]},
        },
        "shear": {
            "profile": "ExternalShear",
            "gamma_1": {"normal": [0, 0.05]},
            "gamma_2": {"normal": [0, 0.05]},
        },
    },
}
# Shajib et al. (2021), 68% errors (plus, minus); the angle is that of the mass
PUBLISHED = {
    "theta_E": (1.6128, 0.0100, 0.0049),
    "q": (0.5873, 0.0290, 0.0324),
    "angle": (53.60, 1.54, 0.74),
    "shear": (0.0025, 0.0032, 0.0017),
}


def derived(result: LensResult) -> dict[str, torch.Tensor]:
    """The published quantities of every draw."""
    draws = dict(zip(result.joint.names, result.joint.flat.T, strict=True))
    shear = torch.hypot(draws["shear.gamma_1"], draws["shear.gamma_2"])
    return {
        "theta_E": draws["main.Rein"],
        "q": draws["main.q"],
        # the file has no WCS: taken from +y towards +x, the one way in which the long axis agrees with the published one
        "angle": (90 - draws["main.phi"].rad2deg()) % 180,
        "shear": shear,
    }


def table(result: LensResult) -> str:
    """The parameters beside the published ones, in Markdown."""
    lines = ["| | here | Shajib et al. 2021 |", "|---|---|---|"]
    for name, values in derived(result).items():
        low, middle, high = torch.quantile(
            values, torch.tensor([0.16, 0.5, 0.84]).double()
        ).tolist()
        value, plus, minus = PUBLISHED[name]
        digits = 1 if name == "angle" else 4
        lines.append(
            f"| {name} | {middle:.{digits}f} +{high - middle:.{digits}f} −{middle - low:.{digits}f} | "
            f"{value:.{digits}f} +{plus:.{digits}f} −{minus:.{digits}f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="SLACS J2303+1422, end to end.")
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=None)
    parser.add_argument("--restarts", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("slacs-j2303"))
    parser.add_argument("--resume", action="store_true", help="Go on with an interrupted run.")
    parser.add_argument("--picture", type=Path, help="Also draw the summary into this file.")
    arguments = parser.parse_args()

    folder = OutputFolder(arguments.out)
    folder.check(resume=arguments.resume)
    data, noise, psf = (fetch(f"{NAME}-{part}") for part in ("data", "noise", "psf"))
    result = reconstruct_lens(
        data,
        psf,
        noise,
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
        title="SLACS J2303+1422",
        announce=print,
    )
    write_lens(folder, result)
    if arguments.picture is not None:
        lens_summary(result, arguments.picture)
    chi2, mu = result.metrics["reduced_chi2"], result.metrics["magnification"]
    print(table(result))
    print(f"reduced chi2 inside the mask: {chi2['draws']:.3f} (1 +- {chi2['expected_std']:.3f})")
    print(f"magnification {mu['mean']:.1f} +- {mu['std']:.1f}")
    print(f"R-hat {result.metrics['rhat']:.3f}, effective size {result.metrics['ess']:.0f}")
    print(f"shift under the prior itself: {result.metrics['shift']}")
    print(f"seconds: {result.timings}")


if __name__ == "__main__":
    main()
