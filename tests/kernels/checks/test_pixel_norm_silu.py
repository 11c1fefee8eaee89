"""pixel_norm_silu, forward and backward, against autograd of the reference in float64."""

import pytest
import torch

from diffpost.kernels.pixel_norm_silu import pixel_norm_silu, reference

SHAPES = [(2, 12, 9, 7), (1, 1, 3, 5), (2, 5, 1, 1), (1, 64, 17, 13), (1, 96, 8, 8)]


def gradients(function, tensors, g):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * g.to(out)).sum(), leaves)


def relative(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("film", [True, False])
def test_against_the_reference(device, canaries, draw, shape, dtype, tolerance, film):
    batch, channels = shape[:2]
    sizes = [shape, (channels,), (channels,), *([(batch, channels)] * (2 if film else 0))]
    given = [draw(*size, dtype=dtype) for size in sizes]
    g = draw(*shape, dtype=dtype)
    expected = gradients(reference, [t.double() for t in given], g.double())
    got = gradients(pixel_norm_silu, [canaries.place(t) for t in given], g)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype
        assert relative(a, b) < tolerance


def test_memory_formats(device, draw):
    last = draw(2, 9, 7, 8, dtype=torch.float32).permute(0, 3, 1, 2)
    weight, bias = draw(16, dtype=torch.float32)[::2], draw(8, dtype=torch.float32)
    first, second = (pixel_norm_silu(x, weight, bias) for x in (last, last.contiguous()))
    assert torch.equal(first, second)
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert relative(first, reference(last.double(), weight.double(), bias.double())) < 2e-6


def test_the_same_input_gives_the_same_bits(device, draw):
    given = [draw(2, 32, 9, 9, dtype=torch.float32), *draw(2, 32, dtype=torch.float32)]
    given += draw(2, 2, 32, dtype=torch.float32).unbind(0)
    g = draw(2, 32, 9, 9, dtype=torch.float32)
    first, second = (gradients(pixel_norm_silu, given, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
