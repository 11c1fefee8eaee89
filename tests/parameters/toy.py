"""A field behind a blur of unknown width, shifted by an unknown length: a problem whose evidence is a matrix away.

The prior of the field is Gaussian, a power law under an envelope that fixes where things are, so that a shift can be
seen. The posterior of width and shift is computed on a grid, from matrices built column by column and
torch.distributions, by none of the code under test.
"""

import math
from dataclasses import dataclass

import torch
from torch.distributions import MultivariateNormal

from diffpost.noise import GaussianNoise
from diffpost.operators.base import LinearOperator
from diffpost.parameters.family import OperatorFamily, ParametricLikelihood
from diffpost.parameters.gaussian import GaussianImage
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.priors import Normal, Uniform
from diffpost.score import GaussianScore
from diffpost.sde import EDM

F64 = torch.float64


class BlurAndShift(LinearOperator):
    """Periodic blur by a Gaussian of ``width`` pixels and shift by ``shift`` pixels along x, each (B,)."""

    def __init__(self, width, shift, size):
        self.size = size
        self.width, self.shift = width, shift
        ky = torch.fft.fftfreq(size, dtype=F64)[:, None]
        kx = torch.fft.rfftfreq(size, dtype=F64)[None]
        width, shift = width[:, None, None, None], shift[:, None, None, None]
        blur = torch.exp(-2 * math.pi**2 * width**2 * (ky**2 + kx**2))
        phase = 2 * math.pi * kx * shift
        # a real image has a real amplitude at the Nyquist frequency
        sine = torch.where(kx == 0.5, 0.0, -phase.sin())
        self.transfer = torch.complex(blur * phase.cos(), blur * sine)

    @property
    def batch(self):
        return len(self.transfer)

    def select(self, ids):
        return BlurAndShift(self.width[ids], self.shift[ids], self.size)

    def output_shape(self, input_shape):
        if tuple(input_shape[-2:]) != (self.size, self.size):
            raise ValueError(f"got {input_shape}")
        return tuple(input_shape)

    def __call__(self, x):
        return self._filtered(x, self.transfer)

    def adjoint(self, v):
        return self._filtered(v, self.transfer.conj())

    def _filtered(self, x, transfer):
        transfer = transfer.to(torch.complex128 if x.dtype == F64 else torch.complex64)
        return torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=(self.size, self.size))


class BlurFamily(OperatorFamily):
    names = ("width", "shift")

    def __init__(self, size, glow=0.0):
        self.input_shape = self.data_shape = (1, size, size)
        self.glow = glow

    def at(self, values):
        return BlurAndShift(values["width"], values["shift"], self.data_shape[-1])

    def background(self, values):
        if self.glow == 0:
            return None
        rows = torch.linspace(0, 1, self.data_shape[-1], dtype=F64)[:, None]
        return self.glow * values["width"].reshape(-1, 1, 1, 1) * rows.expand(self.data_shape)


@dataclass(frozen=True)
class Toy:
    score: GaussianScore
    cov: torch.Tensor
    likelihood: ParametricLikelihood
    prior: ParameterPrior
    truth: torch.Tensor
    noise: float
    image: torch.Tensor

    @property
    def gaussian(self):
        return GaussianImage.from_score(self.score)

    def grid(self, cells=28, noise=None, image=None, images=None):
        """Exact marginals of theta, (mean, std, cdf), by the evidence on a grid about its bulk.

        Args:
            cells: on a side.
            noise: another one than the true, for a control.
            image: given, the posterior with this image known, instead of all images marginalised.
            images: (weights, means, covariances) of a mixture that images follow; None is their normal.
        """
        images = ([1.0], [self.score.mean.flatten()], [self.cov]) if images is None else images
        return grid_marginals(
            lambda nodes: self._log_mass(nodes, noise, image, images),
            [(0.2, 2.5), (-4.0, 4.0)],
            (16, 16, cells),
        )

    def _log_mass(self, nodes, noise, image, images):
        noise = self.noise if noise is None else noise
        y = self.likelihood.y[0].flatten()
        value = []
        for part in nodes.split(64):
            values = self.prior.values(part)
            a = matrices(self.likelihood.family, values)
            background = self.likelihood.family.background(values)
            b = 0 if background is None else background.flatten(1)
            if image is not None:
                model = a @ image.flatten() + b
                value.append(-0.5 * ((y - model) / noise).square().sum(1))
                continue
            white = noise**2 * torch.eye(len(y), dtype=F64)
            parts = [
                math.log(w) + MultivariateNormal(a @ mean + b, a @ cov @ a.mT + white).log_prob(y)
                for w, mean, cov in zip(*images, strict=True)
            ]
            value.append(torch.stack(parts).logsumexp(0))
        return torch.cat(value) + self.prior.log_prob(nodes)


def grid_marginals(log_mass, window, counts):
    """Marginals of two parameters, (mean, std, cdf), on grids of ``counts`` cells a side, each about the last one's bulk.

    Args:
        log_mass: of nodes (n, 2), (n,).
        window: (low, high) of each parameter, where the first grid lies and every other stays.
    """
    for count in counts:
        axes = [
            low + (high - low) / count * (torch.arange(count, dtype=F64) + 0.5)
            for low, high in window
        ]
        mass = log_mass(torch.cartesian_prod(*axes)).softmax(0).reshape(count, count)
        found = [_moments(axes[i], mass.sum(1 - i)) for i in range(2)]
        window = [
            (max(w[0], float(m - 6 * s)), min(w[1], float(m + 6 * s)))
            for w, (m, s, _) in zip(window, found, strict=True)
        ]
    mean, std, cdf = zip(*found, strict=True)
    return torch.stack(mean), torch.stack(std), list(cdf)


def _moments(axis, p):
    """Mean, standard deviation and distribution function of cells of these probabilities."""
    step = axis[1] - axis[0]
    mean = (p * axis).sum()
    std = ((p * (axis - mean).square()).sum() + step**2 / 12).sqrt()
    return mean, std, _cdf(axis[0] - step / 2, step, p)


def _cdf(low, step, p):
    steps = torch.cat([p.new_zeros(1), p.cumsum(0)])

    def cdf(x):
        place = ((x - low) / step).clamp(0, len(p) - 1e-9)
        left = place.floor().long()
        return torch.lerp(steps[left], steps[left + 1], place - left)

    return cdf


def matrices(family, values):
    """A(theta) column by column, (B, m, d)."""
    size = math.prod(family.input_shape)
    eye = torch.eye(size, dtype=F64).reshape(size, *family.input_shape)
    batch = len(values["width"])
    columns = [family.at(values)(one.expand(batch, *one.shape)).flatten(1) for one in eye]
    return torch.stack(columns, 2)


def field(size=12, index=-3.0, envelope=2.0, spread=0.5):
    """Mean and covariance of the field, (1, size, size) and (d, d)."""
    k = torch.fft.fftfreq(size, 1 / size, dtype=F64)
    power = torch.hypot(k[:, None], k[None]).clamp_min(1) ** index
    kernel = torch.fft.ifft2(power / power.mean()).real
    i = torch.arange(size)
    rows = (i[:, None] - i[None]) % size
    stationary = kernel[rows[:, None, :, None], rows[None, :, None, :]].reshape(size**2, size**2)
    off = torch.arange(size, dtype=F64) - (size - 1) / 2
    bump = torch.exp(-0.5 * (off[:, None] ** 2 + off[None] ** 2) / envelope**2)
    gain = spread * (bump + 0.02).flatten()
    mean = bump[None]
    return mean, gain[:, None] * stationary * gain


def toy(size=12, noise=0.15, seed=0, glow=0.0, theta=(1.0, 0.4), sde=None, **shape):
    mean, cov = field(size, **shape)
    prior = ParameterPrior({"width": Uniform(0.2, 2.5), "shift": Normal(0.0, 1.0)})
    family = BlurFamily(size, glow)
    generator = torch.Generator().manual_seed(seed)
    root = torch.linalg.cholesky(cov + 1e-12 * torch.eye(len(cov), dtype=F64))
    white = torch.randn(len(cov), generator=generator, dtype=F64)
    image = mean + (root @ white).reshape(mean.shape)
    truth = torch.tensor(theta, dtype=F64)
    values = prior.values(truth[None])
    clean = family.at(values)(image[None])[0]
    background = family.background(values)
    clean = clean if background is None else clean + background[0]
    y = clean + noise * torch.randn(clean.shape, generator=generator, dtype=F64)
    score = GaussianScore(mean, cov=cov, sde=sde or EDM(0.002, 80.0))
    likelihood = ParametricLikelihood(y, family, GaussianNoise(std=noise))
    return Toy(score, cov, likelihood, prior, truth, noise, image)
