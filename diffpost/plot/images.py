"""Pictures of posterior draws.

Fluxes are shown with an asinh stretch that is linear below about three times the noise and
logarithmic above (Lupton et al. 2004), the same for the data, the mean and every draw, so that what
looks brighter is brighter.  Residuals are in standard deviations of the noise.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.plot.figures import INK, MUTED, new_figure, write

if TYPE_CHECKING:
    from astropy.io.fits import Header
    from astropy.visualization import ImageNormalize
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from diffpost.likelihood import Likelihood
    from diffpost.samples import Samples

__all__ = ["image_grid", "summary"]

Array = NDArray[np.float64]

_FLUX, _SPREAD, _RESIDUAL = "magma", "viridis", "RdBu_r"
_HATCH = "#9a9aa3"


def image_grid(
    images: Tensor,
    path: str | os.PathLike[str] | None = None,
    *,
    columns: int | None = None,
    softening: float = 0.02,
    titles: list[str] | None = None,
) -> Figure:
    """A grid of (n, 1, h, w) or (n, h, w) images, each stretched by asinh up to its own peak.

    softening: the flux, in units of each image's peak, below which the stretch is linear.

    Raises
    ------
    ValueError: for another shape, or no images.
    """
    from astropy.visualization import AsinhStretch, ImageNormalize

    stack = _stack(images)
    n = len(stack)
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    figure = new_figure(1.6 * columns, 1.6 * rows + (0.25 * rows if titles else 0))
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={"wspace": 0.03, "hspace": 0.15 if titles else 0.03},
    )
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.93 if titles else 0.995)
    for i, ax in enumerate(axes.flat):
        ax.set_axis_off()
        if i >= n:
            continue
        image = stack[i]
        top = float(np.nanmax(image)) if np.isfinite(image).any() else 1.0
        top = top if top > 0 else 1.0
        norm = ImageNormalize(vmin=-softening * top, vmax=top, stretch=AsinhStretch(softening))
        ax.imshow(image, origin="lower", norm=norm, cmap=_FLUX, interpolation="nearest")
        if titles:
            ax.set_title(titles[i], fontsize=8, color=INK, pad=2)
    write(figure, path, dpi=110)
    return figure


def summary(
    samples: Samples,
    likelihood: Likelihood,
    *,
    path: str | os.PathLike[str] | None = None,
    region: tuple[slice, slice] | None = None,
    pixel_scale: float | None = None,
    header: Header | None = None,
    unit: str | None = None,
    title: str | None = None,
    subtitle: str | None = None,
) -> Figure:
    """Data, posterior mean, standard deviation, residual, and four draws.

    Parameters
    ----------
    samples: draws of one-channel images, (n, 1, H, W).
    likelihood: what they were conditioned on; its data are an image (1, h, w).
    path: file to write (PNG, PDF, ...).
    region: rows and columns of the draws to show, as slices with both ends, and the same part of the
        data, which cover the same field; default all.
    pixel_scale: arcsec per pixel of the draws; draws a scale bar.
    header: with a celestial WCS of the data; draws north and east.
    unit: of the data, for the colour bars.

    Raises
    ------
    ValueError: draws or data that are not images of one channel.
    """
    draws = _stack(samples.x)
    full = draws.shape[1]
    rows, columns = region or (slice(None), slice(None))
    draws = draws[:, rows, columns]
    mean = _stack(samples.mean[None])[0][rows, columns]
    spread = (
        _stack(samples.std[None])[0][rows, columns] if len(samples) > 1 else np.zeros_like(mean)
    )
    data, noise, seen, residual = _data(samples, likelihood)
    ratio = data.shape[0] / full  # data pixels per model pixel, 1/K
    if region is not None:
        window = tuple(slice(round(s.start * ratio), round(s.stop * ratio)) for s in region)
        data, seen, residual = data[window], seen[window], residual[window]
    norm = _norm(np.where(seen, data, np.nan), noise)
    model_norm = _norm(None, None, like=norm, factor=ratio**2)

    figure = new_figure(15.2, 9.0)
    grid = figure.add_gridspec(
        2, 4, left=0.014, right=0.986, top=0.875, bottom=0.018, wspace=0.045, hspace=0.225
    )
    axes = [[figure.add_subplot(grid[i, j]) for j in range(4)] for i in range(2)]
    flux_label = f"{unit} per pixel" if unit else "flux per pixel"
    masked = ~seen

    shown = axes[0][0].imshow(data, origin="lower", norm=norm, cmap=_FLUX, interpolation="nearest")
    _hatch(axes[0][0], masked)
    colour_bar(figure, axes[0][0], shown, flux_label)
    shown = axes[0][1].imshow(
        mean, origin="lower", norm=model_norm, cmap=_FLUX, interpolation="nearest"
    )
    _outline(axes[0][1], masked, 1 / ratio)
    colour_bar(figure, axes[0][1], shown, flux_label)
    # Where nothing was seen the prior speaks alone; its spread would hide what the data tell.
    known = np.kron(seen, np.ones((round(1 / ratio), round(1 / ratio)))) > 0
    known = known if known.shape == spread.shape and known.any() else np.ones_like(spread, bool)
    spread_norm = _norm(np.where(known, spread, np.nan), None, positive=True)
    shown = axes[0][2].imshow(
        spread, origin="lower", norm=spread_norm, cmap=_SPREAD, interpolation="nearest"
    )
    _outline(axes[0][2], masked, 1 / ratio)
    colour_bar(figure, axes[0][2], shown, flux_label)
    shown = axes[0][3].imshow(
        np.where(seen, residual, np.nan),
        origin="lower",
        vmin=-5,
        vmax=5,
        cmap=_RESIDUAL,
        interpolation="nearest",
    )
    _hatch(axes[0][3], masked)
    colour_bar(
        figure, axes[0][3], shown, "standard deviations of the noise", ticks=[-4, -2, 0, 2, 4]
    )
    names = ["Data", "Posterior mean", "Posterior standard deviation", "Residual of the mean"]
    for ax, name in zip(axes[0], names, strict=True):
        _name(ax, name)
    for i, ax in enumerate(axes[1]):
        if i >= len(draws):
            ax.set_axis_off()
            continue
        shown = ax.imshow(
            draws[i], origin="lower", norm=model_norm, cmap=_FLUX, interpolation="nearest"
        )
        _outline(ax, masked, 1 / ratio)
        _name(ax, f"Posterior draw {i + 1}")
    for ax in [*axes[0], *axes[1]]:
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set_edgecolor(INK)
            side.set_linewidth(0.8)
    if pixel_scale:
        _scale_bar(axes[0][0], pixel_scale / ratio, data.shape[1])
        _scale_bar(axes[0][1], pixel_scale, mean.shape[1])
    if header is not None:
        _compass(axes[0][1], header, mean.shape)
    if title:
        figure.text(0.014, 0.962, title, fontsize=19, color=INK, weight="bold", va="center")
    if subtitle:
        figure.text(0.014, 0.924, subtitle, fontsize=11.5, color="#55555f", va="center")
    write(figure, path, dpi=130)
    return figure


# Parts ----------------------------------------------------------------------------------------


def _stack(images: Tensor) -> Array:
    stack = torch.as_tensor(images).detach().cpu().double().numpy()
    if stack.ndim == 4 and stack.shape[1] == 1:
        stack = stack[:, 0]
    if stack.ndim != 3 or not len(stack):
        raise ValueError(
            f"got images of shape {tuple(images.shape)}; expected (n, 1, h, w) or (n, h, w)"
        )
    return stack


def _data(
    samples: Samples, likelihood: Likelihood
) -> tuple[Array, float, NDArray[np.bool_], Array]:
    """The data, a typical noise, which pixels count, and the residual of the mean in sigma."""
    y = likelihood.y.detach().cpu().double()
    image = y.numpy()
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 2:
        raise ValueError(
            f"got data of shape {tuple(y.shape)}; a summary needs an image of one channel, (1, h, w)"
        )
    variance = torch.as_tensor(likelihood.noise.variance).detach().cpu().double()
    std = variance.expand(y.shape).reshape(image.shape).sqrt().numpy()
    seen = np.isfinite(std)
    with torch.no_grad():
        mean = samples.mean[None].to(likelihood.y)
        raw = likelihood.residual(mean)[0].detach().cpu().double().numpy().reshape(image.shape)
    residual = np.where(seen, raw / np.where(seen, std, 1.0), 0.0)
    return image, float(np.median(std[seen])) if seen.any() else 1.0, seen, residual


def _norm(
    image: Array | None,
    noise: float | None,
    *,
    like: ImageNormalize | None = None,
    factor: float = 1.0,
    positive: bool = False,
) -> ImageNormalize:
    from astropy.visualization import AsinhStretch, ImageNormalize

    if like is not None:
        return ImageNormalize(
            vmin=like.vmin * factor, vmax=like.vmax * factor, stretch=AsinhStretch(like.stretch.a)
        )
    values = np.asarray(image)
    finite = values[np.isfinite(values)]
    top = float(np.percentile(finite, 99.95)) if finite.size else 1.0
    if positive:
        low = max(float(np.percentile(finite, 5)), 0.0) if finite.size else 0.0
        top = max(top, low * 1.01, 1e-300)
        softening = float(np.median(finite)) / top if finite.size else 0.1
        return ImageNormalize(
            vmin=0.0, vmax=top, stretch=AsinhStretch(min(max(softening, 0.02), 0.5))
        )
    floor = noise if noise else 0.01 * abs(top)
    top = max(top, 3 * floor)
    bottom = -2.5 * floor
    softening = 3 * floor / (top - bottom)
    return ImageNormalize(
        vmin=bottom, vmax=top, stretch=AsinhStretch(min(max(softening, 0.003), 0.5))
    )


def _ticks(norm: ImageNormalize) -> list[float]:
    """Round values that are not crowded on the bar."""
    low, high = float(norm.vmin), float(norm.vmax)
    reach = math.floor(math.log10(max(abs(low), abs(high))))
    candidates = [0.0]
    for power in range(reach, reach - 6, -1):
        for digit in (1.0, 5.0, 2.0):
            candidates += [digit * 10.0**power]
    chosen: list[float] = []
    places: list[float] = []
    for value in candidates:
        place = float(norm(value))
        if low <= value <= high and all(abs(place - other) > 0.16 for other in places):
            chosen.append(value)
            places.append(place)
    return sorted(chosen)


def colour_bar(
    figure: Figure,
    ax: Axes,
    shown: Any,
    label: str,
    ticks: list[float] | None = None,
    *,
    below: float = 0.045,
) -> None:
    """A colour bar under an axis, this share of its height lower: more where the axis has labels of its own."""
    place = ax.inset_axes((0.0, -below, 1.0, 0.026))
    bar = figure.colorbar(shown, cax=place, orientation="horizontal")
    values = _ticks(shown.norm) if ticks is None else ticks
    bar.set_ticks(values, labels=[f"{v:g}" for v in values])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8.5, length=2, colors=INK, pad=2)
    bar.outline.set_linewidth(0.5)
    bar.set_label(label, fontsize=8.5, color=MUTED, labelpad=0.5)


def _name(ax: Axes, name: str) -> None:
    ax.set_title(name, fontsize=12, color=INK, loc="left", pad=5)


def _hatch(ax: Axes, masked: NDArray[np.bool_]) -> None:
    """Pixels without data: grey, hatched."""
    if not masked.any():
        return
    from matplotlib.colors import ListedColormap

    ax.imshow(
        np.where(masked, 1.0, np.nan),
        origin="lower",
        cmap=ListedColormap(["#d9d9de"]),
        interpolation="nearest",
    )
    ax.contourf(
        _padded(masked),
        levels=[0.5, 1.5],
        hatches=["////"],
        colors="none",
        extent=(-1.5, masked.shape[1] + 0.5, -1.5, masked.shape[0] + 0.5),
    )
    ax.set_xlim(-0.5, masked.shape[1] - 0.5)
    ax.set_ylim(-0.5, masked.shape[0] - 0.5)
    for item in ax.collections:
        item.set_edgecolor(_HATCH)
        item.set_linewidth(0.0)


def _outline(ax: Axes, masked: NDArray[np.bool_], factor: float) -> None:
    """The border of the pixels without data on the grid of the model."""
    if not masked.any():
        return
    h, w = masked.shape
    x = (np.arange(w) + 0.5) * factor - 0.5
    y = (np.arange(h) + 0.5) * factor - 0.5
    ax.contour(x, y, masked.astype(float), levels=[0.5], colors="white", linewidths=0.7, alpha=0.7)


def _padded(masked: NDArray[np.bool_]) -> Array:
    return np.pad(masked.astype(float), 1)


def _scale_bar(ax: Axes, pixel: float, width: int) -> None:
    """A bar of a round number of arcsec in the lower left corner."""
    wanted = 0.25 * width * pixel
    power = 10.0 ** math.floor(math.log10(wanted))
    length = next(d * power for d in (5.0, 2.0, 1.0) if d * power <= wanted)
    pixels = length / pixel
    start, height = 0.05 * width, 0.06 * width
    stroke = _stroke()
    ax.plot(
        [start, start + pixels],
        [height, height],
        color="white",
        lw=2.2,
        solid_capstyle="butt",
        path_effects=stroke,
    )
    ax.text(
        start + pixels / 2,
        height + 0.02 * width,
        f'{length:g}"',
        color="white",
        ha="center",
        va="bottom",
        fontsize=10.5,
        path_effects=stroke,
    )


def _stroke() -> list[Any]:
    from matplotlib import patheffects

    return [patheffects.withStroke(linewidth=3, foreground="#00000090")]


def _compass(ax: Axes, header: Header, shape: tuple[int, ...]) -> None:
    """North and east, from the celestial WCS, in the upper right corner."""
    from diffpost.io.wcs import north_east

    directions = north_east(header, shape)
    if directions is None:
        return
    h, w = shape
    length = 0.085 * w
    north, east = (np.asarray(d) * length for d in directions)
    # The foot of the arrows sits such that both stay inside.
    cx = 0.95 * w - 1.45 * max(0.0, north[0], east[0])
    cy = 0.95 * h - 1.45 * max(0.0, north[1], east[1])
    for name, arrow in (("N", north), ("E", east)):
        ax.annotate(
            "",
            xy=(cx + arrow[0], cy + arrow[1]),
            xytext=(cx, cy),
            arrowprops={
                "arrowstyle": "-|>",
                "color": "white",
                "lw": 1.3,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )
        ax.text(
            cx + 1.45 * arrow[0],
            cy + 1.45 * arrow[1],
            name,
            color="white",
            ha="center",
            va="center",
            fontsize=9,
            path_effects=_stroke(),
        )
