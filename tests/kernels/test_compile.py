"""Every kernel compiled ahead of time for three devices, and what the compiler made of it within its budget."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="pip install 'diffpost[triton]'")

from diffpost.kernels._budgets import BUDGETS
from diffpost.kernels._cases import cases, half_cases
from diffpost.kernels._compile import TARGETS, Budget, Case, faults, inspect
from diffpost.kernels._runtime import jit, tl

CASES = cases()
NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
GENEROUS = Budget(256, 1e9, 0, 0, 1000, 1000)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_within_budget(case, target):
    found = inspect(case, target)
    assert found.instructions > 1 and found.registers > 8
    assert found.loads + found.narrow_loads > 0
    assert not faults(found, BUDGETS[case.name][target])


def test_every_budget_has_its_kernel():
    assert {case.name for case in CASES} == set(BUDGETS)
    assert all(set(budgets) == set(TARGETS) for budgets in BUDGETS.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", half_cases(), ids=lambda case: case.name)
def test_half_precision_compiles_without_spills(case, target):
    """bfloat16, which the interpreter rounds wrongly: nothing else here sees it."""
    found = inspect(case, target)
    assert found.instructions > 1 and found.loads > 0
    assert not faults(found, GENEROUS)


@jit
def _cosine(x, out, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.cos(tl.load(x + place)))


@jit
def _copy(x, out, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(x + place, place < n), place < n)


@jit
def _add_atomically(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.atomic_add(out + place % 16, tl.load(x + place))


def _pointers(kernel, block, threads, length=None, divisor=":16"):
    arguments = {"x": f"*fp32{divisor}", "out": f"*fp32{divisor}", "BLOCK": block}
    if length is not None:
        arguments["n"] = length
    return Case(kernel.__name__, kernel, arguments, threads, block)


@pytest.mark.parametrize("target", NVIDIA)
def test_the_stack_of_a_cosine_is_refused(target):
    """Range reduction of large arguments: no spill, but a stack in local memory."""
    found = inspect(_pointers(_cosine, 1024, 128), target)
    wrong = faults(found, GENEROUS)
    assert found.stack > 0 and any("stack" in line for line in wrong)
    assert any("local" in line for line in wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_spills_are_refused(target):
    """512 values a thread do not fit into registers."""
    lanes = 32 if target in NVIDIA else 64
    wrong = faults(inspect(_pointers(_hoard, 512 * lanes, lanes), target), GENEROUS)
    assert any("spill" in line for line in wrong)


@jit
def _hoard(x, out, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    value = tl.load(x + place)
    tl.store(out + place, value / tl.sum(value * value))


@pytest.mark.parametrize("target", TARGETS)
def test_narrow_accesses_are_refused(target):
    """A length that is not known to be divisible by 16 makes every access scalar."""
    budget = Budget(64, 100, 1, 1, 0, 0)
    assert not faults(inspect(_pointers(_copy, 1024, 128, "i32:16"), target), budget)
    wrong = faults(inspect(_pointers(_copy, 1024, 128, "i32"), target), budget)
    assert {"128-bit loads", "128-bit stores"} <= {line.split(" = ")[0] for line in wrong}
    assert any(line.startswith("narrow_loads") for line in wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_registers_and_instructions_above_the_budget_are_refused(target):
    found = inspect(_pointers(_copy, 1024, 128, "i32:16"), target)
    exact = Budget(found.registers, found.instructions, found.loads, found.stores, 0, 0)
    assert not faults(found, exact)
    for name in ("registers", "instructions"):
        tight = replace(exact, **{name: getattr(found, name) - 1})
        assert re.match(name, faults(found, tight)[0])


@pytest.mark.parametrize("target", TARGETS)
def test_float_atomics_are_seen(target):
    found = inspect(_pointers(_add_atomically, 1024, 128), target)
    assert found.float_atomics > 0
    assert inspect(_pointers(_copy, 1024, 128, "i32:16"), target).atomics == 0


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="sm_80"):
        inspect(_pointers(_cosine, 1024, 128), "h100")
    with pytest.raises(ValueError, match="the kernel takes"):
        inspect(_pointers(_copy, 1024, 128), "sm_80")
