r"""Simulated observations with known truths, and what is kept of their posterior draws.

For simulation i a truth x_i comes from the prior (or from a collection), data y_i = A(x_i) + n_i from
the truth, and M draws from the posterior of y_i.  Everything about i follows from (seed, i) alone, so
neither the size of a batch nor an interruption changes it.  Of all the images only a few numbers stay:

    fraction      credibility of the ball about a reference that reaches to the truth (TARP)
    ranks         of the truth among its draws, in total flux, peak, half-light radius, and misfit
                  chi^2 = |W (y - A x)|^2, which depends on the data as the others do not
    truth, mean, std      of these statistics
    error, spread         mean square of (truth - mean of the draws), mean variance of the draws

and, if controls are asked for, fraction and ranks of draws that are wrong on purpose.  The reference is
the estimate that a white prior of the brightness of the data would give, A^T (Sigma + s A A^T)^-1 y s,
jittered: near the truth, so that a wrong width shows; far from every draw of the prior, so that the
prior handed back is found out; and made from the data alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from diffpost import morphology
from diffpost.diagnostics import ranks, tarp_fraction
from diffpost.guidance import Guidance
from diffpost.instrument import Counter
from diffpost.io.images import ImageSource
from diffpost.likelihood import Likelihood
from diffpost.noise import Noise
from diffpost.operator import Operator
from diffpost.posterior import Posterior
from diffpost.random import normal
from diffpost.sample import describe, integrate
from diffpost.samplers import Sampler
from diffpost.samplers.particles import systematic
from diffpost.score import ScoreModel

__all__ = ["CONTROLS", "MISFIT", "Experiment", "Statistic", "default_statistics"]

Statistic = Callable[[Tensor], Tensor]
Record = dict[str, Tensor]

MISFIT = "misfit"
CONTROLS = ("wider", "narrower", "shifted", "prior")
WIDER, NARROWER, SHIFT = 1.2, 0.8, 0.3
_JITTER = 0.5  # of the reference, in units of its own distance from the data's back-projection

# What a seed is for: streams that never meet, whatever the integrators do with theirs.
_TRUTH, _NOISE, _DRAWS, _REFERENCE, _TIES, _PRIOR, _ORDER = range(7)


def default_statistics(shape: tuple[int, ...]) -> dict[str, Statistic]:
    """Total flux and peak, and the half-light radius of images of one channel."""
    found: dict[str, Statistic] = {"total flux": morphology.total_flux, "peak": morphology.peak}
    if len(shape) == 3 and shape[0] == 1:
        found["half-light radius"] = morphology.half_light_radius
    return found


@final
@dataclass(frozen=True)
class Experiment:
    """What is simulated, and how its posterior is drawn.

    prior: in the units of the data.
    operator, noise: what the posterior assumes.
    guidance, sampler: of the posterior.
    samples: draws of each posterior.
    truth_sampler: the finer integrator that draws truths from the prior.
    truths: a collection of truths in physical units instead; None draws them.
    statistics: name -> (B, *shape) to (B,).
    seed: of everything.
    batch_size: draws computed together.
    controls: whether draws that are wrong on purpose are judged as well.
    real_operator, real_noise: what the data are made with, where that differs from what is assumed.
    """

    prior: ScoreModel
    operator: Operator
    noise: Noise
    guidance: Guidance
    sampler: Sampler
    samples: int
    truth_sampler: Sampler
    truths: ImageSource | Tensor | None
    statistics: Mapping[str, Statistic]
    seed: int
    batch_size: int
    controls: bool
    real_operator: Operator
    real_noise: Noise

    @property
    def names(self) -> tuple[str, ...]:
        """Statistics whose ranks are kept, the misfit last."""
        return (*self.statistics, MISFIT)

    @property
    def block(self) -> int:
        """Simulations computed together."""
        return max(1, self.batch_size // self.samples)

    @property
    def chunks(self) -> int:
        """Batches of draws in a block of one simulation."""
        return len(range(0, self.samples, self._chunk))

    @property
    def _chunk(self) -> int:
        group = self.sampler.group
        return max(self.batch_size // group, 1) * group

    # what identifies a run ----------------------------------------------------------------------

    def posterior(self, y: Tensor | None = None) -> Posterior:
        """The posterior of data (n, *data), n rows; of zeros without any, to tell runs apart."""
        shape = self.operator.output_shape(tuple(self.prior.shape))
        batched = y is not None
        data = torch.zeros(shape, device=self.prior.device) if y is None else y
        likelihood = Likelihood(data, self.operator, self.noise, batched=batched)
        return Posterior(self.prior, likelihood, self.guidance)

    def info(self) -> dict[str, Any]:
        """What determines the numbers, as JSON values; the number of simulations does not."""
        told = describe(self.posterior(), self.samples, self.sampler, self.seed)
        fine = describe(self.prior, self.samples, self.truth_sampler, self.seed)
        told |= {
            "truth_sampler": [fine["sampler"], fine["sampler_arguments"]],
            "truths": self.truths_hash(),
            "statistics": list(self.names),
            "controls": self.controls,
        }
        if self.real_operator is not self.operator or self.real_noise is not self.noise:
            like = normal(self.seed, torch.zeros(1, dtype=torch.int64), 0, tuple(self.prior.shape))
            seen = self._data(like.to(self.prior.device), [0])
            told["real data"] = [f"{float(v):.4g}" for v in (seen.mean(), seen.square().mean())]
        return told

    def truths_hash(self) -> str | None:
        """SHA-256 of the truths that were given."""
        if self.truths is None:
            return None
        digest = hashlib.sha256(str(len(self.truths)).encode())
        for i in range(len(self.truths)):
            digest.update(_image(self.truths[i]).cpu().numpy().tobytes())
        return digest.hexdigest()

    # one block ----------------------------------------------------------------------------------

    def simulate(
        self, ids: Sequence[int], advance: Callable[[], None], pool: Tensor | None
    ) -> tuple[Record, tuple[int, int]]:
        """What is kept of simulations `ids`, each entry (n, ...); denoiser calls and VJPs of a draw.

        advance: is called after every step of the posterior's integrator.
        pool: (M, *shape) draws of the prior, for the controls.

        Raises
        ------
        NonFiniteError: a draw became infinite or NaN.
        """
        truths = self.draw_truths(ids)
        y = self._data(truths, ids)
        posterior = self.posterior(y)
        counter = Counter()
        x, log_weights = self._draws(posterior, ids, counter, advance)
        if log_weights is not None:
            chosen = [self._equal(log_weights[row], i) for row, i in enumerate(ids)]
            x = torch.stack([x[row, index] for row, index in enumerate(chosen)])
        record = self._judge(truths, x, posterior.likelihood, ids, pool)
        cost = math.ceil(counter.calls), counter.vjps
        return {name: values.cpu() for name, values in record.items()}, cost

    def draw_truths(self, ids: Sequence[int]) -> Tensor:
        """(n, *shape) truths of these simulations, in physical units."""
        if self.truths is None:
            return self._prior_draws(ids, _TRUTH)
        order = np.random.default_rng(_seed(self.seed, _ORDER)).permutation(len(self.truths))
        rows = [_image(self.truths[int(order[i])]) for i in ids]
        dtype = torch.promote_types(self.prior.dtype, torch.float32)
        return torch.stack(rows).to(self.prior.device, dtype)

    def prior_pool(self) -> Tensor:
        """(M, *shape) draws of the prior, independent of every truth that it gave."""
        rows = torch.arange(self.samples).split(self.batch_size)
        return torch.cat([self._prior_draws(part.tolist(), _PRIOR) for part in rows])

    def _prior_draws(self, ids: Sequence[int], purpose: int) -> Tensor:
        numbers = torch.tensor(list(ids), dtype=torch.int64)
        with torch.no_grad():
            state = integrate(
                self.prior,
                self.truth_sampler,
                _seed(self.seed, purpose),
                numbers,
                Counter(),
                lambda: None,
            )
        return self.prior.to_physical(state.x)

    def _data(self, truths: Tensor, ids: Sequence[int]) -> Tensor:
        with torch.no_grad():
            clean = self.real_operator(truths)
        shape = tuple(clean.shape[1:])
        noise = [
            self.real_noise.sample(shape, _seed(self.seed, _NOISE, i) >> 1, clean.dtype)
            for i in ids
        ]
        y = clean + torch.stack(noise).to(clean.device)
        # What is masked must not be there to look at: its noise is infinite, so `sample` gives none.
        hidden = self.noise.masked(shape)
        return y if hidden is None else y.masked_fill(hidden.to(y.device), math.nan)

    def _draws(
        self,
        posterior: Posterior,
        ids: Sequence[int],
        counter: Counter,
        advance: Callable[[], None],
    ) -> tuple[Tensor, Tensor | None]:
        """(n, M, *shape) draws in physical units, and (n, M) log weights of particle methods."""
        m = self.samples
        rows = torch.arange(len(ids)).repeat_interleave(m)
        # Draw k of simulation i has the number i M + k in the run, whatever it is computed with.
        numbers = (torch.tensor(list(ids))[:, None] * m + torch.arange(m)).flatten()
        seed = _seed(self.seed, _DRAWS)
        size = self._chunk if len(ids) == 1 else len(rows)
        x, weights = [], []
        for part in torch.arange(len(rows)).split(size):
            once = Counter(len(part))
            with torch.no_grad():
                state = integrate(
                    posterior.select(rows[part]), self.sampler, seed, numbers[part], once, advance
                )
            x.append(posterior.to_physical(state.x))
            if state.log_weights is not None:
                weights.append(state.log_weights)
            counter.calls = max(counter.calls, once.calls)
            counter.vjps = max(counter.vjps, once.vjps)
        stacked = torch.cat(x).unflatten(0, (len(ids), m))
        return stacked, torch.cat(weights).reshape(len(ids), m) if weights else None

    def _equal(self, log_weights: Tensor, i: int) -> Tensor:
        """Which draws stand for weighted ones, by systematic resampling: (M,) indices."""
        start = np.random.default_rng(_seed(self.seed, _TIES, i)).uniform()
        place = torch.tensor([start], dtype=torch.float64, device=log_weights.device)
        return systematic(log_weights.double()[None], place)[0]

    def _references(self, likelihood: Likelihood, ids: Sequence[int]) -> Tensor:
        """(n, *shape) points near the truths, made from the data and chance."""
        y = likelihood.y
        operator = likelihood.operator.linearize(
            torch.zeros(len(y), *self.prior.shape, dtype=y.dtype, device=y.device)
        )
        z = torch.cat(
            [
                normal(_seed(self.seed, _REFERENCE), torch.tensor([i]), 0, tuple(self.prior.shape))
                for i in ids
            ]
        ).to(y)
        with torch.no_grad():
            back = operator.adjoint(y)
            seen = operator(back)
            # The multiple of A^T y that comes nearest to the data, and its mean square as s.
            ratio = back.flatten(1).square().sum(1) / seen.flatten(1).square().sum(1)
            back = back * _wide(ratio, back)
            s = back.flatten(1).square().mean(1)
            solved = likelihood.solve_operator(operator, y, s.double(), tol=1e-4)
            near = operator.adjoint(solved.x) * _wide(s, back)
            off = (near - back).flatten(1).square().mean(1).sqrt()
        return near + _JITTER * _wide(off, near) * z

    # what stays ---------------------------------------------------------------------------------

    def _judge(
        self,
        truths: Tensor,
        x: Tensor,
        likelihood: Likelihood,
        ids: Sequence[int],
        pool: Tensor | None,
    ) -> Record:
        """The record of n simulations: truths (n, *shape), draws x (n, M, *shape), data of n rows."""
        references = self._references(likelihood, ids)
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        wanted = self._values(truths[:, None], likelihood)[:, 0]
        seed, numbers = _seed(self.seed, _TIES), torch.tensor(list(ids))

        def places(prefix: str, draws: Tensor, values: Tensor) -> Record:
            fraction = tarp_fraction(draws, truths, references, seed, ids=numbers)
            found = ranks(_defined(values), _defined(wanted), seed, ids=numbers)
            return {f"{prefix}fraction": fraction, f"{prefix}ranks": found}

        values = self._values(x, likelihood)
        middle = values.nanmean(1, keepdim=True)
        record = {
            "truth": wanted,
            "mean": middle[:, 0],
            "std": (values - middle).square().nanmean(1).sqrt()
            * (self.samples / (self.samples - 1)) ** 0.5,
            "error": (truths - mean[:, 0]).double().square().flatten(1).mean(1),
            "spread": std.double().square().flatten(1).mean(1),
        }
        record |= places("", x, values)
        if pool is not None:
            wrong = {
                "wider": lambda: mean + WIDER * (x - mean),
                "narrower": lambda: mean + NARROWER * (x - mean),
                "shifted": lambda: x + SHIFT * std,
                "prior": lambda: pool.expand(len(ids), *pool.shape),
            }
            for name in CONTROLS:
                draws = wrong[name]()
                record |= places(f"{name}.", draws, self._values(draws, likelihood))
        return record

    def _values(self, images: Tensor, likelihood: Likelihood) -> Tensor:
        """(n, k, T) statistics of k images for each row of data, (n, k, *shape); the misfit last."""
        flat = images.flatten(0, 1)
        with torch.no_grad():
            found = [act(flat).double() for act in self.statistics.values()]
            found.append(likelihood.repeat(images.shape[1]).chi2(flat).double())
        return torch.stack([v.to(flat.device) for v in found], 1).unflatten(0, images.shape[:2])


def _image(frame: Any) -> Tensor:
    return frame if isinstance(frame, Tensor) else torch.from_numpy(np.array(frame))


def _defined(values: Tensor) -> Tensor:
    """A radius that is not defined counts as the least one, for the truth as for a draw."""
    return torch.where(values.isnan(), -torch.inf, values)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))


def _seed(seed: int, purpose: int, i: int = 0) -> int:
    """A 64-bit seed for one purpose, and for one simulation."""
    return int(np.random.SeedSequence([seed, purpose, i]).generate_state(1, np.uint64)[0])
