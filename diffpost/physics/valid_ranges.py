"""Values and priors of a model's parameters against the ranges that caustics states."""

from __future__ import annotations

from typing import Any

from diffpost.parameters.priors import Prior

__all__ = ["check_prior", "check_value"]


def check_value(name: str, param: Any, value: float) -> None:
    """Raises a ValueError where a number is out of the range of a parameter of caustics."""
    low, high = (None if v is None else float(v) for v in param.valid)
    if param.cyclic:
        return
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} = {value:g}: caustics' valid range is {low} to {high}.")


def check_prior(name: str, param: Any, prior: Prior) -> None:
    """Raises a ValueError where a prior reaches out of the range, for chains would end in an error there."""
    if param.cyclic:
        return
    low, high = (None if v is None else float(v) for v in param.valid)
    begin, end = prior.support
    if (low is not None and begin < low) or (high is not None and end > high):
        raise ValueError(
            f"{name}: the prior {prior} reaches from {begin:g} to {end:g}, and caustics' valid range is {low} to "
            f"{high}; bound it by within: [low, high]."
        )
