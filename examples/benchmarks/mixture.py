"""The Gaussian mixture of MCGDiff: mean sliced W1 against exact draws, beside that of two exact sets."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from diffpost.diagnostics import sliced_wasserstein, sliced_wasserstein_floor
from diffpost.guidance import DPS, Convolved, MomentMatching, PiGDM
from diffpost.oracles import MixtureOracle, gaussian_mixture
from diffpost.samplers import MALA, DPMSolver, EulerMaruyama, Sampler, SplitGibbs, TwistedSMC

from . import peers
from .drawing import Draws, Method, Setting, found_ends, judged, ours
from .results import Record, Task

PART = "mixture"
SIZES = (8, 80, 800)
DATA = (1, 2, 4)
DRAWS = 1000
SLICES = 500
SETS = 8  # exact sets that the draws are compared with
PAIRS = 20  # of exact sets, for the floor
VARIANCE = 129.0  # of a pixel of the prior, with equal weights: 1 + 64 (0 + 1 + 1 + 4 + 4)/5


@functools.lru_cache(maxsize=4)
def oracle(size: int, data: int, seed: int) -> MixtureOracle:
    return gaussian_mixture(size, data, seed)


@functools.lru_cache(maxsize=4)
def setting(size: int, data: int, seed: int, n: int = DRAWS) -> Setting:
    o = oracle(size, data, seed)
    return Setting(o.prior, o.likelihood, found_ends(o.prior, o.likelihood), n, seed=1000 + seed)


def distance(o: MixtureOracle, draws: Draws) -> Record:
    n = len(draws.x)
    values = [
        sliced_wasserstein(
            draws.x, o.exact_draws(n, 1 + i), SLICES, seed=i, x_weights=draws.weights
        )
        for i in range(SETS)
    ]
    return {"distance": sum(values) / len(values)}


def floor(size: int, data: int, seed: int, n: int = DRAWS) -> Record:
    """Mean distance of pairs of exact sets."""
    o = oracle(size, data, seed)
    return {
        "distance": sliced_wasserstein_floor(
            o.exact_draws, n, repeats=PAIRS, slices=SLICES, seed=100 + seed
        ).mean
    }


def solver(steps: int) -> Method | object:
    """DPMSolver with the noise of the reverse SDE between the setting's ends."""

    def make(s: Setting) -> Sampler:
        return DPMSolver(steps, order=2, eta=1.0, nsr_min=s.ends[0], nsr_max=s.ends[1])

    return make


def euler(steps: int) -> object:
    return lambda s: EulerMaruyama(steps, nsr_min=s.ends[0], nsr_max=s.ends[1])


def mala(start: int, moves: int) -> object:
    return lambda s: MALA(moves, start=solver(start)(s), nsr=s.ends[0])


def gibbs(moves: int, levels: int) -> object:
    """The coupling adds 6% to the noise's variance where A is strongest."""

    def make(s: Setting) -> Sampler:
        noise, matrix = s.likelihood.noise, s.likelihood.operator.matrix
        coupling = 0.25 * float(noise.variance.sqrt()) / float(torch.linalg.matrix_norm(matrix, 2))
        low = min(s.ends[0], 0.1 * coupling)
        return SplitGibbs(
            moves,
            coupling=max(coupling, 2 * low),
            first=s.ends[1],
            reverse=DPMSolver(levels, order=2, eta=1.0, nsr_min=max(low, 1e-3)),
        )

    return make


def smc(steps: int, particles: int = DRAWS) -> Method:
    return ours(None, lambda s: TwistedSMC(particles, steps))


# 300 calls a draw: of 1,000 particles, all of them draws, or 100 each of 3,000, of which a third is kept
WHOLE, THINNED = "TwistedSMC, 300", "TwistedSMC, 3 x 100"


def smc_thinned(steps: int, particles: int) -> Method:
    """TwistedSMC with ``particles`` for every draw that is kept."""
    return ours(None, lambda s: TwistedSMC(particles * s.n, steps), particles)


def methods(steps: int = 100) -> dict[str, Method]:
    """By name; every one with about ``steps`` denoiser calls."""
    chain = steps // 2
    levels = max(steps // 10, 2)
    return {
        f"TwistedSMC, {steps}": smc(steps - 1),
        f"MomentMatching, {steps}": ours(MomentMatching(), solver(steps)),
        f"MomentMatching + MALA, {steps}": ours(
            MomentMatching(), mala(steps - 4 * (chain // 4), chain // 4)
        ),
        f"SplitGibbs, {steps}": ours(None, gibbs(steps // levels, levels)),
        f"PiGDM, {steps}": ours(PiGDM(), solver(steps)),
        f"PiGDM, prior's variance, {steps}": ours(PiGDM(variance=VARIANCE), solver(steps)),
        f"DPS, {steps}": ours(DPS(), solver(steps)),
        f"Convolved, {steps}": ours(Convolved(), solver(steps)),
        f"Convolved, Euler-Maruyama, {steps}": ours(Convolved(), euler(steps)),
        **{f"{name}, {steps}": peers.azula(name, steps, VARIANCE) for name in peers.AZULA},
        f"{peers.CONVOLVED}, {steps}": peers.score_models(steps),
    }


def task(size: int, data: int, seed: int, name: str, method: Method, n: int = DRAWS) -> Task:
    return Task(
        PART,
        f"{size},{data}",
        name,
        seed,
        judged(
            method,
            lambda: setting(size, data, seed, n),
            lambda draws: distance(oracle(size, data, seed), draws),
        ),
    )


def floors(size: int, data: int, seeds: range) -> Iterator[Task]:
    for seed in seeds:
        yield Task(
            PART, f"{size},{data}", "exact", seed, functools.partial(floor, size, data, seed)
        )


def headline(seeds: range) -> Iterator[Task]:
    """The table of TwistedSMC at 300 calls a draw, with its floors."""
    for size in SIZES:
        for data in DATA:
            yield from floors(size, data, seeds)
            for seed in seeds:
                yield task(size, data, seed, THINNED, smc_thinned(99, 3))
                yield task(size, data, seed, WHOLE, smc(299))


def others(seeds: range) -> Iterator[Task]:
    for size in SIZES:
        for data in DATA:
            for seed in seeds:
                for name, method in methods().items():
                    yield task(size, data, seed, name, method)


PARETO = ("80,2", (25, 50, 100, 200, 400))


def pareto(seeds: range) -> Iterator[Task]:
    """Every method at several step counts on (80, 2)."""
    for steps in PARETO[1]:
        for name, method in methods(steps).items():
            for seed in seeds:
                yield task(80, 2, seed, name, method)
