"""Error against cost: docs/images/pareto.png."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from . import problems, tables
from .tables import DIVERGED, VJP, Records

MARKS = "osD^vPX<>hp*"


def cost_of(calls: float, vjps: float) -> float:
    """Forward passes of a network: a VJP adds 1.7."""
    return calls + VJP * vjps


def curves(
    found: dict[str, list[dict[str, Any]]], error: Any
) -> dict[str, list[tuple[float, float]]]:
    """By method, (cost, error) in order of cost."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, rows in found.items():
        value = error(rows)
        calls, vjps = tables.cost(rows)
        if name != "exact" and math.isfinite(value) and value < DIVERGED and calls == calls:
            lines.setdefault(tables.bare(name), []).append((cost_of(calls, vjps), value))
    return {name: sorted(points) for name, points in lines.items()}


def draw(path: Path, records: Records) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    found = tables.select(records, "mixture", "80,2")
    exact = found.get("exact", [])
    field = tables.select(records, problems.FIELD, "psf,64")
    panels = {
        "Mixture of 25 modes, (80, 2)": (
            curves(found, lambda rows: mean(tables.ratios(rows, exact) or [math.inf])),
            "mean sliced W1 / Monte Carlo floor",
        ),
        "Gaussian field, 64 × 64, PSF": (
            curves(field, lambda rows: tables.field_ratio(rows[0])),
            "error of the mean / Monte Carlo floor",
        ),
    }
    names = sorted({name for lines, _ in panels.values() for name in lines})
    palette = plt.get_cmap("tab20")
    looks = {
        name: {"marker": MARKS[i % len(MARKS)], "color": palette(i % 20)}
        for i, name in enumerate(names)
    }
    figure, axes = plt.subplots(1, 2, figsize=(13, 8), layout="constrained")
    for axis, (title, (lines, label)) in zip(axes, panels.items(), strict=True):
        best = sorted(lines, key=lambda name: lines[name][-1][1])
        for name in best:
            theirs = name.startswith(("azula", "score_models"))
            axis.plot(
                *zip(*lines[name], strict=True),
                **looks[name],
                linestyle=":" if theirs else "-",
                markersize=6,
                linewidth=1.3,
                label=name,
            )
        axis.axhline(1, color="0.5", linewidth=0.8, zorder=0)
        axis.set(xscale="log", yscale="log", title=title, ylabel=label)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel("cost of a draw, forward passes of a network (a VJP counts 1.7)")
        if lines:
            axis.legend(
                fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1), frameon=False
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
