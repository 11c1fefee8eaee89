"""A noise model in a deconvolution: read, brought to the depth of the image, and judged by the residuals.

A noise model says what blank sky is like, so it is compared with the blank sky of the image: a robust standard deviation
that is another than the model's by a factor of 2 is another unit or another depth, and is refused. A model that was
trained with each field at its own depth has none, and takes the image's.

The residual r of a draw is noise if all is right. By parts, E[-r . s(r)] is the number of pixels for noise of any
density whose score is s, and for a Gaussian -r . s(r) is the chi-squared by its full covariance: the "whitened
chi-squared" by which the residuals are judged, beside that of draws of the model itself.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from astropy.stats import mad_std
from numpy.typing import NDArray
from torch import Tensor

from diffpost.io.noise_models import load_noise
from diffpost.learned_noise import LearnedNoise
from diffpost.noise import GaussianNoise

__all__ = ["expectations", "judged", "noise_model_of", "on_top", "refuse_masked"]

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_REFUSED, _TOLD = 2.0, 1.2  # factors between the sky's standard deviation and the model's
_CLIP = 4.0  # robust standard deviations beyond which a pixel of the sky is not noise
_FEWEST = 200  # pixels of blank sky by which a model is judged
_FLOOR = 1e-3  # of the noise: a variance on top may not be zero
_OWN_DRAWS = 16  # of the model, that its residuals are compared with


def noise_model_of(
    source: str | os.PathLike[str] | LearnedNoise,
    sky_std: float | None,
    unit: str | None,
    residual: Array,
    sky: Mask,
    notes: list[str],
) -> tuple[LearnedNoise, dict[str, Any]]:
    """The noise of an image, with a Gaussian surrogate of its power spectrum, and the same in numbers.

    source: folder of a noise model (a run of `diffpost train-noise`, or the `prior` in it), or the noise itself.
    sky_std: standard deviation of the blank sky to which a folder's model is scaled, whatever its unit; None: the model's own,
        or the image's where the model has no depth of its own.
    unit: of the image; residual: (h, w) the image around the target, background subtracted; sky: (h, w) its blank
        sky; notes: where to tell what was found.

    Raises
    ------
    ValueError: no noise model, one in another unit, or one whose standard deviation is not the sky's within a factor of
        2; a model without depth where the image has no sky to measure it on; a sky_std beside a noise that is
        ready, or one that is not positive.
    """
    used = sky & np.isfinite(residual)
    measured = _deviation(residual[used]) if used.sum() >= _FEWEST else None
    if isinstance(source, LearnedNoise):
        if sky_std is not None:
            raise ValueError(
                "got a noise that is in the unit of the data already, and a sky_std; scale it by load_noise(std=...)"
            )
        noise, name = source, getattr(source.score_model, "card", {}).get("name")
    else:
        name = os.fspath(source)
        noise = _load(_folder(source), sky_std, unit, measured, notes)
    noise = noise.with_spectrum()
    std = math.sqrt(noise.own_variance)
    told = f"noise: of the model {name or repr(noise.score_model)}, standard deviation {std:.4g} per pixel"
    if measured is None:
        told += "; there is too little blank sky in the image to compare it with"
    else:
        ratio = measured / std
        told += f"; the blank sky of the image has {measured:.4g}"
        if not 1 / _REFUSED <= ratio <= _REFUSED:
            raise ValueError(
                f"the noise model's standard deviation is {std:.4g} and that of the image's blank sky {measured:.4g}"
                f"{'' if unit is None else ' ' + unit}, {ratio:.3g} times as much; expected a factor of at most "
                f"{_REFUSED:g}. Is the image in another unit than the model's, or of another instrument or depth? If the "
                f"noise differs by that factor only, --sky-std {measured:.4g} (sky_std=) scales the model to it"
            )
        if not 1 / _TOLD <= ratio <= _TOLD:
            told += (
                f", {ratio:.2f} times as much: the error bars will be wrong by about that factor, unless --sky-std "
                f"{measured:.4g} scales the model to it"
            )
    notes.append(told)
    from diffpost.deconvolve import prior_hash

    report = {
        "source": "noise model",
        "name": name,
        "sha256": prior_hash(noise.score_model),
        "std": std,
        "temperature": noise.blur,
        "sky_std": measured,
        "unit": getattr(noise.score_model, "card", {}).get("noise", {}).get("unit"),
    }
    return noise, {"noise": report}


def _deviation(values: Array) -> float:
    """Standard deviation of the values within 4 robust ones of their median: heavy tails are the noise's, sources are not."""
    off = values - np.median(values)
    return float(np.std(off[np.abs(off) < _CLIP * mad_std(values)]))


def _folder(source: str | os.PathLike[str]) -> Path:
    """The folder of the model itself, where that of its run is given."""
    path = Path(source).expanduser()
    inner = path / "prior"
    return inner if inner.is_dir() and not (path / "card.json").exists() else path


def _load(
    folder: Path,
    sky_std: float | None,
    unit: str | None,
    measured: float | None,
    notes: list[str],
) -> LearnedNoise:
    if sky_std is not None:
        if not 0 < sky_std < math.inf:
            raise ValueError(
                f"got a standard deviation of the sky of {sky_std}; expected a positive number"
            )
        notes.append(
            f"noise: the model was scaled to a standard deviation of {sky_std:.4g}, as given"
        )
        return load_noise(folder, std=sky_std)
    from diffpost.io.checkpoints import load_prior

    about = getattr(load_prior(folder), "card", {}).get("noise", {})
    if not about.get("per_field"):
        return load_noise(folder, unit=unit)
    if measured is None:
        raise ValueError(
            f"{folder} was trained with each field at its own depth, and the image has fewer than {_FEWEST} pixels of "
            "blank sky to measure its own on; give the standard deviation of its sky by --sky-std (sky_std=)"
        )
    notes.append(
        f"noise: the model has no depth of its own; it was scaled to the image's blank sky, {measured:.4g}"
    )
    return load_noise(folder, unit=unit, std=measured)


def refuse_masked(seen: Mask, neighbours: Mask) -> None:
    """Raises ValueError where pixels of the cutout are masked: a score of the whole frame has no answer for a part.

    Filling them, or leaving them out of the network's sight, would be right for independent pixels only.
    """
    gone = ~seen
    if not gone.any():
        return
    others, blank = int((gone & neighbours).sum()), int((gone & ~neighbours).sum())
    found = [
        text
        for count, text in (
            (blank, f"{blank} without data (NaN or off the image)"),
            (others, f"{others} of neighbours; --keep-neighbours models these"),
        )
        if count
    ]
    raise ValueError(
        f"{int(gone.sum())} pixels of the cutout are masked: {', '.join(found)}. A noise model is of whole frames: choose a "
        "cutout without masked pixels, or Gaussian noise (--noise, --noise-std), which can leave pixels out"
    )


def on_top(noise: LearnedNoise, variance: Array) -> LearnedNoise:
    """With independent Gaussian noise of this variance (h, w): the sources' own, and the PSF's error. Itself where there is
    none.
    """
    if not (variance > 0).any():
        return noise
    least = _FLOOR * math.sqrt(noise.own_variance)
    std = torch.from_numpy(np.sqrt(variance)).clamp_min(least)
    return noise + GaussianNoise(std=std[None])


def expectations(noise: LearnedNoise, shape: tuple[int, ...]) -> dict[str, float]:
    """Of residuals of this shape (1, h, w): the standard deviation of their reduced chi-squared by pixel variances, and
    the correlation of pixels adjacent in x and in y, by the noise's power spectrum.
    """
    power = noise.without_plus().surrogate(shape).spectrum(shape)
    if power is None:
        raise ValueError(f"{noise!r} has no power spectrum for data of shape {shape}")
    power = power.expand(shape).double()
    n = power.numel()
    covariance = torch.fft.ifft2(power).real[0]
    return {
        "chi2_std": float((2 * power.square().mean() / power.mean() ** 2 / n).sqrt()),
        "x": float(covariance[0, 1] / covariance[0, 0]),
        "y": float(covariance[1, 0] / covariance[0, 0]),
    }


def judged(noise: LearnedNoise, mean: Tensor, draws: Tensor, seed: int = 0) -> dict[str, float]:
    """Whitened chi-squared per pixel of residuals.

    mean: (1, 1, h, w) residual of the posterior mean; draws: (B, 1, h, w) residuals of draws.
    """
    n = mean[0].numel()
    own = noise.rough_draws((_OWN_DRAWS, *mean.shape[1:]), seed)
    with torch.no_grad():
        of_own = noise.chi2(own).double() / n
        of_draws = torch.cat([noise.chi2(part).double() for part in draws.split(8)]) / n
        of_mean = float(noise.chi2(mean)) / n
    return {
        "mean": of_mean,
        "draws": float(of_draws.mean()),
        "expected": float(of_own.mean()),
        "expected_std": float(of_own.std()),
    }
