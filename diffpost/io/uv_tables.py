"""Visibilities in tables: .npz, .npy and CSV of u, v, V and weight, and the flat binary of visilens.

A table has the columns u, v, then re and im (or one complex `vis`), then `weight` or `sigma`; optional are w, antenna1,
antenna2, time (MJD, days), frequency (Hz), channel.  Names are told by the keys of .npz, the fields of a structured array or
the first line of a CSV file, whose comments begin with #.  A plain array is (m, 5): u, v, re, im, weight, one row a
visibility.  The sign is that of docs/conventions.md.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffpost.io.uv import SPEED_OF_LIGHT, VisibilityData, cleaned, told_units

__all__ = ["read_table", "read_visilens"]

_ALIASES = {
    "u": ("u", "uu", "u_lambda"),
    "v": ("v", "vv", "v_lambda"),
    "w": ("w", "ww"),
    "re": ("re", "real", "re_vis", "vis_re"),
    "im": ("im", "imag", "im_vis", "vis_im"),
    "vis": ("vis", "data", "visibilities"),
    "weight": ("weight", "weights", "wt", "wgt"),
    "sigma": ("sigma", "std", "error"),
    "antenna1": ("antenna1", "ant1"),
    "antenna2": ("antenna2", "ant2"),
    "time": ("time", "mjd"),
    "exposure": ("exposure", "inttim"),
    "frequency": ("frequency", "freq"),
    "bandwidth": ("bandwidth",),
    "channel": ("channel", "chan", "spw"),
}
_PLAIN = ("u", "v", "re", "im", "weight")


def read_table(
    path: str | os.PathLike[str], *, uv_unit: str | None = None, frequency: float | None = None
) -> VisibilityData:
    """Read a table of visibilities.

    Parameters
    ----------
    uv_unit: "wavelength" (default) or "m"; frequency: of all, Hz, where the table has none.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: a column that is missing, unknown or of another length, metres without a frequency, nothing that can be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no visibilities {path}")
    if uv_unit not in (None, "wavelength", "m"):
        raise ValueError(f"got the unit {uv_unit!r} of u and v; expected wavelength or m")
    columns = _columns(path)
    m = len(columns["u"]) if "u" in columns else 0
    missing = [name for name in ("u", "v") if name not in columns]
    if "vis" not in columns:
        missing += [name for name in ("re", "im") if name not in columns]
    if "weight" not in columns and "sigma" not in columns:
        missing.append("weight (or sigma)")
    if missing:
        raise ValueError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(columns) or 'none that is known'}, expected u, v, re, im "
            "(or vis) and weight (1/sigma^2 of each part) or sigma"
        )
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{path}: its columns differ in length: {lengths}")
    vis = (
        columns["vis"].astype(np.complex128)
        if "vis" in columns
        else columns["re"] + 1j * columns["im"]
    )
    flag = None
    if "weight" in columns:
        weight = columns["weight"].astype(np.float64)
    else:
        sigma = columns["sigma"].astype(np.float64)
        flag = ~(sigma > 0) & ~np.isnan(sigma)
        weight = np.where(flag, 0.0, 1 / np.where(flag, 1.0, sigma) ** 2)
    nu = columns.get("frequency")
    if nu is None and frequency is not None:
        if not frequency > 0:
            raise ValueError(f"got a frequency of {frequency} Hz; expected a positive one")
        nu = np.full(m, float(frequency))
    factor: Any = 1.0
    if uv_unit == "m":
        if nu is None:
            raise ValueError(
                f"{path}: u and v in metres need a frequency (Hz) to become wavelengths; give it, or a column `frequency`"
            )
        factor = nu / SPEED_OF_LIGHT
    rest = {name: columns[name] for name in ("antenna1", "antenna2", "time", "exposure", "channel", "bandwidth") if name in columns}  # fmt: skip
    data = cleaned(
        path=str(path),
        flag=flag,
        u=columns["u"] * factor,
        v=columns["v"] * factor,
        w=columns["w"] * factor if "w" in columns else None,
        vis=vis,
        weight=weight,
        frequency=nu,
        form="table",
        **rest,
    )
    return told_units(data)


def read_visilens(path: str | os.PathLike[str]) -> VisibilityData:
    """Read visilens' binary: float64 rows u, v (wavelengths), re, im, sigma (Jy), two antennas, then the primary beam's FWHM
    (arcsec). It copies a measurement set, and has its sign.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: another length than seven rows and a number.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no visibilities {path}")
    size = path.stat().st_size
    if size % 56 != 8 or size < 64:
        raise ValueError(
            f"{path} has {size} bytes; expected 56 for each visibility and 8 for the primary beam: it is not visilens', or cut off"
        )
    values = np.fromfile(path)
    u, v, real, imaginary, sigma, first, second = values[:-1].reshape(7, -1)
    beam = float(values[-1])
    flag = ~(sigma > 0) & ~np.isnan(sigma)
    data = cleaned(
        path=str(path),
        flag=flag,
        u=u,
        v=v,
        vis=real - 1j * imaginary,  # to exp(-2 pi i)
        weight=np.where(flag, 0.0, 1 / np.where(flag, 1.0, sigma) ** 2),
        antenna1=first.astype(np.int64),
        antenna2=second.astype(np.int64),
        primary_beam=beam if 0 < beam < np.inf else None,
        form="visilens",
    )
    return told_units(data)


# Parts ----------------------------------------------------------------------------------------


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    with path.open("rb") as stream:
        start = stream.read(6)
    try:
        if start.startswith(b"PK"):
            with np.load(path, allow_pickle=False) as content:
                found = {name: content[name] for name in content.files}
        elif start == b"\x93NUMPY":
            array = np.load(path, allow_pickle=False)
            if array.dtype.names:
                found = {name: array[name] for name in array.dtype.names}
            else:
                found = _plain(array, path)
        else:
            found = _csv(path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read {path} as a table ({error}); it is damaged or cut off"
        ) from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(
            f"cannot read {path} as a table ({error}); it is damaged or cut off"
        ) from error
    out: dict[str, NDArray[Any]] = {}
    for name, values in found.items():
        key = name.strip().lower()
        known = next((k for k, names in _ALIASES.items() if key in names), None)
        if known is None:
            raise ValueError(
                f"{path}: unknown column {name!r}; known are {', '.join(_ALIASES)}, with u and v in wavelengths and V in Jy"
            )
        if known in out:
            raise ValueError(f"{path}: two columns are {known}")
        out[known] = np.asarray(values).reshape(-1)
    return out


def _plain(array: NDArray[Any], path: Path) -> dict[str, NDArray[Any]]:
    if array.ndim != 2 or array.shape[1] != len(_PLAIN) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: got an array of shape {array.shape} and type {array.dtype}; expected real (m, 5) of {', '.join(_PLAIN)}, or "
            "named columns"
        )
    return dict(zip(_PLAIN, array.T.astype(np.float64), strict=True))


def _csv(path: Path) -> dict[str, NDArray[Any]]:
    with path.open(newline="") as stream:
        lines = [line for line in stream if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ValueError(f"{path} is empty; expected a table of {', '.join(_PLAIN)}")
    comma = "," in lines[0]
    rows = list(csv.reader(lines)) if comma else [line.split() for line in lines]
    names = list(_PLAIN)
    try:
        [float(cell) for cell in rows[0]]
    except ValueError:
        names, rows = [cell.strip() for cell in rows[0]], rows[1:]
    if not rows or any(len(row) != len(names) for row in rows):
        at = next((i for i, row in enumerate(rows) if len(row) != len(names)), 0)
        raise ValueError(
            f"{path}: row {at + 1} has {len(rows[at]) if rows else 0} values for the columns {', '.join(names)}; expected "
            f"{len(names)} (a first line may name the columns)"
        )
    try:
        values = np.array(rows, dtype=np.float64)
    except ValueError as error:
        raise ValueError(
            f"{path}: {error}; expected numbers under the names in the first line"
        ) from None
    if len(set(names)) != len(names):
        raise ValueError(f"{path}: a column's name is there twice: {', '.join(names)}")
    return dict(zip(names, values.T, strict=True))
