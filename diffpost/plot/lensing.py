"""Pictures of a lens: the image with its critical curves, the source with its caustics, the magnification."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.plot.figures import INK, MUTED, new_figure, write
from diffpost.plot.images import _name, _norm, colour_bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffpost.physics.grid import Grid
    from diffpost.physics.lensing import Lens, Params

__all__ = ["lens"]

Array = NDArray[np.float64]

_CRITICAL, _CAUSTIC, _BORDER = "#5fd3ff", "#ffb347", "#8f8f99"
UNDER_LABELS = 0.17  # of an axis' height, where its own labels end
_LARGEST = 100.0  # |mu| at the end of the scale


def lens(
    model: Lens,
    params: Params | None = None,
    *,
    image: Tensor | None = None,
    source: Tensor | None = None,
    channel: int = 0,
    path: str | os.PathLike[str] | None = None,
    unit: str | None = None,
    title: str | None = None,
) -> Figure:
    """Image plane with critical curves, source plane with caustics, and magnification.

    Axes are x and y of the grids, in arcsec, row 0 at the bottom.

    Parameters
    ----------
    model: the lens.
    params: (P,), of a lens with free parameters.
    image: flux per pixel, (ny, nx) with any axes of length 1 before; None renders the source.
    source: flux per pixel, likewise; None leaves the source plane empty.
    channel: of a lens with several masses.
    path: file to write (PNG, PDF, ...).
    unit: of the fluxes.

    Raises
    ------
    ValueError: images that are not on the lens' grids, several vectors of parameters.
    """
    from diffpost.physics.critical import critical_curves, magnification, traced

    brightness = None if source is None else _plane(source, model.source, "source")
    if image is not None:
        seen = _plane(image, model.image, "image")
    elif brightness is not None:
        seen = _rendered(model, params, torch.from_numpy(brightness), channel)
    else:
        seen = None
    critical = critical_curves(model, params, channel=channel)
    caustics = traced(model, critical, params, channel)
    mu = magnification(model, params, channel=channel).abs().cpu().numpy()

    figure = new_figure(14.4, 5.9 if title else 5.5)
    top = 0.87 if title else 0.93
    grid = figure.add_gridspec(1, 3, left=0.045, right=0.985, top=top, bottom=0.2, wspace=0.2)
    axes = [figure.add_subplot(grid[0, i]) for i in range(3)]
    label = f"{unit} per pixel" if unit else "flux per pixel"
    _show(figure, axes[0], seen, model.image, label)
    _show(figure, axes[1], brightness, model.source, label)
    _magnification(figure, axes[2], mu, model.image)
    for ax in (axes[0], axes[2]):
        _lines(ax, critical, _CRITICAL if ax is axes[0] else INK)
    _lines(axes[1], caustics, _CAUSTIC)
    _fit(axes[1], caustics, model.source)
    for ax, name in zip(
        axes, ["Image, critical curves", "Source, caustics", "Magnification"], strict=True
    ):
        _name(ax, name)
        ax.set_aspect("equal")
        ax.set_xlabel("x [arcsec]", fontsize=9, color=MUTED)
        ax.tick_params(labelsize=8.5, colors=MUTED, length=3)
        for side in ax.spines.values():
            side.set_edgecolor(INK)
            side.set_linewidth(0.8)
    axes[0].set_ylabel("y [arcsec]", fontsize=9, color=MUTED)
    if title:
        figure.text(0.045, 0.96, title, fontsize=16, color=INK, weight="bold", va="center")
    write(figure, path, dpi=130)
    return figure


def _plane(image: Tensor, grid: Grid, what: str) -> Array:
    plane = torch.as_tensor(image).detach().cpu().double()
    if tuple(plane.shape[-2:]) != grid.shape or plane.numel() != plane.shape[-2:].numel():
        raise ValueError(
            f"plot.lens: got the {what} {tuple(plane.shape)}; expected one of {grid.shape}, its grid. Choose a "
            "channel before."
        )
    values: Array = plane.reshape(grid.shape).numpy()
    return values


def _rendered(model: Lens, params: Params | None, source: Tensor, channel: int) -> Array:
    shape = model.input_shape
    count = 1 if shape is None else shape[0]
    with torch.no_grad():
        image = model.render(source.expand(1, count, *source.shape), params)
    values: Array = image[0, channel if count > 1 else 0].cpu().numpy()
    return values


def _show(figure: Figure, ax: Axes, plane: Array | None, grid: Grid, label: str) -> None:
    if plane is None:
        left, right, bottom, top = grid.extent
        ax.set_xlim(left, right)
        ax.set_ylim(bottom, top)
        ax.set_facecolor("#000004")
        return
    shown = ax.imshow(
        plane,
        origin="lower",
        extent=grid.extent,
        norm=_norm(plane, None),
        cmap="magma",
        interpolation="nearest",
    )
    colour_bar(figure, ax, shown, label, below=UNDER_LABELS)


def _magnification(figure: Figure, ax: Axes, mu: Array, grid: Grid) -> None:
    from matplotlib.colors import LogNorm

    shown = ax.imshow(
        mu.clip(1 / _LARGEST, _LARGEST),
        origin="lower",
        extent=grid.extent,
        norm=LogNorm(1 / _LARGEST, _LARGEST),
        cmap="RdBu_r",
        interpolation="nearest",
    )
    colour_bar(figure, ax, shown, "|magnification|", [0.01, 0.1, 1, 10, 100], below=UNDER_LABELS)


def _lines(ax: Axes, curves: list[Tensor], colour: str) -> None:
    for line in curves:
        x, y = line.cpu().unbind(-1)
        ax.plot(x.numpy(), y.numpy(), color=colour, linewidth=1.2)


def _fit(ax: Axes, curves: list[Tensor], grid: Grid) -> None:
    """Both the grid, with its border where it is not the frame, and the caustics."""
    left, right, bottom, top = grid.extent
    points = torch.cat(curves).cpu() if curves else torch.empty(0, 2)
    x = [left, right, *points[:, 0].tolist()]
    y = [bottom, top, *points[:, 1].tolist()]
    pad = 0.03 * max(max(x) - min(x), max(y) - min(y)) if len(points) else 0.0
    if min(x) < left or max(x) > right or min(y) < bottom or max(y) > top:
        ax.plot(
            [left, right, right, left, left],
            [bottom, bottom, top, top, bottom],
            color=_BORDER,
            linewidth=0.8,
        )
        ax.set_xlim(min(x) - pad, max(x) + pad)
        ax.set_ylim(min(y) - pad, max(y) + pad)
        ax.set_facecolor("#000004")
