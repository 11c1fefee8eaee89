"""Networks: our U-Net, its preconditioning, and score_models' backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from diffpost.networks.score_models import ScoreModelsNet
from diffpost.networks.unet import UNet

__all__ = ["ScoreModelsNet", "UNet", "build_network"]


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """Build a backbone, called as `net(x, c_noise)`, from its configuration.

    `config["kind"]` is "unet", or "ncsnpp", "ddpm" or "mlp" for those of score_models; the other keys are
    options of that network, and `.config` of the result holds them all.

    Raises
    ------
    ValueError: for a kind or an option that is not known.
    ImportError: for a network of score_models where that is not installed.
    """
    options = dict(config)
    match options.pop("kind", None):
        case "unet":
            try:
                return UNet(**options)
            except TypeError as error:
                raise ValueError(f"cannot build a U-Net from {options}: {error}") from error
        case "ncsnpp" | "ddpm" | "mlp":
            return ScoreModelsNet.build(config)
        case kind:
            raise ValueError(
                f"got a network of kind {kind!r}; known kinds are 'unet', 'ncsnpp', 'ddpm' and 'mlp'"
            )
