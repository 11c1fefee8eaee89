"""Checks of posterior draws against the data.

If x is a draw of p(x | y) and the model is right, chi^2 = |W (y - A x)|^2 with W^T W = Sigma^-1 is
about the number of data m: draws scatter by the prior's freedom, and a chi^2 far above m in many
draws says that the model does not reach the data, far below that noise is being fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from diffpost.likelihood import Likelihood
from diffpost.samples import Samples


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
