"""Prints the table of docs/oracle.md: every guidance and sampler on a problem whose posterior is
known exactly.

python examples/oracle_table.py [--draws 256] [--seed 1] [--only NAME]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterator

import torch

from diffpost.diagnostics import chi2
from diffpost.guidance import (
    DPS,
    Convolved,
    Guidance,
    IsotropicCovariance,
    LocalCovariance,
    MomentMatching,
    PiGDM,
    SpectralCovariance,
)
from diffpost.instrument import NonFiniteError
from diffpost.oracles import AsNetwork, FieldOracle, gaussian_field
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import (
    AdaptiveLevels,
    DPMSolver,
    EulerMaruyama,
    FittedLevels,
    Heun,
    PredictorCorrector,
    Sampler,
)


def error_spectra(oracle: FieldOracle) -> SpectralCovariance:
    """What a trained prior can tabulate: the spectrum of its denoising error at each noise level."""
    size = oracle.truth.shape[-1]
    k = torch.linspace(0, 0.71, 200, dtype=torch.float64)
    power = float(oracle.prior.eigenvalues[0, 0]) * (k * size).clamp_min(1) ** -3.0
    nsr = torch.logspace(-2.7, 1.91, 60, dtype=torch.float64)
    return SpectralCovariance(nsr, k, 1 / (1 / power + nsr[:, None] ** -2))


def local_errors(oracle: FieldOracle, spectra: SpectralCovariance) -> LocalCovariance:
    """The same as the job's table, whose errors follow the brightness; on a stationary field they do not."""
    image = torch.zeros(1, *oracle.truth.shape[-3:], dtype=torch.float64)
    times = [oracle.prior.sde.t_of_nsr(nsr) for nsr in spectra.nsr]
    means = torch.stack([spectra.spectrum(image, oracle.prior, t).mean() for t in times])
    brightness = torch.tensor([0.01, 10.0])
    return LocalCovariance(
        spectra, spectra.nsr, brightness, means.sqrt()[:, None].expand(-1, 2), 1.5
    )


SAMPLERS: dict[str, Sampler] = {
    "EulerMaruyama(64)": EulerMaruyama(64),
    "PredictorCorrector(32)": PredictorCorrector(32),
    "Heun(32)": Heun(32),
    "Heun(32, churn=3.2)": Heun(32, churn=3.2),
    "DPMSolver(64, order=2)": DPMSolver(64, order=2),
    "DPMSolver(64)": DPMSolver(64),
    "DPMSolver(64, eta=1)": DPMSolver(64, eta=1.0),
    "DPMSolver(32)": DPMSolver(32),
    "DPMSolver(32, eta=1)": DPMSolver(32, eta=1.0),
}

FEWER: dict[str, Sampler] = {
    "DPMSolver(24)": DPMSolver(24),
    "DPMSolver(24, eta=1)": DPMSolver(24, eta=1.0),
    "FittedLevels(DPMSolver(24, eta=1))": FittedLevels(DPMSolver(24, eta=1.0)),
    "DPMSolver(16)": DPMSolver(16),
    "DPMSolver(16, eta=1)": DPMSolver(16, eta=1.0),
    "FittedLevels(DPMSolver(16, eta=1))": FittedLevels(DPMSolver(16, eta=1.0)),
    "FittedLevels(DPMSolver(12))": FittedLevels(DPMSolver(12)),
    "AdaptiveLevels(DPMSolver(2), rtol=0.02)": AdaptiveLevels(DPMSolver(2), rtol=0.02),
}


def cases(oracle: FieldOracle) -> Iterator[tuple[str, str, Posterior, Sampler]]:
    """Names of guidance and sampler, and what they stand for."""
    guidances: dict[str, Guidance] = {
        "`MomentMatching()`": MomentMatching(),
        "`MomentMatching(covariance=IsotropicCovariance(1), differentiate=False)`": MomentMatching(
            covariance=IsotropicCovariance(1.0), differentiate=False
        ),
        "`PiGDM()`": PiGDM(),
        "`PiGDM(variance=400)`": PiGDM(variance=400.0),
        "`Convolved()`": Convolved(),
        "`DPS()`": DPS(),
        "`DPS(normalise=False)`": DPS(normalise=False),
    }
    for guidance_name, guidance in guidances.items():
        for sampler_name, sampler in SAMPLERS.items():
            yield guidance_name, sampler_name, oracle.posterior(guidance), sampler
    for sampler_name, sampler in FEWER.items():
        yield "in fewer calls: `MomentMatching()`", sampler_name, oracle.posterior(), sampler
    yield "`DPS()`", "EulerMaruyama(1000)", oracle.posterior(DPS()), EulerMaruyama(1000)
    spectra = error_spectra(oracle)
    network = AsNetwork(oracle.prior)
    by_vjp: dict[str, Guidance] = {
        "as a network: `MomentMatching()`": MomentMatching(),
        "as a network: `MomentMatching(tol=0.01)`": MomentMatching(tol=0.01),
        "as a network: `MomentMatching(precondition=spectra)`": MomentMatching(
            precondition=spectra
        ),
        "as a network: `MomentMatching(covariance=spectra)`": MomentMatching(covariance=spectra),
        "as a network: `MomentMatching(covariance=spectra, differentiate=False)`": MomentMatching(
            covariance=spectra, differentiate=False
        ),
    }
    for guidance_name, guidance in by_vjp.items():
        posterior = Posterior(network, oracle.likelihood, guidance)
        yield guidance_name, "DPMSolver(32)", posterior, SAMPLERS["DPMSolver(32)"]
    job = MomentMatching(
        tol=1e-3,
        covariance=local_errors(oracle, spectra),
        differentiate=False,
        accuracy=0.05,
        enlarge=True,
    )
    for sampler_name in ("DPMSolver(32)", "DPMSolver(32, eta=1)", "DPMSolver(64, eta=1)"):
        posterior = Posterior(network, oracle.likelihood, job)
        yield "as a network: what the job does", sampler_name, posterior, SAMPLERS[sampler_name]


def row(oracle: FieldOracle, posterior: Posterior, sampler: Sampler, n: int, seed: int) -> str:
    """One line of the table, without its names."""
    try:
        draws = sample(posterior, n, sampler, seed, batch_size=64, progress=False)
    except NonFiniteError:
        return "diverges | | | | | | "
    report = oracle.report(draws.x)
    if report.mean_error > 1e4 * report.floor:
        return "diverges | | | | | | "
    numbers = [_short(report.mean_error / report.floor), *map(_short, report.ratios)]
    fit = chi2(draws, oracle.likelihood).reduced.mean()
    return " | ".join([*numbers, _short(float(fit)), str(draws.calls), f"{draws.vjps:g}"])


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="rows whose guidance has this in its name")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("error")
    oracle = gaussian_field()
    exact = oracle.report(oracle.exact_draws(arguments.draws, arguments.seed))
    errors = ", ".join(f"{e:.3f}" for e in exact.errors)
    print(
        f"Monte Carlo error of the variance ratios: {errors}; floor of the mean {exact.floor:.2e}\n"
    )
    print(
        "| guidance | sampler | mean error / floor | var k<4 | var 4-12 | var k>=12 | chi2/m "
        "| calls | VJPs |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    numbers = [_short(exact.mean_error / exact.floor), *map(_short, exact.ratios)]
    print(f"| exact draws | – | {' | '.join(numbers)} | | | |")
    start = time.perf_counter()
    for guidance_name, sampler_name, posterior, sampler in cases(oracle):
        if arguments.only not in guidance_name:
            continue
        line = row(oracle, posterior, sampler, arguments.draws, arguments.seed)
        print(f"| {guidance_name} | `{sampler_name}` | {line} |", flush=True)
    minutes = math.ceil((time.perf_counter() - start) / 60)
    print(f"\n{arguments.draws} draws each, seed {arguments.seed}, {minutes} min.")


if __name__ == "__main__":
    main()
