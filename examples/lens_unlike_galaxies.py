"""What does a prior of galaxies make of sources that are none?  Through a known lens, from faint to bright.

    python examples/lens_unlike_galaxies.py [--prior galaxies-32] [--samples 16] [--picture FILE]

As Adam et al. (2022, arXiv:2211.03812) ask: a logo-like shape, text and two points of light are lensed and observed with noise of a tenth to
a thousandth of the image's peak, and reconstructed with a prior that has seen none of the kind; a draw of the prior itself stands beside them.
The lens is an isothermal ellipsoid in external shear, known; 32 x 32 source pixels of 0.06 arcsec, 64 x 64 image pixels of 0.08, a
PSF of one pixel. Printed: the rms error of the posterior mean over the rms of the source, that error over what the draws claim
(1 is calibrated), and the reduced chi-squared of a draw.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import caustics
import torch
from torch import Tensor

import diffpost as dp
from diffpost.diagnostics import chi2
from diffpost.physics import Grid, Lens
from diffpost.random import normal

PEAKS = (10, 30, 100, 300, 1000)  # of the image, in standard deviations of the noise
SIZE = 32
# "LENS" in letters of 5 x 7 pixels
LETTERS = (
    "10000 11111 10001 01111",
    "10000 10000 11001 10000",
    "10000 10000 11001 10000",
    "10000 11110 10101 01110",
    "10000 10000 10011 00001",
    "10000 10000 10011 00001",
    "11111 11111 10001 11110",
)


def text() -> Tensor:
    rows = [[float(c) for c in row.replace(" ", "0")] for row in LETTERS]
    word = torch.tensor(rows)  # (7, 23)
    out = torch.zeros(SIZE, SIZE)
    # rows of images run upwards, and letters are two pixels to a stroke upright
    tall = word.flip(0).repeat_interleave(2, 0)
    out[9 : 9 + tall.shape[0], 4 : 4 + tall.shape[1]] = tall
    return out


def logo() -> Tensor:
    """A ring with a bar across it."""
    at = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = torch.hypot(at[:, None], at[None])
    ring = ((radius > 7) & (radius < 10)).float()
    bar = ((at[:, None] - at[None]).abs() < 2) & (radius < 12)
    return torch.maximum(ring, bar.float())


def points() -> Tensor:
    out = torch.zeros(SIZE, SIZE)
    out[12, 11], out[20, 22] = 1.0, 0.6
    return out


def known_lens() -> Lens:
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    parts = [
        caustics.SIE(cosmology, name="main", x0=0.05, y0=-0.03, q=0.75, phi=0.6, Rein=1.3),
        caustics.ExternalShear(
            cosmology, name="shear", x0=0.0, y0=0.0, gamma_1=0.03, gamma_2=-0.02
        ),
    ]
    mass = caustics.SinglePlane(cosmology, parts, name="mass")
    return Lens(mass, Grid(64, pixel=0.08, oversample=2), Grid(SIZE, pixel=0.06))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    prior = dp.load_prior(options.prior)
    lens = known_lens()
    offsets = torch.arange(7) - 3
    psf = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / 2.0)
    operator = dp.Convolve(psf / psf.sum()) @ lens
    own = dp.sample(prior, 1, dp.DPMSolver(128, eta=1.0), seed=12, progress=False).x[0, 0]
    sources = {"a draw of the prior": own, "logo": logo(), "text": text(), "two points": points()}
    print("| source | " + " | ".join(f"peak {p} σ" for p in PEAKS) + " |")
    print("|---" * (len(PEAKS) + 1) + "|")
    shown: list[tuple[str, list[Tensor]]] = []
    for name, source in sources.items():
        x = source[None]
        clean = operator(x[None])[0]
        cells, means = [], []
        for number, peak in enumerate(PEAKS):
            std = float(clean.max()) / peak
            ids = torch.tensor([number])
            y = clean + std * normal(5, ids, 0, tuple(clean.shape), clean.dtype)[0]
            likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=std))
            posterior = dp.Posterior(prior, likelihood)
            draws = dp.sample(
                posterior, options.samples, dp.DPMSolver(32, eta=1.0), seed=3, progress=False
            )
            error = (draws.mean - x).square().mean().sqrt()
            claimed = ((1 + 1 / options.samples) * draws.std.square().mean()).sqrt()
            fit = float(chi2(draws, likelihood).reduced.mean())
            cells.append(
                f"{float(error / x.square().mean().sqrt()):.3f}, {float(error / claimed):.1f}, {fit:.2f}"
            )
            means.append(draws.mean[0])
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        shown.append((name, [source, *means]))
    if options.picture is not None:
        draw(shown, options.picture)


def draw(rows: list[tuple[str, list[Tensor]]], path: Path) -> None:
    """Sources and posterior means, a row each."""
    import matplotlib.pyplot as plt

    columns = ["source", *(f"peak {p} σ" for p in PEAKS)]
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(1.6 * len(columns), 1.7 * len(rows))
    )
    for number, (line, (name, images)) in enumerate(zip(axes, rows, strict=True)):
        top = math.sqrt(float(images[0].max()))
        for axis, image, title in zip(line, images, columns, strict=True):
            axis.imshow(image.clamp_min(0).sqrt(), origin="lower", cmap="inferno", vmin=0, vmax=top)
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(title, fontsize=9)
        line[0].set_ylabel(name, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
