"""Measurement sets that casacore writes: columns, flags, weights, windows, fields and the sign."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import pytest

from diffpost.io.uv import read_visibilities

C = 299_792_458.0


def measurement_set(path: Path, spectrum: bool = True) -> dict:
    """Two fields, two spectral windows of two channels and two linear hands, three antennas, two times."""
    tables = pytest.importorskip("casacore.tables", reason="needs python-casacore")
    g = np.random.default_rng(0)
    shapes = {"DATA": 2, "WEIGHT_SPECTRUM": 2}
    extra = [
        tables.makearrcoldesc("DATA", 0j, ndim=2, valuetype="complex"),
        *(
            [tables.makearrcoldesc("WEIGHT_SPECTRUM", 0.0, ndim=2, valuetype="float")]
            if spectrum
            else []
        ),
    ]
    del shapes
    main = tables.default_ms(str(path), tables.maketabdesc(extra))
    pairs, rows = [(0, 1), (0, 2), (1, 2)], []
    for field in (0, 1):
        for window in (0, 1):
            rows += [(field, window, time, a, b) for time in (5e9, 5e9 + 30) for a, b in pairs]
    m = len(rows)
    main.addrows(m)
    fields, windows, times, first, second = (np.array(column) for column in zip(*rows, strict=True))
    uvw = g.normal(size=(m, 3)) * 100
    data = (g.normal(size=(m, 2, 2)) + 1j * g.normal(size=(m, 2, 2))).astype(np.complex64)
    weights = g.uniform(1, 2, (m, 2, 2)).astype(np.float32)
    flag = np.zeros((m, 2, 2), bool)
    flag[0, 1, 0] = True
    row_flag = np.zeros(m, bool)
    row_flag[1] = True
    for name, values in [
        ("UVW", uvw), ("DATA", data), ("FLAG", flag), ("FLAG_ROW", row_flag), ("ANTENNA1", first), ("ANTENNA2", second),
        ("TIME", times), ("EXPOSURE", np.full(m, 30.0)), ("FIELD_ID", fields), ("DATA_DESC_ID", windows),
        ("WEIGHT", weights[:, 0]), ("SIGMA", weights[:, 0] ** -0.5),
    ]:  # fmt: skip
        main.putcol(name, values)
    if spectrum:
        main.putcol("WEIGHT_SPECTRUM", weights)
    main.close()

    def fill(name: str, count: int, columns: dict) -> None:
        table = tables.table(f"{path}::{name}", readonly=False, ack=False)
        table.addrows(count)
        for column, values in columns.items():
            for row in range(count):
                table.putcell(column, row, values[row])
        table.close()

    nu = np.array([[100e9, 101e9], [112e9, 111e9]])
    fill("SPECTRAL_WINDOW", 2, {"CHAN_FREQ": nu, "CHAN_WIDTH": [[1e9, 1e9], [-1e9, -1e9]], "NUM_CHAN": [2, 2]})  # fmt: skip
    fill("POLARIZATION", 1, {"CORR_TYPE": [np.array([9, 12], np.int32)], "NUM_CORR": [2]})
    fill("DATA_DESCRIPTION", 2, {"SPECTRAL_WINDOW_ID": [0, 1], "POLARIZATION_ID": [0, 0]})
    directions = np.radians([[[83.0, -5.0]], [[-60.0, 20.0]]])
    fill("FIELD", 2, {"NAME": ["Orion", "other"], "PHASE_DIR": directions, "NUM_POLY": [0, 0]})
    fill("ANTENNA", 3, {"NAME": ["A", "B", "C"], "DISH_DIAMETER": [12.0] * 3})
    return {"uvw": uvw, "data": data, "weights": weights, "nu": nu, "times": times}


def test_a_measurement_set(tmp_path: Path) -> None:
    path = tmp_path / "a.ms"
    truth = measurement_set(path)
    with pytest.raises(ValueError, match=r"--field, a name or a number: 0: Orion, 1: other"):
        read_visibilities(path)
    found = read_visibilities(path, field="other")
    rows = slice(12, 24)
    nu = truth["nu"][np.repeat([0, 1], 6)]
    np.testing.assert_allclose(found.u, (truth["uvw"][rows, :1] * nu / C).ravel(), rtol=1e-12)
    np.testing.assert_allclose(found.w, (truth["uvw"][rows, 2:] * nu / C).ravel(), rtol=1e-12)
    np.testing.assert_allclose(found.vis, truth["data"][rows].mean(-1).conj().ravel(), rtol=1e-6)
    weight = 4 / (1 / truth["weights"][rows].astype(float)).sum(-1)
    np.testing.assert_allclose(found.weight, weight.ravel(), rtol=1e-6)
    np.testing.assert_allclose(found.frequency, nu.ravel())
    assert found.channel.reshape(2, 6, 2)[:, 0].tolist() == [[0, 1], [2, 3]]
    assert (found.ra, found.dec) == pytest.approx((300.0, 20.0))
    assert found.time[0] == pytest.approx(5e9 / 86400, abs=1e-9)
    assert found.antennas == ("A", "B", "C")
    beam = np.degrees(1.13 * C / nu.mean() / 12) * 3600
    assert found.primary_beam == pytest.approx(beam)
    one = read_visibilities(path, field=1, spw=(1,))
    np.testing.assert_allclose(one.frequency.reshape(6, 2)[0], truth["nu"][1])
    with pytest.raises(ValueError, match=r"spectral windows \[0, 1\]; got \[5\]"):
        read_visibilities(path, field=1, spw=(5,))


def test_flags_and_weights_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.ms"
    truth = measurement_set(path, spectrum=False)
    found = read_visibilities(path, field=0)
    # Row 1 is flagged; of row 0, channel 1 has YY alone.
    assert len(found) == 22
    assert found.counts["flagged"] == 2
    np.testing.assert_allclose(found.vis[1], truth["data"][0, 1, 1].conj(), rtol=1e-6)
    np.testing.assert_allclose(found.weight[1], truth["weights"][0, 0, 1], rtol=1e-6)
    assert len(read_visibilities(path, field=0, stokes="I")) == 21


def test_without_casacore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.dat").write_bytes(b"")
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.startswith("casacore"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"diffpost\[casa\].*exportuvfits"):
        read_visibilities(tmp_path)


def test_a_broken_measurement_set(tmp_path: Path) -> None:
    pytest.importorskip("casacore.tables", reason="needs python-casacore")
    (tmp_path / "table.dat").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="cannot read"):
        read_visibilities(tmp_path)
