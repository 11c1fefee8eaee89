"""What every operator must pass; a new one is added to CASES (and NONLINEAR) and nowhere else.

The checks are functions of an operator, so that the end of this file can show that each of them
rejects an operator that is broken in its own way.
"""

import math

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
    LinearOperator,
    Mask,
    Matrix,
    NonlinearScaled,
    Operator,
    PixelBin,
    Scaled,
    Stack,
    Sum,
    stack,
)

F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Square(Operator):
    """x + x^2/4: a nonlinear operator."""

    def __call__(self, x):
        return x + x**2 / 4

    def output_shape(self, input_shape):
        return tuple(input_shape)


CASES = {
    "identity": (Identity(), (2, 4, 5)),
    "identity of vectors": (Identity(), (7,)),
    "mask": (Mask(rand(4, 5) > 0), (2, 4, 5)),
    "mask of weights": (Mask(rand(2, 4, 5)), (2, 4, 5)),
    "diagonal": (Diagonal(rand(2, 4, 5)), (2, 4, 5)),
    "diagonal per channel": (Diagonal(rand(2, 1, 1)), (2, 4, 5)),
    "diagonal of vectors": (Diagonal(rand(7)), (7,)),
    "matrix": (Matrix(rand(3, 40)), (2, 4, 5)),
    "matrix of vectors": (Matrix(rand(9, 7)), (7,)),
    "matrix with shape": (Matrix(rand(3, 40), (2, 4, 5)), (2, 4, 5)),
    "bin": (PixelBin(2), (2, 4, 6)),
    "bin 1": (PixelBin(1), (2, 4, 6)),
    "bin without channel": (PixelBin(3), (6, 9)),
    "crop": (Crop(1, 2, 3, 2), (2, 5, 4)),
    "crop nothing": (Crop(0, 0, 5, 4), (2, 5, 4)),
    "fourier": (Fourier(), (2, 4, 5)),
    "fourier odd": (Fourier(), (1, 3, 6)),
    "zero": (Convolve(rand(3, 3)), (2, 6, 7)),
    "zero even psf": (Convolve(rand(4, 2)), (1, 6, 7)),
    "zero without channel": (Convolve(rand(3, 3)), (6, 7)),
    "zero large psf": (Convolve(rand(15, 18)), (1, 4, 5)),
    "zero per channel": (Convolve(rand(2, 3, 5)), (2, 6, 7)),
    "zero several": (Convolve(rand(3, 1, 3, 5)), (1, 6, 7)),
    "zero one of several": (Convolve(rand(1, 1, 3, 5)), (1, 6, 7)),
    "periodic": (Convolve(rand(3, 3), "periodic"), (2, 6, 7)),
    "periodic even": (Convolve(rand(4, 2), "periodic"), (1, 7, 6)),
    "periodic full": (Convolve(rand(6, 7), "periodic"), (1, 6, 7)),
    "periodic per channel": (Convolve(rand(2, 3, 5), "periodic"), (2, 6, 7)),
    "periodic several": (Convolve(rand(3, 1, 3, 5), "periodic"), (1, 6, 7)),
    "compose": (PixelBin(2) @ Convolve(rand(3, 3)), (1, 6, 8)),
    "compose periodic": (PixelBin(2) @ Convolve(rand(3, 3), "periodic"), (1, 6, 8)),
    "compose matrix": (Matrix(rand(5, 12)) @ PixelBin(2), (1, 6, 8)),
    "compose onto matrix": (Diagonal(rand(5)) @ Matrix(rand(5, 12)), (3, 4)),
    "main job": (Crop(1, 0, 2, 3) @ PixelBin(2) @ Convolve(rand(3, 3)), (1, 6, 8)),
    "visibilities": (Mask(rand(4, 6, 1) > 0) @ Fourier() @ Convolve(rand(3, 3)), (1, 4, 6)),
    "sum": (Identity() + Convolve(rand(3, 3)), (1, 6, 8)),
    "sum of crops": (Crop(0, 0, 3, 3) + Crop(2, 1, 3, 3), (1, 6, 8)),
    "difference": (Identity() - Mask(rand(6, 8) > 0), (1, 6, 8)),
    "scaled": (2.5 * Convolve(rand(3, 3)), (1, 6, 8)),
    "scaled matrix": (-Matrix(rand(3, 48)), (1, 6, 8)),
    "stack": (Stack([Convolve(rand(3, 3)), PixelBin(2), Matrix(rand(4, 48))]), (1, 6, 8)),
    "stack at an odd offset": (Stack([Matrix(rand(1, 24)), Fourier()]), (1, 4, 6)),
    "stack of matrices": (Stack([Matrix(rand(4, 7)), Matrix(rand(2, 7))]), (7,)),
    "linearised": (Square().linearize(rand(2, 1, 4, 6, seed=3)), (1, 4, 6)),
    "linearised inside": (
        (PixelBin(2) @ Square()).linearize(rand(2, 1, 4, 6, seed=3)),
        (1, 4, 6),
    ),
}

try:
    import caustics
except ImportError:  # lenses are optional
    LENSES = set()
else:
    from diffpost.physics import Grid, Lens

    COSMOLOGY = caustics.FlatLambdaCDM(name="cosmology")
    GRIDS = Grid((6, 8), pixel=0.5, oversample=2), Grid((5, 4), pixel=0.3)
    SIS = caustics.SIS(COSMOLOGY, x0=0.0, y0=0.05, Rein=1.25)
    FREE = caustics.SIS(COSMOLOGY, x0=0.0, y0=0.05)
    RADII = torch.tensor([[1.0], [1.25], [1.5]], dtype=F64)
    CASES |= {
        "lens": (Lens(SIS, *GRIDS), (2, 5, 4)),
        "lens without channel": (Lens(SIS, *GRIDS), (5, 4)),
        "lens bicubic": (Lens(SIS, *GRIDS, interpolation="bicubic"), (1, 5, 4)),
        "lens per channel": (Lens([SIS, FREE], *GRIDS).at(RADII[0]), (2, 5, 4)),
        "lens at": (Lens(FREE, *GRIDS).at(RADII[0]), (1, 5, 4)),
        "lens per entry": (Lens(FREE, *GRIDS).at(RADII), (2, 5, 4)),
        "lens per entry and channel": (Lens([FREE, SIS], *GRIDS).at(RADII), (2, 5, 4)),
        "lensed job": (PixelBin(2) @ Convolve(rand(3, 3)) @ Lens(SIS, *GRIDS), (1, 5, 4)),
        "lensed jobs": (PixelBin(2) @ Convolve(rand(3, 3)) @ Lens(FREE, *GRIDS).at(RADII), (1, 5, 4)),
    }  # fmt: skip
    LENSES = {"Lens", "FixedLens"}

try:
    import finufft  # noqa: F401
except ImportError:  # so are visibilities
    VISIBILITIES = set()
else:
    from diffpost.physics import Grid, SkyFrame, Visibilities

    U, V = rand(2, 9, seed=5) * 2e5
    TURNED = Grid((4, 6), 0.1, centre=(0.1, 0.0), sky=SkyFrame(0.0, 0.0, 30.0))
    CASES |= {
        "sky": (Visibilities(U, V, Grid(5, 0.1)), (1, 5, 5)),
        "sky through a beam": (Visibilities(U, V, TURNED, lambda r: torch.exp(-r)), (1, 4, 6)),
        "sky normal": (Visibilities(U, V, TURNED).normal(torch.ones(9)), (1, 4, 6)),
        "sky in channels": (Visibilities(U.reshape(3, 3), V.reshape(3, 3), TURNED), (1, 4, 6)),
    }
    VISIBILITIES = {"Visibilities", "NormalOperator"}

NONLINEAR = {
    "square": (Square(), (1, 4, 6)),
    "outside": (Square() @ Convolve(rand(3, 3)), (1, 4, 6)),
    "inside": (PixelBin(2) @ Square(), (1, 4, 6)),
    "matrix outside": (Matrix(rand(3, 24)) @ Square(), (1, 4, 6)),
    "sum": (Square() + Convolve(rand(3, 3)), (1, 4, 6)),
    "difference": (Convolve(rand(3, 3)) - Square(), (1, 4, 6)),
    "scaled": (-2 * Square(), (1, 4, 6)),
    "stack": (stack([Square(), PixelBin(2), Matrix(rand(3, 24))]), (1, 4, 6)),
    "affine": (Affine(Square(), 2.0, -0.5), (1, 4, 6)),
    "affine of linear": (Affine(Matrix(rand(3, 24)), rand(4, 6), rand(1, 1)), (1, 4, 6)),
}


def explicit(operator, shape):
    """The matrix, column by column, one image at a time."""
    linear = operator.bind(shape)
    eye = torch.eye(math.prod(shape), dtype=F64).reshape(-1, 1, *shape)
    return torch.stack([linear(column).flatten() for column in eye], 1)


# the checks ------------------------------------------------------------------------------------


def check_shapes(operator, shape):
    linear = operator.bind(shape)
    batch = operator.batch or 3
    out = operator.output_shape(shape)
    assert isinstance(out, tuple) and all(isinstance(n, int) for n in out)
    y = linear(rand(batch, *shape))
    assert y.shape == (batch, *out)
    assert linear.adjoint(y).shape == (batch, *shape)
    assert linear.output_shape(shape) == out
    assert operator.data_shape in (None, out)
    assert linear.bind(shape) is linear and linear.linearize(rand(batch, *shape)) is linear
    assert operator.bind(shape) is linear  # the same object each time


def check_adjoint(operator, shape):
    assert operator.dot_test(shape, seed=1) < 1e-13
    assert operator.dot_test(shape, seed=1, dtype=torch.float32) < 1e-5


def check_linearity(operator, shape):
    linear = operator.bind(shape)
    batch = operator.batch or 2
    a, b = rand(batch, *shape, seed=1), rand(batch, *shape, seed=2)
    left = linear(2 * a - 3 * b)
    right = 2 * linear(a) - 3 * linear(b)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
    assert linear(torch.zeros_like(a)).abs().max() < 1e-14


def check_dtype(operator, shape):
    """The data have the type of the image, whatever the operator was made of; float32 is near
    float64.
    """
    linear = operator.bind(shape)
    x = rand(operator.batch or 2, *shape, seed=1)
    wide, narrow = linear(x), linear(x.float())
    assert wide.dtype == F64 and narrow.dtype == torch.float32
    torch.testing.assert_close(
        narrow.double(), wide, rtol=1e-4, atol=1e-4 * float(wide.abs().max())
    )
    assert linear.adjoint(wide).dtype == F64 and linear.adjoint(narrow).dtype == torch.float32


def check_batch(operator, shape):
    """An entry does not see its neighbours."""
    linear = operator.bind(shape)
    x = rand(operator.batch or 3, *shape, seed=1)
    other = x.clone()
    other[1] = 1e3
    one, two = linear(x), linear(other)
    torch.testing.assert_close(one[0], two[0], rtol=1e-12, atol=1e-12)
    v = rand(*one.shape, seed=2)
    other = v.clone()
    other[1] = 1e3
    torch.testing.assert_close(
        linear.adjoint(v)[0], linear.adjoint(other)[0], rtol=1e-12, atol=1e-12
    )


def check_select(operator, shape):
    """Entries of a batch, in another order and twice."""
    linear = operator.bind(shape)
    x, ids = rand(operator.batch or 3, *shape, seed=1), torch.tensor([1, 0, 1])
    y, part = linear(x), linear.select(ids)
    torch.testing.assert_close(part(x[ids]), y[ids], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part.adjoint(y[ids]), linear.adjoint(y)[ids], rtol=1e-12, atol=1e-12)


def check_transfer(linear, shape, images, matrix):
    """Exact where the operator asks for no margin: every channel of the data is a filter of the
    image.
    """
    if len(shape) < 2 or linear.margin(shape) != (0, 0) or isinstance(linear, Stack):
        return
    out = linear.output_shape(shape)
    grid = out[-2:]
    h = linear.near_transfer(shape, grid)
    if h is not None:
        filtered = torch.fft.ifft2(torch.fft.fft2(images) * h).real
        torch.testing.assert_close(
            filtered.flatten(1).T, matrix, rtol=1e-10, atol=1e-11 * float(matrix.abs().max())
        )


def check_structure(operator, shape):
    """What the operator says of itself against its matrix."""
    if operator.batch is not None:  # one operator an entry: there is no single matrix
        return
    matrix = explicit(operator, shape)
    out = operator.output_shape(shape)
    m, n = matrix.shape
    size = float(matrix.abs().max())
    linear = operator.bind(shape)
    adjoint = linear.adjoint(torch.eye(m, dtype=F64).reshape(-1, *out)).flatten(1)
    torch.testing.assert_close(adjoint, matrix, rtol=1e-12, atol=1e-12 * size)
    dense = operator.dense(shape)
    if dense is not None:
        torch.testing.assert_close(dense, matrix, rtol=1e-12, atol=1e-12 * size)
    d = operator.diagonal(shape)
    if d is not None:
        torch.testing.assert_close(torch.diag(d.expand(shape).flatten()), matrix)
    images = torch.eye(n, dtype=F64).reshape(-1, *shape)
    data = torch.eye(m, dtype=F64).reshape(-1, *out)
    h = operator.spectrum(shape)
    if h is not None:
        filtered = torch.fft.ifft2(torch.fft.fft2(images) * h)
        assert filtered.imag.abs().max() < 1e-12 * size
        torch.testing.assert_close(
            filtered.real.flatten(1).T, matrix, rtol=1e-10, atol=1e-11 * size
        )
    check_transfer(linear, shape, images, matrix)
    weight = rand(*shape, seed=5).square()
    for w in (None, torch.tensor(0.7, dtype=F64), weight, torch.stack([weight, 2 * weight])):
        g = operator.gram_diagonal(shape, w)
        if g is None:
            continue
        for entry in range(1 if w is None or w.ndim <= len(shape) else 2):
            ww = torch.ones(n, dtype=F64) if w is None else w.expand(2, *shape)[entry].flatten()
            want = matrix @ torch.diag(ww) @ matrix.T
            got = torch.diag(g.expand(2, *out)[entry].flatten())
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * size**2)
    if len(shape) < 2:
        return
    power = torch.fft.fft2(rand(*shape, seed=6)).abs().square()
    for p in (None, torch.tensor(0.7, dtype=F64), power, torch.stack([power, 2 * power])):
        g = operator.gram_spectrum(shape, p)
        if g is None:
            continue
        assert (g >= 0).all()
        for entry in range(1 if p is None or p.ndim <= len(shape) else 2):
            pp = torch.ones(shape, dtype=F64) if p is None else p.expand(2, *shape)[entry]
            cov = torch.fft.ifft2(torch.fft.fft2(images) * pp).real.flatten(1)
            want = matrix @ cov @ matrix.T
            got = torch.fft.ifft2(torch.fft.fft2(data) * g.expand(2, *out)[entry]).real.flatten(1)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


LINEAR_CHECKS = [
    check_shapes,
    check_adjoint,
    check_linearity,
    check_dtype,
    check_batch,
    check_select,
    check_structure,
]


@pytest.mark.parametrize("check", LINEAR_CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_operator(case, check):
    check(*CASES[case])


# nonlinear operators ---------------------------------------------------------------------------


def check_derivative(operator, shape, step=1e-6):
    """The linearisation against central differences, entry by entry."""
    x, v = rand(2, *shape, seed=1), rand(2, *shape, seed=2)
    linear = operator.linearize(x)
    want = (operator(x + step * v) - operator(x - step * v)) / (2 * step)
    torch.testing.assert_close(linear(v), want, rtol=1e-7, atol=1e-7)
    assert linear.dot_test(shape) < 1e-13
    assert linear.output_shape(shape) == operator.output_shape(shape) == tuple(want.shape[1:])
    twice = linear.adjoint(want), linear.adjoint(want)  # callable repeatedly
    torch.testing.assert_close(*twice)


@pytest.mark.parametrize("case", NONLINEAR)
def test_linearize(case):
    check_derivative(*NONLINEAR[case])


@pytest.mark.parametrize("case", [c for c in CASES if CASES[c][0].batch is None])
def test_linear_operators_are_their_own_derivative(case):
    operator, shape = CASES[case]
    check_derivative(operator, shape, step=1e-3)


@pytest.mark.parametrize("case", {**CASES, **NONLINEAR})
def test_autograd_goes_through(case):
    """The gradient of <v, A x> is A'(x)^T v: likelihoods can be differentiated by autograd as well."""
    operator, shape = {**CASES, **NONLINEAR}[case]
    if isinstance(operator, LinearOperator):
        operator = operator.bind(shape)
    x = rand(operator.batch or 2, *shape, seed=1).requires_grad_()
    y = operator(x)
    v = rand(*y.shape, seed=2)
    (gradient,) = torch.autograd.grad((y * v).sum(), x)
    want = operator.linearize(x.detach()).adjoint(v)
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-10)


# negative controls -----------------------------------------------------------------------------


class Broken(LinearOperator):
    """The identity with one fault."""

    def __init__(self, fault):
        self.fault = fault

    def output_shape(self, input_shape):
        return (*input_shape, 1) if self.fault == "shape" else tuple(input_shape)

    def __call__(self, x):
        if self.fault == "linearity":
            return x + 0.1
        if self.fault == "dtype":
            return x.double()
        if self.fault == "batch":
            return x + 0.1 * x.mean(0, keepdim=True)
        return x

    def adjoint(self, v):
        if self.fault == "adjoint":
            return 1.001 * v
        return v + 0.1 * v.mean(0, keepdim=True) if self.fault == "batch" else v

    def select(self, ids):
        return 1.001 * self if self.fault == "select" else self

    def diagonal(self, input_shape):
        return torch.full((), 2.0 if self.fault == "structure" else 1.0, dtype=F64)


@pytest.mark.parametrize("check", LINEAR_CHECKS)
def test_each_check_rejects_its_fault(check):
    fault = check.__name__.removeprefix("check_").replace("shapes", "shape")
    check(Broken(None), (2, 4, 5))
    with pytest.raises(AssertionError):
        check(Broken(fault), (2, 4, 5))


class WrongDerivative(Operator):
    def __call__(self, x):
        return x.detach() ** 2 + x

    def output_shape(self, input_shape):
        return tuple(input_shape)


def test_the_derivative_check_rejects():
    with pytest.raises(AssertionError):
        check_derivative(WrongDerivative(), (1, 4, 6))


def test_every_exported_operator_is_in_the_suite():
    def parts(operator):
        yield type(operator).__name__
        for name in ("outer", "inner", "operator"):
            if hasattr(operator, name):
                yield from parts(getattr(operator, name))
        for name in ("terms", "operators"):
            for part in getattr(operator, name, ()):
                yield from parts(part)

    seen = {name for op, _ in (*CASES.values(), *NONLINEAR.values()) for name in parts(op)}
    expected = {
        cls.__name__
        for cls in (Affine, Compose, Convolve, Crop, Diagonal, Fourier, Identity, Mask, Matrix)
    } | {cls.__name__ for cls in (NonlinearScaled, PixelBin, Scaled, Stack, Sum)}
    expected |= {"NonlinearCompose", "NonlinearSum", "NonlinearStack", "Linearized"}
    assert expected | LENSES | VISIBILITIES <= seen
