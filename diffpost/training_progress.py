"""The progress bar of a training run."""

from __future__ import annotations

from types import TracebackType
from typing import Self, final

__all__ = ["TrainingBar"]


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
