"""Integrators of the reverse-time equations; one a file."""

from diffpost.samplers.base import NoiseSource, Sampler, State
from diffpost.samplers.dpm_solver import DPMSolver
from diffpost.samplers.euler_maruyama import EulerMaruyama
from diffpost.samplers.heun import Heun
from diffpost.samplers.predictor_corrector import PredictorCorrector

__all__ = [
    "DPMSolver",
    "EulerMaruyama",
    "Heun",
    "NoiseSource",
    "PredictorCorrector",
    "Sampler",
    "State",
]
