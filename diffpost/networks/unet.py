r"""A compact U-Net for images of any size.

The score network dominates the cost of a posterior sample, so this one spends its operations where
they matter on galaxy images: a space-to-depth stem halves the resolution before the first
convolution, and most of the parameters work at a quarter and an eighth of the frame.

Nothing in it depends on the size of the image: every layer is a convolution or acts on one pixel,
the normalisation runs over the channels of a pixel (Ba et al. 2016, arXiv:1607.06450; as in ConvNeXt)
rather than over the frame, and there is no attention.  The value of an output pixel therefore
depends on its receptive field only, and a network trained on 64-pixel crops runs, without seams, on
an image of any size divisible by `stride`.

The noise level enters every residual block as a scale and a shift of the normalised features
(FiLM, Perez et al. 2018, arXiv:1709.07871).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["UNet"]


class _NoiseEmbedding(nn.Module):
    """Sine features of the noise label c_noise, then two dense layers: (B,) -> (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int, features: int = 64) -> None:
        super().__init__()
        # c_noise = log(sigma) / 4 spans about [-2, 1]: wavelengths from 12 down to 0.2.
        frequencies = torch.logspace(math.log10(0.5), math.log10(32.0), features // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.dense = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, c_noise: Tensor) -> Tensor:
        phase = c_noise[:, None] * self.frequencies
        return F.silu(self.dense(torch.cat([phase.cos(), phase.sin()], dim=1)))


class _PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, with optional FiLM."""

    def __init__(self, channels: int, embedding: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = None if embedding is None else nn.Linear(embedding, 2 * channels)
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        # (B, C, H, W) -> channels last, which is a view when x is stored that way.
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[-1:], self.weight, self.bias, eps=1e-5)
        if self.film is not None and emb is not None:
            scale, shift = self.film(emb)[:, None, None, :].chunk(2, dim=-1)
            x = torch.addcmul(shift, x, 1.0 + scale)
        return x.permute(0, 3, 1, 2)


class _ResBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(FiLM-norm(x))))))."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm1 = _PixelNorm(channels, embedding)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = _PixelNorm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor, *, mixed: bool = False) -> Tensor:
        h = F.silu(self.norm1(x, emb))
        with _autocast(x, mixed):
            h = self.conv1(h)
            h = self.conv2(F.silu(self.norm2(h)))
        return x + h


@final
class UNet(nn.Module):
    """Fully convolutional U-Net: `net(x, c_noise)` with x (B, C, H, W) and c_noise (B,).

    H and W must be divisible by `stride = patch * 2**(len(widths) - 1)`.

    Parameters
    ----------
    channels: channels of the image, in and out.
    patch: side of the blocks that the stem folds into channels (1 keeps full resolution).
    widths: feature channels at each level, finest first.
    blocks: residual blocks at each level, on the way down and again on the way up.
    embedding: width of the noise embedding.

    Raises
    ------
    ValueError: at construction for inconsistent sizes, at call for an image whose sides are not
        divisible by `stride` or whose number of channels differs.
    """

    def __init__(
        self,
        channels: int = 1,
        patch: int = 2,
        widths: Sequence[int] = (64, 128, 192),
        blocks: Sequence[int] = (1, 1, 2),
        embedding: int = 96,
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks) or not widths:
            raise ValueError(
                f"got {len(widths)} widths and {len(blocks)} block counts; give one block count a level"
            )
        if min(*widths, *blocks, channels, patch, embedding) < 1:
            raise ValueError("channels, patch, widths, blocks and embedding must all be at least 1")
        self.config: dict[str, Any] = {
            "kind": "unet",
            "channels": channels,
            "patch": patch,
            "widths": list(widths),
            "blocks": list(blocks),
            "embedding": embedding,
        }
        self.channels = channels
        self.patch = patch
        self.stride = patch * 2 ** (len(widths) - 1)

        folded = channels * patch**2
        self.embed = _NoiseEmbedding(embedding)
        self.stem = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        self.shrink = nn.ModuleList()
        self.up = nn.ModuleList()
        self.grow = nn.ModuleList()
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            self.down.append(nn.ModuleList(_ResBlock(width, embedding) for _ in range(count)))
            self.up.append(nn.ModuleList(_ResBlock(width, embedding) for _ in range(count)))
            if level + 1 < len(widths):
                self.shrink.append(nn.Conv2d(4 * width, widths[level + 1], 1))
                self.grow.append(nn.Conv2d(widths[level + 1], 4 * width, 1))
        self.merge = nn.ModuleList(nn.Conv2d(2 * width, width, 1) for width in widths[:-1])
        self.norm = _PixelNorm(widths[0])
        self.head = nn.Conv2d(widths[0], folded, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def receptive_field(self) -> int:
        """Side in pixels of a square that holds all that an output pixel can see."""
        sides = [self.patch * 2**level for level in range(len(self.config["widths"]))]
        # a convolution of 3 sees one block of its level farther; there are two to a residual block, which go down and up
        seen = sum(4 * n * side for n, side in zip(self.config["blocks"], sides, strict=True))
        return 2 * (seen + 2 * sides[0] + sides[-1] - 1) + 1

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"got an input of shape {tuple(x.shape)}; expected (B, {self.channels}, H, W)"
            )
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(
                f"got an image of {x.shape[2]} x {x.shape[3]} pixels; both sides must be divisible "
                f"by {self.stride}: pad or crop it"
            )
        mixed = torch.is_autocast_enabled(x.device.type)
        with _autocast(x, False):
            return self._forward(x, c_noise, mixed)

    def _forward(self, x: Tensor, c_noise: Tensor, mixed: bool) -> Tensor:
        # Under autocast only the residual branches, which hold nearly all operations, run in half precision.
        # Noise of a thousandth of the image is below the rounding of bfloat16: stem, skips and head keep it.
        emb = self.embed(c_noise.to(x.dtype))
        h = F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x
        h = self.stem(h.contiguous(memory_format=torch.channels_last))
        skips: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            for block in blocks:
                h = block(h, emb, mixed=mixed)
            if level < len(self.shrink):
                skips.append(h)
                h = self.shrink[level](_fold(h))
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = _unfold(self.grow[level](h))
                h = self.merge[level](torch.cat([h, skips[level]], dim=1))
            for block in self.up[level]:
                h = block(h, emb, mixed=mixed)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h


def _autocast(x: Tensor, enabled: bool) -> torch.autocast:
    kind = x.device.type
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), enabled=enabled)


def _fold(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2), kept channels-last: no pass through memory-format copies."""
    b, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1).reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(b, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


def _unfold(x: Tensor) -> Tensor:
    """Inverse of `_fold`: (B, 4C, H, W) -> (B, C, 2H, 2W)."""
    b, c, h, w = x.shape
    y = x.permute(0, 2, 3, 1).reshape(b, h, w, 2, 2, c // 4).permute(0, 1, 3, 2, 4, 5)
    return y.reshape(b, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)
