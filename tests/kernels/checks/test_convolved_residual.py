"""convolved_residual and its transpose against complex arithmetic in float64."""

import pytest
import torch

from diffpost.kernels.convolved_residual import convolved_residual, reference

# (batch, channels, height, columns of rfft2): odd numbers, one number, several blocks
SHAPES = [(2, 1, 7, 5), (1, 1, 1, 1), (3, 2, 33, 17), (2, 1, 64, 33)]


def inputs(draw, shape, dtype):
    return (
        draw(*shape, 2, dtype=dtype),
        draw(*shape[1:], 2, dtype=dtype),
        draw(*shape[1:], dtype=dtype).exp(),
        draw(shape[0], dtype=dtype).exp(),
    )


def as_complex(tensors):
    r, a, q, s = tensors
    return torch.view_as_complex(r), torch.view_as_complex(a), q, s


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(device, canaries, draw, shape, dtype, tolerance):
    given = inputs(draw, shape, dtype)
    expected = reference(*as_complex([t.double() for t in given]))
    got = convolved_residual(*as_complex([canaries.place(t) for t in given]))
    assert got.dtype == (torch.complex128 if dtype == torch.float64 else torch.complex64)
    assert float((got - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_gradients_against_the_reference(device, canaries, draw, shape):
    given = inputs(draw, shape, torch.float32)
    g = draw(*shape, 2)
    results = []
    for function, dtype in ((reference, torch.float64), (convolved_residual, torch.float32)):
        leaves = [t.to(dtype).clone().requires_grad_() for t in given]
        out = torch.view_as_real(function(*as_complex(leaves)))
        results.append(torch.autograd.grad((out * g.to(dtype)).sum(), leaves))
    for expected, got in zip(*results, strict=True):
        assert float((got - expected).abs().max() / expected.abs().max()) < 5e-6


def test_the_gradient_is_the_adjoint(device, draw):
    """<g, W r> = <W^T g, r> in float64: the gradient comes from the same kernel."""
    r, a, q, s = inputs(draw, (2, 1, 9, 5), torch.float64)
    g = draw(2, 1, 9, 5, 2)
    r.requires_grad_()
    out = torch.view_as_real(convolved_residual(*as_complex([r, a, q, s])))
    (back,) = torch.autograd.grad(out, r, g)
    torch.testing.assert_close((g * out).sum(), (back * r).sum(), rtol=1e-13, atol=0)


def test_conjugate_views_and_strides(device, draw):
    r, a, q, s = as_complex(inputs(draw, (2, 1, 8, 6), torch.float32))
    expected = reference(r.conj(), a.conj(), q, s)
    torch.testing.assert_close(convolved_residual(r.conj(), a.conj(), q, s), expected)
    half = [t[..., ::2] for t in (r, a, q)]
    torch.testing.assert_close(convolved_residual(*half, s), reference(*half, s))
