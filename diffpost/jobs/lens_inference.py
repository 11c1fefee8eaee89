r"""Inference of a lens job: the lens by the collapsed evidence, then the source by diffusion.

1. A Gaussian of sources with at most 32 x 32 pixels stands in for the prior: the mean and covariance of its draws, binned,
   turned and shifted, for a galaxy need not sit in the middle of the grid; exactly the prior where that is Gaussian.
2. Restarts with few modes and 2 x 2 rays a pixel, on data added up by 2 x 2 if the image grid has 64 pixels or more on both
   sides, find the lens and where its source is; the grids are put there.
3. Chains sample the lens with the source marginalised (:func:`diffpost.parameters.sample_collapsed`).
4. The sources are posterior draws of the prior itself on the fine grid, each through a lens of its own.

If the lens' own light is modelled, its parameters are among theta, and what is left of the data without it at this theta is
what a source is drawn from.

So theta follows the Gaussian in the prior's place, which is exact for a Gaussian prior alone, and on coarser pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffpost.guidance import Guidance
from diffpost.jobs.lens_setup import LensDescription, LensScene, binned
from diffpost.jobs.lens_system import FLUX, LensSystem, coarse_grid, lens_system, source_grid
from diffpost.jobs.scale import rule_of_card
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.parameters import (
    HMC,
    Evidence,
    GaussianImage,
    JointSamples,
    ParameterPrior,
    ParametricLikelihood,
    find_modes,
    sample_collapsed,
)
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.parameters.collapsed import distinct_modes, scattered
from diffpost.parameters.priors import LogNormal
from diffpost.physics.grid import Grid
from diffpost.posterior import Posterior
from diffpost.random import derived_seed
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, Sampler
from diffpost.samples import Samples
from diffpost.score import GaussianScore, ScoreModel

__all__ = [
    "Search",
    "SourceGaussian",
    "chosen_draws",
    "sample_lens",
    "sample_sources",
    "search",
    "source_gaussian",
]

_COARSE = 32  # pixels on a side of the Gaussian's sources
_FEWEST = 6
_PRIOR_DRAWS = 128
_PRIOR_STEPS = 12
_SHIFTS = 4  # of every draw and turn
_SHARE, _MODES = 0.99, 80  # of a prior's draws
_NEARLY = 0.999  # of the variance of a Gaussian prior
_SEARCH_MODES = 40
_WIDER = 1.5  # the first grid, on which a source is sought
_GUESS = 5.0  # of the magnification, for the first guess of the source's flux
_WIDTH = 1.5  # of the prior of its logarithm
_DIMMER, _WIDTH_BESIDE_LIGHT = 10.0, 2.5  # where the lens' own light is in the image
_ROOM = 4.0  # for the scatter of the chains' starts, of what a normal would lose
_ROUGH = 64  # pixels on a side, from which the search adds them up by 2 x 2
_STREAM = 24_700


@final
@dataclass(frozen=True)
class SourceGaussian:
    """A Gaussian of coarse sources of unit flux.

    gaussian: of sources (1, n, n); bins: fine pixels on a side of a coarse one; unit: the flux of such sources in the
    prior's own units; exact: whether it is the prior itself.
    """

    gaussian: GaussianImage
    bins: int
    unit: float
    exact: bool


@final
@dataclass(frozen=True)
class Search:
    """Where the lens and its source were found.

    theta: (chains, P) where chains begin; covariance: (P, P) in unconstrained coordinates; centre: of the source grid, arcsec;
    modes: how many modes are as good.
    """

    theta: Tensor
    covariance: Tensor
    centre: tuple[float, float]
    modes: int


def source_gaussian(prior: ScoreModel, size: int, seed: int) -> SourceGaussian:
    """A Gaussian of sources in the prior's place.

    Raises
    ------
    ValueError: a size that cannot be binned to 32 pixels a side or fewer.
    """
    bins = next(b for b in range(1, size + 1) if size % b == 0 and size // b <= _COARSE)
    if size // bins < _FEWEST:
        raise ValueError(
            f"source.size: got {size}, which no binning brings to {_FEWEST} to {_COARSE} pixels a side; choose another"
        )
    sized = prior if tuple(prior.shape) == (1, size, size) else prior.with_shape((1, size, size))
    if isinstance(sized, GaussianScore):
        fine = GaussianImage.from_score(sized)
        factor = _binned(fine.scaled_modes, bins).flatten(1)
        found = GaussianImage.from_covariance(_binned(fine.mean[None], bins)[0], factor.T @ factor)
        found = found.truncated(share=_NEARLY)
    else:
        draws = sample(
            sized,
            _PRIOR_DRAWS,
            DPMSolver(_PRIOR_STEPS),
            derived_seed(seed, "prior"),
            16,
            progress=False,
        )
        x = _binned(draws.x.double(), bins)
        found = GaussianImage.from_draws(_moved(_turned(x), derived_seed(seed, "shifts")))
        held = found.truncated(share=_SHARE)
        found = held if len(held.std) <= _MODES else held.truncated(_MODES)
    mean = float(found.mean.sum())
    spread = math.sqrt(float(found.std.square().sum()) * found.mean.numel())
    unit = mean if mean > 0.05 * spread else spread  # a field about zero has no mean flux
    return SourceGaussian(found.scaled(1 / unit), bins, unit, isinstance(sized, GaussianScore))


def evidence_of(
    scene: LensScene,
    system: LensSystem,
    gaussian: GaussianImage,
) -> Evidence:
    """log p(theta | y) with the source marginalised."""
    of_lens = system.prior
    free = {} if of_lens is None else dict(zip(of_lens.names, of_lens.priors, strict=True))
    flux = LogNormal(_first_flux(scene), _WIDTH)
    if system.light is not None:  # most of the image's light is then the lens'
        flux = LogNormal(_first_flux(scene) / _DIMMER, _WIDTH_BESIDE_LIGHT)
    prior = ParameterPrior({**free, FLUX: flux})
    likelihood = ParametricLikelihood(
        scene.y.double(), system.family, GaussianNoise(std=scene.std.double())
    )
    return Evidence(likelihood, prior, gaussian, amplitude=None if system.known else FLUX)


def search(
    description: LensDescription,
    scene: LensScene,
    prior: ScoreModel,
    stand_in: SourceGaussian,
    *,
    fixed: bool,
    chains: int,
    restarts: int,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> Search:
    """Modes of the lens and the place of its source, kept in a folder."""
    info = {
        "chains": chains,
        "restarts": restarts,
        "seed": seed,
        "modes": len(stand_in.gaussian.std),
        "fixed": fixed,
        "prior": None if description.model.prior is None else description.model.prior.to_dict(),
    }
    kept = None if folder is None else Checkpoint(folder, info, [_first_flux(scene)])
    found = None if kept is None else kept.load("search")
    if found is None:
        found = _search(
            description, scene, prior, stand_in, fixed, chains, restarts, seed, progress
        )
        if kept is not None:
            kept.save("search", found)
    x, y = found["centre"].tolist()
    return Search(found["theta"], found["covariance"], (x, y), int(found["modes"]))


def sample_lens(
    evidence: Evidence,
    begun: Search,
    *,
    draws: int,
    warmup: int,
    seed: int,
    folder: Path | None,
    progress: bool,
) -> JointSamples:
    """Chains of the lens parameters and the source's flux."""
    kernel = HMC(draws, warmup, leapfrogs=3, covariance=begun.covariance)
    return sample_collapsed(
        evidence,
        kernel,
        chains=len(begun.theta),
        start=begun.theta,
        images=0,
        seed=seed,
        checkpoint=folder,
        progress=progress,
    )


def fitted_prior(
    prior: ScoreModel, size: int, evidence: Evidence, joint: JointSamples, stand_in: SourceGaussian
) -> tuple[ScoreModel, dict[str, Any]]:
    """The prior on the fine grid with its scale, and what led to it.

    The scale is the peak that the prior's card defines, of the Gaussian's source at the median lens; without such a rule
    the median amplitude.
    """
    sized = prior if tuple(prior.shape) == (1, size, size) else prior.with_shape((1, size, size))
    middle = joint.flat.median(0).values[None]
    flux = float(middle[0, joint.names.index(FLUX)])
    factor = flux / stand_in.unit
    told: dict[str, Any] = {"amplitude": factor, "by": "amplitude"}
    rule = rule_of_card(getattr(prior, "card", None))
    if rule is not None:
        image = mean_source(evidence, middle)[0] / stand_in.bins**2
        smooth = gaussian_filter(image.numpy(), rule.smoothing / stand_in.bins)
        told["smoothed_peak"] = float(smooth.max())
        if told["smoothed_peak"] > 0:
            factor, told["by"] = told["smoothed_peak"], "smoothed_peak"
    told["factor"] = factor
    return sized.with_affine(sized.scale * factor, sized.offset * factor), told


def sample_sources(
    system: LensSystem,
    scene: LensScene,
    joint: JointSamples,
    prior: ScoreModel,
    *,
    samples: int,
    guidance: Guidance | None,
    sampler: Sampler | None,
    seed: int,
    batch_size: int | None,
    folder: Path | None,
    progress: bool,
    announce: Callable[[str], None] | None = None,
) -> tuple[JointSamples, Posterior]:
    """Sources by diffusion at evenly spaced draws of the lens, entry b with its own."""
    theta, told = chosen_draws(joint, samples)
    lenses = system.sheared(joint.names, theta)
    light = system.lit(joint.names, theta)
    many = not system.known or light is not None
    y = scene.y.expand(samples, *scene.y.shape) if many else scene.y
    if light is not None:
        y = torch.where(scene.seen, y.double() - light, 0.0).to(scene.y)
    likelihood = Likelihood(y, system.response @ lenses, GaussianNoise(std=scene.std), batched=many)
    posterior = Posterior(prior, likelihood, guidance)
    sampler = DPMSolver(32, eta=1.0) if sampler is None else sampler
    if announce is not None:
        announce(
            f"{samples} sources of {prior.shape[-1]}² pixels, {posterior.guidance!r}, {sampler!r}"
        )
    drawn: Samples = sample(
        posterior,
        samples,
        sampler,
        derived_seed(seed, "sources"),
        batch_size,
        progress,
        None if folder is None else str(folder),
    )
    return replace(joint, samples=replace(drawn, extras=dict(drawn.extras) | told)), posterior


def chosen_draws(joint: JointSamples, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """So many evenly spaced draws, of every chain in turn: theta (count, P), and which they are."""
    chains, draws, _ = joint.theta.shape
    ids = torch.arange(count)
    chain = ids % chains
    each = math.ceil(count / chains)
    draw = torch.linspace(draws - 1, 0, each + 1).round().long()[:each].flip(0)[ids // chains]
    theta = joint.theta[chain, draw]
    return theta, {"theta": theta, "chain": chain, "draw": draw}


def mean_source(evidence: Evidence, theta: Tensor) -> Tensor:
    """(B, n, n) mean of the Gaussian's sources given theta (B, P) and the data."""
    given = evidence.given(theta)
    image = given.images(given.mean)[:, 0]
    if evidence.amplitude is None and FLUX in evidence.prior.names:  # a known lens: unit sources
        image = image * theta[:, evidence.prior.names.index(FLUX), None, None]
    return image


# Parts ----------------------------------------------------------------------------------------


def _first_flux(scene: LensScene) -> float:
    light = float(torch.where(scene.seen, scene.y[0], 0.0).clamp_min(0).double().sum())
    noise = float(scene.std[0][scene.seen].double().square().sum().sqrt())
    return max(light, noise) / _GUESS


def _search(
    description: LensDescription,
    scene: LensScene,
    prior: ScoreModel,
    stand_in: SourceGaussian,
    fixed: bool,
    chains: int,
    restarts: int,
    seed: int,
    progress: bool,
) -> dict[str, Tensor]:
    fine = source_grid(description, scene.grid, prior, (0.0, 0.0))
    given = description.source.centre is not None
    wide = coarse_grid(fine, stand_in.bins)
    if not given:
        wide = replace(wide, pixel=_WIDER * wide.pixel)
    few = stand_in.gaussian
    few = few.truncated(min(_SEARCH_MODES, len(few.std)))
    rough = binned(scene, 2 if min(scene.grid.shape) >= _ROUGH else 1)
    system = lens_system(description, rough, wide, fixed=fixed, rays=2)
    first = evidence_of(rough, system, few)
    begin = first.prior.unconstrain(first.prior.sample(restarts, derived_seed(seed, "restarts")))
    modes = find_modes(first, begin, adam=80, bfgs=40, progress=progress)
    best = first.prior.constrain(modes.z[:1])
    centre = fine.centre if given else _centroid(mean_source(first, best)[0], wide)
    good = distinct_modes(modes, first.prior)[:3]
    placed = coarse_grid(replace(fine, centre=centre), stand_in.bins)
    scene = binned(scene, description.bin)
    system = lens_system(description, scene, placed, fixed=fixed, rays=None)
    full = evidence_of(scene, system, stand_in.gaussian)
    modes = find_modes(full, good, adam=25, bfgs=40, rate=0.02, progress=progress)
    kept = distinct_modes(modes, full.prior)
    z = scattered(
        full,
        kept[torch.arange(chains) % len(kept)],
        modes.covariance,
        seed,
        room=_ROOM,
        stream=_STREAM,
    )
    return {
        "theta": full.prior.constrain(z),
        "covariance": modes.covariance,
        "centre": torch.tensor(centre, dtype=torch.float64),
        "modes": torch.tensor(len(kept)),
    }


def _centroid(image: Tensor, grid: Grid) -> tuple[float, float]:
    """Of the light above a quarter of the peak, so that the ripples of an inversion do not count."""
    light = (image - 0.25 * image.max()).clamp_min(0)
    x, y = grid.coordinates()
    total = light.sum()
    if not float(total) > 0:
        return grid.centre
    return float((light * x).sum() / total), float((light * y).sum() / total)


def _binned(x: Tensor, bins: int) -> Tensor:
    return x if bins == 1 else bins**2 * torch.nn.functional.avg_pool2d(x, bins)


def _turned(x: Tensor) -> Tensor:
    """Every image in its eight orientations."""
    both = torch.cat([x, x.mT])
    both = torch.cat([both, both.flip(-1)])
    return torch.cat([both, both.flip(-2)])


def _moved(x: Tensor, seed: int) -> Tensor:
    """Every image at random places, up to an eighth of its width away."""
    reach = x.shape[-1] // 8
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    moved = []
    for image in x:
        for _ in range(_SHIFTS):
            dy, dx = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
            moved.append(torch.roll(image, (dy, dx), (-2, -1)))
    return torch.stack(moved)
