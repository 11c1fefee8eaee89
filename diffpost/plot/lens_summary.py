"""The picture of a lens job: data, model and residual with critical curves; the source with its caustics."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffpost.plot.figures import INK, MUTED, new_figure, write
from diffpost.plot.images import _name, _norm, colour_bar
from diffpost.plot.lensing import UNDER_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffpost.lens import LensResult

__all__ = ["lens_summary"]

Array = NDArray[np.float64]

_CRITICAL, _CAUSTIC = "#5fd3ff", "#7fe3c0"
_NOTHING = "#d9d9de"


def lens_summary(result: LensResult, path: str | os.PathLike[str] | None = None) -> Figure:
    """Data, model, residual in sigma, the source's mean and standard deviation above; five draws of it below.

    Where the lens' own light is modelled: data, that light, the data without it, the lensed source, residual and the source's
    mean above; its standard deviation and five draws below.  Axes are x and y in arcsec from the middle of the cutout.
    Curves are those of the median lens.

    Parameters
    ----------
    result: what `diffpost.lens.reconstruct_lens` returns.
    path: file to write (PNG, PDF, ...).
    """
    from diffpost.physics.critical import critical_curves, traced

    scene, source, lens = result.scene, result.source, result.system.lens
    params = result.median_lens
    curves = critical_curves(lens, params)
    critical = [line.cpu().numpy() for line in curves]
    caustics = [line.detach().cpu().numpy() for line in traced(lens, curves, params, 0)]
    extent = _extent(result)
    planes = _planes(result)
    count = len(planes)  # then the residual

    # what is left of a row is the source's
    columns = max(5, count + 2)
    figure = new_figure(19.6 * columns / 5, 9.3)
    left, right = 0.035 * 5 / columns, 1 - 0.01 * 5 / columns
    grid = figure.add_gridspec(
        2, columns, left=left, right=right, top=0.87, bottom=0.045, wspace=0.17, hspace=0.4
    )
    axes = [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(columns)]
    unit = scene.problem.unit
    label = f"{unit} per pixel" if unit else "flux per pixel"
    for ax, (name, image, norm) in zip(axes, planes, strict=False):
        shown = _show(ax, image, extent, norm=norm, cmap="magma")
        colour_bar(figure, ax, shown, label, below=UNDER_LABELS)
        _name(ax, name)
    shown = _show(axes[count], result.residual, extent, vmin=-5, vmax=5, cmap="RdBu_r")
    name = "standard deviations of the noise"
    colour_bar(figure, axes[count], shown, name, [-4, -2, 0, 2, 4], below=UNDER_LABELS)
    _name(axes[count], "Residual")
    for i, ax in enumerate(axes[: count + 1]):
        for line in critical:
            color = INK if i == count else _CRITICAL
            ax.plot(line[:, 0], line[:, 1], color=color, linewidth=1.0, alpha=0.9)
        ax.set_xlim(extent[:2])
        ax.set_ylim(extent[2:])

    mean, std, *draws = axes[count + 1 :]
    level = max(float(np.percentile(result.mean, 99.9)), 1e-300)
    source_norm = _norm(result.mean, 0.02 * level)
    shown = _show(mean, result.mean, source.extent, norm=source_norm, cmap="magma")
    colour_bar(figure, mean, shown, label, below=UNDER_LABELS)
    _name(mean, "Source, mean")
    spread = _norm(result.std, None, positive=True)
    shown = _show(std, result.std, source.extent, norm=spread, cmap="viridis")
    colour_bar(figure, std, shown, label, below=UNDER_LABELS)
    _name(std, "Source, standard deviation")
    inner = result.images
    for i, ax in enumerate(draws):
        if i >= len(inner):
            ax.set_axis_off()
            continue
        _show(ax, inner[i], source.extent, norm=source_norm, cmap="magma")
        _name(ax, f"Source, draw {i + 1}")
    for ax in (mean, std, *draws[: len(inner)]):
        for line in caustics:
            ax.plot(line[:, 0], line[:, 1], color=_CAUSTIC, linewidth=1.0, alpha=0.9)
        ax.set_xlim(source.extent[:2])
        ax.set_ylim(source.extent[2:])
    for ax in axes:
        ax.set_aspect("equal")
        ax.tick_params(labelsize=8.5, colors=MUTED, length=3)
        for side in ax.spines.values():
            side.set_edgecolor(INK)
            side.set_linewidth(0.8)
    for ax in (axes[0], axes[columns]):
        ax.set_ylabel("y [arcsec]", fontsize=9, color=MUTED)
    figure.text(
        left, 0.962, result.title or "Lens", fontsize=19, color=INK, weight="bold", va="center"
    )
    figure.text(left, 0.924, _subtitle(result), fontsize=11.5, color=MUTED, va="center")
    write(figure, path, dpi=110)
    return figure


def _planes(result: LensResult) -> list[tuple[str, Array, Any]]:
    """Name, image and colours of what is shown on the image plane, in the order of the row."""
    scene, light = result.scene, result.light
    noise = float(scene.std[0][scene.seen].median())
    data = scene.part(scene.y[0])
    norm = _norm(data, noise)
    if light is None:
        return [("Data", data, norm), ("Model, mean of draws", result.model, norm)]
    lensed = result.model - light
    arcs = _norm(lensed, noise)
    return [
        ("Data", data, norm),
        ("Lens light, mean", light, norm),
        ("Data − lens light", data - light, arcs),
        ("Lensed source, mean", lensed, arcs),
    ]


def _subtitle(result: LensResult) -> str:
    metrics = result.metrics
    chi2, mu = metrics["reduced_chi2"], metrics["magnification"]
    spread = "" if mu["std"] is None else f" ± {mu['std']:.2g}"
    return (
        f"reduced χ² of a draw {chi2['draws']:.3f} (expected 1.00 ± {chi2['expected_std']:.2f})   ·   magnification "
        f"{mu['mean']:.3g}{spread}   ·   {len(result.samples)} draws   ·   R-hat {metrics['rhat']:.3f}   ·   curves of the "
        "median lens"
    )


def _extent(result: LensResult) -> tuple[float, float, float, float]:
    """Of the part of the image grid that lies in the cutout."""
    scene = result.scene
    left, bottom = scene.grid.to_arcsec(scene.columns.start - 0.5, scene.rows.start - 0.5)
    right, top = scene.grid.to_arcsec(scene.columns.stop - 0.5, scene.rows.stop - 0.5)
    return float(left), float(right), float(bottom), float(top)


def _show(ax: Axes, image: Array, extent: Any, **settings: Any) -> Any:
    ax.set_facecolor(_NOTHING)
    return ax.imshow(image, origin="lower", extent=extent, interpolation="nearest", **settings)
