"""Stamps of blank sky from an image, for a noise model to learn.

Sources are what stands 3 robust standard deviations above a smooth background in the image seen through Gaussians of 1.5
and of 4 pixels, the wide one for faint extended light, and what is near them. A stamp holds none of that, at most a
small share of pixels without data, and overlaps no other. Its median is subtracted: noise learned from it has a background
that was taken away over the scale of a stamp. What lies below the threshold of detection stays in; stamps whose bright
tail tells of it are named.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from diffpost.io.fits import FitsImage, read_companion, read_image
from diffpost.io.stamps import Stamps, contaminated, read_record, read_stamps, write_stamps
from diffpost.io.wcs import pixel_to_sky
from diffpost.jobs.noise import deviation_of
from diffpost.jobs.target import find_sources

__all__ = ["Harvest", "add_to_folder", "harvest"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_WIDTHS = (1.5, 4.0)  # in which sources are detected, pixels
_GROW = 4  # pixels by which find_sources has grown them
_PHASES = 4  # places along an axis, to a stamp, where one may begin


@final
@dataclass(frozen=True, eq=False)
class Harvest:
    """Stamps of one image.

    Attributes:
        stamps: all of one field.
        record: what was done, plain JSON values; notes: the same in words.
        warnings: what the user should look at.
        sources, bad: (h, w) pixels taken for sources, and without data.
    """

    stamps: Stamps
    record: dict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    sources: Mask
    bad: Mask


def harvest(
    image: str | os.PathLike[str],
    *,
    size: int = 64,
    field: str | None = None,
    rms: str | os.PathLike[str] | None = None,
    weight: str | os.PathLike[str] | None = None,
    dq: str | os.PathLike[str] | None = None,
    bad_bits: Sequence[int] | None = None,
    coverage: str | os.PathLike[str] | None = None,
    min_coverage: float = 0.8,
    max_masked: float = 0.02,
    grow: int = 8,
    hdu: int | str | None = None,
    plane: int | None = None,
    seed: int = 0,
) -> Harvest:
    """Cut blank-sky stamps from a FITS image.

    Args:
        image: FITS, linear in flux, at its native sampling; resampling makes other noise.
        size: side of the stamps, pixels.
        field: name of the pointing, None for the file's name. Images of the same pointing share one.
        rms, weight: map of the standard deviation or of the inverse variance: where it is not finite and positive there
            are no data, and sources are detected relative to it.
        dq: map of integer flags; ``bad_bits``: the flags (powers of 2) that mean a bad pixel, None for all.
        coverage: map of exposure or number of frames: pixels below ``min_coverage`` of its median are not used, as their
            noise is another.
        max_masked: share of a stamp that may be without data; such pixels are filled with others of the stamp.
        grow: pixels around what was detected that count as source; at least 4.
        hdu, plane: which image of the file; maps are taken of the same plane.
        seed: of the filling.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: numbers out of range, maps of another shape, flags that are not powers of 2, or an image without
            room for one stamp.
    """
    if size < 8 or not 0 <= max_masked < 0.5 or not 0 <= min_coverage <= 1 or grow < _GROW:
        raise ValueError(
            f"got size={size}, max_masked={max_masked}, min_coverage={min_coverage}, grow={grow}; expected a size of at "
            f"least 8, shares within [0, 0.5) and [0, 1], and to grow by at least {_GROW}"
        )
    if rms is not None and weight is not None:
        raise ValueError("got an rms and a weight map; give one of them")
    if bad_bits is not None and dq is None:
        raise ValueError("got bad_bits without dq; give the map of flags too")
    sky = read_image(image, hdu=hdu, plane=plane)
    h, w = sky.data.shape
    if min(h, w) < size:
        raise ValueError(f"the image has {w} x {h} pixels: not room for one stamp of {size}")
    notes, used = list(sky.notes), {"image": str(image)}
    bad = ~np.isfinite(sky.data)
    relative = np.ones((h, w))
    if rms is not None or weight is not None:
        deviation = _map(rms if rms is not None else weight, sky, "rms" if rms else "weight", used)
        if weight is not None:
            deviation = deviation_of(deviation)
        usable = np.isfinite(deviation.data) & (deviation.data > 0)
        if not usable.any():
            raise ValueError(f"{deviation.path} has no positive finite pixel; the map masks it all")
        bad |= ~usable
        relative = np.where(
            usable, deviation.data / np.median(deviation.data[usable & ~bad]), np.inf
        )
    if dq is not None:
        bad |= _flagged(_map(dq, sky, "dq", used).data, bad_bits)
    if coverage is not None:
        exposure = np.nan_to_num(_map(coverage, sky, "coverage", used).data)
        if not (exposure > 0).any():
            raise ValueError(f"{coverage} has no positive pixel; expected exposure times or counts")
        typical = float(np.median(exposure[(exposure > 0) & ~bad]))
        thin = exposure < max(min_coverage * typical, np.finfo(float).tiny)
        notes.append(
            f"coverage: {100 * thin.mean():.1f}% of the pixels lie below {min_coverage:g} of the median, {typical:.4g}"
        )
        bad |= thin
    if bad.all():
        raise ValueError("no pixel of the image has data, by the maps that were given")
    flat = np.where(bad, np.nan, sky.data / relative)
    _, segments, sources = find_sources(flat, widths=_WIDTHS)
    if grow > _GROW:
        sources = np.asarray(binary_dilation(sources, iterations=grow - _GROW))
    corners = _places(sources, bad, size, max_masked)
    if not corners:
        raise ValueError(
            f"no square of {size} pixels is free of sources and has data in all but {100 * max_masked:g}% of its pixels "
            f"({100 * sources.mean():.0f}% of the image are near sources, {100 * bad.mean():.0f}% without data); take a "
            "smaller --size, or an emptier image"
        )
    generator = np.random.default_rng(seed)
    values = np.empty((len(corners), size, size), np.float32)
    filled = 0
    for i, (top, left) in enumerate(corners):
        part = np.s_[top : top + size, left : left + size]
        stamp, gone = sky.data[part].copy(), bad[part]
        stamp -= np.median(stamp[~gone])
        stamp[gone] = generator.choice(stamp[~gone], int(gone.sum()))
        filled += int(gone.sum())
        values[i] = stamp
    middle = np.array(corners, np.float64) + (size - 1) / 2
    x, y = middle[:, 1], middle[:, 0]
    sphere = pixel_to_sky(sky.header, x, y)
    none = np.full(len(x), np.nan)
    ra, dec = (none, none) if sphere is None else sphere
    name = field if field is not None else Path(image).name.split(".")[0]
    if not name.strip():
        raise ValueError(f"got the field {name!r}; expected a name")
    stamps = Stamps(values, np.full(len(values), name), sky.unit, x, y, ra, dec)
    notes += [
        f"sources: {int(segments.max())} detected; with {grow} pixels around them they cover "
        f"{100 * sources.mean():.1f}% of the image, and {100 * bad.mean():.1f}% are without data",
        f"stamps: {len(values)} of {size} pixels, none overlapping; the median of each was subtracted",
    ]
    if filled:
        notes.append(f"{filled} pixels without data were filled with others of their stamps")
    suspect, words = contaminated(values)
    deviations = values.std((1, 2))
    record = {
        "field": name,
        "unit": sky.unit,
        "stamps": len(values),
        "size": size,
        "inputs": used,
        "bad_bits": None if bad_bits is None else [int(b) for b in bad_bits],
        "min_coverage": min_coverage if coverage is not None else None,
        "max_masked": max_masked,
        "grow": grow,
        "detection": {"widths": list(_WIDTHS), "sigma": 3.0},
        "source_share": float(sources.mean()),
        "bad_share": float(bad.mean()),
        "filled_pixels": filled,
        "background": "median of each stamp",
        "std": float(np.median(deviations)),
        "suspects": [int(i) for i in np.flatnonzero(suspect)],
        "warning": words,
    }
    return Harvest(stamps, record, tuple(notes), () if words is None else (words,), sources, bad)


def add_to_folder(
    folder: str | os.PathLike[str], found: Harvest, *, overwrite: bool = False
) -> Stamps:
    """Write a harvest into a folder, beside those of other fields; returns all that the folder holds.

    Args:
        overwrite: replace the stamps of the same field.

    Raises:
        FileExistsError: the folder has this field already, and ``overwrite`` is False; or holds something else.
        ValueError: stamps of another size or unit there.
    """
    path = Path(folder)
    name = found.record["field"]
    parts, records = [], []
    if (path / "stamps.npz").exists():
        there = read_stamps(path)
        if name in there.names:
            if not overwrite:
                raise FileExistsError(
                    f"{path} has stamps of the field {name} already; --overwrite replaces them, --field names another"
                )
            if set(there.names) != {name}:
                parts.append(there.select(there.fields != name))
        else:
            parts.append(there)
        records = [r for r in read_record(path).get("images", []) if r.get("field") != name]
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and holds no stamps; give another --out")
    stamps = Stamps.join([*parts, found.stamps])
    write_stamps(path, stamps, {"images": [*records, found.record]})
    return stamps


def _map(
    path: str | os.PathLike[str] | None, image: FitsImage, name: str, used: dict[str, str]
) -> FitsImage:
    found = read_companion(str(path), image)
    if found.data.shape != image.data.shape:
        raise ValueError(
            f"the {name} map {path} has {found.data.shape[1]} x {found.data.shape[0]} pixels and the image "
            f"{image.data.shape[1]} x {image.data.shape[0]}; they must be of one shape"
        )
    used[name] = str(path)
    return replace(found, path=str(path))


def _flagged(flags: Array, bits: Sequence[int] | None) -> Mask:
    if not np.array_equal(flags, np.round(flags), equal_nan=True):
        raise ValueError("the dq map is not of whole numbers; expected flags")
    whole = np.nan_to_num(flags, nan=0).astype(np.int64)
    if bits is None:
        return np.asarray(whole != 0) | np.isnan(flags)
    if wrong := [b for b in bits if b < 1 or b & (b - 1)]:
        raise ValueError(
            f"got bad bits {wrong}; expected flags that are powers of 2, such as 1, 4, 4096"
        )
    return np.asarray((whole & sum(set(bits))) != 0) | np.isnan(flags)


def _places(sources: Mask, bad: Mask, size: int, most: float) -> list[tuple[int, int]]:
    """Corners (row, column) of squares that do not overlap, found row by row at steps of a quarter of their side."""
    step = max(size // _PHASES, 1)

    def counts(mask: Mask) -> NDArray[np.int64]:
        total = np.pad(mask.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
        return (
            total[size:, size:]
            - total[:-size, size:]
            - total[size:, :-size]
            + total[:-size, :-size]
        )

    good = (counts(sources) == 0) & (counts(bad) <= most * size**2)
    taken = np.zeros(good.shape, bool)  # corners whose square would meet one that was chosen
    found = []
    for top in range(0, good.shape[0], step):
        left = 0
        row, gone = good[top], taken[top]
        while left < len(row):
            if row[left] and not gone[left]:
                found.append((top, left))
                taken[top : top + size, max(left - size + 1, 0) : left + size] = True
                left += size
            else:
                left += step
    return found
