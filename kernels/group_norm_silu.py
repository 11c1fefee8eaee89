r"""Group normalisation and SiLU, with what stands before it in a residual block, in one pass.

    s = scale (x + residual),        v = s + shift[b, c],        m, r = mean and 1/std of v in its group,
    out = silu(weight[c] (v - m) r + bias[c]),                   silu(z) = z/(1 + exp(-z)),

(Wu & He 2018, arXiv:1803.08494) are GroupNorm_0 after a skip connection and GroupNorm_1 after the time
embedding of score_models' residual blocks. One program has one group of one image: its variance is that
of tiles, each by two passes in registers, joined by Chan, Golub & LeVeque's (1983) formula, so that a
large mean costs no digits. A group of one tile is read once, a larger one twice, the second time from
the cache.

With z' = d silu/dz and h = g z' weight, the gradient is dv = r (h - <h> - n <h n>), n = (v - m) r, with means
<> over the group. Sums over pixels are written per image and channel and added afterwards: nothing is atomic,
and the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpost.kernels._model import Cost
from diffpost.kernels._runtime import (
    jit,
    power_of_two,
    runs_kernel,
    tl,
    triton_op,
    warps,
    wrap_triton,
)

__all__ = ["cost", "group_norm_silu", "reference"]

_TILE = 8192  # elements in registers, at most
_EACH = 16  # of a thread
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """silu(group_norm(scale (x + residual) + shift)), differentiable once in all tensors.

    Args:
        x: (B, C, ...).
        weight, bias: (C,).
        groups: divides C.
        eps: added to the variance.
        shift: (B, C), added to every pixel of a channel: the time embedding.
        residual: as x.
        scale: of x + residual.

    Returns:
        The output, and s = scale (x + residual), which is x itself where neither is given; both as x.

    Raises:
        ValueError: other shapes or dtypes, or a number of groups that does not divide C.
    """
    _check(x, weight, bias, groups, shift, residual)
    if residual is None and scale != 1.0:
        x, scale = scale * x, 1.0
    out, total, _, _ = _group_norm_silu(x, residual, shift, weight, bias, groups, eps, scale)
    return out, x if residual is None else total


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x if residual is None else x + residual
    total = total if scale == 1.0 else scale * total
    value = total if shift is None else total + shift[(..., *(None,) * (x.ndim - 2))]
    return F.silu(F.group_norm(value, groups, weight, bias, eps)), total


def cost(shape: tuple[int, ...], itemsize: int = 4, residual: bool = False) -> tuple[Cost, Cost]:
    """Of a forward and of a backward on (B, C, ...); a group larger than a tile counts once."""
    n = math.prod(shape)
    forward, backward = (4, 4) if residual else (2, 3)
    return Cost(forward * n * itemsize, 14 * n), Cost(backward * n * itemsize, 30 * n)


@jit
def _float(v):
    """float32 of what is narrower."""
    if v.dtype == tl.float64:
        return v
    else:
        return v.to(tl.float32)


@jit
def _value(x, residual, place, inside, shift, SCALE: tl.constexpr, RESIDUAL: tl.constexpr):
    """s, and v = s + shift."""
    s = _float(tl.load(x + place, inside, other=0.0))
    if RESIDUAL:
        s = SCALE * (s + _float(tl.load(residual + place, inside, other=0.0)))
    return s, s + shift[:, None].to(s.dtype)


@jit
def _channel(pointer, place, inside, GIVEN: tl.constexpr, DEFAULT: tl.constexpr, CG: tl.constexpr):
    """Values of the group's channels, (CG,)."""
    if GIVEN:
        return _float(tl.load(pointer + place, inside, other=DEFAULT))
    else:
        return tl.full((CG,), DEFAULT, tl.float32)


@jit
def _forward(
    x,
    residual,
    shift,
    weight,
    bias,
    out,
    total,
    mean,
    rstd,
    channels,
    groups,
    pixels,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    CG: tl.constexpr,
    TILE: tl.constexpr,
    ONE: tl.constexpr,
):
    program = tl.program_id(0)
    entry, group = program // groups, program % groups
    each = channels // groups
    own = tl.arange(0, CG)
    known = own < each
    channel = group * each + own
    w = _channel(weight, channel, known, True, 0.0, CG)
    b = _channel(bias, channel, known, True, 0.0, CG)
    t = _channel(shift, entry * channels + channel, known, SHIFT, 0.0, CG)
    start = (entry * channels + group * each).to(tl.int64) * pixels
    rows = own[:, None] * pixels
    columns = tl.arange(0, TILE)[None, :]

    inside = known[:, None] & (columns < pixels)
    s, v = _value(x, residual, start + rows + columns, inside, t, SCALE, RESIDUAL)
    count = (each * tl.minimum(pixels, TILE)).to(v.dtype)
    m = tl.sum(tl.where(inside, v, 0.0)) / count
    d = tl.where(inside, v - m, 0.0)
    square = tl.sum(d * d)
    if not ONE:
        for first in range(TILE, pixels, TILE):
            inside = known[:, None] & (first + columns < pixels)
            s, v = _value(x, residual, start + rows + first + columns, inside, t, SCALE, RESIDUAL)
            more = (each * tl.minimum(pixels - first, TILE)).to(v.dtype)
            tile_mean = tl.sum(tl.where(inside, v, 0.0)) / more
            d = tl.where(inside, v - tile_mean, 0.0)
            apart = tile_mean - m
            square += tl.sum(d * d) + apart * apart * (count * more / (count + more))
            m += apart * (more / (count + more))
            count += more
    r = 1.0 / tl.sqrt(square / count + EPS)
    tl.store(mean + program, m)
    tl.store(rstd + program, r)

    if ONE:
        place = start + rows + columns
        z = w[:, None] * ((v - m) * r) + b[:, None]
        tl.store(out + place, z * tl.sigmoid(z), inside)
        if RESIDUAL:
            tl.store(total + place, s, inside)
    else:
        for first in range(0, pixels, TILE):
            inside = known[:, None] & (first + columns < pixels)
            place = start + rows + first + columns
            s, v = _value(x, residual, place, inside, t, SCALE, RESIDUAL)
            z = w[:, None] * ((v - m) * r) + b[:, None]
            tl.store(out + place, z * tl.sigmoid(z), inside)
            if RESIDUAL:
                tl.store(total + place, s, inside)


@jit
def _slopes(gradient, x, place, inside, t, w, b, m, r):
    """The gradient at z, and n."""
    v = _float(tl.load(x + place, inside, other=0.0)) + t[:, None]
    n = tl.where(inside, (v - m) * r, 0.0)
    z = w[:, None] * n + b[:, None]
    sigmoid = tl.sigmoid(z)
    g = _float(tl.load(gradient + place, inside, other=0.0))
    return g * sigmoid * (1.0 + z * (1.0 - sigmoid)), n


@jit
def _input_gradient(
    dz, n, w, a, c, r, place, inside, passed, out, SCALE: tl.constexpr, PASSED: tl.constexpr
):
    """Writes the gradient of x, and returns that of v summed over pixels."""
    dv = tl.where(inside, r * (w[:, None] * dz - a - n * c), 0.0)
    ds = dv
    if PASSED:
        ds += _float(tl.load(passed + place, inside, other=0.0))
    tl.store(out + place, SCALE * ds, inside)
    return tl.sum(dv, 1)


@jit
def _backward(
    gradient,
    passed,
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    out,
    sums,
    channels,
    groups,
    pixels,
    SCALE: tl.constexpr,
    PASSED: tl.constexpr,
    SHIFT: tl.constexpr,
    CG: tl.constexpr,
    TILE: tl.constexpr,
    ONE: tl.constexpr,
):
    program = tl.program_id(0)
    entry, group = program // groups, program % groups
    each = channels // groups
    own = tl.arange(0, CG)
    known = own < each
    channel = group * each + own
    w = _channel(weight, channel, known, True, 0.0, CG)
    b = _channel(bias, channel, known, True, 0.0, CG)
    t = _channel(shift, entry * channels + channel, known, SHIFT, 0.0, CG)
    m = tl.load(mean + program)
    r = tl.load(rstd + program)
    start = (entry * channels + group * each).to(tl.int64) * pixels
    rows = own[:, None] * pixels
    columns = tl.arange(0, TILE)[None, :]
    size = (each * pixels).to(m.dtype)

    place = start + rows + columns
    inside = known[:, None] & (columns < pixels)
    dz, n = _slopes(gradient, x, place, inside, t, w, b, m, r)
    to_bias = tl.sum(dz, 1)
    to_weight = tl.sum(dz * n, 1)
    if not ONE:
        for first in range(TILE, pixels, TILE):
            inside = known[:, None] & (first + columns < pixels)
            dz, n = _slopes(gradient, x, place + first, inside, t, w, b, m, r)
            to_bias += tl.sum(dz, 1)
            to_weight += tl.sum(dz * n, 1)
    a = tl.sum(w * to_bias) / size
    c = tl.sum(w * to_weight) / size

    if ONE:
        to_shift = _input_gradient(dz, n, w, a, c, r, place, inside, passed, out, SCALE, PASSED)
    else:
        to_shift = tl.zeros((CG,), m.dtype)
        for first in range(0, pixels, TILE):
            inside = known[:, None] & (first + columns < pixels)
            dz, n = _slopes(gradient, x, place + first, inside, t, w, b, m, r)
            to_shift += _input_gradient(
                dz, n, w, a, c, r, place + first, inside, passed, out, SCALE, PASSED
            )
    row = sums + entry * channels + channel
    batch = (tl.num_programs(0) // groups) * channels
    tl.store(row, to_weight, known)
    tl.store(row + batch, to_bias, known)
    tl.store(row + 2 * batch, to_shift, known)


def _tiling(channels: int, groups: int, pixels: int) -> dict[str, int | bool]:
    """Constants of a launch: channels and pixels of a tile as powers of two, and whether one tile is all."""
    wide = power_of_two(channels // groups)
    tile = max(16, min(power_of_two(pixels), _TILE // wide))
    return {"CG": wide, "TILE": tile, "ONE": pixels <= tile}


def _threads(tiling: dict[str, int | bool], bytes_each: int = 4) -> int:
    """Half precision has as many bytes of a thread; with 512 threads, ptxas spills its backward to keep 64 registers."""
    each = _EACH * max(1, 4 // bytes_each)
    return min(512, max(32, tiling["CG"] * tiling["TILE"] // each))


@triton_op("diffpost::group_norm_silu")
def _group_norm_silu(
    x: Tensor,
    residual: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, s or nothing, mean and 1/std of the groups (B, groups))."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not runs_kernel(x):
        total = x if residual is None else scale * (x + residual)
        value = total if shift is None else total + shift[(..., *(None,) * (x.ndim - 2))]
        grouped = value.reshape(len(x), groups, -1)
        grouped = grouped if x.dtype == torch.float64 else grouped.float()
        variance, mean = torch.var_mean(grouped, -1, correction=0)
        out = F.silu(F.group_norm(value, groups, weight, bias, eps)).contiguous()
        kept = x.new_empty(0) if residual is None else total.contiguous()
        return out, kept, mean, torch.rsqrt(variance + eps)
    x = x.contiguous()
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x.new_empty(0)
    mean = x.new_empty(len(x), groups, dtype=precise)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, total, mean, rstd
    channels = x.shape[1]
    pixels = x.numel() // (len(x) * channels)
    tiling = _tiling(channels, groups, pixels)
    wrap_triton(_forward)[(len(x) * groups,)](
        x,
        x if residual is None else residual.contiguous(),
        x if shift is None else shift.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        out,
        total,
        mean,
        rstd,
        channels,
        groups,
        pixels,
        EPS=eps,
        SCALE=scale,
        RESIDUAL=residual is not None,
        SHIFT=shift is not None,
        **tiling,
        num_warps=warps(_threads(tiling, x.element_size())),
    )
    return out, total, mean, rstd


@triton_op("diffpost::group_norm_silu_backward")
def _group_norm_silu_backward(
    gradient: Tensor,
    passed: Tensor | None,
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of weight, bias and shift by image and channel, (3, B, C); x is s."""
    if not runs_kernel(x):
        shape = (*x.shape[:2], -1)
        value = x.reshape(shape) if shift is None else x.reshape(shape) + shift[..., None]
        each = x.shape[1] // groups
        m, r = (s.repeat_interleave(each, 1)[..., None] for s in (mean, rstd))
        n = (value.to(mean.dtype) - m) * r
        z = weight[:, None] * n + bias[:, None]
        sigmoid = z.sigmoid()
        dz = gradient.reshape(shape).to(mean.dtype) * sigmoid * (1 + z * (1 - sigmoid))
        h = weight[:, None] * dz
        a, c = (
            (q.reshape(len(x), groups, -1).mean(-1)).repeat_interleave(each, 1)[..., None]
            for q in (h, h * n)
        )
        dv = r * (h - a - n * c)
        ds = dv if passed is None else dv + passed.reshape(shape)
        sums = torch.stack([(dz * n).sum(-1), dz.sum(-1), dv.sum(-1)])
        return (scale * ds).to(x.dtype).reshape(x.shape).contiguous(), sums
    channels = x.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sums = mean.new_empty(3, len(x), channels)
    if x.numel() == 0:
        return out, sums.zero_()
    pixels = x.numel() // (len(x) * channels)
    x = x.contiguous()
    tiling = _tiling(channels, groups, pixels)
    wrap_triton(_backward)[(len(x) * groups,)](
        gradient.contiguous(),
        x if passed is None else passed.contiguous(),
        x,
        x if shift is None else shift.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        mean,
        rstd,
        out,
        sums,
        channels,
        groups,
        pixels,
        SCALE=scale,
        PASSED=passed is not None,
        SHIFT=shift is not None,
        **tiling,
        num_warps=warps(_threads(tiling, x.element_size())),
    )
    return out, sums


def _setup(ctx, inputs, output):
    x, residual, shift, weight, bias, ctx.groups, _, ctx.scale = inputs
    _, total, mean, rstd = output
    ctx.has_residual = residual is not None
    ctx.save_for_backward(total if ctx.has_residual else x, shift, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, gradient, passed, *_):
    x, shift, weight, bias, mean, rstd = ctx.saved_tensors
    if gradient is None:
        gradient = torch.zeros_like(x)
    scale = ctx.scale if ctx.has_residual else 1.0
    dx, sums = _group_norm_silu_backward(
        gradient,
        passed if ctx.has_residual else None,
        x,
        shift,
        weight,
        bias,
        mean,
        rstd,
        ctx.groups,
        scale,
    )
    return (
        dx,
        dx if ctx.has_residual else None,
        None if shift is None else sums[2].to(shift.dtype),
        sums[0].sum(0).to(weight.dtype),
        sums[1].sum(0).to(bias.dtype),
        None,
        None,
        None,
    )


_group_norm_silu.register_autograd(_gradients, setup_context=_setup)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.ndim < 3 or x.dtype not in _DTYPES:
        raise ValueError(
            f"group_norm_silu: got x of shape {tuple(x.shape)} and {x.dtype}; expected (B, C, ...), floating"
        )
    batch, channels = x.shape[:2]
    if groups < 1 or channels % groups or channels // groups > _TILE // 16:
        raise ValueError(
            f"group_norm_silu: got {groups} groups for {channels} channels; expected a number that divides "
            f"them into groups of at most {_TILE // 16}"
        )
    for name, given, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("shift", shift, (batch, channels)),
        ("residual", residual, tuple(x.shape)),
    ):
        if given is None:
            continue
        wrong = name == "residual" and given.dtype != x.dtype
        if wrong or tuple(given.shape) != shape or given.device != x.device:
            raise ValueError(
                f"group_norm_silu: got {name} of shape {tuple(given.shape)}, {given.dtype} on {given.device}; "
                f"expected {shape} like x, {x.dtype} on {x.device}"
            )
