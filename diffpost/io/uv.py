r"""Visibilities of an interferometer, from whatever file holds them.

    data = read_visibilities("target.uvfits")
    data.u, data.v, data.vis, data.weight, data.notes

A visibility is V(u, v) = sum_j x_j exp(-2 pi i (u l_j + v m_j)) with l towards east, m towards north, u and v in
wavelengths, V in Jy (docs/conventions.md), and `weight` is 1/sigma^2 of each of its real and its imaginary part.

Files have the other sign.  UVFITS stores baselines as antenna 1 - antenna 2 (AIPS Memo 117; so do the EHT's files, to 1e-5 of
their stations' positions), measurement sets hold antenna 2 - antenna 1 for nominally conjugated products, casacore copies one
into the other as they are, and in both the sky is the transform with exp(+2 pi i).  So these formats, and visilens' binary,
which copies a measurement set, are conjugated on reading and on writing; tables are taken as they are.  M87's ring is then
bright in the south, as published, and SPT0346-52's images lie around the place that visilens gives its lens.
`conjugate=True` turns the sign of a file that was written the other way round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FORMATS",
    "SPEED_OF_LIGHT",
    "VisibilityData",
    "cleaned",
    "format_of",
    "read_visibilities",
]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

SPEED_OF_LIGHT = 299_792_458.0  # m/s
FORMATS = ("uvfits", "ms", "table", "visilens")
_SUSPECT = 5e4  # wavelengths below which the longest baseline may well be in metres
_ROWS = ("u", "v", "vis", "weight", "w", "antenna1", "antenna2", "time", "exposure", "frequency", "channel", "bandwidth")  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class VisibilityData:
    """Visibilities that count: finite, not flagged, of positive weight, between two antennas.

    u, v: (m,) wavelengths; w likewise, or None.
    vis: (m,) complex, Jy; weight: (m,) 1/Jy^2, the inverse variance of each of its real and imaginary part.
    antenna1, antenna2: (m,) numbers from 0, or None where the file has none; antennas: their names.
    time: (m,) MJD in days at the middle; exposure: (m,) seconds.
    frequency, bandwidth: (m,) Hz; channel: (m,) numbers from 0 over all spectral windows.
    primary_beam: full width at half power of the antennas' pattern, arcsec, or None where it is not known.
    ra, dec: of the phase centre, degrees; None where they are not known.
    path, form: where they are from; target: its name.
    counts: how many were read and dropped, by reason; notes: what the reader found worth telling.

    Raises
    ------
    ValueError: arrays of different lengths or none at all, values that are not finite, weights that are not positive.
    """

    u: Array
    v: Array
    vis: NDArray[np.complex128]
    weight: Array
    w: Array | None = None
    antenna1: Ints | None = None
    antenna2: Ints | None = None
    time: Array | None = None
    exposure: Array | None = None
    frequency: Array | None = None
    channel: Ints | None = None
    bandwidth: Array | None = None
    antennas: tuple[str, ...] = ()
    primary_beam: float | None = None
    ra: float | None = None
    dec: float | None = None
    target: str = ""
    path: str = ""
    form: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"vis": np.complex128, "antenna1": np.int64, "antenna2": np.int64, "channel": np.int64}  # fmt: skip
        length = None
        for name in _ROWS:
            value = getattr(self, name)
            if value is None:
                continue
            array = np.array(value, dtype=kinds.get(name, np.float64)).reshape(-1)
            length = len(array) if length is None else length
            if len(array) != length:
                raise ValueError(
                    f"VisibilityData: got {len(array)} values of {name} and {length} of u; expected as many"
                )
            if not np.isfinite(array).all():
                raise ValueError(
                    f"VisibilityData: {name} has {int((~np.isfinite(array)).sum())} values that are not finite; drop "
                    "their visibilities (`cleaned` does)"
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if not length:
            raise ValueError("VisibilityData: got no visibilities; expected at least one")
        if not (self.weight > 0).all():
            raise ValueError(
                f"VisibilityData: {int((self.weight <= 0).sum())} weights are not positive; drop their visibilities "
                "(`cleaned` does)"
            )
        if (self.antenna1 is None) != (self.antenna2 is None):
            raise ValueError("VisibilityData: got one antenna of each pair; expected both or none")
        if self.primary_beam is not None and not 0 < self.primary_beam < math.inf:
            raise ValueError(
                f"VisibilityData: got a primary beam of {self.primary_beam} arcsec; expected a positive width"
            )
        object.__setattr__(self, "counts", MappingProxyType(dict(self.counts)))

    def __len__(self) -> int:
        return len(self.u)

    def __repr__(self) -> str:
        return f"VisibilityData({len(self)} visibilities to {self.longest:.4g} wavelengths, {self.form or 'in memory'})"

    @property
    def distance(self) -> Array:
        """(m,) length of the baselines, wavelengths."""
        found: Array = np.hypot(self.u, self.v)
        return found

    @property
    def longest(self) -> float:
        """The longest baseline, wavelengths."""
        return float(self.distance.max())

    @property
    def baseline(self) -> Ints | None:
        """(m,) one number for each pair of antennas, whichever is the first; None where they are not known."""
        if self.antenna1 is None or self.antenna2 is None:
            return None
        low, high = (
            np.minimum(self.antenna1, self.antenna2),
            np.maximum(self.antenna1, self.antenna2),
        )
        found: Ints = low * (int(high.max()) + 1) + high
        return found

    @property
    def noise(self) -> float:
        """Standard deviation of the naturally weighted dirty image, Jy/beam."""
        return float(self.weight.sum() ** -0.5)

    def select(self, rows: NDArray[Any]) -> VisibilityData:
        """The visibilities of these rows, by a mask or numbers.

        Raises
        ------
        ValueError: none are left.
        """
        chosen = {n: getattr(self, n)[rows] for n in _ROWS if getattr(self, n) is not None}
        return replace(self, **chosen)

    def conjugated(self) -> VisibilityData:
        """The same sky turned by 180 degrees: data that were written with the other sign."""
        return replace(self, vis=self.vis.conj())

    def told(self, *notes: str) -> VisibilityData:
        """The same data with more notes."""
        return replace(self, notes=(*self.notes, *notes))


def cleaned(
    *,
    path: str,
    flag: NDArray[np.bool_] | None = None,
    notes: tuple[str, ...] = (),
    counts: Mapping[str, int] | None = None,
    **values: Any,
) -> VisibilityData:
    """The visibilities of a file that count, and how many do not and why.

    Parameters
    ----------
    flag: (m,) True for those that the file itself rules out.
    values: the fields of `VisibilityData`, all rows of the file.

    Raises
    ------
    ValueError: none is left, saying what ruled them out.
    """
    rows = {n: np.asarray(values.pop(n)).reshape(-1) for n in _ROWS if values.get(n) is not None}
    m = len(rows["u"])
    found = dict(counts or {})
    found["read"] = found.get("read", 0) + m
    keep = np.ones(m, dtype=bool)

    def drop(reason: str, bad: NDArray[np.bool_]) -> None:
        now = bad & keep
        found[reason] = found.get(reason, 0) + int(now.sum())
        keep[now] = False

    if flag is not None:
        drop("flagged", np.asarray(flag).reshape(-1))
    vis, weight = rows["vis"], rows["weight"]
    with np.errstate(invalid="ignore"):
        drop("weight zero or negative", weight <= 0)
    finite = (
        np.isfinite(vis) & np.isfinite(weight) & np.isfinite(rows["u"]) & np.isfinite(rows["v"])
    )
    drop("not a number", ~finite)
    if "antenna1" in rows:
        drop("of one antenna", rows["antenna1"] == rows["antenna2"])
    lost = {r: n for r, n in found.items() if r != "read" and n}
    reasons = ", ".join(f"{n} {r}" for r, n in lost.items())
    if not keep.any():
        raise ValueError(
            f"{path} has no visibility that can be used: of {found['read']}, {reasons or 'none are there'}. Check the flags, the "
            "weights and the selection"
        )
    if reasons:
        notes = (
            *notes,
            f"{int(keep.sum())} of {found['read']} visibilities are used; left out: {reasons}",
        )
    else:
        notes = (*notes, f"{m} visibilities")
    chosen: dict[str, Any] = {name: array[keep] for name, array in rows.items()}
    return VisibilityData(**chosen, path=path, counts=found, notes=notes, **values)


def told_units(data: VisibilityData) -> VisibilityData:
    """The same data, with a warning where baselines are so short that they may be in metres."""
    if data.longest >= _SUSPECT:
        return data
    return data.told(
        f"warning: u and v reach {data.longest:.4g} only; if that is in metres and not in wavelengths, give the unit (m) and "
        "the frequency"
    )


def format_of(path: str | os.PathLike[str]) -> str:
    """Which of `FORMATS` a file has, by what is in it and then by its name.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: none of them.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no visibilities {path}")
    if path.is_dir():
        if (path / "table.dat").is_file():
            return "ms"
        raise ValueError(
            f"{path} is a folder, but not a measurement set (it has no table.dat); expected one, or a UVFITS file or a table"
        )
    with path.open("rb") as stream:
        start = stream.read(10)
    if start.startswith(b"SIMPLE"):
        return "uvfits"
    if start.startswith((b"PK", b"\x93NUMPY")) or path.suffix.lower() in (
        ".csv",
        ".txt",
        ".dat",
        ".tsv",
    ):
        return "table"
    if path.suffix.lower() == ".bin" and path.stat().st_size % 56 == 8:
        return "visilens"  # 7 columns of float64 and one number more
    if path.suffix.lower() in (".uvfits", ".fits", ".uvf"):
        return "uvfits"  # whose reader says what is wrong with it
    raise ValueError(f"cannot tell the format of {path}; name it by --format: {', '.join(FORMATS)}")


def read_visibilities(
    path: str | os.PathLike[str],
    form: str | None = None,
    *,
    stokes: str = "pseudoI",
    field: str | int | None = None,
    spw: tuple[int, ...] | None = None,
    uv_unit: str | None = None,
    frequency: float | None = None,
    conjugate: bool = False,
) -> VisibilityData:
    """Read the visibilities of one target.

    Parameters
    ----------
    path: UVFITS file, measurement set (needs python-casacore), .npz, .npy or CSV table, or visilens' binary.
    form: one of `FORMATS`; default: by what the file holds.
    stokes: "I" (both parallel hands), "pseudoI" (a hand that is alone stands for both), or one hand: RR, LL, XX, YY.
    field: name or number of the target in a file of several.
    spw: spectral windows (IFs) to use, from 0; default all.
    uv_unit: of a table: "wavelength" or "m", which needs `frequency` (Hz).
    conjugate: the file was written with the other sign than its format has (see above).

    Raises
    ------
    FileNotFoundError, ValueError: what cannot be read or used, saying why.
    """
    chosen = format_of(path) if form is None else form
    if chosen not in FORMATS:
        raise ValueError(f"got the format {form!r}; expected one of {', '.join(FORMATS)}")
    if not Path(path).exists():
        raise FileNotFoundError(f"there are no visibilities {path}")
    if chosen not in ("uvfits", "ms"):
        given = [n for n, value in (("field", field), ("spw", spw)) if value is not None]
        if given:
            raise ValueError(
                f"{path} is a {chosen}, which has no {' or '.join(given)}; leave it out"
            )
    if chosen != "table" and (uv_unit is not None or frequency is not None):
        raise ValueError(
            f"{path} is a {chosen}, whose units are known; leave out the unit and the frequency"
        )
    if chosen == "uvfits":
        from diffpost.io.uvfits import read_uvfits

        data = read_uvfits(path, stokes=stokes, field=field, spw=spw)
    elif chosen == "ms":
        from diffpost.io.measurement_set import read_measurement_set

        data = read_measurement_set(path, stokes=stokes, field=field, spw=spw)
    elif chosen == "visilens":
        from diffpost.io.uv_tables import read_visilens

        data = read_visilens(path)
    else:
        from diffpost.io.uv_tables import read_table

        data = read_table(path, uv_unit=uv_unit, frequency=frequency)
    if conjugate:
        data = data.conjugated().told("the visibilities were conjugated, as asked")
    return data


def same(a: VisibilityData, b: VisibilityData) -> bool:
    """Whether two records hold the same rows, bit by bit."""
    for item in fields(VisibilityData):
        if item.name not in _ROWS:
            continue
        one, other = getattr(a, item.name), getattr(b, item.name)
        if (one is None) != (other is None) or (one is not None and not np.array_equal(one, other)):
            return False
    return True
