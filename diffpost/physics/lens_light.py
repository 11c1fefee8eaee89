r"""The image of the light of a lens: profiles of caustics, integrated over pixels, behind an instrument.

With brightness I(x, y; phi) in flux per square arcsec, pixels of area a and k x k rays in each, as for the lensed source,

    b_i(phi) = R (a/k^2 sum_rays I(x_ray, y_ray; phi)).

A profile is steepest in its middle, where k x k rays are too few. Pixels within four of where the prior expects the middle of a
component are therefore cut into 8 k x 8 k; rays that meet it within 1/20 of their distance are taken at that distance,
for at a cusp derivatives have no value.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffpost.operator import Identity
from diffpost.operators.base import LinearOperator, Parameter, Shape
from diffpost.physics.grid import Grid
from diffpost.physics.light_model import LightModel, LightPart
from diffpost.physics.ray_tracing import LensParameter, beside, valid_range
from diffpost.physics.transforms import transformed

__all__ = ["LensLight"]

_FINER = 8  # as many rays along a side of a pixel in the middle of a component
_CORE = 4.0  # pixels about where the middle is expected
_FARTHEST = 12.0  # pixels
_NEAR = 0.05  # of the distance of the finest rays
_CHUNK = 1 << 17  # rays at once


@final
class LensLight:
    """b(phi) = R (image of the light of a lens), with gradients in its parameters.

    Args:
        model: the components (:func:`diffpost.physics.read_lens_model`).
        image: the grid; ``oversample`` is the number of rays along a side of a pixel.
        response: R, from images (1, ny, nx) to data; None for none.

    Attributes:
        names: of the free parameters that it follows, those of the mass among them.
        data_shape: of its data.

    Raises:
        ValueError: not a light model, or not a grid.
    """

    def __init__(
        self, model: LightModel, image: Grid, response: LinearOperator | None = None
    ) -> None:
        if not isinstance(model, LightModel) or not isinstance(image, Grid):
            raise ValueError(
                f"LensLight: got {model!r} and {image!r}; expected the light of a lens model and a Grid, such as "
                "read_lens_model(spec).light and Grid(64, pixel=0.05)."
            )
        self.model, self.image = model, image
        self.response: LinearOperator = Identity() if response is None else response
        self.names = model.names
        self.data_shape: Shape = tuple(self.response.output_shape((1, *image.shape)))
        (ny, nx), k = image.shape, image.oversample
        self._pixels = ny * nx
        self._x, self._y = (
            Parameter(c.reshape(ny, k, nx, k).transpose(1, 2).reshape(ny * nx, k * k))
            for c in image.fine.coordinates()
        )
        self._finest = image.pixel / (k * _FINER)
        self._parts = [_Component(part, self._finest) for part in model.parts]
        x, y = image.coordinates()
        middle = torch.zeros(ny, nx, dtype=torch.bool)
        for part in model.parts:
            cx, cy, spread = part.core
            radius = min(_CORE * image.pixel + spread, _FARTHEST * image.pixel)
            middle |= torch.hypot(x - cx, y - cy) <= radius
        self._core = Parameter(middle.flatten().nonzero()[:, 0])
        off = (torch.arange(k * _FINER, dtype=torch.float64) - (k * _FINER - 1) / 2) * self._finest
        dy, dx = (d.flatten() for d in torch.meshgrid(off, off, indexing="ij"))
        self._fine_x = Parameter(x.double().flatten()[self._core.value, None] + dx)
        self._fine_y = Parameter(y.double().flatten()[self._core.value, None] + dy)

    def __repr__(self) -> str:
        parts = ", ".join(part.name for part in self.model.parts)
        return f"LensLight({parts} on {self.image!r}, {self.response!r})"

    @property
    def details(self) -> tuple[LensParameter, ...]:
        """Unit and valid range by the first component that follows each of ``names``."""
        found = {p.name: p for part in reversed(self._parts) for p in part.details}
        return tuple(found[name] for name in self.names)

    def valid(self, values: Mapping[str, Tensor]) -> Tensor:
        """(B,), whether everything is in the ranges that caustics states."""
        good = torch.ones(_rows(values), dtype=torch.bool)
        for part in self._parts:
            for detail in part.details:
                value = values[detail.name].detach()
                good = good.to(value.device) & detail.valid(value)
        return good

    def images(self, values: Mapping[str, Tensor]) -> Tensor:
        """Flux per pixel before the instrument, (B, 1, ny, nx) in the dtype of the values; differentiable in them.

        Args:
            values: parameters by name, each (B,); more than ``names`` may be there.

        Raises:
            ValueError: a parameter without a value.
        """
        rows, like = self._columns(values)
        area = self.image.area
        x, y = self._x.like(rows[0]), self._y.like(rows[0])
        step = max(1, _CHUNK // (x.shape[1] * len(like)))
        again = torch.is_grad_enabled() and not transformed() and self._pixels > step
        again = again and any(r.requires_grad for r in rows)
        pieces = []
        for begin in range(0, self._pixels, step):
            place = x[begin : begin + step], y[begin : begin + step]
            pieces.append(self._kept(again, *place, *rows))
        image = torch.cat(pieces, 1)
        core = self._core.value.to(like.device)
        if len(core):
            fine = self._fine_x.like(rows[0]), self._fine_y.like(rows[0])
            wide = max(1, _CHUNK // (fine[0].shape[1] * len(like)))
            parts = zip(fine[0].split(wide), fine[1].split(wide), strict=True)
            middle = torch.cat([self._kept(again, u, v, *rows) for u, v in parts], 1)
            image = image.index_copy(1, core, middle)
        return (area * image).reshape(-1, 1, *self.image.shape).to(like)

    def data(self, values: Mapping[str, Tensor]) -> Tensor:
        """b(phi), (B, *data) in the dtype of the values; NaN where they are out of range.

        Raises:
            ValueError: a parameter without a value.
        """
        self._check_names(values)
        good = self.valid(values)
        wide = good.reshape(-1, *[1] * len(self.data_shape))
        if not bool(good.any()):
            like = next(iter(values.values()))
            return torch.full((len(good), *self.data_shape), torch.nan).to(like)
        if not bool(good.all()):
            first = int(good.nonzero()[0, 0])
            values = {k: torch.where(good, v, v[first].detach()) for k, v in values.items()}
        return torch.where(wide, self.response(self.images(values)), torch.nan)

    # inside ------------------------------------------------------------------------------------

    def _check_names(self, values: Mapping[str, Tensor]) -> None:
        missing = [name for name in self.names if name not in values]
        if missing or not values:
            raise ValueError(
                f"{self!r}: got no value for {', '.join(missing) or 'any parameter'}; expected {', '.join(self.names)} by "
                "name, each (B,)."
            )

    def _columns(self, values: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        """Of every component, in float64; and a row of the values."""
        self._check_names(values)
        like = next(iter(values.values()))
        full = torch.zeros_like(like, dtype=torch.float64)
        columns = [
            torch.stack(
                [values[v].double() if isinstance(v, str) else full + v for v in part.wanted], 1
            )
            for part in self._parts
        ]
        return columns, like

    def _kept(self, again: bool, x: Tensor, y: Tensor, *rows: Tensor) -> Tensor:
        if again:
            found: Tensor = checkpoint(self._mean, x, y, *rows, use_reentrant=False)
            return found
        return self._mean(x, y, *rows)

    def _mean(self, x: Tensor, y: Tensor, *rows: Tensor) -> Tensor:
        """Mean brightness of pixels by their rays: (pixels, rays) to (B, pixels)."""
        total = [
            part.brightness(x.flatten(), y.flatten(), row)
            for part, row in zip(self._parts, rows, strict=True)
        ]
        seen = torch.stack(total).sum(0)
        return seen.reshape(len(seen), *x.shape).mean(-1)


@final
class _Component:
    """One part as a function of a vector of its parameters, in the order of `wanted`."""

    def __init__(self, part: LightPart, finest: float) -> None:
        self._module = copy.deepcopy(part.module)
        self._near = _NEAR * finest
        params = list(self._module.dynamic_params)
        for param in params:
            param.group = 0
        self._centre = [i for axis in ("x0", "y0") for i, p in enumerate(params) if p.name == axis]
        self.wanted = [part.values[p.name] for p in params]
        self.details = tuple(
            LensParameter(
                wanted,
                p.units or "",
                *valid_range(p),
                bool(p.cyclic),
            )
            for p, wanted in zip(params, self.wanted, strict=True)
            if isinstance(wanted, str)
        )
        self._module.to(dtype=torch.float64, device=torch.device("cpu"))

    def brightness(self, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """(n,) places and (B, P) parameters to (B, n), flux per square arcsec."""
        at_x, at_y = self._centre

        def one(row: Tensor) -> Tensor:
            u, v = beside(x, y, row[at_x], row[at_y], self._near)
            found: Tensor = self._module.brightness(u, v, params=row)
            return found

        return torch.func.vmap(one)(rows)


def _rows(values: Mapping[str, Tensor]) -> int:
    return len(next(iter(values.values())))
