r"""Nuisances of visibilities: antenna gains, the phase centre, and a scale, each linearised about its best fit.

Data and model visibilities m = A x of an image x differ by factors that the calibration left,

    V = h(theta) m + n,        n: 1/weight of variance in each part,        theta ~ N(mu, diag(s^2)).

Given m, with theta = mu + s z and J = dV/dz, Gauss-Newton steps

    (I + J^T W J) dz = J^T W (V - h m) - z

lead to the maximum z*, and N(z*, (I + J^T W J)^-1) is the posterior linearised there (Laplace's approximation with the Hessian
of Gauss and Newton): exact where h is linear in theta. A step that does not raise the posterior is halved.

Given theta, h is divided out, V/h with the weight |h|^2 w has the same likelihood, |V - h m|^2 w = |V/h - m|^2 |h|^2 w, so that images
are drawn from corrected data by the same operator.

    OffsetAndScale   h = s exp(-2 pi i (u dl + v dm))              linear in s
    AntennaGains     h = g_i conj(g_j),  g = exp(a + i phi)        baselines i, j; Thompson, Moran & Swenson 2017, chapter 10
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.operators.base import Parameter, Shape
from diffpost.random import normal

__all__ = ["AntennaGains", "LinearisedNuisance", "OffsetAndScale", "VisibilityNuisance"]

_ARCSEC = math.pi / 180 / 3600
_STREAM = 24_800  # of random numbers, away from those of samplers
_HALVINGS = 12


@final
@dataclass(frozen=True, eq=False)
class LinearisedNuisance:
    """The Gaussian posterior of a nuisance, for each entry of a batch and each group of visibilities.

    Attributes:
        theta: (B, G, P) the best fit.
        covariance: (B, G, P, P).
        chi2: (B,) of the data at the best fit.
        iterations: Gauss-Newton steps of the slowest entry.
        converged: (B,) whether the last step was below the tolerance.
        root: (B, G, P, P) L with L L^T the inverse covariance of z.
        prior_std: (P,) s.
    """

    theta: Tensor
    covariance: Tensor
    chi2: Tensor
    iterations: int
    converged: Tensor
    root: Tensor
    prior_std: Tensor

    def draw(self, seed: int, ids: Tensor | None = None, step: int = 0) -> Tensor:
        """A draw for each entry: (B, G, P).

        Args:
            seed, step: of the random numbers (:mod:`diffpost.random`).
            ids: (B,) which draw each entry is; None counts from 0.
        """
        batch, groups, size = self.theta.shape
        ids = torch.arange(batch) if ids is None else ids
        noise = normal(seed, ids, step, (groups, size), torch.float64, stream=_STREAM)
        noise = noise.to(self.theta.device)[..., None]
        z = torch.linalg.solve_triangular(self.root.mT, noise, upper=True)[..., 0]
        return self.theta + self.prior_std.to(z) * z

    def log_prob(self, theta: Tensor) -> Tensor:
        """Log density in z of theta (B, G, P), up to a number that is the same for all: (B, G)."""
        s = self.prior_std.to(theta)
        z = torch.where(s > 0, (theta - self.theta) / torch.where(s > 0, s, 1.0), 0.0)
        white = (self.root.mT @ z[..., None])[..., 0]
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1) - 0.5 * white.square().sum(-1)


class VisibilityNuisance(ABC):
    """Factors h(theta) of visibilities (*uv), with a Gaussian prior of theta, in G groups with parameters of their own.

    Attributes:
        uv: shape of the visibilities.
        names: of the P parameters.
        prior_mean, prior_std: (P,) float64; a std of 0 fixes a parameter.
        group: (m,) number of the group of each visibility; groups: how many.
    """

    def __init__(
        self,
        uv: Shape,
        names: tuple[str, ...],
        mean: Tensor,
        std: Tensor,
        group: Tensor | None = None,
    ) -> None:
        name = type(self).__name__
        if not bool(mean.isfinite().all() & std.isfinite().all() & (std >= 0).all()):
            raise ValueError(
                f"{name}: got prior standard deviations {std.tolist()}; expected finite ones, not negative (0 fixes a parameter)."
            )
        self.uv, self.names = tuple(uv), names
        self.prior_mean, self.prior_std = mean.double(), std.double()
        count = math.prod(self.uv)
        self.group = torch.zeros(count, dtype=torch.int64) if group is None else group
        if self.group.shape != (count,) or count == 0 or bool((self.group < 0).any()):
            raise ValueError(
                f"{name}: got groups of shape {tuple(self.group.shape)} for {count} visibilities; expected as many numbers from 0."
            )
        self.groups = int(self.group.max()) + 1

    @property
    def size(self) -> int:
        """P, parameters of a group."""
        return len(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.groups} groups of {self.size} parameters)"

    @abstractmethod
    def _factor(self, theta: Tensor) -> Tensor:
        """h, (B, m) complex, of theta (B, G, P)."""

    @abstractmethod
    def _normal(
        self, theta: Tensor, model: Tensor, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """J^T W r, (B, G, P), and J^T W J, (B, G, P, P), of the derivative J by theta."""

    # the model ----------------------------------------------------------------------------------

    def factor(self, theta: Tensor) -> Tensor:
        """h(theta): (B, G, P) to (B, *uv) complex128.

        Raises:
            ValueError: theta of another shape.
        """
        self._check(theta)
        return self._factor(theta.double()).reshape(len(theta), *self.uv)

    def apply(self, theta: Tensor, vis: Tensor) -> Tensor:
        """h(theta) V: visibilities (B, *uv, 2) to (B, *uv, 2)."""
        out = self.factor(theta) * torch.view_as_complex(vis.double().contiguous())
        return torch.view_as_real(out).to(vis.dtype)

    def corrected(self, vis: Tensor, weight: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        """V/h and |h|^2 w: data without the nuisance, and their weights.

        Args:
            vis: (*uv, 2) or (B, *uv, 2), Jy; weight: (*uv) or (B, *uv), 1/Jy^2.
            theta: (B, G, P).

        Returns:
            (B, *uv, 2) and (B, *uv, 1), the latter for ``GaussianNoise(weight=...)``.
        """
        h = self.factor(theta)
        value, w = self._data(vis, weight)
        shape = (-1, *self.uv)
        data = torch.view_as_real(value.reshape(shape) / h)
        return data, (w.reshape(shape) * h.abs().square())[..., None]

    def prior_draw(self, seed: int, ids: Tensor, step: int = 0) -> Tensor:
        """Draws of the prior: (B, G, P)."""
        shape = (self.groups, self.size)
        z = normal(seed, ids, step, shape, torch.float64, stream=_STREAM + 1)
        return self.prior_mean + self.prior_std * z

    def log_posterior(self, theta: Tensor, vis: Tensor, weight: Tensor, model: Tensor) -> Tensor:
        """-(|V - h m|^2 w + |z|^2)/2 of each group: (B, G). Arguments as for ``fit``."""
        self._check(theta)
        value, w = self._data(vis, weight)
        return -0.5 * self._energy(theta.double(), value, w, self._model(model))

    # the fit ------------------------------------------------------------------------------------

    def fit(
        self,
        vis: Tensor,
        weight: Tensor,
        model: Tensor,
        start: Tensor | None = None,
        *,
        tol: float = 1e-6,
        max_iter: int = 50,
    ) -> LinearisedNuisance:
        """The posterior given model visibilities, linearised about its maximum.

        Args:
            vis: data, (*uv, 2) or (B, *uv, 2), Jy.
            weight: 1/sigma^2 of each part, (*uv) or (B, *uv); 0 leaves a datum out.
            model: A x, (B, *uv, 2), Jy.
            start: (B, G, P) where to begin; None: at the prior's mean. Phases beyond half a turn of it may end at another maximum.
            tol: an entry is done when a step is less than this many posterior standard deviations.
            max_iter: most steps.

        Raises:
            ValueError: shapes that do not fit, or data with a weight, or a model, that are not finite.
        """
        value, w = self._data(vis, weight)
        m = self._model(model)
        batch = max(len(value), len(w), len(m))
        mean, std = self.prior_mean.to(w), self.prior_std.to(w)
        if start is None:
            start = mean.expand(batch, self.groups, self.size)
        self._check(start)
        theta = start.double().to(w).clone()
        eye = torch.eye(self.size, dtype=torch.float64, device=w.device)
        energy = self._energy(theta, value, w, m)
        active = torch.ones_like(energy, dtype=torch.bool)
        iterations = 0
        while True:
            gradient, root = self._system(theta, value, w, m, eye)
            dz = torch.cholesky_solve(gradient[..., None], root)[..., 0]
            size = (gradient * dz).sum(-1)  # squared, in standard deviations
            active = active & (size > tol**2)
            if iterations == max_iter or not bool(active.any()):
                break
            iterations += 1
            length = active.double()
            for _ in range(_HALVINGS):
                new = theta + std * dz * length[..., None]
                found = self._energy(new, value, w, m)
                # rounding of the sum of squares is no rise
                worse = active & ~(found <= energy + 1e-12 * energy.abs())
                if not bool(worse.any()):
                    break
                length = torch.where(worse, length / 2, length)
            else:
                stuck = worse[..., None]
                new, found = torch.where(stuck, theta, new), torch.where(worse, energy, found)
                active = active & ~worse
            theta, energy = new, found
        covariance = std[:, None] * torch.cholesky_inverse(root) * std
        residual = value - self._factor(theta) * m
        return LinearisedNuisance(
            theta=theta,
            covariance=covariance,
            chi2=(w * residual.abs().square()).sum(1),
            iterations=iterations,
            converged=(size <= tol**2).all(1),
            root=root,
            prior_std=std,
        )

    def _system(
        self, theta: Tensor, value: Tensor, w: Tensor, m: Tensor, eye: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradient in z, and the root of the curvature."""
        std = self.prior_std.to(w)
        residual = value - self._factor(theta) * m
        gradient, curvature = self._normal(theta, m, residual, w)
        gradient = std * gradient - self._z(theta)
        curvature = eye + std[:, None] * curvature * std
        return gradient, torch.linalg.cholesky(curvature)

    def _z(self, theta: Tensor) -> Tensor:
        mean, std = self.prior_mean.to(theta), self.prior_std.to(theta)
        return torch.where(std > 0, (theta - mean) / torch.where(std > 0, std, 1.0), 0.0)

    def _energy(self, theta: Tensor, value: Tensor, w: Tensor, m: Tensor) -> Tensor:
        """|V - h m|^2 w + |z|^2 of each group: (B, G)."""
        terms = w * (value - self._factor(theta) * m).abs().square()
        return self._sums(terms) + self._z(theta).square().sum(-1)

    def _sums(self, terms: Tensor) -> Tensor:
        """Over the visibilities of each group: (B, m) to (B, G)."""
        out = terms.new_zeros(len(terms), self.groups)
        return out.index_add(1, self.group.to(terms.device), terms)

    # what came ----------------------------------------------------------------------------------

    def _check(self, theta: Tensor) -> None:
        if theta.ndim != 3 or tuple(theta.shape[1:]) != (self.groups, self.size):
            raise ValueError(
                f"{self!r}: got theta of shape {tuple(theta.shape)}; expected (B, {self.groups}, {self.size})."
            )

    def _data(self, vis: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(B or 1, m) complex and weights, zero where the weight is."""
        vis, w = torch.as_tensor(vis).double(), torch.as_tensor(weight).double()
        k = len(self.uv)
        if (
            tuple(vis.shape[-k - 1 :]) != (*self.uv, 2)
            or tuple(w.shape[w.ndim - k :]) != self.uv
            or vis.ndim > k + 2
            or w.ndim > k + 1
        ):
            raise ValueError(
                f"{self!r}: got visibilities {tuple(vis.shape)} and weights {tuple(w.shape)}; expected {(*self.uv, 2)} and {self.uv}, or with a "
                "batch axis in front."
            )
        w = w.reshape(-1, math.prod(self.uv))
        value = torch.view_as_complex(vis.reshape(-1, w.shape[1], 2).contiguous())
        if not bool((w >= 0).all() & w.isfinite().all() & (value.isfinite() | (w == 0)).all()):
            raise ValueError(
                f"{self!r}: got weights that are negative or not finite, or visibilities that are not finite; give such data weight 0."
            )
        return torch.where(w > 0, value, 0.0), w

    def _model(self, model: Tensor) -> Tensor:
        if model.ndim != len(self.uv) + 2 or tuple(model.shape[1:]) != (*self.uv, 2):
            raise ValueError(
                f"{self!r}: got model visibilities {tuple(model.shape)}; expected (B, {', '.join(map(str, self.uv))}, 2)."
            )
        if not bool(model.isfinite().all()):
            raise ValueError(f"{self!r}: got model visibilities that are NaN or infinite.")
        m = model.double().reshape(len(model), -1, 2).contiguous()
        return torch.view_as_complex(m)


@final
class OffsetAndScale(VisibilityNuisance):
    """V = s exp(-2 pi i (u dl + v dm)) A x: the data show the image (dl, dm) further east and north, and s times as bright.

    Theta is (dl, dm, s). Given the image, s alone has an exactly Gaussian posterior.

    Args:
        u, v: baselines in wavelengths, of the shape uv.
        offset_std: of dl and dm about 0, arcsec; well below the resolution, lest there be other maxima. 0 fixes them.
        scale_std: of s about 1; 0 fixes it.

    Raises:
        ValueError: u and v of different shapes or not finite, or standard deviations that are negative or not finite.
    """

    def __init__(
        self, u: Tensor, v: Tensor, *, offset_std: float = 0.0, scale_std: float = 0.0
    ) -> None:
        u, v = torch.as_tensor(u).double(), torch.as_tensor(v).double()
        if u.shape != v.shape or u.ndim == 0 or not bool((u.isfinite() & v.isfinite()).all()):
            raise ValueError(
                f"OffsetAndScale: got u {tuple(u.shape)} and v {tuple(v.shape)}; expected finite ones of the same shape."
            )
        std = torch.tensor([offset_std, offset_std, scale_std], dtype=torch.float64)
        mean = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        super().__init__(tuple(u.shape), ("offset_l", "offset_m", "scale"), mean, std)
        turns = -2 * math.pi * _ARCSEC * torch.stack([u.reshape(-1), v.reshape(-1)])
        self._turns = Parameter(turns)  # (2, m) radians per arcsec

    def _phasor(self, theta: Tensor) -> Tensor:
        angle = theta[:, 0, :2] @ self._turns.like(theta)
        return torch.polar(torch.ones_like(angle), angle)

    def _factor(self, theta: Tensor) -> Tensor:
        return theta[:, 0, 2:] * self._phasor(theta)

    def _normal(
        self, theta: Tensor, model: Tensor, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        seen = self._phasor(theta) * model
        turned = 1j * theta[:, 0, 2:] * seen
        turns = self._turns.like(theta)
        j = torch.stack([turned * turns[0], turned * turns[1], seen], 1)  # (B, 3, m)
        weighted = weight[:, None] * j.conj()
        gradient = (weighted * residual[:, None]).real.sum(2)
        return gradient[:, None], (weighted @ j.mT).real[:, None]


@final
class AntennaGains(VisibilityNuisance):
    """V_ij = g_i conj(g_j) (A x)_ij with g = exp(a + i phi), in each group of visibilities.

    Theta is (a_0 ..., phi_0 ...): log amplitudes and phases in rad, with priors about 0. The phase that all antennas share does not
    matter to any visibility, and the mean of the log amplitudes is the flux of the image again: the prior holds both.

    Args:
        antenna1, antenna2: numbers from 0, of the shape uv.
        amplitude_std: of the log amplitudes, 0.1 for errors of 10%; a number or one for each antenna. 0 fixes them.
        phase_std: of the phases, rad, likewise.
        interval: numbers from 0 of the solution intervals, of the shape uv (``scan_numbers``); None: gains that do not change.
        antennas: how many; None is the largest number and one.

    Raises:
        ValueError: shapes that do not fit, a baseline of one antenna, or standard deviations that are negative or not finite.
    """

    def __init__(
        self,
        antenna1: Tensor,
        antenna2: Tensor,
        *,
        amplitude_std: float | Tensor = 0.1,
        phase_std: float | Tensor = 0.35,
        interval: Tensor | None = None,
        antennas: int | None = None,
    ) -> None:
        first, second = torch.as_tensor(antenna1).long(), torch.as_tensor(antenna2).long()
        shape = tuple(first.shape)
        if first.shape != second.shape or first.numel() == 0 or first.ndim == 0:
            raise ValueError(
                f"AntennaGains: got antennas {shape} and {tuple(second.shape)}; expected the same shape, that of u."
            )
        largest = int(torch.maximum(first, second).max()) + 1
        count = largest if antennas is None else antennas
        if bool((first == second).any()) or count < largest or int(first.min()) < 0 or int(second.min()) < 0:  # fmt: skip
            raise ValueError(
                f"AntennaGains: got antennas up to {largest - 1} of {count}, or baselines of one antenna; expected pairs of different numbers "
                f"from 0 to {count - 1}."
            )
        if interval is not None and torch.as_tensor(interval).shape != first.shape:
            raise ValueError(
                f"AntennaGains: got intervals of shape {tuple(torch.as_tensor(interval).shape)}; expected {shape}."
            )
        parts = []
        for name, value in (("amplitude_std", amplitude_std), ("phase_std", phase_std)):
            std = torch.as_tensor(value, dtype=torch.float64)
            if std.ndim > 1 or (std.ndim == 1 and len(std) != count):
                raise ValueError(
                    f"AntennaGains({name} of shape {tuple(std.shape)}): expected a number, or one for each of {count} antennas."
                )
            parts.append(std.expand(count))
        group = None if interval is None else torch.as_tensor(interval).long().reshape(-1)
        names = tuple(f"{what}_{a}" for what in ("log_amplitude", "phase") for a in range(count))
        zero = torch.zeros(2 * count, dtype=torch.float64)
        super().__init__(shape, names, zero, torch.cat(parts), group)
        self.antennas = count
        self._ends = first.reshape(-1), second.reshape(-1)
        self._places = self._layout()

    def _layout(self) -> tuple[Tensor, Tensor]:
        """Where each visibility's terms stand in the gradients (a_i, a_j, phi_i, phi_j), and in the curvatures: (4 m,) and (8 m,)."""
        n, (i, j) = self.antennas, self._ends
        row, corner = 2 * n * self.group, 4 * n * n * self.group
        gradient = torch.cat([row + i, row + j, row + n + i, row + n + j])
        pairs = [(i, i), (j, j), (i, j), (j, i), (n + i, n + i), (n + j, n + j), (n + i, n + j), (n + j, n + i)]  # fmt: skip
        curvature = torch.cat([corner + 2 * n * one + other for one, other in pairs])
        return gradient, curvature

    def gains(self, theta: Tensor) -> Tensor:
        """g: theta (B, G, P) to (B, G, antennas) complex128."""
        self._check(theta)
        size, phase = theta.double().split(self.antennas, -1)
        return torch.polar(size.exp(), phase)

    def _factor(self, theta: Tensor) -> Tensor:
        group, (i, j) = self.group.to(theta.device), (e.to(theta.device) for e in self._ends)
        gains = self.gains(theta)
        return gains[:, group, i] * gains[:, group, j].conj()

    def _normal(
        self, theta: Tensor, model: Tensor, residual: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        # dV/da_i = dV/da_j = q and dV/dphi_i = -dV/dphi_j = i q: amplitudes and phases do not mix
        q = self._factor(theta) * model
        pull = weight * q.conj() * residual
        power = weight * q.abs().square()
        n, batch = self.antennas, len(q)
        of_gradient, of_curvature = (place.to(q.device) for place in self._places)
        terms = torch.cat([pull.real, pull.real, pull.imag, -pull.imag], 1)
        gradient = power.new_zeros(batch, self.groups * 2 * n).index_add(1, of_gradient, terms)
        values = torch.cat([power] * 6 + [-power] * 2, 1)
        curvature = power.new_zeros(batch, self.groups * 4 * n * n)
        curvature = curvature.index_add(1, of_curvature, values)
        return (
            gradient.reshape(batch, self.groups, 2 * n),
            curvature.reshape(batch, self.groups, 2 * n, 2 * n),
        )
