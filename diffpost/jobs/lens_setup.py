r"""A lens job's description in YAML, and the grids and data that it leads to.

Beside `mass`, `redshifts` (:mod:`diffpost.physics.lens_model`) and `light` (:mod:`diffpost.physics.light_model`) the file has

    pixel: 0.05                                            # arcsec; default: from the image's WCS
    mask: {inner: 0.3, outer: 2.5, centre: [0, 0]}         # arcsec about the middle of the cutout: what is used
    source: {size: 64, pixel: 0.025, centre: [0.1, 0]}     # default: the prior's size, half the image's pixel
    oversample: 2                                          # rays per image pixel and side
    bin: 1                                                 # image pixels and side added up for the lens' parameters

all of them optional.  x runs along rows and y up the columns, from the middle of the cutout.  Without `centre` the source
grid is put where the light is found to come from.  The image grid holds every pixel that is used and, around them, what
90% of the PSF's flux needs to scatter in.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from diffpost.io.fits import read_image
from diffpost.io.wcs import regrid_header
from diffpost.jobs.problem import Problem
from diffpost.parameters.prior import nearest
from diffpost.physics.grid import Grid
from diffpost.physics.lens_model import LensModel, read_lens_model

__all__ = ["LensDescription", "LensScene", "SourcePlan", "binned", "lens_scene", "read_description"]

Array = NDArray[np.float64]

_SHARE = 0.90  # of the PSF's flux, within the margin
_RAYS = 2
_MODEL = ("mass", "redshifts", "light")
_KEYS = (*_MODEL, "pixel", "mask", "source", "oversample", "bin")
_LARGEST = 512  # pixels on a side of the image grid


@final
@dataclass(frozen=True)
class SourcePlan:
    """What is asked of the source grid; None: to be chosen."""

    size: int | None = None
    pixel: float | None = None
    centre: tuple[float, float] | None = None


@final
@dataclass(frozen=True)
class LensDescription:
    """What the YAML file says.

    model: mass, light and priors; pixel: arcsec or None; inner, outer, centre: of the mask, arcsec; source: its grid; oversample:
    rays per pixel and side; bin: image pixels and side added up for the parameters; spec: as read.
    """

    model: LensModel
    pixel: float | None
    inner: float
    outer: float
    centre: tuple[float, float]
    source: SourcePlan
    oversample: int
    bin: int
    spec: Mapping[str, Any]


def read_description(model: str | os.PathLike[str] | Mapping[str, Any]) -> LensDescription:
    """Read a lens job's description from a YAML file or a mapping.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: not YAML, an unknown key (with the nearest one), a value out of range; or as `read_lens_model`.
    """
    if not isinstance(model, Mapping):
        path = Path(model)
        if not path.is_file():
            raise FileNotFoundError(f"there is no lens model {path}; give a YAML file by --model")
        try:
            model = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from None
        if not isinstance(model, Mapping):
            raise ValueError(f"{path} holds no settings; expected `mass` and what goes with it")
    _known(model, _KEYS, "lens model")
    mask = _section(model, "mask", ("inner", "outer", "centre"))
    inner = _number(mask.get("inner", 0.0), "mask.inner", least=0.0)
    outer = _number(mask.get("outer", math.inf), "mask.outer", least=0.0)
    if not inner < outer:
        raise ValueError(
            f"mask: got inner {inner:g} and outer {outer:g} arcsec; expected inner < outer"
        )
    source = _section(model, "source", ("size", "pixel", "centre"))
    size = source.get("size")
    plan = SourcePlan(
        None if size is None else _integer(size, "source.size"),
        None
        if source.get("pixel") is None
        else _number(source["pixel"], "source.pixel", above=0.0),
        None if source.get("centre") is None else _pair(source["centre"], "source.centre"),
    )
    pixel = model.get("pixel")
    return LensDescription(
        model=read_lens_model({k: model[k] for k in _MODEL if k in model}),
        pixel=None if pixel is None else _number(pixel, "pixel", above=0.0),
        inner=inner,
        outer=outer,
        centre=_pair(mask.get("centre", (0.0, 0.0)), "mask.centre"),
        source=plan,
        oversample=_integer(model.get("oversample", _RAYS), "oversample"),
        bin=_integer(model.get("bin", 1), "bin"),
        spec=dict(model),
    )


@final
@dataclass(frozen=True)
class LensScene:
    """The data of a lens on its image grid.

    problem: the cutout; pixels that are not used have infinite noise.
    grid: of the image, x = y = 0 at the middle of the cutout.
    y, std: (1, ny, nx) on that grid; the noise is infinite where nothing is used.
    psf: at the sampling of the grid.
    rows, columns: the part of the grid that lies in the cutout, and `place` the same part of the cutout.
    bins, whole: how many pixels on a side were added up, of which scene; None if none were.
    """

    problem: Problem
    grid: Grid
    y: Tensor
    std: Tensor
    psf: Tensor
    rows: slice
    columns: slice
    place: tuple[slice, slice]
    bins: int = 1
    whole: LensScene | None = None

    @property
    def seen(self) -> Tensor:
        """(ny, nx), pixels that count."""
        return self.std[0].isfinite()

    @property
    def header(self) -> Any:
        """Of the image grid's part in the cutout, with the input's world coordinates."""
        return regrid_header(
            self.problem.header, x0=self.place[1].start, y0=self.place[0].start, factor=1
        )

    def part(self, values: Tensor) -> Array:
        """(..., ny, nx) on the image grid as (..., h, w) in the cutout, NaN where no pixel is used."""
        kept = torch.where(self.seen, values.double(), torch.nan)
        found: Array = kept[..., self.rows, self.columns].cpu().numpy()
        return found


def lens_scene(
    problem: Problem,
    description: LensDescription,
    mask: str | os.PathLike[str] | Array | None = None,
) -> LensScene:
    """Put a prepared cutout on the image grid of a lens.

    mask: FITS file or array of the cutout's or of the whole image's shape; nonzero pixels are not used.

    Raises
    ------
    ValueError: no pixel size, one that contradicts the WCS, a mask of another shape, a mask that hides every pixel with
        data (one that leaves only sky is not told), or a grid out of proportion.
    """
    notes = list(problem.notes)
    frame = _frame(problem, description, notes)
    x, y = frame.coordinates()
    radius = torch.hypot(x - description.centre[0], y - description.centre[1]).numpy()
    used = (radius >= description.inner) & (radius <= description.outer)
    if mask is not None:
        used &= ~_mask(mask, problem)
    std = np.where(used, problem.std, np.inf)
    seen = np.isfinite(std)
    if not seen.any():
        raise ValueError(
            "the mask hides every pixel that has data: widen mask.inner and mask.outer (arcsec about the middle of the "
            "cutout), or mend --mask, in which nonzero pixels are not used"
        )
    if (hidden := int((np.isfinite(problem.std) & ~seen).sum())) > 0:
        notes.append(f"mask: {int(seen.sum())} pixels are used, {hidden} are not")
    problem = replace(
        problem, std=std, data=np.where(seen, problem.data, np.nan), notes=tuple(notes)
    )
    margin = max(2, problem.psf.radius(_SHARE))
    (top, bottom), (left, right) = (
        (int(where.min()) - margin, int(where.max()) + 1 + margin) for where in np.nonzero(seen)
    )
    unit = 2 * description.bin  # so that it can be binned
    ny, nx = (unit * math.ceil(side / unit) for side in (bottom - top, right - left))
    bottom, right = top + ny, left + nx
    if max(ny, nx) > _LARGEST:
        raise ValueError(
            f"the image grid would have {nx} x {ny} pixels; choose the lens by --cutout x,y,size or mask.outer"
        )
    h, w = seen.shape
    centre = frame.to_arcsec((left + right - 1) / 2, (top + bottom - 1) / 2)
    grid = replace(
        frame,
        n=(ny, nx),
        centre=(float(centre[0]), float(centre[1])),
        oversample=description.oversample,
    )
    place = (slice(max(top, 0), min(bottom, h)), slice(max(left, 0), min(right, w)))
    rows = slice(place[0].start - top, place[0].stop - top)
    columns = slice(place[1].start - left, place[1].stop - left)
    data, noise = torch.zeros(1, ny, nx), torch.full((1, ny, nx), torch.inf)
    data[0, rows, columns] = torch.from_numpy(np.where(seen, problem.data, 0.0)[place]).float()
    noise[0, rows, columns] = torch.from_numpy(std[place]).float()
    # No PSF offset beyond this joins two pixels of the grid.
    problem = replace(problem, psf=problem.psf.trimmed((2 * ny - 1, 2 * nx - 1)))
    psf = torch.from_numpy(problem.psf.kernel).double()
    return LensScene(problem, grid, data, noise, psf, rows, columns, place)


def binned(scene: LensScene, k: int) -> LensScene:
    """The same scene in pixels of k x k, all of which must be used, with as many rays.

    The PSF is that of a source which is flat within such a pixel; the lens' own light goes by the finer pixels. For finding parameters, not for pictures: places in the
    cutout stay those of the finer grid.
    """
    if k == 1:
        return scene
    ny, nx = scene.grid.shape
    grid = replace(
        scene.grid,
        n=(ny // k, nx // k),
        pixel=k * scene.grid.pixel,
        oversample=k * scene.grid.oversample,
    )

    def summed(values: Tensor) -> Tensor:
        return k**2 * torch.nn.functional.avg_pool2d(values.double(), k)

    std = summed(scene.std.square()).sqrt()  # infinite where one of them is
    y = torch.where(std.isfinite(), summed(torch.where(scene.seen, scene.y, 0.0)), 0.0)
    # sum over a, b < k of psf[k j + a - b]/k
    tent = (k - (torch.arange(2 * k - 1, dtype=torch.float64) - (k - 1)).abs()) / k
    h, w = scene.psf.shape
    (top, low), (left, right) = ((c // 2, n - c // 2 - 1) for n, c in ((h, h), (w, w)))
    more = [(-side) % k + k for side in (left, right, top, low)]
    padded = torch.nn.functional.pad(scene.psf, more)
    kernel = torch.outer(tent, tent)[None, None]
    smooth = torch.nn.functional.conv2d(padded[None, None], kernel, padding=k - 1)[0, 0]
    return replace(
        scene,
        grid=grid,
        y=y.float(),
        std=std.float(),
        psf=smooth[::k, ::k],
        bins=scene.bins * k,
        whole=scene.whole or scene,
    )


# Parts ----------------------------------------------------------------------------------------


def _frame(problem: Problem, description: LensDescription, notes: list[str]) -> Grid:
    """The grid of the cutout."""
    shape, asked, told = problem.data.shape, description.pixel, problem.pixel_scale
    if told is None and asked is None:
        raise ValueError(
            "the image has no celestial WCS, so the size of its pixels is not known; add `pixel: 0.05` (arcsec) to the "
            "lens model"
        )
    if told is None:
        return Grid(shape, float(asked or 0.0))
    if asked is not None and abs(asked / told - 1) > 0.01:
        raise ValueError(
            f"the lens model says pixel: {asked:g} and the image's WCS {told:.5g} arcsec; remove or mend one of them"
        )
    grid = Grid.from_wcs(problem.header, shape)
    notes.append(f"pixels of {grid.pixel:.5g} arcsec by the image's WCS")
    return grid


def _mask(mask: str | os.PathLike[str] | Array, problem: Problem) -> NDArray[np.bool_]:
    values = (
        read_image(mask).data if isinstance(mask, str | os.PathLike) else np.asarray(mask, float)
    )
    h, w = problem.data.shape
    if values.shape != (h, w):
        x0, y0 = problem.corner
        inside = x0 >= 0 and y0 >= 0
        cut = values[y0 : y0 + h, x0 : x0 + w] if inside and values.ndim == 2 else values
        if cut.shape != (h, w):
            raise ValueError(
                f"the mask has shape {values.shape}; expected that of the image or of the cutout, {(h, w)}"
            )
        values = cut
    return np.asarray((values != 0) | ~np.isfinite(values))


def _section(model: Mapping[str, Any], name: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    found = model.get(name)
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: got {found!r}; expected a mapping with {', '.join(keys)}")
    _known(found, keys, name)
    return found


def _known(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in keys:
            raise ValueError(f"{where}: no setting {key!r}{nearest(str(key), keys)}")


def _number(value: Any, name: str, *, least: float = -math.inf, above: float = -math.inf) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}; expected a number") from None
    if math.isnan(number) or number < least or number <= above:
        bound = f"of at least {least:g}" if above == -math.inf else f"above {above:g}"
        raise ValueError(f"{name}: got {value!r}; expected a number {bound}")
    return number


def _integer(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}; expected an integer of at least 1")
    return value


def _pair(value: Any, name: str) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}: got {value!r}; expected [x, y] in arcsec")
    x, y = (_number(v, name) for v in value)
    if not (math.isfinite(x) and math.isfinite(y)):
        raise ValueError(f"{name}: got {value!r}; expected finite arcsec")
    return x, y
