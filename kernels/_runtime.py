"""Where triton is optional: what the modules of kernels import in its place, and when a kernel runs.

A kernel runs on tensors of a GPU where triton is installed, and under triton's interpreter
(TRITON_INTERPRET=1 before the first import) on tensors of the CPU, which is how kernels are tested
without a GPU. Everywhere else an operation is its plain-torch reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "blocks",
    "jit",
    "power_of_two",
    "runs_kernel",
    "tl",
    "triton",
    "triton_op",
    "warps",
    "wrap_triton",
]

if triton is not None and not hasattr(torch.library, "triton_op"):
    raise ImportError(
        f"diffpost.kernels needs torch 2.6 or newer beside triton, found {torch.__version__}; nothing else "
        "of diffpost needs it"
    )

INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself, which nothing then calls."""
    return function if triton is None else triton.jit(function)


def triton_op(name: str) -> Callable[[Callable[..., Any]], Any]:
    """`torch.library.triton_op`, or an operation that is its reference where triton is not installed."""

    def define(function: Callable[..., Any]) -> Any:
        if triton is not None:
            return torch.library.triton_op(name, function, mutates_args=())
        operation = torch.library.custom_op(name, function, mutates_args=())
        operation.register_fake(function)
        return operation

    return define


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on x launches its kernel."""
    return triton is not None and (x.device.type == "cuda" or INTERPRETED)


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, which older versions of torch refuse for interpreted kernels."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def blocks(n: int, block: int) -> int:
    """How many blocks cover n elements."""
    return -(-n // block)


def power_of_two(n: int) -> int:
    """The smallest that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def warps(threads: int, lanes: int | None = None) -> int:
    """Of a program of so many threads: AMD's have 64 lanes, NVIDIA's 32."""
    if lanes is None:
        lanes = 64 if torch.version.hip else 32
    return max(1, threads // lanes)
