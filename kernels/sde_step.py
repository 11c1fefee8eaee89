r"""One step of a reverse-time integrator, with its noise, in one pass.

    out = a x + b score + c guidance + d z,        z ~ N(0, 1)

is any Euler-Maruyama or ancestral step: a, b and d follow from the drift and the diffusion, c from how
guidance is weighted. Each tensor is read once and the result written once; the noise never exists in
memory. It is that of `diffpost.random`: Philox4x32-10 at the counter (block of four elements, step,
id, stream) under the seed, so a draw is the same on every device and however a batch is split. The
words are equal bit for bit, the normals to 1e-6.

Coefficients and (seed, step, stream) are tensors on the device, since a CUDA graph would keep the
values of scalars for ever.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffpost import random
from diffpost.kernels._math import normal_pair, philox4x32
from diffpost.kernels._model import Cost
from diffpost.kernels._runtime import blocks, jit, runs_kernel, tl, triton_op, warps, wrap_triton

__all__ = ["address", "cost", "reference", "sde_step"]

_BLOCK = 1024
_THREADS = 128
_MASK = (1 << 64) - 1


def address(
    seed: int, step: int, stream: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """(seed, step, stream) as the tensor that `sde_step` takes, (3,) int64; the seed as its 64 bits.

    Raises:
        ValueError: a seed outside [0, 2^64), a step outside [0, 2^32), a stream outside [0, 2^15).
    """
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("stream", stream, 15)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
            raise ValueError(f"got {name} = {value!r}; expected an integer in [0, 2^{bits})")
    signed = seed - (1 << 64) if seed >> 63 else seed
    return torch.tensor([signed, step, stream], dtype=torch.int64, device=device)


def sde_step(
    x: Tensor,
    score: Tensor,
    guidance: Tensor | None,
    coefficients: Tensor,
    ids: Tensor,
    address: Tensor,
) -> Tensor:
    """a x + b score + c guidance + d z, differentiable in x, score and guidance.

    Args:
        x: (B, *shape), float32 or float64.
        score, guidance: as x; guidance None counts as zero.
        coefficients: a, b, c, d as (4,) or, by entry, (B, 4), in the dtype of x.
        ids: (B,) int64 in [0, 2^48): which sample each entry is.
        address: (3,) int64 from `address`.

    Returns:
        (B, *shape).

    Raises:
        ValueError: other shapes or dtypes, or coefficients that require a gradient.
    """
    _check(x, score, guidance, coefficients, ids, address)
    return _sde_step(x, score, guidance, coefficients.expand(len(x), 4), ids, address)


def reference(
    x: Tensor,
    score: Tensor,
    guidance: Tensor | None,
    coefficients: Tensor,
    ids: Tensor,
    address: Tensor,
) -> Tensor:
    """The same in plain torch."""
    a, b, c, d = coefficients.expand(len(x), 4).reshape(len(x), *(1,) * (x.ndim - 1), 4).unbind(-1)
    out = a * x + b * score
    if guidance is not None:
        out = out + c * guidance
    return out + d * _normal(x, ids, address)


def cost(numel: int, itemsize: int = 4, guided: bool = True) -> Cost:
    """Of one step of numel elements: Box and Muller are about 25 float operations an element."""
    return Cost((4 if guided else 3) * numel * itemsize, 32 * numel)


@torch.library.custom_op("diffpost::normal_at", mutates_args=())
def _normal(like: Tensor, ids: Tensor, address: Tensor) -> Tensor:
    """Opaque to torch.compile: inside a compiled graph the integers of Philox take seven times as long."""
    seed, step, stream = address.tolist()
    noise = random.Noise(seed & _MASK, ids).at(step)
    return noise(like, stream=stream).contiguous()  # a part of whole blocks


@_normal.register_fake
def _(like: Tensor, ids: Tensor, address: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


@jit
def _kernel(
    x,
    score,
    guidance,
    coefficients,
    ids,
    address,
    out,
    n,
    coefficient_stride,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(n, BLOCK)
    entry = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks

    key = tl.load(address)
    step = tl.load(address + 1)
    stream = tl.load(address + 2)
    number = tl.load(ids + entry)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    c0 = (chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c1 = zero + step.to(tl.uint32)
    c2 = zero + number.to(tl.uint32)
    c3 = zero + ((number >> 32) | (stream << 16)).to(tl.uint32)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    # (BLOCK/4, 2, 2) with the last axis the outer join: four neighbours in a row
    z = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK,))

    place = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = place < n
    start = entry.to(tl.int64) * n
    c = coefficients + entry * coefficient_stride
    value = tl.load(c) * tl.load(x + start + place, inside)
    value += tl.load(c + 1) * tl.load(score + start + place, inside)
    if GUIDED:
        value += tl.load(c + 2) * tl.load(guidance + start + place, inside)
    value += tl.load(c + 3) * z.to(value.dtype)
    tl.store(out + start + place, value, inside)


@triton_op("diffpost::sde_step")
def _sde_step(
    x: Tensor,
    score: Tensor,
    guidance: Tensor | None,
    coefficients: Tensor,
    ids: Tensor,
    address: Tensor,
) -> Tensor:
    if not runs_kernel(x):
        return reference(x, score, guidance, coefficients, ids, address)
    x, score = x.contiguous(), score.contiguous()
    guided = guidance is not None
    guidance = x if guidance is None else guidance.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    n = x.numel() // len(x)
    wrap_triton(_kernel)[(len(x) * blocks(n, _BLOCK),)](
        x,
        score,
        guidance,
        coefficients,
        ids.contiguous(),
        address.contiguous(),
        out,
        n,
        coefficients.stride(0),
        GUIDED=guided,
        BLOCK=_BLOCK,
        num_warps=warps(_THREADS),
    )
    return out


def _setup(ctx, inputs, output):
    _, _, guidance, coefficients, _, _ = inputs
    if ctx.needs_input_grad[3]:
        raise ValueError(
            "sde_step: got coefficients that require a gradient, which it does not have; detach them."
        )
    ctx.guided = guidance is not None
    ctx.save_for_backward(coefficients)


def _backward(ctx, gradient):
    (coefficients,) = ctx.saved_tensors
    shape = (len(gradient), *(1,) * (gradient.ndim - 1))
    a, b, c, _ = (coefficients[:, i].reshape(shape) for i in range(4))
    return a * gradient, b * gradient, c * gradient if ctx.guided else None, None, None, None


_sde_step.register_autograd(_backward, setup_context=_setup)


def _check(
    x: Tensor,
    score: Tensor,
    guidance: Tensor | None,
    coefficients: Tensor,
    ids: Tensor,
    address: Tensor,
) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 1:
        raise ValueError(
            f"sde_step: got x of shape {tuple(x.shape)} and {x.dtype}; expected (B, ...) in float32 or float64"
        )
    for name, other in (("score", score), ("guidance", guidance)):
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(
                f"sde_step: got {name} of shape {tuple(other.shape)} and {other.dtype}; expected that of x, "
                f"{tuple(x.shape)} and {x.dtype}"
            )
    if coefficients.shape not in ((4,), (len(x), 4)) or coefficients.dtype != x.dtype:
        raise ValueError(
            f"sde_step: got coefficients of shape {tuple(coefficients.shape)} and {coefficients.dtype}; "
            f"expected (4,) or ({len(x)}, 4) and {x.dtype}"
        )
    for name, given, length in (("ids", ids, len(x)), ("address", address, 3)):
        if given.shape != (length,) or given.dtype != torch.int64:
            raise ValueError(
                f"sde_step: got {name} of shape {tuple(given.shape)} and {given.dtype}; expected ({length},) "
                "int64"
            )
