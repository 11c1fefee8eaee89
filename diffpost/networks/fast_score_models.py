r"""score_models' NCSNpp and DDPM, evaluated faster: the same function, to rounding.

A twin is made from a network's own modules and weights, which are copied and never trained. What differs:

* FIR resampling is one depthwise convolution, for upsampling one to four phases that a pixel shuffle interleaves;
  upfirdn2d inserts zeros, convolves each channel as an image of its own, and throws away what it does not need;
* every feature map is stored channels-last, which is how convolutions read it, 1 x 1 ones too;
* the skip's division by sqrt(2) is folded into the weights; the time embedding is activated once, and all of
  its dense layers are one product;
* attention over pixels is `scaled_dot_product_attention`; dropout, and a variance that nobody reads, are gone.

Anything that is not recognised, an option of a later version or another number of dimensions, is refused rather than
guessed at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["FastDDPM", "FastNCSNpp", "fast_twin"]

_HALF = math.sqrt(0.5)


def fast_twin(net: nn.Module) -> nn.Module:
    """A faster twin of a network of score_models 0.5, called likewise, net(t, x).

    Raises:
        ValueError: a network that is not an unconditional, two-dimensional NCSNpp or DDPM.
    """
    kind = type(net).__name__
    ours = type(net).__module__.split(".")[0] == "score_models"
    if not ours or kind not in ("NCSNpp", "DDPM"):
        raise ValueError(f"got a {kind}; expected an NCSNpp or a DDPM of score_models")
    if net.dimensions != 2 or net.conditioned:
        raise ValueError(
            f"got a {kind} of {net.dimensions} dimensions{' with conditions' if net.conditioned else ''}; expected an "
            "unconditional one of 2 dimensions"
        )
    twin: nn.Module = FastNCSNpp(net) if kind == "NCSNpp" else FastDDPM(net)
    twin.eval().requires_grad_(False)
    return twin.to(memory_format=torch.channels_last)


# Layers ---------------------------------------------------------------------------------------


def _plain(conv: Any, scale: float = 1.0) -> nn.Module:
    """A copy of the convolution inside a Conv2dSame, its output scaled; with a stride, the padding layer itself."""
    if conv.stride != 1:
        return copy.deepcopy(conv)
    plain = copy.deepcopy(conv.conv)
    with torch.no_grad():
        plain.weight.mul_(scale)
        if plain.bias is not None:
            plain.bias.mul_(scale)
    return plain


@final
class _Resample(nn.Module):
    """FIR up- or downsampling by 2 of upfirdn2d, with zeros outside, as one depthwise convolution."""

    taps: Tensor

    def __init__(self, kernel: Any, up: bool) -> None:
        super().__init__()
        line = torch.as_tensor(kernel, dtype=torch.float64)
        full = torch.outer(line, line) if line.ndim == 1 else line
        full = full / full.sum() * (4 if up else 1)
        full = full.flip(0, 1)  # upfirdn2d convolves, conv2d correlates
        size = len(full)
        extra = size - 2
        self.up = up
        if up:
            # Output 2 i + a sums taps k at zero-inserted positions 2 i + a + k - before, of which the even
            # ones hold input; phase a is a correlation of its own with the input.
            before = (extra + 1) // 2 + 1
            reach = range(-((before + 1) // 2), (size - before + 2) // 2 + 1)
            phases = torch.zeros(2, 2, len(reach), len(reach), dtype=torch.float64)
            for a in range(2):
                for b in range(2):
                    for i, row in enumerate(reach):
                        for j, column in enumerate(reach):
                            k, m = 2 * row - a + before, 2 * column - b + before
                            if 0 <= k < size and 0 <= m < size:
                                phases[a, b, i, j] = full[k, m]
            used = phases.abs().sum((0, 1))
            rows = used.sum(1).nonzero().squeeze(1)
            first, last = int(rows[0]), int(rows[-1])
            self.before, self.after = -reach[first], reach[last]
            phases = phases[..., first : last + 1, first : last + 1]
            taps = phases.reshape(4, 1, *phases.shape[2:])
        else:
            self.before, self.after = (extra + 1) // 2, extra // 2
            taps = full[None, None]
        self.register_buffer("taps", taps.float())

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        x = F.pad(x, (self.before, self.after, self.before, self.after))
        weight = self.taps.to(x.dtype).repeat(channels, 1, 1, 1)
        if not self.up:
            return F.conv2d(x, weight, stride=2, groups=channels)
        return F.pixel_shuffle(F.conv2d(x, weight, groups=channels), 2)


@final
class _Naive(nn.Module):
    """Repetition, or the mean, of blocks of 2 x 2."""

    def __init__(self, up: bool) -> None:
        super().__init__()
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.up else F.avg_pool2d(x, 2)


@final
class _Styled(nn.Module):
    """StyleGANConv: a strided convolution with FIR, its filter one depthwise convolution."""

    taps: Tensor

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.up, self.kernel = bool(layer.up), int(layer.kernel)
        self.weight = copy.deepcopy(layer.weight)
        self.bias = copy.deepcopy(layer.bias) if layer.use_bias else None
        line = torch.as_tensor(layer.resample_kernel, dtype=torch.float64)
        full = torch.outer(line, line)
        self.register_buffer("taps", (full / full.sum() * (4 if self.up else 1)).flip(0, 1).float())

    def forward(self, x: Tensor) -> Tensor:
        size, reach = self.taps.shape[-1], self.kernel - 1
        if self.up:
            extra = size - 2 - reach
            # as score_models has it: the axes of channels are flipped, not those of the kernel
            weight = self.weight.flip(0, 1).transpose(0, 1)
            x = F.conv_transpose2d(x, weight, stride=2)
            x = self._filter(x, (extra + 1) // 2 + 1, extra // 2 + 1)
            return x if self.bias is None else x + self.bias[:, None, None]
        extra = size - 2 + reach
        x = self._filter(x, (extra + 1) // 2, extra // 2)
        return F.conv2d(x, self.weight, self.bias, stride=2)

    def _filter(self, x: Tensor, before: int, after: int) -> Tensor:
        channels = x.shape[1]
        x = F.pad(x, (before, after, before, after))
        weight = self.taps.to(x.dtype).expand(channels, 1, -1, -1).contiguous()
        return F.conv2d(x, weight, groups=channels)


def _resample(layer: Any) -> nn.Module:
    """A copy of an UpsampleLayer or a DownsampleLayer."""
    up = type(layer).__name__ == "UpsampleLayer"
    if layer.fir:
        if layer.with_conv:
            return _Styled(layer.Conv1d_0 if up else layer.Conv_0)
        return _Resample(layer.fir_kernel, up)
    if up:
        grow: list[nn.Module] = [_Naive(up=True)]
        return nn.Sequential(*grow, *([_plain(layer.Conv_0)] if layer.with_conv else []))
    return copy.deepcopy(layer) if layer.with_conv else _Naive(up=False)


@final
class _Attention(nn.Module):
    """SelfAttentionBlock over the pixels of a frame, one head."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.to_qkv, self.to_out = copy.deepcopy(layer.to_qkv), copy.deepcopy(layer.to_out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.to_qkv(x)
        # score_models reads the keys (B, C, N) in place, queries and values permuted; all are (B, N, C) here
        q, k, v = qkv.permute(0, 2, 3, 1).reshape(b, 1, h * w, 3 * c).chunk(3, dim=-1)
        if forward_ad.unpack_dual(qkv).tangent is None:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:  # which has no forward-mode derivative on CPUs
            mixed = torch.softmax(q @ k.mT * c**-0.5, dim=-1) @ v
        return self.to_out(mixed.reshape(b, h, w, c).permute(0, 3, 1, 2)) + x


@final
class _Block(nn.Module):
    """ResnetBlockBigGANpp or DDPMResnetBlock; the bias of the time embedding comes from outside, (B, out)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        biggan = type(block).__name__ == "ResnetBlockBigGANpp"
        scale = _HALF if biggan and block.skip_rescale else 1.0
        self.act = block.act
        self.norm_0, self.norm_1 = (
            copy.deepcopy(block.GroupNorm_0),
            copy.deepcopy(block.GroupNorm_1),
        )
        self.conv_0 = _plain(block.Conv_0)
        self.conv_1 = _plain(block.Conv_1, scale)
        self.resample: nn.Module | None = None
        if biggan and (block.up or block.down):
            self.resample = _Resample(block.fir_kernel, block.up) if block.fir else _Naive(block.up)
        self.skip: nn.Module | None = None
        if hasattr(block, "Conv_2"):
            self.skip = _plain(block.Conv_2, scale)
        elif hasattr(block, "NIN_0"):
            self.skip = nn.Conv2d(block.in_ch, block.out_ch, 1)
            with torch.no_grad():
                self.skip.weight.copy_(block.NIN_0.W[:, :, None, None])
                self.skip.bias.copy_(block.NIN_0.b)
        self.scale = scale if self.skip is None else 1.0

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        h = self.act(self.norm_0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_0(h) + bias[:, :, None, None]
        h = self.conv_1(self.act(self.norm_1(h)))
        x = x if self.skip is None else self.skip(x)
        return torch.add(h, x, alpha=self.scale)


@final
class _Combine(nn.Module):
    """Combine: the skip of the input, added or joined."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.conv, self.joins = _plain(layer.Conv_0), layer.method == "cat"

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.conv(x)
        return torch.cat([h, y], dim=1) if self.joins else h + y


def _layer(module: nn.Module) -> nn.Module:
    """The faster twin of one of the modules of `all_modules`."""
    makers: dict[str, Callable[[Any], nn.Module]] = {
        "ResnetBlockBigGANpp": _Block,
        "DDPMResnetBlock": _Block,
        "SelfAttentionBlock": _Attention,
        "Combine": _Combine,
        "UpsampleLayer": _resample,
        "DownsampleLayer": _resample,
        "Conv2dSame": _plain,
    }
    kept = ("GroupNorm", "Linear", "GaussianFourierProjection")
    name = type(module).__name__
    if name in kept:
        return copy.deepcopy(module)
    if name not in makers:
        raise ValueError(f"got a layer {name}, which has no faster twin")
    return makers[name](module)


class _Walk(nn.Module):
    """Layers in the order in which they are used, and the biases that the blocks among them take from the time."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.act = net.act
        self.layers = nn.ModuleList(_layer(module) for module in net.all_modules)
        dense = [m.Dense_0 for m in net.all_modules if hasattr(m, "Dense_0")]
        self.widths = [layer.out_features for layer in dense]
        self.dense = nn.Linear(dense[0].in_features, sum(self.widths))
        with torch.no_grad():
            self.dense.weight.copy_(torch.cat([layer.weight for layer in dense]))
            self.dense.bias.copy_(torch.cat([layer.bias for layer in dense]))

    def begin(self, temb: Tensor) -> tuple[Callable[..., Tensor], Callable[[], nn.Module]]:
        """``run(h, *more)`` runs the next layer, with its bias where it is a block; ``take()`` gives it."""
        layers = iter(self.layers[3:])
        biases = iter(self.dense(self.act(temb)).split(self.widths, dim=1))

        def take() -> nn.Module:
            return next(layers)

        def run(*inputs: Tensor) -> Tensor:
            layer = next(layers)
            return layer(*inputs, next(biases)) if isinstance(layer, _Block) else layer(*inputs)

        return run, take


@final
class FastNCSNpp(_Walk):
    """NCSNpp (Song et al. 2021, arXiv:2011.13456), called as net(t, x): t (B,), x (B, C, H, W)."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.blocks, self.levels = net.num_res_blocks, net.num_resolutions
        self.progressive, self.progressive_input = net.progressive, net.progressive_input
        self.rescale, self.attention = net.skip_rescale, net.attention
        self.grow = _resample(net.pyramid_upsample) if self.progressive == "output_skip" else None
        skips = self.progressive_input == "input_skip"
        self.shrink = _resample(net.pyramid_downsample) if skips else None

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b) * _HALF if self.rescale else a + b

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        project, first, second = self.layers[:3]
        temb = second(self.act(first(project(t).view(len(x), -1))))
        run, take = self.begin(temb)
        pyramid = x = x.contiguous(memory_format=torch.channels_last)
        hs = [run(x)]
        for level in range(self.levels):
            for _ in range(self.blocks):
                hs.append(run(hs[-1]))
            if level == self.levels - 1:
                break
            h = run(hs[-1])
            if self.shrink is not None:
                pyramid = self.shrink(pyramid)
                h = run(pyramid, h)
            elif self.progressive_input == "residual":
                h = pyramid = self._sum(run(pyramid), h)
            hs.append(h)
        h = run(hs[-1])
        if self.attention:
            h = run(h)
        h = run(h)
        out: Tensor | None = None
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = run(torch.cat([h, hs.pop()], dim=1))
            if self.progressive == "output_skip" or (
                self.progressive == "residual" and out is None
            ):
                norm, head = take(), take()
                shown = head(self.act(norm(h)))
                out = shown if out is None or self.grow is None else self.grow(out) + shown
            elif self.progressive == "residual":
                h = out = self._sum(run(out), h)
            if level:
                h = run(h)
        if out is not None and self.progressive == "output_skip":
            return out
        norm, head = take(), take()
        return head(self.act(norm(h)))


@final
class FastDDPM(_Walk):
    """DDPM (Ho et al. 2020, arXiv:2006.11239), called as net(t, x): t (B,), x (B, C, H, W)."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.blocks, self.levels, self.attention = (
            net.num_res_blocks,
            net.num_resolutions,
            net.attention,
        )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        temb = t
        for layer in self.layers[:3]:
            temb = layer(temb)
        run, take = self.begin(temb)
        hs = [run(x.contiguous(memory_format=torch.channels_last))]
        for level in range(self.levels):
            for _ in range(self.blocks):
                hs.append(run(hs[-1]))
            if level != self.levels - 1:
                hs.append(run(hs[-1]))
        h = run(hs[-1])
        if self.attention:
            h = run(h)
        h = run(h)
        for level in reversed(range(self.levels)):
            for _ in range(self.blocks + 1):
                h = run(torch.cat([h, hs.pop()], dim=1))
            if level:
                h = run(h)
        norm, head = take(), take()
        return head(self.act(norm(h)))
