"""Does a prior's network agree with its own draws?  Add a little noise to them and take it away again.

    python examples/prior_turns.py galaxies-32

If the denoiser were the posterior mean of the draws themselves, adding noise of a level rho and following the reverse
diffusion from there down would give draws of the same distribution, turn after turn.  Printed is the power after some turns
over that before, by bands of wavenumber (cycles per frame): where it falls, the network takes part of what it drew for
noise.  Number of levels of the reverse diffusion: where it does not matter, time is not what is at fault.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

import diffpost as dp
from diffpost.random import normal
from diffpost.samplers.chain import reversed_from

BANDS = ((0, 2), (2, 4), (4, 8), (8, 12), (12, 1e9))


def power(x: Tensor) -> Tensor:
    """Mean power in each band of images (n, 1, N, N)."""
    size = x.shape[-1]
    k = size * torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :])
    modes = torch.fft.rfft2(x[:, 0].double(), norm="ortho").abs().square()
    return torch.stack([modes[:, (k >= low) & (k < high)].mean() for low, high in BANDS])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prior", help="name or folder of a prior")
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--rho", type=float, default=0.0285, help="noise of a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--levels", type=int, nargs="+", default=[8, 16, 32])
    options = parser.parse_args()
    prior = dp.load_prior(options.prior)
    n = options.draws
    first = dp.sample(prior, n, dp.DPMSolver(128, eta=1.0), seed=3, progress=False).x
    start = prior.to_model(first)
    before = power(start)
    bands = " | ".join(f"{low}-{high}" for low, high in BANDS[:-1])
    print(f"| levels | turns | {bands} | {BANDS[-1][0]} and above |")
    print("|---|---|" + "---|" * len(BANDS))

    def noise(turn: int, like: Tensor, stream: int = 0) -> Tensor:
        return normal(1000 * turn + stream, torch.arange(n), 0, tuple(like.shape[1:]), like.dtype)

    for levels in options.levels:
        x = start
        reverse = dp.DPMSolver(levels, order=2, eta=1.0)
        for turn in range(1, options.turns + 1):
            u = x + options.rho * noise(turn, x, stream=999)
            x = reversed_from(prior, u, options.rho, reverse, functools.partial(noise, turn))
            if turn in (1, options.turns):
                cells = " | ".join(f"{float(v):.4f}" for v in power(x) / before)
                print(f"| {levels} | {turn} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
