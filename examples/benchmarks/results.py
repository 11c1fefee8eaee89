"""Results in a file of JSON lines, one for each problem and method, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[str, str, str, int]


@dataclass(frozen=True)
class Task:
    """One method on one problem.

    Attributes:
        part: the section of docs/benchmarks.md.
        problem: within the part.
        method: its name in the tables.
        seed: of the problem.
        run: gives the numbers.
    """

    part: str
    problem: str
    method: str
    seed: int
    run: Callable[[], Record] = field(compare=False)

    @property
    def key(self) -> Key:
        return (self.part, self.problem, self.method, self.seed)

    @property
    def name(self) -> str:
        return f"{self.part} | {self.problem} | {self.method} | seed {self.seed}"


def key_of(record: Record) -> Key:
    return (record["part"], record["problem"], record["method"], int(record["seed"]))


def load(*paths: Path) -> dict[Key, Record]:
    """Records by key; later ones win. A last line that was cut off is left out."""
    records: dict[Key, Record] = {}
    for path in paths:
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            line = line.strip().strip(",")
            if not line.startswith("{"):
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            records[key_of(record)] = record
    return records


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(record) + "\n")


def store(path: Path, records: Iterable[Record]) -> None:
    """All records as one JSON array, sorted, a line each, four digits."""
    rows = sorted(records, key=lambda r: (r["part"], r["problem"], r["method"], r["seed"]))
    text = ",\n".join(json.dumps(_short(row), separators=(",", ":")) for row in rows)
    path.write_text(f"[\n{text}\n]\n")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_short(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
