"""`diffpost bench`, as the command line sees it."""

from __future__ import annotations

from typing import Annotated

import typer

from diffpost.jobs.console import bad_input, console

__all__ = ["bench"]


def bench(
    device: Annotated[
        str, typer.Option(help="cuda measures on a GPU; cpu prints the model alone.")
    ] = "cpu",
) -> None:
    """What the GPU kernels cost: a model's times and, on a GPU, measured ones beside them."""
    with bad_input():
        from diffpost.jobs.bench import run_bench

        run_bench(device, console())
