"""Prints the table of docs/oracle.md: every guidance and sampler on a problem whose posterior is
known exactly.

python examples/oracle_table.py [--draws 256] [--seed 1]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch

from diffpost.diagnostics import chi2
from diffpost.guidance import (
    DPS,
    Convolved,
    Guidance,
    IsotropicCovariance,
    MomentMatching,
    PiGDM,
)
from diffpost.instrument import NonFiniteError
from diffpost.oracles import FieldOracle, gaussian_field
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, EulerMaruyama, Heun, PredictorCorrector, Sampler

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
GUIDANCES: dict[str, Guidance] = {
    "MomentMatching()": MomentMatching(),
    "MomentMatching(covariance=IsotropicCovariance(1))": MomentMatching(
        covariance=IsotropicCovariance(1.0)
    ),
    "the same, differentiate=False": MomentMatching(
        covariance=IsotropicCovariance(1.0), differentiate=False
    ),
    "PiGDM()": PiGDM(),
    "Convolved()": Convolved(),
    "DPS()": DPS(),
    "DPS(scale=0.1)": DPS(scale=0.1),
}


def row(oracle: FieldOracle, guidance: Guidance, sampler: Sampler, n: int, seed: int) -> str:
    """One line of the table, without its names."""
    try:
        draws = sample(oracle.posterior(guidance), n, sampler, seed, batch_size=64, progress=False)
    except NonFiniteError as error:
        return f"diverges in {error.term.split(' DPS')[0]} | | | | | | "
    report = oracle.report(draws.x)
    numbers = [f"{report.mean_error / report.floor:.2f}", *(f"{r:.3f}" for r in report.ratios)]
    fit = chi2(draws, oracle.likelihood).reduced.mean()
    return " | ".join([*numbers, f"{float(fit):.2f}", str(draws.calls), f"{draws.vjps:g}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1)
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
    numbers = [f"{exact.mean_error / exact.floor:.2f}", *(f"{r:.3f}" for r in exact.ratios)]
    print(f"| exact draws | – | {' | '.join(numbers)} | | | |")
    start = time.perf_counter()
    for guidance_name, guidance in GUIDANCES.items():
        for sampler_name, sampler in SAMPLERS.items():
            line = row(oracle, guidance, sampler, arguments.draws, arguments.seed)
            print(f"| {guidance_name} | {sampler_name} | {line} |", flush=True)
    minutes = math.ceil((time.perf_counter() - start) / 60)
    print(f"\n{arguments.draws} draws each, seed {arguments.seed}, {minutes} min.")


if __name__ == "__main__":
    main()
