"""`diffpost bench`: the kernels' times on a GPU beside those of a model, or the model alone.

A measured time is the median of many, by CUDA events. "eager" has the cost of calling from Python in it, which
is longer than most of these kernels; "graph" is a replayed CUDA graph of several calls, and so what the device
needs. The model is arithmetic on bytes, operations and launches (`diffpost.kernels._model`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console

    from diffpost.kernels._workloads import Workload

__all__ = ["difference", "run_bench"]

_REPEATS = 100
_CALLS = 20  # in a CUDA graph


def run_bench(device: str, console: Console) -> None:
    """Print the table.

    Raises:
        ValueError: a device other than cpu and cuda, cuda without a GPU, or without triton.
    """
    try:
        from diffpost.kernels._model import H100
        from diffpost.kernels._runtime import INTERPRETED, triton
        from diffpost.kernels._workloads import workloads
    except ImportError as error:  # a torch that is too old for triton's operations
        raise ValueError(str(error)) from error

    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"got --device {device}; expected cpu, for the model alone, or cuda")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "--device cuda: torch sees no GPU here, so that nothing can be measured; --device cpu prints the "
                "model"
            )
        if triton is None:
            raise ValueError(
                "--device cuda: kernels need triton, which is not installed: pip install 'diffpost[triton]'"
            )
        if INTERPRETED:
            raise ValueError("--device cuda: unset TRITON_INTERPRET, which runs kernels on the CPU")
    rows = workloads(device)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("operation", no_wrap=True)
    for name in ("MB", "Mflop", "launches", "model µs", "of limit"):
        table.add_column(name, justify="right", no_wrap=True)
    if kind == "cuda":
        for name in ("graph µs", "eager µs", "reference µs", "faster", "difference"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = model_cells(row)
        if kind == "cuda":
            with torch.cuda.device(torch.device(device)):
                cells += measured_cells(row)
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"\nThe model is of an {H100.name}: {H100.bandwidth / 1e12:g} TB/s, {H100.rate / 1e12:g} TFLOP/s, "
        f"{H100.overhead * 1e6:g} µs a launch. It was not measured."
    )
    if kind == "cuda":
        console.print(
            f"Measured on {torch.cuda.get_device_name(device)}: medians of {_REPEATS}; graph: one of {_CALLS} calls "
            "in a replayed CUDA graph; faster: reference over eager; difference: of kernel and reference, of the "
            "largest value."
        )
    else:
        console.print("Nothing was measured: --device cuda measures on a GPU.")


def model_cells(row: Workload) -> list[str]:
    """Name, bytes, operations, launches, time and share of the limit."""
    cost = row.cost
    return [
        row.name,
        f"{cost.bytes / 1e6:.2f}",
        f"{cost.flops / 1e6:.1f}",
        str(cost.launches),
        f"{cost.time() * 1e6:.1f}",
        f"{cost.share():.0%}",
    ]


def measured_cells(row: Workload) -> list[str]:
    """Times of kernel and reference on the current GPU, and by how much their results differ."""
    apart = difference(row.kernel(), row.reference())
    eager, reference = seconds(row.kernel), seconds(row.reference)
    return [
        f"{seconds(captured(row.kernel)) / _CALLS * 1e6:.1f}",
        f"{eager * 1e6:.1f}",
        f"{reference * 1e6:.1f}",
        f"{reference / eager:.1f} x",
        f"{apart:.0e}",
    ]


def difference(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest, of the largest value of each result."""
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True)
    )


def seconds(call: Callable[[], Any]) -> float:
    """The median time of a call by CUDA events."""
    for _ in range(10):
        call()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """Several calls as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiled and allocated before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS):
            call()
    return graph.replay
