"""Lenses with known parameters: against closed forms, against an independent dense matrix, and their errors."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import diffpost as dp
from diffpost.physics import Grid, SourceGridWarning
from diffpost.physics.interpolation import sample, taps
from diffpost.physics.sparse import SparseBlocks

caustics = pytest.importorskip("caustics", reason="pip install caustics")

F64 = torch.float64
COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
EINSTEIN = 1.25


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sis(radius: float = EINSTEIN):
    return caustics.SIS(COSMOLOGY, x0=0.0, y0=0.0, Rein=radius)


def sheet(kappa: float):
    return caustics.MassSheet(COSMOLOGY, x0=0.0, y0=0.0, kappa=kappa)


def lens(mass, image: Grid, source: Grid, **options) -> dp.physics.Lens:
    return dp.physics.Lens(mass, image, source, **options)


def sie_and_shear():
    sie = caustics.SIE(COSMOLOGY, name="sie", x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25)
    shear = caustics.ExternalShear(
        COSMOLOGY, name="shear", x0=0.0, y0=0.0, gamma_1=0.0625, gamma_2=-0.03125
    )
    return caustics.SinglePlane(COSMOLOGY, [sie, shear], name="plane")


# closed forms --------------------------------------------------------------------------------------


def kernel(t: np.ndarray, interpolation: str) -> np.ndarray:
    """Keys' formulae, written down once more."""
    t = np.abs(t)
    if interpolation == "bilinear":
        return np.clip(1 - t, 0, None)
    near = 1 - 2.5 * t**2 + 1.5 * t**3
    far = 2 - 4 * t + 2.5 * t**2 - 0.5 * t**3
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def isothermal_matrix(image: Grid, source: Grid, radius: float, interpolation: str) -> np.ndarray:
    """The matrix of a singular isothermal sphere, pixel of the source by pixel of it."""
    k = image.oversample
    x, y = (c.numpy() for c in image.fine.coordinates())
    r = np.hypot(x, y)
    beta_x, beta_y = x - radius * x / r, y - radius * y / r
    (ny, nx), (sy, sx) = image.shape, source.shape
    columns = []
    for i in range(sy):
        for j in range(sx):
            xj, yi = source.to_arcsec(j, i)
            seen = kernel((beta_x - xj) / source.pixel, interpolation)
            seen = seen * kernel((beta_y - yi) / source.pixel, interpolation)
            columns.append(seen.reshape(ny, k, nx, k).mean((1, 3)).ravel())
    return np.stack(columns, 1) * image.pixel**2 / source.pixel**2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_matrix_is_that_of_the_closed_form(interpolation: str, k: int) -> None:
    image = Grid((12, 10), pixel=0.35, oversample=k)
    source = Grid((7, 8), pixel=0.2, centre=(0.1, -0.05))
    operator = lens(sis(), image, source, interpolation=interpolation)
    want = torch.from_numpy(isothermal_matrix(image, source, EINSTEIN, interpolation))
    got = operator.dense((1, 7, 8))
    assert got is not None and got.shape == (120, 56)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    x, v = rand(3, 2, 7, 8, seed=1), rand(3, 2, 12, 10, seed=2)
    torch.testing.assert_close(operator(x).flatten(2), x.flatten(2) @ want.T)
    torch.testing.assert_close(operator.adjoint(v).flatten(2), v.flatten(2) @ want)
    single = operator(x.float()).flatten(2)
    torch.testing.assert_close(single.double(), x.flatten(2) @ want.T, rtol=1e-6, atol=1e-6)
    wrong = torch.from_numpy(isothermal_matrix(image, source, 1.01 * EINSTEIN, interpolation))
    assert (got - wrong).abs().max() > 1e-3  # the comparison sees a percent


def test_a_point_behind_the_middle_becomes_a_ring() -> None:
    image, source = Grid(60, pixel=0.06, oversample=4), Grid(9, pixel=0.03)
    x = torch.zeros(1, 1, 9, 9, dtype=F64)
    x[0, 0, 4, 4] = 1.0
    ring = lens(sis(), image, source)(x)[0, 0]
    theta = torch.hypot(*image.coordinates())
    light = ring > 0
    # the tent ends one source pixel from its middle, a pixel's corner half a diagonal from its own
    assert bool(((theta - EINSTEIN).abs()[light] < 0.03 * 2**0.5 + 0.06 * 2**-0.5).all())
    assert float((ring * theta).sum() / ring.sum()) == pytest.approx(EINSTEIN, abs=2e-3)
    # |beta| = |theta - theta_E|, so the flux is theta_E times the integral of S over radius and angle
    t, phi = np.linspace(-2, 2, 4001)[:, None], np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    tents = kernel(t * np.cos(phi), "bilinear") * kernel(t * np.sin(phi), "bilinear")
    want = EINSTEIN / 0.03 * tents.sum(0).mean() * 0.001 * 2 * np.pi
    assert float(ring.sum()) == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_mass_sheet_magnifies_by_its_closed_form(interpolation: str) -> None:
    """Flux grows by 1/(1 - kappa)^2, exactly where rays are a fraction of the source's pixels apart."""
    kappa = 0.5
    # rays are 0.1 arcsec apart on the image, 0.05 on the source, half of its pixels
    image, source = Grid(40, pixel=0.2, oversample=2), Grid(16, pixel=0.1)
    x = rand(2, 1, 16, 16)
    y = lens(sheet(kappa), image, source, interpolation=interpolation)(x)
    torch.testing.assert_close(y.sum((1, 2, 3)), x.sum((1, 2, 3)) / (1 - kappa) ** 2)
    other = lens(sheet(0.4), image, source, interpolation=interpolation)(x)
    assert (other.sum() / x.sum() / 4 - 1).abs() > 0.1


def test_nothing_in_the_way_moves_nothing() -> None:
    """Without a mass the image of a grid on itself is the source; rays between count by the tent."""
    grid = Grid((5, 6), pixel=0.3, centre=(0.4, 0.1))
    x = rand(2, 3, 5, 6)
    torch.testing.assert_close(lens(sheet(0.0), grid, grid)(x), x)
    torch.testing.assert_close(lens(sheet(0.0), grid, grid, interpolation="bicubic")(x), x)


def test_axes_and_signs() -> None:
    """A source to the right and up is seen to the right and up, by where a sheet takes it."""
    image, source = Grid((9, 11), pixel=0.2), Grid((9, 11), pixel=0.1)
    x = torch.zeros(1, 9, 11, dtype=F64)
    x[0, 6, 8] = 1.0
    y = lens(sheet(0.5), image, source)(x)
    assert y.nonzero().tolist() == [[0, 6, 8]]
    assert float(y[0, 6, 8]) == pytest.approx(image.area / source.area)


def test_surface_brightness_is_conserved() -> None:
    image, source = Grid(24, pixel=0.2, oversample=3), Grid(20, pixel=0.125)
    y = lens(sie_and_shear(), image, source)(torch.ones(1, 1, 20, 20, dtype=F64))[0, 0]
    inside = y > 0.999 * y.max()
    assert int(inside.sum()) > 50
    torch.testing.assert_close(
        y[inside], torch.full_like(y[inside], image.area / source.area), rtol=1e-3, atol=0
    )


def test_the_border_of_the_source() -> None:
    """Bilinear light is half on the border and gone half a pixel beyond; bicubic one and a half."""
    source = torch.ones(1, 1, 4, 4, dtype=F64)
    u = torch.tensor([3.0, 3.5, 3.75, 4.0, 4.5], dtype=F64)[None, None]
    v = torch.full_like(u, 1.5)
    torch.testing.assert_close(
        sample(source, u, v, "bilinear")[0, 0],
        torch.tensor([1, 0.5, 0.25, 0, 0], dtype=F64),
    )
    cubic = sample(source, u, v, "bicubic")[0, 0]
    assert cubic[0] == 1 and cubic[1] == 0.5 and cubic[3] == 0 and cubic[4] < 0
    far = torch.tensor([-1e30, -3.0, 7.0, 1e30], dtype=F64)[None, None]
    assert sample(source, far, torch.full_like(far, 1.5), "bicubic").abs().max() == 0


@pytest.mark.parametrize(("interpolation", "order"), [("bilinear", 2), ("bicubic", 3)])
def test_interpolation_is_of_its_order(interpolation: str, order: int) -> None:
    def error(n: int) -> float:
        grid = Grid(n, pixel=4 / n)
        x, y = grid.coordinates()
        places = 1.2 * (2 * rand(2, 400, seed=3) - 1)
        u, v = grid.to_pixel(places[0], places[1])
        got = sample(
            torch.exp(-(x**2) - 2 * y**2)[None, None], u[None, None], v[None, None], interpolation
        )[0, 0]
        return float((got - torch.exp(-(places[0] ** 2) - 2 * places[1] ** 2)).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(order, abs=0.4)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_weights_are_a_partition_of_one(interpolation: str) -> None:
    u = 3 + 4 * rand(50)
    indices, weights = taps(u, 10, interpolation)
    torch.testing.assert_close(sum(weights), torch.ones_like(u))
    torch.testing.assert_close(sum(i * w for i, w in zip(indices, weights, strict=True)), u)


def test_bilinear_is_grid_sample() -> None:
    image, source = Grid(20, pixel=0.3), Grid((9, 11), pixel=0.15, centre=(0.1, 0.2))
    x = rand(2, 3, 9, 11)
    operator = lens(sie_and_shear(), image, source)
    beta = operator.trace(*(c.flatten() for c in image.coordinates()))[0]
    left, right, bottom, top = source.extent
    grid = torch.stack(
        [
            (2 * beta[0] - left - right) / (right - left),
            (2 * beta[1] - bottom - top) / (top - bottom),
        ],
        -1,
    )
    want = torch.nn.functional.grid_sample(
        x, grid.reshape(1, 20, 20, 2).expand(2, -1, -1, -1), align_corners=False
    )
    torch.testing.assert_close(operator(x), want * image.area / source.area)


def test_images_are_those_of_caustics_own_pixelated_source() -> None:
    """With a dark border of two pixels, since caustics extrapolates into its last half pixel."""
    x = torch.zeros(12, 12, dtype=F64)
    x[2:-2, 2:-2] = rand(8, 8)
    simulator = caustics.LensSource(
        lens=sie_and_shear(),
        source=caustics.Pixelated(x0=0.05, y0=-0.1, image=x, pixelscale=0.15, scale=1.0),
        pixelscale=0.2,
        pixels_x=18,
        pixels_y=20,
        upsample_factor=2,
    )
    image, source = Grid((20, 18), pixel=0.2, oversample=2), Grid(12, 0.15, centre=(0.05, -0.1))
    got = lens(sie_and_shear(), image, source)(x[None])[0] * source.area / image.area
    torch.testing.assert_close(got, simulator.to(dtype=F64)(), rtol=1e-5, atol=1e-5)


# profiles, planes and channels -----------------------------------------------------------------------


def multiplane():
    near = caustics.SIE(COSMOLOGY, name="near", z_l=0.3, x0=0.0, y0=0.0, q=0.8, phi=0.1, Rein=0.8)
    far = caustics.SIE(COSMOLOGY, name="far", z_l=0.6, x0=0.0, y0=0.2, q=0.7, phi=1.0, Rein=0.5)
    return caustics.Multiplane(COSMOLOGY, [near, far], name="planes", z_s=2.0)


MASSES = {
    "SIE and shear": sie_and_shear,
    "EPL": lambda: caustics.EPL(COSMOLOGY, x0=0.0, y0=0.0, q=0.75, phi=0.4, Rein=1.25, t=1.125),
    "NFW": lambda: caustics.NFW(COSMOLOGY, z_l=0.5, z_s=2.0, x0=0.0, y0=0.0, mass=2e13, c=8.0),
    "multipole": lambda: caustics.SinglePlane(
        COSMOLOGY,
        [
            sis(),
            caustics.Multipole(
                COSMOLOGY, m=(3, 4), x0=0.0, y0=0.0, a_m=(0.02, 0.03), phi_m=(0.1, 0.2)
            ),
        ],
    ),
    "convergence": lambda: caustics.PixelatedConvergence(
        0.25, COSMOLOGY, convergence_map=0.5 * rand(16, 16, seed=7)
    ),
    "planes": multiplane,
}


@pytest.mark.parametrize("name", MASSES)
@pytest.mark.parametrize("n", [20, 21])  # of an odd grid a ray hits the centre
def test_every_profile_of_caustics(name: str, n: int) -> None:
    image, source = Grid(n, pixel=0.2, oversample=n % 2 + 1), Grid(16, pixel=0.15)
    operator = lens(MASSES[name](), image, source)
    x = rand(2, 1, 16, 16, seed=1)
    y = operator(x)
    assert bool(y.isfinite().all()) and float(y.max()) > 0
    torch.testing.assert_close(operator.render(x), y, rtol=1e-6, atol=1e-9)
    assert operator.dot_test((1, 16, 16)) < 1e-14
    assert operator.parameters == ()


def test_sources_at_other_redshifts_by_channel() -> None:
    """One mass in physical units, three redshifts: each channel as if alone, in one product."""

    def mass(z_s: float):
        sie = caustics.SIE(
            COSMOLOGY, z_l=0.3, z_s=z_s, x0=0.0, y0=0.0, q=0.75, phi=0.4,
            parametrization="velocity_dispersion", sigma_v=250.0,
        )  # fmt: skip
        sie.sigma_v.to_static()
        return sie

    masses = [mass(z) for z in (0.5, 1.0, 3.0)]
    image, source = Grid(20, pixel=0.2, oversample=2), Grid(12, pixel=0.1)
    together = lens(masses, image, source)
    assert together.input_shape == (3, 12, 12) and together.data_shape == (3, 20, 20)
    x = rand(2, 3, 12, 12)
    y = together(x)
    for channel, one in enumerate(masses):
        torch.testing.assert_close(y[:, channel], lens(one, image, source)(x[:, channel]))
    assert (y[:, 0] - lens(masses[2], image, source)(x[:, 0])).abs().max() > 1e-2
    torch.testing.assert_close(together.render(x), y)
    assert together.dot_test((3, 12, 12)) < 1e-14
    dense = together.dense((3, 12, 12))
    assert dense is not None
    torch.testing.assert_close(y.flatten(1), x.flatten(1) @ dense.T)
    with pytest.raises(ValueError, match=r"expected \(3, 12, 12\)"):
        together(x[:, :2])


def test_other_axes_before_the_pixels() -> None:
    image, source = Grid(8, pixel=0.4), Grid(6, pixel=0.2)
    operator = lens(sis(), image, source)
    x = rand(2, 3, 2, 6, 6)
    torch.testing.assert_close(operator(x)[1, 2], operator(x[1])[2])
    torch.testing.assert_close(operator(x[:, 0, 0]), operator(x)[:, 0, 0])


# the sparse matrix -----------------------------------------------------------------------------------


def test_the_matrix_holds_each_pixel_once_and_goes_where_data_go() -> None:
    image, source = Grid(16, pixel=0.25, oversample=4), Grid(10, pixel=0.2)
    blocks = lens(sis(), image, source).at().blocks
    rows = torch.repeat_interleave(torch.arange(256), blocks.start.diff())
    pairs = rows * 100 + blocks.column
    assert bool((pairs.diff() > 0).all())  # sorted, none twice
    assert len(blocks.value) < 256 * 64 / 3  # far from 4 k^2 a row
    half = blocks.multiply(rand(100, 2).half())
    assert half.dtype == torch.float16
    moved = blocks.to("cpu", torch.float32)
    assert moved.value.dtype == torch.float32
    torch.testing.assert_close(moved.to_dense().double(), blocks.to_dense(), rtol=1e-6, atol=1e-7)


def test_products_without_mkl_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    image, source = Grid(12, pixel=0.3, oversample=2), Grid(8, pixel=0.2)
    x, v = rand(2, 1, 8, 8), rand(2, 1, 12, 12)
    want = lens(sis(), image, source)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    got = lens(sis(), image, source)
    torch.testing.assert_close(got(x), want(x))
    torch.testing.assert_close(got.adjoint(v), want.adjoint(v))


def test_an_empty_row_is_zero() -> None:
    blocks = SparseBlocks(
        torch.tensor([0, 0, 2, 2]), torch.tensor([0, 2]), torch.tensor([1.0, 2.0]), 1, 3
    )
    torch.testing.assert_close(
        blocks.multiply(torch.ones(3, 1))[:, 0], torch.tensor([0.0, 3.0, 0.0])
    )
    torch.testing.assert_close(
        blocks.multiply(torch.ones(3, 1), adjoint=True)[:, 0], torch.tensor([1.0, 0.0, 2.0])
    )


# the source grid -------------------------------------------------------------------------------------


def test_flux_from_outside_the_source_grid() -> None:
    """Of a sheet, whose rays and light are known: beta = theta/2."""
    image, source = Grid(20, pixel=0.1, oversample=2), Grid(10, pixel=0.05)
    operator = lens(
        sheet(0.5), image, source
    )  # 2 arcsec of image are 1 of source; the grid has 0.5
    assert float(operator.flux_outside()) == pytest.approx(0.75)
    bright = torch.zeros(20, 20)
    bright[8:12, 8:12] = 1.0
    assert float(operator.flux_outside(bright)) == 0
    bright[0, 0] = 4.0
    bright[3, 3] = math.nan
    assert float(operator.flux_outside(bright)) == pytest.approx(0.2)
    assert float(operator.flux_outside(bright, threshold=2.0)) == 1
    with pytest.warns(SourceGridWarning, match=r"20.0% of the image's flux"):
        operator.check_source_grid(bright)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator.check_source_grid(bright, limit=0.3)
    with pytest.raises(ValueError, match=r"expected \(..., 20, 20\)"):
        operator.flux_outside(torch.zeros(4, 4))


# errors ----------------------------------------------------------------------------------------------

GRID = Grid(8, pixel=0.3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lens("SIE", GRID, GRID), "of type str; expected a lens model of caustics"),
        (lambda: lens([], GRID, GRID), "no mass"),
        (lambda: lens(sis(), 8, GRID), "image=8; expected a Grid"),
        (lambda: lens(sis(), GRID, None), "source=None"),
        (lambda: lens(sis(), GRID, GRID, interpolation="cubic"), "'bilinear' or 'bicubic'"),
        (lambda: lens(sis(), GRID, GRID)(torch.zeros(1, 1, 7, 8)), r"expected \(..., 8, 8\)"),
        (lambda: lens(sis(), GRID, GRID).adjoint(torch.zeros(1, 1, 7, 8)), "the image grid"),
        (lambda: lens(sis(), GRID, GRID).render(torch.zeros(8, 8)), r"expected \(B, ..., 8, 8\)"),
    ],
)
def test_errors_tell_what_to_do(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_values_out_of_range_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mass = caustics.SIE(COSMOLOGY, name="sie", x0=0.0, y0=0.0, q=1.5, phi=0.0, Rein=1.0)
    with pytest.raises(ValueError, match=r"sie.q = 1.5; expected a value from 0 to 1"):
        lens(mass, GRID, GRID)


def test_a_place_without_deflection_is_named() -> None:
    bad = caustics.ExternalShear(
        COSMOLOGY, name="wind", x0=0.0, y0=0.0, gamma_1=float("nan"), gamma_2=0.0
    )
    with pytest.raises(ValueError, match="wind"):
        lens(bad, GRID, GRID)


def test_later_changes_of_the_model_do_not_reach_the_matrix() -> None:
    mass = sis()
    operator = lens(mass, Grid(8, pixel=0.4), Grid(6, pixel=0.3))
    x = rand(1, 1, 6, 6)
    before = operator(x)
    mass.Rein = 0.5
    torch.testing.assert_close(operator(x), before)
    torch.testing.assert_close(operator.render(x), before)
