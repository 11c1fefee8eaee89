"""Integrators of the reverse-time equations; one a file."""

from diffpost.samplers.base import NoiseSource, Sampler, State
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.samplers.euler_maruyama import EulerMaruyama
from diffpost.samplers.heun import Heun
from diffpost.samplers.langevin import MALA, Langevin
from diffpost.samplers.predictor_corrector import PredictorCorrector
from diffpost.samplers.split_gibbs import SplitGibbs

__all__ = [
    "MALA",
    "DPMSolver",
    "EulerMaruyama",
    "Heun",
    "Langevin",
    "NoiseSource",
    "PredictorCorrector",
    "Sampler",
    "SplitGibbs",
    "State",
]
