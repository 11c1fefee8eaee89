"""The targets of `diffpost demo`: HST WFC3/IR F105W images of Abell 2744 that ship with the package.

The images come with the petrofit package (BSD-3-Clause) and were cut from the Frontier Fields mosaics
(0.06 arcsec pixels, electrons per second).  The cut-out of the spiral lost its exposure time, so the
mosaic's is taken from the header of the dwarf's.

The PSF is one star of the same field.  The camera undersamples its PSF and the mosaic is drizzled, so
a star's core is right at another place to a few per cent only: 3% of the local flux is allowed for that,
with which residuals on the galaxies are what they are on blank sky.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from diffpost.data import shipped
from diffpost.io.fits import read_image

__all__ = ["DemoTarget", "demo_target"]

_PSF_ERROR = 0.03


@final
@dataclass(frozen=True)
class DemoTarget:
    """Inputs of a deconvolution, and its title."""

    title: str
    image: Path
    psf: Path
    noise: Path | None
    keywords: dict[str, Any]


def demo_target(name: str) -> DemoTarget:
    """The inputs for "spiral" or "dwarf".

    Raises
    ------
    ValueError: another name.
    """
    folder = Path(shipped("hst_petrofit"))
    psf = folder / "f105w_psf.fits.gz"
    dwarf = folder / "abell_2744_dwarf_galaxy_f105w.fits.gz"
    if name == "spiral":
        seconds = float(read_image(dwarf).header["EXPTIME"])
        return DemoTarget(
            title="Spiral galaxy in Abell 2744, HST WFC3 F105W",
            image=folder / "abell_2744_spiral_galaxy_f105w.fits.gz",
            psf=psf,
            noise=None,
            keywords={"cutout": (76.0, 74.0, 112), "exptime": seconds, "psf_error": _PSF_ERROR},
        )
    if name == "dwarf":
        return DemoTarget(
            title="Dwarf galaxy in Abell 2744, HST WFC3 F105W",
            image=dwarf,
            psf=psf,
            noise=folder / "abell_2744_dwarf_galaxy_f105w_rms.fits.gz",
            keywords={"cutout": (99.0, 100.0, 64), "psf_error": _PSF_ERROR},
        )
    raise ValueError(f"got the target {name!r}; expected spiral or dwarf")
