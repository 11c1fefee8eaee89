"""examples/learned_noise.py and learned_noise_galaxy.py: their galaxies are what they are said to be, and the whole of both
runs on a small noise model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from diffpost.io.stamps import Stamps
from diffpost.jobs.train_noise import train_noise

Example = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def script(example: Example) -> ModuleType:
    return example("learned_noise")


def test_a_disc_has_its_flux_its_place_and_half_of_it_within_its_radius(script: ModuleType) -> None:
    values = {"flux": 100.0, "radius": 4.0, "q": 1.0, "x": 1.5, "y": -2.0}
    seen = script.disc({k: torch.tensor([v]) for k, v in values.items()})[0, 0].double()
    axis = torch.arange(32) - 15.5
    total = float(seen.sum())
    assert total == pytest.approx(100, rel=0.05)  # an exponential's tail leaves 32 pixels
    assert float((seen.sum(0) * axis).sum() / total) == pytest.approx(1.5, abs=0.1)
    assert float((seen.sum(1) * axis).sum() / total) == pytest.approx(-2.0, abs=0.15)
    r = torch.hypot(axis[:, None] + 2.0, axis - 1.5)
    assert float(seen[r < 4.0].sum()) / 100 == pytest.approx(
        0.5, abs=0.05
    )  # the PSF takes some out
    assert float(seen[r < 2.5].sum()) / 100 < 0.4


@pytest.mark.slow
def test_the_example_runs_and_finds_white_noise_in_correlated_noise_too_sure(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = np.random.default_rng(1).normal(size=(60, 64, 64))
    k = np.fft.fftfreq(64)
    x = np.fft.ifft2(np.fft.fft2(w) / (1 + 40 * (k[:, None] ** 2 + k**2))).real
    stamps = Stamps.of(x / x.std(), np.repeat([f"f{i}" for i in range(5)], 12))
    settings = {
        "network": {"kind": "unet", "patch": 2, "widths": [8], "blocks": [1], "embedding": 8},
        "stages": [{"images": 512, "crop": 32, "batch": 32}],
        "validate_images": 16,
    }
    train_noise(
        stamps,
        tmp_path / "run",
        settings=settings,
        heldout=["f1", "f2"],
        per_field=True,
        progress=False,
    )
    asked = ["--sims", "40", "--draws", "4", "--warmup", "3", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["learned_noise.py", f"toy={tmp_path / 'run'}", *asked])
    script.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["toy"]
    assert (tmp_path / "out" / "learned_noise.png").stat().st_size > 10_000
    assert set(found["likeness"]["fields"]) == {"f1", "f2"}
    of = found["inference"]
    # error of the flux over its stated error bar: far too small for the diagonal Gaussian
    diagonal, fitted = (
        of[name]["rms_error"][0] / of[name]["mean_std"][0]
        for name in ("diagonal Gaussian", "Gaussian, fitted power")
    )
    assert diagonal > 1.5 * fitted
    assert of["SLIC"]["score_evaluations"] > 0


@pytest.mark.slow
def test_the_galaxy_under_four_noises(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small cutout, a noise model that is nearly white, few draws: four results, and a picture of them."""
    from diffpost.io.checkpoints import save_prior
    from diffpost.io.datasets import DatasetUnavailable, fetch
    from diffpost.networks import build_network
    from diffpost.networks.precondition import NetworkScore
    from diffpost.sde import EDM

    galaxy = example("learned_noise_galaxy")
    try:
        fetch(galaxy.FIELD)
    except DatasetUnavailable as why:
        pytest.skip(str(why))
    network = {
        "kind": "unet",
        "channels": 1,
        "patch": 2,
        "widths": [8],
        "blocks": [1],
        "embedding": 8,
    }
    card = {"name": "white", "noise_std": 1.0, "noise": {"per_field": True}}
    model = NetworkScore(build_network(network), EDM(0.02, 20.0), (1, 16, 16), 1.0, card=card)
    save_prior(tmp_path / "run" / "prior", model)
    monkeypatch.setattr(galaxy, "TARGETS", {"faint": (351.0, 222.0, 16)})
    asked = ["--samples", "2", "--moves", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "run"), *asked])
    galaxy.main()
    found = json.loads((tmp_path / "out" / "results.json").read_text())["faint"]
    assert set(found) == set(galaxy.KINDS)
    assert (tmp_path / "out" / "learned_noise_galaxy.png").stat().st_size > 10_000
    # the sky's scatter is 0.032, and the job inflates it for the pixels' correlation
    assert found["diagonal"]["noise"] == pytest.approx(0.032, abs=0.002)
    assert found["inflated"]["noise"] > 1.3 * found["diagonal"]["noise"]
    assert found["learned"]["noise"] == pytest.approx(found["diagonal"]["noise"], rel=1e-4)
    assert all(5 < found[kind]["flux"][0] < 60 for kind in found)
