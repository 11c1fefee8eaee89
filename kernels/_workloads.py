"""What `diffpost bench` times: each kernel beside its reference, on the sizes of ordinary use.

Networks: features of 64 channels at 64 x 64 and batch 4, as in score_models' NCSNpp of 64 filters and in
diffpost's U-Net. Lens: an image of 128 x 128 with 2 x 2 rays a pixel of a 64 x 64 source, batch 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffpost.kernels import (
    convolved_residual,
    group_norm_silu,
    pixel_norm_silu,
    ray_shoot,
    sde_step,
)
from diffpost.kernels._model import Cost

__all__ = ["Workload", "workloads"]

Call = Callable[[], tuple[Tensor, ...]]


@final
@dataclass(frozen=True)
class Workload:
    """One row: what the operation and its reference compute, which must agree, and what the model says of it."""

    name: str
    cost: Cost
    kernel: Call
    reference: Call


def workloads(device: torch.device | str) -> list[Workload]:
    """All of them, with their tensors on this device; small numbers of a fixed seed."""
    draw = _Draw(device)
    return [*_step(draw), *_group(draw), *_pixel(draw), *_whitening(draw), *_lens(draw)]


class _Draw:
    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device)


def _step(draw: _Draw) -> list[Workload]:
    x, score, guidance = (draw(16, 1, 64, 64) for _ in range(3))
    coefficients = draw(16, 4)
    ids = torch.arange(16, device=draw.device)
    address = sde_step.address(1, 2, device=draw.device)
    arguments = (x, score, guidance, coefficients, ids, address)
    return [
        Workload(
            "sde_step, 16 x 1 x 64 x 64",
            sde_step.cost(x.numel()),
            lambda: (sde_step.sde_step(*arguments),),
            lambda: (sde_step.reference(*arguments),),
        )
    ]


def _group(draw: _Draw) -> list[Workload]:
    shape = (4, 64, 64, 64)
    x, g, passed, residual = (draw(*shape) for _ in range(4))
    shift, weight, bias = draw(4, 64), draw(64), draw(64)
    forward, backward = group_norm_silu.cost(shape, residual=True)

    def both(function: Any, x: Tensor) -> tuple[Tensor, ...]:
        extra = {"residual": residual, "shift": shift, "scale": 0.7}
        out: tuple[Tensor, ...] = function(x, weight, bias, 16, 1e-6, **extra)
        return out

    operation = torch.ops.diffpost.group_norm_silu
    _, total, mean, rstd = operation(x, residual, shift, weight, bias, 16, 1e-6, 0.7)
    saved = (total, shift, weight, bias, mean, rstd, 16, 0.7)
    return [
        Workload(
            "group_norm_silu, 4 x 64 x 64 x 64",
            forward,
            lambda: both(group_norm_silu.group_norm_silu, x),
            lambda: both(group_norm_silu.reference, x),
        ),
        Workload(
            "group_norm_silu backward",
            backward,
            lambda: torch.ops.diffpost.group_norm_silu_backward(g, passed, *saved)[:1],
            _backward(lambda x: both(group_norm_silu.reference, x), (x,), (g, passed)),
        ),
    ]


def _pixel(draw: _Draw) -> list[Workload]:
    shape = (4, 64, 64, 64)
    x, g = (draw(*shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias, gain, shift = draw(64), draw(64), draw(4, 64), draw(4, 64)
    forward, backward = pixel_norm_silu.cost(shape)
    film = torch.stack([gain, shift], 1)
    last, g_last = (t.permute(0, 2, 3, 1) for t in (x, g))

    def reference(x: Tensor) -> tuple[Tensor, ...]:
        return (pixel_norm_silu.reference(x, weight, bias, gain, shift),)

    def kernel_backward() -> tuple[Tensor, ...]:
        operation = torch.ops.diffpost.pixel_norm_silu_backward
        out, _ = operation(g_last, last, weight, bias, film, 1e-5)
        return (out.permute(0, 3, 1, 2),)

    return [
        Workload(
            "pixel_norm_silu, 4 x 64 x 64 x 64",
            forward,
            lambda: (pixel_norm_silu.pixel_norm_silu(x, weight, bias, gain, shift),),
            lambda: reference(x),
        ),
        Workload(
            "pixel_norm_silu backward", backward, kernel_backward, _backward(reference, (x,), (g,))
        ),
    ]


def _whitening(draw: _Draw) -> list[Workload]:
    shape = (16, 1, 64, 33)
    r, a = torch.view_as_complex(draw(*shape, 2)), torch.view_as_complex(draw(*shape[1:], 2))
    q, s = draw(*shape[1:]).exp(), draw(16).exp()
    return [
        Workload(
            "convolved_residual, 16 x 1 x 64 x 33",
            convolved_residual.cost(shape),
            lambda: (torch.view_as_real(convolved_residual.convolved_residual(r, a, q, s)),),
            lambda: (torch.view_as_real(convolved_residual.reference(r, a, q, s)),),
        )
    ]


def _lens(draw: _Draw) -> list[Workload]:
    batch, source_side, side, rays = 16, 64, 128, 4
    source, g = draw(batch, 1, source_side, source_side), draw(batch, 1, side**2)
    params = torch.tensor([0.03, -0.02, 0.7, 0.4, 1.2, 0.05, -0.03], device=draw.device)
    params = params.repeat(batch, 1)
    place = (torch.arange(2 * side, device=draw.device) - (side - 0.5)) * (5.0 / (2 * side))
    y, x = (
        c.reshape(side, 2, side, 2).permute(1, 3, 0, 2).reshape(rays, side**2).contiguous()
        for c in torch.meshgrid(place, place, indexing="ij")
    )
    setting = ray_shoot.setting((0.0, 0.0), 2.4 / source_side, 1.1, 1e-6, device=draw.device)
    sizes = (batch, 1, source_side**2, side**2, rays)

    def reference(source: Tensor, params: Tensor) -> tuple[Tensor, ...]:
        return (ray_shoot.reference(source, params, x, y, setting),)

    def backward(deterministic: bool) -> Call:
        operation = torch.ops.diffpost.ray_shoot_backward
        return lambda: operation(g, source, params, x, y, setting, deterministic, True, True)

    made = [
        Workload(
            f"ray_shoot, {batch} x {side} x {side} x {rays} rays",
            ray_shoot.cost(*sizes)[0],
            lambda: (ray_shoot.ray_shoot(source, params, x, y, setting),),
            lambda: reference(source, params),
        )
    ]
    for deterministic in (True, False):
        made.append(
            Workload(
                f"ray_shoot backward{', deterministic' if deterministic else ''}",
                ray_shoot.cost(*sizes, deterministic)[1],
                backward(deterministic),
                _backward(reference, (source, params), (g,)),
            )
        )
    return made


def _backward(
    forward: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
) -> Call:
    """Autograd's gradients by the inputs, of a forward done when they are first called for."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    graph: list[tuple[Tensor, ...]] = []

    def call() -> tuple[Tensor, ...]:
        if not graph:
            graph.append(forward(*leaves))
        return torch.autograd.grad(graph[0], leaves, gradients, retain_graph=True)

    return call
