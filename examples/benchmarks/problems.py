"""Fields, textures and the point lens: every method, with what each problem says of its draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffpost.diagnostics import sliced_wasserstein, sliced_wasserstein_floor
from diffpost.guidance import (
    DPS,
    Convolved,
    IsotropicCovariance,
    LocalCovariance,
    MomentMatching,
    PiGDM,
    SpectralCovariance,
)
from diffpost.oracles import OBSERVATIONS, AsNetwork, observed_field, ring, textures
from diffpost.oracles.observed_field import ObservedField
from diffpost.oracles.ring import RingOracle
from diffpost.oracles.textures import TextureOracle
from diffpost.samplers import MALA, DPMSolver, EulerMaruyama, Heun, Langevin, SplitGibbs, TwistedSMC
from diffpost.score import ScoreModel

from . import peers
from .drawing import Draws, Method, Setting, found_ends, judged, ours
from .results import Record, Task

FIELD, TEXTURES, RING = "field", "textures", "ring"
FIELD_ENDS = (2e-3, 80.0)
TEXTURE_ENDS = (5e-3, 200.0)
TEXTURE_SEEDS = 8
TEXTURE_DRAWS = 256
RING_SEEDS = 8
RING_DRAWS = 1000


def solver(steps: int) -> Callable[[Setting], DPMSolver]:
    return lambda s: DPMSolver(steps, order=2, eta=1.0, nsr_min=s.ends[0], nsr_max=s.ends[1])


# --- Gaussian fields ---


@functools.lru_cache(maxsize=2)
def field(observation: str, size: int) -> ObservedField:
    return observed_field(observation, size)


def field_draws(observation: str, size: int) -> int:
    """Fewer where they take long."""
    return 64 if observation == "dense" or size > 64 else 256


def field_setting(observation: str, size: int) -> Setting:
    o = field(observation, size)
    draws = field_draws(observation, size)
    return Setting(AsNetwork(o.prior), o.likelihood, FIELD_ENDS, draws, batch=64)


def spectra(size: int, powers: list[Tensor], nsr_max: float) -> SpectralCovariance:
    """What a trained prior tabulates: the mean spectrum of its denoising error, here of Gaussian fields.

    Args:
        size: pixels on a side.
        powers: of the fields, (size, size) each, alike in number.
        nsr_max: of the table.
    """
    k = torch.arange(size // 2 + 1, dtype=torch.float64)
    rows = torch.stack([p.double()[0, : size // 2 + 1] for p in powers])
    slope = (rows[:, -1] / rows[:, -2]).log() / (k[-1] / k[-2]).log()
    corner = torch.tensor([0.71 * size], dtype=torch.float64)
    last = rows[:, -1:] * (corner / k[-1]) ** slope[:, None]
    table, axis = torch.cat([rows, last], 1), torch.cat([k, corner]) / size
    fine = torch.linspace(0, 0.71, 400, dtype=torch.float64)
    place = (torch.searchsorted(axis, fine, right=True) - 1).clamp(0, len(axis) - 2)
    part = (fine - axis[place]) / (axis[place + 1] - axis[place])
    dense = torch.lerp(table[:, place].log(), table[:, place + 1].log(), part).exp()
    nsr = torch.logspace(-2.7, torch.tensor(nsr_max).log10().item(), 60, dtype=torch.float64)
    errors = 1 / (1 / dense[:, None] + nsr[:, None] ** -2)
    return SpectralCovariance(nsr, fine, errors.mean(0))


def local(table: SpectralCovariance, prior: ScoreModel) -> LocalCovariance:
    """The table with errors that may follow the brightness; on a stationary field they do not."""
    image = torch.zeros(1, *prior.shape, dtype=torch.float64)
    times = [prior.sde.t_of_nsr(nsr) for nsr in table.nsr]
    size = torch.stack([table.spectrum(image, prior, t).mean() for t in times]).sqrt()
    brightness = torch.tensor([0.01, 10.0])
    return LocalCovariance(table, table.nsr, brightness, size[:, None].expand(-1, 2), 1.5)


def covariances(
    prior: ScoreModel, table: SpectralCovariance, variance: float, steps: int
) -> dict[str, Method]:
    """Moment matching with the exact Jacobian, and with models of it, differentiated and not."""
    exact = ours(MomentMatching(tol=1e-3, precondition=table), solver(steps))
    found = {f"MomentMatching, {steps}": exact}
    models = {
        "isotropic": IsotropicCovariance(variance),
        "spectral": table,
        "local": local(table, prior),
    }
    for name, model in models.items():
        for differentiate in (True, False):
            guidance = MomentMatching(tol=1e-3, covariance=model, differentiate=differentiate)
            label = "" if differentiate else ", no VJP"
            found[f"MomentMatching {name}{label}, {steps}"] = ours(guidance, solver(steps))
    return found


def field_methods(observation: str, size: int, steps: int) -> dict[str, Method]:
    power = field(observation, size).prior.eigenvalues
    table = spectra(size, [power], 80.0)
    prior = field(observation, size).prior
    free = MomentMatching(tol=1e-3, covariance=table, differentiate=False)
    found = covariances(prior, table, 1.0, steps)
    largest = float(power.max())
    moves = max(steps // 8, 2)
    levels = 12
    found |= {
        f"MomentMatching spectral, no VJP, Heun, {steps}": ours(
            free, lambda s: Heun(steps // 2, nsr_min=s.ends[0], nsr_max=s.ends[1])
        ),
        f"MomentMatching spectral, no VJP + MALA, {steps}": ours(
            free, lambda s: MALA(moves, start=solver(steps - 4 * moves)(s), nsr=0.005)
        ),
        f"SplitGibbs, {4 * steps}": ours(
            None,
            lambda s: SplitGibbs(
                4 * steps // levels,
                coupling=0.05,
                first=20.0,
                reverse=DPMSolver(levels, order=2, eta=1.0, nsr_min=s.ends[0]),
            ),
        ),
        f"PiGDM, prior's largest variance, {steps}": ours(PiGDM(variance=largest), solver(steps)),
        f"PiGDM, {steps}": ours(PiGDM(), solver(steps)),
        f"DPS, {steps}": ours(DPS(), solver(steps)),
        f"Convolved, {steps}": ours(Convolved(tol=1e-4), solver(steps)),
        f"Convolved, Euler-Maruyama, {steps}": ours(
            Convolved(tol=1e-4),
            lambda s: EulerMaruyama(steps, nsr_min=s.ends[0], nsr_max=s.ends[1]),
        ),
    }
    for name in peers.AZULA:
        if name.split()[1] not in ("PGDM", "TDS"):  # a pseudo-inverse, and few data
            found[f"{name}, {steps}"] = peers.azula(name, steps, 1.0)
    return found


def field_report(o: ObservedField, draws: Draws) -> Record:
    report = o.report(draws.x)
    return {
        "mean_error": report.mean_error,
        "floor": report.floor,
        "ratios": list(report.ratios),
        "errors": list(report.errors),
    }


def field_tasks(
    size: int, observations: tuple[str, ...], steps: int, only: tuple[str, ...] = ()
) -> Iterator[Task]:
    """Names of methods begin with one of ``only``, where it is given."""
    for observation in observations:
        problem = f"{observation},{size}"
        yield Task(
            FIELD,
            problem,
            "exact",
            0,
            functools.partial(
                lambda o, n: field_report(
                    field(o, size), Draws(field(o, size).exact_draws(n, 9), None, 0, 0, {})
                ),
                observation,
                field_draws(observation, size),
            ),
        )
        for name in _names(steps):
            if not only or name.startswith(only):
                yield Task(
                    FIELD,
                    problem,
                    name,
                    0,
                    judged(
                        functools.partial(_late, observation, size, steps, name),
                        functools.partial(field_setting, observation, size),
                        functools.partial(
                            lambda o, draws: field_report(field(o, size), draws), observation
                        ),
                    ),
                )


@functools.cache
def _names(steps: int) -> list[str]:
    """Of the methods, which are the same for every field; the problems are made late."""
    return list(field_methods("psf", 64, steps))


def _late(observation: str, size: int, steps: int, name: str, setting: Setting) -> Draws:
    return field_methods(observation, size, steps)[name](setting)


def fields(quick: bool = False) -> Iterator[Task]:
    if quick:
        yield from field_tasks(64, ("psf",), 16, ("MomentMatching spectral, no VJP, 16",))
        return
    yield from field_tasks(64, ("psf",), 64)
    yield from field_tasks(64, OBSERVATIONS[1:], 64)
    yield from field_tasks(128, ("psf", "mask", "heteroscedastic", "correlated"), 64)


def field_pareto() -> Iterator[Task]:
    for steps in (16, 32, 128):
        yield from field_tasks(64, ("psf",), steps)


# --- two textures ---


@functools.lru_cache(maxsize=2)
def texture(seed: int) -> TextureOracle:
    return textures(seed=seed)


def texture_setting(seed: int) -> Setting:
    o = texture(seed)
    return Setting(o.prior, o.likelihood, TEXTURE_ENDS, TEXTURE_DRAWS, batch=64, seed=500 + seed)


def texture_methods(steps: int) -> dict[str, Method]:
    prior = texture(0).prior
    powers = [f.eigenvalues.double().reshape(32, 32) for f in prior.fields]
    table = spectra(32, powers, 200.0)
    largest = float(torch.stack(powers).max())
    moves = max(steps // 8, 2)
    found = covariances(prior, table, 1.0, steps)
    return found | {
        f"MomentMatching + MALA, {steps}": ours(
            MomentMatching(tol=1e-3, precondition=table),
            lambda s: MALA(moves, start=solver(steps - 4 * moves)(s), nsr=0.005),
        ),
        f"SplitGibbs, {8 * steps}": ours(
            None,
            lambda s: SplitGibbs(
                8 * steps // 16,
                coupling=0.1,
                first=20.0,
                reverse=DPMSolver(16, order=2, eta=1.0, nsr_min=s.ends[0]),
            ),
        ),
        f"PiGDM, prior's largest variance, {steps}": ours(PiGDM(variance=largest), solver(steps)),
        f"DPS, {steps}": ours(DPS(), solver(steps)),
        f"Convolved, {steps}": ours(Convolved(tol=1e-4), solver(steps)),
        **{
            f"{name}, {steps}": peers.azula(name, steps, 1.0)
            for name in peers.AZULA
            if name.split()[1] not in ("PGDM", "TDS")
        },
    }


def texture_report(o: TextureOracle, x: Tensor) -> Record:
    """The weight of the first texture, and moments given the texture, in units of their floors.

    ``share`` is the mean probability of the first texture, with its error for as many exact draws in ``sigma``. Moments
    are given the texture that a draw most likely is of, where at least 16 draws are of it, averaged over textures by their
    exact weights: ``mean_error`` is the RMS error of the mean, with ``floor``; ``ratios`` the variances in bands.
    """
    share = o.share(x)
    exact = float(o.weights[0])
    assigned = (share < 0.5).long()
    error = floor = total = 0.0
    bands = torch.zeros(3, dtype=torch.float64)
    side = x.shape[-1]
    frequency = torch.fft.fftfreq(side, 1 / side, dtype=torch.float64)
    k = torch.hypot(frequency[:, None], frequency[None, :])
    inside = [(k >= low) & (k < high) for low, high in ((0, 4), (4, 12), (12, 99))]
    for j in range(2):
        mine = x[assigned == j]
        if len(mine) < 16:
            continue
        weight = float(o.weights[j])
        off = mine.mean(0) - o.means[j]
        modes = torch.fft.fft2(mine - mine.mean(0), norm="ortho").abs().square().sum((0, 1))
        ratio = modes / (len(mine) - 1) / o.variances[j]
        bands += weight * torch.stack([ratio[b].mean() for b in inside])
        error += weight * float(off.square().mean().sqrt())
        floor += weight * float((o.variances[j].mean() / len(mine)).sqrt())
        total += weight
    told: Record = {"share": float(share.mean()), "exact_share": exact}
    told["sigma"] = (exact * (1 - exact) / len(x)) ** 0.5
    if total > 0:
        told |= {
            "mean_error": error / total,
            "floor": floor / total,
            "ratios": (bands / total).tolist(),
        }
    return told


def texture_tasks(seeds: range, steps: int = 64) -> Iterator[Task]:
    for name, method in {"exact": None, **texture_methods(steps)}.items():
        for seed in seeds:
            if method is None:
                yield Task(TEXTURES, "32", name, seed, functools.partial(_exact_texture, seed))
                continue
            yield Task(
                TEXTURES,
                "32",
                name,
                seed,
                judged(
                    method,
                    functools.partial(texture_setting, seed),
                    functools.partial(
                        lambda seed, draws: texture_report(texture(seed), draws.x), seed
                    ),
                ),
            )


def _exact_texture(seed: int) -> Record:
    return texture_report(texture(seed), texture(seed).exact_draws(TEXTURE_DRAWS, 9))


# --- the point lens ---


@functools.lru_cache(maxsize=2)
def lens(seed: int) -> RingOracle:
    return ring(seed=seed)


@functools.lru_cache(maxsize=2)
def lens_setting(seed: int) -> Setting:
    o = lens(seed)
    ends = found_ends(o.prior, o.likelihood)
    return Setting(o.prior, o.likelihood, ends, RING_DRAWS, seed=700 + seed)


def lens_methods(steps: int) -> dict[str, Method]:
    moves = max(steps // 8, 2)
    peer = ("azula DPS", "azula MMPS, 4 iterations", "azula TDS", "azula JFPS")
    return {
        f"TwistedSMC, {steps}": ours(None, lambda s: TwistedSMC(RING_DRAWS, steps - 1)),
        f"MomentMatching, {steps}": ours(MomentMatching(), solver(steps)),
        f"MomentMatching + MALA, {steps}": ours(
            MomentMatching(),
            lambda s: MALA(moves, start=solver(steps - 4 * moves)(s), nsr=s.ends[0]),
        ),
        f"MomentMatching + Langevin, {steps}": ours(
            MomentMatching(),
            lambda s: Langevin(
                steps // 2, start=solver(steps // 2)(s), nsr=s.ends[0], step_size=0.1
            ),
        ),
        f"PiGDM, {steps}": ours(PiGDM(), solver(steps)),
        f"DPS, {steps}": ours(DPS(), solver(steps)),
        f"Convolved, {steps}": ours(Convolved(), solver(steps)),
        **{f"{name}, {steps}": peers.azula(name, steps, 1.0) for name in peer},
    }


def lens_report(o: RingOracle, x: Tensor, weights: Tensor | None) -> Record:
    w = torch.full((len(x),), 1 / len(x), dtype=torch.float64) if weights is None else weights
    mean = w @ x
    cov = (w[:, None] * (x - mean)).T @ (x - mean)
    root = torch.linalg.cholesky(o.cov)
    off = torch.linalg.solve_triangular(root, (mean - o.mean)[:, None], upper=False)
    white = torch.linalg.solve_triangular(
        root, torch.linalg.solve_triangular(root, cov, upper=False).T, upper=False
    )
    sets = [
        sliced_wasserstein(x, o.exact_draws(len(x), 1 + i), 200, seed=i, x_weights=weights)
        for i in range(4)
    ]
    return {
        "mean_off": float(off.norm()),  # in standard deviations of the posterior
        "variances": torch.linalg.eigvalsh(white).tolist(),  # over the exact ones
        "distance": sum(sets) / len(sets),
    }


def _exact_lens(seed: int) -> Record:
    o = lens(seed)
    floor = sliced_wasserstein_floor(o.exact_draws, RING_DRAWS, repeats=20, slices=200, seed=seed)
    told = lens_report(o, o.exact_draws(RING_DRAWS, 99), None)
    return {**told, "distance": floor.mean}


def lens_tasks(seeds: range, steps: int = 100) -> Iterator[Task]:
    for seed in seeds:
        yield Task(RING, "2", "exact", seed, functools.partial(_exact_lens, seed))
        for name, method in lens_methods(steps).items():
            yield Task(
                RING,
                "2",
                name,
                seed,
                judged(
                    method,
                    functools.partial(lens_setting, seed),
                    functools.partial(
                        lambda seed, draws: lens_report(lens(seed), draws.x, draws.weights), seed
                    ),
                ),
            )
