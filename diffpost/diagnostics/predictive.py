r"""Checks of posterior draws against the data.

If x is a draw of p(x | y) and the model is right, chi^2 = |W (y - A x)|^2 with W^T W = Sigma^-1 is
about the number of data m: draws scatter by the prior's freedom, and a chi^2 far above m in many
draws says that the model does not reach the data, far below that noise is being fitted.

More exactly, (x, y) with x drawn from p(x | y) has the same joint distribution as (truth, data).
So over many data sets the chi^2 of *one* exact draw is distributed as that of the noise alone, and
its p-value

    p_b = P(chi2(n_rep) >= chi2(y - A x_b)),        y_rep = A x_b + n_rep,

is exactly uniform (Johnson 2007, Bayesian Analysis 2, 719). The posterior predictive p-value is the
mean of the p_b of one data set's draws (Gelman, Meng and Stern 1996, Statistica Sinica 6, 733);
averaging pulls it towards 1/2, and it is below alpha for at most 2 alpha of all data sets, usually
far fewer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from diffpost.diagnostics.uniformity import ecdf_p_value
from diffpost.likelihood import Likelihood
from diffpost.samples import Samples

__all__ = ["Chi2", "PredictiveChi2", "chi2", "predictive_chi2"]


@final
@dataclass(frozen=True)
class Chi2:
    """chi^2 of every draw.

    Attributes:
        values: (n,) chi^2 = (y - A x)^T Sigma^-1 (y - A x).
        expected: number of data m that count (finite variance): the expectation of chi^2 at the
            truth. At the truth it scatters by sqrt(2 m).
    """

    values: Tensor
    expected: float | Tensor

    @property
    def reduced(self) -> Tensor:
        """(n,) chi^2/m."""
        return self.values / self.expected


def chi2(draws: Samples, likelihood: Likelihood) -> Chi2:
    """chi^2 of each draw under a likelihood in physical units.

    Args:
        draws: n draws; with data of a batch axis, draw b is compared with row b.
        likelihood: the data that the draws were conditioned on, or others.
    """
    likelihood = likelihood.bind(tuple(draws.x.shape[1:]))
    values = []
    for index in torch.arange(len(draws)).split(64):
        x = draws.x[index]
        values.append(likelihood.select(index).chi2(x).detach())
    expected = likelihood.ndata
    return Chi2(torch.cat(values), expected if isinstance(expected, Tensor) else float(expected))


@final
@dataclass(frozen=True)
class PredictiveChi2:
    """chi^2 of the data and of replicated data, about each draw.

    Attributes:
        values: (n,) chi^2 of the data about each draw.
        replicated: (replicas,) chi^2 of replicated data: that of the noise alone, the same for all
            draws; (replicas, n) for data with a batch axis.
        draw_p_values: (n,) p_b, upper tail; each uniform over data sets, dependent within one.
        upper: mean of p_b, the posterior predictive p-value: small where the model does not reach
            the data, near 1 where the draws fit the noise.
        p_value: two-sided. For one data set 2 min(upper, 1 - upper), at most 1: conservative. For
            data with a batch axis, of the p_b of all rows being uniform, exact if the rows are
            independent data with one draw each.
        expected: number of data, the expectation of the replicated chi^2 for Gaussian noise.
    """

    values: Tensor
    replicated: Tensor
    draw_p_values: Tensor
    upper: float
    p_value: float
    expected: float | Tensor


def predictive_chi2(
    draws: Samples, likelihood: Likelihood, *, replicas: int = 1000, seed: int = 0
) -> PredictiveChi2:
    """Posterior predictive check by chi^2.

    What the data constrain weakly is not tested: draws that are too wide there, or too narrow, fit
    the data as well.

    Args:
        draws: n draws; weights count in `upper`. With data of a batch axis, draw b belongs to
            row b.
        likelihood: the data that the draws were conditioned on, in physical units, or others of the
            same truth.
        replicas: draws of the noise (for each row, if there are rows).
        seed: of the replicas.

    Raises:
        ValueError: no replicas, or draws that do not fit the data.
    """
    if replicas < 1:
        raise ValueError(f"predictive_chi2: got {replicas} replicas; expected one or more.")
    observed = chi2(draws, likelihood)
    values = observed.values.double().cpu()
    likelihood = likelihood.bind(tuple(draws.x.shape[1:]))
    generator = torch.Generator().manual_seed(seed)
    if not likelihood.batched:
        replicated = _noise_chi2(likelihood, replicas, generator)
        worse = (replicated[:, None] >= values).sum(0)
    else:
        replicated = torch.stack(
            [
                _noise_chi2(likelihood.select(torch.tensor([b])), replicas, generator)
                for b in range(len(draws))
            ],
            1,
        )
        worse = (replicated >= values).sum(0)
    # A place among replicas that is uniform if the data are one more of them.
    u = torch.rand(len(values), generator=generator, dtype=torch.float64)
    each = (worse + u) / (replicas + 1)
    upper = float((draws.weights * each).sum())
    if likelihood.batched:
        grid = np.linspace(0, 1, 101)[1:-1]
        counts = np.searchsorted(np.sort(each.numpy()), grid, side="right")
        p_value = ecdf_p_value(counts, grid, len(each))
    else:
        p_value = min(1.0, 2 * min(upper, 1 - upper))
    return PredictiveChi2(
        values=values,
        replicated=replicated,
        draw_p_values=each,
        upper=upper,
        p_value=p_value,
        expected=observed.expected,
    )


def _noise_chi2(likelihood: Likelihood, replicas: int, generator: torch.Generator) -> Tensor:
    """chi^2 of draws of the noise of an unbatched likelihood or of its one row, (replicas,)."""
    shape = likelihood.data_shape
    chunk = max(1, 2**22 // max(likelihood.y.numel(), 1))
    found = []
    for part in torch.arange(replicas).split(chunk):
        seed = int(torch.randint(2**62, (), generator=generator))
        noise = likelihood.noise.sample((len(part), *shape), seed, torch.float64)
        found.append(likelihood.noise.chi2(noise))
    return torch.cat(found)
