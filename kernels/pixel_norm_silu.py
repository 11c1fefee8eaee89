r"""Layer normalisation over the channels of each pixel, FiLM and SiLU in one pass.

    n = (x - m) r,     z = (1 + gain[b, c]) (weight[c] n + bias[c]) + shift[b, c],     out = silu(z)

with mean m and 1/std r over the channels of a pixel (Ba et al. 2016, arXiv:1607.06450; FiLM: Perez et al. 2018,
arXiv:1709.07871) stands before each convolution of diffpost's own U-Net, whose features are channels-last: the
channels of a pixel are neighbours in memory. A program has a number of whole pixels in registers, so that each is
read and written once, and the backward recomputes m and r instead of keeping them.

With h = g silu'(z) (1 + gain) weight, dx = r (h - <h> - n <h n>) over the channels. Sums over pixels are written
per program and added afterwards: nothing is atomic, and the same input gives the same bits.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffpost.kernels._model import Cost
from diffpost.kernels._runtime import (
    blocks,
    jit,
    power_of_two,
    runs_kernel,
    tl,
    triton_op,
    warps,
    wrap_triton,
)

__all__ = ["cost", "pixel_norm_silu", "reference"]

_TILE = 4096  # elements of a program
_MOST = 2048  # channels
_EACH = 16  # elements of a thread
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def pixel_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """silu((1 + gain) layer_norm(x) + shift), differentiable once in all tensors.

    Args:
        x: (B, C, H, W); best in torch.channels_last, or else it is copied to it.
        weight, bias: (C,).
        gain, shift: (B, C), both or neither.
        eps: added to the variance.

    Returns:
        As x, channels-last.

    Raises:
        ValueError: other shapes or dtypes, one of gain and shift, or more than 2,048 channels.
    """
    _check(x, weight, bias, gain, shift)
    film = None if gain is None or shift is None else torch.stack([gain, shift], 1)
    out: Tensor = _pixel_norm_silu(x.permute(0, 2, 3, 1).contiguous(), weight, bias, film, eps)
    return out.permute(0, 3, 1, 2)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """The same in plain torch."""
    film = None if gain is None or shift is None else torch.stack([gain, shift], 1)
    return _plain(x.permute(0, 2, 3, 1), weight, bias, film, eps).permute(0, 3, 1, 2)


def cost(shape: tuple[int, ...], itemsize: int = 4) -> tuple[Cost, Cost]:
    """Of a forward with FiLM and of a backward on (B, C, H, W); one small launch joins gain and shift, one the sums."""
    n = math.prod(shape)
    return Cost(2 * n * itemsize, 16 * n, 2), Cost(3 * n * itemsize, 34 * n, 2)


@jit
def _float(v):
    """float32 of what is narrower."""
    if v.dtype == tl.float64:
        return v
    else:
        return v.to(tl.float32)


@jit
def _normal(x, place, inside, channels, EPS: tl.constexpr):
    """n and 1/std of whole pixels."""
    v = _float(tl.load(x + place, inside, other=0.0))
    count = channels.to(v.dtype)
    m = tl.sum(v, 1) / count
    d = tl.where(inside, v - m[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, 1) / count + EPS)
    return d * r[:, None], r


@jit
def _affine(weight, bias, film, entry, channel, known, channels, FILM: tl.constexpr):
    """z = slope n + level by channel, and what of it is gain."""
    w = _float(tl.load(weight + channel, known, other=0.0))
    b = _float(tl.load(bias + channel, known, other=0.0))
    if FILM:
        row = film + entry * 2 * channels + channel
        gain = 1.0 + _float(tl.load(row, known, other=0.0))
        shift = _float(tl.load(row + channels, known, other=0.0))
        return w * gain, b * gain + shift
    else:
        return w, b


@jit
def _forward(
    x,
    weight,
    bias,
    film,
    out,
    channels,
    pixels,
    EPS: tl.constexpr,
    FILM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunks = tl.cdiv(pixels, ROWS)
    entry, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    channel = tl.arange(0, WIDE)
    known = channel < channels
    slope, level = _affine(weight, bias, film, entry, channel, known, channels, FILM)
    pixel = chunk * ROWS + tl.arange(0, ROWS)
    start = entry.to(tl.int64) * pixels * channels
    place = start + pixel[:, None] * channels + channel[None, :]
    inside = (pixel < pixels)[:, None] & known[None, :]
    n, _ = _normal(x, place, inside, channels, EPS)
    z = slope[None, :] * n + level[None, :]
    tl.store(out + place, z * tl.sigmoid(z), inside)


@jit
def _backward(
    gradient,
    x,
    weight,
    bias,
    film,
    out,
    sums,
    channels,
    pixels,
    EPS: tl.constexpr,
    FILM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunks = tl.cdiv(pixels, ROWS)
    entry, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    channel = tl.arange(0, WIDE)
    known = channel < channels
    slope, level = _affine(weight, bias, film, entry, channel, known, channels, FILM)
    pixel = chunk * ROWS + tl.arange(0, ROWS)
    start = entry.to(tl.int64) * pixels * channels
    place = start + pixel[:, None] * channels + channel[None, :]
    inside = (pixel < pixels)[:, None] & known[None, :]
    n, r = _normal(x, place, inside, channels, EPS)
    z = slope[None, :] * n + level[None, :]
    sigmoid = tl.sigmoid(z)
    g = _float(tl.load(gradient + place, inside, other=0.0))
    dz = g * sigmoid * (1.0 + z * (1.0 - sigmoid))
    h = slope[None, :] * dz
    count = channels.to(h.dtype)
    a = tl.sum(h, 1) / count
    c = tl.sum(h * n, 1) / count
    tl.store(out + place, r[:, None] * (h - a[:, None] - n * c[:, None]), inside)
    row = sums + tl.program_id(0).to(tl.int64) * 2 * channels + channel
    tl.store(row, tl.sum(dz * n, 0), known)
    tl.store(row + channels, tl.sum(dz, 0), known)


def _tiling(channels: int, pixels: int) -> dict[str, int]:
    """Constants of a launch: pixels and channels of a program as powers of two."""
    wide = power_of_two(channels)
    rows = max(1, min(power_of_two(pixels), _TILE // wide))
    return {"ROWS": rows, "WIDE": wide}


def _threads(tiling: dict[str, int]) -> int:
    return min(256, max(32, tiling["ROWS"] * tiling["WIDE"] // _EACH))


@triton_op("diffpost::pixel_norm_silu")
def _pixel_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, eps: float
) -> Tensor:
    """On (B, H, W, C); film (B, 2, C) is gain and shift."""
    if not runs_kernel(x):
        return _plain(x, weight, bias, film, eps).contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    channels, pixels = x.shape[3], x.shape[1] * x.shape[2]
    tiling = _tiling(channels, pixels)
    wrap_triton(_forward)[(len(x) * blocks(pixels, tiling["ROWS"]),)](
        x,
        weight.contiguous(),
        bias.contiguous(),
        x if film is None else film,
        out,
        channels,
        pixels,
        EPS=eps,
        FILM=film is not None,
        **tiling,
        num_warps=warps(_threads(tiling)),
    )
    return out


@triton_op("diffpost::pixel_norm_silu_backward")
def _pixel_norm_silu_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums over pixels of dz n and dz, (B, 2, C)."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not runs_kernel(x):
        value = x.to(precise)
        variance, mean = torch.var_mean(value, -1, correction=0, keepdim=True)
        r = torch.rsqrt(variance + eps)
        n = (value - mean) * r
        gain, shift = (1.0, 0.0) if film is None else (1 + film[:, :1], film[:, 1:])
        slope, level = (
            torch.as_tensor(v)[..., None, :] for v in (weight * gain, bias * gain + shift)
        )
        z = slope * n + level
        sigmoid = z.sigmoid()
        dz = gradient.to(precise) * sigmoid * (1 + z * (1 - sigmoid))
        h = slope * dz
        out = r * (h - h.mean(-1, keepdim=True) - n * (h * n).mean(-1, keepdim=True))
        return out.to(x.dtype).contiguous(), torch.stack([dz * n, dz], 1).sum((2, 3))
    out = torch.empty_like(x)
    channels, pixels = x.shape[3], x.shape[1] * x.shape[2]
    if x.numel() == 0:
        return out, x.new_zeros(len(x), 2, channels, dtype=precise)
    tiling = _tiling(channels, pixels)
    chunks = blocks(pixels, tiling["ROWS"])
    sums = x.new_empty(len(x), chunks, 2, channels, dtype=precise)
    wrap_triton(_backward)[(len(x) * chunks,)](
        gradient.contiguous(),
        x,
        weight.contiguous(),
        bias.contiguous(),
        x if film is None else film,
        out,
        sums,
        channels,
        pixels,
        EPS=eps,
        FILM=film is not None,
        **tiling,
        num_warps=warps(_threads(tiling)),
    )
    return out, sums.sum(1)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, eps: float) -> Tensor:
    z = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if film is not None:
        z = torch.addcmul(film[:, None, None, 1], z, 1 + film[:, None, None, 0])
    return F.silu(z)


def _setup(ctx, inputs, output):
    x, weight, bias, film, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, film)


def _gradients(ctx, gradient):
    x, weight, bias, film = ctx.saved_tensors
    dx, sums = _pixel_norm_silu_backward(gradient, x, weight, bias, film, ctx.eps)
    to_slope, to_level = sums.unbind(1)  # (B, C): z = slope n + level
    gain = 1.0 if film is None else 1 + film[:, 0].to(sums.dtype)
    to_weight, to_bias = (gain * to_slope).sum(0), (gain * to_level).sum(0)
    to_film = None
    if film is not None:
        to_gain = weight * to_slope + bias * to_level
        to_film = torch.stack([to_gain, to_level], 1).to(film.dtype)
    return dx, to_weight.to(weight.dtype), to_bias.to(bias.dtype), to_film, None


_pixel_norm_silu.register_autograd(_gradients, setup_context=_setup)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, gain: Tensor | None, shift: Tensor | None
) -> None:
    if x.ndim != 4 or x.dtype not in _DTYPES or not 1 <= x.shape[1] <= _MOST:
        raise ValueError(
            f"pixel_norm_silu: got x of shape {tuple(x.shape)} and {x.dtype}; expected (B, C, H, W), floating, "
            f"of at most {_MOST} channels"
        )
    if (gain is None) != (shift is None):
        raise ValueError("pixel_norm_silu: got one of gain and shift; give both or neither")
    batch, channels = x.shape[:2]
    for name, given, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("gain", gain, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if given is not None and (tuple(given.shape) != shape or given.device != x.device):
            raise ValueError(
                f"pixel_norm_silu: got {name} of shape {tuple(given.shape)} on {given.device}; expected "
                f"{shape} on {x.device}"
            )
