"""Conventions, closed forms, errors and memory of the operators."""

import copy
import gc
import math
import weakref

import numpy as np
import pytest
import torch

from diffpost.operator import (
    Affine,
    Compose,
    Convolve,
    Crop,
    Diagonal,
    Fourier,
    Identity,
    Mask,
    Matrix,
    NonlinearCompose,
    NonlinearSum,
    Operator,
    PixelBin,
    Scaled,
    Stack,
    Sum,
    scaled_by,
    stack,
)
from diffpost.operators.base import Memo, on_grid

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(h, w, sigma, dy=0.0, dx=0.0):
    """A Gaussian PSF about the pixel (h // 2, w // 2), shifted by (dy, dx)."""
    y = torch.arange(h, dtype=F64)[:, None] - h // 2 - dy
    x = torch.arange(w, dtype=F64)[None, :] - w // 2 - dx
    psf = torch.exp(-(y**2 + x**2) / (2 * sigma**2))
    return psf / psf.sum()


def centroid(image):
    y, x = torch.meshgrid(*(torch.arange(n, dtype=F64) for n in image.shape), indexing="ij")
    return float((image * y).sum() / image.sum()), float((image * x).sum() / image.sum())


# Convolve --------------------------------------------------------------------------------------


@pytest.mark.parametrize("boundary", ["zero", "periodic"])
@pytest.mark.parametrize("size", [(9, 9), (8, 8), (9, 6), (1, 5)])
def test_a_point_source_becomes_the_psf_where_it_stands(boundary, size):
    """The centre is (h // 2, w // 2): a point at (12, 15) gives psf[c + d] at (12 + d_y, 15 + d_x)."""
    psf = rand(*size).abs()
    x = torch.zeros(1, 1, 30, 31, dtype=F64)
    x[0, 0, 12, 15] = 2.0
    want = torch.zeros(30, 31, dtype=F64)
    top, left = 12 - size[0] // 2, 15 - size[1] // 2
    want[top : top + size[0], left : left + size[1]] = 2 * psf
    torch.testing.assert_close(Convolve(psf, boundary)(x)[0, 0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.3, -0.4), (-1.25, 2.0)])
@pytest.mark.parametrize("size", [(25, 25), (24, 26)])
def test_a_shifted_psf_shifts_the_image(size, shift):
    """The centroid moves by what the PSF's centroid is off (h // 2, w // 2), also of even-sized
    PSFs.
    """
    psf = gaussian(*size, 1.8, *shift)
    x = torch.zeros(1, 1, 64, 64, dtype=F64)
    x[0, 0, 30, 33] = 1.0
    y, z = centroid(Convolve(psf)(x)[0, 0])
    assert abs(y - 30 - shift[0]) < 1e-5 and abs(z - 33 - shift[1]) < 1e-5


@pytest.mark.parametrize("size", [(3, 3), (4, 2), (7, 8), (13, 13), (31, 40)])
def test_zero_boundary_is_the_direct_sum(size):
    """Against torch's convolution on an image with explicit zeros around it, also for PSFs larger
    than it.
    """
    psf, x = rand(*size), rand(2, 3, 12, 13, seed=1)
    h, w = size
    flipped = psf.flip(0, 1)[None, None].expand(3, 1, h, w)
    # out[i] = sum_j psf[c + i - j] x[j]: the flipped kernel starts at i - (h - 1 - c)
    padded = torch.nn.functional.pad(x, (w - 1 - w // 2, w // 2, h - 1 - h // 2, h // 2))
    want = torch.nn.functional.conv2d(padded, flipped, groups=3)
    torch.testing.assert_close(Convolve(psf)(x), want, rtol=1e-10, atol=1e-10)
    small = Convolve(psf.float())(x.float()).double()
    torch.testing.assert_close(small, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_nothing_wraps_around():
    """Light that leaves over one edge does not come back over the other; with a periodic boundary
    it does.
    """
    x = torch.zeros(1, 1, 16, 16, dtype=F64)
    x[0, 0, 0, 0] = 1.0
    psf = gaussian(15, 15, 2.0)
    assert Convolve(psf)(x)[0, 0, 9:, 9:].abs().max() < 1e-15
    wrapped = Convolve(psf, "periodic")(x)[0, 0]
    assert wrapped[-1, -1] > 1e-3
    torch.testing.assert_close(wrapped.sum(), torch.ones((), dtype=F64))


def test_several_psfs_and_a_psf_per_channel():
    psfs = rand(3, 5, 5)
    x = rand(2, 3, 12, 12, seed=1)
    for boundary in ("zero", "periodic"):
        each = torch.cat([Convolve(psfs[c], boundary)(x[:, c : c + 1]) for c in range(3)], 1)
        torch.testing.assert_close(Convolve(psfs, boundary)(x), each)
        several = Convolve(psfs[:, None], boundary)
        want = torch.cat([Convolve(psfs[c], boundary)(x[:, :1]) for c in range(3)], 1)
        torch.testing.assert_close(several(x[:, :1]), want)
        assert several.output_shape((1, 12, 12)) == (3, 12, 12)


@pytest.mark.parametrize(
    ("psf", "shape", "boundary", "match"),
    [
        (torch.ones(3), None, "zero", r"expected \(h, w\)"),
        (torch.ones(2, 2, 3, 3), None, "zero", r"\(K, 1, h, w\)"),
        (torch.ones(0, 3), None, "zero", "empty"),
        (torch.full((3, 3), math.nan), None, "zero", "NaN"),
        (torch.ones(3, 3, dtype=torch.complex64), None, "zero", "complex"),
        (torch.ones(3, 3), None, "reflect", "'zero' or 'periodic'"),
        (torch.ones(3, 3), (7,), "zero", r"expected \(\.\.\., H, W\)"),
        (torch.ones(2, 3, 3), (3, 8, 8), "zero", "expected 2 channels"),
        (torch.ones(2, 3, 3), (8, 8), "zero", r"\(C, H, W\)"),
        (torch.ones(2, 1, 3, 3), (2, 8, 8), "zero", "one channel"),
        (torch.ones(9, 3), (1, 8, 8), "periodic", "larger than the image"),
    ],
)
def test_convolve_errors(psf, shape, boundary, match):
    if shape is None:
        with pytest.raises(ValueError, match=match):
            Convolve(psf, boundary)
        return
    operator = Convolve(psf, boundary)
    with pytest.raises(ValueError, match=match):
        operator.output_shape(shape)
    with pytest.raises(ValueError, match=match):
        operator(torch.zeros(2, *shape))


def test_the_adjoint_checks_its_shape():
    with pytest.raises(ValueError, match=r"expected \(2, H, W\)"):
        Convolve(torch.ones(2, 1, 3, 3)).adjoint(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"expected \(B, 3\)"):
        Matrix(torch.ones(3, 4)).adjoint(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="bind"):
        Crop(0, 0, 2, 2).adjoint(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="expected"):
        Crop(0, 0, 2, 2).bind((1, 4, 4)).adjoint(torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="expected"):
        Fourier().adjoint(torch.zeros(1, 4, 4, 3))
    with pytest.raises(ValueError, match="bind"):
        Stack([Identity(), PixelBin(2)]).adjoint(torch.zeros(1, 20))


def test_numpy_and_integer_psfs():
    x = rand(1, 1, 8, 8)
    want = Convolve(torch.ones(3, 3, dtype=F64))(x)
    torch.testing.assert_close(Convolve(np.ones((3, 3)))(x), want)
    torch.testing.assert_close(Convolve(torch.ones(3, 3, dtype=torch.int64))(x), want)


# memory and autograd ---------------------------------------------------------------------------


def test_the_transfer_function_is_kept_and_bounded():
    operator = Convolve(gaussian(5, 5, 1.0))
    for n in range(8, 60):
        operator(torch.zeros(1, 1, n, n))
    assert len(operator._memo) <= 8
    x = rand(1, 1, 59, 59, dtype=torch.float32)
    operator(x)
    kept = list(operator._memo._kept.values())
    operator(x)
    assert all(a is b for a, b in zip(kept, operator._memo._kept.values(), strict=True))
    assert len(copy.deepcopy(operator)._memo) == 0


def test_a_cache_filled_under_a_transform_serves_outside():
    """First use under inference mode or torch.func leaves nothing behind that breaks a gradient
    later.
    """
    x = rand(1, 1, 8, 8)

    def first_uses(op):
        yield lambda: torch.func.jvp(op, (x,), (x,))
        yield lambda: torch.func.vjp(op, x)
        yield lambda: torch.func.vmap(lambda v: op(v[None])[0])(x)

        def inference():
            with torch.inference_mode():
                op(x)

        yield inference

    for index in range(4):
        for make in (
            lambda: Convolve(gaussian(3, 3, 1.0).float()),
            lambda: Matrix(torch.ones(3, 64)),
            lambda: Diagonal(torch.ones(8, 8)),
        ):
            operator = make()
            list(first_uses(operator))[index]()
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(operator(y).sum(), y)
            fresh = make()
            ones = torch.ones_like(fresh(x))
            torch.testing.assert_close(gradient, fresh.linearize(x).adjoint(ones))


def test_gradients_reach_the_psf():
    """A PSF that requires a gradient gets one, twice: its graph is not kept."""
    psf = gaussian(3, 3, 1.0).requires_grad_()
    operator = Convolve(psf)
    x = rand(1, 1, 8, 8)
    first = torch.autograd.grad(operator(x).sum(), psf)[0]
    second = torch.autograd.grad(operator(x).sum(), psf)[0]
    torch.testing.assert_close(first, second)
    assert first.abs().sum() > 0


def test_memo_drops_the_least_recently_used():
    memo = Memo(2)
    memo("a", lambda: torch.zeros(1))
    memo("b", lambda: torch.ones(1))
    memo("a", lambda: torch.full((1,), 9.0))
    memo("c", lambda: torch.full((1,), 2.0))
    assert len(memo) == 2
    assert float(memo("a", lambda: torch.full((1,), 9.0))) == 0.0  # kept
    assert float(memo("b", lambda: torch.full((1,), 9.0))) == 9.0  # dropped


def test_bound_operators_are_freed():
    operator = Crop(0, 0, 2, 2) @ PixelBin(2)
    bound = weakref.ref(operator.bind((1, 8, 8)))
    assert bound() is operator.bind((1, 8, 8))
    operator.bind((1, 4, 4))
    gc.collect()
    assert bound() is None


# the others ------------------------------------------------------------------------------------


def test_fourier_is_orthonormal_with_numpys_sign():
    x = rand(2, 1, 6, 5)
    y = Fourier()(x)
    want = np.fft.fft2(x.numpy(), norm="ortho")
    np.testing.assert_allclose(y[..., 0].numpy(), want.real, atol=1e-12)
    np.testing.assert_allclose(y[..., 1].numpy(), want.imag, atol=1e-12)
    torch.testing.assert_close(y.square().sum(), x.square().sum())  # Parseval
    torch.testing.assert_close(Fourier().adjoint(y), x)


def test_pixel_bin_conserves_flux():
    x = rand(2, 3, 12, 6)
    y = PixelBin(3)(x)
    assert y.shape == (2, 3, 4, 2)
    torch.testing.assert_close(y.sum((-1, -2)), x.sum((-1, -2)))
    torch.testing.assert_close(y[0, 0, 1, 0], x[0, 0, 3:6, 0:3].sum())
    torch.testing.assert_close(
        PixelBin(2).adjoint(torch.eye(2)[None]), torch.kron(torch.eye(2), torch.ones(2, 2))[None]
    )


def test_matrix_takes_images_and_gives_them_back():
    a = Matrix(rand(3, 24))
    x = rand(2, 2, 3, 4, seed=1)
    assert a.adjoint(rand(2, 3)).shape == (2, 24)
    assert a.linearize(x).adjoint(rand(2, 3)).shape == x.shape
    assert a.linearize(x) is a.linearize(x + 1)
    assert Matrix(rand(3, 24), (2, 3, 4)).adjoint(rand(5, 3)).shape == (5, 2, 3, 4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Matrix(torch.ones(3)), r"expected \(m, n\)"),
        (lambda: Matrix(torch.ones(3, 4), (5,)), "expected 4"),
        (lambda: Matrix(torch.ones(3, 4))(torch.ones(2, 5)), "expected 4"),
        (lambda: Diagonal(torch.tensor([1.0, math.inf])), "infinite"),
        (lambda: Diagonal(torch.ones(3))(torch.ones(2, 4)), "must broadcast"),
        (lambda: Mask(torch.ones(2, 3, 4))(torch.ones(2, 3, 4)), "must broadcast"),
        (lambda: PixelBin(0), "integer"),
        (lambda: PixelBin(2.0), "integer"),
        (lambda: PixelBin(2)(torch.ones(1, 1, 4, 5)), "divisible by 2"),
        (lambda: Crop(-1, 0, 2, 2), "at least 0"),
        (lambda: Crop(0, 0, 0, 2), "at least 1"),
        (lambda: Crop(1, 0, 4, 2)(torch.ones(1, 1, 4, 5)), "at least 5"),
        (lambda: Fourier()(torch.ones(2, 4)), "expected"),
        (lambda: (Identity() + PixelBin(2))(torch.ones(1, 1, 4, 4)), "the same of all"),
        (lambda: Stack([]), "at least one"),
        (lambda: Stack([Identity()], [(2,), (3,)]), "2 output shapes for 1"),
        (lambda: Stack([Square()]), r"stack\(\)"),
        (lambda: Sum(), "at least one"),
        (lambda: math.nan * Identity(), "finite number"),
        (lambda: torch.ones(2) * Identity(), "finite number"),
        (lambda: "2" * Identity(), "finite number"),
    ],
)
def test_errors(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


# algebra ---------------------------------------------------------------------------------------


class Square(Operator):
    def __call__(self, x):
        return x**2

    def output_shape(self, input_shape):
        return tuple(input_shape)


def test_signs_of_the_algebra():
    """Linear with linear stays linear; a nonlinear part makes the whole nonlinear."""
    a, b = Convolve(gaussian(3, 3, 1.0)), Mask(torch.ones(8, 8))
    assert isinstance(a @ b, Compose) and isinstance(a + b, Sum) and isinstance(2 * a, Scaled)
    assert isinstance(-a, Scaled) and isinstance(a - b, Sum)
    assert isinstance(Square() @ a, NonlinearCompose) and isinstance(a @ Square(), NonlinearCompose)
    assert isinstance(a + Square(), NonlinearSum)
    x = rand(2, 1, 8, 8)
    torch.testing.assert_close((a - b)(x), a(x) - b(x))
    torch.testing.assert_close((a @ Square() - 3 * Square())(x), a(x**2) - 3 * x**2)
    torch.testing.assert_close((torch.tensor(2.0) * a)(x), 2 * a(x))
    for bad in (lambda: a @ 3, lambda: a + 3, lambda: a - 3, lambda: Square() @ 3):
        with pytest.raises(TypeError):
            bad()


def test_structure_that_compositions_keep():
    shape = (1, 8, 8)
    periodic = Convolve(gaussian(3, 3, 1.0), "periodic")
    zero = Convolve(gaussian(3, 3, 1.0))
    assert (periodic @ periodic).spectrum(shape) is not None
    assert (periodic + 2 * Identity()).spectrum(shape) is not None
    assert (periodic @ zero).spectrum(shape) is None and zero.spectrum(shape) is None
    assert (Mask(torch.ones(8, 8)) @ Diagonal(torch.ones(8, 8))).diagonal(shape) is not None
    assert (Mask(torch.ones(8, 8)) @ periodic).diagonal(shape) is None
    assert (PixelBin(2) @ periodic).gram_spectrum(shape) is not None
    assert (PixelBin(2) @ Mask(torch.ones(8, 8))).gram_diagonal(shape) is not None
    assert (PixelBin(2) @ periodic).spectrum(shape) is None
    assert (Matrix(rand(3, 64)) @ zero).dense(shape) is not None
    assert (zero @ zero).dense(shape) is None


@pytest.mark.parametrize("psf_size", [7, 6])
@pytest.mark.parametrize("power", [None, "spectrum"])
def test_near_spectra_hold_away_from_edges(psf_size, power):
    """What preconditions is A P A^T of the infinite field: on a grid with the margin, exact for a
    compact PSF.
    """
    psf = gaussian(psf_size, psf_size, 1.0)
    shape = (1, 24, 24)
    k = torch.hypot(torch.fft.fftfreq(24)[:, None], torch.fft.fftfreq(24)[None]).double()
    spectrum = None if power is None else 1 / (0.3 + k)
    for operator in (
        Identity(),
        2 * Convolve(psf),
        Convolve(psf) @ Convolve(psf),
        Crop(2, 3, 20, 18) @ Convolve(psf),
        Crop(2, 3, 20, 18) @ Convolve(psf, "periodic"),
        PixelBin(2) @ Convolve(psf),
        Mask(torch.ones(24, 24)) @ Convolve(psf),
        Diagonal(torch.full((1, 1, 1), 2.0)) @ Convolve(psf),
        Convolve(psf[None, None].expand(2, 1, psf_size, psf_size)),
    ):
        out = operator.output_shape(shape)
        margin = operator.margin(shape)
        grid = tuple(n + m for n, m in zip(out[-2:], margin, strict=True))
        g = operator.near_spectrum(shape, on_grid(spectrum), grid)
        assert (g >= 0).all()
        v = torch.zeros(1, *out, dtype=F64)
        v[0, 0, out[1] // 2, out[2] // 2] = 1.0
        linear = operator.bind(shape)
        image = linear.adjoint(v)
        if spectrum is not None:
            image = torch.fft.ifft2(torch.fft.fft2(image) * spectrum).real
        exact = linear(image)[:, :1]
        near = torch.fft.ifft2(
            torch.fft.fft2(v[:, :1], s=grid) * g[..., :1, :, :]
            if g.ndim > 2
            else torch.fft.fft2(v[:, :1], s=grid) * g
        ).real[..., : out[1], : out[2]]
        tolerance = 1e-10 if spectrum is None else 0.05  # a spectrum is interpolated in frequency
        assert (exact - near).abs().max() < tolerance * exact.abs().max()
    assert Fourier().near_spectrum(shape, on_grid(None), (24, 24)) is None
    assert (Fourier() @ Convolve(psf)).near_spectrum(shape, on_grid(None), (24, 24)) is None


def test_on_grid():
    """A spectrum keeps its values at common frequencies, its symmetry and its sign on any other
    grid.
    """
    power = torch.fft.fft2(rand(3, 1, 8, 6)).abs().square()
    finer = on_grid(power)((16, 12))
    torch.testing.assert_close(finer[..., ::2, ::2], power)
    torch.testing.assert_close(finer, finer.flip(-2, -1).roll((1, 1), (-2, -1)))
    odd = on_grid(power)((13, 7))
    assert odd.shape == (3, 1, 13, 7) and (odd >= 0).all()
    torch.testing.assert_close(odd, odd.flip(-2, -1).roll((1, 1), (-2, -1)))
    torch.testing.assert_close(odd[..., 0, 0], power[..., 0, 0])
    assert on_grid(power) is not None and on_grid(power)((8, 6)) is power
    assert on_grid(None)((5, 5)).shape == () and on_grid(power[..., :1, :1])((5, 5)).shape[-1] == 1


def test_affine():
    shape = (1, 6, 6)
    x = rand(2, *shape)
    operator = Affine(PixelBin(2), 3.0, -0.5)
    torch.testing.assert_close(operator(x), PixelBin(2)(3 * x - 0.5))
    assert operator.linearize(x) is operator.linearize(x + 1)  # solvers are remembered by operator
    assert operator.linearize(x).gram_diagonal(shape) is not None
    assert scaled_by(PixelBin(2), 1.0).__class__ is PixelBin
    d = rand(6, 6, seed=2)
    torch.testing.assert_close(scaled_by(PixelBin(2), d)(x), PixelBin(2)(d * x))


def test_linearised_operators_check_their_batch():
    linear = Square().linearize(rand(2, 3))
    with pytest.raises(ValueError, match="one entry for each"):
        linear(rand(1, 3))
    with pytest.raises(ValueError, match="expected"):
        linear.adjoint(rand(3, 3))
    with pytest.raises(ValueError, match="expected"):
        linear.output_shape((4,))


def test_to_moves_parameters_and_names_are_readable():
    operators = [
        Convolve(gaussian(3, 3, 1.0)),
        Diagonal(rand(8, 8)),
        Mask(rand(8, 8) > 0),
        Matrix(rand(3, 64)),
        PixelBin(2) @ Convolve(gaussian(3, 3, 1.0)),
        Identity() - 2 * Convolve(gaussian(3, 3, 1.0)),
        Stack([Identity(), Matrix(rand(3, 64))]),
        Square() @ Convolve(gaussian(3, 3, 1.0)),
        Square() - 2 * Square(),
        stack([Square(), Identity()]),
        Affine(Square(), 2.0, 1.0),
    ]
    x = rand(2, 1, 8, 8)
    for operator in operators:
        moved = operator.to(dtype=torch.float32)
        assert type(moved) is type(operator)
        torch.testing.assert_close(moved(x), operator(x), rtol=1e-4, atol=1e-4)
        assert repr(operator) == repr(moved) and "object at" not in repr(operator)
