"""Measurement sets of CASA, by python-casacore (`pip install 'diffpost[casa]'`).

UVW are metres and become wavelengths by the frequency of each channel; weights are WEIGHT_SPECTRUM where it is filled, else
WEIGHT for every channel of a row, as CASA has them since 4.2.2, else 1/SIGMA^2. The phase centre is that of the field. The
antennas' pattern is not in a measurement set: its width is taken as 1.13 wavelengths over the diameter of the dishes (ALMA Technical
Handbook, section 3.2) where all are alike.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from diffpost.io.stokes import stokes_i
from diffpost.io.uv import SPEED_OF_LIGHT, VisibilityData, cleaned, told_units

__all__ = ["read_measurement_set"]

_CORRELATIONS = {1: "I", 2: "Q", 3: "U", 4: "V", 5: "RR", 6: "RL", 7: "LR", 8: "LL", 9: "XX", 10: "XY", 11: "YX", 12: "YY"}  # fmt: skip
_DAY = 86400.0
_BEAM = 1.13


def read_measurement_set(
    path: str | os.PathLike[str],
    *,
    stokes: str = "pseudoI",
    field: str | int | None = None,
    spw: tuple[int, ...] | None = None,
    column: str | None = None,
) -> VisibilityData:
    """Read the visibilities of one field; arguments as for `read_visibilities`.

    column: DATA or CORRECTED_DATA; default: the latter where it is there.

    Raises
    ------
    FileNotFoundError: no such folder.
    ValueError: python-casacore is not installed, not a measurement set, several fields without a choice, no Stokes I, nothing
        that can be used.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no measurement set {path}")
    try:
        from casacore import tables
    except ImportError as error:
        raise ValueError(
            f"{path} is a measurement set, which needs python-casacore: pip install 'diffpost[casa]', or export it as UVFITS "
            "(CASA's exportuvfits)"
        ) from error
    try:
        main = tables.table(str(path), ack=False, readonly=True)
    except RuntimeError as error:
        raise ValueError(f"cannot read {path} as a measurement set ({error})") from error
    try:
        return _read(tables, main, path, stokes, field, spw, column)
    except RuntimeError as error:
        raise ValueError(
            f"cannot read {path} ({error}); it is damaged, or no measurement set"
        ) from error
    finally:
        main.close()


def _read(
    tables: Any,
    main: Any,
    path: Path,
    stokes: str,
    field: str | int | None,
    spw: tuple[int, ...] | None,
    column: str | None,
) -> VisibilityData:
    def sub(name: str, *columns: str) -> list[Any]:
        table = tables.table(f"{path}::{name}", ack=False, readonly=True)
        try:
            return [table.getcol(c) if table.nrows() else np.zeros(0) for c in columns]
        finally:
            table.close()

    names = main.colnames()
    if column is None:
        column = "CORRECTED_DATA" if "CORRECTED_DATA" in names else "DATA"
    if column not in names:
        raise ValueError(
            f"{path} has no column {column}; it has {', '.join(n for n in names if 'DATA' in n)}"
        )
    number, target, ra, dec = _field(main, sub, field, path)
    windows, polarizations = sub("DATA_DESCRIPTION", "SPECTRAL_WINDOW_ID", "POLARIZATION_ID")
    wanted = set(range(int(np.max(windows, initial=-1)) + 1)) if spw is None else set(spw)
    if unknown := wanted - set(windows.tolist()):
        raise ValueError(
            f"{path} has the spectral windows {sorted(set(windows.tolist()))}; got {sorted(unknown)}"
        )
    spectral = tables.table(f"{path}::SPECTRAL_WINDOW", ack=False, readonly=True)
    polarization = tables.table(f"{path}::POLARIZATION", ack=False, readonly=True)
    parts: list[dict[str, Any]] = []
    notes: list[str] = [f"column {column}"]
    counts: list[int] = [spectral.getcell("CHAN_FREQ", i).size for i in range(spectral.nrows())]
    starts = np.concatenate([[0], np.cumsum(counts)])
    for description, (window, kind) in enumerate(
        zip(windows.tolist(), polarizations.tolist(), strict=True)
    ):
        if window not in wanted:
            continue
        rows = main.query(f"DATA_DESC_ID=={description} && FIELD_ID=={number}")
        if rows.nrows():
            codes = polarization.getcell("CORR_TYPE", kind).tolist()
            if bad := [c for c in codes if c not in _CORRELATIONS]:
                raise ValueError(
                    f"{path}: unknown correlations {bad} (CORR_TYPE); expected I, Q, U, V, RR ... or XX ..."
                )
            nu, width = (
                np.atleast_1d(spectral.getcell(c, window)) for c in ("CHAN_FREQ", "CHAN_WIDTH")
            )
            products = [_CORRELATIONS[c] for c in codes]
            part, told = _rows(rows, column, products, nu, width, stokes, path)
            part["channel"] = np.broadcast_to(
                starts[window] + np.arange(len(nu)), part["vis"].shape
            )
            parts.append(part)
            notes += [text for text in told if text not in notes]
        rows.close()
    spectral.close()
    polarization.close()
    if not parts:
        raise ValueError(
            f"{path} has no visibilities of the field {target or number} in the chosen spectral windows"
        )
    stations, diameters = sub("ANTENNA", "NAME", "DISH_DIAMETER")
    joined = {key: np.concatenate([np.ravel(part[key]) for part in parts]) for key in parts[0]}
    beam = None
    if len(diameters) and np.ptp(diameters) < 1e-3 and diameters[0] > 0:
        beam = float(
            np.degrees(_BEAM * SPEED_OF_LIGHT / joined["frequency"].mean() / diameters[0]) * 3600
        )
        notes.append(
            f"primary beam: {beam:.4g} arcsec, {_BEAM} wavelengths over the dishes of {diameters[0]:g} m"
        )
    data = cleaned(
        path=str(path),
        notes=tuple(notes),
        antennas=tuple(str(name) for name in stations),
        primary_beam=beam,
        ra=ra,
        dec=dec,
        target=target,
        form="ms",
        **joined,
    )
    return told_units(data)


def _field(
    main: Any, sub: Any, field: str | int | None, path: Path
) -> tuple[int, str, float, float]:
    labels, directions = sub("FIELD", "NAME", "PHASE_DIR")
    present = sorted(set(main.getcol("FIELD_ID").tolist())) if main.nrows() else []
    listing = ", ".join(f"{i}: {labels[i]}" for i in present)
    if not present:
        raise ValueError(f"{path} has no rows; it is empty")
    if field is None and len(present) > 1:
        raise ValueError(
            f"{path} holds {len(present)} fields; choose one by --field, a name or a number: {listing}"
        )
    matches = [i for i in present if field is None or field in (i, labels[i])]
    if len(matches) != 1:
        raise ValueError(f"{path} has no field {field!r} (or several); it holds {listing}")
    number = matches[0]
    ra, dec = np.degrees(np.asarray(directions)[number].reshape(-1, 2)[0])
    return number, str(labels[number]), float(ra % 360), float(dec)


def _rows(
    rows: Any, column: str, products: list[str], nu: Any, width: Any, stokes: str, path: Path
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The rows of one data description, every array (row, channel)."""
    values = rows.getcol(column)  # (row, channel, product)
    flag = rows.getcol("FLAG") | rows.getcol("FLAG_ROW")[:, None, None]
    weight = _weights(rows, values.shape)
    vis, w, told = stokes_i(products, values, np.where(flag, 0.0, weight), stokes, str(path))
    uvw = rows.getcol("UVW")[:, :, None] * nu / SPEED_OF_LIGHT
    shape = vis.shape

    def each(name: str, factor: float = 1.0) -> Any:
        column = (
            np.asarray(rows.getcol(name)) * factor
            if factor != 1.0
            else np.asarray(rows.getcol(name))
        )
        return np.broadcast_to(column[:, None], shape)

    part = {
        "u": uvw[:, 0],
        "v": uvw[:, 1],
        "w": uvw[:, 2],
        "vis": vis.conj(),  # to exp(-2 pi i)
        "weight": w,
        "flag": ~(w > 0) & ~np.isnan(w),
        "antenna1": each("ANTENNA1"),
        "antenna2": each("ANTENNA2"),
        "time": each("TIME", 1 / _DAY),
        "exposure": each("EXPOSURE"),
        "frequency": np.broadcast_to(nu, shape),
        "bandwidth": np.broadcast_to(np.abs(width), shape),
    }
    return part, told


def _weights(rows: Any, shape: tuple[int, ...]) -> Any:
    names = rows.colnames()
    if "WEIGHT_SPECTRUM" in names and rows.iscelldefined("WEIGHT_SPECTRUM", 0):
        found = rows.getcol("WEIGHT_SPECTRUM")
        if found.shape == shape and (found != 0).any():
            return found.astype(np.float64)
    if "WEIGHT" in names and rows.iscelldefined("WEIGHT", 0):
        found = rows.getcol("WEIGHT").astype(np.float64)
    else:
        sigma = rows.getcol("SIGMA").astype(np.float64)
        found = np.where(sigma > 0, 1 / np.where(sigma > 0, sigma, 1.0) ** 2, 0.0)
    return np.broadcast_to(found[:, None, :], shape)
