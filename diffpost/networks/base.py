"""What score models around a network share: where it lives, and how it moves."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import nn

from diffpost.guidance.covariance import Covariance
from diffpost.networks.denoising_error import covariance_from_card
from diffpost.score import ScoreModel

__all__ = ["NetworkModel"]


class NetworkModel(ScoreModel):
    """A score model that computes in the dtype and on the device of its network's parameters."""

    net: nn.Module
    card: dict[str, Any]

    def error_covariance(self) -> Covariance | None:
        """What its card holds of its denoising errors (`diffpost.networks.denoising_error`)."""
        return covariance_from_card(self.card)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.net.parameters()).dtype

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A copy whose network lives on `device` in `dtype`."""
        other = copy.copy(self)
        other.net = copy.deepcopy(self.net).to(device=device, dtype=dtype)
        return other
