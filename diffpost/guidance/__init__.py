"""Approximations of the likelihood of the data given a noisy image; one method a file."""

from diffpost.guidance.base import Guidance
from diffpost.guidance.choice import Choice, choose
from diffpost.guidance.convolved import Convolved
from diffpost.guidance.covariance import (
    Covariance,
    IsotropicCovariance,
    LocalCovariance,
    SpectralCovariance,
)
from diffpost.guidance.dps import DPS
from diffpost.guidance.moment_matching import MomentMatching
from diffpost.guidance.pigdm import PiGDM
from diffpost.guidance.slic import SLIC, default_guidance, with_surrogate

__all__ = [
    "DPS",
    "SLIC",
    "Choice",
    "Convolved",
    "Covariance",
    "Guidance",
    "IsotropicCovariance",
    "LocalCovariance",
    "MomentMatching",
    "PiGDM",
    "SpectralCovariance",
    "choose",
    "default_guidance",
    "with_surrogate",
]
