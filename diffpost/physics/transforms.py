"""What ``torch.func`` is doing to a tensor; the one place that asks torch's internals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["hidden", "plain", "transformed"]


def transformed() -> bool:
    """Whether a transform of ``torch.func`` is at work."""
    return bool(torch._C._are_functorch_transforms_active())


def hidden(x: Tensor) -> bool:
    """Whether values are hidden by ``torch.func.vmap``."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def plain(x: Tensor) -> bool:
    """Whether nothing of x has to be differentiated or transformed."""
    if transformed() or (x.requires_grad and torch.is_grad_enabled()):
        return False
    return forward_ad.unpack_dual(x).tangent is None
