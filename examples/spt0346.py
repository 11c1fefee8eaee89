"""Images the lensed galaxy SPT0346-52 (z = 5.66) by ALMA's visibilities at 140 GHz.

    python examples/spt0346.py [--size 64] [--cell 0.06] [--prior galaxies-64] [--samples 16] [--out spt0346] [--resume]

The data are those of visilens' examples (Hezaveh et al. 2013, ApJ 767, 132; Spilker et al. 2016, ApJ 826, 112): 21,669 visibilities,
their weights set from the differences of neighbours by its author.  The image is about the lens, half an arcsecond east of the phase
centre.  Prints how well the draws fit, and writes the folder of `diffpost image`, whose summary.png is in docs/interferometry.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpost.imaging import image_visibilities
from diffpost.io.datasets import fetch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--cell", type=float, default=0.06)
    parser.add_argument("--prior", default="galaxies-64")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("spt0346"))
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    kept = arguments.out.with_name(f"{arguments.out.name}.draws")
    if kept.exists() and not arguments.resume:
        parser.error(f"{kept} holds draws of an earlier run; --resume goes on with it")
    result = image_visibilities(
        fetch("spt0346-visibilities"),
        cell=arguments.cell,
        size=arguments.size,
        center=(0.5, 0.0),
        prior=arguments.prior,
        samples=arguments.samples,
        batch_size=4,
        checkpoint=kept,
        title="SPT0346-52, ALMA 140 GHz",
    )
    for note in result.notes:
        print("·", note)
    chi2, flux, rest = (result.metrics[k] for k in ("reduced_chi2", "flux", "residual_image"))
    print(
        f"reduced chi2: {chi2['draws']:.4f} of a draw, 1 +- {chi2['expected_std']:.4f} expected, {chi2['empty_sky']:.4f} of an empty sky"
    )
    print(
        f"flux {1e3 * flux['mean']:.2f} +- {1e3 * (flux['std'] or 0):.2f} mJy; residual dirty image: rms {rest['rms']:.2f} sigma, largest {rest['largest']:.1f}"
    )
    result.save(arguments.out, overwrite=True)


if __name__ == "__main__":
    main()
