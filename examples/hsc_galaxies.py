"""Deconvolves galaxies of a ground-based image (HSC) one by one and compares them with HST's image.

    python examples/hsc_galaxies.py [--prior galaxies-64] [--samples 8] [--keep FOLDER]

Prints the tables of docs/deconvolution.md and draws its picture.  The data are fetched by name: a field of
COSMOS from scarlet's tests, HSC i band (0.168" pixels, seeing 0.56") and HST ACS F814W (0.03").

Rules, the same for every method:
* Estimates have pixels of 0.168"/3.  Richardson-Lucy and Wiener (scikit-image) get the data interpolated
  there by cubic splines and the PSF, pixel included, at that sampling; diffpost gets the data as they are.
* The offset between the frames, an error of their coordinates, comes from HST's image blurred by HSC's PSF
  against HSC's data, before any deconvolution.
* An estimate is blurred by HST's PSF, and it and HST's image by a Gaussian of FWHM 0.15" (and 0.3"), which
  tames the noise of HST's pixels; they are compared on HST's pixels in the galaxy's segment of HST's image.
* One factor per estimate, by least squares in the segment, matches the fluxes.
* Richardson-Lucy's iterations and Wiener's balance are the best for each galaxy, chosen by the HST image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from astropy.stats import mad_std
from astropy.wcs import WCS
from numpy.typing import NDArray
from photutils.segmentation import detect_sources
from scipy.ndimage import binary_dilation, gaussian_filter, map_coordinates
from scipy.optimize import least_squares
from scipy.signal import fftconvolve
from skimage.restoration import richardson_lucy, wiener

from diffpost.deconvolve import DeconvolutionResult, deconvolve
from diffpost.io.checkpoints import load_prior
from diffpost.io.datasets import fetch
from diffpost.io.fits import FitsImage, read_image
from diffpost.jobs.problem import prepare
from diffpost.jobs.psf import centroid, prepare_psf
from diffpost.jobs.setup import set_up
from diffpost.score import ScoreModel

Array = NDArray[np.float64]

BAND = 2  # i of grizy, the one nearest to F814W
FINER = 3  # pixels of the estimates per HSC pixel
SIZE = 31  # HSC pixels, as many as the PSF has
TARGETS = {"A": (32, 22), "B": (28, 34), "C": (10, 21)}  # (x, y) in HSC pixels from 0
ITERATIONS = (30, 100, 200, 400, 800, 1600)
BALANCES = tuple(float(b) for b in np.logspace(-5, -1, 17))
MARGIN = 4  # HSC pixels that the model reaches beyond the cutout
PAD = 8  # HSC pixels by which the field is mirrored for Richardson-Lucy and Wiener


@dataclass(frozen=True)
class Field:
    """Both images and how their pixels correspond.

    seen: HSC without its sky; truth: HST; hsc_psf as measured; hst_psf centred, sum 1.
    at: (2, h, w) HSC coordinates (y, x) of HST's pixels; offset: (x, y) between the frames in HSC pixels.
    """

    hsc: FitsImage
    seen: Array
    truth: Array
    hsc_psf: FitsImage
    hst_psf: Array
    at: Array
    offset: tuple[float, float]
    pixel: float

    def through_hst(self, estimate: Array, top: float, left: float) -> Array:
        """An image of fine pixels, the first in HSC pixel (top, left), on HST's pixels through its PSF."""
        corner = np.array([top, left])[:, None, None]
        # Pixel i of HSC holds the fine pixels 3 i to 3 i + 2.
        at = (self.at - corner) * FINER + (FINER - 1) / 2
        return fftconvolve(map_coordinates(estimate, at, order=3), self.hst_psf, mode="same")


def sampled(psf: Array, finer: float) -> Array:
    """A PSF with its pixel, sampled finer by quintic splines around its centroid; sum 1."""
    centre = centroid(psf)
    reach = int((min(psf.shape) // 2 - 1) * finer)
    steps = np.arange(-reach, reach + 1) / finer
    y, x = np.meshgrid(steps + centre[0], steps + centre[1], indexing="ij")
    out: Array = map_coordinates(psf, [y, x], order=5)
    return out / out.sum()


def segments(truth: Array) -> NDArray[np.int_]:
    """Sources of the HST image: 4 sigma in the image smoothed by a Gaussian of 0.1" (rms)."""
    smooth = gaussian_filter(truth, 3.3)
    found = detect_sources(smooth, 4 * mad_std(smooth), n_pixels=60)
    return np.zeros(truth.shape, dtype=int) if found is None else np.asarray(found.data)


def blank(truth: Array) -> NDArray[np.bool_]:
    return np.asarray(~binary_dilation(segments(truth) > 0, iterations=15))


def read_field() -> Field:
    """Fetch and align the two images."""
    hsc = read_image(fetch("hsc-image"), plane=BAND)
    hsc_psf = read_image(fetch("hsc-psf"), plane=BAND)
    hst = read_image(fetch("hst-image"))
    hst_psf = prepare_psf(read_image(fetch("hst-psf")).data).kernel
    truth = hst.data - np.median(hst.data)
    truth = truth - np.median(truth[blank(truth)])
    here, there = WCS(hsc.header), WCS(hst.header)
    y, x = np.mgrid[: truth.shape[0], : truth.shape[1]]
    x0, y0 = here.world_to_pixel_values(*there.pixel_to_world_values(x, y))
    y, x = np.mgrid[: hsc.data.shape[0], : hsc.data.shape[1]]
    x1, y1 = there.world_to_pixel_values(*here.pixel_to_world_values(x, y))
    finer = float(hsc.pixel_scale or 1) / float(hst.pixel_scale or 1)
    blurred = fftconvolve(truth, sampled(hsc_psf.data, finer), mode="same")
    inside = (np.minimum(x1, y1) > 15) & (np.maximum(x1, y1) < min(truth.shape) - 16)

    def residual(shift: Array) -> Array:
        model = map_coordinates(blurred, [y1 + shift[0], x1 + shift[1]], order=3)[inside]
        columns = np.stack([model, np.ones_like(model)], axis=1)
        best, *_ = np.linalg.lstsq(columns, hsc.data[inside], rcond=None)
        return np.asarray(columns @ best - hsc.data[inside])

    dy, dx = least_squares(residual, [0.0, 0.0]).x / finer
    seen = hsc.data - prepare(hsc, hsc_psf, background="constant").background
    at = np.stack([y0 - dy, x0 - dx])
    return Field(
        hsc, seen, truth, hsc_psf, hst_psf, at, (float(dx), float(dy)), float(hst.pixel_scale or 1)
    )


def aperture(field: Field, name: str) -> NDArray[np.bool_]:
    """The segment of a target, grown by 3 HST pixels, without its neighbours'."""
    labels = segments(field.truth)
    x, y = TARGETS[name]
    distance = np.hypot(field.at[0] - y, field.at[1] - x)
    label = labels[labels > 0][np.argmin(distance[labels > 0])]
    grown = binary_dilation(labels == label, iterations=3)
    return np.asarray(grown & ((labels == label) | (labels == 0)))


@dataclass(frozen=True)
class Score:
    """Agreement with HST: RMS error over the rms of the truth, correlation, PSNR in dB; flux factor."""

    error: float
    correlation: float
    psnr: float
    factor: float


def compare(image: Array, truth: Array, where: NDArray[np.bool_]) -> Score:
    m, t = image[where], truth[where]
    factor = float(m @ t / (m @ m))
    rms = float(np.sqrt(np.mean((factor * m - t) ** 2)))
    return Score(
        rms / float(np.sqrt(np.mean(t**2))),
        float(np.corrcoef(m, t)[0, 1]),
        20 * float(np.log10(t.max() / rms)),
        factor,
    )


def classical(field: Field) -> Array:
    """The interpolated data, Richardson-Lucy and Wiener with every setting, on HST's pixels."""
    wide = np.pad(field.seen, PAD, mode="reflect")
    steps = [(np.arange(n * FINER) - (FINER - 1) / 2) / FINER for n in wide.shape]
    fine = map_coordinates(wide, np.meshgrid(*steps, indexing="ij"), order=3, mode="nearest")
    psf = sampled(field.hsc_psf.data, FINER)
    positive = np.clip(fine, 1e-6, None)
    images = [fine]
    images += [richardson_lucy(positive, psf, num_iter=n, clip=False) for n in ITERATIONS]
    images += [wiener(fine, psf, balance, clip=False) for balance in BALANCES]
    return np.stack([field.through_hst(image, -PAD, -PAD) for image in images])


def inferred(
    field: Field,
    name: str,
    prior: ScoreModel,
    inflate: float = 1.0,
    factor: float = 1.0,
    **sampling: Any,
) -> DeconvolutionResult:
    """The posterior of a target; inflate: of the blank sky's scatter; factor: of the prior's flux scale."""
    x, y = TARGETS[name]
    common = {
        "cutout": (float(x), float(y), SIZE),
        "oversample": FINER,
        "background": "constant",
        "keep_neighbours": True,
    }
    measured = set_up(prepare(field.hsc, field.hsc_psf, **common), prior, MARGIN).problem
    # The job's own noise is 1.3 times more, for the correlation of adjacent pixels, which adds power
    # on large scales; small scales decide here.
    return deconvolve(
        field.hsc,
        field.hsc_psf,
        inflate * measured.report["noise"]["sky_std"],
        prior=prior,
        batch_size=4,
        progress=False,
        margin=MARGIN,
        scale=factor * measured.scale,
        **common,
        **sampling,
    )


def draws(field: Field, name: str, args: argparse.Namespace, factor: float = 1.0) -> Array:
    """(n, h, w) posterior draws on HST's pixels; factor: of the prior's flux scale."""
    sampling = {"samples": args.samples, "seed": args.seed}
    result = inferred(field, name, load_prior(args.prior), args.inflate, factor, **sampling)
    chi2, flux = result.metrics["reduced_chi2"], result.metrics["flux"]
    scale, noise = result.problem.scale / factor, result.problem.report["noise"]["std"]
    print(
        f"{name}: scale {factor:g} x {scale:.3g}, noise {noise:.3g}, reduced chi2 of a draw "
        f"{chi2['draws']:.3f} +- {chi2['expected_std']:.3f}, flux {flux['mean']:.1f} +- {flux['std']:.1f}, "
        f"{result.timings['sample']:.0f} s"
    )
    corner = np.array(result.problem.corner[::-1]) - (
        np.array([result.grid.top, result.grid.left]) / FINER
    )
    images = result.samples.x[:, 0].double().numpy()
    return np.stack([field.through_hst(image, *corner) for image in images])


def cached(folder: Path | None, name: str, make: Callable[[], Array]) -> Array:
    path = None if folder is None else folder / f"{name}.npy"
    if path is not None and path.exists():
        return np.asarray(np.load(path))
    made = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, made)
    return made


def row(name: str, method: str, score: Score, note: str = "") -> None:
    print(
        f"| {name} | {method} | {score.error:.3f} | {score.correlation:.4f} | {score.psnr:.1f} | {note} |"
    )


def judge(
    field: Field, name: str, others: Array, posterior: Array, fwhm: float
) -> dict[str, Array]:
    """Print the rows of a target; its images, in HST's flux, for the picture."""
    width = fwhm / 2.3548 / field.pixel
    where = aperture(field, name)

    def soft(image: Array) -> Array:
        return np.asarray(gaussian_filter(image, width))

    truth = soft(field.truth)
    noise = float(mad_std(truth[blank(field.truth)]))
    shown = {}
    k = 1 + len(ITERATIONS)
    groups = [
        ("HSC data, interpolated", others[:1], [""]),
        ("Richardson-Lucy, best", others[1:k], [f"{n} iterations" for n in ITERATIONS]),
        ("Wiener, best", others[k:], [f"balance {b:.2g}" for b in BALANCES]),
    ]
    for method, images, notes in groups:
        scores = [compare(soft(image), truth, where) for image in images]
        best = int(np.argmin([s.error for s in scores]))
        row(name, method, scores[best], notes[best])
        if method.startswith("Richardson"):
            row(name, "Richardson-Lucy", scores[1], notes[1])
        shown[method] = scores[best].factor * soft(images[best])
    smooth = np.stack([soft(image) for image in posterior])
    mean, std = smooth.mean(0), smooth.std(0, ddof=1)
    score = compare(mean, truth, where)
    row(name, "diffpost, posterior mean", score, f"{len(posterior)} draws")
    each = [compare(image, truth, where) for image in smooth]
    averages = np.mean([[s.error, s.correlation, s.psnr, s.factor] for s in each], axis=0)
    row(name, "diffpost, single draws", Score(*averages.tolist()), "average")
    # The mean of n draws scatters too.
    spread = score.factor * std * (1 + 1 / len(posterior)) ** 0.5
    z = np.abs(truth - score.factor * mean)[where] / np.hypot(spread, noise)[where]
    floor = noise / float(np.sqrt(np.mean(truth[where] ** 2)))
    print(
        f"<!-- {name}: HST noise {floor:.3f}; within 1 and 2 sigma {np.mean(z < 1):.2f}, "
        f"{np.mean(z < 2):.2f} -->"
    )
    return shown | {
        "posterior mean": score.factor * mean,
        "posterior std": score.factor * std,
        "one draw": score.factor * smooth[0],
        "HST": truth,
    }


def picture(field: Field, images: dict[str, dict[str, Array]], path: Path) -> None:
    titles = list(next(iter(images.values())))
    figure, axes = plt.subplots(
        len(images),
        len(titles),
        figsize=(1.9 * len(titles), 2.05 * len(images)),
        squeeze=False,
        layout="constrained",
    )
    for k, (axis_row, (name, row_images)) in enumerate(zip(axes, images.items(), strict=True)):
        y, x = (int(v) for v in np.mean(np.nonzero(aperture(field, name)), axis=1))
        side = min(45, x, y)
        window = np.s_[y - side : y + side, x - side : x + side]
        peak = float(row_images["HST"][window].max())
        for axis, title in zip(axis_row, titles, strict=True):
            # The same asinh stretch in a row; the standard deviation is shown ten times brighter.
            gain = 10.0 if title == "posterior std" else 1.0
            shown = np.arcsinh(gain * row_images[title][window] / (0.05 * peak))
            axis.imshow(
                shown, origin="lower", cmap="magma", vmin=-0.5, vmax=float(np.arcsinh(20.0))
            )
            axis.set_xticks([])
            axis.set_yticks([])
            if k == 0:
                axis.set_title(title + (" x 10" if gain > 1 else ""), fontsize=8)
        axis_row[0].set_ylabel(name)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prior", default="galaxies-64")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--inflate", type=float, default=1.0, help="of the noise measured on the sky"
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--scales", type=float, nargs="*", default=[0.5, 2.0])
    parser.add_argument("--out", type=Path, default=Path("docs/images/hsc-to-hst.png"))
    parser.add_argument("--keep", type=Path, help="folder of finished parts, used when it has them")
    args = parser.parse_args()
    field = read_field()
    print(f"offset of the frames: {np.round(field.offset, 3).tolist()} HSC pixels (x, y)")
    others = cached(args.keep, "classical", lambda: classical(field))
    found = {n: cached(args.keep, n, lambda n=n: draws(field, n, args)) for n in args.targets}
    for fwhm in (0.3, 0.15):
        print(f'\nGaussian of {fwhm}"\n')
        print("| galaxy | method | error | correlation | PSNR (dB) | |\n|---|---|---|---|---|---|")
        images = {n: judge(field, n, others, d, fwhm) for n, d in found.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture(field, images, args.out)
    name = args.targets[0]
    where, width = aperture(field, name), 0.15 / 2.3548 / field.pixel
    print(
        f"\nFlux scale, galaxy {name}\n\n| scale | flux in segment | mean moves by | std | error |"
    )
    print("|---|---|---|---|---|")
    smooth = {}
    for factor in (1.0, *args.scales):
        kept = name if factor == 1.0 else f"{name}-scale-{factor:g}"
        part = cached(args.keep, kept, lambda f=factor: draws(field, name, args, f))
        smooth[factor] = np.stack([gaussian_filter(d, width) for d in part])
        mean, base = smooth[factor].mean(0)[where], smooth[1.0].mean(0)[where]
        rms = float(np.sqrt(np.mean(base**2)))
        std = smooth[factor].std(0, ddof=1)[where]
        truth = gaussian_filter(field.truth, width)
        error = compare(smooth[factor].mean(0), truth, where).error
        print(
            f"| x {factor:g} | {mean.sum() / base.sum():.4f} | {np.std(mean - base) / rms:.3f} | "
            f"{np.sqrt(np.mean(std**2)) / rms:.3f} | {error:.3f} |"
        )


if __name__ == "__main__":
    main()
