r"""The evidence of parameters when the image is Gaussian, in closed form.

With x = m + F c, c ~ N(0, I_K) (:class:`GaussianImage <diffpost.parameters.gaussian.GaussianImage>`), whitened data
w = W (y - b - A m) and H = W A F, both functions of theta,

    log p(y | theta) = log N(y - b - A m; 0, Sigma + A F F^T A^T)
                     = const - 1/2 [w^T S^-1 w + log det S],        S = I + H H^T over m data,
                     = const - 1/2 [w^T w - u^T M^-1 u + log det M],    u = H^T w,  M = I + H^T H over K modes

(Woodbury), by a Cholesky factor of the smaller of the two. For linear lensing this is the evidence of the semi-linear
inversion (Suyu et al. 2006, arXiv:astro-ph/0601493, equation 19). With v = S^-1 w and mu = M^-1 u = H^T v, its
derivatives are

    d/dH = v mu^T - S^-1 H = v mu^T - H M^-1,        d/dw = -v = -(w - H mu),

and they are pulled back through the operator a few modes at a time, so the graph of all modes is never held.
Given theta, c ~ N(mu, M^-1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.parameters.family import ParametricLikelihood, Values
from diffpost.parameters.gaussian import GaussianImage
from diffpost.parameters.prior import ParameterPrior
from diffpost.random import normal

__all__ = ["Evidence", "ImageGivenParameters"]

_ELEMENTS = 1 << 22  # of the data of one chunk of modes
_STREAM = 24_200


@final
@dataclass(frozen=True, eq=False)
class ImageGivenParameters:
    """p(x | theta, y) for each theta of a batch: x = factor (m + F c), c ~ N(mean, (L L^T)^-1).

    Attributes:
        gaussian: m and F.
        factor: (B,) what m and F are multiplied by.
        columns: (B, m, K) H, the whitened data of F, times factor.
        mean: (B, K).
        root: (B, K, K) lower triangular L.
        log_det: (B,) of M = L L^T.
    """

    gaussian: GaussianImage
    factor: Tensor
    columns: Tensor
    mean: Tensor
    root: Tensor
    log_det: Tensor

    def coordinates(self, w: Tensor) -> Tensor:
        """M^-1 H^T w, (B, m) to (B, K): the mean of c where the whitened data are w."""
        u = (self.columns.mT @ w[..., None]).to(self.root)
        return torch.cholesky_solve(u, self.root)[..., 0]

    def images(self, c: Tensor) -> Tensor:
        """(B, K) to (B, *shape)."""
        x = self.gaussian.images(c)
        return self.factor.reshape(-1, *[1] * (x.ndim - 1)) * x

    def draw(self, seed: int, ids: Tensor, step: int = 0) -> Tensor:
        """One image for each theta, (B, *shape); draw b depends on (seed, ids[b], step)."""
        size = (self.root.shape[-1],)
        z = normal(seed, ids, step, size, self.root.dtype, stream=_STREAM)
        spread = torch.linalg.solve_triangular(self.root.mT, z[..., None], upper=True)
        return self.images(self.mean + spread[..., 0])


@final
class Evidence:
    """log p(theta | y) with the image marginalised, as a function of unconstrained coordinates.

    Exact where the images are N(m, C) of ``gaussian``; otherwise the evidence under the Gaussian that it is. Computed in
    float64; where a factor fails or a value is not finite, NaN, which chains reject and count. The gradient is that of
    autograd, once; a second derivative is not known to it.

    Args:
        likelihood: p(y | x, theta).
        prior: of theta.
        gaussian: of images, in physical units.
        amplitude: the name of a parameter, none of the operator's, by which m and F are multiplied: how bright such
            images are, if it is not known.
        chunk: modes that the operator sees at a time; None is as many as make 4 million data.

    Raises:
        ValueError: parameters that are not those of the operator, or images of another shape.
    """

    def __init__(
        self,
        likelihood: ParametricLikelihood,
        prior: ParameterPrior,
        gaussian: GaussianImage,
        *,
        amplitude: str | None = None,
        chunk: int | None = None,
    ) -> None:
        names = (*likelihood.family.names, *([] if amplitude is None else [amplitude]))
        if len(set(names)) < len(names):
            raise ValueError(
                f"Evidence(amplitude={amplitude!r}): the operator has a parameter of that name already."
            )
        prior.check_names(names, "the operator")
        if gaussian.shape != tuple(likelihood.family.input_shape):
            raise ValueError(
                f"Evidence: the Gaussian is of images {gaussian.shape}; expected {tuple(likelihood.family.input_shape)}."
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"Evidence(chunk={chunk}): expected a positive integer.")
        self.likelihood, self.prior, self.gaussian = likelihood, prior, gaussian
        self.amplitude, self.chunk = amplitude, chunk
        self._images = torch.cat([gaussian.mean[None], gaussian.scaled_modes])
        gone = likelihood.noise.masked(likelihood.data_shape)
        # what no row has seen carries nothing
        self._seen: Tensor | None = None
        if gone is not None:
            hidden = gone.expand(torch.broadcast_shapes(gone.shape, likelihood.data_shape))
            kept = (~hidden).reshape(-1, *likelihood.data_shape).any(0)
            self._seen = kept.flatten().nonzero()[:, 0]

    def __call__(self, z: Tensor) -> Tensor:
        """log p(y | theta(z)) + log p(z), (B, P) to (B,): the collapsed density for chains."""
        return self.log_prob(self.prior.constrain(z)) + self.prior.log_prob_z(z)

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p(y | theta), (B, P) to (B,)."""
        if not (torch.is_grad_enabled() and theta.requires_grad):
            with torch.no_grad():
                return self._solved(theta).value
        solved = self._solved(theta.detach())
        gradient = self._pulled_back(theta.detach(), solved)
        # the value, whose derivative is the one just computed
        return solved.value + ((theta - theta.detach()) * gradient).sum(1)

    def given(self, theta: Tensor) -> ImageGivenParameters:
        """p(x | theta, y), theta (B, P)."""
        with torch.no_grad():
            values, factor = self._split(theta.detach().double())
            w, columns = self._whitened(values, factor)
            gram = columns.mT @ columns + _eye(columns.shape[-1], columns)
            root, _ = torch.linalg.cholesky_ex(gram)
            u = columns.mT @ w[..., None]
            mean = torch.cholesky_solve(u, root)[..., 0]
        return ImageGivenParameters(
            self.gaussian, factor, columns, mean, root, 2 * _log_diagonal(root)
        )

    def whiten(self, r: Tensor) -> Tensor:
        """Residuals (B, *data) as w (B, m), without what no row has seen; float64."""
        white = self.likelihood.noise.whiten(r.double()).flatten(1)
        return white if self._seen is None else white[:, self._seen.to(white.device)]

    # the algebra -------------------------------------------------------------------------------

    def _split(self, theta: Tensor) -> tuple[Values, Tensor]:
        """The operator's parameters, and the factor of the images."""
        values = self.prior.values(theta)
        if self.amplitude is None:
            return values, torch.ones_like(theta[:, 0])
        factor = values.pop(self.amplitude)
        return values, factor

    def _seen_by(self, values: Values, images: Tensor) -> Tensor:
        """W A of images (K, *shape): (B, m, K)."""
        data = self.likelihood.family.columns(values, images)
        white = torch.func.vmap(self.likelihood.noise.whiten)(data).flatten(2)
        white = white if self._seen is None else white[..., self._seen.to(white.device)]
        return white.permute(1, 2, 0)

    def _chunks(self, batch: int) -> tuple[Tensor, ...]:
        """The mean and after it the modes, as many at a time as the operator should see."""
        size = max(1, self.likelihood.y[0].numel() * batch)
        return self._images.split(self.chunk or max(1, _ELEMENTS // size))

    def _whitened(self, values: Values, factor: Tensor) -> tuple[Tensor, Tensor]:
        """w (B, m) and H (B, m, K)."""
        parts = [self._seen_by(values, part) for part in self._chunks(len(factor))]
        seen = factor[:, None, None] * torch.cat(parts, 2)
        return self.whiten(self.likelihood.data(values)) - seen[..., 0], seen[..., 1:]

    def _solved(self, theta: Tensor) -> _Solved:
        values, factor = self._split(theta.double())
        w, columns = self._whitened(values, factor)
        data, modes = columns.shape[1:]
        if data <= modes:
            root, failed = torch.linalg.cholesky_ex(columns @ columns.mT + _eye(data, columns))
            v = torch.cholesky_solve(w[..., None], root)[..., 0]
            mean = (columns.mT @ v[..., None])[..., 0]
        else:
            root, failed = torch.linalg.cholesky_ex(columns.mT @ columns + _eye(modes, columns))
            u = columns.mT @ w[..., None]
            mean = torch.cholesky_solve(u, root)[..., 0]
            v = w - (columns @ mean[..., None])[..., 0]
        fit = -0.5 * (w * v).sum(1) - _log_diagonal(root)
        bare = self.likelihood.noise.log_prob(torch.zeros_like(self.likelihood.y).double())
        value = torch.where(failed == 0, fit + bare, torch.nan)
        return _Solved(value, w, columns, root, v, mean)

    def _pulled_back(self, theta: Tensor, solved: _Solved) -> Tensor:
        """d log p(y | theta)/d theta, (B, P)."""
        columns, v, mean = solved.columns, solved.v, solved.mean
        data, modes = columns.shape[1:]
        outer = v[:, :, None] * mean[:, None]
        if data <= modes:
            slope = outer - torch.cholesky_solve(columns, solved.root)
        else:
            slope = outer - torch.cholesky_solve(columns.mT, solved.root).mT
        slope = torch.cat([v[:, :, None], slope], 2)  # w falls by what is seen of the mean
        total = torch.zeros_like(theta)
        with torch.enable_grad():
            leaf = theta.double().requires_grad_()
            data_of = self.whiten(self.likelihood.data(self._split(leaf)[0]))
            total = total + _gradient(data_of, leaf, -v)
            start = 0
            for part in self._chunks(len(theta)):
                values, factor = self._split(leaf)
                seen = factor[:, None, None] * self._seen_by(values, part)
                stop = start + len(part)
                total = total + _gradient(seen, leaf, slope[:, :, start:stop])
                start = stop
        return total


@final
@dataclass(frozen=True, eq=False)
class _Solved:
    value: Tensor
    w: Tensor
    columns: Tensor
    root: Tensor
    v: Tensor
    mean: Tensor


def _gradient(output: Tensor, leaf: Tensor, slope: Tensor) -> Tensor:
    if not output.requires_grad:  # nothing here depends on the parameters
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(output, leaf, slope, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def _eye(size: int, like: Tensor) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)


def _log_diagonal(root: Tensor) -> Tensor:
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
