"""Does the misspecification alarm ring on real targets?  Through the whole job, four draws each.

    python examples/misspecification_targets.py [galaxies-64]

The demo's dwarf and spiral and the HSC galaxies of examples/hsc_galaxies.py should pass; a group of galaxies whose
neighbours are kept, and images that are no galaxies, simulated through the demo's PSF, should ring.  The HSC data come
from the registry of data sets; without them those rows are left out, and that is said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import hsc_galaxies
import numpy as np
from numpy.typing import NDArray
from scipy.signal import fftconvolve

from diffpost.data import shipped
from diffpost.deconvolve import DeconvolutionResult, deconvolve
from diffpost.io.checkpoints import load_prior
from diffpost.io.fits import read_image
from diffpost.jobs.demo import demo_target
from diffpost.jobs.psf import prepare_psf
from diffpost.score import ScoreModel

Array = NDArray[np.float64]
SIZE, NOISE = 64, 0.01  # of the simulated frames; their brightest pixel is about 1
DRAWS = {"samples": 4, "seed": 0, "progress": False}


def stars(count: int) -> Array:
    """Point sources over 1.5 decades of flux, the brightest of 20: about 1 at the peak through the PSF."""
    numbers = np.random.default_rng(15 + count)
    image = np.zeros((SIZE, SIZE))
    places = numbers.integers(6, SIZE - 6, (count, 2))
    places[0] = SIZE // 2
    flux = 20 * 10 ** (-1.5 * numbers.random(count))
    flux[0] = 20
    np.add.at(image, tuple(places.T), flux)
    return image


def ring(radius: float = 16.0, width: float = 1.5) -> Array:
    y, x = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
    image: Array = np.exp(-((np.hypot(x, y) - radius) ** 2) / (2 * width**2))
    return image


def simulated(prior: ScoreModel) -> Iterator[tuple[str, DeconvolutionResult]]:
    star = read_image(demo_target("dwarf").psf).data
    kernel = prepare_psf(star).kernel
    images = {
        "one star": stars(1),
        "field of 15 stars": stars(15),
        "ring, radius of 16 pixels": ring(),
        "noise alone": np.zeros((SIZE, SIZE)),
    }
    for i, (name, image) in enumerate(images.items()):
        z = np.random.default_rng(40 + i).standard_normal(image.shape)
        seen = fftconvolve(image, kernel, mode="same") + NOISE * z
        common: dict[str, Any] = {"background": "none", "keep_neighbours": True}
        yield name, deconvolve(seen, star, NOISE, prior=prior, **common, **DRAWS)


def demo(prior: ScoreModel) -> Iterator[tuple[str, DeconvolutionResult]]:
    for name in ("dwarf", "spiral"):
        target = demo_target(name)
        result = deconvolve(
            target.image, target.psf, target.noise, prior=prior, **target.keywords, **DRAWS
        )
        yield f"{name}, HST", result


def group(prior: ScoreModel) -> Iterator[tuple[str, DeconvolutionResult]]:
    target = demo_target("spiral")
    image = shipped("hst_petrofit") / "abell_2744_group_of_galaxies_f105w.fits.gz"
    height, width = read_image(image).data.shape
    keywords = target.keywords | {"cutout": ((width - 1) / 2, (height - 1) / 2, 80)}
    result = deconvolve(
        image, target.psf, None, prior=prior, keep_neighbours=True, **keywords, **DRAWS
    )
    yield "group of galaxies, HST, neighbours kept", result


def hsc(prior: ScoreModel) -> Iterator[tuple[str, DeconvolutionResult]]:
    try:
        field = hsc_galaxies.read_field()
    except (OSError, ValueError) as error:
        print(f"HSC left out: {error}", file=sys.stderr)
        return
    kinds = {"A": "irregular", "B": "blended with A", "C": "a chain of clumps"}
    for name in hsc_galaxies.TARGETS:
        result = hsc_galaxies.inferred(field, name, prior, samples=4, seed=0)
        yield f"{name}, HSC, {kinds[name]}", result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prior", nargs="?", default="galaxies-64", help="name or folder")
    prior = load_prior(parser.parse_args().prior)
    print("| target | should | p | largest component | reduced χ² of a draw |")
    print("|---|---|---|---|---|")
    for makers, should in (((demo, hsc), "pass"), ((group, simulated), "ring")):
        for make in makers:
            for name, result in make(prior):
                found = result.metrics["misspecification"]
                chi2 = result.metrics["reduced_chi2"]["draws"]
                p = found["p_value"]
                shown = f"{p:.3f}" if p < 0.05 else f"{p:.2f}"
                print(
                    f"| {name} | {should} | {shown} | {found['loudest']} | {chi2:.2f} |", flush=True
                )


if __name__ == "__main__":
    main()
