"""Do chains agree? R-hat and effective sample sizes, by ArviZ.

Rank-normalised split R-hat compares chains with each other and with their halves; the effective
sample size is the number of independent draws that would give the same error (Vehtari et al. 2021,
Bayesian Analysis 16, 667). R-hat < 1.01 and ESS > 100 a chain are the usual marks. Chains that all
missed the same mode agree perfectly.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

__all__ = ["Convergence", "convergence"]


@final
@dataclass(frozen=True)
class Convergence:
    """Of each entry of the image.

    Attributes:
        rhat: (*shape) rank-normalised split R-hat; 1 for chains that agree.
        ess: (*shape) effective sample size of the bulk, over all chains.
        ess_tail: (*shape) the smaller one of the 5% and 95% quantiles.
        draws: chains times draws.
    """

    rhat: Tensor
    ess: Tensor
    ess_tail: Tensor
    draws: int


def convergence(x: Tensor) -> Convergence:
    """R-hat and ESS of each entry.

    Entries that never change have NaN. Millions of pixels take minutes: hand over a few statistics
    instead.

    Args:
        x: (chains, draws, *shape); for independent draws, any split into 2 chains or more.

    Raises:
        ValueError: fewer than 2 chains or 4 draws, or values that are not finite.
    """
    x = torch.as_tensor(x).detach().cpu().double()
    if x.ndim < 2 or x.shape[0] < 2 or x.shape[1] < 4 or x.numel() == 0:
        raise ValueError(
            f"convergence: got {tuple(x.shape)}; expected (chains, draws, *shape), 2 chains or more of 4 draws or more."
        )
    if not bool(x.isfinite().all()):
        raise ValueError("convergence: got values that are not finite; find the chain that failed.")
    with warnings.catch_warnings():  # of its next major version, which pyproject.toml excludes
        warnings.simplefilter("ignore", FutureWarning)
        import arviz  # takes a second, which only those who ask for this pay
    data = arviz.convert_to_dataset({"x": x.numpy()})
    with np.errstate(invalid="ignore", divide="ignore"):  # of entries that never change
        found = [
            arviz.rhat(data)["x"],
            arviz.ess(data, method="bulk")["x"],
            arviz.ess(data, method="tail")["x"],
        ]
    rhat, ess, tail = (torch.from_numpy(v.to_numpy().reshape(x.shape[2:]).copy()) for v in found)
    same = (x == x[:1, :1]).flatten(0, 1).all(0)  # ArviZ calls a constant converged
    rhat, ess, tail = (v.masked_fill(same, torch.nan) for v in (rhat, ess, tail))
    return Convergence(rhat=rhat, ess=ess, ess_tail=tail, draws=x.shape[0] * x.shape[1])
