"""Networks: our U-Net, its preconditioning, and score_models' backbones."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpost.networks.unet import UNet

__all__ = ["UNet", "build_network"]


def build_network(config: dict[str, Any]) -> nn.Module:
    """Build a backbone from its configuration; `config["kind"]` says which.

    Raises
    ------
    ValueError: for a kind that is not known.
    """
    options = dict(config)
    match options.pop("kind", None):
        case "unet":
            return UNet(**options)
        case kind:
            raise ValueError(f"got a network of kind {kind!r}; known kinds are 'unet'")
