"""Random compositions of operators: adjoint, linearity, structure, and the same matrix as built by hand."""

import math

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import (
    Convolve,
    Crop,
    Diagonal,
    Fourier,
    Identity,
    Mask,
    Matrix,
    PixelBin,
    Stack,
)

F64 = torch.float64
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix_of(operator, shape):
    """The matrix by applying one leaf to each unit image."""
    n = math.prod(shape)
    return operator(torch.eye(n, dtype=F64).reshape(n, *shape)).flatten(1).T


@st.composite
def leaf(draw, shape):
    """An operator of images of this shape, and its matrix."""
    seed = draw(st.integers(0, 5))
    kinds = ["identity", "diagonal", "matrix"]
    if len(shape) >= 2:
        kinds += ["mask", "fourier", "zero", "crop"]
        if len(shape) == 3:
            kinds += ["periodic", "per channel"]
            if shape[0] == 1:
                kinds.append("several")
        if shape[-1] % 2 == 0 and shape[-2] % 2 == 0:
            kinds += ["bin", "bin"]
    kind = draw(st.sampled_from(kinds))
    size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    if kind == "identity":
        operator = Identity()
    elif kind == "diagonal":
        operator = Diagonal(rand(*shape, seed=seed))
    elif kind == "mask":
        operator = Mask(rand(*shape[-2:], seed=seed) > -0.5)
    elif kind == "matrix":
        operator = Matrix(rand(draw(st.integers(1, 6)), math.prod(shape), seed=seed))
    elif kind == "fourier":
        operator = Fourier()
    elif kind == "zero":
        operator = Convolve(rand(*size, seed=seed))
    elif kind == "periodic":
        size = tuple(min(k, n) for k, n in zip(size, shape[-2:], strict=True))
        operator = Convolve(rand(*size, seed=seed), "periodic")
    elif kind == "per channel":
        operator = Convolve(rand(shape[0], *size, seed=seed))
    elif kind == "several":
        operator = Convolve(rand(2, 1, *size, seed=seed))
    elif kind == "crop":
        height, width = draw(st.integers(1, shape[-2])), draw(st.integers(1, shape[-1]))
        top = draw(st.integers(0, shape[-2] - height))
        left = draw(st.integers(0, shape[-1] - width))
        operator = Crop(top, left, height, width)
    else:
        operator = PixelBin(2)
    return operator, matrix_of(operator, shape)


@st.composite
def operators(draw, shape=None, depth=3):
    """A composition, the shape of its images, and its matrix from the matrices of the parts."""
    if shape is None:
        shape = draw(st.sampled_from([(1, 4, 6), (2, 4, 4), (1, 6, 5), (4, 6), (7,)]))
    kind = draw(st.sampled_from(["leaf", "compose", "compose", "sum", "scale", "stack"]))
    if depth == 0 or kind == "leaf":
        return (*draw(leaf(shape)), shape)
    first, a, _ = draw(operators(shape, depth - 1))
    if kind == "scale":
        c = draw(st.sampled_from([-2.0, 0.5, 3.0]))
        return c * first, c * a, shape
    if kind == "compose":
        second, b, _ = draw(operators(first.output_shape(shape), depth - 1))
        return second @ first, b @ a, shape
    second, b, _ = draw(operators(shape, depth - 1))
    if kind == "sum" and second.output_shape(shape) == first.output_shape(shape):
        return first - second, a - b, shape
    return Stack([first, second]), torch.cat([a, b]), shape


@SETTINGS
@given(operators(), st.integers(0, 3))
def test_compositions(case, seed):
    operator, matrix, shape = case
    out = operator.output_shape(shape)
    linear = operator.bind(shape)
    size = float(matrix.norm()) + 1e-6
    x, y = rand(3, *shape, seed=seed), rand(3, *shape, seed=seed + 10)
    ax = linear(x)
    assert ax.shape == (3, *out)
    assert torch.allclose(ax.flatten(1), x.flatten(1) @ matrix.T, atol=1e-10 * size, rtol=1e-9)
    assert torch.allclose(linear(2 * x - y), 2 * ax - linear(y), atol=1e-10 * size, rtol=1e-9)
    v = rand(3, *out, seed=seed + 20)
    atv = linear.adjoint(v)
    assert atv.shape == x.shape
    assert torch.allclose(atv.flatten(1), v.flatten(1) @ matrix, atol=1e-10 * size, rtol=1e-9)
    if size > 1e-3:  # relative to |A x|, which a composition of masks can make zero
        gap = (ax * v).sum() - (x * atv).sum()
        assert gap.abs() < 1e-11 * size * float(x.norm() * v.norm())
    narrow = linear(x.float())
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), ax, atol=1e-4 * size, rtol=1e-3)


@SETTINGS
@given(operators())
def test_structure(case):
    """Whatever a composition says of its gram or its matrix is true."""
    operator, matrix, shape = case
    out = operator.output_shape(shape)
    gram = matrix @ matrix.T
    size = float(gram.abs().max()) + 1e-12
    m = len(gram)
    diagonal = operator.gram_diagonal(shape)
    if diagonal is not None:
        got = torch.diag(diagonal.expand(out).flatten())
        assert torch.allclose(got, gram, atol=1e-10 * size, rtol=1e-9)
    spectrum = operator.gram_spectrum(shape) if len(shape) >= 2 else None
    if spectrum is not None:
        eye = torch.eye(m, dtype=F64).reshape(m, *out)
        got = torch.fft.ifft2(torch.fft.fft2(eye) * spectrum).real.flatten(1)
        assert torch.allclose(got, gram, atol=1e-9 * size, rtol=1e-8)
    dense = operator.dense(shape)
    if dense is not None:
        assert torch.allclose(dense, matrix, atol=1e-10 * math.sqrt(size), rtol=1e-9)


@SETTINGS
@given(operators(depth=2), st.sampled_from([0.0, 0.3, 20.0]), st.booleans())
def test_solves(case, s, masked):
    """(Sigma + s A A^T) v = r for whatever was composed, with a masked datum or none."""
    operator, matrix, shape = case
    out = operator.output_shape(shape)
    m = math.prod(out)
    std = 0.5 + rand(*out, seed=3).abs() if masked else torch.full(out, 0.7, dtype=F64)
    keep = torch.ones(m, dtype=torch.bool)
    if masked:
        std.reshape(-1)[0] = math.inf
        keep[0] = False
    like = Likelihood(rand(*out), operator, GaussianNoise(std=std), batched=False)
    r = rand(2, *out, seed=4)
    report = like.solve_operator(operator.bind(shape), r, s, tol=1e-12, max_iter=1000)
    full = torch.diag(std.flatten().square()[keep]) + s * (matrix @ matrix.T)[keep][:, keep]
    want = torch.linalg.solve(full, r.flatten(1)[:, keep].T).T
    got = report.x.flatten(1)
    assert (got[:, ~keep] == 0).all()
    assert float((got[:, keep] - want).norm()) <= 1e-6 * float(want.norm()) + 1e-12
