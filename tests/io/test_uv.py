"""Visibilities from tables and binaries, what counts, and the sign of real data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffpost.io.datasets import fetch
from diffpost.io.uv import VisibilityData, cleaned, format_of, read_visibilities

ARCSEC = np.pi / 180 / 3600


def sky(u, v, sources):
    """Closed form of point sources (flux, east, north in arcsec), the sign of docs/conventions.md."""
    return sum(f * np.exp(-2j * np.pi * (u * e + v * n) * ARCSEC) for f, e, n in sources)


def simulated(m: int = 60, seed: int = 0, noise: float = 0.0, **more) -> VisibilityData:
    g = np.random.default_rng(seed)
    u, v = g.normal(size=(2, m)) * 2e5
    vis = sky(u, v, [(0.03, 0.4, -0.2), (0.01, -0.1, 0.7)])
    sigma = g.uniform(1e-3, 2e-3, m)
    vis = vis + noise * sigma * (g.normal(size=m) + 1j * g.normal(size=m))
    return VisibilityData(u, v, vis, sigma**-2.0, **more)


def dirty(data: VisibilityData, n: int, cell: float) -> np.ndarray:
    """(n, n) naturally weighted dirty image, Jy/beam, by the direct transform; x runs to the west."""
    x = (np.arange(n) - (n - 1) / 2) * cell * ARCSEC
    row = np.exp(2j * np.pi * np.outer(x, data.v))
    column = np.exp(2j * np.pi * np.outer(data.u, -x))
    return ((row * (data.weight * data.vis)) @ column).real / data.weight.sum()


def test_record_refuses_what_is_wrong() -> None:
    good = simulated(5)
    for change, text in [
        ({"u": good.u[:3]}, "as many"),
        ({"vis": good.vis * np.nan}, "not finite"),
        ({"weight": 0 * good.weight}, "not positive"),
        ({"antenna1": np.zeros(5)}, "expected both"),
        ({"primary_beam": -1.0}, "positive width"),
    ]:
        values = {"u": good.u, "v": good.v, "vis": good.vis, "weight": good.weight, **change}
        with pytest.raises(ValueError, match=text):
            VisibilityData(**values)
    with pytest.raises(ValueError, match="at least one"):
        VisibilityData([], [], [], [])
    with pytest.raises(ValueError, match="read-only"):
        good.u[0] = 1.0


def test_rows_that_do_not_count_are_dropped_and_counted() -> None:
    d = simulated(8)
    vis, weight, flag = d.vis.copy(), d.weight.copy(), np.zeros(8, bool)
    flag[0], weight[1], vis[2], weight[3], weight[4] = True, -1.0, np.nan, np.nan, 0.0
    one = np.array([0, 0, 0, 0, 0, 1, 0, 0])
    kept = cleaned(
        path="x", flag=flag, u=d.u, v=d.v, vis=vis, weight=weight, antenna1=one, antenna2=np.ones(8)
    )
    assert np.array_equal(kept.u, d.u[6:])
    assert dict(kept.counts) == {
        "read": 8,
        "flagged": 1,
        "weight zero or negative": 2,
        "not a number": 2,
        "of one antenna": 1,
    }
    assert "2 of 8" in kept.notes[-1]
    with pytest.raises(ValueError, match=r"no visibility that can be used: of 8, 8 not a number"):
        cleaned(path="x", u=d.u, v=d.v, vis=d.vis * np.nan, weight=d.weight)
    with pytest.raises(ValueError, match="8 flagged"):
        cleaned(path="x", flag=~flag | flag, u=d.u, v=d.v, vis=d.vis, weight=d.weight)


@pytest.mark.parametrize("form", ["npz", "npz-complex", "npy", "csv", "csv-plain", "structured"])
def test_tables_hold_what_was_put_there(tmp_path: Path, form: str) -> None:
    d = simulated(7)
    path = tmp_path / f"vis.{'npy' if form == 'structured' else form.partition('-')[0]}"
    plain = np.stack([d.u, d.v, d.vis.real, d.vis.imag, d.weight], 1)
    if form == "npz":
        np.savez(path, u=d.u, v=d.v, re=d.vis.real, im=d.vis.imag, sigma=d.weight**-0.5)
    elif form == "npz-complex":
        np.savez(path, uu=d.u, vv=d.v, data=d.vis, weights=d.weight)
    elif form == "npy":
        np.save(path, plain)
    elif form == "structured":
        np.save(path, np.rec.fromarrays(plain.T, names="u,v,re,im,weight"))
    else:
        header = "u, v, re, im, weight" if form == "csv" else "# nothing"
        np.savetxt(path, plain, delimiter=",", header=header, comments="", fmt="%.17g")
    found = read_visibilities(path)
    for name in ("u", "v", "vis", "weight"):
        np.testing.assert_allclose(getattr(found, name), getattr(d, name), rtol=1e-14)
    flipped = read_visibilities(path, conjugate=True)
    assert np.array_equal(flipped.vis, found.vis.conj())


def test_metres_become_wavelengths_and_are_told(tmp_path: Path) -> None:
    d = simulated(5)
    path = tmp_path / "vis.npz"
    metres = 299_792_458.0 / 230e9
    np.savez(path, u=d.u * metres, v=d.v * metres, vis=d.vis, weight=d.weight)
    found = read_visibilities(path, uv_unit="m", frequency=230e9)
    np.testing.assert_allclose(found.u, d.u, rtol=1e-12)
    assert not any("warning" in note for note in found.notes)
    assert any("metres" in note for note in read_visibilities(path).notes)
    with pytest.raises(ValueError, match="need a frequency"):
        read_visibilities(path, uv_unit="m")
    with pytest.raises(ValueError, match="wavelength or m"):
        read_visibilities(path, uv_unit="km")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("u,v,re,im\n1,2,3,4\n", "weight"),
        ("u,v,re,im,weight,colour\n1,2,3,4,5,6\n", "colour"),
        ("u,v,re,im,weight\n1,2,3\n", "row 1 has 3"),
        ("u,v,re,im,weight\n1,2,3,x,5\n", "could not convert"),
        ("u,v,re,im,weight\n1,2,3,4,0\n", "1 weight zero"),
        ("u,v,re,im,weight\n1,2,nan,4,1\n", "1 not a number"),
        ("", "empty"),
    ],
)
def test_bad_tables_say_what_is_wrong(tmp_path: Path, content: str, text: str) -> None:
    path = tmp_path / "vis.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=text):
        read_visibilities(path)


def test_formats_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no visibilities"):
        read_visibilities(tmp_path / "nothing.uvfits")
    odd = tmp_path / "odd.xyz"
    odd.write_bytes(b"something else")
    with pytest.raises(ValueError, match="--format"):
        format_of(odd)
    with pytest.raises(ValueError, match="not a measurement set"):
        format_of(tmp_path)
    with pytest.raises(ValueError, match="expected one of uvfits"):
        read_visibilities(odd, "fits-idi")
    np.savez(tmp_path / "a.npz", u=[1e6], v=[1.0], re=[1.0], im=[1.0], weight=[1.0])
    with pytest.raises(ValueError, match="has no field"):
        read_visibilities(tmp_path / "a.npz", field="M87")
    cut = tmp_path / "cut.bin"
    np.arange(16.0)[:-1].tofile(cut)
    assert format_of(cut) == "visilens"
    cut.write_bytes(cut.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cut off"):
        read_visibilities(cut, "visilens")


@pytest.mark.data
def test_spt0346_is_three_images_around_its_lens() -> None:
    """Peak and noise of visilens' README; the place of the lens in its example (0.5 arcsec east) fixes the sign."""
    data = read_visibilities(fetch("spt0346-visibilities"))
    assert (len(data), data.form) == (21669, "visilens")
    assert data.primary_beam == pytest.approx(42.576, abs=1e-3)
    assert data.noise == pytest.approx(28.26e-6, rel=1e-3)
    n, cell = 128, 0.05
    image = dirty(data, n, cell)
    assert image.max() == pytest.approx(3.6e-3, rel=0.03)
    inner = image[1:-1, 1:-1]
    steps = [image[1 + a : n - 1 + a, 1 + b : n - 1 + b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    peaks = np.argwhere((inner == np.max(steps, 0)) & (inner > 40 * data.noise)) + 1
    x, y = ((peaks[:, k] - (n - 1) / 2) * cell for k in (1, 0))  # x to the west
    assert len(peaks) == 3
    centre = 0.5 * (x.min() + x.max()), 0.5 * (y.min() + y.max())
    assert abs(centre[0] + 0.5) < 0.3
    assert abs(centre[1]) < 0.3
    # The other sign puts the images on the other side, where the lens is not.
    turned = dirty(data.conjugated(), n, cell)
    np.testing.assert_allclose(turned, image[::-1, ::-1], atol=1e-12)
