"""Strong lensing of a pixelated source.

Lensing conserves surface brightness: with the lens equation beta = theta - alpha(theta), the image is
I(theta) = S(beta(theta)) (Schneider, Ehlers & Falco 1992, section 5.2). Images here hold flux per
pixel, so that with k x k rays in a pixel of area a_i, and source pixels of area a_s,

    y_i = (a_i/a_s) k^-2 sum_rays sum_j s_j kernel(beta_ray - beta_j),

which is linear in the source s: a sparse matrix of 4 k^2 (bilinear) or 16 k^2 (bicubic) entries a row
at most, and far fewer where neighbouring rays meet the same source pixels. For a lens that is known
the matrix is built once, together with its transpose. For one that is not, ``render`` is a function of
source and lens parameters that can be differentiated in both, and ``at(params)`` the matrix at given
ones, one for each entry of a batch.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffpost.operators.base import LinearOperator, Parameter, Shape
from diffpost.physics.fixed_lens import FixedLens
from diffpost.physics.grid import Grid
from diffpost.physics.interpolation import Interpolation, check_interpolation, sample, taps
from diffpost.physics.ray_tracing import LensParameter, RayTracer
from diffpost.physics.sparse import SparseBlocks, rows_from_taps
from diffpost.physics.transforms import transformed

__all__ = ["Lens", "SourceGridWarning"]

_NEAR = 1e-4  # sub-pixels from a lens' centre
_CHUNK = 1 << 17  # rays traced at once: tens of MB for the costliest profiles
_OUTSIDE = 0.01  # share of the flux from outside the source grid that warns

Params = Tensor | Mapping[str, Any] | Sequence[float]


class SourceGridWarning(UserWarning):
    """The source grid is too small: flux of the image comes from outside."""


@final
class Lens(LinearOperator):
    """Images of a pixelated source through a gravitational lens.

    With a mass whose parameters all have values it is a linear operator. With free ones it becomes
    one by ``at(params)``, and ``render(source, params)`` is differentiable in both.

    Source: Schneider, Ehlers & Falco (1992), section 5.2; Warren & Dye (2003, ApJ 590, 673) for the
    matrix of a pixelated source.

    Args:
        mass: a lens model of caustics (SIE, EPL, ExternalShear, Multipole, NFW,
            PixelatedConvergence, SinglePlane, Multiplane, ...); or a list of them, one for each channel:
            bands with other masses, or sources at other redshifts, which may share parameters in caustics'
            way. It is copied. Python numbers in it are kept by caustics in torch's default dtype.
        image: the grid of the image; ``oversample`` is the number of rays along a side of a pixel.
        source: the grid of the source.
        interpolation: "bilinear" or "bicubic" (see :mod:`diffpost.physics.interpolation`); the source is
            zero outside its grid.

    Attributes:
        image, source, interpolation: as given.
        parameters: names of the P free parameters, the order of every vector of parameters.
        details: unit, valid range and value that caustics holds for each.

    Raises:
        ValueError: not a lens model of caustics, not grids, another interpolation, or no deflection at
            some place.
    """

    def __init__(
        self,
        mass: Any,
        image: Grid,
        source: Grid,
        *,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        for name, grid in (("image", image), ("source", source)):
            if not isinstance(grid, Grid):
                raise ValueError(
                    f"Lens: got {name}={grid!r}; expected a Grid, such as diffpost.physics.Grid(64, pixel=0.05)."
                )
        check_interpolation(interpolation)
        several = isinstance(mass, list | tuple)
        if several and not mass:
            raise ValueError("Lens: got no mass; expected a lens model of caustics, or several.")
        self.image, self.source, self.interpolation = image, source, interpolation
        self._kind: Interpolation = interpolation
        self._channels = len(mass) if several else None
        self._tracer = RayTracer(mass if several else [mass], _NEAR * image.fine.pixel)
        # k x k rays of a pixel next to each other, pixels in the order of the image
        (ny, nx), k = image.shape, image.oversample
        self._pixels = ny * nx
        self._x, self._y = (
            Parameter(c.reshape(ny, k, nx, k).transpose(1, 2).reshape(ny * nx, k * k))
            for c in image.fine.coordinates()
        )
        self._fixed = None if self.parameters else self._build(torch.zeros(1, 0).double(), None)

    def __repr__(self) -> str:
        free = f", free: {', '.join(self.parameters)}" if self.parameters else ""
        return f"Lens({self.source!r} -> {self.image!r}{free})"

    # parameters --------------------------------------------------------------------------------

    @property
    def parameters(self) -> tuple[str, ...]:
        return self._tracer.names

    @property
    def details(self) -> tuple[LensParameter, ...]:
        return self._tracer.parameters

    def vector(self, params: Params) -> Tensor:
        """Parameters (P,) or (B, P) in the order of ``parameters``, from values by name.

        Raises:
            ValueError: an unknown name (with the nearest one), a missing one, or another number.
        """
        return self._tracer.vector(params)

    def valid(self, params: Tensor) -> Tensor:
        """Which vectors (..., P) are in the ranges that caustics states: (...), bool."""
        return self._tracer.valid(params)

    def at(self, params: Params | None = None) -> FixedLens:
        """Lensing at these parameters, as an operator of the source. No gradient flows to them.

        Args:
            params: (P,), one lens for every entry of a batch; or (B, P), entry b has lens b. Also values
                by name. None only where there are no free parameters.

        Raises:
            ValueError: other parameters than ``parameters``, values out of their valid range, or no
                deflection at some place.
        """
        if params is None and self._fixed is not None:
            return self._fixed
        vector = self._vector(params).detach()
        if transformed():
            raise ValueError(
                "Lens.at: got called inside a transform of torch.func; use render(source, params), which can "
                "be transformed."
            )
        self._tracer.check(vector)
        rows = vector if vector.ndim == 2 else vector[None]
        return self._build(rows, len(rows) if vector.ndim == 2 else None)

    def render(self, source: Tensor, params: Params | None = None) -> Tensor:
        """The images, differentiable in source and parameters, also by ``torch.func``.

        Large ones are traced a part at a time, and once more on the way back.

        Args:
            source: (B, ..., ny_s, nx_s), flux per pixel.
            params: (P,) or (B, P); a batch of 1 on either side serves all of the other. Also values by name.

        Returns:
            (B, ..., ny, nx), flux per pixel, in the dtype of the source.

        Raises:
            ValueError: as ``at``, or sources of another shape.
        """
        vector = self._vector(params)
        self._tracer.check(vector)
        rows = vector if vector.ndim == 2 else vector[None]
        front = tuple(source.shape[1:-2])
        if (
            source.ndim < 3
            or tuple(source.shape[-2:]) != self.source.shape
            or (self._channels is not None and front != (self._channels,))
        ):
            wanted = "..." if self._channels is None else str(self._channels)
            raise ValueError(
                f"{self!r}: got a source of shape {tuple(source.shape)}; expected (B, {wanted}, "
                f"{self.source.shape[0]}, {self.source.shape[1]})."
            )
        if 1 not in (len(source), len(rows)) and len(source) != len(rows):
            raise ValueError(
                f"{self!r}: got {len(source)} sources and {len(rows)} vectors of parameters; expected as many, "
                "or one."
            )
        flat = source.reshape(len(source), -1, *self.source.shape)
        batch = max(len(source), len(rows))
        flat = flat.expand(batch, *flat.shape[1:])
        parts = list(self._chunks(batch if len(rows) > 1 else 1))
        again = len(parts) > 1 and torch.is_grad_enabled() and not transformed()
        again = again and (flat.requires_grad or rows.requires_grad)
        images = [
            checkpoint(self._render_part, flat, rows, *part, use_reentrant=False)
            if again
            else self._render_part(flat, rows, *part)
            for part in parts
        ]
        image = torch.cat(images, -1)
        return image.reshape(batch, *front, *self.image.shape)

    # the linear operator -----------------------------------------------------------------------

    @property
    def input_shape(self) -> Shape | None:
        return None if self._channels is None else (self._channels, *self.source.shape)

    def output_shape(self, input_shape: Shape) -> Shape:
        return self._known().output_shape(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Images (B, ..., ny, nx) of sources (B, ..., ny_s, nx_s), flux per pixel.

        Raises:
            ValueError: sources of another shape, or a lens with free parameters.
        """
        return self._known()(x)

    def adjoint(self, v: Tensor) -> Tensor:
        return self._known().adjoint(v)

    def dense(self, input_shape: Shape | None = None) -> Tensor | None:
        return self._known().dense(input_shape)

    # the source grid ---------------------------------------------------------------------------

    def flux_outside(
        self, image: Tensor | None = None, params: Params | None = None, threshold: float = 0.0
    ) -> Tensor:
        """The share of an image that is traced to outside of the source grid.

        Args:
            image: flux per pixel (..., ny, nx), without the lens' own light; None counts rays.
            params: as for ``at``.
            threshold: only pixels brighter than this count, which keeps noise out.

        Returns:
            () for one lens, (B,) for B; 0 where no pixel counts.

        Raises:
            ValueError: an image of another shape, or parameters as for ``at``.
        """
        vector = self._vector(params).detach()
        self._tracer.check(vector)
        rows = vector if vector.ndim == 2 else vector[None]
        outside = torch.cat([self._outside(rows, part) for part in self._chunks(len(rows))], -1)
        if image is None:
            share = outside.mean((-2, -1))
        else:
            if tuple(image.shape[-2:]) != self.image.shape:
                raise ValueError(
                    f"{self!r}.flux_outside: got an image of shape {tuple(image.shape)}; expected (..., "
                    f"{self.image.shape[0]}, {self.image.shape[1]})."
                )
            flux = image.detach().to(outside)
            # NaN and masked pixels do not count
            flux = torch.where(flux > threshold, flux, 0.0).reshape(-1, outside.shape[-1])
            if self._channels is not None and len(flux) == self._channels:
                lost, total = (outside * flux).sum((-2, -1)), flux.sum()
            else:
                lost, total = (outside.mean(1) * flux.sum(0)).sum(-1), flux.sum()
            share = lost / total.clamp_min(torch.finfo(total.dtype).tiny)
        return share if vector.ndim == 2 else share[0]

    def check_source_grid(
        self,
        image: Tensor | None = None,
        params: Params | None = None,
        threshold: float = 0.0,
        limit: float = _OUTSIDE,
    ) -> Tensor:
        """As ``flux_outside``, and warns (:class:`SourceGridWarning`) where it is above the limit."""
        share = self.flux_outside(image, params, threshold)
        worst = float(share.max())
        if worst > limit:
            what = "rays" if image is None else "the image's flux"
            left, right, bottom, top = self.source.extent
            warnings.warn(
                f"{worst:.1%} of {what} come from outside the source grid, x from {left:g} to {right:g} and y "
                f"from {bottom:g} to {top:g} arcsec: enlarge it, or mask these pixels.",
                SourceGridWarning,
                stacklevel=2,
            )
        return share

    # inside ------------------------------------------------------------------------------------

    def taps_at(self, params: Params | None = None) -> tuple[Tensor, Tensor]:
        """The matrix at parameters (P,) by its rows: which source pixels, and with what weights.

        Returns:
            (K, pixels, E) each, for each of the K masses; pixel ny nx is none. The weights can be differentiated.

        Raises:
            ValueError: as ``at``.
        """
        vector = self._vector(params)
        self._tracer.check(vector)
        u, v = self._places(vector[None], 0, self._pixels)
        found = [self._taps(u[0, i], v[0, i]) for i in range(u.shape[1])]
        places, weights = zip(*found, strict=True)
        return torch.stack(places), torch.stack(weights)

    def trace(self, x: Tensor, y: Tensor, params: Params | None = None) -> Tensor:
        """Where rays come from, differentiable in the parameters and the places.

        Args:
            x, y: (n,), arcsec on the image.
            params: as for ``at``.

        Returns:
            (K, 2, n), or (B, K, 2, n) for (B, P): x and y on the source plane, arcsec, for each of the K
            masses.
        """
        vector = self._vector(params)
        beta = self._tracer.trace(x, y, vector if vector.ndim == 2 else vector[None])
        return beta if vector.ndim == 2 else beta[0]

    def _vector(self, params: Params | None) -> Tensor:
        if params is None:
            if self.parameters:
                self._unknown()
            return torch.zeros(0, dtype=torch.float64)
        return self._tracer.vector(params)

    def _known(self) -> FixedLens:
        return self._fixed if self._fixed is not None else self._unknown()

    def _unknown(self) -> NoReturn:
        names = ", ".join(self.parameters)
        redshift = any(n.endswith(("z_l", "z_s")) for n in self.parameters)
        hint = " Redshifts that this mass needs were not given." if redshift else ""
        raise ValueError(
            f"{self!r}: its mass has {len(self.parameters)} free parameters ({names}), so it is not one operator."
            f"{hint} Use lens.at(params) for the operator at given ones, params of shape "
            f"({len(self.parameters)},) or (B, {len(self.parameters)}), or lens.render(source, params); or give "
            "the caustics model values for all of them."
        )

    def _chunks(self, entries: int) -> Iterator[tuple[int, int]]:
        """Ranges of pixels whose rays are traced at once."""
        per_pixel = entries * (self._channels or 1) * self.image.oversample**2
        step = max(1, _CHUNK // per_pixel)
        for begin in range(0, self._pixels, step):
            yield begin, min(begin + step, self._pixels)

    def _places(self, rows: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Column and row on the source grid of the rays of some pixels: (E, K, pixels * k^2)."""
        x, y = (c.like(rows)[begin:end].flatten() for c in (self._x, self._y))
        beta = self._tracer.trace(x, y, rows)
        u, v = self.source.to_pixel(beta[:, :, 0], beta[:, :, 1])
        return u, v

    @property
    def _factor(self) -> float:
        return self.image.area / self.source.area

    def _render_part(self, source: Tensor, rows: Tensor, begin: int, end: int) -> Tensor:
        """(B, C, pixels) of the sources (B, C, h, w)."""
        u, v = self._places(rows, begin, end)
        brightness = sample(source, u.to(source.dtype), v.to(source.dtype), self._kind)
        return self._factor * brightness.unflatten(-1, (end - begin, -1)).mean(-1)

    def _outside(self, rows: Tensor, part: tuple[int, int]) -> Tensor:
        """Share of the rays of pixels, (E, K, pixels)."""
        u, v = self._places(rows, *part)
        ny, nx = self.source.shape
        inside = (u >= -0.5) & (u <= nx - 0.5) & (v >= -0.5) & (v <= ny - 0.5)
        return (~inside).double().unflatten(-1, (part[1] - part[0], -1)).mean(-1)

    def _build(self, rows: Tensor, entries: int | None) -> FixedLens:
        """The matrices at parameters (E, P)."""
        k = self._channels or 1
        each = k * self._pixels * self.image.oversample**2
        parts = []
        with torch.no_grad():
            # rows in order: entries, their channels, pixels; small lenses together, large ones in parts
            for group in rows.split(max(1, _CHUNK // each)):
                if len(group) > 1:
                    u, v = self._places(group, 0, self._pixels)
                    parts.append(self._matrix_rows(u, v))
                    continue
                places = [self._places(group, *part) for part in self._chunks(1)]
                for channel in range(k):
                    parts += [self._matrix_rows(u[:, channel], v[:, channel]) for u, v in places]
        blocks = SparseBlocks.from_rows(parts, len(rows) * k, math.prod(self.source.shape))
        return FixedLens(blocks, self.image, self.source, entries, self._channels)

    def _matrix_rows(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the matrix, one for each k^2 rays."""
        place, weight = self._taps(u, v)
        return rows_from_taps(place, weight, math.prod(self.source.shape))

    def _taps(self, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Source pixels of each k^2 rays, those outside as one after the last, and their weights."""
        height, width = self.source.shape
        n = height * width
        columns, along_x = taps(u, width, self._kind)
        rows, along_y = taps(v, height, self._kind)
        places, weights = [], []
        for row, weight_y in zip(rows, along_y, strict=True):
            for column, weight_x in zip(columns, along_x, strict=True):
                inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                places.append(torch.where(inside, row * width + column, n))
                weights.append(weight_y * weight_x)
        index = torch.int32 if n < 2**31 - 1 else torch.int64
        entries = self.image.oversample**2 * len(places)
        place = torch.stack(places, -1).to(index).reshape(-1, entries)
        weight = torch.stack(weights, -1).reshape(-1, entries)
        return place, weight * (self._factor / self.image.oversample**2)
