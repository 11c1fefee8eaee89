"""Error against denoiser calls, of every sampler: the tables of docs/performance.md.

    python examples/error_by_calls.py field                        # exact, a minute
    python examples/error_by_calls.py galaxies                     # against a reference of many steps; resumes

`field`: every mode of a Gaussian posterior is an affine map of the normals that a sampler draws, so the mean and the
variance of its draws follow without Monte Carlo, on the posterior of docs/oracle.md.

`galaxies`: a draw of a trained prior is blurred by the HST's PSF (F105W), noise is added, and its posterior, by the
guidance that a posterior takes by itself, is drawn with few calls and with many. The seeds differ on purpose: a sampler
that shared its noise with the reference would be nearer to it than independent draws are to each other, below the floor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import diffpost as dp
from diffpost.data import shipped
from diffpost.diagnostics import pqmass, sliced_wasserstein
from diffpost.io.fits import read_image
from diffpost.jobs.psf import prepare_psf
from diffpost.oracles import gaussian_field
from diffpost.oracles.response import response
from diffpost.random import normal

_PSF = "hst_petrofit/f105w_psf.fits.gz"
_REACH = 12  # pixels of the PSF on each side of its centre
_NOISE = 0.02
_TRUTH = 2  # seed of the galaxy
_SPLITS = 20


def galaxy(prior: dp.ScoreModel) -> dp.Posterior:
    """The posterior of a galaxy of the prior, seen by the HST."""
    truth = dp.sample(prior, 1, dp.DPMSolver(32, eta=1.0), seed=_TRUTH, progress=False).x
    kernel = torch.as_tensor(prepare_psf(read_image(shipped(_PSF)).data).kernel)
    middle = len(kernel) // 2
    cut = kernel[
        middle - _REACH : middle + _REACH + 1, middle - _REACH : middle + _REACH + 1
    ].float()
    operator = dp.Convolve(cut / cut.sum())
    y = operator(truth)[0]
    y = y + _NOISE * normal(2, torch.arange(1), 0, tuple(y.shape), y.dtype)[0]
    return dp.Posterior(prior, dp.Likelihood(y, operator, dp.GaussianNoise(std=_NOISE)))


CALLS = (16, 24, 32, 48)


def samplers(calls: int) -> dict[str, dp.Sampler]:
    """Every sampler at as many denoiser calls, or one fewer where it takes two a level."""
    pairs = (calls + 1) // 2
    return {
        "EulerMaruyama": dp.EulerMaruyama(calls),
        "PredictorCorrector": dp.PredictorCorrector(pairs),
        "Heun": dp.Heun(pairs),
        "DPMSolver": dp.DPMSolver(calls),
        "DPMSolver(eta=1)": dp.DPMSolver(calls, eta=1.0),
        "FittedLevels(Heun)": dp.FittedLevels(dp.Heun(pairs)),
        "FittedLevels(DPMSolver)": dp.FittedLevels(dp.DPMSolver(calls)),
        "FittedLevels(DPMSolver(eta=1))": dp.FittedLevels(dp.DPMSolver(calls, eta=1.0)),
    }


def field() -> None:
    """Prints the exact table: the largest error of a mode's variance, and the rms error of the mean over the scatter
    of the mean of 256 draws, 1/16 of a standard deviation of the posterior.
    """
    oracle = gaussian_field()
    posterior = oracle.posterior()
    order = oracle.variance.flatten().argsort()
    chosen = torch.cat([order[::64], order[-45:]])  # widest modes are few: all of them
    variance = oracle.variance.flatten()[chosen]
    # a mode's mean in float64; real, as the sampler is linear
    mean = torch.fft.fft2(oracle.mean, norm="ortho").abs().flatten()[chosen]
    modes = dp.GaussianScore(mean, var=variance, sde=oracle.prior.sde)
    print("| sampler | " + " | ".join(f"{calls}" for calls in CALLS) + " |")
    print("|---|" + "---|" * len(CALLS))
    rows: dict[str, list[str]] = {}
    for calls in CALLS:
        for name, sampler in samplers(calls).items():
            if isinstance(sampler, dp.PredictorCorrector):
                continue  # its steps depend on the draw: not affine
            found, spread = response(modes, sampler.prepared(posterior))
            worst = float((spread / variance - 1).abs().max())
            shift = float(((found - mean) / variance.sqrt()).square().mean().sqrt()) * 16
            rows.setdefault(name, []).append(f"{worst:.1%}, {shift:.2f}")
    for name, cells in rows.items():
        print(f"| `{name}` | " + " | ".join(cells) + " |")
    print("\n| `AdaptiveLevels(DPMSolver)` | calls | largest error | pilot calls a draw |")
    print("|---|---|---|---|")
    for rtol in (0.2, 0.1, 0.05, 0.02, 0.01, 0.005):
        adaptive = dp.AdaptiveLevels(dp.DPMSolver(2), rtol=rtol)
        levels = adaptive.prepared(posterior)
        _, spread = response(modes, levels)
        worst = float((spread / variance - 1).abs().max())
        pilot = levels.pilot_calls / adaptive.draws
        print(f"| rtol={rtol:g} | {levels.steps} | {worst:.1%} | {pilot:g} |")


def others() -> None:
    """Prints the largest error of a mode's variance for other data, on the usual and the fitted levels."""
    fields = {
        "as above": gaussian_field(),
        "noise of 0.01": gaussian_field(noise=0.01),
        "noise of 1": gaussian_field(noise=1.0),
        "power of slope -2": gaussian_field(index=-2.0),
        "PSF of sigma 4": gaussian_field(psf_sigma=4.0),
        "no data": None,
    }
    print("\n| field, `DPMSolver(eta=1)`: usual, fitted levels | 16 | 24 |\n|---|---|---|")
    for name, oracle in fields.items():
        prior = gaussian_field().prior
        model = prior if oracle is None else oracle.posterior()
        variance = prior.eigenvalues.double() if oracle is None else oracle.variance
        variance = variance.flatten().sort().values
        variance = torch.cat([variance[::128], variance[-20:]])
        modes = dp.GaussianScore(torch.zeros_like(variance), var=variance, sde=prior.sde)
        cells = []
        for calls in (16, 24):
            usual = dp.DPMSolver(calls, eta=1.0)
            both = (usual, dp.FittedLevels(usual).prepared(model))
            worst = [float((response(modes, s)[1] / variance - 1).abs().max()) for s in both]
            cells.append(", ".join(f"{w:.1%}" for w in worst))
        print(f"| {name} | " + " | ".join(cells) + " |")


def galaxies(options: argparse.Namespace) -> None:
    """Draws what is missing, and prints the table."""
    prior = dp.optimize(dp.load_prior(options.prior)).with_shape((1, options.size, options.size))
    posterior = galaxy(prior)

    # runs of another prior, size or number of draws may share --out
    runs = options.out / f"{Path(options.prior).name}-{options.size}"

    def draws(name: str, n: int, sampler: dp.Sampler, seed: int) -> dp.Samples:
        folder = runs / f"{name}-seed-{seed}-draws-{n}"
        return dp.sample(posterior, n, sampler, seed=seed, batch_size=16, checkpoint=folder)

    steps = options.reference
    many = draws(f"reference-{steps}", 2 * options.draws, dp.DPMSolver(steps, eta=1.0), 0)
    reference = many.x
    halves = [torch.randperm(len(reference), generator=_generator(k)) for k in range(_SPLITS)]
    pairs = [(reference[p[: options.draws]], reference[p[options.draws :]]) for p in halves]
    floor = sum(sliced_wasserstein(a, b) for a, b in pairs) / _SPLITS
    scatter = torch.tensor([sliced_wasserstein(a, b) for a, b in pairs]).std() / floor
    print(f"{len(reference)} draws of {steps} calls; one floor scatters by {float(scatter):.2f}")
    print(
        "| sampler | calls | VJPs | sliced W1 / floor | PQMass p | reduced chi2 | scatter / reference's |"
    )
    print("|---|---|---|---|---|---|---|")
    print(_line("reference", many, posterior, 1.0, "", 1.0))
    for name in (name for name in samplers(16) if options.only in name):
        for calls in options.calls:
            x = draws(f"{name}-{calls}", options.draws, samplers(calls)[name], options.seed)
            distance = sum(sliced_wasserstein(x.x, a) for a, _ in pairs) / _SPLITS / floor
            p = pqmass(x.x, reference, cells=20, tessellations=50).p_value
            scale = float(x.std.square().mean().sqrt() / many.std.square().mean().sqrt())
            print(_line(f"`{name}`", x, posterior, distance, f"{p:.3f}", scale), flush=True)


def _line(
    name: str, x: dp.Samples, posterior: dp.Posterior, distance: float, p: str, scale: float
) -> str:
    fit = float(dp.chi2(x, posterior.likelihood).reduced.mean())
    return f"| {name} | {x.calls} | {x.vjps:.0f} | {distance:.2f} | {p} | {fit:.3f} | {scale:.2f} |"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("problem", choices=("field", "galaxies"))
    parser.add_argument("--prior", default="galaxies-64")
    parser.add_argument("--size", type=int, default=32, help="pixels on a side")
    parser.add_argument(
        "--draws", type=int, default=32, help="of a sampler; twice as many of the reference"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draws; 0 is the reference's")
    parser.add_argument("--reference", type=int, default=1000, help="calls of the reference")
    parser.add_argument("--calls", type=int, nargs="*", default=CALLS)
    parser.add_argument("--only", default="", help="samplers that have this in their name")
    parser.add_argument("--out", type=Path, default=Path("runs/error_by_calls"))
    options = parser.parse_args()
    if options.problem == "field":
        field()
        others()
    else:
        galaxies(options)


if __name__ == "__main__":
    main()
