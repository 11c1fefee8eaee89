"""The counter-based generator: published vectors, the documented layout, and statistics.

Each statistical test rejects at a p-value of 1e-4 / (number of its p-values), so that a correct
generator fails with a probability of 1e-4 a test; seeds are fixed, so it does so once or never.  The
same tests must reject generators that are broken on purpose.
"""

import math
import random

import pytest
import torch
from scipy import stats

import diffpost.random as module
from diffpost.random import Noise, normal, philox4x32, uniform

FALSE_ALARM = 1e-4
MASK = 0xFFFFFFFF


def words(counter, key, rounds=10):
    vector = tuple(torch.tensor([c]) for c in counter)
    return tuple(int(w) for w in philox4x32(vector, key, rounds))


def plain_philox(counter, key, rounds=10):
    """The definition, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    "counter,key,expected",
    [
        ((0,) * 4, (0,) * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter, key, expected):
    assert " ".join(f"{w:08x}" for w in words(counter, key)) == expected


def test_philox_agrees_with_integer_arithmetic():
    """Edge values included: the products overflow int64 unless they are split with care."""
    source = random.Random(0)
    edges = [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, MASK - 1, MASK]
    for i in range(200):
        draw = (lambda: source.choice(edges)) if i % 2 else (lambda: source.getrandbits(32))
        counter, key = tuple(draw() for _ in range(4)), tuple(draw() for _ in range(2))
        assert words(counter, key) == plain_philox(counter, key)


def reference(seed, i, step, stream, element, kind):
    """One element by the layout that the module documents."""
    counter = (
        element // 4,
        step,
        i & MASK,
        (i >> 32) | (stream << 16) | ((1 << 31) if kind == "uniform" else 0),
    )
    w = plain_philox(counter, (seed & MASK, seed >> 32))
    if kind == "uniform":
        return w[element % 4] / 2**32
    a, b = w[element % 4 // 2 * 2 : element % 4 // 2 * 2 + 2]
    radius = math.sqrt(-2 * math.log((a + 0.5) / 2**32))
    angle = 2 * math.pi * b / 2**32
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_the_documented_layout(kind):
    draw = normal if kind == "normal" else uniform
    seed, step, stream = 0xFEDCBA9876543210, 0xFFFFFFFE, 0x7FFF
    ids = torch.tensor([0, 5, MASK, 1 << 32, (1 << 48) - 1])
    x = draw(seed, ids, step, (3, 5), dtype=torch.float64, stream=stream)
    for b, i in enumerate(ids.tolist()):
        for element in range(15):
            expected = reference(seed, i, step, stream, element, kind)
            assert float(x[b].flatten()[element]) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("draw", [normal, uniform])
def test_a_draw_depends_on_its_own_place_alone(draw):
    ids = torch.tensor([7, 3, 1000000007, 3, 0])
    x = draw(11, ids, 4, (2, 9, 5), stream=2)
    assert torch.equal(x[1], x[3])
    for b in range(5):  # any split
        assert torch.equal(draw(11, ids[b : b + 1], 4, (2, 9, 5), stream=2), x[b : b + 1])
    order = torch.tensor([4, 2, 0, 1, 3])  # any order
    assert torch.equal(draw(11, ids[order], 4, (2, 9, 5), stream=2), x[order])
    assert torch.equal(draw(11, ids, 4, (31,), stream=2), x.flatten(1)[:, :31])  # any shape
    exact = draw(11, ids, 4, (2, 9, 5), stream=2, dtype=torch.float64)
    if draw is normal:
        assert torch.equal(exact.float(), x)
        assert torch.equal(
            normal(11, ids, 4, (2, 9, 5), torch.bfloat16, stream=2), exact.bfloat16()
        )
    else:
        assert float((exact - x).min()) >= 0 and float((exact - x).max()) < 2**-24
    for other in [(12, 4, 2), (11, 5, 2), (11, 4, 1), (11 + (1 << 32), 4, 2)]:
        y = draw(other[0], ids, other[1], (2, 9, 5), stream=other[2])
        assert (y != x).float().mean() > 0.99


def test_draws_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    ids = torch.arange(9)
    whole = normal(1, ids, 0, (1, 50, 7))
    for chunk in (1, 3, 88, 1 << 20):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert torch.equal(normal(1, ids, 0, (1, 50, 7)), whole)


def test_empty_shapes_and_batches():
    assert normal(0, torch.arange(3), 0, ()).shape == (3,)
    assert normal(0, torch.arange(3), 0, (0, 4)).shape == (3, 0, 4)
    assert uniform(0, torch.arange(0), 0, (4,)).shape == (0, 4)


def test_noise_is_normal_of_its_arguments():
    ids = torch.tensor([4, 9])
    noise = Noise(3, ids).at(6)
    like = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    assert torch.equal(noise(like), normal(3, ids, 6, (1, 4, 4), torch.float64))
    assert torch.equal(noise(like, stream=1), normal(3, ids, 6, (1, 4, 4), torch.float64, stream=1))
    assert noise(like.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="one for each id"):
        noise(torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: normal(-1, torch.arange(2), 0, (2,)), r"seed = -1; expected .* \[0, 2\^64\)"),
        (lambda: normal(1 << 64, torch.arange(2), 0, (2,)), "seed"),
        (lambda: normal(0.5, torch.arange(2), 0, (2,)), "seed = 0.5"),
        (lambda: normal(0, torch.arange(2), 1 << 32, (2,)), "step"),
        (lambda: normal(0, torch.arange(2), 0, (2,), stream=1 << 15), "stream"),
        (lambda: normal(0, torch.tensor([0, -1]), 0, (2,)), "ids from -1 to 0"),
        (lambda: normal(0, torch.tensor([1 << 48]), 0, (2,)), "ids"),
        (lambda: normal(0, torch.zeros(2), 0, (2,)), "integers"),
        (lambda: normal(0, torch.tensor(3), 0, (2,)), r"expected \(B,\)"),
        (lambda: normal(0, torch.arange(2), 0, (2,), dtype=torch.int64), "floating"),
        (lambda: uniform(0, torch.arange(2), 0, (2,), dtype=torch.float16), "float32 or"),
        (lambda: Noise(-1, torch.arange(2)), "seed"),
        (lambda: Noise(0, torch.tensor([-1])), "ids"),
        (lambda: Noise(0, torch.arange(2)).at(-1), "step"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def normality(x):
    """p-values of a sample against N(0, 1): moments one to four, and Kolmogorov-Smirnov."""
    x = x.double().flatten()
    n = len(x)
    # Variances of z, z^2, z^3 and z^4 for a standard normal z.
    moments = [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]
    scores = [float((x**k).mean() - m) / math.sqrt(v / n) for k, m, v in moments]
    p = [2 * stats.norm.sf(abs(score)) for score in scores]
    return [*p, stats.kstest(x.numpy(), "norm").pvalue]


def independence(x):
    """p-values of the largest correlations between rows of x (m, n), of values and of squares."""
    out = []
    for y in (x.double(), x.double() ** 2):
        y = (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True)
        rho = (y @ y.T / y.shape[1]).fill_diagonal_(0)
        pairs = len(y) * (len(y) - 1) // 2
        largest = float(rho.abs().max()) * math.sqrt(y.shape[1])
        out.append(min(1.0, pairs * 2 * stats.norm.sf(largest)))
    return out


def accepts(p):
    return min(p) > FALSE_ALARM / len(p)


def test_normals_are_normal():
    x = normal(1, torch.arange(64), 3, (64, 64))
    assert accepts(normality(x))
    # Each of the four places of a block on its own, and single draws.
    p = [value for place in range(4) for value in normality(x.flatten(1)[:, place::4])]
    assert accepts(p)
    assert accepts([value for b in range(8) for value in normality(x[b])])
    # The tail: |z| > 4 is expected in 16.6 of 2^18.
    tail = int((x.abs() > 4).sum())
    assert stats.poisson.cdf(tail, 16.6) > 1e-4 and stats.poisson.sf(tail - 1, 16.6) > 1e-4


def test_uniforms_are_uniform():
    for dtype in (torch.float32, torch.float64):
        u = uniform(1, torch.arange(64), 3, (64, 64), dtype=dtype)
        assert float(u.min()) >= 0 and float(u.max()) < 1
        assert accepts([stats.kstest(u.flatten().numpy(), "uniform").pvalue])
        assert accepts(normality(math.sqrt(2) * torch.erfinv(2 * u.double().clamp_min(1e-12) - 1)))


@pytest.mark.parametrize("axis", ["ids", "high ids", "steps", "streams", "seeds", "high seeds"])
def test_neighbours_are_independent(axis):
    n, shape = 64, (4096,)
    one = torch.arange(1)
    if axis == "ids":
        x = normal(2, torch.arange(n), 0, shape)
    elif axis == "high ids":
        x = normal(2, torch.arange(n) << 32, 0, shape)
    elif axis == "steps":
        x = torch.cat([normal(2, one, i, shape) for i in range(n)])
    elif axis == "streams":
        x = torch.cat([normal(2, one, 0, shape, stream=i) for i in range(n)])
    elif axis == "seeds":
        x = torch.cat([normal(i, one, 0, shape) for i in range(n)])
    else:
        x = torch.cat([normal(i << 32, one, 0, shape) for i in range(n)])
    assert accepts([*independence(x), *normality(x)])


def test_elements_of_a_draw_are_independent():
    x = normal(5, torch.arange(4096), 0, (64,))
    assert accepts(independence(x.T))


def test_normals_and_uniforms_are_independent():
    ids = torch.arange(32)
    z = normal(9, ids, 1, (4096,), torch.float64)
    u = math.sqrt(2) * torch.erfinv(2 * uniform(9, ids, 1, (4096,), torch.float64) - 1)
    assert accepts(independence(torch.cat([z, u])))


@pytest.mark.parametrize("rounds,passes", [(3, False), (10, True)])
def test_the_tests_reject_too_few_rounds(monkeypatch, rounds, passes):
    """Negative control: three rounds, the fewest in which every word meets every other."""
    monkeypatch.setattr(module, "philox4x32", lambda c, k: philox4x32(c, k, rounds))
    x = normal(2, torch.arange(64), 0, (4096,))
    p = [*normality(x), *independence(x), *independence(x.T[:64])]
    assert accepts(p) == passes


def test_the_tests_reject_subtle_faults():
    """Negative controls with the faults that such code tends to have."""
    ids = torch.arange(64)
    x = normal(2, ids, 0, (4096,))
    u = uniform(2, ids, 0, (4096, 12)).sum(2) - 6  # sum of twelve uniforms: kurtosis 2.9
    assert accepts(normality(x)) and not accepts(normality(u))
    assert not accepts(normality(1.01 * x)) and not accepts(normality(x + 0.01))
    shared = math.sqrt(0.9) * x + math.sqrt(0.1) * normal(3, ids, 0, (4096,))[:1]
    assert accepts(independence(x)) and not accepts(independence(shared))
    repeated = torch.cat([x[:32], x[:32].roll(0, 1)])
    assert not accepts(independence(repeated))
    # Box-Muller with the angle and the radius from the same word.
    word = uniform(2, ids, 0, (4096,), torch.float64).clamp_min(1e-12)
    same = (-2 * word.log()).sqrt() * (2 * math.pi * word).cos()
    assert not accepts(normality(same))
