"""`optimize`: the same answers and derivatives, for every option that score_models 0.5.11 has."""

import pytest
import torch

import diffpost as dp
from diffpost.networks import build_network
from diffpost.networks.fast_score_models import fast_twin
from diffpost.networks.precondition import NetworkScore
from diffpost.networks.score_models import ScoreModelsNet, SigmaHeadScore

NETS = {
    "as it comes": {},
    "block means": {"fir": False},
    "residual pyramids": {"progressive": "residual", "progressive_input": "residual"},
    "one residual pyramid": {"progressive": "residual", "fir": False},
    "no pyramids": {"progressive": "none", "progressive_input": "none"},
    "joined skips": {"combine_method": "cat"},
    "neither attention nor rescaling": {"attention": False, "skip_rescale": False},
    "a short filter": {"fir_kernel": (1, 2, 1)},
    "a skew filter": {"fir_kernel": (1, 3, 5, 1, 1)},
    "relu": {"activation_type": "relu"},
}
DDPMS = {
    "as it comes": {},
    "without convolutions between levels": {"resample_with_conv": False},
    "activated embedding": {"activate_embedding": True, "activation_type": "swish"},
    "no attention": {"attention": False},
}
CASES = [("ncsnpp", k, v) for k, v in NETS.items()] + [("ddpm", k, v) for k, v in DDPMS.items()]


def prior(kind, seed=0, **options):
    net = ScoreModelsNet.build({"kind": kind, "nf": 16, "ch_mult": (1, 2, 2), **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim > 1 else 0.3))
    return SigmaHeadScore(net, dp.VP(), (1, 16, 24))


def away(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind,name,options", CASES, ids=[f"{k}, {n}" for k, n, _ in CASES])
def test_same_answers(kind, name, options):
    model = prior(kind, **options)
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    faster = dp.optimize(model)
    x = torch.randn(3, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.1, 0.4, 0.9])
    assert away(faster.score(x, t), model.score(x, t)) < 1e-5
    assert away(faster.score(x[:1], t[:1]), model.score(x, t)[:1]) < 1e-5
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    for product in ("denoise_vjp", "denoise_jvp"):
        _, ours = getattr(faster, product)(x, t)
        _, theirs = getattr(model, product)(x, t)
        assert away(ours(v), theirs(v)) < 1e-5, product
    double = faster.to(dtype=torch.float64)  # which score_models' FIR filters do not take
    assert away(double.score(x.double(), t), model.score(x, t).double()) < 1e-5
    for key, value in model.net.state_dict().items():
        assert torch.equal(value, before[key])
    assert not torch.equal(
        dp.optimize(prior(kind, seed=1, **options)).score(x, t), model.score(x, t)
    )


def test_a_wrong_filter_is_seen():
    """What the tolerance tells apart: a FIR filter that is one tap shorter."""
    model = prior("ncsnpp")
    other = prior("ncsnpp", fir_kernel=(1, 3, 3))
    other.net.load_state_dict(model.net.state_dict())
    x = torch.randn(2, 1, 16, 24, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(0.4)
    assert away(dp.optimize(other).score(x, t), model.score(x, t)) > 1e-4


def test_it_cannot_be_saved_and_goes_where_it_is_told(tmp_path):
    faster = dp.optimize(prior("ncsnpp"), device="cpu")
    assert faster.device == torch.device("cpu")
    assert faster.with_shape((1, 8, 8)).shape == (1, 8, 8)
    with pytest.raises(ValueError, match="no `config`"):
        dp.save_prior(tmp_path / "prior", faster)


def test_other_models():
    """A U-Net keeps its answers, vectors and models in closed form come back as they are, and posteriors are refused."""
    net = build_network({"kind": "unet", "widths": [16, 32], "blocks": [1, 1], "embedding": 16})
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    model = NetworkScore(net, dp.EDM(), (1, 16, 16), sigma_data=0.5)
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))
    assert (
        away(dp.optimize(model).denoise(x, torch.tensor(0.7)), model.denoise(x, torch.tensor(0.7)))
        < 1e-5
    )
    gaussian = dp.GaussianScore(torch.zeros(4), var=1.0, sde=dp.EDM())
    assert dp.optimize(gaussian) is gaussian
    likelihood = dp.Likelihood(torch.zeros(4), dp.Identity(), dp.GaussianNoise(std=1.0))
    with pytest.raises(ValueError, match="its prior"):
        dp.optimize(dp.Posterior(gaussian, likelihood))
    mlp = ScoreModelsNet.build({"kind": "mlp", "dimensions": 4, "units": 8, "layers": 1})
    vectors = SigmaHeadScore(mlp, dp.VP(), (4,))
    y = torch.randn(2, 4)
    t = torch.tensor(0.5)
    torch.testing.assert_close(dp.optimize(vectors).score(y, t), vectors.score(y, t))


def test_what_has_no_twin():
    with pytest.raises(ValueError, match="expected an NCSNpp or a DDPM"):
        fast_twin(torch.nn.Linear(2, 2))
    net = prior("ncsnpp").net.net
    net.conditioned = True
    with pytest.raises(ValueError, match="with conditions"):
        fast_twin(net)
    net.conditioned = False
    net.all_modules.append(torch.nn.Bilinear(2, 2, 2))
    with pytest.raises(ValueError, match="Bilinear"):
        fast_twin(net)
