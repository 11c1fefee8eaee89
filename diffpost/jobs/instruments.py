"""Operators in the words of the command line: `psf:1.5,bin:2` blurs, then bins.

    identity              the image itself
    psf:SIGMA             a Gaussian PSF of SIGMA pixels; nothing outside the frame
    mask:SHARE[:SEED]     hides a share of the pixels, chosen at random once, the same for every image
    bin:K                 sums K x K pixels

From left to right, in the order in which light meets them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffpost.io.fits import read_image
from diffpost.jobs.psf import prepare_psf
from diffpost.operator import Convolve, Identity, LinearOperator, Mask, PixelBin
from diffpost.random import uniform

__all__ = ["gaussian_psf", "read_operator"]

_KNOWN = "identity, psf:SIGMA, mask:SHARE[:SEED], bin:K, such as psf:1.5,bin:2"


def read_operator(
    specs: Sequence[str],
    shape: tuple[int, ...],
    *,
    psf: Path | None = None,
    seed: int = 0,
) -> tuple[LinearOperator, tuple[str, ...]]:
    """The operator that the words describe, and what it does, in words.

    Parameters
    ----------
    specs: words, or several joined by commas; applied in order.
    shape: (C, H, W) of the images.
    psf: FITS image of a star or a PSF at the sampling of the images, applied before everything else;
        see `diffpost.jobs.psf.prepare_psf` for what is done to it.
    seed: of a mask whose word names none.

    Raises
    ------
    ValueError: nothing given, a word that is not known, a number out of range, or a step that does not
        take what the one before it makes.
    """
    words = [word.strip() for spec in specs for word in spec.split(",")]
    if not words and psf is None:
        raise ValueError(f"give an operator, by --operator or --psf; known are {_KNOWN}")
    steps: list[tuple[LinearOperator, str]] = []
    if psf is not None:
        kernel = prepare_psf(read_image(psf).data)
        fwhm = float(kernel.report["fwhm"])
        steps.append(
            (
                Convolve(torch.from_numpy(kernel.kernel).float()),
                f"PSF of {psf} (FWHM {fwhm:.3g} px)",
            )
        )
    at = tuple(shape) if not steps else tuple(steps[0][0].output_shape(tuple(shape)))
    for word in words:
        step = _step(word, at, seed)
        at = tuple(step[0].output_shape(at))
        steps.append(step)
    operator = steps[0][0]
    for after, _ in steps[1:]:
        operator = after @ operator
    return operator, tuple(text for _, text in steps)


def gaussian_psf(sigma: float) -> Tensor:
    """A Gaussian of sigma pixels out to 4 sigma, sum 1: (n, n), n odd."""
    half = math.ceil(4 * sigma)
    profile = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sigma) ** 2)
    psf = torch.outer(profile, profile)
    return (psf / psf.sum()).float()


def _step(word: str, shape: tuple[int, ...], seed: int) -> tuple[LinearOperator, str]:
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
        case "mask", [text, *more] if len(more) < 2:
            share = _number(word, text)
            if not 0 < share < 1:
                raise ValueError(
                    f"--operator {word!r}: expected the share of hidden pixels, between 0 and 1"
                )
            chosen = int(_number(word, more[0], whole=True)) if more else seed
            keep = uniform(chosen, torch.zeros(1, dtype=torch.int64), 0, tuple(shape[-2:]))[0]
            return Mask(keep >= share), f"mask that hides {share:.0%} of the pixels (seed {chosen})"
        case "bin", [text]:
            k = int(_number(word, text, whole=True))
            if k < 1 or shape[-2] % k or shape[-1] % k:
                raise ValueError(
                    f"--operator {word!r}: expected a divisor of the image's sides, "
                    f"{shape[-1]} x {shape[-2]}; --size sets others"
                )
            return PixelBin(k), f"sums of {k} x {k} pixels"
    raise ValueError(f"cannot read the operator {word!r}; known are {_KNOWN}")


def _number(word: str, text: str, whole: bool = False) -> float:
    try:
        value = float(int(text)) if whole else float(text)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"--operator {word!r}: expected {kind}, not {text!r}") from None
    if not math.isfinite(value) or (whole and value < 0):
        raise ValueError(f"--operator {word!r}: {text} is out of range")
    return value
