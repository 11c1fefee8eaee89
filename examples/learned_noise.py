"""Learned noise against Gaussian noise, on blank sky of HST and JWST that no model has seen.

    python examples/learned_noise.py F115W=runs/f115w ... [--sims 200] [--out FOLDER]

Each run is a folder of `diffpost train-noise --per-field` on the stamps named (a registry name, noise-..., or its short
form), whose held-out fields are what is judged. Two questions:

*Is the generated noise like the held-out stamps?* By the power spectrum, moments of a pixel, and PQMass on crops of 16
pixels, field by field, beside the PQMass of Gaussian noise of the training stamps' power spectrum.

*Are parameters inferred from data with that noise calibrated?* A galaxy (an exponential disc at a random place, of random
flux, half-light radius and axis ratio, blurred by a Gaussian PSF) is put on a held-out stamp of 32 pixels, and its five
parameters are inferred by HMC without any image prior, from all stamps as one batch, with (a) Gaussian noise of the
stamps' standard deviation, (b) Gaussian noise of the training stamps' power spectrum, (c) the learned score (SLIC), tested by its line
integrals. Coverage by TARP, with references from the data, and the ranks of each parameter (SBC). All three know the
standard deviation of the field.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import diffpost as dp
from diffpost.diagnostics import coverage, pqmass, sbc
from diffpost.jobs.noise_summary import generate, radial_power
from diffpost.parameters import (
    HMC,
    LogNormal,
    ModelledData,
    Normal,
    ParameterPrior,
    Uniform,
    run_chains,
)

SIZE, FINE = 32, 2
PSF = 1.0  # standard deviation of the Gaussian PSF, pixels
PRIOR = ParameterPrior(
    {
        "flux": LogNormal(120.0, 0.3),  # in standard deviations of a pixel
        "radius": LogNormal(3.0, 0.25),  # half-light, pixels
        "q": Uniform(0.3, 1.0),
        "x": Normal(0.0, 1.0),
        "y": Normal(0.0, 1.0),
    }
)
ANGLE = 0.6


def disc(values: Mapping[str, Tensor]) -> Tensor:
    """Exponential discs seen through the PSF, (B, 1, 32, 32)."""
    flux, radius, q, x0, y0 = (values[n].float()[:, None, None] for n in PRIOR.names)
    axis = (torch.arange(SIZE * FINE) - (SIZE * FINE - 1) / 2) / FINE
    y, x = axis[:, None] - y0, axis - x0
    u = (x * math.cos(ANGLE) + y * math.sin(ANGLE)) * q.sqrt()
    v = (y * math.cos(ANGLE) - x * math.sin(ANGLE)) / q.sqrt()
    scale = radius / 1.678
    profile = torch.exp(-(u.square() + v.square() + 0.01).sqrt() / scale) / (2 * math.pi * scale**2)
    k = torch.fft.fftfreq(SIZE * FINE) * FINE
    kr = torch.fft.rfftfreq(SIZE * FINE) * FINE
    blur = torch.exp(-2 * (math.pi * PSF) ** 2 * (k[:, None] ** 2 + kr**2))
    seen = torch.fft.irfft2(torch.fft.rfft2(profile) * blur, s=profile.shape[-2:])
    binned = torch.nn.functional.avg_pool2d(seen, FINE)
    return (flux * binned)[:, None]


def crops(stamps: NDArray[Any], size: int) -> NDArray[Any]:
    """The squares of a size that a stamp falls into, (n, 1, h, w) to (m, 1, size, size), stamp by stamp."""
    n, _, h, w = stamps.shape
    a, b = h // size, w // size
    cut = stamps[..., : a * size, : b * size].reshape(n, a, size, b, size)
    return cut.transpose(0, 1, 3, 2, 4).reshape(-1, 1, size, size)


def spectrum(stamps: NDArray[Any]) -> Tensor:
    """Mean periodogram of (n, 1, h, w), (1, h, w)."""
    power = np.abs(np.fft.fft2(stamps.astype(np.float64), norm="ortho")) ** 2
    return torch.from_numpy(power.mean(0))


def likeness(model: Any, run: Path, seed: int = 0) -> dict[str, Any]:
    """Generated noise against each held-out field."""
    held, train = (np.load(run / "stamps" / f"{n}.npy") for n in ("heldout", "train"))
    fields = model.card["noise"]["heldout_fields"]
    names = np.load(run / "stamps" / "fields.npy")
    drawn = generate(model, (1, SIZE, SIZE), 256, seed)[:, None]
    z = torch.randn(256, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    power = spectrum(crops(train, SIZE)).float()
    gaussian = torch.fft.ifft2(torch.fft.fft2(z) * power.sqrt()).real.numpy()
    out: dict[str, Any] = {"fields": {}}
    first = torch.from_numpy(
        crops(drawn, 16)[::2].copy()
    )  # neighbouring crops of a draw are not independent
    other = torch.from_numpy(crops(gaussian, 16)[::2].copy())
    for field in fields:
        stamps = held[names == field]
        real = torch.from_numpy(crops(stamps, 16)[::2].copy())
        out["fields"][field] = {
            "crops": len(real),
            "pqmass_learned": pqmass(first.float(), real.float(), seed=seed).p_value,
            "pqmass_gaussian": pqmass(other.float(), real.float(), seed=seed).p_value,
        }
    real = crops(held, SIZE)[:, 0]
    for name, values in (
        ("learned", drawn[:, 0]),
        ("gaussian", gaussian[:, 0]),
        ("held out", real),
    ):
        x = values.astype(np.float64)
        x = x - x.mean()
        s = x.std()
        rings, frequency = radial_power(values)
        out[name] = {
            "std": float(s),
            "skewness": float((x**3).mean() / s**3),
            "kurtosis": float((x**4).mean() / s**4 - 3),
            "beyond_3": float((np.abs(x) > 3 * s).mean()),
            "beyond_4": float((np.abs(x) > 4 * s).mean()),
            "power": (rings.mean(0) / s**2).tolist(),
            "error": (rings.std(0) / s**2 / len(rings) ** 0.5).tolist(),
        }
    out["frequency"] = frequency.tolist()
    return out


def start_of(density: ModelledData, noise: dp.GaussianNoise, z: Tensor) -> tuple[Tensor, Tensor]:
    """Mode and inverse Hessian by Gauss and Newton under Gaussian noise with a power spectrum, from z."""
    power = noise.spectrum((1, SIZE, SIZE))
    root = power.float().rsqrt()

    def white(r: Tensor) -> Tensor:
        f = torch.fft.fft2(r, norm="ortho") * root
        return torch.view_as_real(f).flatten(1)

    for _ in range(12):
        r = white(density.residual(z))
        columns = []
        for i in range(z.shape[1]):
            direction = torch.zeros_like(z)
            direction[:, i] = 1
            _, d = torch.func.jvp(density.residual, (z,), (direction,))
            columns.append(white(d))
        j = torch.stack(columns, 2).double()
        # the prior in its own coordinates is close to a unit normal
        h = j.mT @ j + torch.eye(z.shape[1], dtype=torch.float64)
        g = (j.mT @ r.double()[..., None])[..., 0] + z
        z = z - torch.linalg.solve(h, g[..., None])[..., 0].clamp(-0.7, 0.7)
    return z, torch.linalg.inv(h)


def infer(
    model: Any, run: Path, sims: int, draws: int, warmup: int, chains: int, seed: int = 0
) -> dict[str, Any]:
    """Coverage of three likelihoods on the same simulated data."""
    held, train = (np.load(run / "stamps" / f"{n}.npy") for n in ("heldout", "train"))
    names = np.load(run / "stamps" / "fields.npy")
    for field in np.unique(names):  # every likelihood knows the depth
        held[names == field] /= held[names == field].std()
    real = crops(held, SIZE)
    order = np.random.default_rng(seed).permutation(len(real))[:sims]
    real = torch.from_numpy(real[order])
    sims = len(real)
    truth = PRIOR.sample(sims, seed + 11)
    y = disc(PRIOR.values(truth)).float() + real
    power = spectrum(crops(train, SIZE))
    noises = {
        "diagonal Gaussian": dp.GaussianNoise(std=1.0),
        "Gaussian, fitted power": dp.GaussianNoise(power=power.float()),
        "SLIC": dp.LearnedNoise(model.with_affine(1.0), nodes=5),
    }
    rows = y.repeat_interleave(chains, 0)
    out: dict[str, Any] = {"sims": sims, "draws": draws * chains}
    # every likelihood starts from the second's posterior in the Gaussian approximation
    surrogate = noises["Gaussian, fitted power"]
    begin = ModelledData(rows, disc, surrogate, PRIOR, batched=True)
    z = torch.zeros(len(rows), len(PRIOR), dtype=torch.float64)
    mode, covariance = start_of(begin, surrogate, z)
    kick = torch.randn(mode.shape, generator=torch.Generator().manual_seed(seed)).double()
    start = mode + (torch.linalg.cholesky(covariance) @ kick[..., None])[..., 0]
    for name, noise in noises.items():
        density = ModelledData(rows, disc, noise, PRIOR, batched=True)
        clock = time.perf_counter()
        kernel = HMC(
            draws=draws,
            warmup=warmup,
            leapfrogs=2,
            group=chains,
            covariance=covariance[::chains],
            learn_covariance=False,
        )
        found = run_chains(density, kernel, start, seed, progress=False)
        z = found.z.reshape(sims, chains * draws, -1)
        t = PRIOR.unconstrain(truth)
        tarp = coverage(z.float(), t.float(), data=y.flatten(1), seed=seed)
        ranks = sbc(z, t, seed)
        normed = (t - z.mean(1)) / z.std(1)
        out[name] = {
            "seconds": time.perf_counter() - clock,
            "acceptance": float(found.acceptance.mean()),
            "rhat": float(found.convergence().rhat.median()) if chains > 1 else None,
            "ess": float(found.convergence().ess.median()) if chains > 1 else None,
            "tarp_p": tarp.p_value,
            "tarp_inside": tarp.inside,
            "sbc_p": ranks.ecdf_p_value.tolist(),
            "covers_68": float(tarp.ecp[(tarp.alpha - 0.68).abs().argmin()]),
            "marginal_68": [float(v) for v in (normed.abs() < 1).double().mean(0)],
            "rms_z": [float(v) for v in normed.square().mean(0).sqrt()],
            "rms_error": [float(v) for v in (z.mean(1) - t).square().mean(0).sqrt()],
            "mean_std": [float(v) for v in z.std(1).mean(0)],
            "alpha": tarp.alpha.tolist(),
            "ecp": tarp.ecp.tolist(),
            "null_band": tarp.null_band.tolist(),
            "score_evaluations": density.evaluations,
        }
        print(
            name,
            {k: v for k, v in out[name].items() if k not in ("alpha", "ecp", "null_band")},
            flush=True,
        )
    return out


def picture(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {
        "diagonal Gaussian": "#c44e52",
        "Gaussian, fitted power": "#4c72b0",
        "SLIC": "#55a868",
    }
    figure, axes = plt.subplots(
        2, len(results), figsize=(4.2 * len(results), 7.6), squeeze=False, constrained_layout=True
    )
    for (top, bottom), (name, found) in zip(axes.T, results.items(), strict=True):
        like = found["likeness"]
        for kind, colour in (("learned", "#55a868"), ("gaussian", "#4c72b0"), ("held out", "k")):
            top.errorbar(
                like["frequency"],
                like[kind]["power"],
                like[kind]["error"],
                label=kind,
                color=colour,
            )
        top.set(yscale="log", xlabel="cycles a pixel", ylabel="power", title=name)
        top.legend(frameon=False)
        for kind, colour in colours.items():
            bottom.plot(
                found["inference"][kind]["alpha"],
                found["inference"][kind]["ecp"],
                color=colour,
                label=kind,
            )
        bottom.fill_between(
            found["inference"]["SLIC"]["alpha"],
            *found["inference"]["SLIC"]["null_band"],
            color="0.85",
            zorder=0,
        )
        bottom.plot([0, 1], [0, 1], "k:", lw=0.8)
        bottom.set(xlabel="credibility", ylabel="expected coverage", aspect="equal")
        bottom.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--sims", type=int, default=200)
    parser.add_argument("--draws", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("learned-noise"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for text in given.runs:
        name, _, folder = text.partition("=")
        if name in results:
            continue
        run = Path(folder)
        model = dp.load_prior(run / "prior")
        found = {"likeness": likeness(model, run)}
        print(name, json.dumps(found["likeness"], indent=1), flush=True)
        found["inference"] = infer(model, run, given.sims, given.draws, given.warmup, given.chains)
        results[name] = found
        kept.write_text(json.dumps(results, indent=1))
    picture(results, given.out / "learned_noise.png")


if __name__ == "__main__":
    main()
