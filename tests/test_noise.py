"""Gaussian noise against scipy's multivariate normal, its algebra against matrices, its draws
against both.
"""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from diffpost.noise import BlockNoise, GaussianNoise, Noise

F64 = torch.float64
INF = math.inf
SHAPE = (2, 4, 6)
M = math.prod(SHAPE)


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def spd(m, seed=0):
    root = rand(m, m, seed=seed)
    return root @ root.T / m + 0.1 * torch.eye(m, dtype=F64)


def even_power(*shape, seed=0):
    power = rand(*shape, seed=seed).square() + 0.1
    return 0.5 * (power + power.flip(-2, -1).roll((1, 1), (-2, -1)))


def stationary(power):
    """The covariance matrix of the orthonormal spectrum."""
    eye = torch.eye(M, dtype=F64).reshape(M, *SHAPE)
    return torch.fft.ifft2(torch.fft.fft2(eye) * power).real.reshape(M, M)


MAP = rand(*SHAPE, seed=1).abs() + 0.2
POWER = even_power(4, 6, seed=2)
POWERS = even_power(2, 4, 6, seed=3)
COV = spd(M, seed=4)
CASES = {
    "scalar": (GaussianNoise(std=0.3), 0.09 * torch.eye(M, dtype=F64)),
    "tensor scalar": (
        GaussianNoise(var=torch.tensor(0.09, dtype=F64)),
        0.09 * torch.eye(M, dtype=F64),
    ),
    "std": (GaussianNoise(std=MAP), torch.diag(MAP.flatten() ** 2)),
    "var": (GaussianNoise(var=MAP), torch.diag(MAP.flatten())),
    "weight": (GaussianNoise(weight=MAP), torch.diag(1 / MAP.flatten())),
    "rows": (
        GaussianNoise(std=MAP[0, 0]),
        torch.diag(MAP[0, 0].expand(SHAPE).flatten() ** 2),
    ),
    "per channel": (
        GaussianNoise(std=MAP[:, :1, :1]),
        torch.diag(MAP[:, :1, :1].expand(SHAPE).flatten() ** 2),
    ),
    "cov": (GaussianNoise(cov=COV), COV),
    "power": (GaussianNoise(power=POWER), stationary(POWER)),
    "power per channel": (GaussianNoise(power=POWERS), stationary(POWERS)),
}


@pytest.mark.parametrize("case", CASES)
def test_log_prob_is_the_normal_density(case):
    noise, cov = CASES[case]
    r = rand(5, *SHAPE, seed=9)
    want = scipy.stats.multivariate_normal(cov=cov.numpy()).logpdf(r.reshape(5, -1).numpy())
    np.testing.assert_allclose(noise.log_prob(r).numpy(), want, rtol=1e-10)
    np.testing.assert_allclose(noise.log_prob(r.float()).numpy(), want, rtol=1e-5)
    assert noise.ndata(SHAPE) == M


@pytest.mark.parametrize("case", CASES)
def test_algebra(case):
    """W^T W, the score and the variance against the matrix, and each entry on its own."""
    noise, cov = CASES[case]
    eye = torch.eye(M, dtype=F64).reshape(M, *SHAPE)
    white = noise.whiten(eye).reshape(M, M).T
    inverse = torch.linalg.inv(cov)
    scale = float(inverse.abs().max())
    torch.testing.assert_close(white.T @ white, inverse, rtol=1e-8, atol=1e-9 * scale)
    torch.testing.assert_close(noise.whiten_adjoint(eye).reshape(M, M), white, rtol=1e-9, atol=1e-9)
    r = rand(3, *SHAPE, seed=9)
    want = (r.reshape(3, M) @ inverse).reshape(r.shape)
    torch.testing.assert_close(noise.precision(r), want, rtol=1e-8, atol=1e-8 * scale)
    torch.testing.assert_close(noise.score(r), -want, rtol=1e-8, atol=1e-8 * scale)
    torch.testing.assert_close(noise.chi2(r), (r * want).flatten(1).sum(1), rtol=1e-9, atol=1e-9)
    variance = noise.variance
    variance = variance.reshape(SHAPE) if variance.shape == (M,) else variance.expand(SHAPE)
    torch.testing.assert_close(variance.flatten(), cov.diagonal(), rtol=1e-10, atol=1e-12)
    assert noise.whiten(r.float()).dtype == torch.float32
    torch.testing.assert_close(noise.whiten(r[1:2]), noise.whiten(r)[1:2], rtol=1e-12, atol=1e-12)
    if noise.weight() is not None:
        torch.testing.assert_close(noise.weight().expand(SHAPE).flatten(), 1 / cov.diagonal())


@pytest.mark.parametrize("case", CASES)
def test_score_is_the_gradient(case):
    noise, _ = CASES[case]
    r = rand(3, *SHAPE, seed=9).requires_grad_()
    (gradient,) = torch.autograd.grad(noise.log_prob(r).sum(), r)
    torch.testing.assert_close(gradient, noise.score(r.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_covariance(case):
    """chi^2 of n draws is chi^2_{n M}; under 1.1 times the noise it is not: within 5 standard
    deviations.
    """
    noise, _ = CASES[case]
    n = 400
    r = noise.sample((n, *SHAPE), seed=1, dtype=F64)
    error = math.sqrt(2 * n * M)
    assert abs(float(noise.chi2(r).sum()) - n * M) < 5 * error
    assert abs(float(noise.chi2(1.1 * r).sum()) - n * M) > 5 * error  # negative control
    # off-diagonal elements: the empirical covariance in whitened units is I within 5.5 sigma of its
    # entries
    white = noise.whiten(r).reshape(n, M)
    gap = (white.T @ white / n - torch.eye(M, dtype=F64)) * math.sqrt(n)
    assert gap.abs().max() < 5.5 * math.sqrt(2)
    torch.testing.assert_close(r, noise.sample((n, *SHAPE), seed=1, dtype=F64))
    assert not torch.equal(r, noise.sample((n, *SHAPE), seed=2, dtype=F64))
    assert noise.sample(SHAPE, seed=1).dtype == torch.float32
    assert noise.sample(SHAPE, seed=1).shape == SHAPE


def test_spectrum_is_known_where_noise_is_stationary():
    for case, stationary_case in (
        ("scalar", True),
        ("tensor scalar", True),
        ("per channel", True),
        ("power", True),
        ("std", False),
        ("cov", False),
    ):
        noise, cov = CASES[case]
        spectrum = noise.spectrum(SHAPE)
        assert (spectrum is not None) == stationary_case
        if spectrum is not None:
            power = spectrum.expand(SHAPE)
            torch.testing.assert_close(stationary(power), cov, rtol=1e-7, atol=1e-9)
    full = GaussianNoise(std=torch.full(SHAPE, 0.3))
    assert full.spectrum(SHAPE) is not None  # a map of one value is white
    assert GaussianNoise(std=0.3).spectrum((7,)) is None
    masked = torch.full(SHAPE, 0.3)
    masked[0, 0, 0] = INF
    assert GaussianNoise(std=masked).spectrum(SHAPE) is None


# infinite variance -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["std", "var", "weight"])
def test_infinite_variance_masks(kind):
    """Masked data enter neither chi^2, nor the determinant, nor the count, whatever they hold."""
    gone = torch.zeros(SHAPE, dtype=torch.bool)
    gone[0, 1, 2:4] = gone[1, 3, 5] = True
    values = {"std": MAP, "var": MAP**2, "weight": MAP**-2}[kind].clone()
    values[gone] = 0.0 if kind == "weight" else INF
    noise = GaussianNoise(**{kind: values})
    r = rand(4, *SHAPE, seed=9)
    want = scipy.stats.norm(scale=MAP[~gone].numpy()).logpdf(r[:, ~gone].numpy()).sum(1)
    for junk in (0.0, 1e30, math.nan, INF):
        r[:, gone] = junk
        np.testing.assert_allclose(noise.log_prob(r).numpy(), want, rtol=1e-10)
        for out in (noise.whiten(r), noise.precision(r), noise.score(r)):
            assert (out[:, gone] == 0).all() and out.isfinite().all()
    assert noise.ndata(SHAPE) == M - 3
    assert (noise.masked(SHAPE) == gone).all()
    assert (noise.variance[gone] == INF).all()
    draw = noise.sample((2, *SHAPE), seed=0)
    assert (draw[:, gone] == 0).all() and draw.isfinite().all()
    r = r.nan_to_num().requires_grad_()
    assert torch.autograd.grad(noise.log_prob(r).sum(), r)[0].isfinite().all()


def test_everything_may_be_masked():
    noise = GaussianNoise(weight=torch.zeros(SHAPE))
    assert noise.ndata(SHAPE) == 0
    assert (noise.log_prob(rand(2, *SHAPE)) == 0).all()


def test_a_batch_of_noises():
    """A std with the batch's own axis: entry b has row b, also in counts and in selections."""
    std = rand(3, *SHAPE, seed=5).abs() + 0.1
    std[1, 0, :2] = INF
    noise = GaussianNoise(std=std)
    r = rand(3, *SHAPE, seed=9)
    each = torch.cat([GaussianNoise(std=std[b]).log_prob(r[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(noise.log_prob(r), each)
    assert noise.ndata(SHAPE).tolist() == [M, M - 12, M]
    chosen = noise.select(torch.tensor([2, 1]), SHAPE)
    torch.testing.assert_close(chosen.log_prob(r[[2, 1]]), each[[2, 1]])
    shared = GaussianNoise(std=std[0])
    assert shared.select(torch.tensor([2, 1]), SHAPE) is shared
    assert noise.sample((3, *SHAPE), seed=0).shape == (3, *SHAPE)


def test_fluxes_of_tiny_units():
    """1e-21 in its unit: the variance, 1e-42, is not a float32 number, the algebra is."""
    r = rand(2, *SHAPE, dtype=torch.float32)
    small, unit = GaussianNoise(std=torch.tensor(1e-21)), GaussianNoise(std=1.0)
    torch.testing.assert_close(small.chi2(r * 1e-21), unit.chi2(r), rtol=1e-5, atol=1e-5)
    shift = M * math.log(1e21)
    torch.testing.assert_close(small.log_prob(r * 1e-21), unit.log_prob(r) + shift)
    assert small.sample((2, *SHAPE), seed=0).abs().max() > 0


# errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "got nothing; expected exactly one"),
        ({"std": 1.0, "var": 1.0}, "got std, var; expected exactly one"),
        ({"std": -1.0}, "negative"),
        ({"std": torch.tensor([1.0, -1.0])}, "1 of 2 values are negative"),
        ({"var": math.nan}, "NaN"),
        ({"weight": torch.tensor([1.0, math.nan])}, "1 of 2 values are NaN"),
        ({"std": 0.0}, "zero variance"),
        ({"var": torch.tensor([0.0, 1.0, 0.0])}, "2 of 3 values mean zero variance"),
        ({"weight": INF}, "zero variance"),
        ({"std": torch.tensor(1j)}, "complex"),
        ({"cov": torch.ones(3)}, r"expected \(m, m\)"),
        ({"cov": torch.ones(3, 4)}, r"expected \(m, m\)"),
        ({"cov": torch.ones(3, 3)}, "not positive definite"),
        ({"cov": torch.diag(torch.tensor([1.0, 0.0]))}, "not positive definite"),
        ({"cov": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, "not symmetric"),
        ({"cov": torch.tensor([[1.0, 0.0], [0.0, INF]])}, "infinite"),
        ({"power": torch.ones(4)}, r"expected \(\.\.\., H, W\)"),
        ({"power": torch.zeros(4, 4)}, "positive"),
        ({"power": torch.full((4, 4), INF)}, "positive"),
        ({"power": torch.arange(1.0, 17.0).reshape(4, 4)}, r"P\(-k\) differ"),
    ],
)
def test_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        GaussianNoise(**kwargs)


@pytest.mark.parametrize(
    "noise",
    [GaussianNoise(std=torch.ones(5)), GaussianNoise(cov=spd(7)), CASES["power"][0]],
    ids=["std", "cov", "power"],
)
def test_shapes_are_named(noise):
    for act in (noise.whiten, noise.log_prob):
        with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
            act(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="residual"):
        noise.check((2, 3, 4))


# joint data ------------------------------------------------------------------------------------


def test_block_noise():
    """Blocks are the parts, side by side."""
    std = rand(3, seed=1).abs() + 0.5
    std[1] = INF
    parts = [GaussianNoise(power=POWER), GaussianNoise(cov=spd(5)), GaussianNoise(std=std)]
    shapes = [SHAPE, (5,), (3,)]
    noise = BlockNoise(parts, shapes)
    pieces = [rand(2, *shape, seed=i) for i, shape in enumerate(shapes)]
    joint = torch.cat([p.flatten(1) for p in pieces], 1)
    pairs = list(zip(parts, pieces, strict=True))
    torch.testing.assert_close(noise.log_prob(joint), sum(n.log_prob(p) for n, p in pairs))
    torch.testing.assert_close(noise.chi2(joint), sum(n.chi2(p) for n, p in pairs))
    for name in ("whiten", "whiten_adjoint", "precision", "score"):
        want = torch.cat([getattr(n, name)(p).flatten(1) for n, p in pairs], 1)
        torch.testing.assert_close(getattr(noise, name)(joint), want)
    assert noise.ndata((M + 8,)) == M + 7
    assert noise.variance.shape == (M + 8,) and noise.variance[M + 6] == INF
    assert noise.masked((M + 8,)).nonzero().tolist() == [[M + 6]]
    assert noise.weight() is None
    draw = noise.sample((400, M + 8), seed=3, dtype=F64)
    assert abs(float(noise.chi2(draw).sum()) - 400 * (M + 7)) < 5 * math.sqrt(800 * (M + 7))
    assert noise.sample((M + 8,), seed=3).shape == (M + 8,)
    assert abs(np.corrcoef(draw[:, :M].flatten()[:1200], draw[:, M : M + 3].flatten())[0, 1]) < 0.15
    with pytest.raises(ValueError, match="joint data"):
        noise.whiten(torch.ones(2, 4))
    with pytest.raises(ValueError, match="noises and"):
        BlockNoise(parts, shapes[:2])


def test_block_noise_with_batches():
    std = rand(3, 4, seed=1).abs() + 0.5
    std[0, 0] = INF
    noise = BlockNoise([GaussianNoise(std=std), GaussianNoise(std=2.0)], [(4,), (2, 2)])
    assert noise.weight().shape == (3, 8) and noise.variance.shape == (3, 8)
    assert noise.ndata((8,)).tolist() == [7, 8, 8]
    r = rand(3, 8)
    chosen = noise.select(torch.tensor([2, 0]), (8,))
    torch.testing.assert_close(chosen.log_prob(r[[2, 0]]), noise.log_prob(r)[[2, 0]])


def test_a_noise_without_covariance_says_so():
    class Learned(Noise):
        def log_prob(self, r):
            return r.flatten(1).sum(1)

        def score(self, r):
            return torch.ones_like(r)

        def sample(self, shape, seed, dtype=None, device=None):
            return torch.zeros(shape)

        def ndata(self, shape):
            return math.prod(shape)

        @property
        def variance(self):
            return torch.ones(())

    with pytest.raises(NotImplementedError, match="no covariance"):
        Learned().precision(torch.ones(1, 2))
    assert Learned().spectrum((2, 2)) is None and Learned().masked((2,)) is None
