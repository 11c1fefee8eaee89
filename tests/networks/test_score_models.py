"""score_models' architectures as backbones of a prior that this library trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost.networks.precondition import NetworkScore
from diffpost.training import train
from diffpost.training_config import TrainConfig

pytest.importorskip("score_models", reason="pip install score-models")

BACKBONES: dict[str, dict[str, Any]] = {
    "ncsnpp": {"nf": 8, "ch_mult": [1, 1], "num_res_blocks": 1},
    "ddpm": {"nf": 8, "ch_mult": [1, 1], "num_res_blocks": 1},
    "mlp": {"dimensions": 64, "units": 32},
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_trains_resumes_exactly_and_loads(kind: str, tmp_path: Path) -> None:
    data = tmp_path / "noise.npy"
    np.save(data, np.random.default_rng(0).normal(size=(32, 1, 8, 8)).astype(np.float32))
    config = TrainConfig.from_dict(
        {
            "data": [{"path": str(data)}],
            "network": {"kind": kind, **BACKBONES[kind]},
            "stages": [{"images": 96, "crop": 8, "batch": 16}],
            "sigma_data": 1.0,
            "sample_images": 0,
        }
    )
    whole = train(config, tmp_path / "whole", progress=False)
    train(config, tmp_path / "parts", progress=False, max_steps=2)
    parts = train(config, tmp_path / "parts", progress=False)
    for key, value in whole.net.state_dict().items():
        assert torch.equal(value, parts.net.state_dict()[key])
    prior = dp.load_prior(tmp_path / "whole" / "prior")
    assert isinstance(prior, NetworkScore)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 3.0])
    with torch.no_grad():
        torch.testing.assert_close(prior.denoise(x, t), whole.denoise(x, t))
