"""Noise models of `diffpost train-noise` as noise, in the unit of the data that they are for."""

from __future__ import annotations

import os
from typing import Any

from diffpost.io.checkpoints import load_prior
from diffpost.io.units import parse_unit
from diffpost.learned_noise import LearnedNoise

__all__ = ["load_noise"]


def load_noise(
    folder: str | os.PathLike[str],
    *,
    unit: str | None = None,
    std: float | None = None,
    **options: Any,
) -> LearnedNoise:
    """A noise model in the unit of the data.

    Args:
        folder: the ``prior`` in the folder of a run, or any score model of noise.
        unit: of the data, as BUNIT has it; it must be the model's where both are known. None does not ask.
        std: standard deviation of the data's blank sky, in their unit, where it is not the training stamps': the noise is
            scaled to it. A model trained with ``per_field`` needs one.
        options: as :class:`LearnedNoise <diffpost.learned_noise.LearnedNoise>` takes them (plus, temperature, ...).

    Raises:
        ValueError: no such model or none of noise; another unit; no std where one is needed, or one that is not positive.
    """
    model = load_prior(folder)
    card = getattr(model, "card", {})
    if "noise_std" not in card:
        raise ValueError(
            f"{folder} is not a model of noise: its card has no noise_std. `diffpost train-noise` makes one, and "
            "LearnedNoise(load_prior(...)) takes any score model"
        )
    about = card.get("noise", {})
    if std is None and about.get("per_field"):
        raise ValueError(
            f"{folder} was trained with each field at its own depth, so its standard deviation is yours to give: "
            "std=..., that of the blank sky of these data"
        )
    own = about.get("unit")
    if None not in (unit, own) and not _same(str(own), str(unit)):
        raise ValueError(
            f"{folder} is of noise in {own!r} and the data are in {unit!r}; convert the data, or give their std= and "
            "unit=None, if their noise differs by a factor only"
        )
    if std is not None:
        if not 0 < std < float("inf"):
            raise ValueError(f"got std = {std}; expected a positive number")
        model = model.with_affine(std / float(card["noise_std"]), 0.0)
    return LearnedNoise(model, **options)


def _same(a: str, b: str) -> bool:
    if a == b:
        return True
    first, second = parse_unit(a), parse_unit(b)
    return first is not None and first == second
