r"""A stationary Gaussian field seen through any linear operator, with any Gaussian noise.

Where operator and noise are not diagonal under the FFT, as in :mod:`diffpost.oracles.field`, the posterior is still
Gaussian,

    mean C A^T S^-1 y,      covariance C - C A^T S^-1 A C,      S = Sigma + A C A^T,

and perturb-and-solve draws it exactly (Papandreou & Yuille 2010): for z ~ N(0, C) and e ~ N(0, Sigma),
z + C A^T S^-1 (y + e - A z). The solves go by conjugate gradients in float64 to a relative residual of 1e-8, or by a
Cholesky factor of S where A is a mask or a matrix. Variances per mode are those of many such draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance
from diffpost.likelihood import Likelihood
from diffpost.linalg import filtered
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Identity, LinearOperator, Matrix
from diffpost.oracles.field import BANDS, FieldOracle, FieldReport, filtered_by, gaussian_psf
from diffpost.posterior import Posterior
from diffpost.score import GaussianScore
from diffpost.sde import EDM, SDE

OBSERVATIONS = ("psf", "mask", "dense", "heteroscedastic", "correlated")
"""What :func:`observed_field` knows: the operator or the noise that differs from a PSF with white noise."""

_TOL = 1e-8
_BATCH = 64
_DRAWS = 1024  # for the variances, which then scatter by 4% in a mode and hardly in a band


@final
@dataclass(frozen=True)
class ObservedField:
    """A Gaussian field, data, and the exact posterior.

    Attributes:
        prior: the field's score model, images (1, size, size).
        likelihood: the data.
        truth: (1, size, size) the field behind the data.
        mean: (1, size, size) exact posterior mean, float64.
        wavenumber: (size, size) radial integer wavenumber of each mode.
    """

    prior: GaussianScore
    likelihood: Likelihood
    truth: Tensor
    mean: Tensor
    wavenumber: Tensor
    _update: Callable[[Tensor, Tensor], Tensor]
    _noise: GaussianNoise

    def posterior(self, guidance: Guidance | None = None) -> Posterior:
        """The posterior as a score model; None is moment matching, exact here."""
        return Posterior(self.prior, self.likelihood, guidance)

    def exact_draws(self, n: int, seed: int = 0) -> Tensor:
        """(n, 1, size, size) independent draws of the exact posterior, float64."""
        generator = torch.Generator().manual_seed(seed)
        root = self.prior.eigenvalues.double().sqrt()
        y = self.likelihood.y.double()
        draws = []
        for start in range(0, n, _BATCH):
            count = min(_BATCH, n - start)
            z = torch.randn(count, *self.truth.shape, generator=generator, dtype=torch.float64)
            e = torch.randn(count, *y.shape, generator=generator, dtype=torch.float64)
            draws.append(self._update(filtered_by(z, root), y + _noise(self._noise, e)))
        return torch.cat(draws)

    @functools.cached_property
    def variance(self) -> Tensor:
        """(size, size) posterior variance per mode of the orthonormal FFT2, of 1024 exact draws."""
        x = self.exact_draws(_DRAWS, seed=2**20) - self.mean
        return torch.fft.fft2(x, norm="ortho").abs().square().mean((0, 1))

    def report(self, x: Tensor, bands: tuple[tuple[float, float], ...] = BANDS) -> FieldReport:
        """Compares draws (n, 1, size, size), n of at least 2, with the exact posterior."""
        of_modes = FieldOracle(
            self.prior, self.likelihood, self.truth, self.mean, self.variance, self.wavenumber
        )
        return of_modes.report(x, bands)


def observed_field(
    observation: str = "mask",
    size: int = 64,
    noise: float = 0.1,
    psf_sigma: float = 2.0,
    index: float = -3.0,
    data: int = 4096,
    seed: int = 0,
    sde: SDE | None = None,
    dtype: torch.dtype = torch.float32,
) -> ObservedField:
    """A field of unit rms with P(k) proportional to max(k, 1)^index, observed in one of OBSERVATIONS.

    Args:
        observation: "psf", a periodic Gaussian PSF with white noise; "mask", three quarters of the pixels unseen (noise of infinite variance);
            "dense", a matrix of normals, of unit norm a row; "heteroscedastic", the PSF with noise that is 10 times
            stronger on the right edge than on the left; "correlated", the PSF with noise of power
            proportional to 1/(1 + (k/8)^2).
        size: pixels on a side.
        noise: standard deviation (rms over pixels) of the noise, in units of the field's rms.
        psf_sigma: of the PSF, pixels.
        index: of the power spectrum, k in integer wavenumbers.
        data: rows of the matrix.
        seed: of operator, field and noise.
        sde: process of the prior; None is EDM().
        dtype: of prior and data; the exact posterior is float64.

    Raises:
        ValueError: another observation.
    """
    if observation not in OBSERVATIONS:
        raise ValueError(f"observed_field({observation!r}): expected one of {OBSERVATIONS}.")
    generator = torch.Generator().manual_seed(seed)
    frequency = torch.fft.fftfreq(size, 1 / size, dtype=torch.float64)
    k = torch.hypot(frequency[:, None], frequency[None, :])
    power = k.clamp_min(1) ** index
    power = power / power.mean()
    shape = (1, size, size)
    white = torch.randn(shape, generator=generator, dtype=torch.float64)
    truth = filtered_by(white, power.sqrt())

    operator: LinearOperator = Convolve(gaussian_psf(size, psf_sigma)[0], boundary="periodic")
    model = GaussianNoise(std=noise)
    update: Callable[[Tensor, Tensor], Tensor] | None = None
    if observation == "mask":
        seen = torch.rand(size, size, generator=generator) < 0.25
        operator = Identity()
        model = GaussianNoise(std=torch.where(seen, noise, math.inf))
        update = _by_pixels(seen, noise, power)
    elif observation == "dense":
        matrix = torch.randn(data, size * size, generator=generator, dtype=torch.float64)
        operator = Matrix(matrix / size, input_shape=shape)
        update = _by_matrix(matrix / size, noise, power)
    elif observation == "heteroscedastic":
        std = torch.logspace(0, 1, size, dtype=torch.float64).expand(size, size)
        model = GaussianNoise(std=noise * std / std.square().mean().sqrt())
    elif observation == "correlated":
        spectrum = 1 / (1 + (k / 8) ** 2)
        model = GaussianNoise(power=noise**2 * spectrum / spectrum.mean())
    clean = operator(truth[None])[0]
    y = clean + _noise(model, torch.randn(clean.shape, generator=generator, dtype=torch.float64))
    if update is None:
        update = _iterated(Likelihood(y, operator, model), power)
    prior = GaussianScore(torch.zeros(shape, dtype=dtype), power=power.to(dtype), sde=sde or EDM())
    likelihood = Likelihood(y.to(dtype), operator.to(dtype=dtype), model)
    found = ObservedField(prior, likelihood, truth, torch.zeros_like(truth), k, update, model)
    return replace(found, mean=update(torch.zeros_like(truth)[None], y[None])[0])


def _noise(model: GaussianNoise, z: Tensor) -> Tensor:
    """Noise of the model from normals z; none where the data are masked."""
    masked = model.masked(tuple(z.shape))
    e = model.color(z)
    return e if masked is None else torch.where(masked, 0.0, e)


def _iterated(likelihood: Likelihood, power: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(z, r) to z + C A^T S^-1 (r - A z), by conjugate gradients."""

    def update(z: Tensor, r: Tensor) -> Tensor:
        linear = likelihood.operator.linearize(z)
        report = likelihood.solve_spectral(linear, r - linear(z), power, _TOL, max_iter=4000)
        return z + filtered(linear.adjoint(report.x), power)

    return update


def _by_matrix(matrix: Tensor, std: float, power: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The same by a Cholesky factor of S, with white noise."""

    @functools.cache
    def factor() -> Tensor:
        size = power.shape[-1]
        rows = matrix.reshape(len(matrix), 1, size, size).split(512)
        spread = torch.cat([filtered(part, power).flatten(1) @ matrix.T for part in rows])
        return torch.linalg.cholesky(spread + std**2 * torch.eye(len(matrix), dtype=torch.float64))

    def update(z: Tensor, r: Tensor) -> Tensor:
        missing = r - z.flatten(1) @ matrix.T
        v = torch.cholesky_solve(missing.T, factor()).T
        return z + filtered((v @ matrix).reshape(z.shape), power)

    return update


def _by_pixels(seen: Tensor, std: float, power: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The same for the pixels of a mask (size, size)."""
    row, column = seen.nonzero(as_tuple=True)

    @functools.cache
    def factor() -> Tensor:
        size = len(seen)
        c = torch.fft.ifft2(power).real  # of two pixels, by their distance
        spread = c[(row[:, None] - row[None, :]) % size, (column[:, None] - column[None, :]) % size]
        return torch.linalg.cholesky(spread + std**2 * torch.eye(len(row), dtype=torch.float64))

    def update(z: Tensor, r: Tensor) -> Tensor:
        missing = (r - z)[..., row, column]
        v = torch.cholesky_solve(missing.flatten(1).T, factor()).T
        image = torch.zeros_like(z)
        image[..., row, column] = v.reshape(missing.shape)
        return z + filtered(image, power)

    return update
