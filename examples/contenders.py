"""Posterior sampling by diffpost, azula, score_models and deepinv, with one denoiser for all of them.

Every contender is called as `method(problem, steps, seed, **parameters)` and answers with its draws and with what they
cost: evaluations of the denoiser and products with its Jacobian, for each draw, counted where all of them enter. All
get the same data, operator and two ends of the noise, and a variance-exploding process, uniform in log noise unless
the library knows no other (deepinv's DiffPIR has the variance-preserving one of its authors).

What is changed of a library, and why:

* azula's DPS divides by the norm of the residual of the whole batch, so that a draw would depend on its neighbours;
  its strength is scaled so that every draw has its own norm, as published.
* deepinv's denoisers take images in [0, 1] and its samplers map them to [-1, 1]; here the map is left out, or, in
  DiffPIR, where it is built in together with a clip, images are scaled into that range first. Its seeds are ignored
  where no generator is handed over, so one is. Its DPS clips to [-1, 1]; here it does not.
* deepinv's PiGDM takes images of unit variance, so images are divided by the prior's standard deviation. The proximal
  step of its DiffPIR is solved exactly.
* score_models has no likelihood of its own; the convolved one of its authors' papers is solved exactly.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import math
from collections.abc import Callable
from typing import Any

import torch
from known_posteriors import Draws, Problem, View
from torch import Tensor

import diffpost as dp
from diffpost.guidance import MomentMatching

# --- diffpost ---


@functools.lru_cache(maxsize=8)
def _levels(problem: Problem, steps: int) -> Any:
    """Fitted once, as for any number of draws."""
    low, high = problem.ends
    sampler = dp.DPMSolver(steps, eta=1.0, nsr_min=low, nsr_max=high)
    return dp.FittedLevels(sampler).prepared(dp.Posterior(problem.prior, problem.likelihood))


def ours(
    problem: Problem,
    steps: int,
    seed: int,
    n: int,
    fitted: bool = False,
    particles: int = 0,
    exact: bool = False,
    preconditioner: Any = None,
) -> Draws:
    """`Posterior` with the guidance that it takes by itself and `DPMSolver(eta=1)`, what `dp.recommend` takes.

    Args:
        fitted: levels fitted to the posterior.
        particles: of `TwistedSMC` instead, what `dp.recommend` takes for few data; n is rounded up to whole clouds.
        exact: moment matching with the exact Jacobian, its solve preconditioned by ``preconditioner``.
    """
    guidance = MomentMatching(tol=1e-3, precondition=preconditioner) if exact else None
    posterior = dp.Posterior(problem.prior, problem.likelihood, guidance)
    low, high = problem.ends
    sampler: Any = dp.DPMSolver(steps, eta=1.0, nsr_min=low, nsr_max=high)
    pilot = 0.0
    if particles:
        # it finds its own ends, and its pilot is not counted: a few dozen evaluations for all draws
        sampler, n = (
            dp.TwistedSMC(particles, max(steps - 1, 1)),
            particles * math.ceil(n / particles),
        )
    elif fitted:
        sampler = _levels(problem, steps)
        pilot = sampler.pilot_calls
    made = dp.sample(posterior, n, sampler, seed=seed, batch_size=n, progress=False)
    weights = None if made.log_weights is None else made.weights
    return Draws(made.x.double(), weights, made.calls, made.vjps, pilot)


# --- azula ---


class _PerDraw:
    """A strength of DPS that turns the norm over the batch into each draw's own."""

    def __init__(self, zeta: float) -> None:
        self.zeta, self.value = zeta, torch.ones(1, 1)

    def __mul__(self, gradient: Tensor) -> Tensor:
        return self.zeta * self.value.to(gradient) * gradient


def azula_denoiser(view: View, ends: tuple[float, float]) -> Any:
    """The denoiser as a module of azula, on its variance-exploding schedule."""
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VESchedule

    class Wrapped(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VESchedule(*ends)

        def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Any:
            return DiracPosterior(mean=view.denoise(x_t, self.schedule.sigma(t)))

    return Wrapped()


def azula_mmps(view: View, denoiser: Any, std: float, iterations: int) -> Any:
    from azula.guidance import MMPSDenoiser

    return MMPSDenoiser(denoiser, view.y, view.forward, lambda v: std**2 * v, iterations=iterations)


def spectrum(power: Tensor) -> Any:
    """A covariance for azula that is diagonal under the FFT, power (h, w)."""
    from azula.linalg.covariance import Covariance

    class Spectrum(Covariance):
        shape = property(lambda self: power.shape)
        inv = property(lambda self: spectrum(1 / power))

        def __add__(self, other: Any) -> Any:
            return spectrum(power + float(other.lmbda))

        def __matmul__(self, v: Tensor) -> Tensor:
            image = torch.fft.fft2(v.reshape(-1, *power.shape)) * power
            return torch.fft.ifft2(image).real.reshape(v.shape)

        __call__ = __matmul__
        color = logdet = __mul__ = NotImplemented

    return Spectrum()


def _twist(view: View, std: float, variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """log N(y; A D, Sigma + r^2 A A^T) up to a constant, r^2 = v nsr^2/(v + nsr^2), PiGDM's evidence."""
    matrix = view.forward(torch.eye(view.size, dtype=view.y.dtype)).T
    values, basis = torch.linalg.eigh(matrix @ matrix.T)

    def twist(denoised: Tensor, nsr: Tensor) -> Tensor:
        spread = std**2 + variance * nsr**2 / (variance + nsr**2) * values
        turned = (view.y - view.forward(denoised)) @ basis
        return -0.5 * (turned.square() / spread).sum(1) - 0.5 * spread.log().sum()

    return twist


def azula(
    problem: Problem,
    steps: int,
    seed: int,
    n: int,
    kind: str = "MMPS",
    sampler: str = "DDPM",
    iterations: int = 1,
    zeta: float = 1.0,
    ridge: float = 0.0,
    eta: float = 1.0,
    variance: float | None = None,
    power: Tensor | None = None,
) -> Draws:
    """A guidance of azula with one of its samplers.

    Args:
        kind: "MMPS", "JFPS", "DPS", "PGDM" or "TDS"; the last three are samplers themselves.
        sampler: "DDPM", or "xEAB", the multistep exponential one of order 2.
        iterations: of the solves of MMPS and JFPS; zeta: strength of DPS.
        ridge: A^T (A A^T + ridge)^-1 is PGDM's inverse, which ignores noise as published; eta is PGDM's too.
        variance, power: of the prior, for JFPS and TDS; None is the true variance of a pixel.
    """
    from azula import guidance
    from azula import sample as samplers
    from azula.linalg.covariance import IsotropicCovariance

    view = View(problem)
    denoiser = azula_denoiser(view, problem.ends)
    given: dict[str, Any] = {"steps": steps, "silent": True, "dtype": torch.float64}
    width = problem.variance if variance is None else variance
    if kind == "DPS":
        strength = _PerDraw(zeta)

        def forward(v: Tensor) -> Tensor:
            data = view.forward(v)
            with torch.no_grad():
                own = torch.linalg.vector_norm(view.y - data, dim=1, keepdim=True)
                strength.value = own.square().sum().sqrt() / own.clamp_min(1e-30)
            return data

        run = guidance.DPSSampler(denoiser, view.y, forward, zeta=strength, **given)
    elif kind == "PGDM":
        # Sigma + s A A^T with s = std^2/ridge is A A^T + ridge but for a factor
        scale = problem.std**2 / max(ridge, 1e-6)

        def inverse(v: Tensor) -> Tensor:
            return scale * view.adjoint(view.solve(v, scale))

        run = guidance.PGDMSampler(denoiser, view.y, view.forward, inverse, eta=eta, **given)
    elif kind == "TDS":
        run = guidance.TDSSampler(denoiser, _twist(view, problem.std, width), **given)
    else:
        if kind == "MMPS":
            guided = azula_mmps(view, denoiser, problem.std, iterations)
        else:
            cov_x = IsotropicCovariance(width) if power is None else spectrum(power)
            cov_y = IsotropicCovariance(problem.std**2)
            guided = guidance.JFPSDenoiser(
                denoiser, view.y, view.forward, cov_y, cov_x, iterations=iterations
            )
        made = samplers.DDPMSampler if sampler == "DDPM" else samplers.xEABSampler
        run = made(guided, **given)
    torch.manual_seed(seed)
    x = run.init((n, view.size), var=problem.variance, dtype=problem.prior.dtype)
    return view.drawn(run(x))


# --- score_models ---


def score_model(view: View, ends: tuple[float, float]) -> Any:
    """The denoiser as a model of score_models, on its variance-exploding process."""
    import score_models as peer

    class Net(torch.nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            sigma = model.sde.sigma(t.double())[0]
            return ((view.denoise(x, sigma) - x) / sigma).to(x)

    with contextlib.redirect_stdout(io.StringIO()):
        model = peer.ScoreModel(Net(), sde="ve", sigma_min=ends[0], sigma_max=ends[1], device="cpu")
    return model


def score_models(
    problem: Problem, steps: int, seed: int, n: int, guidance_factor: float = 1.0
) -> Draws:
    """Euler-Maruyama with the convolved likelihood, as score_models' authors ran it."""
    view = View(problem)
    model = score_model(view, problem.ends)

    def likelihood_score(t: Tensor, x: Tensor) -> Tensor:
        s = float(model.sde.sigma(t.double())[0]) ** 2
        return view.adjoint(view.solve(view.y - view.forward(x), s)).to(x)

    torch.manual_seed(seed)
    quiet = io.StringIO()
    with torch.no_grad(), contextlib.redirect_stderr(quiet), contextlib.redirect_stdout(quiet):
        x = model.sample(
            (n, view.size),
            steps,
            likelihood_score_fn=likelihood_score,
            guidance_factor=guidance_factor,
        )
    return view.drawn(x)


# --- deepinv ---


def deepinv_pair(view: View, std: float, scale: float, offset: float = 0.0) -> tuple[Any, Any, Any]:
    """Denoiser, physics and data of images u = offset + x/scale, (B, 1, h, w), as deepinv takes them."""
    import deepinv as peer

    shape = view.image_shape

    class Wrapped(torch.nn.Module):
        def forward(self, u: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            level = torch.as_tensor(sigma).detach() * scale
            return offset + view.denoise((u - offset) * scale, level) / scale

    class Physics(peer.physics.LinearPhysics):
        def prox_l2(self, z: Tensor, y: Tensor, gamma: Any, **kwargs: Any) -> Tensor:
            # argmin gamma |A u - y|^2/2 + |u - z|^2/2 = z + gamma A^T (1 + gamma A A^T)^-1 (y - A z)
            solved = view.solve(y - view.forward(z), float(gamma) * std**2)
            return z + float(gamma) * std**2 * view.adjoint(solved).reshape(z.shape)

    physics = Physics(
        A=lambda u, **kwargs: view.forward(u),
        A_adjoint=lambda r, **kwargs: view.adjoint(r).reshape(-1, *shape),
        noise_model=peer.physics.GaussianNoise(std / scale),
    )
    y = view.y / scale + view.forward(torch.full((1, *shape), offset, dtype=view.y.dtype))
    return Wrapped(), physics, y


def deepinv(
    problem: Problem,
    steps: int,
    seed: int,
    n: int,
    kind: str = "MomentMatching",
    solver: str = "DDPM",
    weight: float = 1.0,
    guidance: str = "norm",
    iterations: int = 3,
    zeta: float = 0.1,
    lmbda: float = 7.0,
    reach: float = 1.0,
    unit: float = 1.0,
) -> Draws:
    """A guidance of deepinv on its variance-exploding process, or its DiffPIR.

    Args:
        kind: "MomentMatching", "PiGDM", "DPS" or "DiffPIR".
        solver: "DDPM" or "DDIM".
        weight, guidance: of DPS; iterations: of the solves of the first two.
        zeta, lmbda: of DiffPIR; reach: its range of pixels in units of the problem's bound.
        unit: standard deviation of the prior's pixels that images are divided by, over the true one.
    """
    import deepinv as peer

    view = View(problem)
    shape = view.image_shape
    rng = torch.Generator().manual_seed(seed)
    if kind == "DiffPIR":
        denoiser, physics, y = deepinv_pair(view, problem.std, 2 * reach * problem.bound, 0.5)
        torch.manual_seed(seed)
        run = peer.sampling.DiffPIR(
            denoiser,
            peer.optim.data_fidelity.L2(),
            sigma=float(physics.noise_model.sigma),
            max_iter=steps,
            zeta=zeta,
            lambda_=lmbda,
        )
        u = run(y.expand(n, -1), physics)
        return view.drawn((u - 0.5) * 2 * reach * problem.bound)
    scale = unit * math.sqrt(problem.variance)
    denoiser, physics, y = deepinv_pair(view, problem.std, scale)
    if kind == "DPS":
        fidelity = peer.sampling.DPSDataFidelity(weight=weight, clip=None, guidance=guidance)
    elif kind == "PiGDM":
        fidelity = peer.sampling.PiGDMDataFidelity(cg_max_iter=iterations)
    else:
        fidelity = peer.sampling.MomentMatchingDataFidelity(cg_max_iter=iterations)
    integrator = {"DDPM": peer.sampling.DDPMSolver, "DDIM": peer.sampling.DDIMSolver}[solver]
    low, high = (end / scale for end in problem.ends)
    run = peer.sampling.PosteriorDiffusion(
        data_fidelity=fidelity,
        denoiser=denoiser,
        sde=peer.sampling.VarianceExplodingDiffusion(sigma_min=low, sigma_max=high, alpha=1.0),
        solver=integrator(torch.linspace(1, 0, steps + 1, dtype=torch.float64), rng=rng),
        minus_one_one=False,
    )
    return view.drawn(run(y.expand(n, -1), physics, x_init=(n, *shape)) * scale)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
