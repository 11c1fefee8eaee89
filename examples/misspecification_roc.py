"""How well does the misspecification alarm ring?  ROC curves against held-out galaxies.

    python examples/misspecification_roc.py galaxies-32 --data DATA --out docs/images
    python examples/misspecification_roc.py galaxies-32 --data DATA --write

DATA is the folder that examples/prepare_galaxies.py wrote.  Half of the held-out frames make the reference, the other
half are galaxies that should pass; against them stand images that are no galaxies, or have something on them.  They are
judged as they are, and by two posterior draws of their data under a Gaussian PSF and noise, made as `diffpost deconvolve`
makes them.

--write measures the reference on crops of all held-out frames and keeps it in the prior's card, where
`diffpost.diagnostics.misspecification` finds it: repeat it when the weights change.  Weights are not touched.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

import diffpost as dp
from diffpost.deconvolve import default_inference
from diffpost.diagnostics.misspecification import (
    CARD_KEY,
    HeldOutReference,
    heldout_reference,
    misspecification,
)
from diffpost.io.checkpoints import shipped_priors
from diffpost.io.images import ImageSource
from diffpost.jobs.instruments import gaussian_psf
from diffpost.random import normal, uniform
from diffpost.training_config import TrainConfig
from diffpost.training_data import CropStream

ALPHA = 0.05
REFERENCE = 512  # crops

# What is not a galaxy of the prior's kind ------------------------------------------------------


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Rows and columns from the centre, in units of a 32nd of the frame."""
    line = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * 32 / size
    return line[:, None], line[None, :]


def _numbers(n: int, seed: int, count: int) -> list[Tensor]:
    """`count` uniform numbers for each of n images, each (n, 1, 1)."""
    table = uniform(seed, torch.arange(n), 0, (count,), dtype=torch.float64)
    return [column[:, None, None] for column in table.unbind(1)]


def star_field(n: int, size: int, stars: int = 12, fwhm: float = 2.4) -> Tensor:
    """Gaussian stars of a FWHM in pixels anywhere, over 1.5 decades of flux; the brightest peaks at 1."""
    line = torch.arange(size, dtype=torch.float64)
    table = uniform(11, torch.arange(n), 0, (stars, 3), dtype=torch.float64)
    place = (2 + table[..., :2] * (size - 5))[..., None]
    height = 10 ** (-1.5 * table[..., 2])
    height = height / height.amax(1, keepdim=True)
    width = 2 * (fwhm / 2.3548) ** 2
    profile = torch.exp(-((line - place) ** 2) / width)  # (n, stars, 2, size)
    return torch.einsum("ns,nsy,nsx->nyx", height, profile[:, :, 0], profile[:, :, 1])[:, None]


def ring(n: int, size: int) -> Tensor:
    """Empty rings of 5 to 10 32nds of the frame, peaking at 1."""
    radius, width, up, right = _numbers(n, 12, 4)
    y, x = _grid(size)
    r = torch.hypot(y - 2 * up + 1, x - 2 * right + 1)
    width = 0.9 + 0.8 * width
    return torch.exp(-((r - 5 - 5 * radius) ** 2) / (2 * width**2))[:, None]


def noise(n: int, size: int) -> Tensor:
    """White noise of 0.03 to 0.3."""
    (level,) = _numbers(n, 13, 1)
    z = normal(14, torch.arange(n), 0, (1, size, size), torch.float64)
    return z * (0.03 * 10**level)[:, None]


def with_arc(galaxies: Tensor, height: float = 0.3) -> Tensor:
    """A lensed arc and its counter-image over the galaxy."""
    n, size = len(galaxies), galaxies.shape[-1]
    radius, turn, extent = _numbers(n, 15, 3)
    y, x = _grid(size)
    r, angle = torch.hypot(y, x), torch.atan2(y.expand(size, size), x.expand(size, size))
    radius = 7 + 4 * radius

    def apart(turned: Tensor) -> Tensor:
        return torch.remainder(angle - turned, 2 * math.pi) - math.pi

    arc = torch.exp(
        -((r - radius) ** 2) / 2 - apart(2 * math.pi * turn) ** 2 / (2 * (0.3 + 0.6 * extent) ** 2)
    )
    inner = 0.7 * radius
    counter = torch.exp(
        -((r - inner) ** 2) / 2 - (apart(2 * math.pi * turn + math.pi) * inner) ** 2 / 4.5
    )
    return galaxies + height * (arc + 0.5 * counter)[:, None]


def hot_pixels(n: int, size: int, pixels: int = 3, height: float = 0.5) -> Tensor:
    """Single pixels, to be added."""
    places = (uniform(16, torch.arange(n), 0, (pixels,)) * size**2).long()
    return height * torch.zeros(n, size**2).scatter_(1, places, 1.0).reshape(n, 1, size, size)


def cosmic_ray(n: int, size: int, height: float = 0.5) -> Tensor:
    """A straight track of one pixel's width and 4 to 10 pixels' length, to be added."""
    turn, up, right, length = _numbers(n, 17, 4)
    line = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = line[:, None] - (up - 0.5) * 0.6 * size, line[None, :] - (right - 0.5) * 0.6 * size
    c, s = (math.pi * turn).cos(), (math.pi * turn).sin()
    along, across = y * c + x * s, x * c - y * s
    return height * ((along.abs() < 2 + 3 * length) & (across.abs() < 0.5)).double()[:, None]


def cases(galaxies: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Name -> images of the sky, and what the detector adds."""
    n, size = len(galaxies), galaxies.shape[-1]
    return {
        "galaxies": (galaxies, 0.0),
        "star field": (star_field(n, size), 0.0),
        "ring": (ring(n, size), 0.0),
        "noise only": (noise(n, size), 0.0),
        "flipped sign": (-galaxies, 0.0),
        "hot pixels": (galaxies, hot_pixels(n, size)),
        "cosmic ray": (galaxies, cosmic_ray(n, size)),
        "three times too bright": (3 * galaxies, 0.0),
        "lensed arc": (with_arc(galaxies), 0.0),
    }


# Held-out galaxies -----------------------------------------------------------------------------


class Share:
    """Every second frame of a source."""

    def __init__(self, source: ImageSource, which: int) -> None:
        self.source, self.numbers = source, range(which, len(source), 2)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.numbers[index]]


def crops(prior: Any, data: Path, count: int, which: int | None = None, seed: int = 21) -> Tensor:
    """Crops of the held-out frames, cut as in training; of the even or odd ones, or of all."""
    config = TrainConfig.from_dict(prior.card["training"]["config"])
    sources = [replace(s, path=str(data / Path(s.path).name)) for s in config.heldout]
    stream = CropStream(sources, seed=seed)
    if which is not None:
        stream.images = [Share(source, which) for source in stream.images]  # type: ignore[misc]
    return stream.batch(0, count, prior.shape[-1])


def folder_of(name: str) -> Path:
    shipped = Path(dp.__file__).parent / "priors"
    return shipped / name if name in shipped_priors() else Path(name)


def write(folder: Path, reference: HeldOutReference, count: int) -> None:
    """Puts the reference into the card, atomically."""
    path = folder / "card.json"
    card = json.loads(path.read_text())
    measured = {
        "measured_on": f"{count} held-out crops",
        "how": "examples/misspecification_roc.py --write",
    }
    card[CARD_KEY] = {**reference.to_dict(), **measured}
    new = path.with_name(f".card.{os.getpid()}.tmp")
    new.write_text(json.dumps(card, indent=2, allow_nan=False) + "\n")
    os.replace(new, path)


# Judging ---------------------------------------------------------------------------------------


Judged = tuple[Tensor, Tensor]  # a statistic for the ROC curve, and whether the alarm rings


def directly(prior: Any, reference: HeldOutReference, kinds: dict[str, Any]) -> dict[str, Judged]:
    found = {}
    for name, (sky, added) in kinds.items():
        verdict = misspecification((sky + added).float(), prior, reference=reference, each=1)
        found[name] = (verdict.statistic, verdict.p_value <= ALPHA)
    return found


def from_data(
    prior: Any, reference: HeldOutReference, kinds: dict[str, Any], setting: str, draws: int = 2
) -> tuple[dict[str, Judged], dict[str, Judged]]:
    """By the draws alone, and with the fit; noise only is noise whose smoothed peak is taken for the galaxy's."""
    width, level = (float(v) for v in setting.split(":"))
    operator = dp.Convolve(gaussian_psf(width))
    alone, together = {}, {}
    for name, (sky, added) in kinds.items():
        n = len(sky)
        z = normal(9, torch.arange(n), 0, tuple(sky.shape[1:]))
        if name == "noise only":
            peak = dp.Convolve(gaussian_psf(0.64))(z).amax((1, 2, 3), keepdim=True)
            y, std = z / peak, (1 / peak)
        else:
            y, std = operator(sky.float()) + added + level * z, torch.full((n, 1, 1, 1), level)
        likelihood = dp.Likelihood(
            y.float(), operator, dp.GaussianNoise(std=std.expand(y.shape)), batched=True
        ).repeat(draws)
        guidance, sampler = default_inference(prior, likelihood)
        x = dp.sample(
            dp.Posterior(prior, likelihood, guidance),
            draws * n,
            sampler,
            seed=0,
            batch_size=100,
            progress=False,
        )
        verdict = misspecification(x, prior, likelihood, reference, each=draws)
        alone[name] = (verdict.statistic, verdict.image_p_value <= ALPHA)
        together[name] = (1 - verdict.p_value, verdict.p_value <= ALPHA)
        print(f"    {setting} {name}: {float(alone[name][1].double().mean()):.2f}", flush=True)
    return alone, together


def auc(passing: Tensor, other: Tensor) -> float:
    """Probability that one of `other` has the larger statistic; ties count half."""
    a, b = passing[None, :], other[:, None]
    return float((b > a).double().mean() + 0.5 * (b == a).double().mean())


def table(columns: dict[str, dict[str, Judged]]) -> str:
    """AUC and share of alarms, by kind and by column."""
    names = list(next(iter(columns.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        cells = []
        for found in columns.values():
            statistic, rings = found[name]
            share = f"{100 * float(rings.double().mean()):.0f}%"
            passing = found["galaxies"][0]
            cells.append(share if name == "galaxies" else f"{auc(passing, statistic):.3f}, {share}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(kinds: dict[str, Any], columns: dict[str, dict[str, Judged]], path: Path) -> None:
    """One image of each kind above, ROC curves below."""
    figure = plt.figure(figsize=(12, 6.2))
    top = figure.add_gridspec(
        1, len(kinds), left=0.02, right=0.98, top=0.95, bottom=0.74, wspace=0.06
    )
    colours: dict[str, str] = {}
    for k, (name, (sky, added)) in enumerate(kinds.items()):
        axis = figure.add_subplot(top[k])
        axis.imshow(
            np.arcsinh((sky + added)[3, 0].numpy() / 0.01),
            cmap="gray",
            vmin=-4,
            vmax=5,
            origin="lower",
        )
        axis.set(xticks=[], yticks=[])
        colours[name] = f"C{k}"
        axis.set_title(name, fontsize=8, color="k" if name == "galaxies" else colours[name])
    below = figure.add_gridspec(
        1, len(columns), left=0.06, right=0.98, top=0.66, bottom=0.1, wspace=0.15
    )
    for k, (label, found) in enumerate(columns.items()):
        axis = figure.add_subplot(below[k])
        passing = found["galaxies"][0].sort(descending=True).values
        rates = torch.arange(1, len(passing) + 1) / len(passing)
        for name, (statistic, _) in found.items():
            if name != "galaxies":
                power = (statistic[None, :] >= passing[:, None]).double().mean(1)
                axis.step(
                    [0, *rates.tolist()], [0, *power.tolist()], where="post", color=colours[name]
                )
        axis.plot([0, 1], [0, 1], color="0.8", lw=1)
        axis.axvline(ALPHA, color="0.8", lw=1)
        axis.set(title=label, xlabel="galaxies that ring", xlim=(-0.01, 1.01), ylim=(-0.01, 1.02))
        if k == 0:
            axis.set_ylabel("others that ring")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prior", help="name of a shipped prior, or folder of one")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared galaxies")
    parser.add_argument("--out", type=Path, help="folder of the picture")
    parser.add_argument(
        "--write", action="store_true", help="keep the reference in the card, and stop"
    )
    parser.add_argument("--galaxies", type=int, default=64, help="of each kind, deconvolved")
    parser.add_argument("--images", type=int, default=256, help="of each kind, judged as they are")
    parser.add_argument(
        "--settings",
        nargs="*",
        default=["1.5:0.01", "2.5:0.05"],
        metavar="PSF:NOISE",
        help="sigma in pixels, std",
    )
    options = parser.parse_args(arguments)
    prior = dp.load_prior(options.prior)
    if options.write:
        reference = heldout_reference(prior, crops(prior, options.data, REFERENCE))
        write(folder_of(options.prior), reference, REFERENCE)
        print(f"threshold at {ALPHA}: {reference.threshold(ALPHA):.3f}")
        return
    reference = heldout_reference(prior, crops(prior, options.data, REFERENCE, 0))
    galaxies = crops(prior, options.data, max(options.galaxies, options.images), 1, seed=22)
    kinds = cases(galaxies[: options.images])
    columns = {"the image itself": directly(prior, reference, kinds)}
    print(table(columns), flush=True)
    kinds = cases(galaxies[: options.galaxies])
    shown = dict(columns)
    for setting in options.settings:
        width, level = setting.split(":")
        label = f"PSF {width}, noise {level}"
        alone, together = from_data(prior, reference, kinds, setting)
        columns[f"draws, {label}"] = shown[f"two draws, {label}"] = alone
        columns[f"draws and fit, {label}"] = together
    print(table(columns))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        picture(kinds, shown, options.out / "misspecification.png")


if __name__ == "__main__":
    main()
