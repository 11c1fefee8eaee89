"""The U-Net: any size, no seams, no neighbours."""

import math

import pytest
import torch

from diffpost.networks import UNet, build_network


def small(**options):
    torch.manual_seed(0)
    net = UNet(**{"widths": (8, 16), "blocks": (1, 1), "embedding": 16, **options})
    for parameter in net.parameters():  # zero-initialised layers would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return net.double()


def test_config_rebuilds_the_same_network():
    net = small()
    again = build_network(net.config).double()
    again.load_state_dict(net.state_dict())
    x, c = torch.randn(2, 1, 16, 16).double(), torch.randn(2).double()
    assert torch.equal(net(x, c), again(x, c))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (16, 24), (44, 12)])
def test_any_size_that_the_stride_divides(channels, size):
    net = small(channels=channels)
    x = torch.randn(2, channels, *size).double()
    assert net(x, torch.zeros(2)).shape == x.shape


def test_interior_does_not_depend_on_the_size_of_the_frame():
    """A shift by the stride moves the output with the input, away from the border: no seams."""
    net = small()
    field = torch.randn(1, 1, 96, 96).double()
    c = torch.zeros(1)
    whole, part = net(field, c), net(field[..., 8:88, 8:88], c)
    inner = slice(28, 52)
    assert torch.allclose(whole[..., 8:88, 8:88][..., inner, inner], part[..., inner, inner])
    # Control: at the border, where zeros are padded in, the two do differ.
    assert not torch.allclose(whole[..., 8:88, 8:88], part)


def test_a_batch_entry_never_sees_its_neighbours():
    net = small()
    x, c = torch.randn(3, 1, 16, 16).double(), torch.randn(3).double()
    alone = torch.cat([net(x[i : i + 1], c[i : i + 1]) for i in range(3)])
    assert torch.allclose(net(x, c), alone, rtol=1e-12, atol=1e-12)


def test_the_noise_level_matters():
    net = small()
    x = torch.randn(1, 1, 16, 16).double()
    assert not torch.allclose(net(x, torch.zeros(1)), net(x, torch.ones(1)))


def test_a_fresh_network_returns_zero():
    """The preconditioned denoiser starts from c_skip u."""
    net = UNet(widths=(8, 16), blocks=(1, 1), embedding=16)
    assert net(torch.randn(1, 1, 16, 16), torch.zeros(1)).abs().max() == 0


@pytest.mark.parametrize(
    ("shape", "said"),
    [((1, 1, 10, 8), "divisible by 4"), ((1, 2, 8, 8), "expected \\(B, 1, H, W\\)")],
)
def test_bad_inputs_say_what_was_expected(shape, said):
    with pytest.raises(ValueError, match=said):
        small()(torch.zeros(shape).double(), torch.zeros(1))


def test_bad_configurations():
    with pytest.raises(ValueError, match="one block count a level"):
        UNet(widths=(8, 16), blocks=(1,))
    with pytest.raises(ValueError, match="at least 1"):
        UNet(widths=(8, 0), blocks=(1, 1))
    with pytest.raises(ValueError, match="nothing"):
        build_network({"kind": "nothing"})


def test_mixed_precision_keeps_noise_below_its_rounding():
    """Noise of a thousandth of the image drowns in bfloat16, so only the residual branches may run in it."""
    from diffpost.io.checkpoints import load_prior

    net = load_prior("galaxies-32").net.float()
    grid = torch.arange(32.0) - 15.5
    image = 4 * torch.exp(-(grid[:, None] ** 2 + grid**2) / 50)
    x = image + 0.006 * torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    c_noise = torch.full((2,), math.log(1e-3) / 4)
    with torch.no_grad():
        whole = net(x, c_noise)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = net(x, c_noise)
        half = net.bfloat16()(x.bfloat16(), c_noise)
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed, whole)
    scale = whole.std()
    assert (mixed - whole).std() < 0.03 * scale
    # Control: all of it in half precision loses the noise.
    assert (half - whole).std() > 0.1 * scale
