"""The picture of an imaging job: dirty image and beam, posterior, residual, draws, and amplitude against baseline."""

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

    from diffpost.imaging import ImagingResult

__all__ = ["imaging_summary"]

Array = NDArray[np.float64]

_DATA, _MODEL, _NOISE = "#33658a", "#d1495b", "#9a9aa3"


def imaging_summary(result: ImagingResult, path: str | os.PathLike[str] | None = None) -> Figure:
    """Dirty image and beam, posterior mean and standard deviation, residual in sigma above; four draws and the amplitudes below.

    Axes are offsets from the phase centre in arcsec, or in microarcsec, east to the left; the beam's are from its middle.

    Parameters
    ----------
    result: what `diffpost.imaging.image_visibilities` returns.
    path: file to write (PNG, PDF, ...).
    """
    from diffpost.jobs.imaging import dirty_beam, dirty_image

    problem = result.problem
    data = problem.data
    small = problem.grid.pixel < 1e-4
    factor, unit = (1e6, "µas") if small else (1.0, '"')
    extent = _sky(problem.grid.extent, factor)
    figure = new_figure(19.6, 8.9)
    grid = figure.add_gridspec(
        2, 5, left=0.035, right=0.99, top=0.87, bottom=0.1, wspace=0.17, hspace=0.4
    )
    axes = [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(5)]
    dirty = dirty_image(problem)
    shown = _show(axes[0], dirty, extent, norm=_norm(dirty, data.noise), cmap="magma")
    colour_bar(figure, axes[0], shown, "Jy/beam", below=UNDER_LABELS)
    _name(axes[0], "Dirty image")
    beam, its = dirty_beam(problem)
    shown = _show(axes[1], beam, _sky(its.extent, factor), vmin=-0.3, vmax=1.0, cmap="cividis")
    colour_bar(figure, axes[1], shown, "beam", [0, 0.5, 1], below=UNDER_LABELS)
    _name(axes[1], "Dirty beam")
    level = max(float(np.percentile(result.mean, 99.9)), 1e-300)
    norm = _norm(result.mean, 0.02 * level)
    shown = _show(axes[2], result.mean, extent, norm=norm, cmap="magma")
    colour_bar(figure, axes[2], shown, "Jy/pixel", below=UNDER_LABELS)
    _name(axes[2], "Posterior mean")
    spread = _norm(result.std, None, positive=True)
    shown = _show(axes[3], result.std, extent, norm=spread, cmap="viridis")
    colour_bar(figure, axes[3], shown, "Jy/pixel", below=UNDER_LABELS)
    _name(axes[3], "Posterior standard deviation")
    shown = _show(axes[4], result.residual_image, extent, vmin=-5, vmax=5, cmap="RdBu_r")
    colour_bar(figure, axes[4], shown, "standard deviations of the noise", [-4, -2, 0, 2, 4], below=UNDER_LABELS)  # fmt: skip
    _name(axes[4], "Residual dirty image")
    images = result.images
    for i, ax in enumerate(axes[5:9]):
        if i >= len(images):
            ax.set_axis_off()
            continue
        shown = _show(ax, images[i], extent, norm=norm, cmap="magma")
        colour_bar(figure, ax, shown, "Jy/pixel", below=UNDER_LABELS)
        _name(ax, f"Posterior draw {i + 1}")
    _amplitudes(axes[9], result)
    for i, ax in enumerate(axes):
        ax.tick_params(labelsize=8.5, colors=MUTED, length=3)
        for side in ax.spines.values():
            side.set_edgecolor(INK)
            side.set_linewidth(0.8)
        if i in (0, 5):
            ax.set_ylabel(f"north [{unit}]", fontsize=9, color=MUTED)
    figure.text(
        0.035, 0.962, result.title or data.target or "Image", fontsize=19, color=INK, weight="bold", va="center",
    )  # fmt: skip
    figure.text(0.035, 0.924, _subtitle(result, unit), fontsize=11.5, color=MUTED, va="center")
    write(figure, path, dpi=110)
    return figure


def _amplitudes(ax: Axes, result: ImagingResult) -> None:
    from diffpost.jobs.imaging_outputs import amplitude_bins

    bins = amplitude_bins(result)
    longest = result.problem.data.longest
    factor, unit = next((f, u) for f, u in ((1e9, "Gλ"), (1e6, "Mλ"), (1e3, "kλ"), (1.0, "λ")) if longest >= f or f == 1.0)  # fmt: skip
    at = bins["distance"] / factor
    ax.errorbar(
        at, bins["data"] * 1e3, bins["error"] * 1e3, fmt="o", ms=3.5, lw=1, color=_DATA, label="data, less noise",
    )  # fmt: skip
    ax.plot(at, bins["model"] * 1e3, color=_MODEL, lw=1.4, label="posterior mean")
    ax.plot(at, bins["noise"] * 1e3, color=_NOISE, lw=1, ls="--", label="noise of a bin")
    ax.set_ylim(bottom=0)
    ax.set_xlim(left=0)
    ax.legend(fontsize=8, frameon=False)
    ax.set_xlabel(f"baseline [{unit}]", fontsize=9, color=MUTED)
    _name(ax, "Amplitude [mJy]")


def _subtitle(result: ImagingResult, unit: str) -> str:
    metrics = result.metrics
    chi2, flux = metrics["reduced_chi2"], metrics["flux"]
    spread = "" if flux["std"] is None else f" ± {flux['std']:.2g}"
    rest = metrics["residual_image"]
    return (
        f"{metrics['visibilities']:,} visibilities   ·   reduced χ² of a draw {chi2['draws']:.3f} (expected 1.00 ± "
        f"{chi2['expected_std']:.2g})   ·   flux {flux['mean']:.4g}{spread} Jy   ·   residual rms {rest['rms']:.2f}σ   ·   "
        f"{len(result.samples)} draws   ·   offsets in {unit}"
    )


def _sky(
    extent: tuple[float, float, float, float], factor: float
) -> tuple[float, float, float, float]:
    """Edges with x turned to the east."""
    left, right, bottom, top = (factor * value for value in extent)
    return -left, -right, bottom, top


def _show(ax: Axes, image: Array, extent: Any, **settings: Any) -> Any:
    return ax.imshow(image, origin="lower", extent=extent, interpolation="nearest", **settings)
