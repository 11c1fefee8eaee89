"""group_norm_silu, forward and backward, against autograd of the reference in float64."""

import pytest
import torch

from diffpost.kernels.group_norm_silu import group_norm_silu, reference

SHAPES = [  # (batch, channels, height, width), groups
    ((2, 12, 9, 7), 4),  # three channels a group, a tile that is not full
    ((1, 6, 5, 3), 1),
    ((2, 4, 4, 4), 4),  # one channel a group
    ((1, 8, 65, 64), 2),  # tiles, the last of which is nearly empty
]


def inputs(draw, shape, dtype, residual, shift, offset=0.0):
    """x, weight, bias and what is added, of this dtype and in float64."""
    given = {
        "x": draw(*shape, dtype=dtype, offset=offset),
        "weight": draw(shape[1], dtype=dtype),
        "bias": draw(shape[1], dtype=dtype),
    }
    given |= {"residual": draw(*shape, dtype=dtype)} if residual else {}
    given |= {"shift": draw(*shape[:2], dtype=dtype)} if shift else {}
    return given


def gradients(function, given, groups, scale, g, passed):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in given.items()}
    x, weight, bias = (leaves[name] for name in ("x", "weight", "bias"))
    extra = {name: t for name, t in leaves.items() if name in ("residual", "shift")}
    out, total = function(x, weight, bias, groups, scale=scale, **extra)
    loss = (out * g.to(out)).sum()
    if "residual" in given:
        loss = loss + (total * passed.to(total)).sum()
    return out.detach(), total.detach(), torch.autograd.grad(loss, list(leaves.values()))


def relative(got, expected):
    """Of the largest; a shift of a group of one channel has no gradient at all, where inputs are about 1."""
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1.0))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.float16, 4e-3)],
)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize(("residual", "shift"), [(True, True), (False, True), (False, False)])
def test_against_the_reference(
    device, canaries, draw, shape, groups, dtype, tolerance, residual, shift
):
    given = inputs(draw, shape, dtype, residual, shift)
    scale = 0.7 if residual else 1.0
    g, passed = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    exact = {name: t.double() for name, t in given.items()}
    expected = gradients(reference, exact, groups, scale, g.double(), passed.double())
    placed = {name: canaries.place(t) for name, t in given.items()}
    got = gradients(group_norm_silu, placed, groups, scale, g, passed)
    assert got[0].dtype == got[1].dtype == dtype
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        assert relative(a, b) < tolerance


def test_a_large_mean_costs_no_digits(device, draw):
    """A mean of 1,000 standard deviations: the sum of squares would have lost all of float32's digits."""
    x, weight, bias = draw(1, 4, 65, 64, offset=1000.0), draw(4), draw(4)
    x = x.float().double()
    expected, _ = reference(x, weight, bias, 2)
    got, _ = group_norm_silu(x.float(), weight.float(), bias.float(), 2)
    assert relative(got, expected) < 1e-4  # the rounding of x's mean, 1000 * 6e-8, on a range of 4
    naive = x.float().reshape(2, -1)
    variance = naive.square().mean(-1) - naive.mean(-1).square()
    assert float((variance - x.reshape(2, -1).var(-1, correction=0)).abs().max()) > 1e-2


def test_memory_formats(device, draw):
    x = draw(2, 9, 7, 8, dtype=torch.float32).permute(0, 3, 1, 2)  # channels last
    residual = draw(2, 8, 9, 14, dtype=torch.float32)[..., ::2]
    weight, bias = draw(16, dtype=torch.float32)[::2], draw(8, dtype=torch.float32)
    out, total = group_norm_silu(x, weight, bias, 2, residual=residual)
    expected = reference(x.double(), weight.double(), bias.double(), 2, residual=residual.double())
    assert relative(out, expected[0]) < 2e-6
    assert relative(total, expected[1]) < 1e-6


def test_only_the_sum_is_asked_for(device, draw):
    given = inputs(draw, (1, 4, 3, 5), torch.float64, True, False)
    x, residual = given["x"].requires_grad_(), given["residual"]
    _, total = group_norm_silu(x, given["weight"], given["bias"], 2, residual=residual, scale=0.5)
    (got,) = torch.autograd.grad(total.sum(), x)
    torch.testing.assert_close(got, torch.full_like(x, 0.5))


def test_the_same_input_gives_the_same_bits(device, draw):
    given = inputs(draw, (2, 8, 33, 20), torch.float32, True, True)
    g = draw(2, 8, 33, 20, dtype=torch.float32)
    first, second = (gradients(group_norm_silu, given, 2, 0.7, g, g) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
