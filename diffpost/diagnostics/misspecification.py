r"""Is this image like what the prior knows? An alarm that needs no truth.

A denoiser that never saw such an image errs more on it. At noise-to-signal ratios nu_j, from a fifth
to thirteen times the pixels' rms, and averaged over z and -z,

    e_j^2 = <|x - D(x + nu_j z)|^2>,     total_j = log sum e_j^2,    peak_j = log max e_j^2

over the pixels. The totals over all noise levels are -log p(x) up to a constant (Guo, Shamai and Verdú 2005,
IEEE Trans. Inf. Theory 51, 1261, in the pointwise form of Kong et al. 2023, arXiv:2302.03792); kept apart,
they see more than their sum (Mahmood et al. 2021, arXiv:2010.13132, with the norms of the score; Graham et al.
2023, arXiv:2211.07740). Bright images have larger errors, so of images that the prior was not trained on we learn
what to expect of one as bright and as concentrated,

    E[feature] = a + b log sum x^2 + c log sum |x|,     z = (feature - E[feature])/s,

and the statistic is the largest z of any level and kind, or the brightness's own |z| = |log sum x^2 - m|/s. One
threshold serves all components: its distribution is that of the reference images, each left out of its own
expectation, and the p-value is the share that lies as high,

    p = (1 + #{reference statistic >= statistic})/(1 + n),

nearly uniform, in steps of 1/(1 + n), for one more image of the same kind, whatever the prior (Vovk, Gammerman
and Shafer 2005, "Algorithmic learning in a random world"). Nearly, as a new image is held against an expectation that
all n taught and each of the n against one by n - 1: of normal features an alarm at p <= 0.05 was false for 4.5% of
images with n = 256, 8% with 40 and 11% with 20.

If the prior, the likelihood and the sampler are right, a posterior draw is, over many data, a draw of the prior. So
draws are judged as images are, the z averaged over the draws of one observation, which narrows their scatter and makes
the test conservative where draws differ. Draws show what the data brought; where data say little, they
look like the prior, whatever the truth was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffpost.diagnostics.predictive import chi2
from diffpost.likelihood import Likelihood
from diffpost.random import normal
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = [
    "HeldOutReference",
    "Misspecification",
    "heldout_reference",
    "misspecification",
    "reference_from_card",
]

CARD_KEY = "misspecification"

_LEVELS = (0.2, 0.67, 2.0, 6.7, 13.0)  # in units of the images' rms
_PAIRS = 1  # of noise z and -z
FEWEST = 20  # images of a reference
_TINY = 1e-30
_STREAM = 24_950  # of the noise, away from that of samplers, which is in draws of the same seed


@final
@dataclass(frozen=True)
class HeldOutReference:
    """What the errors of a prior's denoiser are on images like those it knows.

    Made by :func:`heldout_reference`; ``to_dict`` and ``from_dict`` go to JSON and back.

    Attributes:
        levels: (T,) noise-to-signal ratios, in the prior's own units.
        coefficients: (3, 2 T) a, b, c of the T totals and then of the T peaks.
        scatter: (2 T,) s.
        brightness: mean and standard deviation of log sum x^2.
        statistics: (n,) of the reference images, increasing.
    """

    levels: tuple[float, ...]
    coefficients: Tensor
    scatter: Tensor
    brightness: tuple[float, float]
    statistics: Tensor

    def __post_init__(self) -> None:
        count = 2 * len(self.levels)
        if not self.levels or not all(0 < level < math.inf for level in self.levels):
            raise ValueError(f"HeldOutReference: got levels {self.levels}; expected positive ones.")
        if self.coefficients.shape != (3, count) or self.scatter.shape != (count,):
            raise ValueError(
                f"HeldOutReference: got coefficients {tuple(self.coefficients.shape)} and scatter "
                f"{tuple(self.scatter.shape)} for {len(self.levels)} levels; expected (3, {count}) and ({count},)."
            )
        if self.statistics.ndim != 1 or len(self.statistics) < FEWEST:
            raise ValueError(
                f"HeldOutReference: got statistics of shape {tuple(self.statistics.shape)}; expected (n,) with n of "
                f"at least {FEWEST}."
            )
        finite = all(
            bool(v.isfinite().all()) for v in (self.coefficients, self.scatter, self.statistics)
        )
        if not finite or not bool((self.scatter > 0).all()) or not self.brightness[1] > 1e-9:
            raise ValueError(
                "HeldOutReference: expected finite numbers and positive scatters; are the images all the same?"
            )

    def __len__(self) -> int:
        return len(self.statistics)

    def threshold(self, alpha: float = 0.05) -> float:
        """The statistic from which on p <= alpha: an alarm at it is false for a share alpha of images like the
        reference's, at most.

        Raises:
            ValueError: alpha outside (0, 1), or below 1/(1 + n), which no image can reach.
        """
        rank = (
            math.floor(alpha * (1 + len(self)) + 1e-9) - 1
        )  # reference images that may lie as high
        if not 0 < alpha < 1 or rank < 0:
            raise ValueError(
                f"threshold({alpha}): expected from {1 / (1 + len(self)):.2g} (for {len(self)} reference images) "
                "to 1; measure the reference on more images for less."
            )
        return float(self.statistics[-1 - rank].nextafter(torch.tensor(math.inf).double()))

    def p_value(self, statistic: Tensor) -> Tensor:
        """(1 + #{reference statistics >= statistic})/(1 + n), of the shape of ``statistic``, float64."""
        flat = statistic.double().cpu().reshape(-1).contiguous()
        below = torch.searchsorted(self.statistics, flat)
        return ((1 + len(self) - below).double() / (1 + len(self))).reshape(statistic.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, to five digits."""
        return {
            "levels": list(self.levels),
            "coefficients": _rounded(self.coefficients),
            "scatter": _rounded(self.scatter),
            "brightness": [float(f"{v:.5g}") for v in self.brightness],
            "statistics": _rounded(self.statistics),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> HeldOutReference:
        """What ``to_dict`` wrote.

        Raises:
            ValueError: a missing or malformed entry.
        """
        try:
            mean, std = (float(v) for v in values["brightness"])
            return HeldOutReference(
                tuple(float(v) for v in values["levels"]),
                torch.tensor(values["coefficients"], dtype=torch.float64),
                torch.tensor(values["scatter"], dtype=torch.float64),
                (mean, std),
                torch.tensor(values["statistics"], dtype=torch.float64).sort().values,
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a reference of HeldOutReference.to_dict ({error!r}); measure it again with heldout_reference."
            ) from error


@final
@dataclass(frozen=True)
class Misspecification:
    """How unlike the reference's images one image is, or each of m.

    Attributes:
        statistic: (m,) the largest of the components, in standard deviations of the reference.
        p_value: (m,) the share of reference images with a statistic as large. With a likelihood, of the image and
            its fit together: min(1, 2 min(image_p_value, fit_p_value)).
        image_p_value: (m,) of the statistic alone.
        fit_p_value: (m,) or None without a likelihood: twice the mean over the draws of P(chi^2_N > chi^2 of the draw), at
            most 1. Small where the draws do not reach the data, or where the noise is larger than it is said to be.
        components: name -> (m,) z: "brightness" (both ways), "total NU" and "peak NU" (too large an error) at each noise level.
    """

    statistic: Tensor
    p_value: Tensor
    image_p_value: Tensor
    fit_p_value: Tensor | None
    components: Mapping[str, Tensor]

    @property
    def loudest(self) -> tuple[str, ...]:
        """The name of the largest component, m of them."""
        names = list(self.components)
        table = torch.stack([self.components[name] for name in names])
        return tuple(names[i] for i in table.argmax(0).tolist())


def heldout_reference(
    prior: ScoreModel,
    images: Tensor,
    *,
    levels: Sequence[float] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> HeldOutReference:
    """The reference distribution of :func:`misspecification`.

    Costs twice as many denoiser evaluations of an image as there are levels.

    Args:
        prior: whose denoiser is asked.
        images: (n, *shape) clean images in physical units that the prior was not trained on, of the kind that it is for,
            at the flux scales and zooms that are meant to pass; n of at least 20, and some hundreds for a
            rate of false alarms that holds.
            Several crops of one frame are less than several frames. For a prior without held-out images its own draws
            will do: then everything that the prior does not draw is unlike it, be it real.
        levels: noise-to-signal ratios in the prior's units; None is 0.2, 0.67, 2, 6.7 and 13 times the images' rms.
        seed: of the noise; batch_size: images denoised together.

    Raises:
        ValueError: too few images, another shape, not finite or without light, or levels beyond the prior's process.
    """
    x = _checked(images, prior)
    if len(x) < FEWEST:
        raise ValueError(f"heldout_reference: got {len(x)} images; expected at least {FEWEST}.")
    if levels is None:
        rms = float(x.double().square().mean().sqrt())
        if not rms > 0:
            raise ValueError("heldout_reference: the images are zero everywhere.")
        levels = [float(f"{factor * rms:.3g}") for factor in _LEVELS]
    chosen = tuple(float(level) for level in levels)
    features = _features(prior, x, chosen, seed, batch_size)
    light = _light(x)
    solution = torch.linalg.lstsq(light, features).solution
    residual = features - light @ solution
    scatter = residual.square().sum(0).div(len(x) - light.shape[1]).sqrt()
    bright = light[:, 1]
    mean, std = float(bright.mean()), float(bright.std())
    # Each image against an expectation that was learnt without it.
    leverage = (light * torch.linalg.pinv(light).T).sum(1)
    z = residual / scatter / (1 - leverage).clamp_min(1e-6)[:, None]
    own = (bright - mean).abs() / std * len(x) / (len(x) - 1)
    statistics = torch.maximum(z.amax(1), own).sort().values
    return HeldOutReference(chosen, solution, scatter, (mean, std), statistics)


def reference_from_card(card: Mapping[str, Any] | None) -> HeldOutReference | None:
    """The reference that a prior's card holds under `misspecification`, or None.

    Raises:
        ValueError: one that is malformed.
    """
    stated = None if card is None else card.get(CARD_KEY)
    return None if stated is None else HeldOutReference.from_dict(stated)


def misspecification(
    draws: Samples | Tensor,
    prior: ScoreModel,
    likelihood: Likelihood | None = None,
    reference: HeldOutReference | None = None,
    *,
    each: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Misspecification:
    """Says whether an image is unlike what the prior knows, from its posterior draws or from itself.

    It sees: star fields, rings, noise, flipped signs, brightness beyond the reference's, artefacts that the draws
    reproduce. It does not see: a faint feature of an otherwise normal image; an image that is easier than the reference's;
    what the data do not show, since draws are then made up by the prior. On images given directly, noise that the prior was not
    trained on is an anomaly: give posterior draws of noisy data instead. What the figures are for the shipped
    priors is told in docs/misspecification.md.

    Args:
        draws: posterior draws in physical units; weights count. Or a tensor (n, *shape).
        prior: with the flux scale that the draws were made with (``DeconvolutionResult.prior``).
        likelihood: the data, in physical units; adds the fit to the p-value. None judges the image alone, which is right
            where the noise is known to some per cent only: chi^2 then rings for the noise.
        reference: of ``heldout_reference``; None is the one in the prior's card.
        each: draws of one observation, consecutive, as ``Likelihood.repeat`` and batched jobs have them; None is all.
            A tensor of n images that are to be judged one by one has each=1.
        seed: of the noise that is added; the answer is a function of it. batch_size: images denoised together.

    Raises:
        ValueError: no reference given and none in the card; draws of another shape than the prior's or not finite; a number
            of draws that ``each`` does not divide; weights with several observations.
    """
    reference = reference or reference_from_card(getattr(prior, "card", None))
    if reference is None:
        raise ValueError(
            "misspecification: the prior's card holds no reference distribution; measure one on images that the prior "
            "was not trained on, heldout_reference(prior, images), and pass it as reference="
        )
    samples = draws if isinstance(draws, Samples) else Samples(draws)
    x = _checked(samples.x, prior)
    each = len(x) if each is None else each
    if each < 1 or len(x) % each:
        raise ValueError(
            f"misspecification: got {len(x)} draws and each={each}; expected a divisor."
        )
    if samples.log_weights is not None and each != len(x):
        raise ValueError(
            "misspecification: weights are those of one observation's draws; expected each=None."
        )
    weights = samples.weights.reshape(-1, each)
    weights = weights / weights.sum(1, keepdim=True)

    def average(values: Tensor) -> Tensor:
        return (weights[..., None] * values.reshape(-1, each, values.shape[-1])).sum(1)

    light = _light(x)
    features = _features(prior, x, reference.levels, seed, batch_size)
    z = average((features - light @ reference.coefficients) / reference.scatter)
    mean, std = reference.brightness
    bright = average((light[:, 1:2] - mean) / std).abs()
    table = torch.cat([bright, z], 1)
    names = ["brightness"]
    names += [f"{kind} {level:.3g}" for kind in ("total", "peak") for level in reference.levels]
    statistic = table.amax(1)
    image_p = reference.p_value(statistic)
    fit_p = None if likelihood is None else _fit(samples, likelihood, average)
    both = image_p if fit_p is None else (2 * torch.minimum(image_p, fit_p)).clamp_max(1.0)
    components = dict(zip(names, table.unbind(1), strict=True))
    return Misspecification(statistic, both, image_p, fit_p, components)


def _checked(images: Tensor, prior: ScoreModel) -> Tensor:
    """In the prior's units, dtype and place."""
    images = torch.as_tensor(images)
    if tuple(images.shape[1:]) != tuple(prior.shape) or not len(images):
        raise ValueError(
            f"got images of shape {tuple(images.shape)} for a prior of shape {tuple(prior.shape)}; expected "
            f"(n, *{tuple(prior.shape)}), or a prior.with_shape(...) of the images' shape."
        )
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        raise ValueError(
            f"got images of {images.dtype} with {int((~images.isfinite()).sum())} values that are not finite; "
            "expected finite floating point numbers."
        )
    return prior.to_model(images.to(device=prior.device, dtype=prior.dtype))


@torch.no_grad()
def _features(
    prior: ScoreModel, x: Tensor, levels: Sequence[float], seed: int, batch_size: int
) -> Tensor:
    """log sum and log max of the squared error over the pixels, (n, 2 T) float64 on the CPU."""
    if batch_size < 1:
        raise ValueError(f"got batch_size={batch_size}; expected at least 1.")
    sde = prior.sde
    bounds = [float(sde.nsr(torch.tensor(t, dtype=torch.float64))) for t in (sde.t_min, sde.t_max)]
    if not all(bounds[0] <= level <= bounds[1] for level in levels):
        raise ValueError(
            f"got noise levels {tuple(levels)}; the prior's process reaches from {bounds[0]:.3g} to {bounds[1]:.3g}."
        )
    rows = []
    for part in torch.arange(len(x)).split(batch_size):
        clean = x[part.to(x.device)]
        totals, peaks = [], []
        for step, level in enumerate(levels):
            t = sde.t_of_nsr(torch.tensor(level, dtype=torch.float64, device=x.device))
            square = torch.zeros(clean.shape, dtype=torch.float64, device=x.device)
            for pair in range(_PAIRS):
                z = normal(seed, part, step, tuple(x.shape[1:]), stream=_STREAM + pair).to(clean)
                for noise in (z, -z):
                    error = clean - prior.denoise(sde.perturb(clean, t, noise), t)
                    square += error.double().square() / (2 * _PAIRS)
            flat = square.flatten(1).clamp_min(_TINY)
            totals.append(flat.sum(1).log())
            peaks.append(flat.amax(1).log())
        rows.append(torch.stack(totals + peaks, 1).cpu())
    return torch.cat(rows)


def _light(x: Tensor) -> Tensor:
    """1, log sum x^2, log sum |x|: (n, 3) float64 on the CPU.  Sums, so that more sky changes nothing."""
    flat = x.double().flatten(1).cpu()
    square = flat.square().sum(1).clamp_min(_TINY).log()
    size = flat.abs().sum(1).clamp_min(_TINY).log()
    return torch.stack([torch.ones_like(square), square, size], 1)


def _fit(samples: Samples, likelihood: Likelihood, average: Callable[[Tensor], Tensor]) -> Tensor:
    """Twice the posterior predictive p-value of chi^2, (m,)."""
    bound = likelihood.bind(tuple(samples.x.shape[1:]))
    if bound.rows is not None and bound.rows != len(samples) and not len(samples) % bound.rows:
        bound = bound.repeat(len(samples) // bound.rows)
    found = chi2(samples, bound)
    values = found.values.double().cpu()
    count = torch.as_tensor(found.expected, dtype=torch.float64).cpu().expand(values.shape)
    upper = torch.special.gammaincc(count / 2, values / 2)
    return (2 * average(upper[:, None])[:, 0]).clamp_max(1.0)


def _rounded(values: Tensor) -> Any:
    """Nested lists of numbers with five digits."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.5g}") for value in values.tolist()]
