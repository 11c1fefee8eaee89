"""Stamps of blank sky, the training data of a noise model, on disk.

A folder of `diffpost harvest` holds

    stamps.npz      stamps (n, h, w) float32, field (n,), unit, x, y, ra, dec (n,)
    positions.csv   the same positions as a table
    harvest.json    what was done to each image

Of the folder only stamps.npz is read back; an .npz of other origin does as well, if the names of its arrays are told.
The *field*, the image or pointing that a stamp was cut from, is what is independent: stamps of one field share its
background, its depth and its artefacts, so training and test are split by it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from diffpost.io.atomic import replace_files

__all__ = ["Stamps", "asymmetry", "contaminated", "read_record", "read_stamps", "write_stamps"]

Array = NDArray[np.float64]

_FILE, _TABLE, _RECORD = "stamps.npz", "positions.csv", "harvest.json"
_TOP = 0.01  # share of a stamp's pixels in a tail
_WIDTH = 1.5  # of the Gaussian through which sources are looked for, pixels
_SUSPECT = 5.0  # robust deviations of a stamp that stands out
_MEAN = 4.0  # standard errors of a mean asymmetry that cannot be chance


@final
@dataclass(frozen=True, eq=False)
class Stamps:
    """Blank sky.

    Attributes:
        values: (n, h, w) float32, the local background subtracted, in ``unit``.
        fields: (n,) names.
        unit: as BUNIT has it; None where it is not known.
        x, y: (n,) zero-based pixels of the stamps' middles in their images; NaN where not known.
        ra, dec: (n,) degrees; NaN where not known.

    Raises:
        ValueError: arrays that do not fit each other, no stamps, or values that are not finite.
    """

    values: NDArray[np.float32]
    fields: NDArray[np.str_]
    unit: str | None
    x: Array
    y: Array
    ra: Array
    dec: Array

    def __post_init__(self) -> None:
        if self.values.ndim != 3 or not len(self.values):
            raise ValueError(f"got stamps of shape {self.values.shape}; expected (n, h, w), n > 0")
        for name in ("fields", "x", "y", "ra", "dec"):
            if getattr(self, name).shape != (len(self.values),):
                raise ValueError(
                    f"got {len(self.values)} stamps and {name} of shape {getattr(self, name).shape}; expected one each"
                )
        bad = ~np.isfinite(self.values).all((1, 2))
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} stamps hold values that are not finite, the first is number {int(bad.argmax())}; "
                "drop them, or fill the pixels"
            )

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def of(
        values: NDArray[Any], fields: Sequence[str] | NDArray[Any], unit: str | None = None
    ) -> Stamps:
        """Of arrays, positions not known."""
        none = np.full(len(values), np.nan)
        return Stamps(
            np.asarray(values, np.float32), np.asarray(fields, str), unit, none, none, none, none
        )

    @property
    def names(self) -> list[str]:
        """The fields, each once, in alphabetical order."""
        return [str(name) for name in np.unique(self.fields)]

    def select(self, chosen: NDArray[Any]) -> Stamps:
        """Those of a mask or of indices."""
        rest = (getattr(self, name)[chosen] for name in ("x", "y", "ra", "dec"))
        return Stamps(self.values[chosen], self.fields[chosen], self.unit, *rest)

    @staticmethod
    def join(parts: Sequence[Stamps]) -> Stamps:
        """Several sets as one.

        Raises:
            ValueError: other sizes, or other units.
        """
        if len({part.values.shape[1:] for part in parts}) > 1:
            raise ValueError(
                f"got stamps of {sorted({p.values.shape[1:] for p in parts})} pixels; bring them to one size"
            )
        units = {part.unit for part in parts}
        if len(units) > 1:
            raise ValueError(
                f"got stamps in {sorted(map(str, units))}; noise is learned in one unit: convert them first"
            )
        columns = (
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("x", "y", "ra", "dec")
        )
        return Stamps(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.fields for part in parts]),
            parts[0].unit,
            *columns,
        )


def read_stamps(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    key: str = "stamps",
    field_key: str = "field",
    unit: str | None = None,
) -> Stamps:
    """Read folders of `diffpost harvest`, or .npz files, as one set.

    Args:
        paths: one or several.
        key, field_key: the arrays (n, h, w) and (n,) in the files.
        unit: of files that state none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: files without these arrays, or sets that do not fit each other, or another unit than stated.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not several:
        raise ValueError("got no stamps; give at least one folder or file")
    return Stamps.join([_read(Path(path), key, field_key, unit) for path in several])


def _read(path: Path, key: str, field_key: str, unit: str | None) -> Stamps:
    file = path / _FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"there are no stamps {file}; `diffpost harvest` cuts them")
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as an .npz of stamps: {error}") from error
    missing = [name for name in (key, field_key) if name not in arrays]
    if missing:
        raise ValueError(
            f"{file} has no array {' or '.join(missing)}; it holds {sorted(arrays)}: name the stamps by --key and "
            "the field of each by --field-key"
        )
    stated = str(arrays["unit"]).strip() or None if "unit" in arrays else None
    if None not in (stated, unit) and stated != unit:
        raise ValueError(f"{file} is in {stated!r} and --unit says {unit!r}; leave it out")
    values = arrays[key]
    none = np.full(len(values), np.nan)
    return Stamps(
        np.asarray(values, np.float32),
        np.asarray(arrays[field_key], str),
        stated or unit,
        *(np.asarray(arrays.get(name, none), np.float64) for name in ("x", "y", "ra", "dec")),
    )


def write_stamps(
    folder: str | os.PathLike[str], stamps: Stamps, record: dict[str, Any] | None = None
) -> None:
    """Write a folder; all files are written before the first is replaced."""
    columns: dict[str, NDArray[Any]] = {
        name: getattr(stamps, name) for name in ("x", "y", "ra", "dec")
    }
    packed = io.BytesIO()
    np.savez(
        packed,
        stamps=stamps.values,
        field=stamps.fields,
        unit=np.asarray(stamps.unit or ""),
        **columns,  # type: ignore[arg-type]
    )
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("stamp", "field", "x", "y", "ra", "dec", "std"))
    for i in range(len(stamps)):
        place = [f"{columns['x'][i]:.1f}", f"{columns['y'][i]:.1f}"]
        sky = ["" if np.isnan(columns[n][i]) else f"{columns[n][i]:.7f}" for n in ("ra", "dec")]
        writer.writerow([i, stamps.fields[i], *place, *sky, f"{stamps.values[i].std():.6g}"])
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record or {}, indent=2, allow_nan=False)
    replace_files(
        {
            path / _FILE: packed.getvalue(),
            path / _TABLE: table.getvalue().encode(),
            path / _RECORD: f"{text}\n".encode(),
        }
    )


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What harvest.json of a folder says, {} where there is none."""
    path = Path(folder) / _RECORD
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); it is truncated or corrupt") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}; expected a JSON object")
    return content


def asymmetry(values: NDArray[Any]) -> Array:
    """By how much the brightest percent of each stamp stands farther from its median than the faintest, (n,).

    In standard deviations of the pixels, after a Gaussian of 1.5 pixels, which sources survive better than noise. Its
    expectation is 0 for noise that is symmetric about its median; sources make it positive.
    """
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.asarray(values, np.float64), (0, _WIDTH, _WIDTH))
    rows = np.sort(smooth.reshape(len(smooth), -1), 1)
    rows = rows - np.median(rows, 1, keepdims=True)
    count = max(1, round(_TOP * rows.shape[1]))
    spread = np.maximum(1.4826 * np.median(np.abs(rows), 1), 1e-300)
    found: Array = (rows[:, -count:].mean(1) + rows[:, :count].mean(1)) / spread
    return found


def contaminated(values: NDArray[Any]) -> tuple[NDArray[np.bool_], str | None]:
    """Which stamps seem to hold sources, and a warning in words, None where nothing is to be said.

    A stamp is suspect whose asymmetry is above 5 of its robust deviations, which are measured on the lower half, where
    sources do not reach; and all of them together if the mean asymmetry is positive by 4 standard errors.
    """
    found = asymmetry(values)
    if len(found) < 3:
        return np.zeros(len(found), bool), None
    # faint sources in most stamps move the median, so the spread is that about 0 of what lies below
    below = found[found <= max(float(np.median(found)), 0.0)]
    centre = min(max(float(np.median(found)), 0.0), 0.5)
    spread = 1.4826 * float(np.median(np.abs(below - centre)))
    suspect = found - centre > _SUSPECT * max(spread, 0.05)
    rest = found[~suspect]
    mean = float(rest.mean()) if len(rest) else 0.0
    error = float(rest.std()) / max(len(rest), 1) ** 0.5 if len(rest) else 0.0
    words = []
    if suspect.any():
        words.append(
            f"{int(suspect.sum())} of {len(found)} stamps have a bright tail that noise does not make (the first is "
            f"number {int(suspect.argmax())}): they seem to hold sources"
        )
    if mean > _MEAN * error and mean > 0.05:
        words.append(
            f"the brightest percent of the{' other' if words else ''} stamps stands {mean:.2f} ± {error:.2f} "
            "deviations farther out than the faintest: faint sources, or noise that is skewed itself"
        )
    return suspect, "; ".join(words) or None
