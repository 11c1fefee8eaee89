"""A posterior is a score model.

With Bayes' rule at each noise level, score_y(x, t) = score(x, t) + grad_x log p_t(y | x), and in
denoisers

    D_y(x, t) = D(x, t) + sigma^2/alpha grad_x log p_t(y | x).

The second term is a guidance's approximation; prior, process and units are the prior's. So whatever
samples a prior samples its posterior, and a posterior can be the prior of further data.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance
from diffpost.guidance.slic import default_guidance
from diffpost.likelihood import Likelihood
from diffpost.random import derived_seed
from diffpost.score import ScoreModel


@final
class Posterior(ScoreModel):
    """p(x | y) as a score model.

    Args:
        prior: the score model of images; its affine map to physical units is the posterior's.
        likelihood: the data, in physical units. Data (B, *data) with a batch axis condition entry b
            on row b, and then every batch must have B entries (``select`` takes rows).
        guidance: how p_t(y | x) is approximated; None is moment matching with what is known of the prior's
            errors (``diffpost.guidance.choose``; ``diffpost.recommend`` looks further, and says why), and for learned noise
            ``SLIC`` as its last stage.

    Raises:
        ValueError: the operator does not take images of the prior's shape, or its output is not of
            the shape of the data.
    """

    def __init__(
        self, prior: ScoreModel, likelihood: Likelihood, guidance: Guidance | None = None
    ) -> None:
        likelihood = likelihood.bind(tuple(prior.shape))
        pulled = likelihood.pullback(prior.scale, prior.offset)
        chosen = default_guidance(prior, likelihood) if guidance is None else guidance
        self._set(prior, likelihood, pulled, chosen)

    def _set(
        self, prior: ScoreModel, likelihood: Likelihood, pulled: Likelihood, guidance: Guidance
    ) -> None:
        self.prior = prior
        self.likelihood = likelihood
        self.guidance = guidance
        self._pulled = pulled
        self.sde = prior.sde
        self.shape = prior.shape
        self.scale = prior.scale
        self.offset = prior.offset

    def _like(self, prior: ScoreModel, likelihood: Likelihood, pulled: Likelihood) -> Posterior:
        other = Posterior.__new__(Posterior)
        other._set(prior, likelihood, pulled, self.guidance)
        return other

    def __repr__(self) -> str:
        return f"Posterior({self.prior!r}, {self.likelihood!r}, {self.guidance!r})"

    @property
    def dtype(self) -> torch.dtype:
        return self.prior.dtype

    @property
    def device(self) -> torch.device:
        return self.prior.device

    @property
    def rows(self) -> int | None:
        """Rows of the data's batch axis, which is the batch that this model takes; None without
        one.
        """
        return self.likelihood.rows if self.likelihood.rows is not None else self.prior.rows

    @property
    def data(self) -> Likelihood:
        """The likelihood of an image in the prior's own units, as samplers see it."""
        return self._pulled

    def select(self, ids: Tensor) -> Posterior:
        """The posterior of rows ids of the data; the same without a batch axis."""
        return self._like(
            self.prior.select(ids), self.likelihood.select(ids), self._pulled.select(ids)
        )

    def noise_seed(self, seed: int) -> int:
        """The same for all data, and another than the prior's."""
        return derived_seed(self.prior.noise_seed(seed), "posterior")

    def with_affine(self, scale: float | Tensor, offset: float | Tensor = 0.0) -> Posterior:
        """The posterior under the prior with another map to physical units; the data stay as they
        are.
        """
        return Posterior(self.prior.with_affine(scale, offset), self.likelihood, self.guidance)

    def with_prior(self, prior: ScoreModel) -> Posterior:
        """The same data and guidance over a prior of the same units and shape."""
        return self._like(prior, self.likelihood, self._pulled)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t, y] as the guidance has it, (B, *shape).

        Raises:
            ValueError: data with a batch axis and x of another batch.
        """
        rows = self.rows
        if rows is not None and len(x) != rows:
            raise ValueError(
                f"Posterior: the data have {rows} rows and x has {len(x)} entries; entry b is "
                "conditioned on row b. Use select(ids) for a part of them."
            )
        return self.guidance.posterior_denoise(self.prior, self._pulled, x, t)

    def terms(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """The summands of ``denoise`` by name, for messages: the prior's denoiser and the
        guidance's shift.
        """
        denoised = self.prior.denoise(x, t)
        return {
            "the prior's denoiser": denoised,
            f"the guidance {self.guidance!r}": self.denoise(x, t) - denoised,
        }
