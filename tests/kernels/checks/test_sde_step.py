"""sde_step and its random numbers against diffpost.random in float64."""

import math

import numpy as np
import pytest
import torch

from diffpost import random
from diffpost.kernels._math import normal_pair, philox4x32
from diffpost.kernels._runtime import jit, tl
from diffpost.kernels.sde_step import address, reference, sde_step

SEEDS = [0, 1, 0x7FFFFFFF, 0x80000000, (1 << 63) + 12345, (1 << 64) - 1]


@jit
def _words(counter, key, out, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = tl.load(counter + i).to(tl.uint32)
    c1 = tl.load(counter + N + i).to(tl.uint32)
    c2 = tl.load(counter + 2 * N + i).to(tl.uint32)
    c3 = tl.load(counter + 3 * N + i).to(tl.uint32)
    k0, k1 = tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + N + i, w1.to(tl.int64))
    tl.store(out + 2 * N + i, w2.to(tl.int64))
    tl.store(out + 3 * N + i, w3.to(tl.int64))


@jit
def _normals(w, v, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = normal_pair(tl.load(w + i).to(tl.uint32), tl.load(v + i).to(tl.uint32))
    tl.store(out + i, a)
    tl.store(out + N + i, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_words_are_equal_bit_for_bit(device, canaries, seed):
    n = 1 << 14
    generator = torch.Generator().manual_seed(seed & 0xFFFF)
    counter = torch.randint(0, 1 << 32, (4, n), generator=generator)
    counter[:, :6] = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])
    key = (seed & 0xFFFFFFFF, seed >> 32)
    expected = torch.stack(random.philox4x32(tuple(counter), key))
    counter = counter.to(device)
    out = torch.empty_like(counter)
    _words[(1,)](counter, torch.tensor(key, device=device), out, N=n)
    assert torch.equal(out.cpu(), expected)


def test_known_answer_of_random123(device):
    counter = torch.tensor([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], device=device)[:, None]
    out = torch.empty(4, 1, dtype=torch.int64, device=device)
    key = torch.tensor([0xA4093822, 0x299F31D0], device=device)
    _words[(1,)](counter, key, out, N=1)
    assert [f"{int(w):08x}" for w in out] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


@pytest.mark.parametrize("where", ["anywhere", "first", "last", "middle"])
def test_normals_are_right_to_a_millionth(device, where):
    """Against float64, also where the radius is next to its largest and where it is next to zero."""
    n = 1 << 18
    source = np.random.default_rng(3)
    w = {
        "anywhere": source.integers(0, 1 << 32, n),
        "first": np.arange(n),
        "last": (1 << 32) - 1 - np.arange(n),
        "middle": (1 << 31) - n // 2 + np.arange(n),
    }[where]
    v = source.integers(0, 1 << 32, n)
    v[: 1 << 12] = np.arange(1 << 12) << 20  # every octant, and its edges
    out = torch.empty(2, n, device=device)
    _normals[(1,)](torch.from_numpy(w).to(device), torch.from_numpy(v).to(device), out, N=n)
    radius = np.sqrt(-2 * np.log((w + 0.5) / 2**32))
    if where == "last":  # where w + 1/2 loses its last bits in the logarithm
        radius = np.sqrt(-2 * np.log1p(-((1 << 32) - w - 0.5) / 2**32))
    angle = 2 * math.pi / 2**32 * v
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    error = np.abs(out.cpu().double().numpy() - expected)
    assert error.max() < 1e-6
    assert (error / radius).max() < 3e-7  # relative, where all are small


@pytest.mark.parametrize("shape", [(1,), (3,), (1, 5, 7), (2, 32, 33), (1, 64, 64)])
@pytest.mark.parametrize("guided", [True, False])
def test_step_against_the_reference_in_float64(device, canaries, draw, shape, guided):
    ids = torch.tensor([0, 41, (1 << 47) + 5], device=device)
    x, score, guidance = (draw(3, *shape, dtype=torch.float32) for _ in range(3))
    coefficients = draw(3, 4, dtype=torch.float32)
    where = address((1 << 63) + 12345, 77, 3, device)
    inputs = [canaries.place(t) for t in (x, score, guidance, coefficients)]
    out = sde_step(*inputs[:2], inputs[2] if guided else None, inputs[3], ids, where)
    exact = [t.double() for t in (x, score, guidance, coefficients)]
    expected = reference(*exact[:2], exact[2] if guided else None, exact[3], ids, where)
    assert out.dtype == torch.float32
    assert float((out - expected).abs().max()) < 4e-6


def test_pure_noise_is_that_of_the_library(device, draw):
    """Same address, same draw: seed, step, id and stream each change it, and the split of a batch does not."""
    zero = torch.zeros(4, 1, 9, 13, device=device)
    coefficients = torch.tensor([0.0, 0.0, 0.0, 1.0], device=device)
    ids = torch.tensor([3, 4, 1 << 33, 3], device=device)

    def noise(seed=5, step=9, stream=2, rows=slice(None)):
        where = address(seed, step, stream, device)
        return sde_step(zero[rows], zero[rows], None, coefficients, ids[rows], where)

    expected = random.normal(5, ids.cpu(), 9, (1, 9, 13), torch.float64, stream=2)
    assert float((noise().cpu() - expected).abs().max()) < 1e-6
    assert torch.equal(noise(rows=slice(1, 3)), noise()[1:3])
    assert torch.equal(noise()[0], noise()[3])
    for other in (noise(seed=6), noise(step=10), noise(stream=1)):
        assert float((other - noise()).abs().min(0).values.max()) > 1e-3


def test_strides_and_a_large_entry(device, draw):
    x = draw(2, 24, 40, 3, dtype=torch.float32).permute(0, 3, 1, 2)  # channels last
    score = draw(2, 3, 24, 80, dtype=torch.float32)[..., ::2]
    coefficients = draw(4, dtype=torch.float32)
    ids = torch.tensor([8, 9], device=device)
    where = address(1, 2, device=device)
    out = sde_step(x, score, None, coefficients, ids, where)
    expected = reference(x.double(), score.double(), None, coefficients.double(), ids, where)
    assert float((out - expected).abs().max()) < 4e-6


def test_float64(device, draw):
    """Arithmetic in float64; only the normals are those of float32."""
    x, score = draw(1, 50), draw(1, 50)
    ids, where = torch.tensor([1], device=device), address(1, 2, device=device)
    coefficients = torch.tensor([0.3, 0.7, 0.0, 0.0], dtype=torch.float64, device=device)
    out = sde_step(x, score, None, coefficients, ids, where)
    torch.testing.assert_close(out, 0.3 * x + 0.7 * score, rtol=1e-14, atol=1e-14)


def test_gradients(device, draw):
    x, score, guidance = (draw(2, 31, dtype=torch.float32).requires_grad_() for _ in range(3))
    coefficients = draw(2, 4, dtype=torch.float32)
    ids, where = torch.tensor([1, 2], device=device), address(1, 2, device=device)
    g = draw(2, 31, dtype=torch.float32)
    out = sde_step(x, score, guidance, coefficients, ids, where)
    for i, got in enumerate(torch.autograd.grad(out, (x, score, guidance), g)):
        torch.testing.assert_close(got, coefficients[:, i, None] * g)
