r"""Turns of image and parameters: Gibbs sampling.

    x ~ p(x | theta, y)        by the diffusion posterior, chain b under theta_b
    theta ~ p(theta | x, y)    by moves of Hamiltonian Monte Carlo on the exact likelihood of that image

Exact for any prior of images as far as the first line is: in the limit of many sweeps, and of a guidance and sampler
without error (moment matching for a Gaussian prior, in many steps). It is plain to state, and as slow as the image tells more
than the data: given a sharp image theta can hardly move, and the image then follows. If theta is known rho times better with
the image than without it, it takes about 1/rho^2 sweeps for an independent draw (Liu 1994, JASA 89, 958, where rho^2 is one less
the fraction of missing information). Behind a gravitational lens, which many pixels of the data know, that is bearable: of four
simulated lenses, as in examples/calibration_lenses.py, the slowest direction of five parameters had 1/rho^2 of 4 to 6. Where
it is not, :func:`sample_transported <diffpost.parameters.transported.sample_transported>` may do.

The metric of the moves is the curvature of the conditional, J^T Sigma^-1 J + I in z with J the derivative of A(theta) x
(Gauss and Newton), averaged over the chains of a problem and over the sweeps of the warm-up, and fixed from then on.

Many problems make one batch: data with a row for each chain, and ``group`` consecutive chains for each problem.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.guidance.base import Guidance
from diffpost.parameters.chains import MoveNoise
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.parameters.collapsed import drawn_images, response
from diffpost.parameters.family import ParametricLikelihood
from diffpost.parameters.hmc import HMC, HMCState
from diffpost.parameters.prior import ParameterPrior
from diffpost.parameters.result import JointSamples
from diffpost.random import derived_seed
from diffpost.sample import progress_bar
from diffpost.samplers import DPMSolver, Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["sample_blocked"]

_STEP = 1e-4  # in z, of the differences that make J


def sample_blocked(
    likelihood: ParametricLikelihood,
    prior: ParameterPrior,
    image_prior: ScoreModel,
    start: Tensor,
    *,
    sweeps: int = 100,
    warmup: int = 30,
    moves: int = 5,
    leapfrogs: int = 4,
    thin: int = 1,
    group: int | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> JointSamples:
    """Gibbs sampling of image and parameters.

    Args:
        likelihood: p(y | x, theta); with rows of y, chain b has row b.
        prior: of theta.
        image_prior: of x.
        start: (chains, P) theta at which the chains begin.
        sweeps: that are kept, a draw each.
        warmup: sweeps that adapt the moves and are dropped.
        moves: of theta in a sweep, of ``leapfrogs`` steps each.
        thin: every so many of the sweeps kept, the image is.
        group: chains of a problem, which learn their moves together; None is all of them. Data with rows must say.
        guidance: of the posterior of x given theta; None chooses.
        sampler: of it; None is DPMSolver(32, eta=1). It must be the draw of a conditional, so a deterministic one
            is as good.
        seed: of everything.
        batch_size: images computed together.
        checkpoint: a folder, from which the same call goes on; written after every sweep.
        progress: a bar.

    Returns:
        JointSamples: extras: ``step_size``. Of many problems, :meth:`JointSamples.of_chains` takes one out.

    Raises:
        ValueError: a start of another shape or outside the prior's bounds, numbers that are not positive, chains that are
            not whole groups, or rows of y that are not one a chain.
    """
    for name, value, least in (
        ("sweeps", sweeps, 1),
        ("warmup", warmup, 1),
        ("moves", moves, 1),
        ("thin", thin, 1),
    ):
        if value < least:
            raise ValueError(f"sample_blocked({name}={value}): expected at least {least}.")
    likelihood.check(prior)
    if start.ndim != 2 or start.shape[1] != len(prior):
        raise ValueError(
            f"sample_blocked: got a start {tuple(start.shape)}; expected (chains, {len(prior)})."
        )
    sampler = DPMSolver(32, eta=1.0) if sampler is None else sampler
    chains = len(start)
    if likelihood.rows is not None and (group is None or likelihood.rows != chains):
        raise ValueError(
            f"sample_blocked(group={group}): the data have {likelihood.rows} rows and there are {chains} chains; expected a "
            "row for each chain, and in group how many consecutive ones are of the same problem."
        )
    device = likelihood.y.device
    ids = torch.arange(chains, device=device)
    kernel = HMC(
        sweeps * moves, warmup * moves, group=group, leapfrogs=leapfrogs, learn_covariance=False
    )
    problems = chains // kernel.grouped(chains)
    info: dict[str, Any] = {
        "diffpost": __version__,
        "method": "blocked",
        "prior": prior.to_dict(),
        "start": start.tolist(),
        "sweeps": sweeps,
        "warmup": warmup,
        "moves": moves,
        "leapfrogs": leapfrogs,
        "thin": thin,
        "group": group,
        "sampler": repr(sampler),
        "guidance": repr(guidance),
        "seed": seed,
    }
    z = prior.unconstrain(start.double()).to(device)
    state: HMCState | None = None
    metric = torch.zeros(problems, len(prior), len(prior), dtype=torch.float64, device=device)
    theta: list[Tensor] = []
    kept: list[Tensor] = []
    spent = [0, 0.0]
    first = 0
    folder = None
    if checkpoint is not None:
        with torch.no_grad():
            zero = torch.zeros(chains, *likelihood.family.input_shape, dtype=torch.float64)
            begin = likelihood.log_prob(prior.values(prior.constrain(z)), zero.to(device))
        folder = Checkpoint(checkpoint, info, [*begin.tolist(), *response(image_prior)])
        saved = folder.load("state")
        if saved is not None:
            first = int(saved.pop("sweep"))
            metric = saved.pop("metric").to(device)
            theta = list(saved.pop("theta"))
            spent = saved.pop("spent").tolist()
            state = kernel.restored({k: v.to(device) for k, v in saved.items()})
            z = state.z
            kept = [_required(folder, i) for i in _places(first - warmup, thin)]

    with progress_bar(warmup + sweeps - first, progress) as advance:
        for sweep in range(first, warmup + sweeps):
            drawn = drawn_images(
                likelihood,
                prior.values(prior.constrain(z)),
                image_prior,
                guidance,
                sampler,
                derived_seed(seed, "images", sweep),
                batch_size,
                progress=False,
            )
            x = drawn.x.to(device).double()
            spent = [max(spent[0], drawn.calls), spent[1] + drawn.vjps]
            density = likelihood.given(prior, x)
            state = kernel.init(density, z) if state is None else kernel.refreshed(density, state)
            if sweep < warmup:
                found = _curvature(likelihood, prior, z, x, problems)
                metric = metric + (found - metric) / (sweep + 1)
                root = torch.linalg.cholesky(torch.linalg.inv(metric))
                state = dataclasses.replace(state, root=root)
            for move in range(moves):
                step = sweep * moves + move
                state = kernel.move(
                    density, state, MoveNoise(derived_seed(seed, "moves"), ids, step)
                )
            z = state.z
            done = sweep + 1 - warmup
            if done > 0:
                theta.append(prior.constrain(z).cpu())
                if (done - 1) % thin == 0:
                    kept.append(drawn.x)
                    if folder is not None:
                        folder.save(f"images-{done - 1:06d}", {"x": drawn.x})
            if folder is not None:
                more = {
                    "sweep": torch.tensor(sweep + 1),
                    "metric": metric,
                    "theta": torch.stack(theta) if theta else torch.zeros(0, chains, len(prior)),
                    "spent": torch.tensor(spent, dtype=torch.float64),
                }
                folder.save("state", state.arrays() | more)
            advance()
    if state is None:
        raise ValueError("sample_blocked: no sweep was made.")
    stacked = prior.unwrapped(torch.stack(theta, 1))
    places = torch.tensor(_places(sweeps, thin))
    x = torch.stack(kept, 1).flatten(0, 1)
    chain = torch.arange(chains).repeat_interleave(len(places))
    draw = places.repeat(chains)
    return JointSamples(
        names=prior.names,
        theta=stacked,
        acceptance=(state.accepted / kernel.draws).cpu(),
        nonfinite=state.nonfinite[:, 1].cpu(),
        samples=Samples(
            x,
            calls=int(spent[0]),
            vjps=spent[1] / (warmup + sweeps),
            info=info,
            extras={"theta": stacked[chain, draw], "chain": chain, "draw": draw},
        ),
        extras={"step_size": kernel.step_size(state).cpu()},
        info=info,
    )


def _places(sweeps: int, thin: int) -> list[int]:
    """The draws of which images are kept."""
    return list(range(0, max(sweeps, 0), thin))


def _required(folder: Checkpoint, i: int) -> Tensor:
    found = folder.load(f"images-{i:06d}")
    if found is None:
        raise ValueError(
            f"{folder.path} has lost the images of draw {i}; choose another folder to begin anew."
        )
    return found["x"]


def _curvature(
    likelihood: ParametricLikelihood, prior: ParameterPrior, z: Tensor, x: Tensor, problems: int
) -> Tensor:
    """J^T Sigma^-1 J + I in z, averaged over the chains of each problem: (problems, P, P)."""

    def white(z: Tensor) -> Tensor:
        residual = likelihood.residual(prior.values(prior.constrain(z)), x)
        return likelihood.noise.whiten(residual).flatten(1)

    columns = []
    with torch.no_grad():
        for i in range(z.shape[1]):
            off = torch.zeros_like(z)
            off[:, i] = _STEP
            columns.append((white(z + off) - white(z - off)) / (2 * _STEP))
    j = torch.stack(columns, 2)
    gram = (j.mT @ j).reshape(problems, -1, z.shape[1], z.shape[1])
    good = gram.isfinite().all((2, 3), keepdim=True)
    mean = torch.where(good, gram, 0.0).sum(1) / good.sum(1).clamp_min(1)
    return mean + torch.eye(z.shape[1]).to(z)
