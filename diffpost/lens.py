"""Reconstruction of a strong lens: joint posterior samples of its source, the lens parameters and its light, as one function.

    result = reconstruct_lens("lens.fits", "psf.fits", "rms.fits", model="lens.yaml", samples=16, seed=0)
    result.joint.table(), result.mean, result.std, result.metrics["reduced_chi2"]
    result.save("out")

The lens' own light is part of the model if its description has a section `light`; without one the image is taken as free of
it.  The lens parameters follow the evidence under a Gaussian of sources in the prior's place
(:mod:`diffpost.jobs.lens_inference`), which is exact for a Gaussian prior; the sources are posterior draws of the prior
itself, each through a lens of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.deconvolve import load
from diffpost.guidance import Guidance
from diffpost.jobs.lens_inference import (
    evidence_of,
    fitted_prior,
    sample_lens,
    sample_sources,
    search,
    source_gaussian,
)
from diffpost.jobs.lens_setup import (
    LensDescription,
    LensScene,
    binned,
    lens_scene,
    read_description,
)
from diffpost.jobs.lens_system import LensSystem, coarse_grid, lens_system, source_grid
from diffpost.jobs.lens_turns import free_parameters, sample_turns
from diffpost.jobs.problem import ImageLike, prepare
from diffpost.noise import GaussianNoise
from diffpost.parameters import (
    JointSamples,
    ParametricLikelihood,
    evidence_shift,
)
from diffpost.physics.grid import Grid
from diffpost.samplers import Sampler
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["LensResult", "reconstruct_lens"]

Array = NDArray[np.float64]

_RHAT = 1.05
_OUTSIDE = 0.01
_BRIGHT = 3.0  # standard deviations, above which pixels count as light of the source
APPROXIMATION = (
    "the lens parameters follow the evidence of a Gaussian of sources on coarse pixels in the prior's place; their error bars "
    "do not know what the prior knows beyond its mean and covariance; --turns lets them follow the prior itself (docs/lensing.md)"
)


@final
@dataclass(frozen=True)
class LensResult:
    """Posterior samples of a lens and everything that led to them.

    joint: draws of the parameters by chains, and in `joint.samples` sources (n, 1, ny, nx) of some of them, in flux per
        source pixel.
    scene: the data on the image grid; description: what the YAML file says; system: the lens and the PSF; prior: with the
        scale that was used.
    models: (n, ny, nx) images of the draws on the image grid, the lens' own light among them; lights: that light of each draw
        alone, or None where it is not modelled; metrics: see `lens_metrics`; timings: in seconds.
    """

    joint: JointSamples
    scene: LensScene
    description: LensDescription
    system: LensSystem
    prior: ScoreModel
    guidance: Any
    sampler: str
    models: Tensor
    notes: tuple[str, ...]
    metrics: dict[str, Any]
    inferred: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    title: str = ""
    lights: Tensor | None = None

    @property
    def samples(self) -> Samples:
        """The sources."""
        if self.joint.samples is None:
            raise ValueError("LensResult: the joint samples hold no sources")
        return self.joint.samples

    @property
    def source(self) -> Grid:
        """The grid of the sources."""
        return self.system.source

    @property
    def images(self) -> Array:
        """(n, ny, nx) sources, flux per source pixel."""
        found: Array = self.samples.x[:, 0].double().cpu().numpy()
        return found

    @property
    def mean(self) -> Array:
        """(ny, nx) posterior mean of the source."""
        found: Array = self.images.mean(0)
        return found

    @property
    def std(self) -> Array:
        """(ny, nx) posterior standard deviation of the source."""
        found: Array = self.images.std(0, ddof=1) if len(self.samples) > 1 else 0 * self.mean
        return found

    @property
    def median_theta(self) -> Tensor:
        """(P,) medians of the parameters."""
        return self.joint.flat.median(0).values

    @property
    def median_lens(self) -> Tensor | None:
        """The lens' parameters at their medians, for its curves; None where all are known."""
        return self.system.params(self.joint.names, self.median_theta)

    @property
    def model(self) -> Array:
        """(h, w) mean of the draws' images in the used part of the cutout; NaN where no pixel is used."""
        return self.scene.part(self.models.mean(0))

    @property
    def light(self) -> Array | None:
        """(h, w) mean of the lens' own light over the draws, behind the PSF, as `model`; None where it is not modelled."""
        return None if self.lights is None else self.scene.part(self.lights.mean(0))

    @property
    def residual(self) -> Array:
        """(h, w) (data - model) / sigma, NaN where no pixel is used."""
        scene = self.scene
        std = torch.where(scene.seen, scene.std[0], 1.0)
        return scene.part((scene.y[0] - self.models.mean(0)) / std)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write all products into a folder, atomically (see `diffpost.jobs.lens_outputs`).

        Raises
        ------
        FileExistsError: the folder exists and overwrite is False.
        """
        from diffpost.jobs.lens_outputs import write_lens
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(path)
        folder.check(overwrite=overwrite)
        write_lens(folder, self)


def reconstruct_lens(
    image: ImageLike,
    psf: ImageLike,
    noise: float | ImageLike | None = None,
    *,
    model: str | os.PathLike[str] | Mapping[str, Any],
    mask: str | os.PathLike[str] | Array | None = None,
    prior: str | os.PathLike[str] | ScoreModel = "galaxies-64",
    samples: int = 16,
    chains: int = 4,
    draws: int = 200,
    warmup: int | None = None,
    restarts: int = 6,
    turns: int = 0,
    fixed: bool = False,
    sampler: Sampler | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    title: str = "",
    announce: Callable[[str], None] | None = None,
    **target: Any,
) -> LensResult:
    """Draw posterior samples of a lensed source and of the lens, from an image without the lens' light or with it modelled.

    Parameters
    ----------
    image, psf, noise: as for `diffpost.deconvolve.deconvolve`; the PSF at the sampling of the image.
    model: YAML file or mapping (:mod:`diffpost.jobs.lens_setup`): mass, light and priors, mask, source grid, rays.
    mask: FITS file or array of the image's or the cutout's shape; nonzero pixels are not used.
    prior: of the source: name, folder, or a score model of one-channel images.
    samples: sources, at evenly spaced draws of the lens.
    chains, draws, warmup: of the lens parameters; draws of each chain after the warm-up, None for half as many, 20 or more.
    restarts: of the search for modes, from draws of the parameters' prior.
    turns: of source and lens after that, for parameters under the prior itself (:mod:`diffpost.jobs.lens_turns`): draws of
        as many chains as samples; 0 stays with the Gaussian's.
    fixed: hold every lens parameter at the median of its prior, and sample the source alone.
    sampler, guidance: of the sources; default DPMSolver(32, eta=1) and what a `Posterior` takes.
    seed: of everything; batch_size: sources computed together.
    checkpoint: folder of finished parts; the same call goes on from there.
    announce: is told what is found and done.
    target: the keywords of `diffpost.jobs.problem.prepare`, such as cutout=(x, y, size) or weight; background is "none" and
        neighbours are kept unless given.

    Raises
    ------
    FileNotFoundError, ValueError: for inputs that cannot be used; TypeError: an unknown keyword.
    """
    if samples < 1 or chains < 2 or draws < 4 or restarts < 1:
        raise ValueError(
            f"got {samples} samples, {chains} chains of {draws} draws and {restarts} restarts; expected at least 1 sample, "
            "2 chains, 4 draws and 1 restart"
        )
    if turns and (fixed or turns < 4 or samples < 2):
        raise ValueError(
            f"got {turns} turns of {samples} samples{' of a fixed lens' if fixed else ''}; expected at least 4 turns, of at "
            "least 2 samples, which are their chains, and a lens that is free; or turns=0"
        )
    if samples > chains * draws:
        raise ValueError(
            f"got {samples} samples; expected at most chains x draws = {chains * draws}, as each has a lens of its own"
        )
    start = time.perf_counter()
    say: Callable[[str], None] = announce or (lambda text: None)
    description = read_description(model)
    source_prior = load(prior)
    if target.get("oversample", 1) != 1:
        raise ValueError(
            "got an oversample of the image; rays are set by `oversample` in the model"
        )
    if target.get("noise_model") is not None:
        raise ValueError(
            "got a noise_model; lenses are reconstructed under Gaussian noise: give noise or weight"
        )
    problem = prepare(
        image, psf, noise, **{"background": "none", "keep_neighbours": True, **target}
    )
    scene = lens_scene(problem, description, mask)
    fine = source_grid(description, scene.grid, source_prior, (0.0, 0.0))
    # A model that lacks something is told now.
    lens_system(description, scene, fine, fixed=fixed, rays=1)
    size = fine.shape[0]
    notes = list(scene.problem.notes)
    for note in notes:
        say(note)

    def tell(text: str) -> None:
        notes.append(text)
        say(text)

    ny, nx = scene.grid.shape
    tell(f"image grid of {nx} x {ny} pixels, of which {int(scene.seen.sum())} are used")
    folder = None if checkpoint is None else Path(checkpoint)
    stand_in = source_gaussian(source_prior, size, seed)
    prepared = time.perf_counter()
    begun = search(
        description,
        scene,
        source_prior,
        stand_in,
        fixed=fixed,
        chains=chains,
        restarts=restarts,
        seed=seed,
        folder=None if folder is None else folder / "search",
        progress=progress,
    )
    fine = source_grid(description, scene.grid, source_prior, begun.centre)
    coarse = coarse_grid(fine, stand_in.bins)
    tell(
        f"source grid: {size} x {size} pixels of {fine.pixel:g} arcsec about ({fine.centre[0]:.3f}, {fine.centre[1]:.3f}); "
        f"for the lens {coarse.shape[0]} x {coarse.shape[0]} of {coarse.pixel:g}, {len(stand_in.gaussian.std)} modes"
    )
    if begun.modes > 1:
        tell(f"warning: {begun.modes} modes of the lens are about as good; chains begin at each")
    found = time.perf_counter()
    summed = binned(scene, description.bin)
    system = lens_system(description, summed, coarse, fixed=fixed, rays=None)
    evidence = evidence_of(summed, system, stand_in.gaussian)
    joint = sample_lens(
        evidence,
        begun,
        draws=draws,
        warmup=max(20, draws // 2) if warmup is None else warmup,
        seed=seed,
        folder=None if folder is None else folder / "lens",
        progress=progress,
    )
    chained = time.perf_counter()
    fitted, scale = fitted_prior(source_prior, size, evidence, joint, stand_in)
    tell(f"source: 1 of the prior is {scale['factor']:.4g} per source pixel, by {scale['by']}")
    system = lens_system(description, scene, fine, fixed=fixed, rays=None)
    last = partial(sample_turns, turns=turns) if turns else sample_sources
    joint, posterior = last(
        system,
        scene,
        joint,
        fitted,
        samples=samples,
        guidance=guidance,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        folder=None if folder is None else folder / ("turns" if turns else "sources"),
        progress=progress,
        announce=tell,
    )
    done = time.perf_counter()
    lights = system.lit(joint.names, joint.samples.extras["theta"]) if joint.samples else None
    lights = None if lights is None else lights[:, 0]
    models, metrics = lens_metrics(system, scene, joint, lights)
    metrics["shift"] = None if turns else _shift(system, scene, joint)
    for warning in _warnings(metrics):
        tell(f"warning: {warning}")
    if system.prior is not None and not stand_in.exact and not turns:
        tell(APPROXIMATION)
    return LensResult(
        joint=joint,
        scene=scene,
        description=description,
        system=system,
        prior=fitted,
        guidance=posterior.guidance,
        sampler=str(joint.samples.info.get("sampler")) if joint.samples else "",
        models=models,
        notes=tuple(notes),
        metrics=metrics,
        inferred={
            "source_scale": scale,
            "source_centre": list(fine.centre),
            "gaussian_modes": len(stand_in.gaussian.std),
            "gaussian_exact": stand_in.exact and stand_in.bins == description.bin == 1,
            "modes_of_the_lens": begun.modes,
            "turns": turns,
        },
        timings={
            "prepare": prepared - start,
            "search": found - prepared,
            "lens": chained - found,
            "turns" if turns else "source": done - chained,
        },
        title=title,
        lights=lights,
    )


def lens_metrics(
    system: LensSystem, scene: LensScene, joint: JointSamples, lights: Tensor | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """Images (n, ny, nx) of the draws on the image grid, and how well they fit, as JSON values.

    lights: (n, ny, nx) the lens' own light of each draw, None for none.

    reduced_chi2: of the mean image and of the draws (mean over them), the draws' with its expectation if all is right.
    source_flux, magnification: mean and standard deviation over draws; the magnification is that of the flux on the image
    grid.  lens_light_flux: likewise, of the lens' own light on that grid; None where it is not modelled.
    flux_outside: share of the source's light above 3 sigma that is traced to outside the source grid at the median lens.
    rhat: the largest; ess: the smallest.
    """
    if joint.samples is None:
        raise ValueError("lens_metrics: the joint samples hold no sources")
    x, theta = joint.samples.x, joint.samples.extras["theta"]
    seen = scene.seen
    y, std = scene.y[0].double(), torch.where(seen, scene.std[0], 1.0).double()
    lensed, models = [], []
    with torch.no_grad():
        for ids in torch.arange(len(x)).split(16):
            image = system.sheared(joint.names, theta[ids])(x[ids].float())
            lensed.append(image.double().sum((1, 2, 3)))
            models.append(system.response(image)[:, 0].double())
    model = torch.cat(models)
    arcs = y
    if lights is not None:
        model = model + lights
        arcs = y - lights.mean(0)
    residual = torch.where(seen, (y - model) / std, 0.0)
    n = int(seen.sum())
    each = residual.square().sum((1, 2)) / n
    mean = torch.where(seen, (y - model.mean(0)) / std, 0.0)
    flux = x.double().sum((1, 2, 3))
    magnification = torch.cat(lensed) / flux
    light = torch.where(seen & (arcs > _BRIGHT * std), arcs, 0.0)
    params = system.params(joint.names, joint.flat.median(0).values)
    outside = float(system.lens.flux_outside(light, params))
    rows = joint.table()

    def summary(values: Tensor) -> dict[str, float | None]:
        return {
            "mean": float(values.mean()),
            "std": float(values.std()) if len(values) > 1 else None,
        }

    return model, {
        "pixels": n,
        "reduced_chi2": {
            "mean": float(mean.square().sum() / n),
            "draws": float(each.mean()),
            "draws_expected": 1.0,
            "expected_std": (2 / n) ** 0.5,
        },
        "source_flux": summary(flux),
        "magnification": summary(magnification),
        "lens_light_flux": None if lights is None else summary(lights.sum((1, 2))),
        "flux_outside": outside,
        "rhat": max(row["rhat"] for row in rows),
        "ess": min(row["ess"] for row in rows),
        "acceptance": float(joint.acceptance.mean()),
        "parameters": {row["name"]: {k: v for k, v in row.items() if k != "name"} for row in rows},
    }


# Parts ----------------------------------------------------------------------------------------


def _warnings(metrics: dict[str, Any]) -> list[str]:
    found = []
    if not metrics["rhat"] <= _RHAT:
        found.append(
            f"R-hat is {metrics['rhat']:.3f}, above {_RHAT}: the chains have not converged, and the parameters' error bars are "
            "not to be used; take more --draws, or --turns"
        )
    if metrics["flux_outside"] > _OUTSIDE:
        found.append(
            f"{metrics['flux_outside']:.1%} of the image's flux above {_BRIGHT:g} sigma is traced to outside the source grid: "
            "enlarge it (source.size, source.pixel), or mask what is not of this source"
        )
    return found


def _shift(system: LensSystem, scene: LensScene, joint: JointSamples) -> dict[str, Any] | None:
    """How far the means of the parameters would move under the prior itself, to first order, in standard deviations."""
    prior = free_parameters(system)
    if prior is None or joint.samples is None or len(joint.samples) < 8:
        return None
    likelihood = ParametricLikelihood(scene.y, system.family, GaussianNoise(std=scene.std))
    moved = evidence_shift(joint, likelihood, prior)
    return {
        name: {"sigma": float(s), "error": float(e)}
        for name, s, e in zip(moved.names, moved.shift, moved.error, strict=True)
    }
