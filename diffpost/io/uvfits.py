r"""UVFITS: random groups of one baseline and time each (AIPS Memo 117; Greisen & Harten 1981, A&AS 44, 371).

A group has parameters (UU, VV, WW in light seconds, BASELINE = 256 a1 + a2, DATE in two parts, perhaps SOURCE, FREQSEL, INTTIM)
and an array over axes named by CTYPE, of which COMPLEX holds (real, imaginary, weight), a weight of zero or below being a
flag.  The frequency of channel k of an IF is

    nu = CRVAL + IF FREQ + (k + 1 - CRPIX) CH WIDTH,

the latter two from the AIPS FQ table where there is one, and u = UU nu.  On the sign of V see :mod:`diffpost.io.uv`.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from diffpost.io.stokes import NAMES, stokes_i
from diffpost.io.uv import VisibilityData, cleaned, told_units

__all__ = ["read_uvfits", "write_uvfits"]

Array = NDArray[np.float64]

_MJD = 2400000.5
_FARTHEST = 10.0  # light seconds; no baseline is as long
_NOMINAL = 1e9  # Hz
_AXES = ("IF", "FREQ", "STOKES", "COMPLEX")


class _Refused(Exception):
    """A message of ours, told apart from the many errors that astropy raises for broken files."""


def read_uvfits(
    path: str | os.PathLike[str],
    *,
    stokes: str = "pseudoI",
    field: str | int | None = None,
    spw: tuple[int, ...] | None = None,
) -> VisibilityData:
    """Read the visibilities of one target from UVFITS; arguments as for `read_visibilities`.

    Raises
    ------
    FileNotFoundError: no such file.
    ValueError: not UVFITS, cut off, several targets without a choice, no Stokes I, or nothing that can be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no visibilities {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*truncated.*")
            warnings.simplefilter("ignore", fits.verify.VerifyWarning)
            with fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
                return _read(hdus, path, stokes, field, spw)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if type(error) is ValueError and str(path) in str(error):
            raise  # ours
        raise _broken(path, error) from error
    except Exception as error:  # astropy raises many kinds for broken files
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"cannot read {path} as UVFITS ({error}); the file is not UVFITS, or it is damaged or cut off"
    )


def _read(
    hdus: fits.HDUList,
    path: Path,
    stokes: str,
    field: str | int | None,
    spw: tuple[int, ...] | None,
) -> VisibilityData:
    primary = hdus[0]
    header = primary.header
    if not isinstance(primary, fits.GroupsHDU) or not header.get("GCOUNT", 0):
        raise _Refused(
            f"{path} holds no random groups: it is FITS, but not UVFITS"
            + (" (UVFITS-IDI is not read)" if any(h.name == "UV_DATA" for h in hdus[1:]) else "")
        )
    groups = primary.data
    values = _cube(groups.data, header, path)  # (m, IF, FREQ, STOKES, COMPLEX)
    names = [str(name).upper() for name in groups.parnames]
    uvw = [_one(groups, names, prefix, path) for prefix in ("UU", "VV", "WW")]
    if uvw[0] is None or uvw[1] is None:
        raise _Refused(f"{path} has the parameters {', '.join(names)}; expected UU and VV")
    kind = next(name for name in names if name.startswith("UU"))
    lambdas = kind.startswith("UU-L")  # wavelengths at the header's frequency
    ant1, ant2 = _antennas(groups, names, path)
    dates = [_parameter(groups, i) for i, name in enumerate(names) if name in ("DATE", "_DATE")]
    time = sum(dates[1:], dates[0] - _MJD) if dates else None
    exposure = _one(groups, names, "INTTIM", path)
    rows, position, target, told = _target(hdus, groups, names, field, path)
    notes = list(told)
    frequencies, widths = _frequencies(hdus, header, groups, names, values.shape[1:3], path)
    if (
        not lambdas
        and max(np.abs(part[np.isfinite(part)]).max(initial=0.0) for part in uvw[:2]) > _FARTHEST
    ):
        raise _Refused(
            f"{path}: UU and VV reach {max(np.nanmax(np.abs(part)) for part in uvw[:2]):.4g}; expected light seconds. They look "
            "like metres or wavelengths; write a table of u, v, re, im, weight instead"
        )
    windows = range(values.shape[1]) if spw is None else spw
    for window in windows:
        if not 0 <= window < values.shape[1]:
            raise _Refused(
                f"{path} has {values.shape[1]} IF(s); got spw {window}, expected 0 to {values.shape[1] - 1}"
            )
    chosen = values[rows][:, list(windows)]
    products = _products(header, path)
    vis, weight, more = stokes_i(
        products,
        chosen[..., 0] + 1j * chosen[..., 1],
        chosen[..., 2].astype(float),
        stokes,
        str(path),
    )
    notes += more
    shape = vis.shape  # (m, IF, FREQ)
    nu = frequencies[rows][:, list(windows)]
    reference = float(header.get("CRVAL" + _axis(header, "FREQ"), 0.0)) if lambdas else 1.0

    def spread(part: Array) -> Array:
        return part[rows][:, None, None] * nu / reference

    def each(part: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if part is None else np.broadcast_to(part[rows][:, None, None], shape)

    if kind.endswith("NCP"):
        notes.append(
            "u, v are of the NCP projection, which is taken for SIN (exact for east-west arrays only at the centre)"
        )
    known = not header.get("NOFREQ", False)
    flag = ~(weight > 0) & ~np.isnan(weight)
    data = cleaned(
        path=str(path),
        flag=flag,
        notes=tuple(notes),
        u=spread(uvw[0]),
        v=spread(uvw[1]),
        w=None if uvw[2] is None else spread(uvw[2]),
        vis=vis.conj(),  # to exp(-2 pi i)
        weight=weight,
        antenna1=each(ant1),
        antenna2=each(ant2),
        time=each(time),
        exposure=each(exposure),
        frequency=nu if known else None,
        bandwidth=np.broadcast_to(np.abs(widths[rows][:, list(windows), None]), shape)
        if known
        else None,
        channel=np.broadcast_to(_channels(groups, names, rows, windows, values.shape[1:3]), shape),
        antennas=_names(hdus),
        ra=position[0],
        dec=position[1],
        target=target,
        form="uvfits",
    )
    return told_units(data)


# Parts ----------------------------------------------------------------------------------------


def _axis(header: fits.Header, name: str) -> str:
    """Number of the axis of this name as text, "" where there is none."""
    for i in range(2, int(header["NAXIS"]) + 1):
        if str(header.get(f"CTYPE{i}", "")).strip().upper() == name:
            return str(i)
    return ""


def _cube(data: NDArray[Any], header: fits.Header, path: Path) -> NDArray[Any]:
    """The groups as (m, IF, FREQ, STOKES, COMPLEX), whatever the order of the file."""
    count = int(header["NAXIS"])
    found = [str(header.get(f"CTYPE{i}", "")).strip().upper() for i in range(count, 1, -1)]
    if data.ndim == 1 or len(found) != data.ndim - 1:
        raise _Refused(
            f"{path}: its groups have {data.ndim - 1} axes, and the header names {len(found)}"
        )
    for name, length in zip(found, data.shape[1:], strict=True):
        if name not in _AXES and length != 1:
            raise _Refused(
                f"{path}: the axis {name or '(no name)'} has {length} values; expected 1"
            )
    if "COMPLEX" not in found or data.shape[1 + found.index("COMPLEX")] not in (2, 3):
        raise _Refused(f"{path}: its groups have no axis COMPLEX of real, imaginary and weight")
    here = [name for name in _AXES if name in found]
    rest = [i for i in range(len(found)) if found[i] not in _AXES]
    order = [0, *(1 + found.index(name) for name in here), *(1 + i for i in rest)]
    cube = data.transpose(order).reshape(
        data.shape[0], *(data.shape[1 + found.index(n)] for n in here)
    )
    for place, name in enumerate(_AXES):
        if name not in here:
            cube = np.expand_dims(cube, 1 + place)
    cube = np.asarray(cube, dtype=np.float32 if cube.dtype.itemsize <= 4 else np.float64)
    if cube.shape[-1] == 2:  # no weights: all alike
        cube = np.concatenate([cube, np.ones_like(cube[..., :1])], -1)
    return cube


def _parameter(groups: Any, index: int) -> Array:
    return np.asarray(groups.field(index), dtype=np.float64)


def _one(groups: Any, names: list[str], prefix: str, path: Path) -> Array | None:
    places = [i for i, name in enumerate(names) if name.startswith(prefix)]
    return _parameter(groups, places[0]) if places else None


def _antennas(
    groups: Any, names: list[str], path: Path
) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """Numbers of the antennas from 0."""
    if "BASELINE" in names:
        code = np.floor(_parameter(groups, names.index("BASELINE")) + 1e-4).astype(np.int64)
        large = code > 65536  # Miriad's numbers above 255
        first = np.where(large, (code - 65536) // 2048, code // 256)
        second = np.where(large, (code - 65536) % 2048, code % 256)
    elif "ANTENNA1" in names and "ANTENNA2" in names:
        first, second = (
            np.rint(_parameter(groups, names.index(f"ANTENNA{k}"))).astype(np.int64) for k in (1, 2)
        )
    else:
        return None, None
    return first - 1, second - 1


def _table(hdus: fits.HDUList, name: str) -> fits.BinTableHDU | None:
    return next((hdu for hdu in hdus[1:] if hdu.name.strip().upper() == name), None)


def _names(hdus: fits.HDUList) -> tuple[str, ...]:
    """Names of the antennas by their number; "" where a number is not used."""
    table = _table(hdus, "AIPS AN")
    if table is None:
        return ()
    numbers = np.atleast_1d(table.data["NOSTA"]).astype(int)
    out = [""] * int(numbers.max(initial=0))
    for number, name in zip(numbers, table.data["ANNAME"], strict=True):
        if number > 0:
            out[number - 1] = str(name).strip()
    return tuple(out)


def _frequencies(
    hdus: fits.HDUList,
    header: fits.Header,
    groups: Any,
    names: list[str],
    shape: tuple[int, int],
    path: Path,
) -> tuple[Array, Array]:
    """(m, IF, FREQ) frequencies, Hz, and (m, IF) widths of a channel with their sign."""
    axis = _axis(header, "FREQ")
    if not axis:
        raise _Refused(f"{path} has no axis FREQ, so u and v cannot be put into wavelengths")
    start, step, at = (float(header.get(f"{key}{axis}", default)) for key, default in (("CRVAL", 0.0), ("CDELT", 0.0), ("CRPIX", 1.0)))  # fmt: skip
    m = len(groups)
    offsets, widths = np.zeros((m, shape[0])), np.full((m, shape[0]), step)
    table = _table(hdus, "AIPS FQ")
    if table is not None:
        which = np.ones(m, dtype=int)
        if "FREQSEL" in names:
            which = np.rint(_parameter(groups, names.index("FREQSEL"))).astype(int)
        for row in table.data:
            here = which == int(np.atleast_1d(row["FRQSEL"])[0])
            if len(table.data) == 1:
                here = np.ones(m, dtype=bool)
            shift, width, band = (np.atleast_1d(row[name]).astype(float) for name in ("IF FREQ", "CH WIDTH", "SIDEBAND"))  # fmt: skip
            if len(shift) < shape[0]:
                raise _Refused(
                    f"{path}: the AIPS FQ table has {len(shift)} IF(s) and the data {shape[0]}; expected as many"
                )
            width = np.where(width == 0, step, width)
            width = np.where((band < 0) & (width > 0), -width, width)
            offsets[here], widths[here] = shift[: shape[0]], width[: shape[0]]
    channel = np.arange(shape[1]) + 1 - at
    nu = start + offsets[:, :, None] + widths[:, :, None] * channel
    if not (nu > 0).all():
        raise _Refused(
            f"{path}: its frequencies reach {nu.min():.4g} Hz; expected positive ones (CRVAL{axis})"
        )
    return nu, widths


def _channels(
    groups: Any,
    names: list[str],
    rows: NDArray[np.bool_],
    windows: Iterable[int],
    shape: tuple[int, ...],
) -> NDArray[np.int64]:
    """(m, IF, FREQ) numbers of the channels, counted on over the IFs and the frequency settings."""
    setting = np.zeros(int(rows.sum()), dtype=np.int64)
    if "FREQSEL" in names:
        setting = np.rint(_parameter(groups, names.index("FREQSEL"))).astype(np.int64)[rows] - 1
    window = setting[:, None] * shape[0] + np.array(list(windows))
    return window[:, :, None] * shape[1] + np.arange(shape[1])


def _products(header: fits.Header, path: Path) -> list[str]:
    axis = _axis(header, "STOKES")
    if not axis:
        return ["I"]
    start, step, at = (
        float(header.get(f"{key}{axis}", 1.0)) for key in ("CRVAL", "CDELT", "CRPIX")
    )
    codes = [round(start + (k + 1 - at) * step) for k in range(int(header[f"NAXIS{axis}"]))]
    unknown = [code for code in codes if code not in NAMES]
    if unknown:
        raise _Refused(
            f"{path}: unknown Stokes codes {unknown}; expected 1 to 4 (I, Q, U, V) or -1 to -8 (RR, LL, ... YX)"
        )
    return [NAMES[code] for code in codes]


def _target(
    hdus: fits.HDUList, groups: Any, names: list[str], field: str | int | None, path: Path
) -> tuple[NDArray[np.bool_], tuple[float | None, float | None], str, list[str]]:
    """Rows of the target, where it is, its name, and what is worth telling."""
    header = hdus[0].header
    every = np.ones(len(groups), dtype=bool)
    table = _table(hdus, "AIPS SU")
    if "SOURCE" not in names:
        position = tuple(
            None if not (axis := _axis(header, name)) else float(header[f"CRVAL{axis}"])
            for name in ("RA", "DEC")
        )
        target = str(header.get("OBJECT", "")).strip()
        if field is not None and field not in (0, target):
            raise _Refused(
                f"{path} holds one target, {target or 'without a name'}; got field {field!r}"
            )
        return every, (position[0], position[1]), target, []
    ids = np.rint(_parameter(groups, names.index("SOURCE"))).astype(int)
    present = np.unique(ids)
    known = {}
    if table is not None:
        for row in table.data:
            known[int(row["ID. NO."])] = (
                str(row["SOURCE"]).strip(),
                float(row["RAEPO"]),
                float(row["DECEPO"]),
            )
    label = {i: known.get(i, (f"source {i}", None, None)) for i in present}
    listing = ", ".join(f"{k}: {label[i][0]}" for k, i in enumerate(present))
    if field is None and len(present) > 1:
        raise _Refused(
            f"{path} holds {len(present)} targets; choose one by --field, a name or a number: {listing}"
        )
    matches = [i for k, i in enumerate(present) if field is None or field in (k, label[i][0])]
    if len(matches) != 1:
        raise _Refused(f"{path} has no field {field!r}; it holds {listing}")
    name, ra, dec = label[matches[0]]
    if ra is None:
        axes = [_axis(header, key) for key in ("RA", "DEC")]
        ra, dec = (float(header[f"CRVAL{axis}"]) if axis else None for axis in axes)
    return ids == matches[0], (ra, dec), name, []


# Writing --------------------------------------------------------------------------------------


def write_uvfits(
    data: VisibilityData, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write visibilities as UVFITS of Stokes I, one channel a group, atomically.

    Each pair of frequency and width is a window of its own, told by FREQSEL; data without frequencies are written at a nominal
    one and marked so (NOFREQ).  Values are float64.

    Raises
    ------
    FileExistsError: the file exists and overwrite is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
    m = len(data)
    nu = np.full(m, _NOMINAL) if data.frequency is None else data.frequency
    width = np.zeros(m) if data.bandwidth is None else data.bandwidth
    # A window for each pair of frequency and width, which a group says by FREQSEL.
    settings, which = np.unique(np.stack([nu, width], 1), axis=0, return_inverse=True)
    which = np.asarray(which).reshape(-1)
    first, second = data.antenna1, data.antenna2
    if first is None or second is None:
        first, second = np.zeros(m, dtype=np.int64), np.ones(m, dtype=np.int64)
    pairs: dict[str, Array] = {
        "UU": data.u / nu,
        "VV": data.v / nu,
        "WW": (np.zeros(m) if data.w is None else data.w) / nu,
    }
    parameters: list[tuple[str, Array]] = []
    for name, values in pairs.items():
        parameters += [(f"{name}---SIN", values)]
    parameters.append(("ANTENNA1", first + 1.0))
    parameters.append(("ANTENNA2", second + 1.0))
    if data.time is not None:
        day = np.floor(data.time)
        parameters += [("DATE", day + _MJD), ("DATE", data.time - day)]
    if data.exposure is not None:
        parameters.append(("INTTIM", data.exposure))
    parameters.append(("FREQSEL", which + 1.0))
    cube = np.empty((m, 1, 1, 1, 1, 1, 3))
    cube[..., 0].flat, cube[..., 1].flat = data.vis.real, -data.vis.imag  # to exp(+2 pi i)
    cube[..., 2].flat = data.weight
    groups = fits.GroupData(
        cube,
        parnames=[name for name, _ in parameters],
        pardata=[values for _, values in parameters],
        bitpix=-64,
    )
    primary = fits.GroupsHDU(groups)
    header = primary.header
    axes = [
        ("COMPLEX", 1.0, 1.0),
        ("STOKES", 1.0, 1.0),
        ("FREQ", float(nu[0]), float(width[0])),
        ("IF", 1.0, 1.0),
        ("RA", data.ra or 0.0, 1.0),
        ("DEC", data.dec or 0.0, 1.0),
    ]
    if data.ra is None or data.dec is None:
        axes[4], axes[5] = ("RA", 0.0, 1.0), ("DEC", 0.0, 1.0)
    for i, (name, value, step) in enumerate(axes, start=2):
        header[f"CTYPE{i}"], header[f"CRVAL{i}"], header[f"CDELT{i}"], header[f"CRPIX{i}"] = name, value, step, 1.0  # fmt: skip
    header["BUNIT"] = "JY"
    if data.target:
        header["OBJECT"] = data.target
    header["EQUINOX"] = 2000.0
    if data.frequency is None:
        header["NOFREQ"] = (True, "not known, FREQ is nominal")
    if data.ra is None or data.dec is None:
        for i in (6, 7):
            header[f"CTYPE{i}"] = "UNKNOWN"
    hdus = fits.HDUList(
        [primary, _fq(settings, float(nu[0])), _an(data, int(max(first.max(), second.max())) + 1)]
    )
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        hdus.writeto(temporary, overwrite=True)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _fq(settings: Array, start: float) -> fits.BinTableHDU:
    n = len(settings)
    columns = [
        fits.Column("FRQSEL", "1J", array=np.arange(n) + 1),
        fits.Column("IF FREQ", "1D", array=settings[:, 0] - start),
        fits.Column("CH WIDTH", "1D", array=settings[:, 1]),
        fits.Column("TOTAL BANDWIDTH", "1D", array=settings[:, 1]),
        fits.Column("SIDEBAND", "1J", array=np.ones(n, dtype=int)),
    ]
    table = fits.BinTableHDU.from_columns(columns, name="AIPS FQ")
    table.header["NO_IF"] = 1
    return table


def _an(data: VisibilityData, count: int) -> fits.BinTableHDU:
    names = [*data.antennas, *[""] * count][: max(count, len(data.antennas))]
    names = [name or f"A{i + 1}" for i, name in enumerate(names)]
    columns = [
        fits.Column("ANNAME", "16A", array=names),
        fits.Column("STABXYZ", "3D", array=np.zeros((len(names), 3))),
        fits.Column("NOSTA", "1J", array=np.arange(len(names)) + 1),
        fits.Column("MNTSTA", "1J", array=np.zeros(len(names), dtype=int)),
        fits.Column("STAXOF", "1E", array=np.zeros(len(names))),
    ]
    table = fits.BinTableHDU.from_columns(columns, name="AIPS AN")
    table.header["FREQ"] = _NOMINAL if data.frequency is None else float(data.frequency[0])
    return table
