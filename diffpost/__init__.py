"""Posterior samples of astronomical images: score-network priors, the instrument's physics, honest noise.

A posterior is a score model: `Posterior(prior, likelihood, guidance)` answers the same two questions as a
trained network, `score(x, t)` and `denoise(x, t)`, and `sample` draws from either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffpost._version import __version__
from diffpost.score import GaussianMixtureScore, GaussianScore, ScoreModel
from diffpost.sde import EDM, SDE, TSVE, VE, VP

if TYPE_CHECKING:
    from diffpost import diagnostics, physics, plot
    from diffpost.io.checkpoints import load_prior, save_prior

__all__ = [
    "EDM",
    "SDE",
    "TSVE",
    "VE",
    "VP",
    "GaussianMixtureScore",
    "GaussianScore",
    "ScoreModel",
    "__version__",
    "diagnostics",
    "load_prior",
    "physics",
    "plot",
    "save_prior",
]

# Outside the core, and heavy to import: resolved when first asked for.
_MODULES = ("diagnostics", "physics", "plot")
_CHECKPOINTS = ("load_prior", "save_prior")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffpost.{name}")
    if name in _CHECKPOINTS:
        return getattr(importlib.import_module("diffpost.io.checkpoints"), name)
    raise AttributeError(f"module 'diffpost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
