"""What a sampler makes of a Gaussian, without Monte Carlo."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpost.samplers.base import NoiseSource, Sampler, run_down
from diffpost.score import ScoreModel

__all__ = ["response"]


def response(model: ScoreModel, sampler: Sampler) -> tuple[Tensor, Tensor]:
    """Mean and variance of a sampler's draws of independent Gaussian entries.

    On a Gaussian a sampler is an affine map of the normals that it draws, so its answers to none of them and to one
    unit normal at a time say everything. Not for a sampler whose steps depend on the draw (``PredictorCorrector``).

    Args:
        model: ``GaussianScore`` with a ``var``, (d,).
        sampler: with levels of its own (``FittedLevels`` must have been prepared).

    Returns:
        (d,) and (d,), in the units and the dtype of the model.
    """
    drawn = [0]

    def silent(like: Tensor, stream: int = 0) -> Tensor:
        drawn[0] += 1
        return torch.zeros_like(like)

    def impulse(like: Tensor, stream: int = 0) -> Tensor:
        drawn[0] += 1
        out = torch.zeros_like(like)
        out[drawn[0]] = 1.0
        return out

    def run(n: int, noise: NoiseSource) -> Tensor:
        return run_down(sampler, model, sampler.init(model, noise, n), lambda _: noise)

    run(1, silent)
    count, drawn[0] = drawn[0], 0
    x = run(count + 1, impulse)
    return x[0], (x[1:] - x[0]).square().sum(0)
