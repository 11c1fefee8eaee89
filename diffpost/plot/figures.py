"""What all pictures share: a figure without global state, how it is written, and the ink."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "PAPER", "new_figure", "write"]

INK, MUTED, PAPER = "#1b1b1f", "#55555f", "white"


def new_figure(width: float, height: float) -> Figure:
    # A figure of its own, not pyplot's: no global state, and no display is needed.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def write(figure: Figure, path: str | os.PathLike[str] | None, dpi: int) -> None:
    if path is not None:
        figure.savefig(Path(path), dpi=dpi, facecolor=PAPER)
