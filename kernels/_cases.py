"""The kernels as they are compiled ahead of time: with the types and sizes of ordinary launches.

Tensors are float32 and aligned to 16 bytes, lengths multiples of 16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diffpost.kernels import (
    convolved_residual,
    group_norm_silu,
    pixel_norm_silu,
    ray_shoot,
    sde_step,
)
from diffpost.kernels._compile import Case

__all__ = ["cases", "half_cases"]

_TENSOR, _LENGTH = "*fp32:16", "i32:16"
_SUMS = ("mean", "rstd", "sums")


def cases() -> list[Case]:
    """All of them."""
    return [
        *_sde_step(),
        *_group_norm_silu(),
        *_pixel_norm_silu(),
        *_convolved_residual(),
        *_ray_shoot(),
    ]


def half_cases() -> list[Case]:
    """Those that take half precision, in bfloat16; what they sum up is float32."""
    made = []
    for case in (*_group_norm_silu(bytes_each=2), *_pixel_norm_silu()):
        arguments = {
            name: "*bf16:16" if value == _TENSOR and name not in _SUMS else value
            for name, value in case.arguments.items()
        }
        made.append(dataclasses.replace(case, name=f"{case.name}, bfloat16", arguments=arguments))
    return made


def _sde_step() -> list[Case]:
    """As launched for float32 images of a multiple of 16 elements."""
    tensor, numbers = _TENSOR, "*i64:16"
    return [
        Case(
            f"sde_step{', guided' if guided else ''}",
            sde_step._kernel,
            {
                "x": tensor,
                "score": tensor,
                "guidance": tensor,
                "coefficients": tensor,
                "ids": numbers,
                "address": numbers,
                "out": tensor,
                "n": "i32:16",
                "coefficient_stride": "i32",
                "GUIDED": guided,
                "BLOCK": sde_step._BLOCK,
            },
            sde_step._THREADS,
            sde_step._BLOCK,
        )
        for guided in (True, False)
    ]


def _group_norm_silu(bytes_each: int = 4) -> list[Case]:
    """As launched for 4 channels in a group: one tile, and several, with and without extras."""
    tensor, number = _TENSOR, _LENGTH
    made = []
    for pixels in (32 * 32, 64 * 64):
        for full in (True, False):
            constants: dict[str, Any] = group_norm_silu._tiling(64, 16, pixels)
            threads = group_norm_silu._threads(constants, bytes_each)
            kind = f"{'one tile' if constants['ONE'] else 'tiles'}{', residual and shift' if full else ''}"
            elements = constants["CG"] * constants["TILE"]
            numbers = {"channels": number, "groups": number, "pixels": number, "SCALE": 0.5}
            pointers = ("x", "residual", "shift", "weight", "bias", "out", "total", "mean", "rstd")
            forward = {"EPS": 1e-6, "RESIDUAL": full, "SHIFT": full, **numbers, **constants}
            forward |= dict.fromkeys(pointers, tensor)
            made.append(
                Case(
                    f"group_norm_silu forward, {kind}",
                    group_norm_silu._forward,
                    forward,
                    threads,
                    elements,
                )
            )
            pointers = ("gradient", "passed", "x", "shift", "weight", "bias", "mean", "rstd")
            backward = {"PASSED": full, "SHIFT": full, **numbers, **constants}
            backward |= dict.fromkeys((*pointers, "out", "sums"), tensor)
            made.append(
                Case(
                    f"group_norm_silu backward, {kind}",
                    group_norm_silu._backward,
                    backward,
                    threads,
                    elements,
                )
            )
    return made


def _pixel_norm_silu() -> list[Case]:
    """Images of 64 x 64 pixels of 64 channels."""
    constants: dict[str, Any] = pixel_norm_silu._tiling(64, 64 * 64)
    threads = pixel_norm_silu._threads(constants)
    made = []
    for name in ("forward", "backward"):
        for film in (True, False):
            pointers = ["x", "weight", "bias", "film", "out"]
            pointers += ["gradient", "sums"] if name == "backward" else []
            arguments = dict.fromkeys(pointers, _TENSOR) | {"channels": _LENGTH, "pixels": _LENGTH}
            arguments |= {"EPS": 1e-5, "FILM": film, **constants}
            kernel = getattr(pixel_norm_silu, f"_{name}")
            title = f"pixel_norm_silu {name}{', FiLM' if film else ''}"
            made.append(
                Case(title, kernel, arguments, threads, constants["ROWS"] * constants["WIDE"])
            )
    return made


def _convolved_residual() -> list[Case]:
    """An element is a complex number."""
    block = convolved_residual._BLOCK
    arguments = dict.fromkeys(("residual", "transfer", "power", "s", "out"), _TENSOR)
    arguments |= {"n": _LENGTH, "CONJUGATE": False, "BLOCK": block}
    kernel, threads = convolved_residual._kernel, convolved_residual._THREADS
    return [Case("convolved_residual", kernel, arguments, threads, block)]


def _ray_shoot() -> list[Case]:
    """One channel; an element is a ray of one pass. The source is gathered, which no access can be wide for."""
    block, threads = ray_shoot._BLOCK, ray_shoot._THREADS
    pointers = ("source", "params", "rays_x", "rays_y", "setting")
    lengths = {"n": _LENGTH, "height": _LENGTH, "width": _LENGTH}
    arguments = dict.fromkeys(pointers, _TENSOR) | lengths
    arguments |= dict.fromkeys(("channels", "rays", "tiles"), "i32")
    arguments |= {"CP": 1, "BLOCK": block}
    forward = arguments | {"out": _TENSOR}
    made = [Case("ray_shoot forward", ray_shoot._forward, forward, threads, block)]
    block = ray_shoot._BLOCK_BACKWARD
    arguments |= dict.fromkeys(("gradient", "units", "to_params"), _TENSOR) | {"BLOCK": block}
    for fixed, params in ((True, True), (False, True), (True, False)):
        backward = arguments | {"SOURCE": True, "PARAMS": params, "FIXED": fixed}
        backward["to_source"] = "*i64:16" if fixed else _TENSOR
        what = "source and parameters" if params else "source"
        title = f"ray_shoot backward, {what}{', deterministic' if fixed else ''}"
        made.append(Case(title, ray_shoot._backward, backward, threads, block))
    return made
