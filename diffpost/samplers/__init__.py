"""Integrators of the reverse-time equations; one a file."""

from diffpost.samplers.adaptive_levels import AdaptiveLevels
from diffpost.samplers.base import NoiseSource, Sampler, State
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.samplers.euler_maruyama import EulerMaruyama
from diffpost.samplers.heun import Heun
from diffpost.samplers.langevin import MALA, Langevin
from diffpost.samplers.on_levels import FittedLevels, OnLevels
from diffpost.samplers.predictor_corrector import PredictorCorrector
from diffpost.samplers.scales import RangeWarning
from diffpost.samplers.split_gibbs import SplitGibbs
from diffpost.samplers.twisted_smc import CollapseWarning, TwistedSMC

__all__ = [
    "MALA",
    "AdaptiveLevels",
    "CollapseWarning",
    "DPMSolver",
    "EulerMaruyama",
    "FittedLevels",
    "Heun",
    "Langevin",
    "NoiseSource",
    "OnLevels",
    "PredictorCorrector",
    "RangeWarning",
    "Sampler",
    "SplitGibbs",
    "State",
    "TwistedSMC",
]
