"""What tests of all folders share.

Seeds are fixed, so the suite passes or fails for good. With fresh seeds a right implementation would fail somewhere once
in 120 times or less often, as far as the tests state their rates (a bound by Bonferroni):

    diagnostics: p-values of nulls 0.2%, powers of controls 0.3%, the misspecification alarm 0.1%
    calibrations that must pass (tests/jobs/test_calibrate.py) 0.08%
    draws of closed forms and counters (test_score, test_random, test_sample) 0.09%
    samplers, guidances, lenses: moments at 4.5 to 5 Monte Carlo errors, 0.1%; learned noise 0.04%
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """A script of examples/ as a module, by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    return load
