"""Reconstructs SLACS J2303+1422 (HST ACS F814W, lens light subtracted) and compares its lens with the published one.

    python examples/slacs_j2303.py [--prior galaxies-32] [--samples 16] [--chains 4] [--draws 100] [--out FOLDER] [--resume]

Data by name from the registry: 0.05" pixels, as prepared by PyAutoLens' authors. The published model is an elliptical
power law in external shear by Shajib et al. (2021, MNRAS 503, 2380), whose mean slope, 2.00, is that of the isothermal
ellipsoid taken here. Prints the table of docs/lensing.md and draws its picture.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from astropy.io import fits
from numpy.typing import NDArray
from slacs import arguments_of, part, reconstruct, report

from diffpost.lens import LensResult
from diffpost.physics import Grid

NAME = "slacs2303+1422"
MODEL = {
    "pixel": 0.05,
    "mask": {"inner": 0.8, "outer": 2.6},
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


HOLE = (-0.95, -0.8, 0.4)
"""x, y and radius in arcsec of where the light of the lens was oversubtracted, to below zero, which no source can make."""


def hole(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels of `HOLE` in an image (h, w)."""
    x, y = Grid(shape, pixel=MODEL["pixel"]).coordinates()
    inside: NDArray[np.bool_] = (torch.hypot(x - HOLE[0], y - HOLE[1]) < HOLE[2]).numpy()
    return inside


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


def main() -> None:
    arguments = arguments_of("SLACS J2303+1422", "slacs-j2303", restarts=6)
    noise = part(NAME, "noise")
    mask = hole(fits.getdata(part(NAME, "data")).shape)
    result = reconstruct(arguments, "SLACS J2303+1422", NAME, MODEL, noise, mask=mask)
    report(result, derived(result), PUBLISHED)


if __name__ == "__main__":
    main()
