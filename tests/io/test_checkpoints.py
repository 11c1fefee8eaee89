"""Priors on disk: our own format, and folders that score_models itself writes here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffpost as dp
from diffpost.io.checkpoints import load_prior, save_prior, shipped_priors
from diffpost.networks import ScoreModelsNet, build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.networks.score_models import SigmaHeadScore

score_models = pytest.importorskip("score_models", reason="pip install score-models")

NCSNPP = {"channels": 2, "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1}
DDPM = {"channels": 1, "nf": 8, "ch_mult": [1, 2], "num_res_blocks": 1}
MLP = {"dimensions": 6, "units": 12, "layers": 2, "time_embedding_dimensions": 8}
PROCESSES: dict[str, dict[str, Any]] = {
    "VE": {"sigma_min": 1e-2, "sigma_max": 50.0},
    "VP": {"beta_min": 0.1, "beta_max": 20.0},
    "TSVE": {"sigma_min": 1e-2, "sigma_max": 50.0, "t_star": 0.4, "beta": 3.0},
}
NETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ncsnpp": (NCSNPP, (2, 8, 8)),
    "ddpm": (DDPM, (1, 8, 8)),
    "mlp": (MLP, (6,)),
}


def quiet(call: Any, *args: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return call(*args, **options)


def theirs(folder: Path) -> Any:
    return quiet(score_models.ScoreModel, checkpoints_directory=str(folder), device="cpu")


def trained(folder: Path, kind: str, process: str, epochs: int = 2) -> Path:
    """A folder that score_models' own `fit` writes; the learning rate moves every weight."""
    options, shape = NETS[kind]
    torch.manual_seed(1)
    model = quiet(score_models.ScoreModel, kind, **options, **PROCESSES[process], device="cpu")
    data = torch.utils.data.TensorDataset(torch.randn(4, *shape))
    fit = {"epochs": epochs, "batch_size": 2, "learning_rate": 3e-2, "ema_decay": 0.5}
    folder.mkdir(parents=True)
    quiet(model.fit, data, **fit, checkpoints=1, checkpoints_directory=str(folder))
    return folder


def states(shape: tuple[int, ...], t_min: float = 1e-3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    t = torch.tensor([t_min, 0.01, 0.1, 0.4, 0.7, 1.0])
    return torch.randn(len(t), *shape, generator=generator), t


def assert_same(score: Tensor, reference: Tensor) -> None:
    """To 1e-6 of each entry's largest value."""
    assert score.dtype == reference.dtype
    peak = reference.flatten(1).abs().amax(1)
    assert bool((peak > 0).all())
    error = (score - reference).flatten(1).abs().amax(1) / peak
    assert float(error.max()) < 1e-6


# Folders of score_models 0.5.11 --------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("kind", NETS)
def test_same_score_as_score_models(kind: str, process: str, tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", kind, process)
    prior = dp.load_prior(folder)
    assert isinstance(prior, SigmaHeadScore)
    assert type(prior.sde).__name__ == process
    x, t = states(NETS[kind][1])
    with torch.no_grad():
        reference = theirs(folder).score(t, x)
        assert_same(prior.score(x, t), reference)
        # A negative control: the weights of the checkpoint before are another network.
        before = load_prior(folder, checkpoint=1)
        assert float((before.score(x, t) - reference).abs().max()) > 1e-3
    # The denoiser agrees by Tweedie where float32 resolves it.
    x, t = x[2:], t[2:]
    sigma, alpha = (v.float().reshape(-1, *[1] * (x.ndim - 1)) for v in scalars(prior.sde, t))
    tweedie = (x + sigma**2 * prior.score(x, t)) / alpha
    torch.testing.assert_close(prior.denoise(x, t), tweedie, rtol=1e-4, atol=1e-5)


def scalars(sde: dp.SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    return sde.sigma(t.double()), sde.alpha(t.double())


def test_schedules_are_those_of_score_models(tmp_path: Path) -> None:
    t = torch.linspace(0.05, 1, 7)
    for process in PROCESSES:
        folder = trained(tmp_path / process, "mlp", process, epochs=1)
        mean, std = theirs(folder).sde.marginal_prob_scalars(t)
        sigma, alpha = scalars(load_prior(folder).sde, t)
        torch.testing.assert_close(sigma.float(), std, rtol=2e-6, atol=0)
        torch.testing.assert_close(alpha.float(), mean, rtol=2e-6, atol=0)


def test_the_highest_number_is_loaded_not_the_lowest_cost(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "mlp", "VE", epochs=1)
    (first,) = folder.glob("checkpoint*.pt")
    state = {k: v + 0.1 for k, v in torch.load(first, weights_only=True).items()}
    torch.save(state, folder / "checkpoint_9.9999e+01_012.pt")
    prior = load_prior(folder)
    assert prior.card["checkpoint"] == 12
    x, t = states((6,))
    with torch.no_grad():
        assert_same(prior.score(x, t), theirs(folder).score(t, x))
    with pytest.raises(ValueError, match="got checkpoint=3; there are 1, 12"):
        load_prior(folder, checkpoint=3)


def test_legacy_keys_of_the_wrapper(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "ncsnpp", "VP", epochs=1)
    (path,) = folder.glob("checkpoint*.pt")
    state = torch.load(path, weights_only=True)
    torch.save({f"model.{key}": value for key, value in state.items()}, path)
    x, t = states((2, 8, 8))
    with torch.no_grad():
        assert_same(load_prior(folder).score(x, t), theirs(folder).score(t, x))


def test_missing_keys_take_the_defaults_of_the_release(tmp_path: Path) -> None:
    """With the defaults of the release combine_method is "sum", and an MLP is of two dimensions."""
    torch.manual_seed(0)
    net = score_models.NCSNpp(nf=8, ch_mult=[1, 1], num_res_blocks=1)
    given = {"nf": 8, "ch_mult": [1, 1], "num_res_blocks": 1, "sigma_min": 0.01, "sigma_max": 10.0}
    folder = written(
        tmp_path / "a", "model_hparams.json", given, net, "checkpoint_1.0000e+00_001.pt"
    )
    prior = load_prior(folder, shape=(1, 16, 8))
    assert prior.shape == (1, 16, 8)
    x, t = states((1, 16, 8))
    with torch.no_grad():
        assert_same(prior.score(x, t), theirs(folder).score(t, x))

    mlp = score_models.MLP(2)
    given = {"model_architecture": "MLP", "beta_min": 0.1, "beta_max": 20.0}
    folder = written(
        tmp_path / "b", "model_hparams.json", given, mlp, "checkpoint_1.0000e+00_001.pt"
    )
    assert load_prior(folder).shape == (2,)


def test_the_process_is_told_by_the_keys_whatever_sde_says(tmp_path: Path) -> None:
    given = {**MLP, "model_architecture": "MLP", "sde": "vp", **PROCESSES["TSVE"], "beta_min": 0.1}
    name = "checkpoint_1.0000e+00_001.pt"
    for key, kind in (("t_star", dp.TSVE), ("sigma_min", dp.VE), ("beta_min", None)):
        folder = tmp_path / key
        written(folder, "model_hparams.json", given, score_models.MLP(**MLP), name)
        if kind is None:
            with pytest.raises(ValueError, match=r"model_hparams.json: got beta_max = None"):
                load_prior(folder)
        else:
            assert type(load_prior(folder).sde) is kind
        given = {k: v for k, v in given.items() if k != key}
    folder = written(tmp_path / "none", "model_hparams.json", given, score_models.MLP(**MLP), name)
    with pytest.raises(ValueError, match="nothing tells the process"):
        load_prior(folder)


def test_an_mlp_with_a_bottleneck_which_its_hyperparameters_omit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = score_models.MLP(**MLP, bottleneck=4, attention=True)
    given = {**net.hyperparameters, "model_architecture": "MLP", **PROCESSES["VE"]}
    folder = written(
        tmp_path / "a", "model_hparams.json", given, net, "checkpoint_1.0000e+00_001.pt"
    )
    x, t = states((6,))
    prior = load_prior(folder)
    with torch.no_grad():
        sigma = prior.sde.sigma(t.double()).float()[:, None]
        assert_same(prior.score(x, t), net(t, x) / sigma)
        save_prior(tmp_path / "ours", prior)
        assert torch.equal(load_prior(tmp_path / "ours").score(x, t), prior.score(x, t))


def test_a_bare_infinity_in_json_is_read(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "mlp", "VE", epochs=1)
    assert "Infinity" in (folder / "script_params.json").read_text()
    prior = load_prior(folder)
    assert prior.card["training"]["patience"] == "inf"
    save_prior(tmp_path / "ours", prior)
    assert "Infinity" not in (tmp_path / "ours" / "card.json").read_text()


# Folders of its development branch ------------------------------------------------------------------


def written(folder: Path, json_name: str, given: dict[str, Any], net: nn.Module, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / json_name).write_text(json.dumps(given))
    torch.save(net.state_dict(), folder / name)
    return folder


def test_newer_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = score_models.NCSNpp(nf=8, ch_mult=[1, 2], num_res_blocks=1, combine_method="cat")
    given = {"nf": 8, "ch_mult": [1, 2], "num_blocks": 1, "sde": "vpsde"}
    folder = written(
        tmp_path / "a",
        "hyperparameters.json",
        given,
        net,
        "checkpoint_step0000100_emalength0.13_001.pt",
    )
    torch.save({}, folder / "optimizer_007.pt")
    prior = load_prior(folder)
    assert prior.sde == dp.VP(0.01, 20.0, t_min=1e-3)
    x, t = states((1, 8, 8))
    with torch.no_grad():
        reference = score_models.ScoreModel(
            net, sde="vp", beta_min=0.01, beta_max=20.0, device="cpu"
        )
        assert_same(prior.score(x, t), reference.score(t, x))
    (folder / "hyperparameters.json").rename(folder / "model_hparams.json")
    assert load_prior(folder).sde == prior.sde


def test_newer_vp_counts_time_in_units_of_its_end(tmp_path: Path) -> None:
    given = {
        **MLP,
        "model_architecture": "mlp",
        "sde": "vp",
        "beta_min": 0.1,
        "beta_max": 20,
        "T": 2,
    }
    net, name = score_models.MLP(**MLP), "checkpoint_step0000001_emalength0.13_001.pt"
    folder = written(tmp_path / "a", "hyperparameters.json", given, net, name)
    sde = load_prior(folder).sde
    t = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    unit = dp.VP(0.1, 20.0)
    torch.testing.assert_close(sde.alpha(t), unit.alpha(t / 2))
    torch.testing.assert_close(sde.log_alpha_dot(t), unit.log_alpha_dot(t / 2) / 2)
    assert sde.t_max == 2


def test_newer_ddpm_activates_its_embedding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = score_models.DDPM(**DDPM)
    given = {**DDPM, "model_architecture": "ddpm", "sde": "ve", **PROCESSES["VE"]}
    name = "checkpoint_step0000001_emalength0.13_001.pt"
    folder = written(tmp_path / "a", "hyperparameters.json", given, net, name)
    prior = load_prior(folder)
    x, t = states((1, 8, 8))
    sigma = prior.sde.sigma(t.double()).float().reshape(-1, 1, 1, 1)
    with torch.no_grad():
        plain = net(t, x) / sigma
        net.all_modules[1] = nn.Sequential(net.all_modules[1], net.act)
        assert_same(prior.score(x, t), net(t, x) / sigma)
        assert float((plain - prior.score(x, t)).abs().max()) > 1e-3
        save_prior(tmp_path / "ours", prior)
        again = load_prior(tmp_path / "ours")
        assert torch.equal(again.score(x, t), prior.score(x, t))
        assert torch.equal(again.to(dtype=torch.float32).score(x, t), prior.score(x, t))


def test_several_averages_must_be_chosen_from(tmp_path: Path) -> None:
    given = {**MLP, "model_architecture": "mlp", **PROCESSES["VE"]}
    first = "checkpoint_step0000001_emalength0.05_001.pt"
    folder = written(tmp_path / "a", "hyperparameters.json", given, score_models.MLP(**MLP), first)
    second = folder / "checkpoint_step0000001_emalength0.13_001.pt"
    net = score_models.MLP(**MLP)
    torch.save(net.state_dict(), second)
    with pytest.raises(ValueError, match=r"emalength0.13_001.pt; say which with ema_length"):
        load_prior(folder)
    with pytest.raises(ValueError, match=r"none has ema_length=0.2"):
        load_prior(folder, ema_length=0.2)
    prior = load_prior(folder, ema_length=0.13)
    key = "all_modules.1.weight"
    assert torch.equal(prior.net.net.state_dict()[key], net.state_dict()[key])


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"sde": "cosvp"}, "got sde = 'cosvp'"),
        ({"sde": "ve", "formulation": "edm"}, "formulation = 'edm'"),
        ({"model_architecture": "edmv2net"}, "got model_architecture = 'edmv2net'"),
        ({"conditions": ["input_tensor"]}, "not supported"),
        ({"nn_is_energy": True}, "predict an energy"),
        ({"sigma_min": "low"}, "got sigma_min = 'low'"),
    ],
)
def test_what_is_not_supported_is_told(extra: dict[str, Any], match: str, tmp_path: Path) -> None:
    given = {**MLP, "model_architecture": "mlp", **PROCESSES["VE"], **extra}
    net = score_models.MLP(**MLP)
    folder = written(tmp_path / "a", "hyperparameters.json", given, net, "checkpoint_001.pt")
    with pytest.raises(ValueError, match=match):
        load_prior(folder)


def test_the_mlp_of_the_development_branch_is_told(tmp_path: Path) -> None:
    given = {"channels": 3, "width": 8, "model_architecture": "mlp", **PROCESSES["VE"]}
    net = nn.ModuleDict({"input_layer": nn.Linear(3, 8)})
    folder = written(tmp_path / "a", "hyperparameters.json", given, net, "checkpoint_001.pt")
    with pytest.raises(ValueError, match="development branch, which"):
        load_prior(folder)


# Broken folders -------------------------------------------------------------------------------------


def test_truncated_and_foreign_checkpoints(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "mlp", "VE", epochs=1)
    (path,) = folder.glob("checkpoint*.pt")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:10], b"", b"not a checkpoint"):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match=rf"{re.escape(path.name)}: cannot be read .* truncated"
        ):
            load_prior(folder)
    torch.save({"net": Path}, path)  # a class, which only unpickling would bring back
    with pytest.raises(ValueError, match="holds pickled objects, which are not loaded"):
        load_prior(folder)
    torch.save([torch.zeros(3)], path)
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        load_prior(folder)
    torch.save(score_models.MLP(dimensions=6, units=7).state_dict(), path)
    with pytest.raises(
        ValueError, match=rf"{re.escape(path.name)}: the weights do not fit .* another shape"
    ):
        load_prior(folder)
    path.unlink()
    with pytest.raises(ValueError, match="no weights to load"):
        load_prior(folder)
    (folder / "model_hparams.json").write_text('{"sigma_min": 0.1, ')
    with pytest.raises(ValueError, match=r"model_hparams.json: not JSON"):
        load_prior(folder)


def test_a_folder_without_a_prior(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prior"):
        load_prior(tmp_path)
    with pytest.raises(ValueError, match=r"no prior 'nothing-64'.*shipped are: ") as told:
        load_prior("nothing-64")
    for name in shipped_priors():
        assert name in str(told.value)
    save_prior(tmp_path / "prior", small())
    with pytest.raises(ValueError, match="is a training run; its prior is"):
        load_prior(tmp_path)


def test_without_score_models_it_says_what_to_install(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "mlp", "VE", epochs=1)
    code = (
        "import sys; sys.modules['score_models'] = None\n"
        "import diffpost as dp\n"
        "try:\n    dp.load_prior(sys.argv[1])\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert "pip install score-models" in out.stdout


# Our own format -------------------------------------------------------------------------------------


def small(seed: int = 0, **options: Any) -> NetworkScore:
    torch.manual_seed(seed)
    config = {"kind": "unet", "patch": 2, "widths": [8, 8], "blocks": [1, 1], "embedding": 8}
    net = build_network(config)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return NetworkScore(net, dp.EDM(0.01, 80.0), (1, 16, 16), 0.5, **options)


def test_round_trip(tmp_path: Path) -> None:
    offset = torch.rand(1, 16, 16)
    card = {"data": "noise", "training": {"images": 3}}
    prior = small(scale=2.5, offset=offset, card=card)
    save_prior(tmp_path / "new" / "prior", prior)
    again = load_prior(tmp_path / "new" / "prior")
    assert isinstance(again, NetworkScore)
    assert (again.sde, again.shape, again.stride) == (prior.sde, prior.shape, prior.stride)
    assert (again.scale, again.sigma_data, again.card) == (2.5, 0.5, card)
    assert torch.equal(again.offset, offset)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([0.02, 0.5, 20.0])
    with torch.no_grad():
        assert torch.equal(again.denoise(x, t), prior.denoise(x, t))
    assert load_prior(tmp_path / "new" / "prior", shape=(1, 8, 24)).shape == (1, 8, 24)
    assert sorted(os.listdir(tmp_path / "new" / "prior")) == ["card.json", "weights.safetensors"]


def test_half_precision_on_disk_single_in_memory(tmp_path: Path) -> None:
    prior = small()
    save_prior(tmp_path / "full", prior)
    save_prior(tmp_path / "half", prior, dtype=torch.float16)
    sizes = [(tmp_path / name / "weights.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]
    again = load_prior(tmp_path / "half")
    assert again.dtype == torch.float32
    for key, value in prior.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[key], value.half().float())


def test_a_sigma_head_in_our_format(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", "ncsnpp", "TSVE", epochs=1)
    prior = load_prior(folder, shape=(2, 8, 8)).with_affine(3.0, -1.0)
    save_prior(tmp_path / "ours", prior)
    again = load_prior(tmp_path / "ours")
    assert isinstance(again, SigmaHeadScore)
    assert (again.sde, again.shape, again.scale, again.offset) == (prior.sde, (2, 8, 8), 3.0, -1.0)
    x, t = states((2, 8, 8))
    with torch.no_grad():
        assert torch.equal(again.score(x, t), prior.score(x, t))


def test_a_save_that_fails_leaves_the_old_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small(1), small(2)
    save_prior(tmp_path, first)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_prior(tmp_path, second)
    assert sorted(os.listdir(tmp_path)) == ["card.json", "weights.safetensors"]
    key = "head.weight"
    assert torch.equal(load_prior(tmp_path).net.state_dict()[key], first.net.state_dict()[key])


def test_a_full_disk_at_the_card_leaves_the_old_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small(1), small(2, card={"which": "second"})
    save_prior(tmp_path, first)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    fsync, calls = os.fsync, []

    def full_at_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_second)
    with pytest.raises(OSError, match="No space left"):
        save_prior(tmp_path, second)
    assert len(calls) == 2  # the weights had been written
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_weights_and_card_of_different_saves_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "prior"
    save_prior(folder, small(1))
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == "card.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save_prior(folder, small(2))
    with pytest.raises(ValueError, match=r"weights.safetensors: .*without the other.*again"):
        load_prior(folder)
    save_prior(folder, small(2))
    weights, card = folder / "weights.safetensors", folder / "card.json"
    assert load_prior(folder).card == {}
    # One bit of one number: safetensors alone would take it.
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"got a file with SHA-256 .* damaged"):
        load_prior(folder)
    # Cards of older versions have no hash and load as ever.
    values = json.loads(card.read_text())
    assert re.fullmatch("[0-9a-f]{64}", values.pop("weights_sha256"))
    card.write_text(json.dumps(values))
    load_prior(folder)
    with pytest.raises(ValueError, match="may not use the name weights_sha256"):
        save_prior(folder, small(card={"weights_sha256": "0"}))


def test_broken_priors(tmp_path: Path) -> None:
    save_prior(tmp_path, small())
    weights, card = tmp_path / "weights.safetensors", tmp_path / "card.json"
    whole, text = weights.read_bytes(), card.read_text()
    for broken in (whole[:-100], whole[:50], b""):
        weights.write_bytes(broken)
        with pytest.raises(ValueError, match=r"weights.safetensors: truncated or corrupt"):
            load_prior(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights.safetensors: no such file"):
        load_prior(tmp_path)
    weights.write_bytes(whole)

    def with_card(match: str, **changes: Any) -> None:
        values = json.loads(text)
        for key, value in changes.items():
            values.pop(key) if value is None else values.update({key: value})
        card.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"(?s)(card.json|weights.safetensors): .*{match}"):
            load_prior(tmp_path)

    with_card("network, sigma_data missing", network=None, sigma_data=None)
    with_card("got head 'other'", head="other")
    with_card("got format 2", format=2)
    with_card("known kinds are", network={"kind": "transformer"})
    with_card("unexpected keyword argument 'depth'", network={"kind": "unet", "depth": 3})
    with_card("expected 'VE', 'VP', 'TSVE' or 'EDM'", sde={"name": "cosine"})
    with_card("got the shape", shape=[1, 15, 15])
    with_card("got scale = 0", scale=0.0)
    network = json.loads(text)["network"]
    deeper = {**network, "blocks": [2, 1]}
    with_card("is missing down.0.1.conv1.bias.* and", network=deeper)
    shallower = {**network, "blocks": [1], "widths": [8]}
    with_card("has the unexpected down.1", network=shallower)
    with_card("another shape for", network={**network, "widths": [8, 16]})
    card.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"card.json: not JSON"):
        load_prior(tmp_path)
    card.write_text(text)
    load_prior(tmp_path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only networks are saved"):
        save_prior(tmp_path, dp.GaussianScore(torch.zeros(2), var=1.0, sde=dp.VE()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="may not use the name scale"):
        save_prior(tmp_path, small(card={"scale": 3}))
    with pytest.raises(ValueError, match="not plain JSON"):
        save_prior(tmp_path, small(card={"loss": float("nan")}))
    with pytest.raises(ValueError, match="has no `config`"):
        save_prior(tmp_path, NetworkScore(nn.Linear(4, 4), dp.EDM(), (1, 4, 4), 1.0))
    large = small()
    large.net.head.weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"head.weight is not finite in torch.float16"):
        save_prior(tmp_path, large, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected torch"):
        save_prior(tmp_path, small(), dtype=torch.bfloat16)
    assert not any(tmp_path.iterdir())


# score_models' backbones in our own head ------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_a_backbone_of_score_models_in_a_network_score(kind: str, tmp_path: Path) -> None:
    options, shape = NETS[kind]
    shape = shape if len(shape) == 3 else (1, 2, 3)
    torch.manual_seed(0)
    net = build_network({"kind": kind, **options})
    prior = NetworkScore(net, dp.EDM(), shape, 0.5)
    x, label = torch.randn(3, *shape), torch.tensor([-1.0, 0.0, 1.0])
    out = net(x, label)
    assert out.shape == x.shape
    inside = x.flatten(1) if kind == "mlp" else x
    assert torch.equal(out, net.net(label, inside).view_as(x))
    assert prior.stride == (1 if kind == "mlp" else 2)
    save_prior(tmp_path, prior)
    t = torch.tensor([0.1, 1.0, 10.0])
    with torch.no_grad():
        assert torch.equal(load_prior(tmp_path).denoise(x, t), prior.denoise(x, t))


def test_options_of_backbones_are_checked() -> None:
    with pytest.raises(ValueError, match="got the option depth for a network of kind 'ddpm'"):
        build_network({"kind": "ddpm", "depth": 3})
    with pytest.raises(ValueError, match="conditions besides the image"):
        build_network({"kind": "ncsnpp", "condition": ["input"], "condition_input_channels": 1})
    with pytest.raises(ValueError, match="known kinds are 'unet', 'ncsnpp', 'ddpm' and 'mlp'"):
        build_network({"kind": "dit"})


@pytest.mark.parametrize("architecture", ["NCSNpp", "DDPM"])
def test_jacobian_products_of_a_sigma_head(architecture: str) -> None:
    """v . (J u) by forward mode equals (J^T v) . u by reverse mode, and finite differences."""
    torch.manual_seed(0)
    options = {"nf": 8, "ch_mult": [1, 1], "num_res_blocks": 1, "activation_type": "swish"}
    net = getattr(score_models, architecture)(**options)
    prior = SigmaHeadScore(net, dp.VE(0.01, 10.0), (1, 8, 8))
    assert isinstance(prior.net, ScoreModelsNet)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.4, 0.6])
    u, v = torch.randn(2, *x.shape)
    denoised, vjp = prior.denoise_vjp(x, t)
    again, jvp = prior.denoise_jvp(x, t)
    assert torch.equal(denoised, again)
    torch.testing.assert_close((jvp(u) * v).sum(), (vjp(v) * u).sum(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        step = 1e-2
        slope = (prior.denoise(x + step * u, t) - prior.denoise(x - step * u, t)) / (2 * step)
    torch.testing.assert_close(jvp(u), slope, rtol=1e-2, atol=2e-3)


def test_shapes_of_a_sigma_head() -> None:
    net = score_models.NCSNpp(nf=8, ch_mult=[1, 1], num_res_blocks=1)
    prior = SigmaHeadScore(net, dp.VE(), (1, 8, 8))
    assert prior.with_shape((1, 16, 12)).shape == (1, 16, 12)
    for shape, match in (
        ((1, 9, 8), "divisible by 2"),
        ((3, 8, 8), "takes 1 channels"),
        ((8,), "of"),
    ):
        with pytest.raises(ValueError, match=match):
            prior.with_shape(shape)
    with pytest.raises(ValueError, match="the MLP takes 6 numbers"):
        SigmaHeadScore(score_models.MLP(**MLP), dp.VE(), (5,))
