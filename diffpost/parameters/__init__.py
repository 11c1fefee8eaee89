"""Inference of an image together with a few parameters of what observed it.

    y = A(theta) x + b(theta) + n

    prior      = ParameterPrior.from_dict({"width": {"uniform": [0.5, 3]}, "angle": {"circular": 180}})
    likelihood = ParametricLikelihood(y, family, GaussianNoise(std=rms))      # family: an OperatorFamily
    gaussian   = GaussianImage.from_draws(dp.sample(image_prior, 2000, sampler).x, share=0.999)
    evidence   = Evidence(likelihood, prior, gaussian)                        # the image marginalised
    draws      = sample_collapsed(evidence, image_prior=image_prior)
    print(evidence_shift(draws, likelihood, prior))                           # is the Gaussian good enough?
    draws      = sample_corrected(evidence, image_prior)                      # corrected by images

What is exact, for which prior of images, and how theta mixes:

    sample_collapsed    Gaussian. Images of another prior follow a theta that is the      as without an image
                        Gaussian's.
    sample_corrected    Where the log ratio of evidences is quadratic over the bulk; in   as without an image
                        many images.
    sample_transported  Any whose score at the lowest noise is a true gradient, as of     nearly so
                        closed forms; a network's is not over long ways.
    sample_blocked      Any, as far as the images are exact draws.                        1/rho^2 sweeps, 4 to 6
                                                                                          behind a lens
"""

from diffpost.parameters.blocked import sample_blocked
from diffpost.parameters.chains import Chains, Kernel, LogDensity, run_chains
from diffpost.parameters.collapsed import Start, sample_collapsed, starting_points
from diffpost.parameters.corrected import sample_corrected
from diffpost.parameters.evidence import Evidence, ImageGivenParameters
from diffpost.parameters.family import OperatorFamily, ParametricLikelihood
from diffpost.parameters.gaussian import GaussianImage
from diffpost.parameters.hmc import HMC
from diffpost.parameters.modelled import ModelledData
from diffpost.parameters.modes import Modes, find_modes, laplace_covariance
from diffpost.parameters.prior import ParameterPrior, nearest
from diffpost.parameters.priors import Circular, LogNormal, Normal, Prior, Uniform
from diffpost.parameters.result import JointSamples
from diffpost.parameters.shift import EvidenceShift, evidence_shift
from diffpost.parameters.stretch import Stretch
from diffpost.parameters.transported import sample_transported

__all__ = [
    "HMC",
    "Chains",
    "Circular",
    "Evidence",
    "EvidenceShift",
    "GaussianImage",
    "ImageGivenParameters",
    "JointSamples",
    "Kernel",
    "LogDensity",
    "LogNormal",
    "ModelledData",
    "Modes",
    "Normal",
    "OperatorFamily",
    "ParameterPrior",
    "ParametricLikelihood",
    "Prior",
    "Start",
    "Stretch",
    "Uniform",
    "evidence_shift",
    "find_modes",
    "laplace_covariance",
    "nearest",
    "run_chains",
    "sample_blocked",
    "sample_collapsed",
    "sample_corrected",
    "sample_transported",
    "starting_points",
]
