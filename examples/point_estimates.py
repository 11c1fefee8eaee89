"""Posterior means beside CLEAN and regularised maximum likelihood, by the error of the image.

    pip install --no-deps MPoL fast-histogram torchkbnufft
    python examples/point_estimates.py [--simulations 32] [--samples 8]

Skies of examples/coverage_visibilities.py (drawn from `galaxies-32`, 32 pixels of 0.12 arcsec) are observed with the baselines and weights of
SPT0346-52, and imaged by

* the mean of a few posterior draws, made as `diffpost image` makes them, and of draws from visibilities that are averaged in the cells of the
  image's Fourier grid (`GriddedVisibilities`);
* Högbom's CLEAN (1974, A&AS 15, 417) of the naturally weighted dirty image: components with a Gaussian fitted to the beam, and residuals;
* MPoL (Zawadzki et al. 2023, arXiv:2209.11813): positive images of least chi^2/2 + lambda R, R the negative entropy
  sum I ln(I/p) or the total squared variation, on visibilities that MPoL averages in cells four times finer than the image's own.

The depth of CLEAN, and lambda and p, are those of least median error on other skies, whose truths they see: an advantage that real data do not
give. (MPoL without its dependencies, since it would bring torchvision and torchaudio; what is used here runs without.)
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

import diffpost as dp
from diffpost.calibrate import design
from diffpost.deconvolve import default_inference
from diffpost.io.datasets import fetch
from diffpost.io.uv import read_visibilities
from diffpost.physics import Grid, GriddedVisibilities, Visibilities, compress

CELL, SIZE, PEAK = 0.12, 32, 5e-4
FINER = 4  # MPoL's image is this many times wider, and its cells this many times finer
OTHERS = 1_000_000  # number of the first sky on which settings are chosen
STEPS = 400  # of Adam; the example tells how far the objective still falls at their end
DEPTHS = (0.5, 1.0, 1.5, 2.0, 3.0)  # where CLEAN stops, in sigma of the dirty image
REGULARISERS = {  # lambda, and p in units of PEAK
    "entropy": [(s, p) for s in (20.0, 40.0, 80.0) for p in (0.03, 0.1, 0.3)],
    "squared variation": [(s, 1.0) for s in (30.0, 100.0, 300.0)],
}


@final
@dataclass(frozen=True)
class Observation:
    """Skies (n, 1, 32, 32) in Jy per pixel, and their visibilities (n, m, 2) in Jy."""

    operator: Visibilities
    weight: Tensor
    truth: Tensor
    vis: Tensor


def observe(operator: Visibilities, weight: Tensor, truth: Tensor, seed: int) -> Observation:
    noise = dp.GaussianNoise(weight=weight[:, None])
    clean = operator(truth.double())
    return Observation(
        operator, weight, truth.double(), clean + noise.sample(clean.shape, seed, torch.float64)
    )


# CLEAN ------------------------------------------------------------------------------------------


def dirty(seen: Observation) -> tuple[Tensor, Tensor, float]:
    """Dirty images (n, 32, 32) and beam (63, 63), Jy/beam, natural weights, and the noise of a pixel."""
    total = seen.weight.sum()
    image = seen.operator.adjoint(seen.weight[:, None] * seen.vis)[:, 0] / total
    wide = Visibilities(seen.operator.u, seen.operator.v, Grid(2 * SIZE - 1, CELL))
    ones = torch.stack([seen.weight, torch.zeros_like(seen.weight)], -1)
    return image, wide.adjoint(ones[None])[0, 0] / total, float(total) ** -0.5


def clean(
    image: Tensor, beam: Tensor, noise: float, depth: float, gain: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Components (32, 32) in Jy and what is left (32, 32) in Jy/beam, when no pixel exceeds `depth` sigma."""
    left, found = image.clone(), torch.zeros_like(image)
    for _ in range(20_000):
        at = int(left.abs().argmax())
        row, column = divmod(at, SIZE)
        value = float(left[row, column])
        if abs(value) < depth * noise:
            break
        found[row, column] += gain * value
        down, right = SIZE - 1 - row, SIZE - 1 - column
        left -= gain * value * beam[down : down + SIZE, right : right + SIZE]
    return found, left


def fitted_beam(beam: Tensor) -> Tensor:
    """The Gaussian that fits the beam's main lobe, down to half its peak: (63, 63), 1 at its middle."""
    line = torch.arange(2 * SIZE - 1, dtype=torch.float64) - (SIZE - 1)
    y, x = torch.meshgrid(line, line, indexing="ij")
    near = (beam > 0.5) & (torch.hypot(x, y) < 5)
    terms = torch.stack([x[near] ** 2, 2 * x[near] * y[near], y[near] ** 2], -1)
    a, b, c = torch.linalg.lstsq(terms, -2 * beam[near].log()[:, None]).solution[:, 0]
    return torch.exp(-(a * x**2 + 2 * b * x * y + c * y**2) / 2)


def restored(seen: Observation, depth: float) -> Tensor:
    """CLEAN's image in Jy per pixel, (n, 1, 32, 32)."""
    images, beam, noise = dirty(seen)
    gaussian = fitted_beam(beam)
    area = gaussian.sum()  # pixels of a beam
    pairs = [clean(image, beam, noise, depth) for image in images]
    components, left = (torch.stack(part)[:, None] for part in zip(*pairs, strict=True))
    return dp.Convolve(gaussian / area)(components) + left / area


# MPoL -------------------------------------------------------------------------------------------


def rml(seen: Observation, regulariser: str, strength: float, level: float) -> tuple[Tensor, float]:
    """Images of least chi^2/2 + strength R in Jy per pixel, (n, 1, 32, 32), all n at once as channels; and by how much the last
    tenth of the steps lowered the objective, per sky.
    """
    from mpol import coordinates, fourier, gridding, losses, utils

    n = len(seen.truth)
    coords = coordinates.GridCoords(cell_size=CELL, npix=FINER * SIZE)
    u, v = seen.operator.u, seen.operator.v
    # MPoL's origin is the pixel npix/2, half a pixel from the middle of the image
    half = math.pi * CELL * math.pi / 180 / 3600 * (u + v)
    vis = torch.view_as_complex(seen.vis) * torch.polar(torch.ones_like(half), half)
    wide = [value.expand(n, -1).numpy() for value in (u / 1e3, v / 1e3, seen.weight)]
    data = gridding.DataAverager(
        coords=coords,
        uu=wide[0],
        vv=wide[1],
        weight=wide[2],
        data_re=vis.real.numpy(),
        data_im=vis.imag.numpy(),
    ).to_pytorch_dataset(check_visibility_scatter=False)
    transform = fourier.FourierCube(coords)
    border = (FINER - 1) * SIZE // 2
    base = torch.full((n, SIZE, SIZE), -4.0, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([base], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    before = math.inf
    for step in range(STEPS):
        image = torch.nn.functional.softplus(base)  # of PEAK
        sky = torch.nn.functional.pad(image, (border,) * 4) * (PEAK / CELL**2)
        model = transform(utils.sky_cube_to_packed_cube(sky))
        penalty = (
            losses.entropy(image, level, tot_flux=1.0)
            if regulariser == "entropy"
            else losses.TSV(image)
        )
        loss = losses.chi_squared_gridded(model, data) / 2 + strength * penalty
        if step == STEPS * 9 // 10:
            before = loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return PEAK * image.detach()[:, None], (before - loss.item()) / n


# Judging ----------------------------------------------------------------------------------------


def error(images: Tensor, truth: Tensor) -> Tensor:
    """Rms error over the rms of the truth: (n,)."""
    gap = (images.double() - truth).flatten(1).norm(dim=1)
    return gap / truth.flatten(1).norm(dim=1)


def best(
    make: Callable[..., Tensor], choices: list[tuple[object, ...]], truth: Tensor
) -> tuple[object, ...]:
    scores = [float(error(make(*choice), truth).median()) for choice in choices]
    for choice, score in zip(choices, scores, strict=True):
        print(f"    {choice}: {score:.3f}")
    return choices[min(range(len(scores)), key=scores.__getitem__)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulations", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--others", type=int, default=8, help="skies to choose settings on")
    options = parser.parse_args()
    if importlib.util.find_spec("mpol") is None:
        raise SystemExit("needs MPoL: pip install --no-deps MPoL fast-histogram torchkbnufft")
    start = time.process_time()

    def told(what: str) -> None:
        print(f"[{time.process_time() - start:4.0f} s] {what}", flush=True)

    data = read_visibilities(fetch("spt0346-visibilities"))
    u, v = torch.from_numpy(data.u.copy()), torch.from_numpy(data.v.copy())
    weight = torch.from_numpy(data.weight.copy())
    seen = Visibilities(u, v, Grid(SIZE, CELL))
    noise = dp.GaussianNoise(weight=weight[:, None])
    modes = compress(
        dp.Likelihood(torch.zeros(seen.data_shape, dtype=torch.float64), seen, noise)
    ).operator
    prior = dp.load_prior("galaxies-32").with_affine(PEAK, 0.0)
    # the same numbers give the same skies as in coverage_visibilities.py
    skies = design(prior, modes, dp.GaussianNoise(std=1.0), simulations=8, samples=8)
    n = options.simulations
    here = observe(seen, weight, skies.draw_truths(range(n)), seed=1)
    told(f"{n} skies of {1e3 * float(here.truth.sum((1, 2, 3)).median()):.0f} mJy (median)")
    there = observe(seen, weight, skies.draw_truths(range(OTHERS, OTHERS + options.others)), seed=2)
    told(f"{options.others} others, on which settings are chosen")

    for wider in (1, 2, 4):
        gridded = GriddedVisibilities(u, v, weight, Grid(wider * SIZE, CELL))
        border = (wider - 1) * SIZE // 2
        found = gridded.gridding_error(torch.nn.functional.pad(here.truth, (border,) * 4))
        print(
            f"  gridded {wider} times finer: {len(gridded.u)} cells, errors of {float(found.rms.median()):.2f} sigma, chi^2 grows by "
            f"{float(found.chi2.median()):.0f} of {int((gridded.weight > 0).sum())} (medians)"
        )

    images: dict[str, Tensor] = {}
    (depth,) = best(lambda d: restored(there, d), [(d,) for d in DEPTHS], there.truth)
    images[f"CLEAN to {depth} sigma"] = restored(here, depth)
    told("CLEAN")
    for regulariser, settings in REGULARISERS.items():
        choices: list[tuple[object, ...]] = [(regulariser, *setting) for setting in settings]
        chosen = best(lambda *c: rml(there, *c)[0], choices, there.truth)
        image, moved = rml(here, *chosen)
        told(f"MPoL {chosen}: the last steps lowered the objective by {moved:.2g} a sky")
        images[f"MPoL, {regulariser}"] = image

    cells = GriddedVisibilities(u, v, weight, Grid(SIZE, CELL))
    drawn: dict[str, Tensor] = {}
    for name, likelihood in (
        ("", compress(dp.Likelihood(here.vis, seen, noise, batched=True))),
        (", gridded", cells.likelihood(here.vis)),
        (", gridded, noise by the scatter", cells.likelihood(here.vis, cells.scatter(here.vis).noise)),
    ):  # fmt: skip
        guidance, sampler = default_inference(prior, likelihood)
        posterior = dp.Posterior(prior, likelihood.repeat(options.samples), guidance)
        count = n * options.samples
        draws = dp.sample(posterior, count, sampler, seed=3, batch_size=256, progress=False)
        x = draws.x.double().unflatten(0, (n, options.samples))
        drawn[name] = images[f"mean of {options.samples} posterior draws{name}"] = x.mean(1)
        if not name:
            images["one draw"] = x[:, 0]
        claimed = x.var(1) * (1 + 1 / options.samples)
        ratio = ((x.mean(1) - here.truth).square().mean() / claimed.mean()).sqrt()
        told(
            f"posterior draws{name}: the error of the mean is {float(ratio):.2f} of what the draws claim"
        )

    _, beam, _ = dirty(here)
    gaussian = fitted_beam(beam)
    blur = dp.Convolve(gaussian / gaussian.sum())
    print(
        "\n| image | rms error over rms truth: median (quartiles) | at the beam's resolution |\n|---|---|---|"
    )
    for name, image in images.items():
        bare = error(image, here.truth)
        # CLEAN's image has the beam's resolution already
        same = image.double() if name.startswith("CLEAN") else blur(image.double())
        blurred = error(same, blur(here.truth))
        low, middle, high = bare.quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=bare.dtype)
        ).tolist()
        print(f"| {name} | {middle:.3f} ({low:.3f}, {high:.3f}) | {float(blurred.median()):.3f} |")
    nearest = error(drawn[""], here.truth)
    for name, image in images.items():
        if "draw" not in name:
            wins = int((nearest < error(image, here.truth)).sum())
            print(f"  the mean is nearer to the truth than {name}: {wins} of {n}")
    told("done")


if __name__ == "__main__":
    main()
