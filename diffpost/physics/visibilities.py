r"""Visibilities of an image, without gridding.

An interferometer measures, for baselines (u, v) in wavelengths,

    V(u, v) = sum_j x_j B_j exp(-2 pi i (u l_j + v m_j)),

l and m the direction cosines of pixel j towards east and north (docs/conventions.md), B the primary beam, x in Jy per pixel: a
Fourier transform of type 2, by finufft (Barnett, Magland & af Klinteberg 2019, arXiv:1808.06736) to a requested accuracy;
the adjoint is type 1. With the same weight w for the real and the imaginary part of a datum,

    (A^T W A x)_j = B_j sum_j' T(j - j') B_j' x_j',      T(d) = sum_k w_k cos(2 pi (u_k l_d + v_k m_d)),

depends on the difference of two pixels only: a convolution, two FFTs of twice the side and no visibility any more
(:class:`NormalOperator`). The curvature of the sky, the term w (sqrt(1 - l^2 - m^2) - 1), is left out; ``w_phase`` bounds what that
turns phases by.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from diffpost.operators.base import LinearOperator, Parameter, Shape
from diffpost.physics.grid import Grid

try:
    import finufft
except ImportError as error:  # pragma: no cover
    raise ImportError(
        "visibilities need finufft: pip install finufft, or 'diffpost[vis]'"
    ) from error

__all__ = ["NormalOperator", "Visibilities", "w_phase"]

ARCSEC = math.pi / 180 / 3600
_METRES = 2e4  # baselines of a radio interferometer are longer than this, in wavelengths; none is, in metres
_PLANS = 4

PrimaryBeam = Tensor | Callable[[Tensor], Tensor]


def w_phase(w: Tensor, grid: Grid) -> float:
    """The largest phase in radians that the neglected w term turns a corner of the grid by: 2 pi |w| (1 - sqrt(1 - r^2)).

    Args:
        w: third components of the baselines, in wavelengths.
        grid: the image, centred on the phase centre or not.
    """
    left, right, bottom, top = grid.extent
    r = ARCSEC * math.hypot(max(-left, right), max(-bottom, top))
    return float(2 * math.pi * w.double().abs().max() * (1 - math.sqrt(max(1 - r**2, 0.0))))


@final
class Visibilities(LinearOperator):
    """V(u, v) of images (B, 1, ny, nx) in Jy per pixel: (B, *uv, 2), real parts first, in Jy.

    Args:
        u, v: baselines in wavelengths, of any one shape: (m,), or (channels, m) for several frequencies. Data of weight 0 may
            have any finite baseline.
        grid: of the image; its ``sky`` tells a rotation, without one north is up and east is left.
        primary_beam: factors (ny, nx), or a function of the distance from x = y = 0 in arcsec, a tensor like it; None is 1.
        accuracy: of the transform, relative to its largest possible value sum |x|; computed in float64 whatever the
            image is.

    Attributes:
        angles: radians by which the phase turns from a row to the next and from a column to the next, (m,) each.

    Raises:
        ValueError: u and v of different or empty shapes, NaN or infinite; longer than the pixels resolve, with the
            largest pixel that would; so short that they must be in metres; a beam that does not fit; accuracy
            outside 1e-14 to 1e-2.
    """

    def __init__(
        self,
        u: Tensor,
        v: Tensor,
        grid: Grid,
        primary_beam: PrimaryBeam | None = None,
        accuracy: float = 1e-10,
    ) -> None:
        u, v = torch.as_tensor(u).double(), torch.as_tensor(v).double()
        if u.shape != v.shape or u.numel() == 0 or u.ndim == 0:
            raise ValueError(
                f"Visibilities: got u {tuple(u.shape)} and v {tuple(v.shape)}; expected the same shape, (m,) or more, not "
                "empty."
            )
        if not bool((u.isfinite() & v.isfinite()).all()):
            raise ValueError(
                "Visibilities: u or v holds NaN or infinity; drop those data, or give them weight 0 and u = v = 0."
            )
        if not 1e-14 <= accuracy <= 1e-2:
            raise ValueError(
                f"Visibilities(accuracy={accuracy}): expected 1e-14 to 1e-2, relative to sum |x|."
            )
        self.u, self.v, self.grid, self.accuracy = u, v, grid, float(accuracy)
        self.angles = self._angles(u, v, grid)
        self._check_resolved(u, v)
        self.primary_beam = _beam(primary_beam, grid)
        self._factor = None if self.primary_beam is None else Parameter(self.primary_beam)
        self._phase = Parameter(torch.view_as_real(self._shift()))
        self._plans = _Plans()

    @staticmethod
    def _angles(u: Tensor, v: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Radians by which the phase turns from one row, and from one column, to the next: each (m,)."""
        (east_x, east_y), (north_x, north_y) = sky_matrix(grid)
        step = 2 * math.pi * ARCSEC * grid.pixel
        rows = step * (u * east_y + v * north_y)
        columns = step * (u * east_x + v * north_x)
        return rows.reshape(-1).contiguous(), columns.reshape(-1).contiguous()

    def _check_resolved(self, u: Tensor, v: Tensor) -> None:
        largest = float(torch.maximum(*(angle.abs().max() for angle in self.angles)))
        longest = float(torch.hypot(u, v).max())
        if largest > math.pi * (1 + 1e-9):
            cell = self.grid.pixel * math.pi / largest
            raise ValueError(
                f"Visibilities: baselines of up to {longest:.4g} wavelengths are longer than pixels of {self.grid.pixel:g} arcsec "
                f"resolve; the cell is at most {cell:.4g} arcsec."
            )
        width = max(self.grid.shape) * self.grid.pixel * ARCSEC
        if 0 < longest < _METRES and longest * width < 0.5:
            raise ValueError(
                f"Visibilities: the longest baseline is {longest:.4g} wavelengths, of which not half a fringe fits the image of "
                f"{width / ARCSEC:.4g} arcsec. Are u and v in metres? Divide them by the wavelength in metres."
            )

    def _shift(self) -> Tensor:
        """exp(-i phase of the pixel (ny // 2, nx // 2)), from which finufft counts: (m,) complex."""
        rows, columns = self.angles
        (ny, nx), (x, y) = self.grid.shape, self.grid.centre
        down = ny // 2 - (ny - 1) / 2 + y / self.grid.pixel
        right = nx // 2 - (nx - 1) / 2 + x / self.grid.pixel
        return torch.polar(torch.ones_like(rows), -(rows * down + columns * right))

    def __repr__(self) -> str:
        return f"Visibilities({self.u.numel()} baselines, {self.grid!r})"

    @property
    def input_shape(self) -> Shape:
        return (1, *self.grid.shape)

    @property
    def data_shape(self) -> Shape:
        return (*self.u.shape, 2)

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self.input_shape:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}; expected {self.input_shape}."
            )
        return self.data_shape

    def __call__(self, x: Tensor) -> Tensor:
        """V: (B, 1, ny, nx) to (B, *uv, 2)."""
        self.output_shape(tuple(x.shape[1:]))
        out: Tensor = _Transform.apply(x, self, False)
        return out

    def adjoint(self, v: Tensor) -> Tensor:
        if tuple(v.shape[1:]) != self.data_shape:
            raise ValueError(
                f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, {', '.join(map(str, self.data_shape))})."
            )
        out: Tensor = _Transform.apply(v, self, True)
        return out

    def normal(self, weight: Tensor) -> NormalOperator:
        """A^T W A as a convolution; W = diag(weight) with one weight for both parts of a datum.

        Args:
            weight: inverse variances, of the shape of u, or with a last axis of 2 whose entries agree; not negative.

        Raises:
            ValueError: another shape, or negative or differing weights.
        """
        w = self.one_weight(weight)
        (ny, nx) = self.grid.shape
        rows, columns = self.angles
        # differences from -n to n - 1, zero at n: type 1, without the beam and the phase centre
        sums = self._plans.run(
            1, (2 * ny, 2 * nx), rows, columns, w.to(torch.complex128)[None], self.accuracy
        )
        return NormalOperator(torch.fft.ifftshift(sums[0].real), self.primary_beam, self.grid)

    def one_weight(self, weight: Tensor) -> Tensor:
        """The weight of each visibility, (m,) float64, of one for all, one for each, or two for each that agree.

        Raises:
            ValueError: another shape, parts that differ, negative, NaN or infinite.
        """
        w = torch.as_tensor(weight).double()
        if tuple(w.shape) == self.data_shape:
            if not torch.allclose(w[..., 0], w[..., 1], rtol=1e-6, atol=0.0):
                raise ValueError(
                    f"{self!r}: the weights of real and imaginary parts differ, and A^T W A is no convolution; expected one "
                    "weight for both."
                )
            w = w[..., 0]
        if w.ndim == 0:
            w = w.expand(self.u.shape)
        if w.shape != self.u.shape or bool((w < 0).any()) or not bool(w.isfinite().all()):
            raise ValueError(
                f"{self!r}: got weights of shape {tuple(weight.shape)}; expected {tuple(self.u.shape)}, finite and not negative."
            )
        return w.reshape(-1)

    def _run(self, value: Tensor, adjoint: bool) -> Tensor:
        """The transform or its adjoint, in float64, back in the dtype of the value."""
        rows, columns = (angle.to(value.device) for angle in self.angles)
        phase = torch.view_as_complex(self._phase.like(value.double()))
        beam = None if self._factor is None else self._factor.like(value.double())
        shape = self.grid.shape
        if adjoint:
            data = torch.view_as_complex(value.double().reshape(len(value), -1, 2).contiguous())
            image = self._plans.run(1, shape, rows, columns, data * phase.conj(), self.accuracy)
            image = image.real if beam is None else image.real * beam
            return image[:, None].to(value.dtype)
        image = value[:, 0].double()
        image = image if beam is None else image * beam
        data = self._plans.run(2, shape, rows, columns, image.to(torch.complex128), self.accuracy)
        out = torch.view_as_real(data * phase).reshape(len(value), *self.data_shape)
        return out.to(value.dtype)


class _Transform(torch.autograd.Function):
    """A x or A^T v, whose derivative is A^T or A: nothing is recorded inside."""

    @staticmethod
    def forward(value: Tensor, operator: Visibilities, adjoint: bool) -> Tensor:
        return operator._run(value.detach(), adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.operator, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Transform.apply(gradient, ctx.operator, not ctx.adjoint), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        out: Tensor = _Transform.apply(tangent, ctx.operator, ctx.adjoint)
        return out


@final
class _Plans:
    """finufft's plans, made once for each size of batch and kind of transform."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, Any] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Plans:
        return _Plans()

    def __reduce__(self) -> Any:
        return _Plans, ()

    def run(
        self,
        kind: int,
        shape: tuple[int, int],
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        accuracy: float,
    ) -> Tensor:
        """Type 1, (B, m) to (B, *shape) with exp(+i ...), or 2, back with exp(-i ...); pixels count from shape // 2."""
        cuda = values.device.type == "cuda"
        key = (kind, shape, len(values), accuracy, values.device)
        if key not in self._kept:
            maker: Any = _cuda_plan if cuda else finufft.Plan
            isign = 1 if kind == 1 else -1
            plan = maker(kind, shape, len(values), accuracy, isign, dtype="complex128")
            points = (rows, columns) if cuda else (rows.numpy(), columns.numpy())
            plan.setpts(*points)
            self._kept[key] = plan
            while len(self._kept) > _PLANS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        plan = self._kept[key]
        if cuda:
            out: Tensor = plan.execute(values.contiguous())
            return out.reshape(len(values), *(shape if kind == 1 else (-1,)))
        found = plan.execute(np.ascontiguousarray(values.numpy()))
        return torch.from_numpy(np.asarray(found)).reshape(
            len(values), *(shape if kind == 1 else (-1,))
        )


def _cuda_plan(*arguments: Any, **keywords: Any) -> Any:
    try:
        import cufinufft
    except ImportError as error:
        raise ValueError(
            "visibilities of images on CUDA need cufinufft: pip install cufinufft, or keep the images on the CPU."
        ) from error
    return cufinufft.Plan(*arguments, **keywords)


@final
class NormalOperator(LinearOperator):
    """A^T W A of visibilities: symmetric, images (B, 1, ny, nx) to images.

    Args:
        kernel: T of the differences of pixels, (2 ny, 2 nx), zero first, as fft2 lays out its input.
        beam: primary beam (ny, nx), or None.
        grid: of the images.
    """

    def __init__(self, kernel: Tensor, beam: Tensor | None, grid: Grid) -> None:
        (ny, nx) = grid.shape
        kernel = kernel.double().clone()
        kernel[ny, :] = 0.0  # a difference of n does not occur, and has no mirror image
        kernel[:, nx] = 0.0
        self.kernel, self.grid = kernel, grid
        self._spectrum = Parameter(torch.fft.rfft2(kernel).real)
        self._beam = None if beam is None else Parameter(beam)

    def __repr__(self) -> str:
        return f"NormalOperator({self.grid!r})"

    @property
    def input_shape(self) -> Shape:
        return (1, *self.grid.shape)

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self.input_shape:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}; expected {self.input_shape}."
            )
        return self.input_shape

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        (ny, nx) = self.grid.shape
        size = (2 * ny, 2 * nx)
        seen = x if self._beam is None else x * self._beam.like(x)
        # half of the rows are zero on the way in, and not wanted on the way out
        modes = torch.fft.fft(torch.fft.rfft(seen, n=size[1]), n=size[0], dim=-2)
        rows = torch.fft.ifft(modes * self._spectrum.like(x), dim=-2)[..., :ny, :]
        part = torch.fft.irfft(rows, n=size[1])[..., :nx]
        return part if self._beam is None else part * self._beam.like(x)

    def adjoint(self, v: Tensor) -> Tensor:
        return self(v)

    def dense(self, input_shape: Shape | None = None) -> Tensor:
        """The matrix (n, n), float64, over flattened pixels."""
        (ny, nx) = self.grid.shape
        i = torch.arange(ny * nx)
        row, column = i // nx, i % nx
        down = (row[:, None] - row) % (2 * ny)
        right = (column[:, None] - column) % (2 * nx)
        matrix = self.kernel[down, right]
        if self._beam is not None:
            flat = self._beam.value.double().reshape(-1)
            matrix = matrix * flat[:, None] * flat
        return matrix


def sky_matrix(grid: Grid) -> tuple[tuple[float, float], tuple[float, float]]:
    """East and north in terms of the grid's x and y: ((east_x, east_y), (north_x, north_y))."""
    return ((-1.0, 0.0), (0.0, 1.0)) if grid.sky is None else grid.sky.matrix


def _beam(beam: PrimaryBeam | None, grid: Grid) -> Tensor | None:
    if beam is None:
        return None
    if not isinstance(beam, Tensor):
        x, y = grid.coordinates()
        beam = beam(torch.hypot(x, y))
    beam = beam.double()
    if tuple(beam.shape) != grid.shape or not bool(beam.isfinite().all()):
        raise ValueError(
            f"Visibilities: got a primary beam of shape {tuple(beam.shape)}; expected finite factors {grid.shape}."
        )
    return beam
