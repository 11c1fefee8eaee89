"""A problem and a prior made for each other: the grid, the PSF on it, and the flux scale.

What is inferred here depends on the prior: the size of the grid on its network's stride, the largest
kernel on the grid, and the flux scale on the rule in its card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch

from diffpost.jobs.problem import Grid, Problem
from diffpost.jobs.scale import rule_of_card
from diffpost.score import ScoreModel

__all__ = ["Setup", "set_up"]


@final
@dataclass(frozen=True)
class Setup:
    """What is sampled.

    problem: with a PSF that the grid holds, and everything told; grid: of the model.
    prior: at the size of the grid, in flux per model pixel.
    """

    problem: Problem
    grid: Grid
    prior: ScoreModel


def set_up(problem: Problem, prior: ScoreModel, margin: int | None = None) -> Setup:
    """Match a prepared problem and a prior of one-channel images.

    The flux scale is the problem's where it has one, or follows from the rule in the prior's card; where
    the card states none, the prior's own map to physical units stands as it is, and that is told.

    margin: image pixels that the model reaches beyond the cutout; default: what holds 90% of the PSF.

    Raises
    ------
    ValueError: a PSF that is too wide for the grid, a target without light, a rule that is not known.
    """
    grid = problem.grid(
        int(getattr(prior, "stride", 1)), (prior.shape[-2], prior.shape[-1]), margin
    )
    problem = _with_psf(problem, grid)
    if problem.scale is None:
        rule = rule_of_card(getattr(prior, "card", None))
        problem = _in_own_units(problem, prior) if rule is None else problem.scaled(rule)
    return Setup(problem, grid, _fitted(prior, grid, problem.scale))


def _with_psf(problem: Problem, grid: Grid) -> Problem:
    # An offset beyond this never joins two pixels of the grid.
    psf = problem.psf.trimmed((2 * grid.shape[0] - 1, 2 * grid.shape[1] - 1))
    notes = [*problem.notes, *psf.notes[len(problem.psf.notes) :]]
    (h, w), k = problem.data.shape, problem.oversample
    if problem.psf.kernel.shape[0] > h * k or problem.psf.kernel.shape[1] > w * k:
        notes.append(
            f"PSF: {problem.psf.kernel.shape[1]} x {problem.psf.kernel.shape[0]} model pixels, larger "
            f"than the cutout of {w * k} x {h * k}: the model has {grid.shape[1]} x {grid.shape[0]}, so "
            "light from around the cutout is accounted for"
        )
    report = {**problem.report, "psf": psf.report}
    return replace(problem, psf=psf, notes=tuple(notes), report=report)


def _in_own_units(problem: Problem, prior: ScoreModel) -> Problem:
    scale = float(torch.as_tensor(prior.scale).double().mean())
    told = (
        f"flux scale: the prior states no rule to infer it by, so its own units stand: {scale:.4g} per "
        "model pixel is 1 in network units; --scale sets another"
    )
    return replace(
        problem,
        notes=(*problem.notes, told),
        report={**problem.report, "flux": {"own_units": True}},
    )


def _fitted(prior: ScoreModel, grid: Grid, scale: float | None) -> ScoreModel:
    """The prior at the size of the grid and the flux scale of the target; None: its own."""
    shape = (1, *grid.shape)
    sized = prior if tuple(prior.shape) == shape else prior.with_shape(shape)
    if scale is None:
        return sized
    # A prior whose zero is not the sky's keeps its offset, in proportion.
    return sized.with_affine(scale, prior.offset / prior.scale * scale)
