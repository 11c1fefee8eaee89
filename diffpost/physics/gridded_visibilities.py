r"""Visibilities averaged in the cells of the image's own Fourier grid.

For n pixels of side p (radians) cells lie at k/(n p), k integer, and a visibility joins the nearest. In cell c

    V_c = sum_i w_i V_i/sum_i w_i,        var of each part = 1/sum_i w_i,

the V_i turned to have the middle of the image for phase centre, about which they vary least over a cell, and conjugated where
-(u, v) is the cell's side of the plane: V(-u, -v) = V(u, v)*. Taken for visibilities at the middles of their cells, they are

    V_c = exp(2 pi i k . (n - 1)/(2 n)) sum_j x_j exp(-2 pi i k . j/n),

the modes of an FFT, so that A A^T is diagonal (n_y n_x/2 for either part) and, for independent noise, so is Sigma + s A A^T: the
approach of Dia et al. (2023, arXiv:2311.18012). A mode that is its own conjugate has one real part to tell; the other is noise and is
masked. What it costs: V varies by exp(-2 pi i d . l) over a cell, half a turn from side to side for light at the edge of the
image. ``gridding_error`` measures that against :class:`~diffpost.physics.Visibilities`, which do not have it.

**Scatter.** Where noise variances are f/w_i, S = sum_i w_i |V_i - V_c|^2 over n visibilities has the expectation f nu, with
nu = 2 (n - 1), or n - 1 where one part counts. The mean's error over f^ = S/nu is Student's t with nu degrees of freedom, whose variance is
nu/(nu - 2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operators.base import LinearOperator, Parameter, Shape, numel
from diffpost.physics.grid import Grid
from diffpost.physics.visibilities import ARCSEC, PrimaryBeam, Visibilities, sky_matrix

__all__ = ["CellScatter", "GriddedVisibilities", "GriddingError"]

_LEAST = 8  # visibilities from which a cell's own scatter is taken
_FEWEST = 4  # of which three degrees of freedom are left where one part counts, and the variance of t is finite


@final
@dataclass(frozen=True)
class GriddingError:
    """By how much averaged visibilities of a sky differ from the modes that they are taken for.

    cells: (B, k) rms over the parts that count, in standard deviations of the cell's noise.
    rms: (B,) over all data, likewise.
    chi2: (B,) sum of the squares: what is added to the expectation of chi^2 at the truth, ndata.
    """

    cells: Tensor
    rms: Tensor
    chi2: Tensor


@final
@dataclass(frozen=True)
class CellScatter:
    """Noise by the scatter of visibilities within cells.

    noise: of the averaged data.
    factor: ([B,] k) noise variance over what the weights say, f^ of the cell, or ``common`` where visibilities are few.
    common: ([B,]) the same of all cells together, sum S/sum nu.
    own: (k,) whether a cell's own scatter was taken.
    """

    noise: GaussianNoise
    factor: Tensor
    common: Tensor
    own: Tensor


@final
class GriddedVisibilities(LinearOperator):
    """Cells of averaged visibilities, (B, 1, ny, nx) in Jy per pixel to (B, k, 2) in Jy: a unitary FFT times (ny nx)^1/2, at
    the k cells that hold a visibility.

    Equal to ``Visibilities(self.u, self.v, grid)`` with the grid's middle moved to the phase centre. Without a primary beam
    solves with Sigma + s A A^T are direct, and those with A P A^T for a stationary P need one iteration. ::

        A = GriddedVisibilities(u, v, w, grid)
        posterior = dp.Posterior(prior, A.likelihood(V))

    Args:
        u, v: baselines in wavelengths, of any one shape, each pair of antennas once (not its conjugate as well).
        weight: 1/sigma^2 of each part of a visibility, of the shape of u, or with a last axis of 2 whose entries agree; 0 leaves
            one out.
        grid: of the image, rotated, mirrored or off the phase centre as for ``Visibilities``.
        primary_beam: as for ``Visibilities``; A A^T is then not diagonal, and solves iterate.

    Attributes:
        u, v: (k,) middles of the cells, in wavelengths.
        weight: (k, 2) sums of weights, 0 for a part that tells nothing.
        count: (k,) visibilities in each cell.
        exact: the ``Visibilities`` that are averaged.

    Raises:
        ValueError: what ``Visibilities`` refuses; weights of another shape, negative, NaN, differing between parts, or all 0.
    """

    def __init__(
        self,
        u: Tensor,
        v: Tensor,
        weight: Tensor,
        grid: Grid,
        primary_beam: PrimaryBeam | None = None,
    ) -> None:
        self.exact = Visibilities(u, v, grid, primary_beam)
        self.grid, self.primary_beam = grid, self.exact.primary_beam
        weights = self.exact.one_weight(weight)
        self._kept = torch.nonzero(weights > 0)[:, 0]
        if not len(self._kept):
            raise ValueError(
                f"GriddedVisibilities: all {weights.numel()} weights are 0; expected a visibility that counts."
            )
        self._weights = weights[self._kept]
        # radians from a row to the next, and from a column to the next
        angles = [angle[self._kept] for angle in self.exact.angles]
        shape = grid.shape
        nearest = [
            torch.round(angle * n / (2 * math.pi)).long()
            for angle, n in zip(angles, shape, strict=True)
        ]
        mode = [k % n for k, n in zip(nearest, shape, strict=True)]
        flip = _other_half(mode, shape)
        mode = [torch.where(flip, -k % n, k) for k, n in zip(mode, shape, strict=True)]
        flat, self._cell, self.count = torch.unique(
            mode[0] * shape[1] + mode[1], return_inverse=True, return_counts=True
        )
        rows, columns = flat // shape[1], flat % shape[1]
        self._row, self._column = rows, columns
        # the frequency n/2 of an even n is its own conjugate, and is given the positive sign
        k = [torch.where(2 * rows > shape[0], rows - shape[0], rows), columns]
        phase = _middle(k, shape)
        # to the middle of the image by its own u, v; to the FFT by the cell's phase; conjugated; to the middle again
        x, y = grid.centre
        turn = torch.polar(torch.ones_like(angles[0]), (angles[0] * y + angles[1] * x) / grid.pixel)
        turn = turn * _middle(nearest, shape).conj()
        self._turn = torch.where(flip, turn.conj(), turn) * phase[self._cell]
        self._sign = torch.where(flip, -1.0, 1.0).double()
        own = (-rows % shape[0] == rows) & (-columns % shape[1] == columns)
        real = phase.real.abs() > 0.5  # where a mode is real its phase is 1, i, -1 or -i
        live = torch.stack([~own | real, ~own | ~real], -1)
        self._live = live.double()
        self._own = own
        self._phase = Parameter(torch.view_as_real(phase))
        self._mask = Parameter(self._live)
        self._beam = None if self.primary_beam is None else Parameter(self.primary_beam)
        self.weight = self._sum(self._weights)[:, None] * self._live
        self.u, self.v = _wavelengths(k, grid)

    def __repr__(self) -> str:
        return f"GriddedVisibilities({len(self.count)} cells of {len(self._kept)} baselines, {self.grid!r})"

    # the operator ------------------------------------------------------------------------------

    @property
    def input_shape(self) -> Shape:
        return (1, *self.grid.shape)

    @property
    def data_shape(self) -> Shape:
        return (len(self.count), 2)

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self.input_shape:
            raise ValueError(
                f"{self!r}: got images of shape {tuple(input_shape)}; expected {self.input_shape}."
            )
        return self.data_shape

    def __call__(self, x: Tensor) -> Tensor:
        """(B, 1, ny, nx) to (B, k, 2)."""
        self.output_shape(tuple(x.shape[1:]))
        seen = x[:, 0] if self._beam is None else x[:, 0] * self._beam.like(x)
        modes = torch.fft.rfft2(seen)[:, self._row.to(x.device), self._column.to(x.device)]
        return torch.view_as_real(modes * self._phases(x)) * self._mask.like(x)

    def adjoint(self, v: Tensor) -> Tensor:
        if tuple(v.shape[1:]) != self.data_shape:
            raise ValueError(
                f"{self!r}: adjoint got {tuple(v.shape)}; expected (B, {len(self.count)}, 2)."
            )
        ny, nx = self.grid.shape
        live = v * self._mask.like(v)
        modes = torch.complex(live[..., 0], live[..., 1]) * self._phases(v).conj()
        where = (self._row * nx + self._column).to(v.device)
        full = modes.new_zeros(len(v), ny * nx).index_add(1, where, modes)
        image = torch.fft.ifft2(full.unflatten(1, (ny, nx)), norm="forward").real
        return (image if self._beam is None else image * self._beam.like(v))[:, None]

    def _phases(self, like: Tensor) -> Tensor:
        return torch.view_as_complex(self._phase.like(like))

    @property
    def _gram(self) -> Tensor:
        """The diagonal of A A^T without a beam: a mode and its conjugate share the squares of its row, (k, 2)."""
        pixels = numel(self.grid.shape)
        return torch.where(self._own, pixels, pixels / 2).double()[:, None] * self._live

    def gram_diagonal(self, input_shape: Shape, weight: Tensor | None = None) -> Tensor | None:
        self.output_shape(input_shape)
        if self._beam is not None:
            return None
        if weight is None:
            return self._gram
        if weight.ndim > 3 and weight[0].numel() == 1:  # one an entry of a batch
            return self._gram.to(weight.device) * weight.reshape(-1, 1, 1)
        return self._gram.to(weight.device) * weight.reshape(()) if weight.numel() == 1 else None

    def near_gram(self, input_shape: Shape, power: Tensor | None = None) -> Tensor:
        """The diagonal of A P A^T, which is all of it without a primary beam."""
        self.output_shape(input_shape)
        gram = self._gram
        if self.primary_beam is not None:
            gram = gram * self.primary_beam.square().mean()
        if power is None:
            return gram
        wide = power.double().expand(torch.broadcast_shapes(power.shape, self.input_shape))
        modes = wide[..., 0, self._row.to(power.device), self._column.to(power.device)]
        return gram.to(power.device) * modes[..., None]

    # the data ----------------------------------------------------------------------------------

    def average(self, vis: Tensor) -> Tensor:
        """V_c of each cell: ([B,] *uv, 2) in Jy to ([B,] k, 2), in its dtype; 0 for a part that tells nothing.

        Raises:
            ValueError: visibilities of another shape, or NaN or infinite where their weight is not 0.
        """
        turned, batched = self._turned(vis)
        mean = self._mean(turned)
        out = (torch.view_as_real(mean) * self._live).to(vis.dtype)
        return out if batched else out[0]

    def noise(self) -> GaussianNoise:
        """Noise of the averages by the weights."""
        return GaussianNoise(weight=self.weight)

    def scatter(self, vis: Tensor, least: int = _LEAST) -> CellScatter:
        """Noise of the averages by the scatter of the visibilities: each part has the variance f^ nu/(nu - 2)/sum w, so that
        the expectation of chi^2 at the truth is ndata.

        Cells of fewer than ``least`` visibilities take f^ and nu of all cells together. Sky that varies over a cell counts as
        scatter, so that noise is too large rather than too small where gridding errs.

        Args:
            vis: ([B,] *uv, 2), Jy; a batch has noise for each entry.
            least: at least 4.

        Raises:
            ValueError: what ``average`` refuses; least below 4; no two cells' visibilities to compare; visibilities that do not
                differ at all.
        """
        if least < _FEWEST:
            raise ValueError(
                f"{self!r}: got least={least}; expected at least {_FEWEST}, below which the scatter has no finite error."
            )
        turned, batched = self._turned(vis)
        gap = torch.view_as_real(turned - self._mean(turned)[:, self._cell])
        parts = gap.square() * self._live[self._cell]
        square = self._sum(self._weights * parts.sum(-1))
        freedom = (self.count - 1) * self._live.sum(-1)
        total = freedom.sum()
        if not float(total) > 2:
            raise ValueError(
                f"{self!r}: there are {int(total)} degrees of freedom of scatter within cells, too few for their noise; use "
                "noise(), by the weights."
            )
        common = square.sum(-1) / total
        own = self.count >= least
        rough = torch.where(own, square / freedom.clamp_min(1), common[:, None])
        rounding = 1e-26 * (self._weights * turned.abs().square()).max()
        if not bool((rough > rounding).all()):
            raise ValueError(
                f"{self!r}: the visibilities of a cell do not differ at all, so their noise cannot be measured; use noise(), by "
                "the weights."
            )
        nu = torch.where(own, freedom, total)
        variance = rough * nu / (nu - 2)
        weight = self.weight / variance[..., None]
        if not batched:
            weight, rough, common = weight[0], rough[0], common[0]
        return CellScatter(GaussianNoise(weight=weight), rough, common, own)

    def likelihood(self, vis: Tensor, noise: GaussianNoise | None = None) -> Likelihood:
        """Of the averages of ``vis`` ([B,] *uv, 2).

        Args:
            noise: of the averages, as ``scatter(vis).noise`` is; None is ``noise()``.
        """
        y = self.average(vis)
        return Likelihood(y, self, self.noise() if noise is None else noise, batched=y.ndim > 2)

    def gridding_error(self, x: Tensor) -> GriddingError:
        """What averaging the exact visibilities of skies leaves beside this operator, in units of the noise by the weights.

        Args:
            x: (B, 1, ny, nx), Jy per pixel. In a wider image, with zeros around the sky, cells are finer.

        Raises:
            ValueError: images of another shape.
        """
        gap = self.average(self.exact(x.double())) - self(x.double())
        squares = gap.square() * self.weight
        live = self._live.sum(-1)
        chi2 = squares.sum((-2, -1))
        return GriddingError((squares.sum(-1) / live).sqrt(), (chi2 / live.sum()).sqrt(), chi2)

    def _turned(self, vis: Tensor) -> tuple[Tensor, bool]:
        """Visibilities that count, as their cells have them: (B, m) complex128; and whether there was a batch axis."""
        shape = self.exact.data_shape
        batched = vis.ndim == len(shape) + 1
        if tuple(vis.shape[batched:]) != shape:
            raise ValueError(
                f"{self!r}: got visibilities of shape {tuple(vis.shape)}; expected {shape} with real and imaginary parts last, or a "
                "batch of them."
            )
        parts = vis.detach().to("cpu", torch.float64).reshape(-1, numel(shape[:-1]), 2)
        parts = parts[:, self._kept]
        if not bool(parts.isfinite().all()):
            raise ValueError(
                f"{self!r}: {int((~parts.isfinite()).any(-1).sum())} visibilities are NaN or infinite; give them weight 0."
            )
        return torch.complex(parts[..., 0], parts[..., 1] * self._sign) * self._turn, batched

    def _mean(self, turned: Tensor) -> Tensor:
        return self._sum(self._weights * turned) / self._sum(self._weights)

    def _sum(self, values: Tensor) -> Tensor:
        """Sums over the visibilities of each cell: (..., m) to (..., k)."""
        zero = values.new_zeros(*values.shape[:-1], len(self.count))
        return zero.index_add(-1, self._cell, values)


def _other_half(mode: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """Whether the conjugate of a mode (rows, columns of the FFT) is the one that rfft2 keeps, and is kept here."""
    (rows, columns), (ny, nx) = mode, shape
    edge = (columns == 0) | (2 * columns == nx)
    return (2 * columns > nx) | (edge & (2 * rows > ny))


def _middle(k: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """exp(2 pi i k . (n - 1)/(2 n)), the phase of the middle of the image seen from its first pixel."""
    angle = sum(
        k_.double() * (math.pi * (n - 1) / n) for k_, n in zip(k, shape, strict=True)
    ) + torch.zeros(k[0].shape, dtype=torch.float64)
    return torch.polar(torch.ones_like(angle), angle)


def _wavelengths(k: list[Tensor], grid: Grid) -> tuple[Tensor, Tensor]:
    """u, v of frequencies of the rows and columns, in cycles over the image."""
    (ny, nx), step = grid.shape, ARCSEC * grid.pixel
    down, right = k[0].double() / (ny * step), k[1].double() / (nx * step)
    (east_x, east_y), (north_x, north_y) = sky_matrix(grid)
    return east_x * right + east_y * down, north_x * right + north_y * down
