"""Noise models from stamps: the split, the isotropy that allows turning, exact resuming, and a known spectrum learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost.io.stamps import Stamps, write_stamps
from diffpost.jobs.isotropy import isotropy
from diffpost.jobs.train_noise import noise_config, prepare_noise, train_noise
from diffpost.networks import build_network

STD = 0.02


def spectrum(size: int, stretch: float = 1.0) -> np.ndarray:
    """Of noise of variance 1 that is smoother one way by ``stretch``."""
    ky, kx = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
    power = 1 / (1 + 30 * (stretch * ky**2 + kx**2))
    return power / power.mean()


def noise(n: int, size: int, seed: int, stretch: float = 1.0) -> np.ndarray:
    w = np.random.default_rng(seed).normal(size=(n, size, size))
    return np.fft.ifft2(np.fft.fft2(w) * spectrum(size, stretch) ** 0.5).real


def stamps(fields: int = 6, each: int = 12, size: int = 32, unit: str | None = "MJy/sr") -> Stamps:
    values = STD * noise(fields * each, size, 3)
    return Stamps.of(values, np.repeat([f"f{i}" for i in range(fields)], each), unit)


TINY: dict[str, Any] = {
    "network": {"kind": "unet", "patch": 2, "widths": [8], "blocks": [1], "embedding": 8},
    "stages": [{"images": 256, "crop": 28, "batch": 32}],
    "validate_every": 128,
    "validate_images": 16,
    "checkpoint_seconds": 1e9,
}


def test_isotropy_has_its_level_and_finds_a_stretch() -> None:
    """Under the null both p-values are uniform: of 60, about 3 are below 0.05; binomially, 10 has a chance of 1e-3."""
    found = [isotropy(noise(40, 24, seed), seed) for seed in range(30)]
    p = np.array([(f.p_mirror, f.p_transpose) for f in found])
    assert (p < 0.05).sum() < 10
    assert 0.35 < p.mean() < 0.65
    stretched = isotropy(noise(40, 24, 1, stretch=1.5))
    assert stretched.p_transpose < 0.01 and not stretched.shown
    assert stretched.p_mirror > 0.01  # mirrored, it stays as it is
    w = noise(40, 24, 2)
    sheared = isotropy(w + 0.5 * np.roll(w, (1, 1), (1, 2)))
    assert sheared.p_mirror < 0.01 and not sheared.shown


def test_few_stamps_do_not_show_isotropy() -> None:
    found = isotropy(noise(4, 24, 9))
    assert min(found.p_mirror, found.p_transpose) > 0.025
    assert not found.shown
    assert isotropy(noise(300, 32, 5)).shown


def test_stamps_are_split_by_field_and_scaled() -> None:
    data = prepare_noise(stamps(), seed=1)
    assert len(data.card["heldout_fields"]) == 2 and len(data.card["fields"]) == 4
    assert set(data.heldout_fields) == set(data.card["heldout_fields"])
    assert data.train.mean() == pytest.approx(0, abs=1e-6)
    assert data.train.std() == pytest.approx(1, abs=1e-5)
    assert data.std == pytest.approx(STD, rel=0.05)
    chosen = prepare_noise(stamps(), heldout=["f3"])
    assert set(chosen.heldout_fields) == {"f3"}


def test_fields_of_other_depths_are_told_or_brought_to_one() -> None:
    deep = stamps()
    deep.values[deep.fields == "f0"] *= 10
    told = prepare_noise(deep, heldout=["f5"])
    assert any("--per-field" in text for text in told.warnings)
    one = prepare_noise(deep, heldout=["f5"], per_field=True)
    assert not any("--per-field" in text for text in one.warnings)
    assert one.std == pytest.approx(STD, rel=0.1)
    assert one.train[:12].std() == pytest.approx(one.train[12:].std(), rel=1e-3)


def test_bad_stamps_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="one field"):
        prepare_noise(stamps(fields=1))
    with pytest.raises(ValueError, match="no field x"):
        prepare_noise(stamps(), heldout=["x"])
    with pytest.raises(ValueError, match="one to train on"):
        prepare_noise(stamps(fields=2), heldout=["f0", "f1"])
    few = prepare_noise(stamps(fields=3))
    assert any("only 3 fields" in text for text in few.warnings)
    empty = stamps()
    empty.values[empty.fields == "f2"] = 0
    with pytest.raises(ValueError, match="no scatter"):
        prepare_noise(empty)
    crowded = stamps()
    crowded.values[3, 10:14, 10:14] += 8 * STD
    assert any("sources" in text for text in prepare_noise(crowded).warnings)
    fewer = prepare_noise(crowded, drop_suspects=True)
    assert len(fewer.train) + len(fewer.heldout) == len(crowded) - 1
    level = stamps()
    level.values[...] += 0.5 * STD
    assert any("background" in text for text in prepare_noise(level).warnings)


def test_stamps_must_hold_the_receptive_field(tmp_path: Path) -> None:
    small = prepare_noise(stamps(size=24))
    with pytest.raises(ValueError, match="stamps are of 24 pixels, the network sees 27"):
        noise_config(small, tmp_path)
    data = prepare_noise(stamps())
    with pytest.raises(ValueError, match="never see the whole"):
        noise_config(data, tmp_path, {"stages": [{"images": 10, "crop": 16, "batch": 2}]})
    with pytest.raises(ValueError, match="sigma_data follow"):
        noise_config(data, tmp_path, {"sigma_data": 2.0})


@pytest.mark.parametrize(
    "config",
    [
        {"patch": 2, "widths": [4], "blocks": [1]},
        {"patch": 1, "widths": [4, 4], "blocks": [1, 1]},
        {"patch": 2, "widths": [4, 4], "blocks": [2, 1]},
    ],
)
def test_the_receptive_field_is_what_the_network_sees(config: dict[str, Any]) -> None:
    net = build_network({"kind": "unet", "channels": 1, "embedding": 4, **config}).double()
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    n, far = 160, 0
    for row in range(n // 2, n // 2 + net.stride):
        x = torch.randn(1, 1, n, n, dtype=torch.float64, generator=generator).requires_grad_()
        net(x, torch.zeros(1, dtype=torch.float64))[0, 0, row, n // 2].backward()
        seen = x.grad[0, 0].abs().sum(1).nonzero()[:, 0]
        far = max(far, row - int(seen.min()), int(seen.max()) - row)
    assert net.receptive_field == 2 * far + 1


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    found = stamps()
    whole = train_noise(found, tmp_path / "whole", settings=TINY, progress=False)
    from diffpost.training import train

    data = prepare_noise(found)
    folder = tmp_path / "cut" / "stamps"
    folder.mkdir(parents=True)
    np.save(folder / "train.npy", data.train)
    np.save(folder / "heldout.npy", data.heldout)
    train(noise_config(data, folder, TINY), tmp_path / "cut", progress=False, max_steps=3)
    cut = train_noise(found, tmp_path / "cut", settings=TINY, progress=False)
    for a, b in zip(whole.net.state_dict().values(), cut.net.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert cut.card["noise"]["generated"] == whole.card["noise"]["generated"]

    loaded = dp.load_prior(tmp_path / "cut" / "prior")
    assert loaded.scale == pytest.approx(data.std)
    assert loaded.card["noise_std"] == 1.0
    assert loaded.card["noise"]["unit"] == "MJy/sr"
    assert set(loaded.card["training"]["heldout_loss"]) > {"0.1", "1", "5"}
    learned = dp.LearnedNoise(loaded)
    assert float(learned.variance) ** 0.5 == pytest.approx(data.std)
    assert learned.blur == pytest.approx(0.1 * data.std)
    path = tmp_path / "cut" / "prior"
    assert float(dp.load_noise(path, unit="MJy sr-1").variance) == pytest.approx(data.std**2)
    assert float(dp.load_noise(path, std=3.0, steps=8).variance) == pytest.approx(9.0)
    for match, options in (("data are in 'Jy'", {"unit": "Jy"}), ("positive", {"std": -1.0})):
        with pytest.raises(ValueError, match=match):
            dp.load_noise(path, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a model of noise"):
        dp.load_noise("galaxies-32")
    with pytest.raises(ValueError, match="other stamps"):
        train_noise(stamps(each=13), tmp_path / "cut", settings=TINY, progress=False)


@pytest.mark.slow
def test_the_spectrum_of_known_noise_is_learned(tmp_path: Path) -> None:
    """The score against the exact one of the same Gaussian noise, over the levels that SLIC uses.

    An untrained network has the score of white noise, whose error is the control.
    """
    found = stamps(fields=8, each=60)
    settings = {
        "network": {"kind": "unet", "patch": 2, "widths": [24], "blocks": [1], "embedding": 16},
        "stages": [{"images": 8_000, "crop": 32, "batch": 32}],
        "validate_every": 8_000,
        "validate_images": 32,
    }
    model = train_noise(found, tmp_path, settings=settings, progress=False)
    power = torch.from_numpy(spectrum(32))
    exact = dp.GaussianScore(torch.zeros(1, 32, 32).double(), power=power[None], sde=model.sde)
    white = dp.GaussianScore(torch.zeros(1, 32, 32).double(), var=1.0, sde=model.sde)
    clean = torch.from_numpy(noise(64, 32, 99))[:, None]
    unit = model.with_affine(1.0)
    for level in (0.3, 1.0):
        t = model.sde.t_of_nsr(torch.tensor(level, dtype=torch.float64))
        generator = torch.Generator().manual_seed(1)
        x = clean + level * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        inside = (slice(None), slice(None), slice(8, 24), slice(8, 24))  # crops are not periodic
        right = exact.score(x, t)[inside]
        off = (unit.score(x.float(), t)[inside].double() - right).square().mean()
        control = (white.score(x, t)[inside] - right).square().mean()
        assert off < 0.1 * control, level


def test_the_command_trains_and_info_tells(tmp_path: Path) -> None:
    import yaml
    from typer.testing import CliRunner

    from diffpost.cli import app

    write_stamps(tmp_path / "stamps", stamps(unit=None))
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump(TINY | {"stages": [{"images": 32, "crop": 28, "batch": 32}]})
    )
    run = CliRunner().invoke
    asked = ["train-noise", str(tmp_path / "stamps"), "--out", str(tmp_path / "run")]
    done = run(app, [*asked, "--config", str(tmp_path / "tiny.yaml"), "--unit", "Jy"])
    assert done.exit_code == 0, done.output
    assert "isotropy" in done.output and "held out" in done.output
    told = run(app, ["info", str(tmp_path / "run" / "prior")])
    assert "noise_std" in told.output and "Jy" in told.output
    (tmp_path / "bad.yaml").write_text("netwrok: {}")
    bad = run(app, [*asked, "--config", str(tmp_path / "bad.yaml")])
    assert bad.exit_code == 2 and "netwrok" in bad.stderr
    absent = run(app, ["train-noise", str(tmp_path / "none"), "--out", str(tmp_path / "run")])
    assert absent.exit_code == 2 and "harvest" in absent.stderr
