"""Posteriors of a few parameters: every one, and every pair of them.

Contours hold 68% and 95% of the draws (not the 39% and 86% of one and two sigma in two dimensions). They are those of a
histogram smoothed by about a bin, whose width follows the draws' scatter and number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from diffpost.parameters.result import JointSamples
from diffpost.plot.figures import INK, MUTED, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    Draws = JointSamples | Tensor | NDArray[np.float64]
    Value = float | tuple[float, float] | tuple[float, float, float]

__all__ = ["corner"]

Array = NDArray[np.float64]

LEVELS = (0.68, 0.95)
_COLORS = ("#0b5fa5", "#c8501e", "#3f7d4e")
_TRUTH, _PUBLISHED = "#1b1b1f", "#b3479b"
_PANEL = 1.75  # inches


def corner(
    draws: Draws | Mapping[str, Draws],
    names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    truth: Mapping[str, float] | None = None,
    published: Mapping[str, Value] | None = None,
    title: str | None = None,
    dpi: int = 130,
) -> Figure:
    """A corner plot: densities of one parameter on the diagonal, of two below it.

    Parameters
    ----------
    draws: joint samples, or (..., P) draws; or up to three of them by name.
    names: of the parameters to show, in order; default those of the joint samples, else numbers.
    path: file to write (PNG, PDF, ...).
    labels: what stands at the axes, by name of the parameter, such as its symbol and unit.
    truth: values to mark by black lines, by name.
    published: values to mark in purple, by name: a number, (value, error) or (value, minus, plus).
    title: above the picture.
    dpi: of a bitmap.

    Raises
    ------
    ValueError: nothing to show, more than three sets of draws, an unknown name, or draws of other shapes.
    """
    several = dict(draws) if isinstance(draws, Mapping) else {"": draws}
    if not 0 < len(several) <= len(_COLORS):
        raise ValueError(f"corner: got {len(several)} sets of draws; expected 1 to {len(_COLORS)}.")
    sets, shown = _chosen(several, names)
    for what, given in (("labels", labels), ("truth", truth), ("published", published)):
        unknown = sorted(set(given or {}) - set(shown))
        if unknown:
            raise ValueError(
                f"corner: {what} of {', '.join(unknown)}, but the parameters shown are {', '.join(shown)}."
            )
    marks = {k: (float(v), 0.0, 0.0) for k, v in (truth or {}).items()}
    beside = {k: _value(k, v) for k, v in (published or {}).items()}
    p = len(shown)
    ranges = [
        _range([s[:, i] for s in sets.values()], marks.get(name), beside.get(name))
        for i, name in enumerate(shown)
    ]
    text = [(labels or {}).get(name, name) for name in shown]
    legend = [name for name in sets if name]
    above = 0.28 + (0.3 if title else 0.0) + (0.26 if legend and p < 3 else 0.0)
    width, height = _PANEL * p + 1.0, _PANEL * p + 0.75 + above
    figure = new_figure(width, height)
    grid = figure.add_gridspec(
        p,
        p,
        left=0.8 / width,
        right=1 - 0.2 / width,
        bottom=0.75 / height,
        top=1 - above / height,
        wspace=0.07,
        hspace=0.07,
    )
    for i in range(p):
        for j in range(i + 1):
            ax = figure.add_subplot(grid[i, j])
            for color, values in zip(_COLORS, sets.values(), strict=False):
                if i == j:
                    _one(ax, values[:, i], ranges[i], color)
                else:
                    _two(ax, values[:, j], values[:, i], ranges[j], ranges[i], color)
            _mark(ax, i, j, shown, marks, beside)
            ax.set_xlim(*ranges[j])
            if i == j:
                ax.set_ylim(bottom=0)
                if len(sets) == 1:
                    ax.set_title(_summary(next(iter(sets.values()))[:, i]), fontsize=9, color=INK)
            else:
                ax.set_ylim(*ranges[i])
            _axes(ax, text[j] if i == p - 1 else "", text[i] if i > j == 0 else "", i == j)
    _legend(figure, legend, bool(truth), bool(published), p)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, x=0.5, y=1 - 0.1 / height, va="top")
    write(figure, path, dpi=dpi)
    return figure


def _chosen(
    several: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, Array], list[str]]:
    """(n, P) draws of each set, of the parameters to show."""
    sets: dict[str, Array] = {}
    shown: list[str] = list(names) if names is not None else []
    for name, one in several.items():
        if isinstance(one, JointSamples):
            values, known = one.flat.double().cpu().numpy(), list(one.names)
        else:
            values = np.asarray(one.detach().cpu() if hasattr(one, "detach") else one, dtype=float)
            values = values.reshape(-1, values.shape[-1]) if values.ndim > 1 else values[:, None]
            known = list(names) if names is not None else [f"{i}" for i in range(values.shape[-1])]
            if values.shape[1] != len(known):
                raise ValueError(
                    f"corner: got draws of {values.shape[1]} parameters and {len(known)} names."
                )
        shown = shown or known
        unknown = [n for n in shown if n not in known]
        if unknown:
            raise ValueError(f"corner: no parameter {unknown[0]!r}; there are {', '.join(known)}.")
        values = values[:, [known.index(n) for n in shown]]
        if len(values) < 8 or not np.isfinite(values).all():
            raise ValueError("corner: expected at least 8 draws, all of them finite.")
        sets[name] = values
    return sets, shown


def _value(name: str, given: Any) -> tuple[float, float, float]:
    """Value, minus and plus error."""
    numbers = (given,) if isinstance(given, int | float) else tuple(given)
    if len(numbers) not in (1, 2, 3) or not all(math.isfinite(v) for v in numbers):
        raise ValueError(
            f"corner: published {name} is {given!r}; expected a value, (value, error) or (value, minus, plus)."
        )
    value, *errors = (float(v) for v in numbers)
    minus, plus = (*errors, *errors)[:2] if errors else (0.0, 0.0)
    return value, abs(minus), abs(plus)


def _range(
    columns: Sequence[Array], *marks: tuple[float, float, float] | None
) -> tuple[float, float]:
    low = min(float(np.quantile(c, 0.002)) for c in columns)
    high = max(float(np.quantile(c, 0.998)) for c in columns)
    for mark in marks:
        if mark is not None:
            low, high = min(low, mark[0] - mark[1]), max(high, mark[0] + mark[2])
    margin = 0.08 * (high - low) or 1e-6 + 1e-3 * abs(low)
    return low - margin, high + margin


def _bins(columns: Sequence[Array], ranges: Sequence[tuple[float, float]]) -> list[int]:
    """Bins of a third of the scatter, finer for many draws."""
    fine = max(3.0, 0.9 * len(columns[0]) ** (1 / (2 + 2 * len(columns))))
    found = []
    for column, (low, high) in zip(columns, ranges, strict=True):
        inner = float(np.diff(np.quantile(column, (0.16, 0.84)))[0]) / 2 or (high - low) / 8
        found.append(int(np.clip(fine * (high - low) / inner, 16, 160)))
    return found


def _one(ax: Axes, values: Array, extent: tuple[float, float], color: str) -> None:
    (bins,) = _bins([values], [extent])
    density, edges = np.histogram(values, bins, extent, density=True)
    density = gaussian_filter(density.astype(float), 0.8, mode="constant")
    ax.stairs(density, edges, color=color, lw=1.4)
    ax.stairs(density, edges, color=color, alpha=0.15, fill=True)
    low, middle, high = np.quantile(values, (0.16, 0.5, 0.84))
    ax.axvline(middle, color=color, lw=1.0)
    for edge in (low, high):
        ax.axvline(edge, color=color, lw=0.8, ls=(0, (3, 3)))


def _two(
    ax: Axes,
    x: Array,
    y: Array,
    along: tuple[float, float],
    up: tuple[float, float],
    color: str,
) -> None:
    from matplotlib.colors import to_rgba

    bins = _bins([x, y], [along, up])
    density, edges_x, edges_y = np.histogram2d(x, y, bins, (along, up))
    density = gaussian_filter(density, 1.1, mode="constant").T
    levels = sorted({_level(density, share) for share in LEVELS})
    if len(levels) < 2 or levels[0] <= 0:  # too few draws for two contours
        ax.plot(x, y, ".", ms=1.5, color=color, alpha=0.5)
        return
    centres = [(e[1:] + e[:-1]) / 2 for e in (edges_x, edges_y)]
    top = max(float(density.max()), levels[-1]) * 1.001
    ax.contourf(
        *centres,
        density,
        levels=[*levels, top],
        colors=[to_rgba(color, 0.22), to_rgba(color, 0.55)],
    )
    ax.contour(*centres, density, levels=levels, colors=[color], linewidths=1.0)


def _level(density: Array, share: float) -> float:
    """The density above which this share of the draws lies."""
    ordered = np.sort(density.ravel())[::-1]
    held = np.cumsum(ordered)
    return float(ordered[np.searchsorted(held, share * held[-1])])


def _mark(
    ax: Axes,
    i: int,
    j: int,
    shown: Sequence[str],
    marks: Mapping[str, tuple[float, float, float]],
    beside: Mapping[str, tuple[float, float, float]],
) -> None:
    for values, color, style in ((beside, _PUBLISHED, "-"), (marks, _TRUTH, (0, (1, 1.5)))):
        for name, line, span in (
            (shown[j], ax.axvline, ax.axvspan),
            (shown[i] if i != j else "", ax.axhline, ax.axhspan),
        ):
            if name not in values:
                continue
            value, minus, plus = values[name]
            line(value, color=color, lw=1.3, ls=style, zorder=5)
            if minus + plus > 0:
                span(value - minus, value + plus, color=color, alpha=0.16, lw=0, zorder=0)


def _summary(values: Array) -> str:
    low, middle, high = np.quantile(values, (0.16, 0.5, 0.84))
    error = max(min(high - middle, middle - low), 1e-300)
    digits = int(np.clip(1 - math.floor(math.log10(error)), 0, 8))
    return rf"${middle:.{digits}f}_{{-{middle - low:.{digits}f}}}^{{+{high - middle:.{digits}f}}}$"


def _axes(ax: Axes, xlabel: str, ylabel: str, diagonal: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.tick_params(labelsize=8, color=MUTED, labelcolor=INK, direction="in", top=True, right=True)
    ax.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
    ax.yaxis.set_major_locator(MaxNLocator(3, prune="both"))
    if xlabel:
        ax.set_xlabel(xlabel, fontsize=9.5)
        ax.tick_params("x", labelrotation=35)
    else:
        ax.set_xticklabels([])
    if ylabel:
        ax.set_ylabel(ylabel, fontsize=9.5)
    if diagonal:
        ax.set_yticks([])
    elif not ylabel:
        ax.set_yticklabels([])


def _legend(
    figure: Figure, names: Sequence[str], truth: bool, published: bool, panels: int
) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, lw=2.5, label=name)
        for color, name in zip(_COLORS, names, strict=False)
    ]
    if truth:
        handles.append(Line2D([], [], color=_TRUTH, lw=1.3, ls=(0, (1, 1.5)), label="truth"))
    if published:
        handles.append(Line2D([], [], color=_PUBLISHED, lw=1.3, label="published"))
    if handles:
        figure.legend(
            handles=handles,
            loc="upper right",
            frameon=False,
            fontsize=9,
            bbox_to_anchor=(0.98, 0.96 if panels > 2 else 0.93),
        )
