"""Problems whose posterior is known exactly, to judge guidances and samplers on."""

from diffpost.oracles.field import BANDS, FieldOracle, FieldReport, gaussian_field
from diffpost.oracles.mixture import MixtureOracle, gaussian_mixture, mixture_posterior
from diffpost.oracles.network import AsNetwork
from diffpost.oracles.observed_field import OBSERVATIONS, ObservedField, observed_field
from diffpost.oracles.ring import RingOracle, ring
from diffpost.oracles.textures import TextureOracle, textures

__all__ = [
    "BANDS",
    "OBSERVATIONS",
    "AsNetwork",
    "FieldOracle",
    "FieldReport",
    "MixtureOracle",
    "ObservedField",
    "RingOracle",
    "TextureOracle",
    "gaussian_field",
    "gaussian_mixture",
    "mixture_posterior",
    "observed_field",
    "ring",
    "textures",
]
