r"""Random numbers as a function of where they are used, with no generator state.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") scrambles a
counter of four 32-bit words under a key of two: ten rounds of

    c <- (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0)),     k <- k + W.

Here the counter says what the numbers are for, so a draw depends on (seed, id, step, stream) and on
its place in the array, and on nothing else: not on the batch it was computed in, on what was drawn
before, or, but for the last bits of a logarithm or a cosine, on the device.

    key  k0, k1   low and high half of the 64-bit seed
    c0            number of the block of four elements, in the array's C order
    c1            step
    c2            low 32 bits of the id
    c3            bits 0-15: high 16 bits of the id; bits 16-30: stream; bit 31: 0 normal, 1 uniform

A block's four words make four uniforms, or two pairs of normals by Box and Muller (1958).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Noise", "derived_seed", "normal", "philox4x32", "uniform"]

EXACT_STREAM = 24_960  # of exact draws, away from that of samplers, which are compared with them

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_NORMAL, _UNIFORM = 0, 1 << 31
_CHUNK = 1 << 14  # blocks at a time, so that the words stay in the cache of one core


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox4x32 for each counter.

    Args:
        counter: four int64 tensors of values in [0, 2^32), broadcastable against each other.
        key: two numbers in [0, 2^32).
        rounds: 10 is the published choice.

    Returns:
        Four int64 tensors of values in [0, 2^32), of the common shape (from 3 rounds on).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ (c1 ^ k0), low1, high0 ^ (c3 ^ k1), low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of the 64-bit product of 32-bit numbers.

    A product can exceed int64. With m = constant - 2^32, |m| < 2^30 for both constants, x m fits,
    x constant = x m + 2^32 x, and so the high word is floor(x m / 2^32) + x and the low one that of
    x m.
    """
    product = x * (constant - (1 << 32))
    return (product >> 32) + x, product & _MASK


def normal(
    seed: int,
    ids: Tensor,
    step: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    stream: int = 0,
) -> Tensor:
    """Standard normals, (B, *shape); entry b depends on (seed, ids[b], step, stream) alone.

    An array of another shape begins with the same numbers. They are computed in float64 from 32-bit
    words and then rounded to `dtype`; the largest possible is 6.76.

    Args:
        seed: in [0, 2^64).
        ids: (B,) integers in [0, 2^48): which sample each entry is.
        step: in [0, 2^32): when it is drawn.
        shape: of one entry.
        dtype: a floating dtype.
        device: None is that of ids.
        stream: in [0, 2^15): which of several draws in a step.

    Raises:
        ValueError: a number outside its range, or ids not a vector of integers.
    """
    _check_ids(ids)
    if not dtype.is_floating_point:
        raise ValueError(f"normal(dtype={dtype}): expected a floating dtype.")
    return _draw(seed, ids, step, tuple(shape), dtype, device, stream, _NORMAL, _normals)


def uniform(
    seed: int,
    ids: Tensor,
    step: int,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    stream: int = 0,
) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape), independent of the normals of the same arguments.

    Multiples of 2^-32 in float64 and, truncated, of 2^-24 in float32. Arguments and errors as for
    `normal`; other dtypes raise a ValueError, since rounding could give 1.
    """
    _check_ids(ids)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform(dtype={dtype}): expected torch.float32 or torch.float64.")
    return _draw(seed, ids, step, tuple(shape), dtype, device, stream, _UNIFORM, _uniforms)


@final
@dataclass(frozen=True, eq=False)
class Noise:
    """The noise of a batch of samples: `Noise(seed, ids).at(step)(like, stream=0)`.

    Args:
        seed: in [0, 2^64).
        ids: (B,) integers in [0, 2^48), one for each entry of the batch.

    Raises:
        ValueError: a number outside its range.
    """

    seed: int
    ids: Tensor

    def __post_init__(self) -> None:
        _check_ids(self.ids)
        _check_range("seed", self.seed, 64)

    def at(self, step: int) -> Callable[..., Tensor]:
        """The noise of one step: a function `noise(like, stream=0)` of standard normals.

        They have the shape (B, ...), dtype and device of `like`. The function raises a ValueError
        for a `like` of another batch.
        """
        _check_range("step", step, 32)

        def noise(like: Tensor, stream: int = 0) -> Tensor:
            if like.shape[:1] != self.ids.shape:
                raise ValueError(
                    f"got a batch of shape {tuple(like.shape)}; expected {len(self.ids)} entries, "
                    "one for each id"
                )
            shape = tuple(like.shape[1:])
            kind = (_NORMAL, _normals)
            return _draw(self.seed, self.ids, step, shape, like.dtype, like.device, stream, *kind)

        return noise


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed for one purpose, whose numbers have nothing in common with those of `seed`."""
    text = ":".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


_Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _normals(words: _Words, dtype: torch.dtype) -> Tensor:
    """Box-Muller on two pairs of words, (..., 4)."""
    out = torch.empty(*words[0].shape, 4, dtype=dtype, device=words[0].device)
    for pair in (0, 1):
        # (w + 1/2)/2^32 is never 0, whose logarithm is infinite.
        radius = words[2 * pair].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[2 * pair + 1].double().mul_(2 * math.pi * 2.0**-32)
        out[..., 2 * pair] = angle.cos().mul_(radius)
        out[..., 2 * pair + 1] = angle.sin_().mul_(radius)
    return out


def _uniforms(words: _Words, dtype: torch.dtype) -> Tensor:
    """Words as fractions in [0, 1), (..., 4), truncated to what float32 holds exactly."""
    shift = 8 if dtype == torch.float32 else 0
    return (torch.stack(words, -1) >> shift).to(dtype).mul_(2.0 ** (shift - 32))


def _draw(
    seed: int,
    ids: Tensor,
    step: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | str | None,
    stream: int,
    kind: int,
    finish: Callable[[_Words, torch.dtype], Tensor],
) -> Tensor:
    """Numbers for every id and element, (B, *shape), a cacheful of blocks at a time."""
    for name, value, bits in (("seed", seed, 64), ("step", step, 32), ("stream", stream, 15)):
        _check_range(name, value, bits)
    ids = ids.to(device=device, dtype=torch.int64)[:, None]
    numel = math.prod(shape)
    blocks = -(-numel // 4)
    key = (seed & _MASK, seed >> 32)
    c0 = torch.arange(blocks, device=ids.device)[None, :]
    c1 = torch.full((1, 1), step, device=ids.device)
    c2 = ids & _MASK
    c3 = (ids >> 32) | (stream << 16) | kind
    out = torch.empty(len(ids), 4 * blocks, dtype=dtype, device=ids.device)
    chunk = _CHUNK if ids.device.type == "cpu" else _CHUNK << 8
    height = max(1, chunk // max(blocks, 1))
    for i in range(0, len(ids), height):
        rows = slice(i, i + height)
        for j in range(0, blocks, chunk):
            words = philox4x32((c0[:, j : j + chunk], c1, c2[rows], c3[rows]), key)
            out[rows, 4 * j : 4 * (j + chunk)] = finish(words, dtype).flatten(1)
    return out[:, :numel].reshape(len(ids), *shape)


def _check_range(name: str, value: int, bits: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ValueError(f"got {name} = {value!r}; expected an integer in [0, 2^{bits})")


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 1 or ids.dtype.is_floating_point or ids.dtype.is_complex:
        raise ValueError(
            f"got ids of shape {tuple(ids.shape)} and {ids.dtype}; expected (B,) integers"
        )
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 48:
        raise ValueError(
            f"got ids from {int(ids.min())} to {int(ids.max())}; expected integers in [0, 2^48)"
        )
