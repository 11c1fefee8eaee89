"""Training: what it minimises, that it resumes exactly, and that processes share a batch."""

import csv
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
import yaml

from diffpost.diagnostics.misspecification import reference_from_card
from diffpost.jobs.train import train_config
from diffpost.networks.precondition import edm_coefficients
from diffpost.training import TrainConfig, Trainer, train
from diffpost.training_config import NoiseLevels
from diffpost.training_data import CropStream, DataConfig
from diffpost.training_loss import denoising_loss, noise_levels


def settings(folder, **changes):
    """A run of a few seconds: 8-pixel crops of blobs."""
    path = folder / "blobs.npy"
    if not path.exists():
        rng = np.random.default_rng(0)
        grid = np.arange(12) - 5.5
        width = rng.uniform(1, 2.5, (64, 1, 1))
        blobs = np.exp(-(grid[:, None] ** 2 + grid**2) / (2 * width**2))
        np.save(path, blobs.astype(np.float16))
    source = {"path": str(path), "zoom": [0.7, 1.0], "jitter": 1.0, "gain": [0.8, 1.2]}
    return {
        "data": [source],
        "heldout": [source],
        "network": {
            "kind": "unet",
            "patch": 1,
            "widths": [8, 16],
            "blocks": [1, 1],
            "embedding": 16,
        },
        "stages": [{"images": 640, "crop": 8, "batch": 16}],
        "sigma_data": 0.3,
        "learning_rate": 2e-3,
        "warmup": 5,
        "validate_every": 320,
        "validate_images": 16,
        "sample_images": 0,
        "error_images": 8,
        "reference_images": 0,
        "checkpoint_seconds": 0.0,
        "card": {"data": "blobs"},
        **changes,
    }


def losses(out):
    with (out / "loss.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def one_thread():
    """Float sums depend on the number of threads: the traces are compared bit by bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_and_writes_what_it_promises(tmp_path):
    out = tmp_path / "run"
    stages = [{"images": 1920, "crop": 8, "batch": 16}]
    config = TrainConfig.from_dict(
        settings(tmp_path, stages=stages, learning_rate=5e-3, reference_images=24)
    )
    prior = train(config, out, progress=False)
    trace = [loss for _, loss in losses(out)]
    assert len(trace) == 120
    assert np.mean(trace[-20:]) < 0.6 * np.mean(trace[:5])
    assert prior.card["data"] == "blobs"
    assert prior.card["training"]["images_seen"] == 1920
    assert prior.card["training"]["heldout_loss"]["0.1"] < 1
    assert prior.card["denoising_error"]["measured_on"] == "8 held-out crops"
    assert prior.card["misspecification"]["measured_on"] == "24 held-out crops"
    assert len(reference_from_card(prior.card)) == 24
    from diffpost.io.checkpoints import load_prior

    x = torch.randn(2, 1, 8, 8)
    t = prior.sde.t_of_nsr(torch.tensor(0.3, dtype=torch.float64))
    assert torch.allclose(load_prior(out / "prior").denoise(x, t), prior.denoise(x, t), atol=1e-5)


def test_a_resumed_run_is_the_same_run(tmp_path):
    config = TrainConfig.from_dict(settings(tmp_path))
    whole = train(config, tmp_path / "whole", progress=False)
    for _ in range(3):
        parts = train(config, tmp_path / "parts", progress=False, max_steps=15)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    for a, b in zip(whole.net.parameters(), parts.net.parameters(), strict=True):
        assert torch.equal(a, b)
    # Control: another seed is another run.
    other = TrainConfig.from_dict(settings(tmp_path, seed=1))
    train(other, tmp_path / "other", progress=False, max_steps=3)
    assert losses(tmp_path / "other") != losses(tmp_path / "whole")[:3]


def test_a_run_killed_at_any_moment_continues_exactly(tmp_path):
    config = settings(tmp_path, checkpoint_seconds=0.05)
    train(TrainConfig.from_dict(config), tmp_path / "whole", progress=False)
    script = textwrap.dedent(f"""
        import torch
        torch.set_num_threads(1)
        from diffpost.training import TrainConfig, train
        train(TrainConfig.from_dict({config!r}), {str(tmp_path / "killed")!r}, progress=False)
    """)
    kills = 0
    for delay in (0.15, 0.3, 0.5, 0.1):
        process = subprocess.Popen([sys.executable, "-c", script])
        start = time.time()
        while not (tmp_path / "killed" / "loss.csv").exists() and time.time() - start < 60:
            time.sleep(0.01)
        time.sleep(delay)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills, "every run ended before it was killed: make it longer"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_leaves_no_rows(tmp_path):
    config = TrainConfig.from_dict(settings(tmp_path))
    train(config, tmp_path / "whole", progress=False, max_steps=4)
    (tmp_path / "killed").mkdir()
    left = (tmp_path / "whole" / "loss.csv").read_text().splitlines(keepends=True)
    for rows in (left[:3], left[:0]):  # two steps, or not even a whole header
        (tmp_path / "killed" / "loss.csv").write_text("".join(rows))
        (tmp_path / "killed" / "checkpoint.pt").unlink(missing_ok=True)
        train(config, tmp_path / "killed", progress=False, max_steps=4)
        assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_two_processes_have_the_loss_of_one(tmp_path):
    config = settings(tmp_path)
    train(TrainConfig.from_dict(config), tmp_path / "one", progress=False, max_steps=6)
    script = tmp_path / "two.py"
    script.write_text(
        "import torch\ntorch.set_num_threads(1)\n"
        "from diffpost.training import TrainConfig, train\n"
        f"config = TrainConfig.from_dict({config!r})\n"
        f"train(config, {str(tmp_path / 'two')!r}, progress=False, max_steps=6)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        + ["--master_addr=127.0.0.1", f"--master_port={port}", str(script)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [step for step, _ in one] == [step for step, _ in two]
    np.testing.assert_allclose([x for _, x in one], [x for _, x in two], rtol=2e-5)


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    train(TrainConfig.from_dict(settings(tmp_path)), tmp_path / "run", progress=False, max_steps=2)
    with pytest.raises(ValueError, match="another learning_rate"):
        Trainer(TrainConfig.from_dict(settings(tmp_path, learning_rate=1.0)), tmp_path / "run")
    # The data may have moved.
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    Trainer(TrainConfig.from_dict(settings(moved)), tmp_path / "run")
    # More images are welcome.
    longer = [{"images": 1280, "crop": 8, "batch": 16}]
    Trainer(TrainConfig.from_dict(settings(tmp_path, stages=longer)), tmp_path / "run")


def test_a_corrupt_checkpoint_says_so(tmp_path):
    config = TrainConfig.from_dict(settings(tmp_path))
    train(config, tmp_path / "run", progress=False, max_steps=2)
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="move it away"):
        Trainer(config, tmp_path / "run")


def test_init_starts_from_another_prior(tmp_path):
    config = TrainConfig.from_dict(settings(tmp_path))
    first = train(config, tmp_path / "first", progress=False, max_steps=5)
    second = TrainConfig.from_dict(settings(tmp_path, init=str(tmp_path / "first" / "prior")))
    trainer = Trainer(second, tmp_path / "second")
    for a, b in zip(first.net.parameters(), trainer.net.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    # The count of training images goes on, also over an interruption.
    trainer.run(progress=False, max_steps=2)
    again = Trainer(second, tmp_path / "second")
    training = again.run(progress=False, max_steps=1).card["training"]
    assert training["images_seen_by_init"] == 5 * 16
    assert training["images_seen"] == 8 * 16


def test_steps_of_several_sizes_take_turns(tmp_path):
    """Each turn has its own crops, batch, data and noise levels, and a killed run keeps the order."""
    rng = np.random.default_rng(1)
    np.save(tmp_path / "large.npy", rng.uniform(0, 1, (8, 24, 24)).astype(np.float16))
    config = settings(tmp_path)
    config["data"].append({"path": str(tmp_path / "large.npy")})
    quiet = {"log_mean": -4.0, "log_std": 0.1, "flat": 0.0}
    turns = [
        {"crop": 16, "batch": 4, "only": ["large.npy"]},
        {"crop": 8, "batch": 8, "noise": quiet},
    ]
    stages = [
        {"images": 40, "crop": 8, "batch": 16, "turns": turns},
        {"images": 32, "crop": 8, "batch": 16},
    ]
    config |= {"stages": stages, "heldout": []}
    parsed = TrainConfig.from_dict(config)
    assert TrainConfig.from_dict(parsed.to_dict()) == parsed
    train(parsed, tmp_path / "whole", progress=False)
    with (tmp_path / "whole" / "loss.csv").open() as file:
        rows = [(int(r["images"]), int(r["crop"])) for r in csv.DictReader(file)]
    assert rows == [(16, 8), (20, 16), (28, 8), (44, 8), (60, 8), (76, 8)]
    for _ in range(6):
        train(parsed, tmp_path / "parts", progress=False, max_steps=1)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    trainer = Trainer(parsed, tmp_path / "whole")
    batch = trainer._load(16)
    large = CropStream(parsed.data[1:], seed=parsed.seed).images[0]
    assert batch.images.shape == (4, 1, 16, 16) and batch.images.std() > 0.2  # noise, not blobs
    assert len(large) == 8 and trainer._load(20).turn.noise == NoiseLevels(**quiet)
    # Control: with all data, 16-pixel crops do not fit the 12-pixel blobs.
    with pytest.raises(ValueError, match="crops of 16 pixels"):
        trainer.crops.batch(0, 16, 16)
    with pytest.raises(ValueError, match="only other"):
        trainer.crops.batch(0, 4, 8, ["other.npy"])


class _ExactDenoiser(torch.nn.Module):
    """The optimal F for pixels that are N(0, d^2) in truth and trained with sigma_data."""

    def __init__(self, d, sigma_data, wrong=1.0):
        super().__init__()
        self.d, self.sigma_data, self.wrong = d, sigma_data, wrong

    def forward(self, x, c_noise):
        nsr = torch.exp(4 * c_noise.double())
        skip, out, inner, _ = edm_coefficients(nsr, self.sigma_data)
        gain = self.wrong * self.d**2 / (self.d**2 + nsr**2)
        return ((gain - skip) / (inner * out))[:, None, None, None].float() * x


def test_the_loss_of_the_exact_denoiser_is_the_posterior_variance():
    """E|D - x0|^2 = d^2 nu^2 / (d^2 + nu^2), in units of c_out^2, within 4 sigma of Monte Carlo."""
    d, sigma_data, n = 0.5, 0.3, 400
    generator = torch.Generator().manual_seed(0)
    clean = d * torch.randn(n, 1, 8, 8, generator=generator)
    noise = torch.randn(n, 1, 8, 8, generator=generator)
    for level in (0.05, 0.5, 5.0):
        nsr = torch.full((n,), level, dtype=torch.float64)
        expected = d**2 * level**2 / (d**2 + level**2)
        expected *= float(edm_coefficients(nsr[:1], sigma_data)[1]) ** -2
        error = expected * np.sqrt(2 / (n * 64))
        loss = denoising_loss(_ExactDenoiser(d, sigma_data), clean, nsr, noise, sigma_data)
        assert abs(float(loss.mean()) - expected) < 4 * error
        if level < 1:  # Control; at high noise a smaller gain hardly matters.
            wrong = _ExactDenoiser(d, sigma_data, 0.5)
            worse = denoising_loss(wrong, clean, nsr, noise, sigma_data)
            assert float(worse.mean()) > expected + 4 * error


def test_noise_levels_follow_their_law():
    law = NoiseLevels(log_mean=-1.0, log_std=0.5, flat=0.0, low=1e-4, high=1e2)
    draws = noise_levels(law, 0, torch.arange(20000)).log()
    assert abs(float(draws.mean()) + 1.0) < 4 * 0.5 / np.sqrt(20000)
    assert abs(float(draws.std()) - 0.5) < 4 * 0.5 / np.sqrt(2 * 20000)


def test_crops_are_a_function_of_their_number(tmp_path):
    data = TrainConfig.from_dict(settings(tmp_path)).data
    stream = CropStream(data, seed=3)
    whole = stream.batch(0, 10, 8)
    assert torch.equal(whole[4:7], stream.batch(4, 3, 8))
    assert not torch.equal(whole, CropStream(data, seed=4).batch(0, 10, 8))


def test_crops_use_every_symmetry_and_stay_in_their_ranges(tmp_path):
    frame = np.zeros((1, 9, 9), np.float32)
    frame[0, 0, 1] = 1.0  # its eight images are distinct
    np.save(tmp_path / "corner.npy", frame)
    stream = CropStream((DataConfig(str(tmp_path / "corner.npy"), gain=(0.5, 2.0)),), seed=0)
    crops = stream.batch(0, 200, 9)[:, 0]
    assert len({int(crop.argmax()) for crop in crops}) == 8
    gains = crops.amax((1, 2))
    assert 0.5 <= gains.min() < 0.6 and 1.8 < gains.max() <= 2.0


def test_mixed_precision_where_it_is_native(tmp_path, monkeypatch):
    config = TrainConfig.from_dict(settings(tmp_path, precision="bfloat16"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    train(config, tmp_path / "mixed", progress=False, max_steps=3)
    whole = TrainConfig.from_dict(settings(tmp_path))
    train(whole, tmp_path / "whole", progress=False, max_steps=3)
    mixed, full = losses(tmp_path / "mixed"), losses(tmp_path / "whole")
    assert mixed != full
    np.testing.assert_allclose([x for _, x in mixed], [x for _, x in full], rtol=0.02)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="without AVX-512 BF16"):
        train(config, tmp_path / "emulated", progress=False)
    with pytest.raises(ValueError, match="expected float32, bfloat16"):
        TrainConfig.from_dict(settings(tmp_path, precision="half"))


def test_bad_settings_say_what_is_wrong(tmp_path):
    good = settings(tmp_path)
    with pytest.raises(ValueError, match="unknown setting lerning_rate"):
        TrainConfig.from_dict({**good, "lerning_rate": 1})
    with pytest.raises(ValueError, match="network is missing"):
        TrainConfig.from_dict({k: v for k, v in good.items() if k != "network"})
    with pytest.raises(ValueError, match="at or below 1"):
        DataConfig("x.npy", zoom=(1.0, 2.0))
    (tmp_path / "bad.yaml").write_text("data: [1, 2")
    with pytest.raises(ValueError, match="is not YAML"):
        TrainConfig.from_yaml(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="got no data"):
        TrainConfig.from_dict({**good, "data": []})
    turn = {"crop": 8, "batch": 4, "only": "blobs.npy"}
    with pytest.raises(ValueError, match="expected a list of names"):
        TrainConfig.from_dict(
            {**good, "stages": [{"images": 16, "crop": 8, "batch": 4, "turns": [turn]}]}
        )
    other = {**turn, "only": ["others.npy"]}
    late = {**good, "stages": [{"images": 16, "crop": 8, "batch": 4, "turns": [other]}]}
    with pytest.raises(ValueError, match="only others"):
        Trainer(TrainConfig.from_dict(late), tmp_path / "late")
    with pytest.raises(ValueError, match="error_images = 1"):
        TrainConfig.from_dict({**good, "error_images": 1})
    with pytest.raises(ValueError, match="reference_images = 3; expected 0, or 20 and more"):
        TrainConfig.from_dict({**good, "reference_images": 3})
    small = TrainConfig.from_dict({**good, "stages": [{"images": 16, "crop": 16, "batch": 16}]})
    with pytest.raises(ValueError, match="crops of 16 pixels"):
        train(small, tmp_path / "small", progress=False)


def test_yaml_round_trip_and_relative_paths(tmp_path):
    values = settings(tmp_path)
    values["data"][0]["path"] = "blobs.npy"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    config = TrainConfig.from_yaml(tmp_path / "config.yaml")
    assert config.data[0].path == str(tmp_path / "blobs.npy")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_the_seed_of_the_command_goes_before_the_files(tmp_path):
    values = settings(tmp_path, seed=7)
    values["data"][0]["path"] = "blobs.npy"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    for given, used in ((None, 7), (3, 3), (0, 0)):
        assert train_config(tmp_path, tmp_path / "config.yaml", given).seed == used
    assert train_config(tmp_path, None, None).seed == 0
