"""Flux units as FITS headers spell them."""

from __future__ import annotations

import re
import warnings
from typing import Any

from astropy import units

__all__ = ["is_electron_rate", "is_logarithmic", "is_surface_brightness", "parse_unit"]

# What instruments write and astropy does not read.
_UNIT_WORDS = (
    (r"\belectrons\b", "electron"),
    (r"\bcounts\b", "count"),
    (r"\bphotons\b", "photon"),
    (r"\b(seconds|second|sec)\b", "s"),
    (r"\bdn\b", "DN"),
    (r"\b(pixels|pixel)\b", "pix"),
    (r"\be-(?=/|\s|$)", "electron "),
)


def parse_unit(text: str) -> Any:
    """The astropy unit that BUNIT spells, None when nobody knows it."""
    tries = [text]
    words = text
    for pattern, word in _UNIT_WORDS:
        words = re.sub(pattern, word, words, flags=re.IGNORECASE)
    # Headers in capitals mean seconds by S, not siemens.
    if text.isupper():
        words = re.sub(r"(?<=[/ ])S\b", "s", words)
        tries.insert(0, words.strip())
    tries.append(words.strip())
    for candidate in tries:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", units.UnitsWarning)
            try:
                return units.Unit(candidate)
            except (ValueError, TypeError):
                continue
    return None


def is_surface_brightness(text: str | None) -> bool:
    """Whether a unit is per solid angle, so that splitting a pixel leaves its value alone."""
    unit = None if text is None else parse_unit(text)
    if not isinstance(unit, units.UnitBase):
        return False
    try:
        parts = unit.decompose()
    except units.UnitsError:
        return False
    # A beam is a solid angle too, whose size the unit does not tell.
    return any(
        (base == units.rad and power == -2) or (base == units.beam and power == -1)
        for base, power in zip(parts.bases, parts.powers, strict=True)
    )


def is_electron_rate(text: str | None) -> bool:
    """Whether a unit is electrons per second, for which Poisson noise follows from EXPTIME."""
    unit = None if text is None else parse_unit(text)
    if unit is None:
        return False
    return unit in (units.electron / units.s, units.electron / units.s / units.pix)


def is_logarithmic(text: str) -> bool:
    """Whether a unit is a magnitude or another logarithm, not linear in flux."""
    unit = parse_unit(text)
    if unit is None:
        return re.search(r"mag|\blog|dex|\bdB\b", text, flags=re.IGNORECASE) is not None
    if not isinstance(unit, units.UnitBase):
        return True  # magnitudes and their kin are functions of a unit
    return not {units.mag, units.dex, units.dB}.isdisjoint(unit.bases or [unit])
