"""Images M87 at 227 GHz by the EHT's self-calibrated visibilities of 2017, and measures the ring with two priors.

    python examples/m87_ring.py [--days 095 096 100 101] [--samples 16] [--prior galaxies-32] [--out m87]

The galaxy prior has never seen a ring; the Gaussian field knows a size and a smoothness only, and lets pixels be negative.  The data are those of the low band, averaged over five minutes, with 2% of each amplitude
added to the noise for what calibration left.  They are self-calibrated to images of the SMILI pipeline, so that their phases and
amplitudes are not independent of a ring: what is measured is how far image and prior move it, not whether there is one.

The ring is measured as in EHT Paper IV (2019, ApJL 875, L4, section 9): about the centre from which the peaks of 180 radial cuts
have the least spread, the diameter is twice their mean radius.  Published, from April 5 to 11: 42 +- 3 uas.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import map_coordinates
from scipy.optimize import minimize

import diffpost as dp
from diffpost.imaging import ImagingResult, set_up_imaging, solve_imaging
from diffpost.io.datasets import fetch
from diffpost.jobs.imaging import ImagingProblem, prepare_imaging

CELL, SIZE = 4e-6, 32  # arcsec, pixels
AVERAGE, SYSTEMATIC = (300.0, 1), 0.02
DATES = {"095": "April 5", "096": "April 6", "100": "April 10", "101": "April 11"}


def ring(image: np.ndarray, pixel: float) -> tuple[float, float, float]:
    """Diameter, in the unit of pixel, position angle (degrees east of north) of the brighter side, and the relative scatter of
    the peaks' radii.
    """
    n = image.shape[0]
    angles = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    radii = np.arange(2.0, 0.45 * n, 0.1)

    def cuts(centre: np.ndarray) -> np.ndarray:
        y = centre[1] + radii * np.cos(angles)[:, None]
        x = centre[0] - radii * np.sin(angles)[:, None]  # east is to the left
        return map_coordinates(image, [y, x], order=1, mode="nearest")

    def peaks(centre: np.ndarray) -> np.ndarray:
        return radii[np.argmax(cuts(centre), 1)]

    def spread(centre: np.ndarray) -> float:
        r = peaks(centre)
        # A cut whose peak is at an end of the radii crosses no ring.
        return float(r.std() / r.mean() + ((r < radii[1]) | (r > radii[-2])).mean())

    light = np.clip(image, 0.2 * image.max(), None) - 0.2 * image.max()
    y, x = np.mgrid[:n, :n]
    start = np.array([(light * x).sum(), (light * y).sum()]) / light.sum()
    steps = np.arange(-3, 3.5, 0.5)
    best = min([start + (dx, dy) for dx in steps for dy in steps], key=spread)
    best = minimize(spread, best, method="Nelder-Mead", options={"xatol": 0.02}).x
    found = peaks(best)
    bright = (cuts(best).max(1) * np.exp(1j * angles)).sum()
    return (
        2 * float(found.mean()) * pixel,
        float(np.degrees(np.angle(bright)) % 360),
        float(found.std() / found.mean()),
    )


def gaussian_field(problem: ImagingProblem) -> dp.GaussianScore:
    """x = m (1 + d) in Jy/pixel: m a round Gaussian of 60 uas (full width at half maximum) with the flux of the shortest baselines, d
    a Gaussian field of variance 1 whose spectrum is that of an exponential disc of 5 uas.
    """
    data, (n, _), pixel = problem.data, problem.grid.shape, problem.grid.pixel
    short = data.distance < 1e9
    flux = float(np.abs(np.average(data.vis[short], weights=data.weight[short])))
    x, y = (c.numpy() for c in problem.grid.coordinates())
    mean = np.exp(-4 * np.log(2) * (x**2 + y**2) / 60e-6**2)
    mean *= flux / mean.sum()
    wide = 4 * n  # so that opposite sides of the image do not meet
    k = 2 * np.pi * np.fft.fftfreq(wide, pixel)
    correlation = np.fft.ifft2((1 + (k[:, None] ** 2 + k**2) * 5e-6**2) ** -3).real
    correlation /= correlation[0, 0]
    at = np.arange(n * n)
    rows, columns = at // n, at % n
    cov = correlation[rows[:, None] - rows, columns[:, None] - columns]
    cov = mean.ravel()[:, None] * cov * mean.ravel()
    scale = float(mean.max())
    return dp.GaussianScore(
        torch.from_numpy(mean / scale).float()[None],
        cov=torch.from_numpy(cov / scale**2).float(),
        sde=dp.EDM(sigma_min=2e-3, sigma_max=80.0),
    ).with_affine(scale, 0.0)


def image(problem: ImagingProblem, prior: dp.ScoreModel, samples: int, title: str) -> ImagingResult:
    problem, fitted = set_up_imaging(problem, prior)
    return solve_imaging(problem, fitted, samples=samples, seed=0, batch_size=4, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", nargs="+", default=list(DATES), choices=list(DATES))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--out", type=Path, default=Path("m87"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(
        "| day | prior | diameter [uas] | position angle | scatter of the radii | chi2 of a draw |"
    )
    print("|---|---|---|---|---|---|")
    for day in arguments.days:
        problem = prepare_imaging(
            fetch(f"m87-{day}-lo"), cell=CELL, size=SIZE, average=AVERAGE, systematic=SYSTEMATIC
        )
        priors = {arguments.prior: dp.load_prior(arguments.prior), "Gaussian field": None}
        for name, prior in priors.items():
            prior = gaussian_field(problem) if prior is None else prior
            result = image(problem, prior, arguments.samples, f"M87, {DATES[day]} 2017, {name}")
            found = np.array([ring(draw, CELL * 1e6) for draw in result.images])
            angle = np.degrees(np.angle(np.exp(1j * np.radians(found[:, 1])).mean())) % 360
            turned = (found[:, 1] - angle + 180) % 360 - 180
            chi2 = result.metrics["reduced_chi2"]["draws"]
            print(
                f"| {DATES[day]} | {name} | {found[:, 0].mean():.1f} ± {found[:, 0].std(ddof=1):.1f} | "
                f"{angle:.0f} ± {turned.std(ddof=1):.0f} | {found[:, 2].mean():.2f} | {chi2:.2f} |",
                flush=True,
            )
            folder = arguments.out / f"{day}-{name.replace(' ', '-').lower()}"
            result.save(folder, overwrite=True)


if __name__ == "__main__":
    main()
