"""Operators in the words of the command line: `psf:1.5,bin:2` blurs, then bins.

    identity              the image itself
    psf:SIGMA             a Gaussian PSF of SIGMA pixels; nothing outside the frame
    bin:K                 sums K x K pixels
    mask:SHARE[:SEED]     takes away a share of the data, chosen at random once, the same for every image

From left to right, in the order in which light meets them; a mask comes last, as pixels that were not
observed belong into the noise, with infinite variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from diffpost.io.fits import read_image
from diffpost.jobs.psf import prepare_psf
from diffpost.noise import GaussianNoise
from diffpost.operator import Convolve, Identity, LinearOperator, PixelBin
from diffpost.random import uniform

__all__ = ["Instrument", "gaussian_psf", "read_operator"]

_KNOWN = "identity, psf:SIGMA, bin:K and, last, mask:SHARE[:SEED], such as psf:1.5,bin:2"


@final
@dataclass(frozen=True)
class Instrument:
    """An operator that was read.

    hidden: (H', W') which of the data were not observed, or None.
    words: what it does, step by step.
    """

    operator: LinearOperator
    hidden: Tensor | None
    words: tuple[str, ...]

    def noise(self, std: float) -> GaussianNoise:
        """White noise of this standard deviation, infinite where nothing was observed."""
        if self.hidden is None:
            return GaussianNoise(std=std)
        return GaussianNoise(std=torch.where(self.hidden, torch.inf, std))


def read_operator(
    specs: Sequence[str],
    shape: tuple[int, ...],
    *,
    psf: Path | None = None,
    seed: int = 0,
) -> Instrument:
    """The operator that the words describe.

    Parameters
    ----------
    specs: words, or several joined by commas; applied in order.
    shape: (C, H, W) of the images.
    psf: FITS image of a star or a PSF at the sampling of the images, applied before everything else;
        see `diffpost.jobs.psf.prepare_psf` for what is done to it.
    seed: of a mask whose word names none.

    Raises
    ------
    ValueError: nothing given, a word that is not known, a number out of range, a step that does not
        take what the one before it makes, or one after a mask.
    """
    words = [word.strip() for spec in specs for word in spec.split(",")]
    if not words and psf is None:
        raise ValueError(f"give an operator, by --operator or --psf; known are {_KNOWN}")
    steps: list[LinearOperator] = []
    told: list[str] = []
    at, hidden = tuple(shape), None
    if psf is not None:
        ready = prepare_psf(read_image(psf).data)
        steps.append(Convolve(torch.from_numpy(ready.kernel).float()))
        told.append(f"PSF of {psf} (FWHM {float(ready.report['fwhm']):.3g} px)")
    for word in words:
        if hidden is not None:
            raise ValueError(f"got {word!r} after a mask; the mask comes last")
        if word.partition(":")[0] == "mask":
            hidden, text = _mask(word, at, seed)
        else:
            step, text = _step(word, at)
            at = tuple(step.output_shape(at))
            steps.append(step)
        told.append(text)
    operator = steps[0] if steps else Identity()
    for after in steps[1:]:
        operator = after @ operator
    return Instrument(operator, hidden, tuple(told))


def gaussian_psf(sigma: float) -> Tensor:
    """A Gaussian of sigma pixels out to 4 sigma, sum 1: (n, n), n odd."""
    half = math.ceil(4 * sigma)
    profile = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sigma) ** 2)
    psf = torch.outer(profile, profile)
    return (psf / psf.sum()).float()


def _step(word: str, shape: tuple[int, ...]) -> tuple[LinearOperator, str]:
    name, *numbers = word.split(":")
    match name, numbers:
        case "identity", []:
            return Identity(), "identity"
        case "psf", [text]:
            sigma = _number(word, text)
            if not 0 < sigma <= max(shape[-2:]):
                raise ValueError(
                    f"--operator {word!r}: expected a sigma in pixels, above 0 and at most the width "
                    f"of the image, {max(shape[-2:])}; a PSF in a file goes by --psf"
                )
            return Convolve(gaussian_psf(sigma)), f"Gaussian PSF of sigma {sigma:g} px"
        case "bin", [text]:
            k = int(_number(word, text, whole=True))
            if k < 1 or shape[-2] % k or shape[-1] % k:
                raise ValueError(
                    f"--operator {word!r}: expected a divisor of the image's sides, "
                    f"{shape[-1]} x {shape[-2]}; --size sets others"
                )
            return PixelBin(k), f"sums of {k} x {k} pixels"
    raise ValueError(f"cannot read the operator {word!r}; known are {_KNOWN}")


def _mask(word: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, str]:
    _, *numbers = word.split(":")
    if not 1 <= len(numbers) <= 2:
        raise ValueError(f"cannot read the operator {word!r}; known are {_KNOWN}")
    share = _number(word, numbers[0])
    if not 0 < share < 1:
        raise ValueError(
            f"--operator {word!r}: expected the share of pixels to take away, between 0 and 1"
        )
    chosen = int(_number(word, numbers[1], whole=True)) if numbers[1:] else seed
    place = uniform(chosen, torch.zeros(1, dtype=torch.int64), 0, tuple(shape[-2:]))[0]
    return place < share, f"mask without {share:.0%} of the pixels (seed {chosen})"


def _number(word: str, text: str, whole: bool = False) -> float:
    try:
        value = float(int(text)) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"--operator {word!r}: expected {kind}, not {text!r}") from None
    if not math.isfinite(value) or (whole and value < 0):
        raise ValueError(f"--operator {word!r}: {text} is out of range")
    return value
