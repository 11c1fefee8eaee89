r"""Closure phases and log closure amplitudes: what visibilities say whatever the gains of the antennas are.

An antenna's gain g_i multiplies all its baselines, V_ij -> g_i conj(g_j) V_ij, and cancels in (Blackburn et al. 2020,
arXiv:1910.02062)

    psi_ijk = arg(V_ij V_jk V_ki),              ln C_ijkl = ln |V_ij| |V_kl| / (|V_ik| |V_jl|).

Both are linear in ln V = ln |V| + i arg V: psi = D arg V (mod 2 pi), ln C = Q ln |V|, with entries of D and Q of 0 and +-1. At a
signal-to-noise ratio rho = |V|/sigma (sigma: of each part) the noise of ln V is 1/rho in both parts, independent of each other to
first order, so that, with S = diag(rho^-2),

    Cov psi = D S D^T,     Cov ln C = Q S Q^T,     Cov(psi, ln C) = 0,

full within a time and a channel, since closures share baselines, and zero between them. A minimal set, as many closures as are
independent, has all the information, and any such set the same chi^2 while no difference of phases is near half a turn; of all
triangles and quadrangles the best are taken first, those that the ones before them determine left out.

**What is Gaussian.** ``Closures`` returns L^-1 (psi - psi_obs, ln C - ln C_obs), L L^T the covariance, with each difference of phases
taken to its nearest turn, (-pi, pi]; the data are zeros with noise of unit variance. A closure phase of three baselines at rho = 3 has a
standard deviation of 0.58, so that pi is at 5.4 of them and the wrapped Gaussian is the Gaussian; below, phases are not Gaussian,
and ``min_snr`` leaves such baselines out before closures are formed. Sines instead of angles would be smooth, but also vanish at pi.

**Bias.** ln |V| needs no debiasing: E ln |1 + z| = E_1(rho^2/2)/2 for z isotropic of variance 2/rho^2, which is 1e-3 at rho = 3
(the mean of ln |1 + z| over a circle is ln max(1, |z|)). The debiased |V|^2 - sigma^2 of amplitudes (Chael et al. 2018,
arXiv:1803.07088) would bias it by -rho^-2/2, which is why codes that debias amplitudes add that back. rho itself is
debiased so: then E (|V|^2/sigma^2 - 1) |delta ln V|^2 = 2 up to terms of rho^-4.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operators.base import LinearOperator, Operator, Parameter, Shape
from diffpost.physics.scans import scan_numbers

__all__ = ["Closures"]

_ANTENNAS = 20  # at one time; of 20 there are 14,535 quadrangles

Matrix = NDArray[np.float64]
Ints = NDArray[np.int64]
Edges = tuple[tuple[int, int], ...]


@final
class Closures(Operator):
    """Whitened differences of a model's closures from those observed: visibilities (B, *uv, 2) to (B, k), noise of variance 1.

    ``Closures(...) @ Visibilities(u, v, grid)`` maps images; ``likelihood`` makes the likelihood. Closures do not know the total
    flux nor where on the sky the source is: the prior must. A model visibility of exactly 0 has no closures (NaN).

    Args:
        vis: observed visibilities (*uv, 2), real parts first, Jy.
        weight: 1/sigma^2 of each part, of the shape uv, 1/Jy^2; 0 leaves a visibility out.
        antenna1, antenna2: numbers, broadcastable to uv.
        time: MJD in days, broadcastable to uv; what is at most ``interval`` apart counts as taken at once.
        channel: numbers, broadcastable to uv; None: all axes of uv but the last count channels.
        min_snr: baselines of a lower signal-to-noise ratio, (|V|^2/sigma^2 - 1)^(1/2), are left out.
        interval: seconds. ``averaged`` over common intervals (``scan_numbers``) gives all baselines the same times.
        amplitude: |V| in Jy, of the shape uv, at which the noise is propagated, a good model's; None takes those observed,
            debiased, whose own noise changes chi^2 by a share of some rho^-2.

    Attributes:
        triangles: (t, 3) antennas i, j, k of each closure phase; quadrangles: (q, 4) i, j, k, l of each log closure amplitude.
        phases: (t,) those observed, rad; log_amplitudes: (q,).
        missing: how many independent closure phases and amplitudes no triangle and no quadrangle of baselines makes.
        used: how many visibilities are in some closure.

    Raises:
        ValueError: shapes that do not fit; values that are not finite; a baseline twice at a time; more than 20 antennas at
            a time; or no closure at all.
    """

    def __init__(
        self,
        vis: Tensor,
        weight: Tensor,
        antenna1: Tensor,
        antenna2: Tensor,
        time: Tensor,
        channel: Tensor | None = None,
        *,
        min_snr: float = 3.0,
        interval: float = 1.0,
        amplitude: Tensor | None = None,
    ) -> None:
        vis, weight = torch.as_tensor(vis), torch.as_tensor(weight).double()
        if vis.is_complex() or vis.ndim < 2 or vis.shape[-1] != 2 or vis.shape[:-1] != weight.shape:
            raise ValueError(
                f"Closures: got visibilities {tuple(vis.shape)} of {vis.dtype} and weights {tuple(weight.shape)}; expected (*uv, 2), "
                "real parts first (torch.view_as_real), and uv."
            )
        if not min_snr >= 0:
            raise ValueError(f"Closures(min_snr={min_snr}): expected 0 or more.")
        self._uv: Shape = tuple(weight.shape)
        value = torch.view_as_complex(vis.double().contiguous()).reshape(-1)
        w = weight.reshape(-1)
        here = w > 0
        if not bool((w >= 0).all() & w.isfinite().all() & (value.isfinite() | ~here).all()):
            raise ValueError(
                "Closures: got NaN or infinite visibilities, or weights that are negative or not finite; give such data weight 0."
            )
        first, second = (self._flat(a, "antenna").numpy() for a in (antenna1, antenna2))
        scan = scan_numbers(self._flat(time, "time"), interval).numpy()
        band = self._channels() if channel is None else self._flat(channel, "channel").numpy()
        snr2 = torch.where(here, value.abs().square() * w - 1, -1.0)
        good = here.numpy() & (snr2 >= min_snr**2).numpy() & (snr2 > 0).numpy() & (first != second)
        if amplitude is not None:
            size = self._flat(amplitude, "amplitude").double()
            if not bool((size[torch.from_numpy(good)] > 0).all()):
                raise ValueError(
                    "Closures: got an amplitude that is not positive where data are used; expected a model's |V| in Jy."
                )
            snr2 = size.square() * w
        variance = np.where(good, 1 / np.where(good, snr2.numpy(), 1.0), np.inf)

        phases, amplitudes = _Family(3), _Family(4)
        missing = np.zeros(2, dtype=int)
        for rows in _blocks(scan, band, good):
            edges, sign = _edges(first[rows], second[rows])
            known = _candidates(edges)
            missing += known.missing
            phases.add(known.triangles, rows, sign, variance[rows])
            amplitudes.add(known.quadrangles, rows, np.ones_like(sign), variance[rows])
        if not phases.count and not amplitudes.count:
            raise ValueError(
                f"Closures: {int(good.sum())} of {len(w)} visibilities have a signal-to-noise ratio of {min_snr:g}, and no three of them make a "
                f"triangle at one time (within {interval:g} s); expected at least 3 antennas at once. Average longer, "
                "raise interval, or lower min_snr."
            )
        self._phases, self._amplitudes = phases.whitened(), amplitudes.whitened()
        self.triangles = torch.from_numpy(self._phases.antennas)
        self.quadrangles = torch.from_numpy(self._amplitudes.antennas)
        self.missing = (int(missing[0]), int(missing[1]))
        self.used = len(np.unique(np.r_[self._phases.rows.ravel(), self._amplitudes.rows.ravel()]))
        safe = torch.where(torch.from_numpy(good), value, 1.0)[None]
        self.phases = _wrapped(self._phases.close(safe.angle()))[0]
        self.log_amplitudes = self._amplitudes.close(safe.abs().log())[0]
        self._observed = Parameter(self.phases), Parameter(self.log_amplitudes)

    def _flat(self, values: Tensor, name: str) -> Tensor:
        values = torch.as_tensor(values)
        try:
            wide = values.expand(self._uv)
        except RuntimeError:
            raise ValueError(
                f"Closures: got {name} of shape {tuple(values.shape)}; expected {self._uv}, as the weights have, or what broadcasts to it."
            ) from None
        return wide.reshape(-1)

    def _channels(self) -> Ints:
        last = self._uv[-1]
        count = math.prod(self._uv[:-1])
        return np.repeat(np.arange(count), last)

    def __repr__(self) -> str:
        return f"Closures({len(self.phases)} phases, {len(self.log_amplitudes)} log amplitudes)"

    @property
    def input_shape(self) -> Shape:
        return (*self._uv, 2)

    def output_shape(self, input_shape: Shape) -> Shape:
        if tuple(input_shape) != self.input_shape:
            raise ValueError(
                f"{self!r}: got visibilities of shape {tuple(input_shape)}; expected {self.input_shape}."
            )
        return (len(self.phases) + len(self.log_amplitudes),)

    def closures(self, vis: Tensor) -> tuple[Tensor, Tensor]:
        """Closure phases in (-pi, pi], rad, and log closure amplitudes of visibilities (B, *uv, 2): (B, t) and (B, q), float64."""
        value = self._complex(vis)
        phase, size = self._phases.close(value.angle()), self._amplitudes.close(value.abs().log())
        return _wrapped(phase), size

    def __call__(self, x: Tensor) -> Tensor:
        phase, size = self.closures(x)
        psi, amplitude = (part.like(phase) for part in self._observed)
        white = (
            self._phases.whiten(_wrapped(phase - psi)),
            self._amplitudes.whiten(size - amplitude),
        )
        return torch.cat(white, 1).to(x.dtype)

    def linearize(self, x: Tensor) -> LinearOperator:
        """L^-1 (D Im, Q Re) (dV/V) at the visibilities x (B, *uv, 2)."""
        return _Derivative(self, self._complex(x))

    def likelihood(self, visibilities: Operator) -> Likelihood:
        """The likelihood of images: zeros observed, unit noise.

        Args:
            visibilities: from images to (*uv, 2), ``Visibilities`` of the same u, v, alone or after other operators.

        Raises:
            ValueError: an operator that makes visibilities of another shape.
        """
        made = visibilities.data_shape
        if made is not None:
            self.output_shape(made)
        zeros = torch.zeros(len(self.phases) + len(self.log_amplitudes), dtype=torch.float64)
        return Likelihood(zeros, self @ visibilities, GaussianNoise(std=1.0), batched=False)

    def _complex(self, vis: Tensor) -> Tensor:
        """(B, m) complex128."""
        self.output_shape(tuple(vis.shape[1:]))
        return torch.view_as_complex(vis.double().reshape(len(vis), -1, 2).contiguous())

    def _derivative(self, g: Tensor) -> Tensor:
        """Of dV/V, (B, m) complex: (B, k)."""
        parts = (
            self._phases.whiten(self._phases.close(g.imag)),
            self._amplitudes.whiten(self._amplitudes.close(g.real)),
        )
        return torch.cat(parts, 1)

    def _derivative_adjoint(self, c: Tensor) -> Tensor:
        """(B, k) to h (B, m) complex with <c, derivative g> = Re sum conj(h) g."""
        phase, size = c.split([len(self.phases), len(self.log_amplitudes)], 1)
        m = math.prod(self._uv)
        imag = self._phases.spread(self._phases.whiten_adjoint(phase), m)
        real = self._amplitudes.spread(self._amplitudes.whiten_adjoint(size), m)
        return torch.complex(real, imag)


@final
class _Derivative(LinearOperator):
    """Of closures at visibilities (B, m): entry b of its input meets entry b of these."""

    def __init__(self, closures: Closures, at: Tensor) -> None:
        self.closures, self.at = closures, at

    def __repr__(self) -> str:
        return f"{self.closures!r}.linearize({len(self.at)} entries)"

    @property
    def input_shape(self) -> Shape:
        return self.closures.input_shape

    @property
    def batch(self) -> int:
        return len(self.at)

    def select(self, ids: Tensor) -> _Derivative:
        return _Derivative(self.closures, self.at[ids.to(self.at.device)])

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.closures.output_shape(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        g = self.closures._complex(x) / self.at
        return self.closures._derivative(g).to(x.dtype)

    def adjoint(self, v: Tensor) -> Tensor:
        expected = (len(self.at), *self.output_shape(self.input_shape))
        if tuple(v.shape) != expected:
            raise ValueError(f"{self!r}: adjoint got {tuple(v.shape)}; expected {expected}.")
        h = self.closures._derivative_adjoint(v.double()) / self.at.conj()
        return torch.view_as_real(h).reshape(len(v), *self.input_shape).to(v.dtype)


def _wrapped(angle: Tensor) -> Tensor:
    """The nearest turn, in (-pi, pi]; exact for angles that are there already."""
    return angle - 2 * math.pi * torch.ceil((angle - math.pi) / (2 * math.pi))


# Which closures -----------------------------------------------------------------------------------


@final
class _Shapes:
    """All closures of one kind that some baselines make.

    members: (n, s) numbers of the baselines of each; signs: theirs; antennas: (n, s).
    """

    def __init__(
        self, found: Sequence[tuple[tuple[int, ...], ...]], size: int, baselines: int
    ) -> None:
        table = np.array(found, dtype=np.int64).reshape(-1, 3, size)
        self.members, self.signs, self.antennas = table[:, 0], table[:, 1], table[:, 2]
        self.baselines = baselines

    def matrix(self, chosen: Ints | slice, sign: Matrix) -> Matrix:
        """Rows of D or Q: (n, baselines)."""
        members = self.members[chosen]
        out = np.zeros((len(members), self.baselines))
        values = self.signs[chosen] * sign[members]
        np.put_along_axis(out, members, values, 1)
        return out

    def independent(self, variance: Matrix) -> Ints:
        """A minimal set, the least noisy first: the pivots of an elimination whose columns are in that order."""
        order = np.argsort(variance[self.members].sum(1), kind="stable")
        left = self.matrix(order, np.ones(self.baselines)).T
        found: list[int] = []
        while left.size:
            size = np.abs(left)
            alive = size.max(0) > 1e-9
            if not alive.any():
                break
            column = int(np.argmax(alive))
            row = int(np.argmax(size[:, column]))
            pivot = left[row]
            rest = np.delete(left, row, 0)
            left = rest - np.outer(rest[:, column] / pivot[column], pivot)
            found.append(int(order[column]))
        return np.array(found, dtype=np.int64)


@final
class _Candidates:
    """The triangles and quadrangles of a set of baselines, and how many independent closures they do not make."""

    def __init__(self, edges: Edges) -> None:
        number = {edge: k for k, edge in enumerate(edges)}
        antennas = sorted({a for edge in edges for a in edge})
        if len(antennas) > _ANTENNAS:
            raise ValueError(
                f"Closures: got {len(antennas)} antennas at one time; expected at most {_ANTENNAS}. For arrays as large, solve for gains "
                "instead (AntennaGains)."
            )
        triangles, quadrangles = [], []
        for i, j, k in itertools.combinations(antennas, 3):
            three = ((i, j), (j, k), (i, k))
            if all(side in number for side in three):
                triangles.append((tuple(number[s] for s in three), (1, 1, -1), (i, j, k)))
        for i, j, k, l_ in itertools.combinations(antennas, 4):
            pairs = [((i, j), (k, l_)), ((i, k), (j, l_)), ((i, l_), (j, k))]
            for (a, b), (c, d) in itertools.combinations(pairs, 2):
                sides = (a, b, c, d)
                if all(side in number for side in sides):
                    # |V_ip| |V_qr| over |V_iq| |V_pr|: both pairs of baselines begin with i
                    named = (i, a[1], c[1], *(set(b) - {c[1]}))
                    quadrangles.append((tuple(number[s] for s in sides), (1, 1, -1, -1), named))
        self.triangles = _Shapes(triangles, 3, len(edges))
        self.quadrangles = _Shapes(quadrangles, 4, len(edges))
        place = {a: n for n, a in enumerate(antennas)}
        turns, sizes = np.zeros((2, len(edges), len(antennas)))
        for (one, other), at in number.items():
            turns[at, [place[one], place[other]]] = 1, -1
            sizes[at, [place[one], place[other]]] = 1
        self.missing = np.array(
            [
                len(edges) - _rank(gains) - _rank(shapes.matrix(slice(None), np.ones(len(edges))))
                for gains, shapes in ((turns, self.triangles), (sizes, self.quadrangles))
            ]
        )


def _rank(matrix: Matrix) -> int:
    return int(np.linalg.matrix_rank(matrix)) if matrix.size else 0


@functools.lru_cache(maxsize=256)
def _candidates(edges: Edges) -> _Candidates:
    return _Candidates(edges)


def _blocks(scan: Ints, band: Ints, good: NDArray[np.bool_]) -> list[Ints]:
    """Rows of good data of each time and channel."""
    chosen = np.flatnonzero(good)
    if not len(chosen):
        return []
    _, block = np.unique(np.stack([scan[chosen], band[chosen]], 1), axis=0, return_inverse=True)
    order = np.argsort(block.reshape(-1), kind="stable")
    begins = np.flatnonzero(np.diff(block.reshape(-1)[order])) + 1
    return np.split(chosen[order], begins)


def _edges(first: Ints, second: Ints) -> tuple[Edges, Matrix]:
    """Baselines with the lower antenna first, and -1 where V is that of the other direction."""
    low, high = np.minimum(first, second), np.maximum(first, second)
    edges: Edges = tuple(zip(low.tolist(), high.tolist(), strict=True))
    if len(set(edges)) < len(edges):
        twice = next(edge for edge in edges if edges.count(edge) > 1)
        raise ValueError(
            f"Closures: the baseline of antennas {twice[0]} and {twice[1]} occurs twice at one time and channel; average the visibilities, "
            "give channel, or lower interval."
        )
    return edges, np.where(first < second, 1.0, -1.0)


# What they do -------------------------------------------------------------------------------------


@final
class _Family:
    """Closures of one kind, collected block by block."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0
        self.rows: list[Ints] = []
        self.signs: list[Matrix] = []
        self.antennas: list[Ints] = []
        self.inverses: list[Matrix] = []

    def add(self, shapes: _Shapes, rows: Ints, sign: Matrix, variance: Matrix) -> None:
        chosen = shapes.independent(variance)
        if not len(chosen):
            return
        members = shapes.members[chosen]
        d = shapes.matrix(chosen, sign)
        root = np.linalg.cholesky(d * variance @ d.T)
        self.inverses.append(np.linalg.inv(root))
        self.rows.append(rows[members])
        self.signs.append(shapes.signs[chosen] * sign[members])
        self.antennas.append(shapes.antennas[chosen])
        self.count += len(chosen)

    def whitened(self) -> _Whitened:
        return _Whitened(self)


@final
class _Whitened:
    """D, its transpose, and the whitening of its blocks, padded to the largest."""

    def __init__(self, family: _Family) -> None:
        s = family.size
        self.rows: Ints = np.concatenate([*family.rows, np.zeros((0, s), dtype=np.int64)])
        self.antennas: Ints = np.concatenate([*family.antennas, np.zeros((0, s), dtype=np.int64)])
        signs = np.concatenate([*family.signs, np.zeros((0, s))])
        sizes = np.array([len(inverse) for inverse in family.inverses], dtype=np.int64)
        width, n = int(sizes.max(initial=0)), len(self.rows)
        inverse = np.zeros((len(sizes), width, width))
        place = np.full((len(sizes), width), n)  # n: the zero that pads
        starts = np.cumsum(sizes) - sizes
        for k, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            inverse[k, :size, :size] = family.inverses[k]
            place[k, :size] = np.arange(start, start + size)
        self._signs, self._inverse = (
            Parameter(torch.from_numpy(signs)),
            Parameter(torch.from_numpy(inverse)),
        )
        self._rows, self._place = torch.from_numpy(self.rows), torch.from_numpy(place)
        self._back = torch.from_numpy(np.flatnonzero(place.ravel() < n))

    def close(self, values: Tensor) -> Tensor:
        """D values: (B, m) to (B, n)."""
        members = values[:, self._rows.to(values.device)]
        return (members * self._signs.like(values)).sum(-1)

    def spread(self, c: Tensor, m: int) -> Tensor:
        """D^T c: (B, n) to (B, m)."""
        terms = (c[..., None] * self._signs.like(c)).flatten(1)
        return c.new_zeros(len(c), m).index_add(1, self._rows.reshape(-1).to(c.device), terms)

    def whiten(self, c: Tensor) -> Tensor:
        """L^-1 c: (B, n) to (B, n)."""
        return self._each("tij,btj->bti", c)

    def whiten_adjoint(self, c: Tensor) -> Tensor:
        """L^-T c."""
        return self._each("tji,btj->bti", c)

    def _each(self, product: str, c: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(c, (0, 1))[:, self._place.to(c.device)]
        out: Any = torch.einsum(product, self._inverse.like(c), padded)
        return out.flatten(1)[:, self._back.to(c.device)]
