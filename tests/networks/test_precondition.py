"""EDM preconditioning: one network, any process, any size."""

import pytest
import torch
from torch import nn

from diffpost.networks import UNet
from diffpost.networks.precondition import NetworkScore, edm_coefficients
from diffpost.sde import EDM, VE, VP


class Optimal(nn.Module):
    """The F that makes the denoiser exact for pixels that are N(0, d^2)."""

    def __init__(self, d, sigma_data):
        super().__init__()
        self.d = d
        self.sigma_data = sigma_data
        self.anchor = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, c_noise):
        nsr = torch.exp(4 * c_noise)
        skip, out, inner, _ = edm_coefficients(nsr, self.sigma_data)
        gain = self.d**2 / (self.d**2 + nsr**2)
        return ((gain - skip) / (inner * out))[:, None, None, None] * x


@pytest.mark.parametrize("sde", [EDM(), VE(), VP()], ids=["EDM", "VE", "VP"])
def test_the_optimal_network_is_the_exact_denoiser_in_every_process(sde):
    d = 0.7
    prior = NetworkScore(Optimal(d, 0.5), sde, (1, 4, 4), 0.5)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    t = sde.t_of_nsr(torch.tensor([0.05, 0.6, 8.0], dtype=torch.float64))
    alpha, nsr = (f(t)[:, None, None, None] for f in (sde.alpha, sde.nsr))
    exact = d**2 / (d**2 + nsr**2) * x / alpha
    assert torch.allclose(prior.denoise(x, t), exact, rtol=1e-9)
    score = -x / (alpha**2 * (d**2 + nsr**2))
    assert torch.allclose(prior.score(x, t), score, rtol=1e-8)


def test_input_target_and_error_have_unit_scale():
    """c_in makes the input, and c_out the target, of variance 1 at every level (EDM, appendix B.6)."""
    d = 0.3
    nsr = torch.logspace(-3, 2, 11, dtype=torch.float64)
    skip, out, inner, _ = edm_coefficients(nsr, d)
    assert torch.allclose(inner**2 * (d**2 + nsr**2), torch.ones_like(nsr))
    target = ((1 - skip) ** 2 * d**2 + skip**2 * nsr**2) / out**2
    assert torch.allclose(target, torch.ones_like(nsr))


def test_shape_follows_the_stride():
    prior = NetworkScore(UNet(widths=(8, 16), blocks=(1, 1), embedding=16), EDM(), (1, 16, 16), 0.5)
    wide = prior.with_shape((1, 8, 24))
    assert wide.shape == (1, 8, 24) and prior.shape == (1, 16, 16)
    assert wide.denoise(torch.zeros(2, 1, 8, 24), torch.tensor(1.0)).shape == (2, 1, 8, 24)
    with pytest.raises(ValueError, match="divisible by 4"):
        prior.with_shape((1, 10, 16))
    with pytest.raises(ValueError, match="positive"):
        NetworkScore(UNet(), EDM(), (1, 16, 16), 0.0)


def test_vjp_through_the_network():
    torch.manual_seed(0)
    net = UNet(widths=(8, 16), blocks=(1, 1), embedding=16).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    prior = NetworkScore(net, EDM(), (1, 8, 8), 0.5)
    x, v, w = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.1, 1.0], dtype=torch.float64)
    _, vjp = prior.denoise_vjp(x, t)
    step = 1e-6
    slope = (prior.denoise(x + step * w, t) - prior.denoise(x - step * w, t)) / (2 * step)
    left, right = (slope * v).sum((1, 2, 3)), (vjp(v) * w).sum((1, 2, 3))
    assert torch.allclose(left, right, rtol=1e-6)
