"""The likelihood: data, the operator that made them, and the noise.

    y = A(x) + n:   log p(y | x) = log p_n(y - A(x)),   grad_x = -A'(x)^T (d log p_n/dr)(y - A(x)).

Samplers need two things beyond the gradient. A change of units: a prior lives in its own,
x_physical = scale x + offset, and ``pullback`` carries the data there. And solves with Sigma + A C
A^T, the covariance of the data when x has covariance C: directly where the structure of A and Sigma
allows (see :mod:`diffpost.structured`), otherwise by conjugate gradients on the whitened system

    (I + W A C A^T W^T) u = W r,     v = W^T u = (Sigma + A C A^T)^-1 r,     W^T W = Sigma^-1,

whose smallest eigenvalue is 1, and in which a datum of infinite variance is a row of zeros.
"""

from __future__ import annotations

import math
import weakref
from typing import final

import torch
from torch import Tensor

from diffpost.linalg import MatVec, Solver, SolveReport, cg, direct, filtered
from diffpost.noise import BlockNoise, Noise
from diffpost.operators.algebra import Stack, scaled_by
from diffpost.operators.base import LinearOperator, Operator, Parameter, Shape, as_double, numel
from diffpost.operators.nonlinear import Affine, NonlinearStack
from diffpost.structured import (
    WhitenedSolve,
    effective_data,
    near_solve,
    spectral_solve,
    structured_solve,
)

__all__ = ["Likelihood"]


Solves = tuple[WhitenedSolve | None, WhitenedSolve | None]


@final
class Likelihood:
    """p(y | x) for y = A(x) + n.

    Args:
        y: (*data), the same for every sample, or (B, *data), row b for sample b. Values that are
            NaN or infinite are allowed where the noise has infinite variance. An operator with a batch of
            its own (a lens for each sample) goes with either.
        operator: A.
        noise: the distribution of n.
        batched: whether the first axis of y is a batch. None decides by the shapes that operator
            and noise fix, and otherwise takes images to be (C, H, W): four axes have a batch.
            ``bind`` settles it.

    Attributes:
        y: the data, with zeros where the noise has infinite variance and y was not finite.
        operator, noise: as given.

    Raises:
        ValueError: y not of the shape of the operator's data or of the noise; NaN or infinite data
            of finite variance.
    """

    def __init__(
        self, y: Tensor, operator: Operator, noise: Noise, *, batched: bool | None = None
    ) -> None:
        y = torch.as_tensor(y)
        if y.is_complex() or not y.is_floating_point():
            raise ValueError(
                f"Likelihood: got data of type {y.dtype}; expected real floating point (complex data as "
                "real and imaginary parts, torch.view_as_real)."
            )
        self.operator = operator
        self.noise = noise
        self.batched = _is_batched(y, operator, noise) if batched is None else batched
        if self.batched and y.ndim < 2:
            raise ValueError(
                f"Likelihood: got batched data of shape {tuple(y.shape)}; expected (B, *data)."
            )
        self.data_shape: Shape = tuple(y.shape[1:] if self.batched else y.shape)
        known = operator.data_shape
        if known is not None and known != self.data_shape:
            raise ValueError(
                f"Likelihood: y has shape {tuple(y.shape)}, but the operator {operator!r} makes data of shape "
                f"{known}; expected {known}, or (B, *{known}) with a row for each sample."
            )
        self.y = self._finite(y)
        self._rows = Parameter(self.y if self.batched else self.y[None])
        self._input_shape: Shape | None = None
        self._solves: weakref.WeakKeyDictionary[LinearOperator, Solves] = (
            weakref.WeakKeyDictionary()
        )
        noise.check(tuple(self._rows.value.shape))

    def _finite(self, y: Tensor) -> Tensor:
        bad = ~y.isfinite()
        if not bool(bad.any()):
            return y
        gone = self.noise.masked(self.data_shape)
        exposed = bad if gone is None else bad & ~gone.to(bad.device)
        if bool(exposed.any()):
            raise ValueError(
                f"Likelihood: {int(exposed.sum())} of {y.numel()} data are NaN or infinite although their noise "
                "is finite. Mask them: give them infinite variance, var=torch.where(y.isfinite(), var, inf)."
            )
        return y.masked_fill(bad, 0.0)

    def __repr__(self) -> str:
        return f"Likelihood(y {tuple(self.y.shape)}, {self.operator!r}, {self.noise!r})"

    @property
    def rows(self) -> int | None:
        """Entries that a batch must have, those of y or of the operator; None where any will do."""
        return len(self.y) if self.batched else self.operator.batch

    @property
    def ndata(self) -> int | Tensor:
        """How many data are not masked; (B,) where that differs between rows."""
        return self.noise.ndata(self.data_shape)

    # the density -------------------------------------------------------------------------------

    def residual(self, x: Tensor) -> Tensor:
        """y - A(x), 0 where masked: (B, *shape) to (B, *data).

        Raises:
            ValueError: the operator makes data of another shape than y, or y has rows and x has not
                as many entries.
        """
        model = self.operator(x)
        data, rows = tuple(model.shape[1:]), self._rows.like(model)
        if data != self.data_shape and tuple(self.y.shape) in (data, tuple(model.shape)):
            rows = self.y.to(model).reshape(-1, *data)  # the first axis was misunderstood
        if tuple(rows.shape[1:]) != data or len(rows) not in (1, len(x)):
            raise ValueError(
                f"Likelihood: y has shape {tuple(self.y.shape)}, but the operator makes {tuple(model.shape)} of "
                f"images {tuple(x.shape)}; expected y of shape {data}, or {tuple(model.shape)} with a row for each "
                "sample."
            )
        residual = rows - model
        gone = self.noise.masked(self.data_shape)
        return residual if gone is None else residual.masked_fill(gone.to(residual.device), 0.0)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(y | x), normalised over the data that count: (B, *shape) to (B,)."""
        return self.noise.log_prob(self.residual(x))

    def score(self, x: Tensor) -> Tensor:
        """grad_x log p(y | x): (B, *shape) to (B, *shape)."""
        return -self.operator.linearize(x).adjoint(self.noise.score(self.residual(x)))

    def chi2(self, x: Tensor) -> Tensor:
        """(y - A x)^T Sigma^-1 (y - A x): (B, *shape) to (B,). Its expectation at the truth is
        ndata.
        """
        return self.noise.chi2(self.residual(x))

    # other views of the same data --------------------------------------------------------------

    def _like(self, y: Tensor, operator: Operator, noise: Noise, batched: bool) -> Likelihood:
        other = Likelihood(y, operator, noise, batched=batched)
        other._input_shape = self._input_shape
        return other

    def bind(self, input_shape: Shape) -> Likelihood:
        """The same likelihood for images of this shape, which settles whether y has a batch axis.

        Raises:
            ValueError: the operator does not take such images, or its data fit y neither way.
        """
        output = tuple(self.operator.output_shape(tuple(input_shape)))
        shape = tuple(self.y.shape)
        fits = {False: shape == output, True: shape[1:] == output}
        batched = self.batched if fits[self.batched] else not self.batched
        if not fits[batched]:
            raise ValueError(
                f"Likelihood: y has shape {shape}, but the operator {self.operator!r} makes data of shape {output} of "
                f"images {tuple(input_shape)}; expected y of that shape, or (B, *{output})."
            )
        entries = self.operator.batch
        if batched and entries not in (None, len(self.y)):
            raise ValueError(
                f"Likelihood: y has {len(self.y)} rows, but the operator {self.operator!r} is one of {entries} "
                "entries; expected as many, or y without a batch axis."
            )
        bound = (
            self
            if batched == self.batched
            else self._like(self.y, self.operator, self.noise, batched)
        )
        if bound._input_shape != tuple(input_shape):
            bound = bound._like(bound.y, bound.operator, bound.noise, batched)
            bound._input_shape = tuple(input_shape)
        return bound

    def select(self, ids: Tensor) -> Likelihood:
        """The likelihood of rows ids of y and of the operator; itself if they have no batch axis."""
        if self.rows is None:
            return self
        operator, noise, y = self.operator.select(ids), self.noise, self.y
        if self.batched:
            noise = noise.select(ids, self.data_shape)
            y = y[ids.to(y.device)]
        other = self._like(y, operator, noise, self.batched)
        if noise is self.noise:
            other._solves = self._solves
        return other

    def repeat(self, k: int) -> Likelihood:
        """The likelihood of y with every row k times in a row: k draws of each observation, consecutive.

        Raises:
            ValueError: y has no batch axis (then every draw has it already), or k is not positive.
        """
        rows = self.rows
        if rows is None or k < 1:
            raise ValueError(
                f"repeat({k}): expected k > 0, and y with a batch axis; it is {tuple(self.y.shape)}."
            )
        return self.select(torch.arange(rows).repeat_interleave(k))

    def __add__(self, other: Likelihood) -> Likelihood:
        """Independent data: log-probabilities add. The data are flattened and joined."""
        if not isinstance(other, Likelihood):
            return NotImplemented
        parts = (self, other)
        shapes = [part.data_shape for part in parts]
        counts = {part.rows for part in parts if part.rows is not None}
        if len(counts) > 1:
            raise ValueError(
                f"Likelihood: data with {self.rows} and {other.rows} rows; expected the same number of samples."
            )
        front = counts or {1}
        flat = [part._rows.value.flatten(1).expand(max(front), -1) for part in parts]
        dtype = torch.promote_types(flat[0].dtype, flat[1].dtype)
        y = torch.cat([f.to(flat[0].device, dtype) for f in flat], 1)
        operators = [part.operator for part in parts]
        linear = [op for op in operators if isinstance(op, LinearOperator)]
        joint: Operator = (
            Stack(linear, shapes)
            if len(linear) == len(operators)
            else NonlinearStack(operators, shapes)
        )
        noise = BlockNoise([part.noise for part in parts], shapes)
        together = Likelihood(y if counts else y[0], joint, noise, batched=bool(counts))
        together._input_shape = self._input_shape or other._input_shape
        return together

    def pullback(self, scale: float | Tensor, offset: float | Tensor = 0.0) -> Likelihood:
        """The likelihood of z with x = scale z + offset: y' = y - A(offset), A' = A diag(scale).

        Args:
            scale: number, or tensor broadcastable to the image.
            offset: likewise.

        Returns:
            For a linear A, a linear A' with A's structure (for an offset, if the shape of the image
            follows from that of the data or ``bind`` told it); otherwise z -> A(scale z + offset)
            on the same y.

        Raises:
            ValueError: scale or offset not finite, or scale zero.
        """
        scales, offsets = as_double(scale), as_double(offset)
        if not bool(scales.isfinite().all() & offsets.isfinite().all() & (scales != 0).all()):
            raise ValueError(
                f"pullback: got scale {scale} and offset {offset}; expected finite, scale not 0."
            )
        shift = bool((offsets != 0).any())
        if not shift and bool((scales == 1).all()):
            return self
        if not isinstance(self.operator, LinearOperator):
            return self._like(
                self.y, Affine(self.operator, scale, offset), self.noise, self.batched
            )
        operator = scaled_by(self.operator, scale)
        if not shift:
            return self._like(self.y, operator, self.noise, self.batched)
        try:
            shape = self._input_shape or _shape_of_image(self.operator, self._rows.value)
            flat = offsets.to(self.y).expand(self.operator.batch or 1, *shape)
        except (ValueError, RuntimeError):  # the image's shape does not follow from the data's
            return self._like(
                self.y, Affine(self.operator, scale, offset), self.noise, self.batched
            )
        y = self._rows.value - self.operator(flat)
        batched = self.batched or self.operator.batch is not None
        return self._like(y if batched else y[0], operator, self.noise, batched)

    # solves ------------------------------------------------------------------------------------

    def solve(self, r: Tensor, s: Tensor | float, tol: float = 1e-6, max_iter: int = 500) -> Tensor:
        """v with (Sigma + s A A^T) v = r, for linear A. See ``solve_operator``."""
        return self.solve_operator(self._linear(r), r, s, tol, max_iter).x

    def solve_operator(
        self,
        linear: LinearOperator,
        r: Tensor,
        s: Tensor | float,
        tol: float = 1e-6,
        max_iter: int = 500,
        solver: Solver = cg,
    ) -> SolveReport:
        """Solves (Sigma + s L L^T) v = r for L the operator, or its linearisation.

        Direct where L and the noise have structure, otherwise by preconditioned conjugate
        gradients.

        Args:
            linear: L, as ``operator.linearize(x)`` returns it.
            r: (B, *data).
            s: () or (B,), not negative.
            tol: relative residual, in whitened units, at which an iteration stops.
            max_iter: most iterations; a solve that ends there warns (``ConvergenceWarning``).
            solver: where it iterates.

        Returns:
            A report; ``.x`` is v, (B, *data), 0 where masked.

        Raises:
            ValueError: s negative, NaN, or neither () nor (B,).
        """
        scale = self._scale(s, r)
        exact, near = self._structure(linear, r)
        u = self.noise.whiten(r)
        if exact is not None:
            return direct(self.noise.whiten_adjoint(exact.solve(u, scale)))
        wide = scale.to(r.dtype).reshape(-1, *[1] * (r.ndim - 1))

        def matvec(p: Tensor) -> Tensor:
            v = self.noise.whiten_adjoint(p)
            return p + wide * self.noise.whiten(linear(linear.adjoint(v)))

        precond = None if near is None else (lambda p: near.solve(p, scale))
        report = solver(matvec, u, tol=tol, max_iter=max_iter, precond=precond)
        return report.with_x(self.noise.whiten_adjoint(report.x))

    def solve_with(
        self,
        matvec_c: MatVec,
        r: Tensor,
        tol: float = 1e-4,
        max_iter: int = 200,
        s_precond: Tensor | float | None = None,
        solver: Solver = cg,
    ) -> SolveReport:
        """Solves (Sigma + A C A^T) v = r for linear A. See ``solve_operator_with``."""
        return self.solve_operator_with(
            self._linear(r), matvec_c, r, tol, max_iter, s_precond, solver
        )

    def solve_operator_with(
        self,
        linear: LinearOperator,
        matvec_c: MatVec,
        r: Tensor,
        tol: float = 1e-4,
        max_iter: int = 200,
        s_precond: Tensor | float | None = None,
        solver: Solver = cg,
    ) -> SolveReport:
        """Solves (Sigma + L C L^T) v = r for any symmetric positive C, in whitened units.

        Args:
            linear: L, as ``operator.linearize(x)`` returns it.
            matvec_c: C, (B, *shape) to (B, *shape), entry by entry.
            r: (B, *data).
            tol: relative residual, in whitened units, at which the iteration stops.
            max_iter: most products with C.
            s_precond: what C is like, to precondition: a number or (B,) for C = s I, or the
                eigenvalues of C under the FFT2 of the image, at least two axes, broadcastable to
                (B, *shape). None does not precondition.
            solver: ``cg``, or ``gmres`` for a C that is not symmetric, as the Jacobian of a network
                may be.

        Returns:
            A report; ``.x`` is v, (B, *data), 0 where masked.
        """

        def matvec(p: Tensor) -> Tensor:
            image = linear.adjoint(self.noise.whiten_adjoint(p))
            return p + self.noise.whiten(linear(matvec_c(image)))

        precond: MatVec | None = None
        if isinstance(s_precond, Tensor) and s_precond.ndim >= 2:
            shape = _shape_of_image(linear, r)
            spectral = near_solve(linear, self.noise, shape, tuple(r.shape[1:]), s_precond)
            one = torch.ones((), dtype=r.dtype, device=r.device)
            if spectral is not None:
                precond = lambda p: spectral.solve(p, one)  # noqa: E731
        elif s_precond is not None:
            scale = self._scale(s_precond, r)
            exact, near = self._structure(linear, r)
            chosen = exact or near
            if chosen is not None:
                precond = lambda p: chosen.solve(p, scale)  # noqa: E731
        report = solver(matvec, self.noise.whiten(r), tol=tol, max_iter=max_iter, precond=precond)
        return report.with_x(self.noise.whiten_adjoint(report.x))

    def solve_spectral(
        self,
        linear: LinearOperator,
        r: Tensor,
        power: Tensor,
        tol: float = 1e-6,
        max_iter: int = 500,
        solver: Solver = cg,
    ) -> SolveReport:
        """Solves (Sigma + L P L^T) v = r for P = F^-1 diag(power) F, F the FFT2 of the image.

        Direct where L P L^T and the noise are stationary, otherwise by preconditioned conjugate
        gradients.

        Args:
            linear: L, as ``operator.linearize(x)`` returns it.
            r: (B, *data).
            power: not negative, symmetric in k, at least two axes, broadcastable to (B, *shape).
            tol: relative residual, in whitened units.
            max_iter: most iterations.
            solver: where it iterates.

        Returns:
            A report; ``.x`` is v, (B, *data), 0 where masked.
        """
        shape = _shape_of_image(linear, r)
        exact = spectral_solve(linear, self.noise, shape, tuple(r.shape[1:]), power)
        if exact is not None:
            one = torch.ones((), dtype=r.dtype, device=r.device)
            return direct(self.noise.whiten_adjoint(exact.solve(self.noise.whiten(r), one)))
        factor = power.to(r.device, r.dtype)
        return self.solve_operator_with(
            linear, lambda v: filtered(v, factor), r, tol, max_iter, power, solver
        )

    def effective_data(
        self, linear: LinearOperator, r: Tensor, power: Tensor, gain: Tensor | None = None
    ) -> Tensor | None:
        """Nearly tr (Sigma + L P L^T)^-1 L P L^T, P = G F^-1 diag(power) F G: (B,) or (1,), or None where
        the structure of L and of the noise does not give it. See :mod:`diffpost.structured`.

        Args:
            linear: L, as ``operator.linearize(x)`` returns it.
            r: (B, *data), for its shape.
            power, gain: of P, broadcastable to (B, *shape); no gain is 1.
        """
        shape = _shape_of_image(linear, r)
        return effective_data(linear, self.noise, shape, tuple(r.shape[1:]), power, gain)

    def _linear(self, r: Tensor) -> LinearOperator:
        if not isinstance(self.operator, LinearOperator):
            raise ValueError(
                f"Likelihood: {self.operator!r} is not linear; linearize it and use solve_operator, or "
                "solve_operator_with."
            )
        return self.operator if self._input_shape is None else self.operator.bind(self._input_shape)

    def _structure(self, linear: LinearOperator, r: Tensor) -> Solves:
        """The direct and the preconditioning solve of an operator, worked out once for each."""
        found = self._solves.get(linear)
        if found is None:
            shape = _shape_of_image(linear, r)
            exact = structured_solve(linear, self.noise, shape, tuple(r.shape[1:]))
            near = None
            if exact is None:
                near = near_solve(linear, self.noise, shape, tuple(r.shape[1:]))
            found = (exact, near)
            self._solves[linear] = found
        return found

    def _scale(self, s: Tensor | float, r: Tensor) -> Tensor:
        scale = as_double(s).to(r.device)
        if scale.ndim > 1 or (scale.ndim == 1 and len(scale) not in (1, len(r))):
            raise ValueError(
                f"Likelihood: got s of shape {tuple(scale.shape)} for {len(r)} systems; expected () or ({len(r)},)."
            )
        if not bool((scale >= 0).all()) or not all(map(math.isfinite, scale.reshape(-1).tolist())):
            raise ValueError(
                f"Likelihood: got s = {s}; expected finite values that are not negative."
            )
        return scale


def _is_batched(y: Tensor, operator: Operator, noise: Noise) -> bool:
    """Whether the first axis of y is a batch, as far as the shapes tell."""
    known = operator.data_shape
    if known is not None:
        return tuple(y.shape) != known and tuple(y.shape[1:]) == known
    size = noise.size
    if size is not None and numel(tuple(y.shape)) != size:
        return numel(tuple(y.shape[1:])) == size
    return y.ndim >= 4 and size is None


def _shape_of_image(linear: LinearOperator, data: Tensor) -> Shape:
    """Shape of the image that the adjoint makes of the data."""
    return linear.input_shape or tuple(linear.adjoint(torch.zeros_like(data)).shape[1:])
