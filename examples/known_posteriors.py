"""Two posteriors that are known exactly, with denoisers that answer as networks do, and how wrong draws of them are."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diffpost as dp
from diffpost.diagnostics import sliced_wasserstein, sliced_wasserstein_floor
from diffpost.instrument import Counter, Wrapped
from diffpost.networks.denoising_error import covariance_from_table, denoising_error
from diffpost.oracles import FieldOracle, gaussian_field, gaussian_mixture

NETWORK = "galaxies-64"  # what a call costs
FIELD_SIZE = 32
MIXTURES = range(2)
MIXTURE_VARIANCE = 129.0  # of a pixel, with equal weights: 1 + 64 (0 + 1 + 1 + 4 + 4)/5


@dataclass(frozen=True)
class Problem:
    """A posterior that every contender draws.

    Attributes:
        prior: the denoiser; like a network, it has VJPs alone.
        likelihood: data with white noise.
        std: of the noise.
        ends: nsr of the last and of the first level.
        variance: of a pixel of the prior.
        bound: largest absolute pixel that matters, for libraries that clip.
    """

    prior: dp.ScoreModel
    likelihood: dp.Likelihood
    std: float
    ends: tuple[float, float]
    variance: float
    bound: float


@dataclass(frozen=True)
class Draws:
    """Draws (n, *shape), their weights or None, and the cost of one: calls, VJPs, evaluations of a pilot for all."""

    x: Tensor
    weights: Tensor | None
    calls: float
    vjps: float
    pilot: float = 0.0


class _Tap(torch.autograd.Function):
    """The identity, which counts gradients that pass; also under torch.func."""

    @staticmethod
    def forward(x: Tensor, counter: Counter) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.counter = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.counter.vjps += 1
        return gradient, None


class View:
    """A problem as the other libraries are handed it: flat images and data, A, its adjoint, and the denoiser, counted."""

    def __init__(self, problem: Problem) -> None:
        self.prior, self.likelihood = problem.prior, problem.likelihood
        self.shape = tuple(problem.prior.shape)
        self.size = math.prod(self.shape)
        self.linear = self.likelihood.operator.linearize(
            torch.zeros(1, *self.shape, dtype=self.prior.dtype)
        )
        self.data_shape = self.likelihood.data_shape
        self.y = self.likelihood.y.reshape(1, -1).to(self.prior.dtype)
        self.counter = Counter()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of one image with its channel, for libraries that take nothing else: a row of pixels for a vector."""
        return self.shape if len(self.shape) == 3 else (1, 1, self.size)

    def image(self, v: Tensor) -> Tensor:
        return v.to(self.prior.dtype).reshape(-1, *self.shape)

    def denoise(self, v: Tensor, nsr: Tensor | float) -> Tensor:
        """E[x_0 | x_0 + nsr z = v], in the shape of v (B, ...)."""
        self.counter.calls += 1
        inner = _Tap.apply(self.image(v), self.counter)
        level = torch.as_tensor(nsr, dtype=torch.float64).flatten()[0]
        return self.prior.denoise(inner, self.prior.sde.t_of_nsr(level)).reshape(v.shape).to(v)

    def forward(self, v: Tensor) -> Tensor:
        """A v, (B, ...) to (B, m)."""
        return self.linear(self.image(v)).flatten(1).to(v)

    def adjoint(self, r: Tensor) -> Tensor:
        """A^T r, (B, m) to (B, d)."""
        data = r.to(self.prior.dtype).reshape(-1, *self.data_shape)
        return self.linear.adjoint(data).flatten(1).to(r)

    def solve(self, r: Tensor, s: float) -> Tensor:
        """(Sigma + s A A^T)^-1 r, (B, m)."""
        data = r.to(self.prior.dtype).reshape(-1, *self.data_shape)
        scale = torch.full((len(data),), s, dtype=self.prior.dtype)
        return self.likelihood.solve_operator(self.linear, data, scale, tol=1e-6).x.flatten(1).to(r)

    def drawn(self, x: Tensor) -> Draws:
        return Draws(self.image(x).double(), None, self.counter.calls, self.counter.vjps)


Method = Callable[..., Draws]


class KnownField(Wrapped):
    """A Gaussian field that answers as a trained prior does: VJPs alone, a table of its denoising errors in its card.

    Args:
        oracle: the field.
        net: a network that is evaluated, and differentiated, at every call, for its cost.
    """

    def __init__(self, oracle: FieldOracle, net: dp.ScoreModel | None = None) -> None:
        super().__init__(oracle.prior)
        self.analytic, self.net = False, net
        self.power = oracle.prior.eigenvalues[..., : oracle.prior.shape[-1] // 2 + 1].float()
        self.table: Any = None

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        gain = self.power / (self.power + float(self.sde.nsr(t)) ** 2)
        answer = torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=x.shape[-2:])
        return answer if self.net is None else answer + 0.0 * self.net.denoise(x, t)

    def error_covariance(self) -> Any:
        return self.table


class KnownMixture(Wrapped):
    """A mixture of components N(m_k, 1) that answers as a network does, by two matrix products."""

    def __init__(self, prior: dp.GaussianMixtureScore) -> None:
        super().__init__(prior)
        self.analytic = False
        self.means, self.logits = prior.means, prior.weights.log()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        s = float(self.sde.nsr(t)) ** 2
        far = x @ self.means.T - 0.5 * self.means.square().sum(1)
        share = (self.logits + far / (1 + s)).softmax(1)
        return (x + s * share @ self.means) / (1 + s)


@functools.cache
def field_problem(network: bool = False) -> tuple[Problem, FieldOracle]:
    oracle = gaussian_field(FIELD_SIZE)
    prior = KnownField(oracle)
    # as training leaves it in a card, from 256 images
    images = oracle.prior.sample(256, seed=5).float()
    prior.table = covariance_from_table(denoising_error(prior, images))
    if network:
        prior.net = dp.optimize(dp.load_prior(NETWORK)).with_shape(prior.shape)
    bound = float(oracle.exact_draws(64).abs().max())
    ends = oracle.prior.sde.nsr_range
    return Problem(prior, oracle.likelihood, 0.1, ends, 1.0, bound), oracle


@functools.cache
def mixture_problem(seed: int) -> tuple[Problem, list[Tensor], float]:
    """A mixture, exact draws of its posterior and their distance from each other."""
    oracle = gaussian_mixture(80, 2, seed)
    prior = KnownMixture(oracle.prior)
    # the ends that TwistedSMC finds for itself
    found = dp.TwistedSMC(2, 2).prepared(dp.Posterior(prior, oracle.likelihood))
    exact = [oracle.exact_draws(1000, 1 + i) for i in range(4)]
    floor = sliced_wasserstein_floor(
        oracle.exact_draws, 1000, repeats=10, slices=300, seed=100
    ).mean
    ends = (float(found.nsr_min or 0), float(found.nsr_max or 0))
    std = float(oracle.likelihood.noise.variance.sqrt())
    bound = 1.05 * float(exact[0].abs().max())
    return Problem(prior, oracle.likelihood, std, ends, MIXTURE_VARIANCE, bound), exact, floor


def field_errors(method: Method, steps: int, parameters: dict[str, Any]) -> tuple[float, ...]:
    """Steps, calls, VJPs and evaluations of a pilot, then the worst band's error and that of the mean."""
    problem, oracle = field_problem()
    n = min(max(2**11 // steps, 64), 256)
    draws = method(problem, steps, 1, n, **parameters)
    report = oracle.report(draws.x)
    worst = max(abs(ratio - 1) for ratio in report.ratios)
    # fewer draws at more steps: the bias of the mean, as 256 draws would show it
    floor = report.floor * math.sqrt(n / 256)
    bias = max(report.mean_error**2 - report.floor**2, 0.0)
    return (*_cost(draws), worst, math.sqrt(bias + floor**2) / floor)


def mixture_errors(method: Method, steps: int, parameters: dict[str, Any]) -> tuple[float, ...]:
    """The cost, then the mean over problems of distance over floor."""
    ratios = []
    for seed in MIXTURES:
        problem, exact, floor = mixture_problem(seed)
        draws = method(problem, steps, 1000 + seed, 1000, **parameters)
        if not bool(draws.x.isfinite().all()):
            return (*_cost(draws), math.nan)
        distances = [
            sliced_wasserstein(draws.x, x, 300, seed=i, x_weights=draws.weights)
            for i, x in enumerate(exact)
        ]
        ratios.append(statistics.mean(distances) / floor)
    return (*_cost(draws), statistics.mean(ratios))


def _cost(draws: Draws) -> tuple[float, float, float]:
    return draws.calls, draws.vjps, draws.pilot
