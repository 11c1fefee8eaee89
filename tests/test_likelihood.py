"""Likelihoods against densities and matrices: gradients, units, joint data, masks and every kind of
solve.
"""

import copy
import math
import warnings

import pytest
import scipy.stats
import torch

from diffpost.likelihood import Likelihood
from diffpost.linalg import ConvergenceWarning, gmres
from diffpost.noise import GaussianNoise
from diffpost.operator import (
    Convolve,
    Crop,
    Diagonal,
    Fourier,
    Identity,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    PixelBin,
    Stack,
)

F64 = torch.float64
INF = math.inf


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def psf(n=5, sigma=1.0):
    axis = torch.arange(n, dtype=F64) - n // 2
    values = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * sigma**2))
    return values / values.sum()


def spd(m, seed=0):
    root = rand(m, m, seed=seed)
    return root @ root.T / m + 0.1 * torch.eye(m, dtype=F64)


class Squares(Operator):
    """x + x^2/4, summed over blocks by a linear operator after it: nonlinear."""

    def __call__(self, x):
        return x + x**2 / 4

    def output_shape(self, input_shape):
        return tuple(input_shape)


def explicit(operator, shape):
    linear = operator.bind(shape)
    eye = torch.eye(math.prod(shape), dtype=F64).reshape(-1, *shape)
    return linear(eye).flatten(1).T


def covariance(noise, data_shape):
    """Sigma over the data that count, and which do."""
    m = math.prod(data_shape)
    precision = noise.precision(torch.eye(m, dtype=F64).reshape(m, *data_shape)).reshape(m, m)
    keep = precision.diagonal() > 0
    return torch.linalg.inv(precision[keep][:, keep]), keep


# density and gradient --------------------------------------------------------------------------


def test_log_prob_is_the_density_of_the_residual():
    a, cov = rand(4, 6), spd(4)
    y, x = rand(4, seed=1), rand(3, 6, seed=2)
    like = Likelihood(y, Matrix(a), GaussianNoise(cov=cov))
    want = scipy.stats.multivariate_normal(cov=cov.numpy()).logpdf((y - x @ a.T).numpy())
    torch.testing.assert_close(like.log_prob(x), torch.from_numpy(want))
    r = y - x @ a.T
    torch.testing.assert_close(like.residual(x), r)
    torch.testing.assert_close(like.chi2(x), ((r @ torch.linalg.inv(cov)) * r).sum(1))
    assert like.ndata == 4 and like.rows is None and like.data_shape == (4,)


SHAPE = (1, 8, 8)
MASKED = (rand(8, 8, seed=1).abs() + 0.3).masked_fill(rand(8, 8, seed=2) > 1.2, INF)
PROBLEMS = {
    "periodic": (Convolve(psf(), "periodic"), GaussianNoise(std=0.3)),
    "zero, masked": (Convolve(psf()), GaussianNoise(std=MASKED)),
    "matrix": (Matrix(rand(5, 64)), GaussianNoise(cov=spd(5))),
    "bin": (PixelBin(2) @ Convolve(psf()), GaussianNoise(std=0.2)),
    "crop": (Crop(1, 2, 3, 3) @ Convolve(psf()), GaussianNoise(std=0.2)),
    "nonlinear": (PixelBin(2) @ Squares(), GaussianNoise(std=0.4)),
    "nonlinear outside": (Squares() @ Convolve(psf()), GaussianNoise(std=MASKED)),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("joint", [False, True])
def test_score_is_the_gradient(name, rows, joint):
    """Against central differences in float64 and against autograd, also for joint data of two
    operators.
    """
    operator, noise = PROBLEMS[name]
    front = () if rows is None else (rows,)
    like = Likelihood(rand(*front, *operator.output_shape(SHAPE), seed=3), operator, noise)
    if joint:
        other = Likelihood(rand(*front, *SHAPE, seed=4), Identity(), GaussianNoise(std=0.7))
        like = like + other
    x, v = rand(3, *SHAPE, seed=5), rand(3, *SHAPE, seed=6)
    step = 1e-5
    want = (like.log_prob(x + step * v) - like.log_prob(x - step * v)) / (2 * step)
    got = (like.score(x) * v).flatten(1).sum(1)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-6)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(like.log_prob(y).sum(), y)
    torch.testing.assert_close(like.score(x), gradient, rtol=1e-9, atol=1e-9)
    assert like.score(x.float()).dtype == torch.float32


def test_entries_are_independent():
    """Row b of the data meets entry b, and nothing else."""
    operator, noise = PROBLEMS["nonlinear"]
    y = rand(3, 1, 4, 4)
    like = Likelihood(y, operator, noise)
    x = rand(3, *SHAPE, seed=5)
    for b in range(3):
        alone = Likelihood(y[b], operator, noise)
        torch.testing.assert_close(alone.log_prob(x[b : b + 1]), like.log_prob(x)[b : b + 1])
        torch.testing.assert_close(alone.score(x[b : b + 1]), like.score(x)[b : b + 1])
        chosen = like.select(torch.tensor([b]))
        torch.testing.assert_close(chosen.log_prob(x[b : b + 1]), like.log_prob(x)[b : b + 1])
    assert like.rows == 3 and like.select(torch.tensor([2, 0])).rows == 2
    shared = Likelihood(y[0], operator, noise)
    assert shared.select(torch.tensor([2, 0])) is shared


def test_rows_with_their_own_noise():
    std = rand(3, 1, 8, 8, seed=1).abs() + 0.2
    std[1, 0, 0, :4] = INF
    y, x = rand(3, 1, 8, 8), rand(3, 1, 8, 8, seed=5)
    like = Likelihood(y, Convolve(psf()), GaussianNoise(std=std))
    assert like.ndata.tolist() == [64, 60, 64]
    ids = torch.tensor([1, 2])
    torch.testing.assert_close(like.select(ids).log_prob(x[ids]), like.log_prob(x)[ids])
    got = like.solve(like.residual(x), torch.tensor([0.1, 1.0, 10.0]), tol=1e-10)
    for b in range(3):
        alone = Likelihood(y[b], Convolve(psf()), GaussianNoise(std=std[b]))
        want = alone.solve(alone.residual(x[b : b + 1]), (0.1, 1.0, 10.0)[b], tol=1e-10)
        torch.testing.assert_close(got[b : b + 1], want, rtol=1e-6, atol=1e-7)


# masks -----------------------------------------------------------------------------------------


def test_masked_data_may_hold_anything():
    """NaN, infinities and junk under infinite variance change nothing and never come out."""
    operator, noise = PROBLEMS["zero, masked"]
    clean = rand(*SHAPE, seed=3)
    x = rand(2, *SHAPE, seed=5)
    reference = Likelihood(clean, operator, noise)
    for junk in (math.nan, INF, -INF, 1e6):
        y = clean.masked_fill(MASKED.isinf(), junk)
        like = Likelihood(y, operator, noise)
        assert like.y.isfinite().all() and like.residual(x).isfinite().all()
        assert (like.residual(x)[..., MASKED.isinf()] == 0).all()
        for name in ("log_prob", "score", "chi2"):
            torch.testing.assert_close(getattr(like, name)(x), getattr(reference, name)(x))
        v = like.solve(like.residual(x), 2.0, tol=1e-10)
        assert (v[..., MASKED.isinf()] == 0).all()
        torch.testing.assert_close(v, reference.solve(reference.residual(x), 2.0, tol=1e-10))
        pulled = like.pullback(2.0, 0.5)
        torch.testing.assert_close(pulled.log_prob(x), reference.log_prob(2 * x + 0.5))
    assert reference.ndata == int(MASKED.isfinite().sum())


def test_nan_data_of_finite_variance_raise():
    y = rand(*SHAPE)
    y[0, 2, 3] = math.nan
    with pytest.raises(ValueError, match=r"1 of 64 data are NaN.*infinite variance"):
        Likelihood(y, Convolve(psf()), GaussianNoise(std=0.3))
    std = torch.full((8, 8), 0.3)
    std[0, 0] = INF  # masks another one
    with pytest.raises(ValueError, match="1 of 64"):
        Likelihood(y, Convolve(psf()), GaussianNoise(std=std))
    std[2, 3] = INF
    Likelihood(y, Convolve(psf()), GaussianNoise(std=std))


# shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("y", "operator", "noise", "match"),
    [
        (rand(5), Matrix(rand(4, 6)), GaussianNoise(std=1.0), r"\(5,\).*\(4,\)"),
        (rand(3, 5), Matrix(rand(4, 6)), GaussianNoise(std=1.0), r"\(3, 5\).*\(4,\)"),
        (
            rand(1, 8, 8),
            Identity(),
            GaussianNoise(std=torch.ones(9, 9)),
            r"\(9, 9\).*\(1, 1, 8, 8\)",
        ),
        (rand(1, 8, 8), Identity(), GaussianNoise(cov=spd(5)), "5 data"),
        (torch.ones(4, dtype=torch.int64), Identity(), GaussianNoise(std=1.0), "int64"),
        (torch.ones(4, dtype=torch.complex64), Identity(), GaussianNoise(std=1.0), "view_as_real"),
    ],
)
def test_construction_errors(y, operator, noise, match):
    with pytest.raises(ValueError, match=match):
        Likelihood(y, operator, noise)


def test_errors_on_use_name_both_shapes():
    like = Likelihood(rand(1, 8, 8), Convolve(psf()), GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(2, 1, 9, 9\)"):
        like.log_prob(rand(2, 1, 9, 9))
    rows = Likelihood(rand(3, 1, 8, 8), Convolve(psf()), GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match=r"\(3, 1, 8, 8\).*\(2, 1, 8, 8\)"):
        rows.score(rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(1, 9, 9\)"):
        like.bind((1, 9, 9))
    r = rand(2, 1, 8, 8)
    for s, match in ((-1.0, "negative"), (math.nan, "finite"), (torch.ones(3), r"\(3,\) for 2")):
        with pytest.raises(ValueError, match=match):
            like.solve(r, s)
    with pytest.raises(ValueError, match="not linear"):
        Likelihood(rand(1, 8, 8), Squares(), GaussianNoise(std=1.0)).solve(r, 1.0)
    with pytest.raises(ValueError, match="same number of samples"):
        rows + Likelihood(rand(2, 1, 8, 8), Identity(), GaussianNoise(std=1.0))
    with pytest.raises(TypeError):
        like + 1
    for scale, offset in ((0.0, 0.0), (math.nan, 0.0), (1.0, INF)):
        with pytest.raises(ValueError, match="pullback"):
            like.pullback(scale, offset)


def test_whether_y_has_a_batch_axis():
    """Known shapes decide; images of three axes decide; bind decides; the caller may."""
    noise = GaussianNoise(std=1.0)
    assert Likelihood(rand(3, 4), Matrix(rand(4, 6)), noise).rows == 3
    assert Likelihood(rand(4), Matrix(rand(4, 6)), noise).rows is None
    assert Likelihood(rand(3, 1, 8, 8), Identity(), noise).rows == 3
    assert Likelihood(rand(3, 8, 8), Identity(), noise).rows is None
    assert Likelihood(rand(3, 5), Identity(), GaussianNoise(cov=spd(5))).rows == 3
    assert Likelihood(rand(3, 5), Identity(), GaussianNoise(cov=spd(15))).rows is None
    vague = Likelihood(rand(3, 5), Identity(), noise)
    x = rand(3, 5, seed=1)
    assert vague.rows is None and vague.bind((5,)).rows == 3 and vague.bind((3, 5)).rows is None
    assert Likelihood(rand(3, 5), Identity(), noise, batched=True).rows == 3
    torch.testing.assert_close(vague.log_prob(x), vague.bind((5,)).log_prob(x))
    assert vague.bind((5,)).bind((5,)) is not None
    bound = vague.bind((5,))
    assert bound.bind((5,)) is bound
    one = Likelihood(rand(1, 1, 8, 8), Identity(), noise)  # a single row serves any batch
    assert one.log_prob(rand(5, 1, 8, 8)).shape == (5,)


# units -----------------------------------------------------------------------------------------


SCALES = [
    (2.5, 0.0),
    (torch.tensor(0.4), torch.tensor(-0.7)),
    (1.0, 0.3),
    (rand(8, 8, seed=7).abs() + 0.5, 0.2),
    (torch.full((1, 1, 1), 3.0), rand(1, 8, 8, seed=8)),
    (1.0, 0.0),
]


@pytest.mark.parametrize("scale, offset", SCALES)
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("bound", [False, True])
def test_pullback(name, scale, offset, bound):
    """log p in the units of the prior is log p at the physical image, and so are gradients and
    solves.
    """
    operator, noise = PROBLEMS[name]
    like = Likelihood(rand(*operator.output_shape(SHAPE), seed=3), operator, noise)
    if bound:
        like = like.bind(SHAPE)
    pulled = like.pullback(scale, offset)
    z = rand(2, *SHAPE, seed=5)
    x = scale * z + offset
    torch.testing.assert_close(pulled.log_prob(z), like.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pulled.score(z), scale * like.score(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(pulled.residual(z), like.residual(x), rtol=1e-9, atol=1e-9)
    linear = isinstance(operator, LinearOperator)
    if linear and (bound or name not in ("crop", "matrix") or not isinstance(offset, torch.Tensor)):
        assert isinstance(pulled.operator, LinearOperator) or name == "crop"
    if linear:
        s = torch.tensor([0.3, 4.0])
        r = pulled.residual(z)
        got = pulled.solve_operator(pulled.operator.linearize(z), r, s, tol=1e-9, max_iter=300).x
        a = explicit(operator, SHAPE) @ torch.diag(
            torch.as_tensor(scale, dtype=F64).expand(SHAPE).flatten()
        )
        sigma, keep = covariance(noise, operator.output_shape(SHAPE))
        for b in range(2):
            gram = (a @ a.T)[keep][:, keep]
            want = torch.linalg.solve(sigma + float(s[b]) * gram, r[b].flatten()[keep])
            torch.testing.assert_close(got[b].flatten()[keep], want, rtol=1e-5, atol=1e-6)


def test_pullback_keeps_batches_and_structure():
    like = Likelihood(rand(3, 1, 8, 8), Convolve(psf(), "periodic"), GaussianNoise(std=0.1))
    pulled = like.pullback(2.0, 0.5)
    assert pulled.rows == 3 and pulled.select(torch.tensor([1])).rows == 1
    assert pulled.operator.spectrum(SHAPE) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = pulled.solve_operator(pulled.operator, rand(3, 1, 8, 8), 2.0)
    assert report.iterations == 0


# joint data ------------------------------------------------------------------------------------


def test_joint_data_add():
    """log p, score, chi2 and ndata are the sums of the parts', for any number of parts, nested or
    not.
    """
    parts = [
        Likelihood(rand(1, 8, 8), *PROBLEMS["zero, masked"]),
        Likelihood(rand(3, 1, 4, 4), *PROBLEMS["bin"]),
        Likelihood(rand(5), *PROBLEMS["matrix"]),
    ]
    x = rand(3, *SHAPE, seed=5)
    joint = parts[0] + parts[1] + parts[2]
    nested = parts[0] + (parts[1] + parts[2])
    for like in (joint, nested):
        for name in ("log_prob", "score", "chi2"):
            want = sum(getattr(part, name)(x) for part in parts)
            torch.testing.assert_close(getattr(like, name)(x), want, rtol=1e-9, atol=1e-9)
        assert like.ndata == sum(part.ndata for part in parts)
        assert like.rows == 3
        torch.testing.assert_close(
            like.select(torch.tensor([2])).log_prob(x[2:]), like.log_prob(x)[2:]
        )
        pulled = like.pullback(2.0, 0.5)
        torch.testing.assert_close(pulled.log_prob(x), like.log_prob(2 * x + 0.5))
        s = torch.tensor([0.1, 1.0, 10.0])
        r = like.residual(x)
        got = like.solve_operator(like.operator.linearize(x), r, s, tol=1e-10).x
        a = explicit(like.operator, SHAPE)
        sigma, keep = covariance(like.noise, like.data_shape)
        for b in range(3):
            want = torch.linalg.solve(sigma + float(s[b]) * (a @ a.T)[keep][:, keep], r[b][keep])
            torch.testing.assert_close(got[b][keep], want, rtol=1e-6, atol=1e-7)


def test_joint_data_with_a_nonlinear_operator():
    parts = [Likelihood(rand(1, 8, 8), *PROBLEMS[n]) for n in ("zero, masked", "nonlinear outside")]
    x = rand(3, *SHAPE, seed=5)
    joint = parts[0] + parts[1]
    torch.testing.assert_close(joint.score(x), parts[0].score(x) + parts[1].score(x))
    assert isinstance(joint.operator.linearize(x), Stack)


# solves ----------------------------------------------------------------------------------------


def even_power(n, seed=0):
    power = rand(n, n, seed=seed).square() + 0.1
    return 0.5 * (power + power.flip(-2, -1).roll((1, 1), (-2, -1)))


OPERATORS = {
    "identity": (Identity(), (1, 8, 8)),
    "mask": (Mask(rand(8, 8) > 0), (1, 8, 8)),
    "diagonal": (Diagonal(rand(8, 8)), (1, 8, 8)),
    "periodic": (Convolve(psf(), "periodic"), (1, 8, 8)),
    "zero": (Convolve(psf()), (1, 8, 8)),
    "bin": (PixelBin(2), (1, 16, 16)),
    "bin of periodic": (PixelBin(2) @ Convolve(psf(), "periodic"), (1, 16, 16)),
    "bin of diagonal": (PixelBin(2) @ Diagonal(rand(16, 16)), (1, 16, 16)),
    "wide matrix": (Matrix(rand(64, 100), (1, 10, 10)), (1, 10, 10)),
    "tall matrix": (Matrix(rand(64, 9)), (9,)),
    "matrix of a convolution": (Matrix(rand(64, 64)) @ Convolve(psf()), (1, 8, 8)),
    "main job": (Crop(1, 1, 8, 8) @ PixelBin(2) @ Convolve(psf()), (1, 20, 20)),
}
NOISES = {
    "white": GaussianNoise(std=0.3),
    "map": GaussianNoise(std=rand(8, 8, seed=1).abs() + 0.3),
    "masked": GaussianNoise(std=MASKED),
    "power": GaussianNoise(power=even_power(8)),
    "cov": GaussianNoise(cov=spd(64)),
}
DIRECT = {
    *((o, n) for o in ("identity", "mask", "diagonal", "bin") for n in ("white", "map", "masked")),
    *(("bin of diagonal", n) for n in ("white", "map", "masked")),
    *(
        (o, n)
        for o in ("identity", "bin", "periodic", "bin of periodic")
        for n in ("white", "power")
    ),
    *((o, "white") for o in ("wide matrix", "tall matrix", "matrix of a convolution")),
    *((o, "cov") for o in OPERATORS),
}


@pytest.mark.parametrize("noise_name", NOISES)
@pytest.mark.parametrize("name", OPERATORS)
def test_solve(name, noise_name):
    """(Sigma + s A A^T) v = r, each entry with its own s, against a dense solve: directly where
    structure allows.
    """
    operator, shape = OPERATORS[name]
    noise = NOISES[noise_name]
    out = operator.output_shape(shape)
    if len(out) == 1 and noise_name not in ("white", "cov"):
        noise = GaussianNoise(std=MASKED.flatten()) if noise_name == "masked" else None
    if noise is None:
        return
    like = Likelihood(rand(*out), operator, noise).bind(shape)
    linear = operator.bind(shape)
    r = rand(4, *out, seed=3)
    s = torch.tensor([0.0, 0.01, 1.0, 100.0], dtype=F64)
    report = like.solve_operator(linear, r, s, tol=1e-11, max_iter=400)
    direct = (name, noise_name) in DIRECT or "matrix" in name
    assert (report.iterations == 0) == direct
    a = explicit(operator, shape)
    sigma, keep = covariance(noise, out)
    assert (report.x.flatten(1)[:, ~keep] == 0).all()
    for b in range(4):
        want = torch.linalg.solve(sigma + s[b] * (a @ a.T)[keep][:, keep], r[b].flatten()[keep])
        got = report.x[b].flatten()[keep]
        assert (got - want).norm() < 1e-8 * want.norm()
    one = like.solve(r, 1.0, tol=1e-11, max_iter=400)
    torch.testing.assert_close(one[2], report.x[2], rtol=1e-7, atol=1e-8)
    # each entry alone, in float32, and with a scalar s
    narrow = like.solve_operator(linear, r.float(), s, tol=1e-5, max_iter=400)
    assert narrow.x.dtype == torch.float32
    gap = (narrow.x - report.x).flatten(1).norm(dim=1) / report.x.flatten(1).norm(dim=1)
    assert (gap < 3e-3).all()


def test_decompositions_are_made_once():
    """The structure of an operator is worked out once, and rows of the data share it."""
    a = Matrix(rand(6, 16))
    like = Likelihood(rand(3, 6), a, GaussianNoise(std=0.3)).pullback(2.0, 0.0)
    x = rand(3, 1, 4, 4)
    like.solve_operator(like.operator.linearize(x), like.residual(x), 1.0)
    kept = [exact for exact, _ in like._solves.values()]
    chosen = like.select(torch.tensor([0, 2]))
    chosen.solve_operator(chosen.operator.linearize(x[:2]), like.residual(x)[:2], 2.0)
    assert [exact for exact, _ in chosen._solves.values()] == kept and len(kept) == 1
    assert len(copy.deepcopy(like)._solves) <= 1


def test_solve_with_any_covariance():
    """(Sigma + A C A^T) v = r for a dense C, with and without a preconditioner, with masked data."""
    for name, noise_name in (("zero", "masked"), ("periodic", "white"), ("main job", "map")):
        operator, shape = OPERATORS[name]
        noise = NOISES[noise_name]
        out = operator.output_shape(shape)
        n = math.prod(shape)
        like = Likelihood(rand(*out), operator, noise).bind(shape)
        c = 2 * spd(n, seed=9)
        r = rand(3, *out, seed=3)
        a = explicit(operator, shape)
        sigma, keep = covariance(noise, out)
        want = torch.linalg.solve(sigma + (a @ c @ a.T)[keep][:, keep], r.flatten(1)[:, keep].T).T

        def matvec(v, c=c):
            return (v.flatten(1) @ c).reshape(v.shape)

        for precond in (None, 1.0, torch.tensor([0.5, 1.0, 2.0]), torch.full((8, 8), 1.0)):
            if precond is not None and torch.is_tensor(precond) and precond.ndim == 2:
                precond = torch.ones(shape[-2:], dtype=F64)
            for solver in ({}, {"solver": gmres}):
                report = like.solve_with(
                    matvec, r, tol=1e-10, max_iter=400, s_precond=precond, **solver
                )
                got = report.x.flatten(1)[:, keep]
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
                assert report.converged.all() and report.iterations > 0


@pytest.mark.parametrize("noise_name", ["white", "power", "masked", "cov"])
@pytest.mark.parametrize("name", ["periodic", "bin of periodic", "zero", "main job", "mask"])
def test_solve_spectral(name, noise_name):
    """(Sigma + A P A^T) v = r for stationary P, one for each entry or one for all."""
    operator, shape = OPERATORS[name]
    noise, out, n = NOISES[noise_name], operator.output_shape(shape), math.prod(shape)
    like = Likelihood(rand(*out), operator, noise)
    power = torch.stack([even_power(shape[-1], seed=b)[None] for b in range(3)]) * 5
    r = rand(3, *out, seed=3)
    report = like.solve_spectral(operator.bind(shape), r, power, tol=1e-11, max_iter=600)
    stationary = "periodic" in name and noise_name in ("white", "power")
    assert (report.iterations == 0) == stationary
    a = explicit(operator, shape)
    sigma, keep = covariance(noise, out)
    eye = torch.eye(n, dtype=F64).reshape(n, *shape)
    for b in range(3):
        p = torch.fft.ifft2(torch.fft.fft2(eye) * power[b]).real.reshape(n, n)
        want = torch.linalg.solve(sigma + (a @ p @ a.T)[keep][:, keep], r[b].flatten()[keep])
        got = report.x[b].flatten()[keep]
        assert (got - want).norm() < 1e-7 * want.norm()
    shared = like.solve_spectral(operator.bind(shape), r, power[1], tol=1e-11, max_iter=600)
    torch.testing.assert_close(shared.x[1], report.x[1], rtol=1e-6, atol=1e-7)


SEVERAL = torch.stack([psf(5, 0.7), psf(5, 1.0), psf(5, 1.6)])[:, None]
TOGETHER = {
    "several psfs": (Convolve(SEVERAL, "periodic"), True),
    "several psfs, scaled": (-2.0 * Convolve(SEVERAL, "periodic"), True),
    "joint": (
        Stack([Convolve(psf(), "periodic"), 3 * Identity(), Convolve(psf(3), "periodic")]),
        True,
    ),
    "joint of several": (Stack([Convolve(SEVERAL, "periodic"), Identity()]), True),
    "several psfs, zero": (Convolve(SEVERAL), False),
    "joint, zero": (Stack([Convolve(psf()), Convolve(psf(3), "periodic")]), False),
    "joint, cropped": (Stack([Crop(1, 1, 6, 7), Crop(0, 1, 6, 7) @ Convolve(psf())]), False),
    "joint on other pixels": (Stack([Convolve(psf()), PixelBin(2)]), None),
}


@pytest.mark.parametrize("noise_name", ["white", "masked", "rows"])
@pytest.mark.parametrize("name", TOGETHER)
def test_several_data_of_one_image(name, noise_name):
    """Direct where all parts are stationary on one grid; near-direct solves elsewhere; always the
    dense solution.
    """
    operator, stationary = TOGETHER[name]
    strongest = 1e4 if stationary else 1e2
    linear = operator.bind(SHAPE)
    out = operator.output_shape(SHAPE)
    std = torch.full(out, 0.2, dtype=F64)
    if noise_name == "masked":
        std = std * (1 + 0.3 * rand(*out).tanh())
        std.flatten()[3:9] = INF
    if noise_name == "rows":
        std = torch.stack([std, 2 * std, 0.5 * std])
    noise = GaussianNoise(std=std)
    like = Likelihood(rand(3, *out), operator, noise, batched=True)
    r, s = rand(3, *out, seed=4), torch.tensor([0.0, 1.0, strongest], dtype=F64)
    report = like.solve_operator(linear, r, s, tol=1e-10, max_iter=2000)
    power = even_power(8)[None] * s.reshape(3, 1, 1, 1)
    spectral = like.solve_spectral(linear, r, power, tol=1e-10, max_iter=2000)
    direct = bool(stationary) and noise_name != "masked"
    assert (report.iterations == 0) == direct and (spectral.iterations == 0) == direct
    a = explicit(operator, SHAPE)
    eye = torch.eye(64, dtype=F64).reshape(64, *SHAPE)
    for b in range(3):
        variance = (std[b] if noise_name == "rows" else std).flatten().square()
        keep = variance.isfinite()
        p = torch.fft.ifft2(torch.fft.fft2(eye) * power[b]).real.reshape(64, 64)
        for got, cov in ((report.x, s[b] * torch.eye(64, dtype=F64)), (spectral.x, p)):
            full = torch.diag(variance[keep]) + (a @ cov @ a.T)[keep][:, keep]
            want = torch.linalg.solve(full, r[b].flatten()[keep])
            error = (got[b].flatten()[keep] - want).norm() / want.norm()
            assert error < 1e-5
    if direct:  # in single precision, with data as they come: signal of variance s, and noise
        x = s.sqrt()[:, None, None, None] * rand(3, *SHAPE, seed=8)
        r = linear(x) + noise.sample((3, *out), seed=1, dtype=F64)
        want = linear.adjoint(like.solve_operator(linear, r, s).x).flatten(1)
        got = linear.adjoint(like.solve_operator(linear, r.float(), s).x.double()).flatten(1)
        assert ((got - want).norm(dim=1) / want.norm(dim=1)).max() < 2e-3


def test_nonlinear_operators_use_the_linearisation():
    operator, noise = PROBLEMS["nonlinear"]
    like = Likelihood(rand(3, 1, 4, 4), operator, noise)
    x = rand(3, *SHAPE, seed=5)
    r = like.residual(x)
    report = like.solve_operator(
        operator.linearize(x), r, torch.tensor([0.1, 1.0, 5.0], dtype=F64), tol=1e-11
    )
    for b, s in enumerate((0.1, 1.0, 5.0)):
        a = torch.autograd.functional.jacobian(lambda v: operator(v[None])[0].flatten(), x[b])
        a = a.reshape(16, 64)
        want = torch.linalg.solve(0.16 * torch.eye(16, dtype=F64) + s * a @ a.T, r[b].flatten())
        torch.testing.assert_close(report.x[b].flatten(), want, rtol=1e-8, atol=1e-8)


def test_unconverged_and_indefinite_solves_speak_up():
    operator, noise = PROBLEMS["zero, masked"]
    like = Likelihood(rand(*SHAPE), operator, noise)
    r = rand(3, *SHAPE, seed=3)
    with pytest.warns(ConvergenceWarning, match="after 2 iterations"):
        report = like.solve_operator(operator, r, 1e4, tol=1e-10, max_iter=2)
    assert not report.converged.any() and report.iterations == 2
    with pytest.warns(ConvergenceWarning, match="zero or negative curvature"):
        report = like.solve_with(lambda v: -100 * v, r)
    assert report.indefinite.all() and report.x.isfinite().all()
    with pytest.warns(ConvergenceWarning, match="not finite"):
        report = like.solve_with(lambda v: v * math.nan, r)
    assert report.x.isnan().any()


@pytest.mark.parametrize("kind", ["white", "masked", "map"])
@pytest.mark.parametrize("signal", [1e1, 1e3])
def test_preconditioning_saves_products(kind, signal):
    """Zero boundary, masks and uneven noise: at most 0.4 of the products, for any strength of the
    signal.
    """
    std = torch.full((32, 32), 0.5, dtype=F64)
    if kind == "masked":
        std[10:13, 20:24] = INF
    if kind == "map":
        std = std * (0.7 + 0.8 * torch.rand(32, 32, generator=torch.Generator().manual_seed(1)))
    operator = Convolve(psf(9, 1.5))
    like = Likelihood(rand(1, 32, 32), operator, GaussianNoise(std=std))
    image = math.sqrt(signal) * rand(2, 1, 32, 32, seed=3)
    r = operator(image) + like.noise.sample(image.shape, seed=1, dtype=F64)
    plain = like.solve_with(lambda v: signal * v, r, tol=1e-5, max_iter=2000)
    near = like.solve_with(lambda v: signal * v, r, tol=1e-5, max_iter=2000, s_precond=signal)
    torch.testing.assert_close(near.x, plain.x, rtol=1e-2, atol=1e-3 * float(plain.x.abs().max()))
    assert near.iterations <= 0.4 * plain.iterations


def test_fourier_data():
    """Visibilities on a grid, half of them masked: the solve against a dense one."""
    operator = Mask(rand(6, 6, 1) > 0) @ Fourier()
    like = Likelihood(rand(1, 6, 6, 2), operator, GaussianNoise(std=0.2), batched=False)
    x = rand(2, 1, 6, 6, seed=1)
    r = like.residual(x)
    report = like.solve_operator(operator.linearize(x), r, 3.0, tol=1e-11)
    a = explicit(operator, (1, 6, 6))
    want = torch.linalg.solve(0.04 * torch.eye(72, dtype=F64) + 3 * a @ a.T, r.flatten(1).T).T
    torch.testing.assert_close(report.x.flatten(1), want, rtol=1e-7, atol=1e-8)


def test_tiny_units():
    """Fluxes and noise of 1e-21 in float32, pulled back to units of the prior."""
    scale, std = 1e-20, 1e-21
    operator = Convolve(psf().float())
    y = rand(1, 8, 8, dtype=torch.float32) * scale
    pulled = Likelihood(y, operator, GaussianNoise(std=std)).pullback(scale)
    unit = Likelihood(y / scale, operator, GaussianNoise(std=std / scale))
    z = rand(2, *SHAPE, seed=5, dtype=torch.float32)
    torch.testing.assert_close(pulled.score(z), unit.score(z), rtol=1e-4, atol=1e-3)
    got = pulled.operator.linearize(z).adjoint(pulled.solve(pulled.residual(z), 2.0))
    want = unit.operator.adjoint(unit.solve(unit.residual(z), 2.0))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
