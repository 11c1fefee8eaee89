r"""The score of a Gaussian likelihood under a convolved prior, whitened in Fourier space in one pass.

With a residual of spectrum r_k, an operator of transfer function a_k and noise of power q_k, the convolved
likelihood p(y | x_t) = N(y; A x, Q + s A A^T) (Remy et al. 2022, arXiv:2201.05561; `diffpost.Convolved`) has the
score

    w_k = conj(a_k) r_k / (q_k + s |a_k|^2)

where the operator and the noise are diagonal in Fourier space. Plain torch makes five passes over it and complex
temporaries; here each number is read once. Triton has no complex numbers: spectra are pairs of real ones, next to
each other as torch keeps them (`torch.view_as_real`).

The map is linear in r, and its transpose is that of the conjugate transfer, by the same kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffpost.kernels._model import Cost
from diffpost.kernels._runtime import blocks, jit, runs_kernel, tl, triton_op, warps, wrap_triton

__all__ = ["convolved_residual", "cost", "reference"]

_BLOCK = 1024  # complex numbers of a program
_THREADS = 128
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def convolved_residual(residual: Tensor, transfer: Tensor, power: Tensor, s: Tensor) -> Tensor:
    """conj(a) r / (q + s |a|^2), differentiable in all four.

    Args:
        residual: r, (B, C, H, W/2 + 1) complex, as from `torch.fft.rfft2`.
        transfer: a, (C, H, W/2 + 1) complex.
        power: q, (C, H, W/2 + 1) real and positive (or zero where a is not), the variance of each mode under
            the normalisation of r.
        s: (B,) real, not negative.

    Returns:
        As residual.

    Raises:
        ValueError: other shapes or dtypes.
    """
    _check(residual, transfer, power, s)
    real = torch.view_as_real(residual.resolve_conj())
    out: Tensor = _convolved_residual(
        real, torch.view_as_real(transfer.resolve_conj()), power, s, False
    )
    return torch.view_as_complex(out)


def reference(residual: Tensor, transfer: Tensor, power: Tensor, s: Tensor) -> Tensor:
    """The same in plain torch."""
    noise = power + s[:, None, None, None] * transfer.abs().square()
    return transfer.conj() * residual / noise


def cost(shape: tuple[int, int, int, int], itemsize: int = 4) -> Cost:
    """Of (B, C, H, W/2 + 1): residuals and results by entry, transfer and power once."""
    each = shape[1] * shape[2] * shape[3]
    return Cost((4 * shape[0] + 3) * each * itemsize, 12 * shape[0] * each)


@jit
def _kernel(
    residual,
    transfer,
    power,
    s,
    out,
    n,
    CONJUGATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(n, BLOCK)
    entry, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    # pairs are loaded flat, so that an access is of 128 bits, and then told apart
    flat = chunk * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
    inside = flat < 2 * n
    start = entry.to(tl.int64) * 2 * n
    r = tl.load(residual + start + flat, inside, other=0.0)
    a = tl.load(transfer + flat, inside, other=0.0)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(power + place, place < n, other=1.0)
    x, y = tl.split(tl.reshape(r, (BLOCK, 2)))
    u, v = tl.split(tl.reshape(a, (BLOCK, 2)))
    if CONJUGATE:
        v = -v
    weight = 1.0 / (q + tl.load(s + entry) * (u * u + v * v))
    real, imaginary = (u * x + v * y) * weight, (u * y - v * x) * weight
    tl.store(out + start + flat, tl.reshape(tl.join(real, imaginary), (2 * BLOCK,)), inside)


@triton_op("diffpost::convolved_residual")
def _convolved_residual(
    residual: Tensor, transfer: Tensor, power: Tensor, s: Tensor, conjugate: bool
) -> Tensor:
    """On pairs of real numbers; with the conjugate transfer, the transpose."""
    if not runs_kernel(residual):
        x, y = residual.unbind(-1)
        u, v = transfer.unbind(-1)
        v = -v if conjugate else v
        noise = power + s[:, None, None, None] * (u * u + v * v)
        out = torch.stack([(u * x + v * y) / noise, (u * y - v * x) / noise], -1)
        return out.contiguous()
    residual = residual.contiguous()
    out = torch.empty_like(residual)
    if residual.numel() == 0:
        return out
    n = residual[0].numel() // 2
    wrap_triton(_kernel)[(len(residual) * blocks(n, _BLOCK),)](
        residual,
        transfer.contiguous(),
        power.contiguous(),
        s.contiguous(),
        out,
        n,
        CONJUGATE=conjugate,
        BLOCK=_BLOCK,
        num_warps=warps(_THREADS),
    )
    return out


def _setup(ctx, inputs, output):
    _, transfer, power, s, ctx.conjugate = inputs
    ctx.save_for_backward(transfer, power, s, output, inputs[0])


def _gradients(ctx, g):
    transfer, power, s, out, residual = ctx.saved_tensors
    to_residual = to_transfer = to_power = to_s = None
    if ctx.needs_input_grad[0]:
        to_residual = _convolved_residual(g, transfer, power, s, not ctx.conjugate)
    if any(ctx.needs_input_grad[1:4]):
        # noise = q + s |a|^2 divides the output: its gradient is -Re(conj(g) w)/noise
        size, wide = transfer.square().sum(-1), s[:, None, None, None]
        noise = power + wide * size
        to_noise = -(g * out).sum(-1) / noise
        to_power = to_noise.sum(0)
        to_s = (to_noise * size).sum((1, 2, 3))
        (x, y), (p, q) = residual.unbind(-1), g.unbind(-1)
        across = (p * y - q * x) if not ctx.conjugate else (q * x - p * y)
        direct = torch.stack([p * x + q * y, across], -1) / noise[..., None]
        to_transfer = (direct + 2 * (wide * to_noise)[..., None] * transfer).sum(0)
    return to_residual, to_transfer, to_power, to_s, None


_convolved_residual.register_autograd(_gradients, setup_context=_setup)


def _check(residual: Tensor, transfer: Tensor, power: Tensor, s: Tensor) -> None:
    if residual.ndim != 4 or residual.dtype not in _REAL:
        raise ValueError(
            f"convolved_residual: got a residual of shape {tuple(residual.shape)} and {residual.dtype}; expected "
            "(B, C, H, W/2 + 1), complex64 or complex128"
        )
    real = _REAL[residual.dtype]
    for name, given, shape, dtype in (
        ("transfer", transfer, tuple(residual.shape[1:]), residual.dtype),
        ("power", power, tuple(residual.shape[1:]), real),
        ("s", s, (len(residual),), real),
    ):
        if tuple(given.shape) != shape or given.dtype != dtype or given.device != residual.device:
            raise ValueError(
                f"convolved_residual: got {name} of shape {tuple(given.shape)}, {given.dtype} on {given.device}; "
                f"expected {shape}, {dtype} on {residual.device}"
            )
