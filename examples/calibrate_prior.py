"""Are the error bars right?  Deconvolve known galaxies and compare the errors with the draws' scatter.

    python examples/calibrate_prior.py galaxies-64 --data DATA

DATA is the folder that examples/prepare_galaxies.py wrote.  Two kinds of truth are blurred by a Gaussian PSF, noise is
added, and two draws are made of each posterior, as `diffpost deconvolve` makes them: held-out galaxies, on which the
prior and the sampler are judged together, and draws of the prior itself, for which the prior is right by construction and
only the sampler is judged.  A posterior draw and the truth are exchangeable, so that

    ratio = (E |draw - truth|^2 / E |draw - other draw|^2)^1/2

is 1 where the posterior is calibrated, above it where the error bars are too small; in all and by bands of wavenumber.
Errors are the scatter over bootstrapped sets of galaxies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from judge_prior import heldout_crops
from torch import Tensor

import diffpost as dp
from diffpost.deconvolve import default_inference
from diffpost.jobs.instruments import gaussian_psf
from diffpost.random import normal
from diffpost.training_config import TrainConfig

BANDS = ((0.0, 1e9), (0.0, 4.0), (4.0, 12.0), (12.0, 1e9))  # cycles per frame


def ratios(truth: Tensor, x: Tensor) -> list[tuple[float, float]]:
    """For truths (n, 1, H, W) and pairs of draws (n, 2, 1, H, W): the ratio in each band, and its error."""
    n, size = len(truth), truth.shape[-1]
    k = size * torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.fftfreq(size)[None, :])
    error = torch.fft.fft2(x - truth[:, None]).abs().square().mean((1, 2))
    other = torch.fft.fft2(x[:, 0] - x[:, 1]).abs().square().mean(1)
    picks = torch.randint(n, (400, n), generator=torch.Generator().manual_seed(0))
    found = []
    for low, high in BANDS:
        band = ((k >= low) & (k < high)).to(error.dtype)
        a, b = ((power * band).sum((-2, -1)) for power in (error, other))
        spread = (a[picks].mean(1) / b[picks].mean(1)).sqrt().std()
        found.append((float((a.mean() / b.mean()).sqrt()), float(spread)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prior", help="name or folder of a prior")
    parser.add_argument("--data", type=Path, required=True, help="folder of prepared galaxies")
    parser.add_argument("--galaxies", type=int, default=12)
    parser.add_argument(
        "--settings",
        nargs="+",
        default=["1.5:0.003", "1.5:0.03", "4.2:0.0023"],
        metavar="PSF:NOISE",
        help="sigma of the PSF in pixels and of the noise in network units",
    )
    options = parser.parse_args()
    prior = dp.load_prior(options.prior)
    n = options.galaxies
    own = dp.sample(prior, n, dp.DPMSolver(64, eta=1.0), seed=77, progress=False).x.float()
    config = TrainConfig.from_dict(prior.card["training"]["config"])
    crops = heldout_crops(config, options.data, n, prior.shape[-1], seed=5)
    truths = {"held-out galaxies": crops, "draws of the prior": own}
    print("| truth | PSF | noise | reduced chi2 | all | k < 4 | 4-12 | >= 12 | error of the mean |")
    print("|---|---|---|---|---|---|---|---|---|")
    for setting in options.settings:
        width, noise = (float(v) for v in setting.split(":"))
        operator = dp.Convolve(gaussian_psf(width))
        for name, truth in truths.items():
            z = normal(9, torch.arange(n), 0, tuple(truth.shape[1:]))
            y = (operator(truth) + noise * z).repeat_interleave(2, 0)
            likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=noise))
            guidance, sampler = default_inference(prior, likelihood)
            draws = dp.sample(
                dp.Posterior(prior, likelihood, guidance), 2 * n, sampler, seed=0, batch_size=24
            )
            chi2 = float(((y - operator(draws.x)) / noise).square().mean())
            x = draws.x.reshape(n, 2, *truth.shape[1:]).double()
            cells = [f"{value:.2f} ± {spread:.2f}" for value, spread in ratios(truth.double(), x)]
            off = (x.mean(1) - truth).square().mean((1, 2, 3)) / truth.square().mean((1, 2, 3))
            print(
                f"| {name} | {width:g} | {noise:g} | {chi2:.2f} | {' | '.join(cells)} | "
                f"{float(off.sqrt().median()):.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
