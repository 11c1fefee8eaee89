r"""A network as a score model, with the preconditioning of EDM.

Every forward process here is x_t = alpha x_0 + sigma z.  Divided by alpha it is u = x_0 + nu z, with
nu = sigma / alpha, whatever the process; so one network, trained to denoise u, serves all of them.
Karras et al. 2022 (arXiv:2206.00364), equation 7, write the denoiser as

    D(u; nu) = c_skip u + c_out F(c_in u, c_noise),
    c_skip = d^2 / (nu^2 + d^2),   c_out = nu d / sqrt(nu^2 + d^2),
    c_in = 1 / sqrt(nu^2 + d^2),   c_noise = log(nu) / 4,

where d is the standard deviation of the training pixels: the input and the target of F then have unit
variance at every noise level, and the error of F is amplified as little as possible.
"""

from __future__ import annotations

import copy
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from diffpost.networks.base import NetworkModel
from diffpost.sde import SDE, expand

__all__ = ["NetworkScore", "edm_coefficients"]


def edm_coefficients(nsr: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, at noise-to-signal `nsr`."""
    total = nsr**2 + sigma_data**2
    return (
        sigma_data**2 / total,
        nsr * sigma_data * total.rsqrt(),
        total.rsqrt(),
        nsr.log() / 4.0,
    )


@final
class NetworkScore(NetworkModel):
    """A trained backbone as a `ScoreModel`.

    Parameters
    ----------
    net: module called as `net(x, c_noise)` with x (B, *shape), c_noise (B,), returning (B, *shape).
    sde: the forward process in which samples are drawn; any one will do, since the network only sees
        x / alpha and sigma / alpha.
    shape: shape of one image, (C, H, W).
    sigma_data: standard deviation of the training pixels, in network units.
    scale, offset: physical = scale * network + offset.
    card: what the prior was trained on and what it should not be used for.

    Raises
    ------
    ValueError: for a sigma_data that is not positive, or a shape that the network's stride does not
        divide.
    """

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        shape: tuple[int, ...],
        sigma_data: float,
        *,
        scale: float | Tensor = 1.0,
        offset: float | Tensor = 0.0,
        card: dict[str, Any] | None = None,
    ) -> None:
        if not sigma_data > 0:
            raise ValueError(f"got sigma_data = {sigma_data}; expected a positive number")
        self.stride = int(getattr(net, "stride", 1))
        self.sde = sde
        self.scale = scale
        self.offset = offset
        self.shape = self._checked(tuple(int(side) for side in shape))
        self.sigma_data = float(sigma_data)
        self.card: dict[str, Any] = {} if card is None else dict(card)
        self.net = net.eval().requires_grad_(False)

    def _checked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3 or any(side % self.stride or side < self.stride for side in shape[1:]):
            raise ValueError(
                f"got the shape {shape}; expected (C, H, W) with H and W divisible by {self.stride}"
            )
        return shape

    def with_shape(self, shape: tuple[int, ...]) -> Self:
        """The same prior for images of another size, which the stride of the network must divide."""
        other = copy.copy(self)
        other.shape = self._checked(tuple(int(side) for side in shape))
        return other

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t], (B, *shape), in the dtype of x; the network runs in its own dtype."""
        # Coefficients in float64: nu spans five decades.
        t = torch.as_tensor(t, dtype=torch.float64, device=x.device)
        c_skip, c_out, c_in, c_noise = edm_coefficients(self.sde.nsr(t), self.sigma_data)
        u = x / expand(self.sde.alpha(t), x)
        inside = (expand(c_in, x) * u).to(self.dtype)
        label = c_noise.expand(x.shape[0]).to(device=self.device, dtype=self.dtype)
        return expand(c_skip, x) * u + expand(c_out, x) * self.net(inside, label).to(x.dtype)
