r"""Images of a pixelated source through a lens whose parameters change, in one pass, and the adjoint.

    y[b, c, p] = factor/R sum_r S[b, c](beta(theta_{p, r}; params_b)),       S bilinear, zero outside its grid

traces R rays a pixel through a singular isothermal ellipsoid with shear (`_sie`), interpolates the source and
averages. Between rays and image nothing is stored: plain torch keeps places, indices and weights of every ray,
about 200 bytes each.

Backward, a program adds each ray's weights times its pixel's gradient to the source, and has the gradient of the
parameters from the derivatives of `_sie`, summed per program and then over programs. Additions to the source meet in
any order. `deterministic` makes them in integers: weights are fixed-point numbers of 62 bits in a unit that no sum
can overflow (the largest gradient times the number of pixels), and the sum of integers has no order. It rounds by
2^-62 of that unit, less than float32 does, and needs no float atomics.
"""

from __future__ import annotations

import math

import torch
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
from diffpost.kernels._sie import PARAMETERS, deflect, deflect_gradient, trace, trace_gradient

__all__ = ["PARAMETERS", "cost", "ray_shoot", "reference", "setting"]

_BLOCK = 512
_BLOCK_BACKWARD = 256  # its masks fill the registers
_THREADS = 128
_CHANNELS = 4  # of a program, at most


def setting(
    centre: tuple[float, float],
    pixel: float,
    factor: float,
    near: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """What `ray_shoot` is told about the grids, (5,).

    Args:
        centre: middle of the source grid, x and y, arcsec.
        pixel: side of its pixels, arcsec.
        factor: area of an image pixel over that of a source pixel.
        near: distance from the lens' centre below which a ray is taken at that distance, arcsec.

    Raises:
        ValueError: a pixel, factor or distance that is not positive.
    """
    if not min(pixel, factor, near) > 0:
        raise ValueError(
            f"got pixel = {pixel}, factor = {factor} and near = {near}; expected positive numbers"
        )
    return torch.tensor([*centre, pixel, factor, near], dtype=dtype, device=device)


def ray_shoot(
    source: Tensor,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    setting: Tensor,
    deterministic: bool = True,
) -> Tensor:
    """Lensed images, differentiable once in source and parameters.

    Args:
        source: (B, C, h, w), flux per pixel.
        params: (B, 7), x0, y0, q, phi, Rein, gamma_1, gamma_2 of each entry, with 0 < q <= 1.
        x, y: (R, n), arcsec: R rays for each of n pixels.
        setting: (5,) from `setting`.
        deterministic: the gradient of the source has the same bits every time.

    Returns:
        (B, C, n). A deflection without a value gives NaN.

    Raises:
        ValueError: other shapes or dtypes, or rays or a setting that require a gradient.
    """
    _check(source, params, x, y, setting)
    out: Tensor = _ray_shoot(source, params, x, y, setting, deterministic)
    return out


def reference(source: Tensor, params: Tensor, x: Tensor, y: Tensor, setting: Tensor) -> Tensor:
    """The same in plain torch."""
    from diffpost.physics.interpolation import sample

    u, v = _places(source, params, x, y, setting)
    bright = sample(source, u[:, None], v[:, None], "bilinear")
    return setting[3] * bright.unflatten(-1, x.shape).mean(-2)


def cost(
    batch: int,
    channels: int,
    source: int,
    pixels: int,
    rays: int,
    deterministic: bool = True,
    itemsize: int = 4,
) -> tuple[Cost, Cost]:
    """Of a forward and of a backward; source and pixels are numbers of pixels, rays those of a pixel.

    A source stays in the cache, and is read from memory once; sums of integers are written and read again, and
    torch finds their unit in 14 small launches.
    """
    places, images = 2 * rays * pixels, batch * channels * pixels
    traced = batch * rays * pixels
    forward = Cost(
        (places + images + batch * channels * source) * itemsize, traced * (90 + 12 * channels)
    )
    moved = (places + images + 2 * batch * channels * source) * itemsize
    integers = 3 * 8 * batch * channels * source if deterministic else 0
    launches = 18 if deterministic else 4
    return forward, Cost(moved + integers, traced * (190 + 25 * channels), launches)


@jit
def _taps(place, size):
    """The lower of two pixels, the share of the upper one, and which of them are on the grid."""
    seen = (place > -1.0) & (place < size)
    kept = tl.where(seen, place, 0.0)
    low = tl.floor(kept)
    first = low.to(tl.int32)
    return first, kept - low, seen & (first >= 0), seen & (first + 1 < size)


@jit
def _forward(
    source,
    params,
    rays_x,
    rays_y,
    setting,
    out,
    channels,
    height,
    width,
    n,
    rays,
    tiles,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(n, BLOCK)
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    entry, tile = rest // tiles, rest % tiles
    channel = tile * CP + tl.arange(0, CP)[:, None]
    known = channel < channels
    first = (entry * channels + channel).to(tl.int64)
    plane = source + first * (height * width)
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n
    side = tl.load(setting + 2)
    near = tl.load(setting + 4)
    left = (width - 1) * 0.5 - tl.load(setting) / side
    bottom = (height - 1) * 0.5 - tl.load(setting + 1) / side
    total = tl.zeros((CP, BLOCK), source.dtype.element_ty)
    for ray in range(rays):
        x = tl.load(rays_x + ray * n + pixel, inside, other=1.0)
        y = tl.load(rays_y + ray * n + pixel, inside, other=1.0)
        bx, by = trace(x, y, params + entry * 7, near)
        u, v = bx / side + left, by / side + bottom
        i, s, left_in, right_in = _taps(u, width)
        j, t, low_in, high_in = _taps(v, height)
        corner = plane + (j * width + i)[None, :]
        known_here = known & inside[None, :]
        aa = tl.load(corner, known_here & (low_in & left_in)[None, :], other=0.0)
        ab = tl.load(corner + 1, known_here & (low_in & right_in)[None, :], other=0.0)
        ba = tl.load(corner + width, known_here & (high_in & left_in)[None, :], other=0.0)
        bb = tl.load(corner + width + 1, known_here & (high_in & right_in)[None, :], other=0.0)
        s, t = s[None, :], t[None, :]
        total += (1.0 - t) * ((1.0 - s) * aa + s * ab) + t * ((1.0 - s) * ba + s * bb)
        total += ((u - u) + (v - v))[None, :]  # NaN where there is no deflection
    total *= tl.load(setting + 3) / rays
    tl.store(out + first * n + pixel[None, :], total, known & inside[None, :])


@jit
def _add(pointer, value, mask, unit, FIXED: tl.constexpr):
    if FIXED:
        whole = ((value * unit) * 4611686018427387904.0).to(tl.int64)
        tl.atomic_add(pointer, whole, mask, sem="relaxed")
    else:
        tl.atomic_add(pointer, value, mask, sem="relaxed")


@jit
def _backward(
    gradient,
    source,
    params,
    rays_x,
    rays_y,
    setting,
    units,
    to_source,
    to_params,
    channels,
    height,
    width,
    n,
    rays,
    tiles,
    SOURCE: tl.constexpr,
    PARAMS: tl.constexpr,
    FIXED: tl.constexpr,
    CP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(n, BLOCK)
    chunk, rest = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    entry, tile = rest // tiles, rest % tiles
    channel = tile * CP + tl.arange(0, CP)[:, None]
    known = channel < channels
    first = (entry * channels + channel).to(tl.int64)
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < n
    side = tl.load(setting + 2)
    near = tl.load(setting + 4)
    left = (width - 1) * 0.5 - tl.load(setting) / side
    bottom = (height - 1) * 0.5 - tl.load(setting + 1) / side
    known_here = known & inside[None, :]
    g = tl.load(gradient + first * n + pixel[None, :], known_here, other=0.0)
    g *= tl.load(setting + 3) / rays
    unit = tl.load(units + entry)
    g0 = tl.zeros((BLOCK,), g.dtype)
    g1, g2, g3, g4, g5, g6 = g0, g0, g0, g0, g0, g0
    for ray in range(rays):
        x = tl.load(rays_x + ray * n + pixel, inside, other=1.0)
        y = tl.load(rays_y + ray * n + pixel, inside, other=1.0)
        bx, by = trace(x, y, params + entry * 7, near)
        u, v = bx / side + left, by / side + bottom
        i, s, left_in, right_in = _taps(u, width)
        j, t, low_in, high_in = _taps(v, height)
        corner = first * (height * width) + (j * width + i)[None, :]
        at_aa = known_here & (low_in & left_in)[None, :]
        at_ab = known_here & (low_in & right_in)[None, :]
        at_ba = known_here & (high_in & left_in)[None, :]
        at_bb = known_here & (high_in & right_in)[None, :]
        s, t = s[None, :], t[None, :]
        if SOURCE:
            _add(to_source + corner, g * (1.0 - t) * (1.0 - s), at_aa, unit, FIXED)
            _add(to_source + corner + 1, g * (1.0 - t) * s, at_ab, unit, FIXED)
            _add(to_source + corner + width, g * t * (1.0 - s), at_ba, unit, FIXED)
            _add(to_source + corner + width + 1, g * t * s, at_bb, unit, FIXED)
        if PARAMS:
            aa = tl.load(source + corner, at_aa, other=0.0)
            ab = tl.load(source + corner + 1, at_ab, other=0.0)
            ba = tl.load(source + corner + width, at_ba, other=0.0)
            bb = tl.load(source + corner + width + 1, at_bb, other=0.0)
            gu = tl.sum(g * ((1.0 - t) * (ab - aa) + t * (bb - ba)), 0) / side
            gv = tl.sum(g * ((1.0 - s) * (ba - aa) + s * (bb - ab)), 0) / side
            d0, d1, d2, d3, d4, d5, d6 = trace_gradient(x, y, params + entry * 7, near, gu, gv)
            g0 += d0
            g1 += d1
            g2 += d2
            g3 += d3
            g4 += d4
            g5 += d5
            g6 += d6
    if PARAMS:
        row = to_params + tl.program_id(0).to(tl.int64) * 8
        tl.store(row, tl.sum(tl.where(inside, g0, 0.0)))
        tl.store(row + 1, tl.sum(tl.where(inside, g1, 0.0)))
        tl.store(row + 2, tl.sum(tl.where(inside, g2, 0.0)))
        tl.store(row + 3, tl.sum(tl.where(inside, g3, 0.0)))
        tl.store(row + 4, tl.sum(tl.where(inside, g4, 0.0)))
        tl.store(row + 5, tl.sum(tl.where(inside, g5, 0.0)))
        tl.store(row + 6, tl.sum(tl.where(inside, g6, 0.0)))


@triton_op("diffpost::ray_shoot")
def _ray_shoot(
    source: Tensor, params: Tensor, x: Tensor, y: Tensor, setting: Tensor, deterministic: bool
) -> Tensor:
    if not runs_kernel(source):
        return reference(source, params, x, y, setting).contiguous()
    source = source.contiguous()
    batch, channels, height, width = source.shape
    rays, n = x.shape
    out = source.new_empty(batch, channels, n)
    if out.numel() == 0:
        return out
    cp = min(_CHANNELS, power_of_two(channels))
    tiles = blocks(channels, cp)
    wrap_triton(_forward)[(batch * tiles * blocks(n, _BLOCK),)](
        source,
        params.contiguous(),
        x.contiguous(),
        y.contiguous(),
        setting.contiguous(),
        out,
        channels,
        height,
        width,
        n,
        rays,
        tiles,
        CP=cp,
        BLOCK=_BLOCK,
        num_warps=warps(_THREADS),
    )
    return out


@triton_op("diffpost::ray_shoot_backward")
def _ray_shoot_backward(
    gradient: Tensor,
    source: Tensor,
    params: Tensor,
    x: Tensor,
    y: Tensor,
    setting: Tensor,
    deterministic: bool,
    to_source: bool,
    to_params: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of source and parameters; zeros for what is not asked for."""
    if not runs_kernel(source):
        return _plain_backward(gradient, source, params, x, y, setting)
    batch, channels, height, width = source.shape
    rays, n = x.shape
    cp = min(_CHANNELS, power_of_two(channels))
    tiles, chunks = blocks(channels, cp), blocks(n, _BLOCK_BACKWARD)
    kind = torch.int64 if deterministic else source.dtype
    sums = source.new_zeros(batch, channels, height, width, dtype=kind)
    parts = source.new_zeros(batch, tiles * chunks, 8)
    units = exponent = setting
    if deterministic:
        # no sum of weights of at most 1 can be larger than this; powers of two round nothing
        largest = torch.linalg.vector_norm(gradient, math.inf, (1, 2))
        exponent = (largest.double() * (setting[3] * n)).log2().ceil()
        units = (-exponent).clamp(-126, 126).exp2().to(source.dtype)
    if gradient.numel() > 0:
        wrap_triton(_backward)[(batch * tiles * chunks,)](
            gradient.contiguous(),
            source.contiguous(),
            params.contiguous(),
            x.contiguous(),
            y.contiguous(),
            setting.contiguous(),
            units,
            sums,
            parts,
            channels,
            height,
            width,
            n,
            rays,
            tiles,
            SOURCE=to_source,
            PARAMS=to_params,
            FIXED=deterministic,
            CP=cp,
            BLOCK=_BLOCK_BACKWARD,
            num_warps=warps(_THREADS),
        )
    if deterministic:
        scale = (exponent - 62).exp2()[:, None, None, None]
        sums = (sums * scale).to(source.dtype)
    return sums, parts[..., :7].sum(1)


def _plain_backward(
    gradient: Tensor, source: Tensor, params: Tensor, x: Tensor, y: Tensor, setting: Tensor
) -> tuple[Tensor, Tensor]:
    from diffpost.physics.interpolation import taps

    height, width = source.shape[-2:]
    g = setting[3] / len(x) * gradient[:, :, None].expand(-1, -1, len(x), -1).flatten(2)
    u, v = _places(source, params, x, y, setting)
    (i, wx), (j, wy) = taps(u, width, "bilinear"), taps(v, height, "bilinear")
    padded = torch.nn.functional.pad(source, (1, 1, 1, 1)).flatten(2)
    sums = torch.zeros_like(padded)
    gu, gv = torch.zeros_like(u), torch.zeros_like(u)
    for row in (0, 1):
        for column in (0, 1):
            place = ((j[row] + 1) * (width + 2) + i[column] + 1)[:, None].expand_as(g)
            sums = sums.scatter_add(2, place, g * (wy[row] * wx[column])[:, None])
            bright = (g * padded.gather(2, place)).sum(1)
            gu = gu + (2 * column - 1) * wy[row] * bright
            gv = gv + (2 * row - 1) * wx[column] * bright
    to_source = sums.unflatten(2, (height + 2, width + 2))[..., 1:-1, 1:-1].contiguous()
    side = setting[2]
    flat = (x.flatten(), y.flatten(), params, setting[4])
    return to_source, deflect_gradient(*flat, gu / side, gv / side)


def _places(
    source: Tensor, params: Tensor, x: Tensor, y: Tensor, setting: Tensor
) -> tuple[Tensor, Tensor]:
    """Column and row of every ray, (B, R n)."""
    bx, by = deflect(x.flatten(), y.flatten(), params, setting[4])
    height, width = source.shape[-2:]
    left, bottom, side = setting[0], setting[1], setting[2]
    return (bx - left) / side + (width - 1) / 2, (by - bottom) / side + (height - 1) / 2


def _setup(ctx, inputs, output):
    if any(ctx.needs_input_grad[2:5]):
        raise ValueError("ray_shoot: got rays or a setting that require a gradient; detach them")
    *tensors, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, gradient):
    wanted = ctx.needs_input_grad[:2]
    found = _ray_shoot_backward(gradient, *ctx.saved_tensors, ctx.deterministic, *wanted)
    source, params = (g if want else None for g, want in zip(found, wanted, strict=True))
    return source, params, None, None, None, None


_ray_shoot.register_autograd(_gradients, setup_context=_setup)


def _check(source: Tensor, params: Tensor, x: Tensor, y: Tensor, setting: Tensor) -> None:
    if source.ndim != 4 or source.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"ray_shoot: got a source of shape {tuple(source.shape)} and {source.dtype}; expected (B, C, h, w), "
            "float32 or float64"
        )
    if x.ndim != 2 or math.prod(x.shape) == 0:
        raise ValueError(f"ray_shoot: got x of shape {tuple(x.shape)}; expected (R, n), not empty")
    for name, given, shape in (
        ("params", params, (len(source), len(PARAMETERS))),
        ("x", x, tuple(x.shape)),
        ("y", y, tuple(x.shape)),
        ("setting", setting, (5,)),
    ):
        if tuple(given.shape) != shape or given.dtype != source.dtype:
            raise ValueError(
                f"ray_shoot: got {name} of shape {tuple(given.shape)} and {given.dtype}; expected {shape} and "
                f"{source.dtype}"
            )
