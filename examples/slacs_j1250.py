"""Reconstructs SLACS J1250+0523 (HST ACS F814W) with the lens' own light in the image, and compares its lens with the published one.

    python examples/slacs_j1250.py [--prior galaxies-32] [--samples 16] [--chains 4] [--draws 100] [--out FOLDER] [--resume]

Data by name from the registry: 0.05" pixels, the light of the lens not subtracted, two companions replaced by noise, which
are masked here. Light is two Sérsic profiles about the middle of the mass, fitted together with an isothermal ellipsoid in
external shear and the source. The published model is an elliptical power law in external shear by Shajib et al. (2021,
MNRAS 503, 2380), whose mean slope is 1.92. Prints the table of docs/lensing.md and draws its picture.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from astropy.io import fits
from slacs import arguments_of, part, reconstruct, report

from diffpost.lens import LensResult

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
# Shajib et al. (2021), 68% errors (plus, minus); the angle is that of the mass
PUBLISHED = {
    "theta_E": (1.1192, 0.0047, 0.0032),
    "q": (0.9073, 0.0220, 0.0272),
    "angle": (-59.54, 23.13, 4.38),
    "shear": (0.0203, 0.0069, 0.0187),
}


def derived(result: LensResult) -> dict[str, torch.Tensor]:
    """The published quantities of every draw."""
    draws = dict(zip(result.joint.names, result.joint.flat.T, strict=True))
    return {
        "theta_E": draws["main.Rein"],
        "q": draws["main.q"],
        # from +y towards +x, as J2303's, in -90 to 90; the file has no WCS, so how it lies on the sky is not known
        "angle": (180 - draws["main.phi"].rad2deg()) % 180 - 90,
        "shear": torch.hypot(draws["shear.gamma_1"], draws["shear.gamma_2"]),
    }


def main() -> None:
    arguments = arguments_of("SLACS J1250+0523", "slacs-j1250", restarts=12)
    std = fits.getdata(part(NAME, "noise")).astype(float)
    noise = np.where((std > 0) & (std < GONE), std, np.inf)
    result = reconstruct(arguments, "SLACS J1250+0523", NAME, MODEL, noise)
    report(result, derived(result), PUBLISHED)


if __name__ == "__main__":
    main()
