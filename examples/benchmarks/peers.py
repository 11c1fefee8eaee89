"""azula's and score_models' posterior sampling on our problems, counted as our methods are.

Both get the exact denoiser on their own variance-exploding schedule between the same two ends of the noise as our
methods. Images are flattened. azula runs in float64, score_models in its float32.

Their DPS takes the norm of the residual over the whole batch, which makes a draw depend on its neighbours; here the
strength is scaled, draw by draw, so that each has the norm of its own residual, as published.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffpost.instrument import Counter
from diffpost.score import ScoreModel

from .drawing import Draws, Method, Setting

AZULA = (
    "azula DPS",
    "azula PGDM",
    "azula TMPD",
    "azula MMPS, 1 iteration",
    "azula MMPS, 4 iterations",
    "azula TDS",
    "azula DiffPIR",
    "azula JFPS",
)
CONVOLVED = "score_models, convolved"


def installed(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


class _Problem:
    """Flat images and data, with counts."""

    def __init__(self, setting: Setting) -> None:
        self.prior: ScoreModel = setting.prior
        self.operator = setting.likelihood.operator
        self.noise = setting.likelihood.noise
        self.data_shape = setting.likelihood.data_shape
        masked = self.noise.masked(self.data_shape)
        self.seen: Tensor | slice = slice(None)
        if masked is not None:
            self.seen = (~masked).expand(self.data_shape).flatten()
        self.y = setting.likelihood.y.double().reshape(1, -1)[:, self.seen]
        self.counter = Counter()

    def forward(self, v: Tensor) -> Tensor:
        """A v, (B, d) to (B, m), without masked data."""
        image = v.to(self.prior.dtype).reshape(-1, *self.prior.shape)
        return self.operator(image).flatten(1).to(v)[:, self.seen]

    def denoise(self, v: Tensor, sigma: Tensor) -> Tensor:
        """The exact denoiser at sigma, (B, d); gradients through it are counted."""
        self.counter.calls += 1
        inner = v.view_as(v)
        if inner.requires_grad:
            inner.register_hook(self._count)
        image = inner.to(self.prior.dtype).reshape(-1, *self.prior.shape)
        return self.prior.denoise(image, self.prior.sde.t_of_nsr(sigma)).flatten(1).to(v)

    def _count(self, gradient: Tensor) -> None:
        self.counter.vjps += 1

    def covariance(self, v: Tensor) -> Tensor:
        """Sigma v, (B, m), for noise that is independent or stationary."""
        data = torch.zeros(len(v), math.prod(self.data_shape), dtype=v.dtype)
        data[:, self.seen] = v
        data = data.reshape(-1, *self.data_shape)
        return self.noise.color(self.noise.color(data)).flatten(1)[:, self.seen]

    @functools.cached_property
    def variance(self) -> Tensor:
        """Diagonal of Sigma, (m,)."""
        ones = torch.ones(1, self.y.shape[1], dtype=torch.float64)
        return self.covariance(ones)[0]

    @functools.cached_property
    def matrix(self) -> Tensor:
        """A as a matrix (m, d); for few data or pixels."""
        return self.forward(torch.eye(math.prod(self.prior.shape), dtype=torch.float64)).T


def azula(name: str, steps: int, variance: float) -> Method:
    """A method of azula by its name here.

    Args:
        name: of AZULA.
        steps: denoiser calls.
        variance: of a pixel of the prior, for the methods that ask for one.
    """

    def method(setting: Setting) -> Draws:
        from azula.denoise import Denoiser, DiracPosterior
        from azula.noise import VESchedule

        problem = _Problem(setting)

        class Exact(Denoiser):
            def __init__(self) -> None:
                super().__init__()
                self.schedule = VESchedule(*setting.ends)

            def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
                return DiracPosterior(mean=problem.denoise(x_t, self.schedule.sigma(t)))

        sampler = _azula_sampler(name, problem, Exact(), steps, variance)
        torch.manual_seed(setting.seed)
        parts = []
        size = setting.n if setting.batch is None else setting.batch
        for start in range(0, setting.n, size):
            count = min(size, setting.n - start)
            problem.counter.calls = problem.counter.vjps = 0
            x = sampler.init((count, math.prod(setting.prior.shape)), var=variance)
            parts.append(sampler(x))
        x = torch.cat(parts).reshape(-1, *setting.prior.shape)
        return Draws(x, None, problem.counter.calls, problem.counter.vjps, {})

    return method


def _azula_sampler(name: str, problem: _Problem, denoiser: Any, steps: int, variance: float) -> Any:
    from azula import guidance
    from azula.linalg.covariance import IsotropicCovariance
    from azula.sample import DDPMSampler

    given: dict[str, Any] = {"steps": steps, "silent": True, "dtype": torch.float64}
    y, kind = problem.y, name.split()[1].rstrip(",")
    if kind == "DPS":
        operator, strength = _own_norm(problem)
        return guidance.DPSSampler(denoiser, y, operator, zeta=strength, **given)
    if kind == "PGDM":
        inverse = torch.linalg.pinv(problem.matrix)
        return guidance.PGDMSampler(
            denoiser, y, problem.forward, lambda v: v @ inverse.T, eta=1.0, **given
        )
    if kind == "TDS":
        return guidance.TDSSampler(denoiser, _twist(problem, variance), **given)
    if kind == "MMPS":
        guided = guidance.MMPSDenoiser(
            denoiser, y, problem.forward, problem.covariance, iterations=int(name.split()[2])
        )
    elif kind == "TMPD":
        guided = guidance.TMPDenoiser(denoiser, y, problem.forward, problem.variance)
    elif kind == "DiffPIR":
        guided = guidance.DiffPIRDenoiser(
            denoiser, y, problem.forward, problem.variance, iterations=4
        )
    else:
        prior = IsotropicCovariance(torch.tensor(variance, dtype=torch.float64))
        guided = guidance.JFPSDenoiser(
            denoiser, y, problem.forward, problem.covariance, prior, iterations=4
        )
    return DDPMSampler(guided, **given)


def _own_norm(problem: _Problem) -> tuple[Callable[[Tensor], Tensor], Any]:
    """The operator, and a strength of DPS that turns the norm over the batch into each draw's own."""

    class Strength:
        def __init__(self) -> None:
            self.value = torch.ones(1, 1, dtype=torch.float64)

        def __mul__(self, gradient: Tensor) -> Tensor:
            return self.value * gradient

    strength = Strength()

    def operator(v: Tensor) -> Tensor:
        data = problem.forward(v)
        with torch.no_grad():
            error = problem.y - data
            own = torch.linalg.vector_norm(error, dim=1, keepdim=True)
            strength.value = torch.linalg.vector_norm(error) / own.clamp_min(1e-30)
        return data

    return operator, strength


def _twist(problem: _Problem, variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """log N(y; A D, Sigma + r^2 A A^T) up to a constant, r^2 = v nsr^2/(v + nsr^2)."""
    matrix = problem.matrix
    m = len(matrix)
    noise = problem.covariance(torch.eye(m, dtype=torch.float64))

    def twist(denoised: Tensor, nsr: Tensor) -> Tensor:
        spread = variance * nsr**2 / (variance + nsr**2)
        root = torch.linalg.cholesky(noise + spread * matrix @ matrix.T)
        r = (problem.y - problem.forward(denoised)).T
        white = torch.linalg.solve_triangular(root, r, upper=False)
        return -0.5 * white.square().sum(0) - root.diagonal().log().sum()

    return twist


def score_models(steps: int) -> Method:
    """score_models' Euler-Maruyama with the convolved likelihood of its authors' papers."""

    def method(setting: Setting) -> Draws:
        import score_models as peer

        problem = _Problem(setting)
        matrix = problem.matrix
        noise = problem.covariance(torch.eye(len(matrix), dtype=torch.float64))
        values, basis = torch.linalg.eigh(matrix @ matrix.T)
        white = bool((noise == noise[0, 0] * torch.eye(len(noise))).all())

        class Net(torch.nn.Module):
            def forward(self, t: Tensor, x: Tensor) -> Tensor:
                sigma = model.sde.sigma(t.double())[:, None]
                denoised = problem.denoise(x.double(), sigma[0, 0])
                return ((denoised - x) / sigma).to(x)

        with contextlib.redirect_stdout(io.StringIO()):
            model = peer.ScoreModel(
                Net(), sde="ve", sigma_min=setting.ends[0], sigma_max=setting.ends[1], device="cpu"
            )

        def likelihood_score(t: Tensor, x: Tensor) -> Tensor:
            s = float(model.sde.sigma(t.double())[0]) ** 2
            r = problem.y - problem.forward(x.double())
            if white:
                solved = (r @ basis / (noise[0, 0] + s * values)) @ basis.T
            else:
                solved = torch.linalg.solve(noise + s * matrix @ matrix.T, r.T).T
            return (solved @ matrix).to(x)

        torch.manual_seed(setting.seed)
        quiet = io.StringIO()
        with contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
            x = model.sample(
                (setting.n, math.prod(setting.prior.shape)),
                steps,
                likelihood_score_fn=likelihood_score,
            )
        x = x.double().reshape(-1, *setting.prior.shape)
        return Draws(x, None, problem.counter.calls, problem.counter.vjps, {})

    return method
