"""What `diffpost calibrate` does with its options, and what it tells at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffpost.calibrate import design, perform
from diffpost.deconvolve import load, sampler_of
from diffpost.guidance import DPS, Convolved, Guidance, MomentMatching, PiGDM
from diffpost.io.checkpoints import load_prior
from diffpost.jobs.calibration_page import FAULTS, write_calibration
from diffpost.jobs.instruments import read_operator
from diffpost.jobs.outputs import OutputFolder
from diffpost.samplers import DPMSolver

if TYPE_CHECKING:
    from diffpost.calibrate import Calibration

__all__ = ["CalibrationPlan", "guidance_of", "run_calibration"]


@final
@dataclass(frozen=True)
class CalibrationPlan:
    """The options of the command, by their names."""

    prior: str
    operator: list[str] | None
    psf: Path | None
    noise_std: float
    size: int | None
    simulations: int
    samples: int
    truths: Path | None
    truth_steps: int
    method: str
    steps: int | None
    controls: bool
    level: float
    seed: int
    batch_size: int
    device: str


def guidance_of(method: str) -> Guidance | None:
    """The guidance of that name; None is what `default_inference` recommends.

    Raises
    ------
    ValueError: another name.
    """
    match method:
        case "recommended":
            return None
        case "moment-matching":
            return MomentMatching()
        case "pigdm":
            return PiGDM()
        case "dps":
            return DPS()
        case "convolved":
            return Convolved()
    raise ValueError(
        f"got --method {method!r}; expected recommended, moment-matching, pigdm, dps or convolved"
    )


def run_calibration(
    plan: CalibrationPlan,
    folder: OutputFolder,
    console: Console,
    command: list[str],
    arguments: dict[str, Any],
    *,
    resume: bool = False,
) -> Calibration:
    """Simulate, judge, write into `folder`, and tell the verdict.

    Raises
    ------
    ValueError, FileNotFoundError: settings that cannot be used; nothing is written.
    """
    if not plan.noise_std > 0:
        raise ValueError(f"got --noise-std {plan.noise_std:g}; expected a positive number")
    if not 0 < plan.level < 1:
        raise ValueError(f"got --level {plan.level:g}; expected a number between 0 and 1")
    prior = load(load_prior(plan.prior, device=_device(plan.device)))
    if plan.size is not None:
        prior = prior.with_shape((1, plan.size, plan.size))
    instrument = read_operator(
        plan.operator or (), tuple(prior.shape), psf=plan.psf, seed=plan.seed
    )
    scale = float(torch.as_tensor(prior.scale).double().mean())
    experiment = design(
        prior,
        instrument.operator,
        instrument.noise(plan.noise_std * scale),
        simulations=plan.simulations,
        samples=plan.samples,
        truths=plan.truths,
        guidance=guidance_of(plan.method),
        sampler=None if plan.steps is None else sampler_of(plan.steps),
        truth_sampler=DPMSolver(plan.truth_steps, eta=1.0),
        seed=plan.seed,
        batch_size=plan.batch_size,
        controls=plan.controls,
    )
    words = [f"[dim]·[/dim] {escape(text)}" for text in instrument.words]
    console.print("\n".join(words))
    result = perform(
        experiment,
        plan.simulations,
        level=plan.level,
        checkpoint=folder.start(resume=resume),
        announce=lambda text: console.print(f"[dim]·[/dim] {escape(text)}"),
    )
    files = {"psf": plan.psf, "truths": plan.truths}
    folder.publish(
        lambda new: write_calibration(
            result,
            new,
            command=command,
            arguments=arguments,
            inputs={name: str(path) for name, path in files.items() if path is not None},
            prior=plan.prior,
            operator=instrument.words,
        )
    )
    tell(console, result, folder.path)
    return result


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # how torch tells that it has no such device
        raise ValueError(f"cannot compute on --device {name!r}; expected cpu, or cuda") from error
    return device


def tell(console: Console, result: Calibration, path: Path) -> None:
    """The verdict, in a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("test", "p-value", "adjusted", ""):
        table.add_column(name, style="bold cyan" if name == "test" else "", no_wrap=True)
    for test in result.tests:
        said = "[red]rejected[/red]" if test.rejected else "passed"
        table.add_row(escape(test.name), f"{test.p_value:.2g}", f"{test.adjusted:.2g}", said)
    console.print()
    console.print(table)
    ratio, error = result.error_over_spread
    console.print(
        f"\nerror of the mean over what the draws claim: {ratio:.2f} ± {error:.2f}; 1 where calibrated"
    )
    # Spoilt draws that were wrong before show no power.
    for control, tests in result.controls.items() if result.calibrated else ():
        found = [test.name for test in tests if test.rejected]
        text = f"found by {', '.join(found)}" if found else "[yellow]not found[/yellow]"
        console.print(f"control, {FAULTS[control]}: {text}")
    verdict = (
        f"[green]no test rejects[/green] at a level of {result.level:g} for all together"
        if result.calibrated
        else f"[red]not calibrated[/red], at a level of {result.level:g} for all tests together"
    )
    console.print(
        f"\n{result.simulations} simulations x {result.experiment.samples} draws: {verdict}. In "
        f"[bold]{escape(str(path))}[/bold]: report.html, verdict.json, coverage.png, ranks.png, "
        "simulations.npz"
    )
