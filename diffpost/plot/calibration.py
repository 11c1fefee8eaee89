"""Pictures of calibration: coverage curves, rank histograms, and the bands of exact posteriors.

Grey is where the whole curve of an exact posterior stays with the stated probability; a curve that
leaves it fails the test whose p-value stands in the title. Differences from the diagonal are shown
too, as a curve that hugs a diagonal hides them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from diffpost.diagnostics import Coverage, Ranks
from diffpost.plot.figures import INK, MUTED, new_figure, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["coverage", "ranks"]

_EXACT = "#d5d5da"
_LINES = ("#0b5fa5", "#c8501e", "#3f7d4e", "#8a4f9e", "#9a7b16", "#4a4a52")  # apart in grey, too
_BAR = "#8fb4d3"


def coverage(
    result: Coverage | Mapping[str, Coverage],
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """Expected coverage against credibility, and its difference from the diagonal.

    Parameters
    ----------
    result: one coverage, or several by name, up to six. The grey band is that of the one with the
        most simulations, so that of the others is wider; the coloured band about each curve is its bootstrap band.
    path: file to write (PNG, PDF, ...).
    title: above the picture.

    Raises
    ------
    ValueError: nothing to show, or more than six curves.
    """
    named = {"": result} if isinstance(result, Coverage) else dict(result)
    if not 0 < len(named) <= len(_LINES):
        raise ValueError(f"got {len(named)} curves; expected 1 to {len(_LINES)}")
    below = 0.62 + 0.24 * math.ceil((len(named) + 1) / 2)  # inches, for the legend
    figure = new_figure(10.4, 4.75 + below)
    grid = figure.add_gridspec(
        1,
        2,
        left=0.07,
        right=0.985,
        top=1 - 0.75 / (4.75 + below),
        bottom=below / (4.75 + below),
        wspace=0.2,
    )
    curve, difference = (figure.add_subplot(grid[0, i]) for i in range(2))
    most = max(named.values(), key=lambda c: c.sims)
    alpha = most.alpha.numpy()
    low, high = most.null_band.numpy()
    label = f"exact posterior, {most.level:.0%} of curves of {most.sims}"
    curve.fill_between(alpha, low, high, color=_EXACT, lw=0, label=label)
    difference.fill_between(alpha, low - alpha, high - alpha, color=_EXACT, lw=0)
    curve.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=(0, (4, 3)))
    difference.axhline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
    reach = float(np.abs(np.stack([low - alpha, high - alpha])).max())
    for color, (name, one) in zip(_LINES, named.items(), strict=False):
        a, ecp, (lower, upper) = one.alpha.numpy(), one.ecp.numpy(), one.band.numpy()
        count = "" if one.sims == most.sims else f", {one.sims} simulations"
        text = f"{name or 'coverage'}{count}, p = {_number(one.p_value)}"
        for ax, origin in ((curve, 0.0 * a), (difference, a)):
            ax.fill_between(a, lower - origin, upper - origin, color=color, alpha=0.18, lw=0)
            ax.plot(a, ecp - origin, color=color, lw=1.8, label=text)
        reach = max(reach, float(np.abs(ecp - a).max()))
    curve.set(xlim=(0, 1), ylim=(0, 1), xlabel="credibility", ylabel="expected coverage")
    difference.set(xlim=(0, 1), ylim=(-1.25 * reach, 1.25 * reach), xlabel="credibility")
    difference.set_ylabel("expected coverage \N{MINUS SIGN} credibility")
    curve.set_aspect("equal", adjustable="box", anchor="W")
    handles, labels = curve.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        frameon=False,
        fontsize=9.5,
        loc="lower left",
        ncols=2,
        handlelength=1.6,
        bbox_to_anchor=(0.06, 0.0),
    )
    _header(figure, title, f"{most.sims} simulations, {most.draws:.4g} draws each")
    for ax in (curve, difference):
        _plain(ax)
    write(figure, path, dpi=130)
    return figure


def ranks(
    result: Ranks,
    names: Sequence[str] | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
) -> Figure:
    """For each statistic the histogram of ranks, and its ECDF less the diagonal with the band.

    In the histogram grey is pointwise: one bin in twenty of an exact posterior lies outside at 95%.

    Parameters
    ----------
    result: ranks of K statistics.
    names: of the statistics; default numbers.
    path: file to write (PNG, PDF, ...).
    title: above the picture.

    Raises
    ------
    ValueError: another number of names.
    """
    values = result.ranks.numpy()
    sims, count = values.shape
    names = [f"statistic {k + 1}" for k in range(count)] if names is None else list(names)
    if len(names) != count:
        raise ValueError(f"got {len(names)} names for {count} statistics; expected one each")
    height = 0.95 + 2.3 * count
    figure = new_figure(10.4, height)
    grid = figure.add_gridspec(
        count,
        2,
        left=0.07,
        right=0.985,
        top=1 - 0.95 / height,
        bottom=0.5 / height,
        wspace=0.18,
        hspace=0.5,
    )
    edges = np.linspace(0, result.draws + 1, result.bins + 1).round()
    share = np.diff(edges) / (result.draws + 1)
    expected = sims * share
    low, high = stats.binom.interval(result.level, sims, share) / expected
    z, band = result.grid.numpy(), result.band.numpy()
    ends = np.concatenate([[0], z, [1]])
    for k, name in enumerate(names):
        bars, ecdf = (figure.add_subplot(grid[k, i]) for i in range(2))
        seen, _ = np.histogram(values[:, k], edges - 0.5)
        # Bins may differ by a rank, so heights are in units of what is expected of each.
        bars.bar(
            edges[:-1],
            seen / expected,
            np.diff(edges),
            align="edge",
            color=_BAR,
            ec="white",
            lw=0.6,
        )
        bars.stairs(high, edges, baseline=low, fill=True, color=INK, alpha=0.13)
        bars.axhline(1, color=INK, lw=0.8, ls=(0, (4, 3)))
        bars.set(xlim=(0, result.draws + 1), ylabel="simulations / expected")
        bars.set_title(
            f"{name}: rank of the truth, χ² p = {_number(float(result.chi2_p_value[k]))}",
            fontsize=10,
            loc="left",
            color=INK,
        )
        lower, upper = (np.concatenate([[0], b - z, [0]]) for b in band)
        curve = np.concatenate([[0], result.ecdf[:, k].numpy() - z, [0]])
        ecdf.fill_between(ends, lower, upper, color=_EXACT, lw=0)
        ecdf.axhline(0, color=INK, lw=0.8, ls=(0, (4, 3)))
        ecdf.plot(ends, curve, color=_LINES[0], lw=1.6)
        reach = 1.25 * max(float(np.abs(curve).max()), float(upper.max()))
        ecdf.set(xlim=(0, 1), ylim=(-reach, reach), ylabel="ECDF less diagonal")
        ecdf.set_title(
            f"band of {result.level:.0%}, p = {_number(float(result.ecdf_p_value[k]))}",
            fontsize=10,
            loc="left",
            color=INK,
        )
        for ax, label in ((bars, "rank"), (ecdf, "rank / (draws + 1)")):
            _plain(ax)
            if k == count - 1:
                ax.set_xlabel(label, fontsize=9.5)
    _header(figure, title, f"{sims} simulations, {result.draws} draws each")
    write(figure, path, dpi=130)
    return figure


def _number(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}" if p > 0 else "0"


def _header(figure: Figure, title: str | None, subtitle: str) -> None:
    height = figure.get_size_inches()[1]
    if title:
        figure.text(
            0.07, 1 - 0.24 / height, title, fontsize=14, color=INK, weight="bold", va="center"
        )
    figure.text(
        0.07, 1 - (0.49 if title else 0.3) / height, subtitle, fontsize=10, color=MUTED, va="center"
    )


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=9, colors=INK, length=3)
