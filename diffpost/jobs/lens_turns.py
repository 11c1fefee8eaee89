"""Turns of source and lens: the last part of a lens job that is to follow the prior itself.

The chains of :mod:`diffpost.jobs.lens_inference` see a Gaussian of sources on coarse pixels. From their draws on, chains of
:func:`diffpost.parameters.sample_blocked` take turns on the fine grid: a source of the prior given the lens, then the
lens (and its light) given that source. As many chains as sources are wanted, and their last sweep gives these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from diffpost.guidance import Guidance
from diffpost.jobs.lens_inference import chosen_draws
from diffpost.jobs.lens_setup import LensScene
from diffpost.jobs.lens_system import FLUX, LensSystem
from diffpost.noise import GaussianNoise
from diffpost.parameters import (
    JointSamples,
    ParameterPrior,
    ParametricLikelihood,
    sample_blocked,
)
from diffpost.posterior import Posterior
from diffpost.random import derived_seed
from diffpost.samplers import DPMSolver, Sampler
from diffpost.score import ScoreModel

__all__ = ["free_parameters", "sample_turns", "sweeps_dropped"]


def free_parameters(system: LensSystem) -> ParameterPrior | None:
    """The prior of what is free in mass and light, beside a source of its own brightness; None where nothing is."""
    if system.prior is None or not system.known:
        return system.prior
    free = dict(zip(system.prior.names, system.prior.priors, strict=True))
    return ParameterPrior({**free, FLUX: 1.0})


def sweeps_dropped(turns: int) -> int:
    """Sweeps that adapt the moves and are dropped: half as many as are kept, 5 or more."""
    return max(5, turns // 2)


def sample_turns(
    system: LensSystem,
    scene: LensScene,
    joint: JointSamples,
    prior: ScoreModel,
    *,
    turns: int,
    samples: int,
    guidance: Guidance | None,
    sampler: Sampler | None,
    seed: int,
    batch_size: int | None,
    folder: Path | None,
    progress: bool,
    announce: Callable[[str], None] | None = None,
) -> tuple[JointSamples, Posterior]:
    """Chains of the lens under the prior itself, with the source of the last sweep of each, and what the sources followed.

    Args:
        joint: draws that the chains begin at, evenly spaced.
        prior: of the source, on the fine grid with its scale.
        turns: sweeps that are kept, each a draw of every chain.
        samples: chains, and sources.

    Returns:
        JointSamples: of the free parameters and the source's flux, (samples, turns, P + 1).

    Raises:
        ValueError: nothing is free, or fewer than 2 samples.
    """
    free = free_parameters(system)
    if free is None:
        raise ValueError("turns: the lens model has no free parameter; leave the turns out.")
    if samples < 2 or turns < 4:
        raise ValueError(
            f"turns: got {turns} turns of {samples} samples, which are chains here; expected at least 4 turns, and 2 samples "
            "for R-hat."
        )
    begin = chosen_draws(joint, samples)[0]
    theta = torch.stack([begin[:, joint.names.index(n)] for n in free.names], 1)
    likelihood = ParametricLikelihood(scene.y, system.family, GaussianNoise(std=scene.std))
    sampler = DPMSolver(32, eta=1.0) if sampler is None else sampler
    values = {name: v.to(scene.y) for name, v in free.values(theta).items()}
    posterior = Posterior(prior, likelihood.at(values), guidance)
    warmup = sweeps_dropped(turns)
    if announce is not None:
        announce(
            f"{warmup} + {turns} turns of {samples} chains: sources of {prior.shape[-1]}² pixels by {posterior.guidance!r}, "
            f"{sampler!r}, then the lens given its source"
        )
    drawn = sample_blocked(
        likelihood,
        free,
        prior,
        theta,
        sweeps=turns,
        warmup=warmup,
        guidance=posterior.guidance,
        sampler=sampler,
        seed=derived_seed(seed, "turns"),
        batch_size=batch_size,
        checkpoint=folder,
        progress=progress,
    )
    sources = drawn.samples
    if sources is None:
        raise RuntimeError("sample_blocked kept no sources")
    flux = sources.x.double().flatten(1).sum(1).reshape(samples, turns, 1).cpu()
    every = torch.cat([drawn.theta, flux], 2)
    last = sources.extras["draw"] == turns - 1
    extras = {name: v[last] for name, v in sources.extras.items()} | {"theta": every[:, -1]}
    return (
        replace(
            drawn,
            names=(*free.names, FLUX),
            theta=every,
            samples=replace(sources, x=sources.x[last], extras=extras),
        ),
        posterior,
    )
