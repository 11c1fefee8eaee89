"""Lenses as a family of operators: an instrument behind a lens whose parameters are to be inferred.

    y = R L(theta) x + b(phi) + n,

L(theta) the lensing of source x and R what follows it: the PSF, binning, a mask; b(phi) the lens' own light, if it is modelled.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.operator import Identity
from diffpost.operators.base import LinearOperator, Shape
from diffpost.parameters.family import OperatorFamily, Values
from diffpost.physics.lens_light import LensLight
from diffpost.physics.lensing import Lens

__all__ = ["LensFamily"]


@final
class LensFamily(OperatorFamily):
    """R L(theta) for the free parameters of a lens.

    Args:
        lens: with free parameters.
        response: R, from images (..., ny, nx) of the lens to data; None for none.
        channels: of the source.
        light: of the lens itself, with a response of its own that ends at the same data; None for none.

    Attributes:
        names: those of ``lens.parameters``, and what else the light follows.

    Raises:
        ValueError: a lens whose parameters are all known, or light that makes data of another shape.
    """

    def __init__(
        self,
        lens: Lens,
        response: LinearOperator | None = None,
        channels: int = 1,
        *,
        light: LensLight | None = None,
    ) -> None:
        if not lens.parameters:
            raise ValueError(
                f"LensFamily: got {lens!r}, whose parameters are all known; use it as an operator, or leave some open."
            )
        self.lens = lens
        self.response: LinearOperator = Identity() if response is None else response
        self.light = light
        extra = () if light is None else (n for n in light.names if n not in lens.parameters)
        self.names = (*lens.parameters, *extra)
        self.input_shape: Shape = (channels, *lens.source.shape)
        image = (channels, *lens.image.shape)
        self.data_shape: Shape = tuple(self.response.output_shape(image))
        if light is not None and light.data_shape != self.data_shape:
            raise ValueError(
                f"LensFamily: {light!r} makes data {light.data_shape} and the lens {self.data_shape}; give the light a "
                "response that ends at the same data."
            )

    def __repr__(self) -> str:
        light = "" if self.light is None else f", light={self.light!r}"
        return f"LensFamily({self.lens!r}, {self.response!r}{light})"

    def vector(self, values: Values) -> Tensor:
        """Parameters by name as (B, P) in the lens' order."""
        return torch.stack([values[name] for name in self.lens.parameters], -1)

    def at(self, values: Values) -> LinearOperator:
        lens = self.lens.at(self.vector(values))
        return lens if isinstance(self.response, Identity) else self.response @ lens

    def apply(self, values: Values, x: Tensor) -> Tensor:
        return self._seen(values, x)

    def background(self, values: Values) -> Tensor | None:
        return None if self.light is None else self.light.data(values)

    def columns(self, values: Values, images: Tensor) -> Tensor:
        """As in the base class; the K images share their rays, so that each lens is traced once.

        The K values of a source pixel lie side by side, so that a ray reads them in one go: an order of magnitude faster
        than K images.
        """
        vector = self.vector(values)
        batch, count = len(vector), len(images)
        good = self.lens.valid(vector)
        if not bool(good.any()):
            return images.new_full((count, batch, *self.data_shape), torch.nan)
        inside = vector[good.nonzero()[0, 0]]
        vector = torch.where(good[:, None], vector, inside.detach())
        seen = [self._seen_at_once(one, images) for one in vector]
        data = torch.stack(seen, 1)
        return torch.where(good.reshape(1, -1, *[1] * len(self.data_shape)), data, torch.nan)

    def _seen_at_once(self, vector: Tensor, images: Tensor) -> Tensor:
        """Data (K, *data) of images (K, C, h, w) through one lens (P,)."""
        places, weights = self.lens.taps_at(vector)
        planes = [
            _gathered(
                images[:, i], places[min(i, len(places) - 1)], weights[min(i, len(weights) - 1)]
            )
            for i in range(images.shape[1])
        ]
        ny, nx = self.lens.image.shape
        image = torch.stack(planes, 1).reshape(len(images), len(planes), ny, nx)
        return self.response(image)

    def _seen(self, values: Values, x: Tensor) -> Tensor:
        """Data of sources (B, ..., C, H, W); NaN for parameters out of range."""
        vector = self.vector(values)
        good = self.lens.valid(vector)
        if not bool(good.any()):
            return x.new_full((*x.shape[:-3], *self.data_shape), torch.nan)
        inside = vector[good.nonzero()[0, 0]]
        image = self.lens.render(x, torch.where(good[:, None], vector, inside.detach()))
        front = image.shape[:-3]
        data = self.response(image.flatten(0, -4)).reshape(*front, *self.data_shape)
        wide = good.reshape(-1, *[1] * (data.ndim - 1))
        return torch.where(wide, data, torch.nan)


def _gathered(images: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """sum_e weight[p, e] images[:, place[p, e]]: (K, h, w) and (pixels, E) to (K, pixels).

    The pixel after the last one is empty.
    """
    table = torch.cat([images.flatten(1).mT, images.new_zeros(1, len(images))])
    found = torch.nn.functional.embedding_bag(
        place, table, per_sample_weights=weight.to(table), mode="sum"
    )
    return found.mT
