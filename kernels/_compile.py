"""Compile kernels ahead of time, without a GPU, and say what the compiler made of them.

`triton.compile` needs a target, not a device. From its result this reads what decides the speed of a
memory-bound kernel and can be seen without running it: registers, spills, stack and local memory, the
width of every access, shared memory, and the number of instructions. On NVIDIA from the resource
usage and the SASS by `cuobjdump`, which is inside the package triton (its own count of spills does not
see a stack that a library function asked for); on AMD from the metadata and the text of the assembly.

`Case` is a kernel with the types it is launched with, `inspect` compiles it for a target, and `faults`
compares it with a `Budget`. Instructions are counted once where they stand, so that a loop counts as
one pass, and per element of that pass; an element's share of a thread is what it costs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from diffpost.kernels._runtime import INTERPRETED, triton, warps

__all__ = ["TARGETS", "Budget", "Case", "Resources", "faults", "inspect"]

TARGETS = ("sm_80", "sm_90", "gfx942")


@final
@dataclass(frozen=True)
class Case:
    """A kernel as it is launched.

    Args:
        name: what the tables call it.
        kernel: from `jit`.
        arguments: by name, a type ("*fp32" for a pointer, "i32", "fp32"; ":16" after it for divisible
            by 16), or the value of a constexpr.
        threads: of a program.
        elements: that a program (or one pass of its loop) works on.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    threads: int
    elements: int


@final
@dataclass(frozen=True)
class Budget:
    """The most that a compiled kernel may need, and the least of wide accesses it must have.

    Args:
        registers: of a thread.
        instructions: times threads, for each element.
        loads, stores: of 128 bits, at least.
        narrow_loads, narrow_stores: of fewer bits, at most (coefficients, gathers).
    """

    registers: int
    instructions: float
    loads: int
    stores: int
    narrow_loads: int = 0
    narrow_stores: int = 0


@final
@dataclass(frozen=True)
class Resources:
    """What the compiler made of a kernel; bytes and counts a thread, shared memory a program."""

    target: str
    registers: int
    spills: int
    stack: int
    local: int
    shared: int
    instructions: float
    loads: int
    stores: int
    narrow_loads: int
    narrow_stores: int
    atomics: int
    float_atomics: int


def inspect(case: Case, target: str) -> Resources:
    """Compile a case for "sm_80", "sm_90", "gfx942" or another of their kind.

    Raises:
        ValueError: without triton, under its interpreter, or for a target that is neither NVIDIA's nor AMD's.
    """
    if triton is None:
        raise ValueError("compiling kernels needs triton: pip install 'diffpost[triton]'")
    if INTERPRETED:
        raise ValueError(
            "triton cannot compile while TRITON_INTERPRET=1 is set; unset it and start again"
        )
    if not re.fullmatch(r"sm_\d+|gfx\w+", target):
        raise ValueError(f"got the target {target!r}; expected one such as {', '.join(TARGETS)}")
    nvidia = target.startswith("sm_")
    compiled = _compile(case, target, nvidia)
    read = _nvidia if nvidia else _amd
    return read(target, compiled, case.threads / case.elements)


def faults(found: Resources, budget: Budget) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    wrong = [
        f"{name} = {value}, must be 0"
        for name, value in (
            ("spills", found.spills),
            ("stack bytes", found.stack),
            ("local loads and stores", found.local),
        )
        if value
    ]
    for name in ("registers", "instructions", "narrow_loads", "narrow_stores"):
        if getattr(found, name) > getattr(budget, name):
            wrong.append(f"{name} = {getattr(found, name):g}, at most {getattr(budget, name):g}")
    for name in ("loads", "stores"):
        if getattr(found, name) < getattr(budget, name):
            wrong.append(
                f"128-bit {name} = {getattr(found, name)}, at least {getattr(budget, name)}"
            )
    return wrong


def _compile(case: Case, target: str, nvidia: bool) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    if set(names) != set(case.arguments):
        raise ValueError(
            f"{case.name}: got arguments {sorted(case.arguments)}; the kernel takes {sorted(names)}"
        )
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(names):
        given = case.arguments[name]
        if not isinstance(given, str):
            signature[name] = "constexpr"
            constants[(i,)] = given
            continue
        signature[name], _, divisor = given.partition(":")
        if divisor:
            attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    where = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    return triton.compile(
        source, target=where, options={"num_warps": warps(case.threads, where.warp_size)}
    )


def _nvidia(target: str, compiled: Any, share: float) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [str(tool), flag, str(binary)], check=True, capture_output=True, text=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    # "/*0010*/   @!P0 LDG.E.128.CONSTANT R4, ... ;"
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    code = [name for name in found if name.split(".")[0] != "NOP"]
    loads = [name for name in code if name.startswith(("LDG.", "LD.E"))]
    stores = [name for name in code if name.startswith(("STG.", "ST.E"))]
    atomics = [name for name in code if re.match(r"ATOM|RED(?!UX)", name)]
    return Resources(
        target=target,
        registers=numbers["REG"],
        spills=sum(name.startswith(("LDL", "STL")) for name in code),
        stack=numbers["STACK"],
        local=numbers["LOCAL"] + sum(name.startswith(("LDL", "STL")) for name in code),
        shared=compiled.metadata.shared,
        instructions=len(code) * share,
        loads=sum(".128" in name for name in loads),
        stores=sum(".128" in name for name in stores),
        narrow_loads=sum(".128" not in name for name in loads),
        narrow_stores=sum(".128" not in name for name in stores),
        atomics=len(atomics),
        float_atomics=sum(".F32" in name or ".F64" in name or ".F16" in name for name in atomics),
    )


def _amd(target: str, compiled: Any, share: float) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        match = re.search(rf"^\s*\.{key}:\s*(\d+)", text, re.MULTILINE)
        if match is None:
            raise ValueError(f"the assembly for {target} does not say .{key}")
        return int(match.group(1))

    code = re.findall(r"^\t([a-z][a-z0-9_]+)", text.split(".Lfunc_end0")[0], re.MULTILINE)
    loads = [name for name in code if re.match(r"(global|buffer|flat)_load_", name)]
    stores = [name for name in code if re.match(r"(global|buffer|flat)_store_", name)]
    atomics = [name for name in code if re.match(r"(global|buffer|flat)_atomic_", name)]
    local = sum(name.startswith("scratch_") for name in code)
    return Resources(
        target=target,
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        stack=number("private_segment_fixed_size"),
        local=local,
        shared=compiled.metadata.shared,
        instructions=len(code) * share,
        loads=sum(name.endswith("dwordx4") for name in loads),
        stores=sum(name.endswith("dwordx4") for name in stores),
        narrow_loads=sum(not name.endswith("dwordx4") for name in loads),
        narrow_stores=sum(not name.endswith("dwordx4") for name in stores),
        atomics=len(atomics),
        float_atomics=sum("_f32" in name or "_f64" in name or "_f16" in name for name in atomics),
    )
