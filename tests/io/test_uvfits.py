"""UVFITS: round trips, axes and frequencies, Stokes I, several targets, broken files, and the sign by the EHT's M87."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from scipy.optimize import minimize

from diffpost.io.datasets import fetch
from diffpost.io.uv import VisibilityData, read_visibilities
from diffpost.io.uvfits import write_uvfits

C = 299_792_458.0
NU = 230e9


def random_data(m: int = 40, seed: int = 0) -> VisibilityData:
    g = np.random.default_rng(seed)
    channel = np.arange(m) % 3
    return VisibilityData(
        *(g.normal(size=(2, m)) * 3e5),
        g.normal(size=m) + 1j * g.normal(size=m),
        g.uniform(1, 2, m),
        w=g.normal(size=m) * 1e5,
        antenna1=g.integers(0, 300, m),
        antenna2=g.integers(300, 400, m),
        time=57854.25 + g.uniform(size=m),
        exposure=g.uniform(1, 10, m),
        frequency=NU + 1e9 * channel,
        bandwidth=np.full(m, 1e9),
        channel=channel,
        ra=83.2,
        dec=-5.4,
        target="Orion",
    )


def groups(
    m=6, ifs=2, channels=3, products=(-1, -2), order=("COMPLEX", "STOKES", "FREQ", "IF", "RA", "DEC"), seed=1, sources=None
):  # fmt: skip
    """A UVFITS file as AIPS lays it out: baselines in seconds, one FQ row of several IFs, and what it should give."""
    g = np.random.default_rng(seed)
    k = len(products)
    vis = g.normal(size=(m, ifs, channels, k)) + 1j * g.normal(size=(m, ifs, channels, k))
    weight = g.uniform(1, 3, (m, ifs, channels, k))
    uv = g.normal(size=(3, m)) * 1e-6
    sizes = {"COMPLEX": 3, "STOKES": k, "FREQ": channels, "IF": ifs, "RA": 1, "DEC": 1}
    cube = np.stack([vis.real, vis.imag, weight], -1)  # IF, FREQ, STOKES, COMPLEX
    have = [n for n in reversed(order) if n in ("IF", "FREQ", "STOKES", "COMPLEX")]
    cube = cube.transpose(0, *(1 + ("IF", "FREQ", "STOKES", "COMPLEX").index(n) for n in have))
    cube = cube.reshape(m, *(sizes[n] for n in reversed(order)))
    names = ["UU", "VV", "WW", "BASELINE", "DATE", "DATE"]
    values = [*uv, np.array([256.0 + 2 + j % 2 for j in range(m)]), np.full(m, 2457854.0), np.arange(m) * 1e-4 + 0.5]  # fmt: skip
    if sources is not None:
        names, values = [*names, "SOURCE"], [*values, np.asarray(sources, float)]
    hdu = fits.GroupsHDU(fits.GroupData(cube, parnames=names, pardata=values, bitpix=-64))
    start = {"STOKES": (products[0], products[1] - products[0] if k > 1 else 1), "FREQ": (NU, 1e6), "RA": (10.0, 1), "DEC": (20.0, 1)}  # fmt: skip
    for i, name in enumerate(order, start=2):
        value, step = start.get(name, (1.0, 1.0))
        hdu.header[f"CTYPE{i}"], hdu.header[f"CRVAL{i}"] = name, value
        hdu.header[f"CDELT{i}"], hdu.header[f"CRPIX{i}"] = step, 2.0 if name == "FREQ" else 1.0
    hdu.header["OBJECT"] = "TEST"
    offsets, width = np.array([0.0, 5e9])[:ifs], np.array([2e6, 2e6])[:ifs]
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("FRQSEL", "1J", array=[1]),
            fits.Column("IF FREQ", f"{ifs}D", array=offsets[None]),
            fits.Column("CH WIDTH", f"{ifs}E", array=width[None]),
            fits.Column("TOTAL BANDWIDTH", f"{ifs}E", array=width[None]),
            fits.Column("SIDEBAND", f"{ifs}J", array=np.array([[1, -1]])[:, :ifs]),
        ],
        name="AIPS FQ",
    )
    sign = np.array([1, -1])[:ifs]
    nu = NU + offsets[:, None] + (sign * width)[:, None] * (np.arange(channels) - 1)
    return fits.HDUList([hdu, table]), {"uv": uv, "vis": vis, "weight": weight, "nu": nu}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    data = random_data()
    path = tmp_path / "a.uvfits"
    write_uvfits(data, path)
    found = read_visibilities(path)
    for name in ("u", "v", "w", "vis", "weight", "time", "exposure", "frequency", "bandwidth"):
        np.testing.assert_allclose(getattr(found, name), getattr(data, name), rtol=1e-15)
    for name in ("antenna1", "antenna2", "channel"):
        assert np.array_equal(getattr(found, name), getattr(data, name)), name
    assert (found.ra, found.dec, found.target) == (83.2, -5.4, "Orion")
    with pytest.raises(FileExistsError, match="overwrite"):
        write_uvfits(data, path)
    bare = VisibilityData(data.u, data.v, data.vis, data.weight)
    write_uvfits(bare, path, overwrite=True)
    again = read_visibilities(path)
    assert (again.frequency, again.ra, again.time, again.target) == (None, None, None, "")
    np.testing.assert_allclose(again.vis, data.vis, rtol=3e-15)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "order",
    [
        ("COMPLEX", "STOKES", "FREQ", "IF", "RA", "DEC"),
        ("COMPLEX", "FREQ", "STOKES", "RA", "DEC", "IF"),
    ],
)
def test_axes_frequencies_and_baselines(tmp_path: Path, order: tuple[str, ...]) -> None:
    hdus, truth = groups(order=order)
    path = tmp_path / "a.uvfits"
    hdus.writeto(path)
    data = read_visibilities(path)
    np.testing.assert_allclose(data.frequency.reshape(6, 2, 3)[0], truth["nu"], rtol=1e-14)
    expected = truth["uv"][0][:, None, None] * truth["nu"]
    np.testing.assert_allclose(data.u, expected.ravel(), rtol=1e-13)
    np.testing.assert_allclose(data.vis, truth["vis"].mean(-1).conj().ravel(), rtol=1e-13)
    weight = 4 / (1 / truth["weight"]).sum(-1)
    np.testing.assert_allclose(data.weight, weight.ravel(), rtol=1e-13)
    assert data.antenna1.tolist() == [0] * 36
    assert data.antenna2.reshape(6, 6)[:, 0].tolist() == [1, 2, 1, 2, 1, 2]
    assert data.time.reshape(6, 6)[1, 0] == pytest.approx(57854.0 + 1e-4, abs=1e-9)
    assert data.channel.reshape(6, 6)[0].tolist() == [0, 1, 2, 3, 4, 5]
    one = read_visibilities(path, spw=(1,))
    np.testing.assert_allclose(one.frequency.reshape(6, 3)[0], truth["nu"][1], rtol=1e-14)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        read_visibilities(path, spw=(2,))


def test_weight_of_stokes_i_is_its_inverse_variance() -> None:
    """By simulated noise: weight x variance is 1 to three errors, where weights added up would be 1.13 off or more."""
    from diffpost.io.stokes import stokes_i

    g = np.random.default_rng(3)
    weight = np.broadcast_to([1.0, 4.0], (40000, 2))
    vis = (g.normal(size=(40000, 2)) + 1j * g.normal(size=(40000, 2))) / np.sqrt(weight)
    out, w, _ = stokes_i(["RR", "LL"], vis, weight, "I", "x")
    ratio = float((w * out.real**2).mean())
    error = (2 / 40000) ** 0.5
    assert abs(ratio - 1) < 3 * error
    assert abs(float((weight.sum(-1) * out.real**2).mean()) - 1) > 20 * error


def test_flags_hands_and_products(tmp_path: Path) -> None:
    hdus, truth = groups(ifs=1, channels=1)
    cube = hdus[0].data.data
    cube[0, ..., 2] = 0.0  # both flagged
    cube[1, ..., 0, 2] = -1.0  # RR alone is flagged
    cube[2, ..., 0, 0] = np.nan
    path = tmp_path / "a.uvfits"
    hdus.writeto(path)
    strict = read_visibilities(path, stokes="I")
    assert dict(strict.counts) == {
        "read": 6, "flagged": 2, "weight zero or negative": 0, "not a number": 1, "of one antenna": 0,
    }  # fmt: skip
    pseudo = read_visibilities(path)
    assert len(pseudo) == 5
    np.testing.assert_allclose(pseudo.vis[0], truth["vis"][1, 0, 0, 1].conj(), rtol=1e-13)
    np.testing.assert_allclose(pseudo.weight[0], truth["weight"][1, 0, 0, 1], rtol=1e-13)
    assert any("one of RR and LL" in note for note in pseudo.notes)
    left = read_visibilities(path, stokes="LL")
    np.testing.assert_allclose(left.vis, truth["vis"][1:, 0, 0, 1].conj(), rtol=1e-13)
    with pytest.raises(ValueError, match="has no XX; it holds RR, LL"):
        read_visibilities(path, stokes="XX")
    cube[..., 2] = -1.0
    hdus.writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="of 6, 6 flagged"):
        read_visibilities(path)


@pytest.mark.parametrize(
    ("products", "text"), [((-3, -4), "parallel hands"), ((7, 8), "unknown Stokes")]
)
def test_products_without_stokes_i(tmp_path: Path, products: tuple[int, int], text: str) -> None:
    hdus, _ = groups(products=products)
    path = tmp_path / "a.uvfits"
    hdus.writeto(path)
    with pytest.raises(ValueError, match=text):
        read_visibilities(path)


def test_several_targets(tmp_path: Path) -> None:
    hdus, truth = groups(m=6, ifs=1, channels=1, sources=[1, 1, 2, 2, 2, 1])
    table = fits.BinTableHDU.from_columns(
        [
            fits.Column("ID. NO.", "1J", array=[1, 2]),
            fits.Column("SOURCE", "16A", array=["CAL", "M87"]),
            fits.Column("RAEPO", "1D", array=[1.0, 187.7]),
            fits.Column("DECEPO", "1D", array=[2.0, 12.4]),
        ],
        name="AIPS SU",
    )
    hdus.append(table)
    path = tmp_path / "a.uvfits"
    hdus.writeto(path)
    with pytest.raises(ValueError, match=r"choose one by --field.*0: CAL, 1: M87"):
        read_visibilities(path)
    for field in ("M87", 1):
        data = read_visibilities(path, field=field)
        assert (len(data), data.ra, data.dec, data.target) == (3, 187.7, 12.4, "M87")
        np.testing.assert_allclose(data.vis, truth["vis"][2:5].mean(-1).conj().ravel(), rtol=1e-13)
    with pytest.raises(ValueError, match="no field '3C273'"):
        read_visibilities(path, field="3C273")


def test_broken_files_say_so(tmp_path: Path) -> None:
    path = tmp_path / "a.uvfits"
    write_uvfits(random_data(200), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut off"):
        read_visibilities(path)
    fits.PrimaryHDU(np.zeros((4, 4))).writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="no random groups"):
        read_visibilities(path)
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not UVFITS"):
        read_visibilities(path)
    hdus, _ = groups()
    far = fits.GroupsHDU(
        fits.GroupData(
            hdus[0].data.data,
            parnames=["UU", "VV", "BASELINE"],
            pardata=[np.full(6, 3e4), np.full(6, 1e4), np.full(6, 258.0)],
            bitpix=-64,
        )
    )
    for i, name in enumerate(("COMPLEX", "STOKES", "FREQ", "IF", "RA", "DEC"), start=2):
        far.header[f"CTYPE{i}"], far.header[f"CRVAL{i}"] = name, {"FREQ": NU, "STOKES": -1}.get(name, 1.0)  # fmt: skip
        far.header[f"CDELT{i}"] = -1.0 if name == "STOKES" else 1.0
    far.writeto(path, overwrite=True)
    with pytest.raises(ValueError, match="expected light seconds"):
        read_visibilities(path)


@pytest.mark.data
def test_m87s_ring_is_bright_in_the_south() -> None:
    """The sign of real UVFITS, by a crude image (smooth and not negative): EHT Paper IV (2019) has a ring of 42 +- 3 uas whose
    brightest side lies at position angles of 150 to 200 degrees; with the other sign it would lie 180 degrees away."""
    path = fetch("m87-101-lo")
    data = read_visibilities(path)
    assert (len(data), data.target) == (5877, "M87")
    assert data.antennas == ("AA", "AP", "AZ", "LM", "PV", "SM")
    # Baselines are antenna 1 - antenna 2: by the stations' positions and the Earth's rotation.
    with fits.open(path) as hdus:
        stations = np.asarray(hdus["AIPS AN"].data["STABXYZ"])
        start, rate = (np.radians(hdus["AIPS AN"].header[k]) for k in ("GSTIA0", "DEGPDY"))
    x, y, _ = ((stations[data.antenna1] - stations[data.antenna2]) * NU_M87 / C).T
    hour = start + rate * (data.time - 57854.0) - np.radians(data.ra)
    u = np.sin(hour) * x + np.cos(hour) * y
    assert np.median(data.u / u) == pytest.approx(1.0, abs=1e-4)
    n, cell = 40, 3e-6 / 206264.806
    rows = slice(None, None, 12)
    at = (np.arange(n) - (n - 1) / 2) * cell
    column, row = (np.exp(-2j * np.pi * np.outer(k[rows], s * at)) for k, s in ((data.u, -1), (data.v, 1)))  # fmt: skip
    vis = data.vis[rows]
    weight = 1 / (1 / data.weight[rows] + (0.03 * np.abs(vis)) ** 2 + 1e-5)

    def misfit(flat):
        image = flat.reshape(n, n)
        off = ((row @ image) * column).sum(1) - vis
        slope = 2 * ((row.conj() * (weight * off)[:, None]).T @ column.conj()).real / len(vis)
        value = float((weight * np.abs(off) ** 2).mean())
        for axis in (0, 1):
            step = np.diff(image, axis=axis)
            value += 20 * float((step**2).sum())
            pad = [(1, 1) if k == axis else (0, 0) for k in (0, 1)]
            slope -= 40 * np.diff(np.pad(step, pad), axis=axis)
        return value, slope.ravel()

    yy, xx = np.mgrid[:n, :n] - (n - 1) / 2
    first = np.exp(-(xx**2 + yy**2) / 98)
    found = minimize(
        misfit, (0.6 * first / first.sum()).ravel(), jac=True, method="L-BFGS-B", bounds=[(0, None)] * n * n,
        options={"maxiter": 150},
    )  # fmt: skip
    image = found.x.reshape(n, n)
    best = (np.inf, 0.0, 0.0, 0.0)
    for cy in np.arange(-5, 5.5, 0.5):
        for cx in np.arange(-5, 5.5, 0.5):
            r = np.hypot(xx - cx, yy - cy)
            part = image * (r < 12)
            mean = (part * r).sum() / part.sum()
            best = min(best, ((part * (r - mean) ** 2).sum() / part.sum(), cx, cy, mean))
    _, cx, cy, radius = best
    assert 36 < 2 * radius * 3 < 50
    r = np.hypot(xx - cx, yy - cy) * 3
    east, north = -(xx - cx), yy - cy
    total = (image * ((r > 10) & (r < 32)) * np.exp(1j * np.arctan2(east, north))).sum()
    angle = np.degrees(np.angle(total)) % 360
    assert 140 < angle < 210


NU_M87 = 227070703125.0
