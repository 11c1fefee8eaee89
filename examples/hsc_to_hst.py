"""Deconvolve a ground-based image and compare it with what Hubble saw of the same field.

Subaru HSC i band (0.168 arcsec pixels, seeing 0.6 arcsec) to HST ACS F814W (0.03 arcsec): the same
galaxies, two telescopes, both PSFs known (data of the scarlet package).  The posterior mean and draws are
set beside Richardson-Lucy and Wiener deconvolution of scikit-image.  Each estimate is convolved with the
HST PSF and a little smoothing, registered (one shift; the two images' astrometry differs by 0.1 arcsec)
and scaled to the HST image, and the rms difference is given in units of the HST image's scatter.

    python examples/hsc_to_hst.py --out hsc_to_hst
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates, zoom
from scipy.ndimage import shift as shifted
from scipy.optimize import minimize
from scipy.signal import fftconvolve
from skimage.restoration import richardson_lucy, wiener

from diffpost.deconvolve import deconvolve
from diffpost.io.datasets import fetch
from diffpost.io.fits import read_image, regrid_header
from diffpost.jobs.psf import prepare_psf

Array = NDArray[np.float64]
I_BAND = 2
SMOOTH = (0.0, 0.05)  # arcsec, sigma of the Gaussian on top of HST's PSF
EDGE = 12  # HST pixels


def comparison(oversample: int) -> Callable[[Array, float], tuple[float, float]]:
    """A function (estimate, smoothing) -> (rms difference, correlation) with the HST image."""
    hsc, hst = read_image(fetch("hsc-image"), plane=I_BAND), read_image(fetch("hst-image"))
    side = hsc.data.shape[0] * oversample
    fine = hsc.pixel_scale / oversample
    kernel = prepare_psf(
        read_image(fetch("hst-psf")).data, psf_oversample=fine / hst.pixel_scale
    ).kernel
    y, x = np.mgrid[:side, :side]
    header = regrid_header(hsc.header, factor=oversample)
    sky = WCS(header, naxis=2).all_pix2world(np.stack([x.ravel(), y.ravel()], 1), 0)
    at = WCS(hst.header, naxis=2).all_world2pix(sky, 0)
    size = np.array(hst.data.shape[::-1])
    inside = np.all((at > EDGE) & (at < size - 1 - EDGE), axis=1).reshape(side, side)

    def compare(estimate: Array, smoothing: float) -> tuple[float, float]:
        truth = gaussian_filter(hst.data, smoothing / hst.pixel_scale)
        truth = map_coordinates(truth, [at[:, 1], at[:, 0]], order=3).reshape(side, side)[inside]
        seen = gaussian_filter(fftconvolve(estimate, kernel, mode="same"), smoothing / fine)

        def difference(offset: Array) -> tuple[float, float]:
            values = shifted(seen, offset, order=3)[inside]
            design = np.stack([values, np.ones_like(values)], 1)
            fit, *_ = np.linalg.lstsq(design, truth, rcond=None)
            rms = float(np.std(truth - design @ fit) / np.std(truth))
            return rms, float(np.corrcoef(values, truth)[0, 1])

        simplex = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
        best = minimize(
            lambda o: difference(o)[0],
            [0.0, 0.0],
            method="Nelder-Mead",
            options={"xatol": 0.02, "fatol": 1e-4, "initial_simplex": simplex},
        )
        return difference(best.x)

    return compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("hsc_to_hst"))
    parser.add_argument("--prior", default="galaxies-64")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--oversample", type=int, default=3)
    options = parser.parse_args()
    k = options.oversample
    result = deconvolve(
        read_image(fetch("hsc-image"), plane=I_BAND),
        read_image(fetch("hsc-psf"), plane=I_BAND),
        oversample=k,
        prior=options.prior,
        samples=options.samples,
        batch_size=4,
        keep_neighbours=True,
    )
    result.save(options.out, overwrite=True)

    # scikit-image deconvolves on one grid: the data interpolated to it, and a PSF with the pixel in it.
    data = np.nan_to_num(result.problem.data)
    up = zoom(data, k, order=3, grid_mode=True, mode="nearest") / k**2
    edge = np.ones(k) if k % 2 else np.array([0.5, *[1.0] * (k - 1), 0.5])
    kernel = fftconvolve(result.problem.psf.kernel, np.outer(edge, edge))
    kernel /= kernel.sum()
    peak = up.max()
    positive = np.clip(up / peak, 0, None)
    estimates = {"data, interpolated": up, "posterior mean": result.mean}
    for i in range(min(3, options.samples)):
        estimates[f"posterior draw {i + 1}"] = result.images[i]
    for iterations in (10, 30, 100, 200):
        sharp = richardson_lucy(positive, kernel, num_iter=iterations, clip=False)
        estimates[f"Richardson-Lucy, {iterations} iterations"] = sharp * peak
    for balance in (1e-3, 1e-2, 1e-1):
        estimates[f"Wiener, balance {balance:g}"] = (
            wiener(up / peak, kernel, balance, clip=False) * peak
        )
    compare = comparison(k)
    heading = "".join(f' rms at {s:g}" | correlation at {s:g}" |' for s in SMOOTH)
    lines = [f"| estimate |{heading}", "|---|" + "---|" * (2 * len(SMOOTH))]
    for name, estimate in estimates.items():
        cells = "".join(
            f" {rms:.3f} | {c:.3f} |" for rms, c in (compare(estimate, s) for s in SMOOTH)
        )
        lines.append(f"| {name} |{cells}")
        print(lines[-1])
    (options.out / "comparison.md").write_text("\n".join(lines) + "\n")
    print(f"table in {options.out / 'comparison.md'}")


if __name__ == "__main__":
    main()
