"""What a training run tells while it goes on: a bar, and tables of losses that survive a kill."""

from __future__ import annotations

import csv
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self, final

__all__ = ["TrainingBar", "append_row", "truncate_rows"]


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Adds a row to a CSV file, which gets its header from the first."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def truncate_rows(path: Path, seen: int) -> None:
    """Drops the rows that were written after the checkpoint: the run writes them again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    # A kill in the middle of a write leaves a short last row, or no row at all.
    if seen == 0 or not rows:
        path.unlink()
        return
    column = rows[0].index("images")
    kept = [r for r in rows[1:] if len(r) == len(rows[0]) and int(r[column]) <= seen]
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", newline="") as file:
        csv.writer(file).writerows([rows[0], *kept])
    os.replace(name, path)


@final
class TrainingBar:
    """Shows images seen, the running loss and the time left; silent when not enabled."""

    def __init__(self, total: int, seen: int, *, enabled: bool) -> None:
        self.total, self.seen, self.enabled = total, seen, enabled
        self._mean: float | None = None

    def __enter__(self) -> Self:
        if self.enabled:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                TextColumn("{task.completed:,} of {task.total:,} images, loss {task.fields[loss]}"),
                TimeRemainingColumn(),
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "", total=self.total, completed=self.seen, loss="-"
            )
        return self

    def __call__(self, seen: int, loss: float) -> None:
        self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
        if self.enabled:
            self._progress.update(self._task, completed=seen, loss=f"{self._mean:.4f}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.enabled:
            self._progress.stop()
