"""How benchmarks compare two calls in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

Call = Callable[[], object]


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture(scope="session")
def asked_for(pytestconfig: pytest.Config) -> None:
    """For benchmarks of minutes, which a run of the whole suite leaves out."""
    if not pytestconfig.getoption("benchmark_only"):
        pytest.skip("takes minutes: pytest --benchmark-only")


@pytest.fixture(scope="session")
def ratio() -> Callable[..., float]:
    """Median of the time of one call over that of another, in pairs after one that warms up."""

    def of(slow: Call, fast: Call, pairs: int = 3) -> float:
        return statistics.median([_seconds(slow) / _seconds(fast) for _ in range(pairs + 1)][1:])

    return of
