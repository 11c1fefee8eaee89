"""Posterior samples of astronomical images: score-network priors, the instrument's physics, honest noise.

A posterior is a score model: `Posterior(prior, likelihood, guidance)` answers the same two questions as a
trained network, `score(x, t)` and `denoise(x, t)`, and `sample` draws from either.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffpost._version import __version__
from diffpost.guidance import (
    DPS,
    SLIC,
    Convolved,
    Guidance,
    IsotropicCovariance,
    LocalCovariance,
    MomentMatching,
    PiGDM,
    SpectralCovariance,
)
from diffpost.learned_noise import LearnedNoise
from diffpost.likelihood import Likelihood
from diffpost.linalg import ConvergenceWarning
from diffpost.noise import BlockNoise, GaussianNoise, Noise
from diffpost.operator import (
    Convolve,
    Crop,
    Diagonal,
    Fourier,
    Identity,
    LinearOperator,
    Mask,
    Matrix,
    Operator,
    PixelBin,
    Stack,
)
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import (
    MALA,
    AdaptiveLevels,
    CollapseWarning,
    DPMSolver,
    EulerMaruyama,
    FittedLevels,
    Heun,
    Langevin,
    OnLevels,
    PredictorCorrector,
    RangeWarning,
    Sampler,
    SplitGibbs,
    TwistedSMC,
)
from diffpost.samples import Samples
from diffpost.scale_mixture import ScaleMixtureScore
from diffpost.score import GaussianMixtureScore, GaussianScore, ScoreModel
from diffpost.sde import EDM, SDE, TSVE, VE, VP
from diffpost.tiling import TiledScore

if TYPE_CHECKING:
    from diffpost import diagnostics, parameters, physics, plot
    from diffpost.diagnostics import chi2
    from diffpost.io.checkpoints import load_prior, save_prior
    from diffpost.io.noise_models import load_noise
    from diffpost.networks.optimization import optimize
    from diffpost.recommendation import Recommendation, recommend

__all__ = [
    "DPS",
    "EDM",
    "MALA",
    "SDE",
    "SLIC",
    "TSVE",
    "VE",
    "VP",
    "AdaptiveLevels",
    "BlockNoise",
    "CollapseWarning",
    "ConvergenceWarning",
    "Convolve",
    "Convolved",
    "Crop",
    "DPMSolver",
    "Diagonal",
    "EulerMaruyama",
    "FittedLevels",
    "Fourier",
    "GaussianMixtureScore",
    "GaussianNoise",
    "GaussianScore",
    "Guidance",
    "Heun",
    "Identity",
    "IsotropicCovariance",
    "Langevin",
    "LearnedNoise",
    "Likelihood",
    "LinearOperator",
    "LocalCovariance",
    "Mask",
    "Matrix",
    "MomentMatching",
    "Noise",
    "OnLevels",
    "Operator",
    "PiGDM",
    "PixelBin",
    "Posterior",
    "PredictorCorrector",
    "RangeWarning",
    "Recommendation",
    "Sampler",
    "Samples",
    "ScaleMixtureScore",
    "ScoreModel",
    "SpectralCovariance",
    "SplitGibbs",
    "Stack",
    "TiledScore",
    "TwistedSMC",
    "__version__",
    "chi2",
    "diagnostics",
    "load_noise",
    "load_prior",
    "optimize",
    "parameters",
    "physics",
    "plot",
    "recommend",
    "sample",
    "save_prior",
]

# Outside the core, and some heavy to import: resolved when first asked for.
_MODULES = ("diagnostics", "parameters", "physics", "plot")
_LATE = {
    "Recommendation": "recommendation",
    "chi2": "diagnostics",
    "load_noise": "io.noise_models",
    "load_prior": "io.checkpoints",
    "optimize": "networks.optimization",
    "recommend": "recommendation",
    "save_prior": "io.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffpost.{name}")
    if name in _LATE:
        return getattr(importlib.import_module(f"diffpost.{_LATE[name]}"), name)
    raise AttributeError(f"module 'diffpost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
