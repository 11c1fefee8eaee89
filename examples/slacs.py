"""What the scripts of real lenses share: arguments, the run, and the table beside the published SLACS lens."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffpost.io.datasets import fetch
from diffpost.jobs.lens_outputs import write_lens
from diffpost.jobs.outputs import OutputFolder
from diffpost.jobs.problem import ImageLike
from diffpost.lens import LensResult, reconstruct_lens
from diffpost.plot.lens_summary import lens_summary

__all__ = ["arguments_of", "parser_of", "part", "reconstruct", "report", "run", "table"]

Published = Mapping[str, tuple[float, float, float]]
"""Value and 68% errors, plus and minus, by quantity."""


def parser_of(title: str, out: str, restarts: int) -> argparse.ArgumentParser:
    """Of the arguments that every lens has."""
    parser = argparse.ArgumentParser(description=f"{title}, end to end.")
    parser.add_argument("--prior", default="galaxies-32")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=None)
    parser.add_argument("--restarts", type=int, default=restarts)
    parser.add_argument("--turns", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--resume", action="store_true", help="Go on with an interrupted run.")
    return parser


def arguments_of(title: str, out: str, restarts: int) -> argparse.Namespace:
    """Of the command line."""
    parser = parser_of(title, out, restarts)
    parser.add_argument("--picture", type=Path, help="Also draw the summary into this file.")
    return parser.parse_args()


def part(name: str, which: str) -> Path:
    """The file of a lens' "data", "noise" or "psf", from the registry."""
    return fetch(f"{name}-{which}")


def run(
    arguments: argparse.Namespace,
    out: Path,
    title: str,
    data: ImageLike,
    psf: ImageLike,
    noise: ImageLike,
    model: Mapping[str, Any],
    **more: Any,
) -> LensResult:
    """Runs the job as the arguments say, and more of `reconstruct_lens`; writes what it found into the folder `out`."""
    folder = OutputFolder(out)
    folder.check(resume=arguments.resume)
    result = reconstruct_lens(
        data,
        psf,
        noise,
        model=model,
        prior=arguments.prior,
        samples=arguments.samples,
        chains=arguments.chains,
        draws=arguments.draws,
        warmup=arguments.warmup,
        restarts=arguments.restarts,
        turns=arguments.turns,
        seed=arguments.seed,
        batch_size=16,
        checkpoint=folder.start(resume=arguments.resume),
        title=title,
        announce=print,
        **more,
    )
    write_lens(folder, result)
    return result


def reconstruct(
    arguments: argparse.Namespace,
    title: str,
    name: str,
    model: Mapping[str, Any],
    noise: ImageLike,
    **more: Any,
) -> LensResult:
    """Runs the job, with more of `reconstruct_lens`, and writes what it found."""
    data, psf = part(name, "data"), part(name, "psf")
    result = run(arguments, arguments.out, title, data, psf, noise, model, **more)
    if arguments.picture is not None:
        lens_summary(result, arguments.picture)
    return result


def table(derived: Mapping[str, torch.Tensor], published: Published) -> str:
    """Quantities of every draw beside the published ones, in Markdown."""
    lines = ["| | here | Shajib et al. 2021 |", "|---|---|---|"]
    for name, values in derived.items():
        low, middle, high = torch.quantile(
            values, torch.tensor([0.16, 0.5, 0.84]).double()
        ).tolist()
        value, plus, minus = published[name]
        digits = 1 if name == "angle" else 4
        lines.append(
            f"| {name} | {middle:.{digits}f} +{high - middle:.{digits}f} −{middle - low:.{digits}f} | "
            f"{value:.{digits}f} +{plus:.{digits}f} −{minus:.{digits}f} |"
        )
    return "\n".join(lines)


def report(result: LensResult, derived: Mapping[str, torch.Tensor], published: Published) -> None:
    """Prints the table and the numbers of docs/lensing.md."""
    metrics = result.metrics
    chi2, mu, light = (metrics[k] for k in ("reduced_chi2", "magnification", "lens_light_flux"))
    print(table(derived, published))
    print(f"reduced chi2 inside the mask: {chi2['draws']:.3f} (1 +- {chi2['expected_std']:.3f})")
    print(f"magnification {mu['mean']:.1f} +- {mu['std']:.1f}")
    if light is not None:
        print(f"lens light on the image grid {light['mean']:.1f} +- {light['std']:.1f} e-/s")
    print(f"R-hat {metrics['rhat']:.3f}, effective size {metrics['ess']:.0f}")
    print(f"shift under the prior itself: {metrics['shift']}")
    print(f"seconds: {result.timings}")
