r"""Is a posterior calibrated? Simulate, infer, and compare with the truths.

    result = calibrate("galaxies-32", dp.Convolve(psf), dp.GaussianNoise(std=0.03), simulations=300)
    result.calibrated, result.tests, result.coverage.p_value
    result.save("calibration")

If truths come from the prior and the draws of each posterior are exact, a truth and its draws are
exchangeable given the data.  So in any order that the data may define the rank of the truth is uniform
on 0...M, and each of the tests gives a p-value that is uniform.  There are several, so p-values are
adjusted by Holm's method (1979, Scand. J. Stat. 6, 65): with exact draws the chance that any one of
them rejects is at most `level`.  What is not rejected is not proven: controls, draws that are wrong by
a known amount, are judged by the same tests to show what this number of simulations would have found.

With truths from elsewhere prior and sampler are judged together.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from diffpost.deconvolve import default_inference
from diffpost.diagnostics import Coverage, Ranks, coverage_from_fractions, sbc_from_ranks
from diffpost.guidance import Guidance
from diffpost.io.images import ImageSource, open_images
from diffpost.jobs.simulations import CONTROLS, MISFIT, Experiment, Statistic, default_statistics
from diffpost.likelihood import Likelihood
from diffpost.noise import Noise
from diffpost.operator import Operator
from diffpost.resume import RunFolder
from diffpost.sample import progress_bar
from diffpost.samplers import DPMSolver, Sampler
from diffpost.score import ScoreModel

__all__ = ["Calibration", "Test", "calibrate", "design", "perform"]

TARP = "coverage"
TRUTH_STEPS = 256
LEAST = 8  # simulations, and draws of each


@final
@dataclass(frozen=True)
class Test:
    """One test of uniformity.

    name: "coverage" (TARP), or the statistic whose ranks are tested.
    p_value: uniform for exact draws; adjusted: by Holm's method, over all tests of the run.
    rejected: adjusted below the run's level.
    """

    __test__ = False  # no test of pytest's

    name: str
    p_value: float
    adjusted: float
    rejected: bool


@final
@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    coverage: expected coverage of balls about references made from the data.
    ranks: of the truths among their draws, column k for statistic k of `experiment.names`.
    tests: with their p-values, at `level` for all of them together.
    controls: what was done to the draws -> the same tests of them; only those that can see it.
    record: what was kept of each simulation, each (simulations, ...); see `jobs.simulations`.
    experiment: what was simulated.  calls, vjps: of the denoiser, per draw.
    timings: in seconds; seconds of this call alone, after a resumption.
    """

    coverage: Coverage
    ranks: Ranks
    tests: tuple[Test, ...]
    controls: Mapping[str, tuple[Test, ...]]
    record: Mapping[str, Tensor]
    experiment: Experiment
    level: float
    calls: int = 0
    vjps: float = 0.0
    timings: Mapping[str, float] = field(default_factory=dict)

    @property
    def simulations(self) -> int:
        return len(self.record["fraction"])

    @property
    def calibrated(self) -> bool:
        """Whether no test rejects."""
        return not any(test.rejected for test in self.tests)

    @property
    def error_over_spread(self) -> tuple[float, float]:
        """Rms error of the posterior mean over what the draws' scatter claims, and its error.

        Per pixel, over all simulations; 1 where calibrated, above it where error bars are too small.
        The error is the scatter over bootstrapped simulations.
        """
        m = self.experiment.samples
        error, spread = self.record["error"], self.record["spread"] * (1 + 1 / m)
        generator = torch.Generator().manual_seed(0)
        picks = torch.randint(len(error), (400, len(error)), generator=generator)
        spread_of = (error[picks].mean(1) / spread[picks].mean(1)).sqrt().std()
        return float((error.mean() / spread.mean()).sqrt()), float(spread_of)

    def offsets(self) -> dict[str, tuple[float, float]]:
        """For each statistic, mean and rms of (truth - mean of the draws)/(their standard deviation).

        About 0 +- 1/sqrt(simulations) and, for many draws and Gaussian posteriors, 1 where calibrated.
        """
        m = self.experiment.samples
        z = (self.record["truth"] - self.record["mean"]) / (
            self.record["std"] * math.sqrt(1 + 1 / m)
        )
        found = {}
        for column, name in enumerate(self.experiment.names):
            good = z[:, column][z[:, column].isfinite()]
            mean, square = (
                (good.mean(), good.square().mean()) if len(good) else (math.nan, math.nan)
            )
            found[name] = (float(mean), float(square) ** 0.5)
        return found

    @property
    def reduced_chi2(self) -> tuple[float, float]:
        """Mean chi^2 over the number of data of the truths and of the draws; equal where calibrated."""
        count = self.experiment.posterior().likelihood.ndata
        total = float(count if not isinstance(count, Tensor) else count.double().mean())
        return tuple(float(self.record[key][:, -1].mean()) / total for key in ("truth", "mean"))  # type: ignore[return-value]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write verdict.json, report.html, the pictures and the numbers into a folder, atomically.

        Raises
        ------
        FileExistsError: the folder exists and overwrite is False.
        """
        from diffpost.jobs.calibration_page import write_calibration
        from diffpost.jobs.outputs import OutputFolder

        folder = OutputFolder(path, record="verdict.json")
        folder.check(overwrite=overwrite)
        folder.publish(lambda new: write_calibration(self, new))


def calibrate(
    prior: str | os.PathLike[str] | ScoreModel,
    operator: Operator,
    noise: Noise,
    *,
    simulations: int = 300,
    samples: int = 64,
    truths: str | os.PathLike[str] | Tensor | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    truth_sampler: Sampler | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    controls: bool = False,
    level: float = 0.05,
    real_operator: Operator | None = None,
    real_noise: Noise | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Calibration:
    """Judge the posterior draws of simulated data by the truths that made the data.

    Parameters
    ----------
    prior: name, folder, or a score model.
    operator, noise: of the data, in the prior's physical units.
    simulations, samples: how many data are simulated, and how many draws are made of each posterior.
    truths: a folder or an array file of images (see `diffpost.io.images.open_images`), or a tensor
        (N, *shape), in physical units, of which `simulations` are taken in random order; default: drawn
        from the prior by `truth_sampler`.
    guidance, sampler: default as `default_inference` chooses.
    truth_sampler: default `DPMSolver(256, eta=1)`.
    statistics: name -> (B, *shape) to (B,), whose ranks are tested; default: total flux, peak and, for
        one channel, the half-light radius.  The misfit (chi^2) is always among them.
    seed: of everything; batch_size: draws computed together, several simulations at once if it is at
        least twice `samples`.
    controls: also judge draws that are wrong on purpose: 20% too wide or too narrow about their mean,
        shifted by 0.3 standard deviations of each pixel, and draws of the prior.
    level: chance that exact draws are rejected by any of the tests.
    real_operator, real_noise: what the data are made with where that is not what the posterior assumes:
        what does a wrong PSF or noise level do?
    checkpoint: folder for finished simulations; the same call goes on from there, also for more of them.
    announce: is told, before the sampling, what is going to be done.

    Raises
    ------
    ValueError: settings out of range, too few truths or of another shape, a checkpoint of another run.
    """
    experiment = design(
        prior,
        operator,
        noise,
        simulations=simulations,
        samples=samples,
        truths=truths,
        guidance=guidance,
        sampler=sampler,
        truth_sampler=truth_sampler,
        statistics=statistics,
        seed=seed,
        batch_size=batch_size,
        controls=controls,
        real_operator=real_operator,
        real_noise=real_noise,
    )
    return perform(
        experiment,
        simulations,
        level=level,
        progress=progress,
        checkpoint=checkpoint,
        announce=announce,
    )


def design(
    prior: str | os.PathLike[str] | ScoreModel,
    operator: Operator,
    noise: Noise,
    *,
    simulations: int = 300,
    samples: int = 64,
    truths: str | os.PathLike[str] | Tensor | None = None,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    truth_sampler: Sampler | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    controls: bool = False,
    real_operator: Operator | None = None,
    real_noise: Noise | None = None,
) -> Experiment:
    """What `calibrate` simulates; arguments as there.  Nothing is computed yet, but all is checked."""
    if simulations < LEAST or samples < LEAST:
        raise ValueError(
            f"got {simulations} simulations of {samples} draws; expected at least {LEAST} of each (300 "
            "and 64 make a test of some power)"
        )
    if batch_size < 1:
        raise ValueError(f"got batch_size = {batch_size}; expected a positive number of draws")
    model = _load(prior)
    shape = tuple(model.shape)
    data = torch.zeros(operator.output_shape(shape), device=model.device)
    likelihood = Likelihood(data, operator, noise, batched=False)
    chosen_guidance, chosen_sampler = default_inference(model, likelihood)
    experiment = Experiment(
        prior=model,
        operator=operator,
        noise=noise,
        guidance=guidance or chosen_guidance,
        sampler=sampler or chosen_sampler,
        samples=samples,
        truth_sampler=truth_sampler or DPMSolver(TRUTH_STEPS, eta=1.0),
        truths=None if truths is None else _opened(truths, shape, simulations),
        statistics=default_statistics(shape) if statistics is None else dict(statistics),
        seed=seed,
        batch_size=batch_size,
        controls=controls,
        real_operator=real_operator or operator,
        real_noise=real_noise or noise,
    )
    group = experiment.sampler.group
    if samples % group:
        raise ValueError(
            f"got {samples} draws of each posterior; {type(experiment.sampler).__name__} makes {group} "
            "together, so expected a multiple of that"
        )
    prepared = experiment.sampler.prepared(experiment.posterior())
    return dataclasses.replace(experiment, sampler=prepared)


def perform(
    experiment: Experiment,
    simulations: int,
    *,
    level: float = 0.05,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] | None = None,
) -> Calibration:
    """Simulate and judge; arguments as for `calibrate`."""
    if not 0 < level < 1:
        raise ValueError(f"got level = {level}; expected a number between 0 and 1, such as 0.05")
    if announce is not None:
        shape, samples = experiment.prior.shape, experiment.samples
        announce(
            f"sampling: {samples} draws of each of {simulations} posteriors on {shape[-1]} x "
            f"{shape[-2]} pixels, {experiment.guidance!r}, {experiment.sampler!r}"
        )
    start = time.perf_counter()
    record, calls, vjps, made = _run(experiment, simulations, checkpoint, progress)
    seconds = time.perf_counter() - start
    return _conclude(
        experiment, record, level, calls, vjps, {"sample": seconds, "simulations": made}
    )


# Parts ----------------------------------------------------------------------------------------


def _load(prior: str | os.PathLike[str] | ScoreModel) -> ScoreModel:
    if isinstance(prior, ScoreModel):
        return prior
    from diffpost.io.checkpoints import load_prior

    return load_prior(prior)


def _opened(
    truths: str | os.PathLike[str] | Tensor, shape: tuple[int, ...], simulations: int
) -> ImageSource | Tensor:
    source = truths if isinstance(truths, Tensor) else open_images(Path(truths))
    found = tuple(source.shape[1:]) if isinstance(source, Tensor) else source.shape
    if found != shape:
        raise ValueError(
            f"the truths have shape {found}, the prior is of {shape}; crop them, or give the prior their "
            "size (--size, with_shape)"
        )
    if len(source) < simulations:
        raise ValueError(
            f"got {len(source)} truths for {simulations} simulations; give more, or ask for fewer "
            "(each truth is used once)"
        )
    return source


def _run(
    experiment: Experiment,
    simulations: int,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[dict[str, Tensor], int, float, int]:
    """The record of all simulations, calls and products with the Jacobian per draw, and how many are new."""
    store = None
    done: dict[int, dict[str, Tensor]] = {}
    spent: dict[int, tuple[int, int]] = {}
    if checkpoint is not None:
        store = RunFolder(Path(checkpoint), experiment.info(), experiment.posterior())
        for i, found in store.load(simulations).items():
            done[i] = {"truth": found.x, **found.extras}
            spent[i] = (found.calls, found.vjps)
    missing = [i for i in range(simulations) if i not in done]
    blocks = list(_blocks(missing, experiment.block))
    pool = experiment.prior_pool() if experiment.controls and blocks else None
    parts = experiment.chunks if experiment.block == 1 else 1
    steps = len(experiment.sampler.times(experiment.prior.sde)) - 1
    with progress_bar(len(blocks) * parts * steps, progress) as advance:
        for ids in blocks:
            record, cost = experiment.simulate(ids, advance, pool)
            if store is not None:
                others = {name: v for name, v in record.items() if name != "truth"}
                store.save(ids, record["truth"], None, *cost, others)
            for row, i in enumerate(ids):
                done[i] = {name: values[row] for name, values in record.items()}
                spent[i] = cost
    together = {name: torch.stack([done[i][name] for i in range(simulations)]) for name in done[0]}
    calls = max(calls for calls, _ in spent.values())
    return together, calls, sum(vjps for _, vjps in spent.values()) / simulations, len(missing)


def _blocks(ids: list[int], size: int) -> Iterator[list[int]]:
    for i in range(0, len(ids), size):
        yield ids[i : i + size]


def _conclude(
    experiment: Experiment,
    record: dict[str, Tensor],
    level: float,
    calls: int,
    vjps: float,
    timings: dict[str, float],
) -> Calibration:
    m, names = experiment.samples, experiment.names
    covered = coverage_from_fractions(record["fraction"], m, seed=experiment.seed)
    ranked = sbc_from_ranks(record["ranks"], m)
    p_values = {TARP: covered.p_value, **dict(zip(names, ranked.p_value.tolist(), strict=True))}
    controls = {}
    for control in CONTROLS if experiment.controls else ():
        # The ranks of an image's own statistics cannot tell the prior from the posterior.
        seen = [names.index(MISFIT)] if control == "prior" else list(range(len(names)))
        found = {TARP: coverage_from_fractions(record[f"{control}.fraction"], m).p_value}
        columns = sbc_from_ranks(record[f"{control}.ranks"][:, seen], m).p_value.tolist()
        found |= {names[k]: p for k, p in zip(seen, columns, strict=True)}
        controls[control] = _tests(found, level, len(p_values))
    return Calibration(
        coverage=covered,
        ranks=ranked,
        tests=_tests(p_values, level, len(p_values)),
        controls=controls,
        record=record,
        experiment=experiment,
        level=level,
        calls=calls,
        vjps=vjps,
        timings=timings,
    )


def _tests(p_values: Mapping[str, float], level: float, family: int) -> tuple[Test, ...]:
    """Holm's step-down adjustment in a family of so many tests; those not given count as passed."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (family - place) * p))
        adjusted[name] = highest
    return tuple(
        Test(name, p, adjusted[name], adjusted[name] <= level) for name, p in p_values.items()
    )
