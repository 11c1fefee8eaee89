"""Where the time of a posterior sample goes: the ten largest costs.

    python examples/profile_sample.py [galaxies-64] [--draws 8]

A galaxy drawn from the prior is blurred by a Gaussian PSF of 1.5 pixels, noise of 0.03 is added, and its posterior is drawn as
`diffpost deconvolve` draws it, under torch's profiler. Shares are of the time inside operations, each without what it calls.
"""

from __future__ import annotations

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

import diffpost as dp
from diffpost.deconvolve import default_inference
from diffpost.jobs.instruments import gaussian_psf
from diffpost.random import normal


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("prior", nargs="?", default="galaxies-64")
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--top", type=int, default=10)
    options = parser.parse_args()
    prior = dp.optimize(dp.load_prior(options.prior))
    truth = dp.sample(prior, 1, dp.DPMSolver(32, eta=1.0), seed=1, progress=False).x
    operator = dp.Convolve(gaussian_psf(1.5))
    z = normal(2, torch.arange(1), 0, tuple(prior.shape), truth.dtype)
    y = (operator(truth) + 0.03 * z)[0]
    likelihood = dp.Likelihood(y, operator, dp.GaussianNoise(std=0.03))
    guidance, sampler = default_inference(prior, likelihood)
    posterior = dp.Posterior(prior, likelihood, guidance)

    def draw() -> dp.Samples:
        return dp.sample(posterior, options.draws, sampler, seed=0, progress=False)

    draws = draw()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        draw()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    print(f"{draws.calls} calls and {draws.vjps:.0f} VJPs a draw, {options.draws} draws")
    print("| operation | share | calls |")
    print("|---|---|---|")
    for event in events[: options.top]:
        print(f"| {event.key} | {event.self_cpu_time_total / total:.1%} | {event.count} |")


if __name__ == "__main__":
    main()
