r"""Checkpoint folders that score_models wrote.

Two layouts are read.  That of the releases up to 0.5.11:

    model_hparams.json                      options of the network and of the process, mixed
    checkpoint_{cost:.4e}_{nnn}.pt          weights, averaged over the training steps
    script_params.json                      how it was trained (may hold a bare Infinity)

and that of the development branch after it:

    hyperparameters.json                    (else model_hparams.json)
    checkpoint_step{7 digits}_emalength{x.xx}_{nnn}.pt

As score_models does: the checkpoint of the highest number nnn is taken; a key that is missing means the
default of the version that wrote the folder; up to 0.5.11 the process is told by the keys that are there
(t_star, then sigma_min, then beta_min) whatever "sde" says; weights may carry the prefix of the wrapper
that they were saved from.  Unlike it, nothing is unpickled but tensors.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpost.networks.score_models import ScoreModelsNet, SigmaHeadScore, network_options
from diffpost.sde import SDE, TSVE, VE, VP

__all__ = ["is_score_models_folder", "read_score_models_folder"]

_HYPERPARAMETERS = ("hyperparameters.json", "model_hparams.json")
_SIDE = 64  # of an image where nothing tells

# Options that are structure, not initialisation, and changed their default after 0.5.11.
_NEW_DEFAULTS: dict[str, dict[str, Any]] = {
    "ncsnpp": {"combine_method": "cat"},
    "ddpm": {"ch_mult": [2, 2], "activate_embedding": True},
    "mlp": {},
}


def is_score_models_folder(folder: Path) -> bool:
    """Whether a folder has score_models' file of hyperparameters."""
    return any((folder / name).is_file() for name in _HYPERPARAMETERS)


def read_score_models_folder(
    folder: Path,
    *,
    shape: tuple[int, ...] | None = None,
    checkpoint: int | None = None,
    ema_length: float | None = None,
) -> SigmaHeadScore:
    """The score model in a checkpoint folder of score_models.

    Args:
        folder: where `model_hparams.json` or `hyperparameters.json` is.
        shape: of one image. score_models does not write it; None is (channels, 64, 64), or the next larger
            sides that the network takes.
        checkpoint: number of the checkpoint; None is the highest.
        ema_length: which average, where checkpoints of several lengths have that number.

    Raises:
        ValueError: what is missing, unreadable, of another network or not supported, naming the file.
        ImportError: score_models is not installed.
    """
    described, hyperparameters = _read_hyperparameters(folder)
    path, number = _pick(folder, checkpoint, ema_length)
    newer = described.name == _HYPERPARAMETERS[0] or "_step" in path.name
    sde = _process(hyperparameters, described, newer)
    state = _read_state(path)
    config = _network(hyperparameters, described, newer, state)
    net = ScoreModelsNet.build(config)
    load_state(net.net, _without_prefix(state, set(net.net.state_dict())), path)
    if shape is None:
        shape = _default_shape(config, net.stride)
    training = _read_json(folder / "script_params.json")
    card = {
        "source": f"score_models ({'development layout' if newer else '0.5 layout'})",
        "architecture": config["kind"],
        "checkpoint": number,
        **({"training": _finite(training)} if training else {}),
    }
    return SigmaHeadScore(net, sde, shape, card=card)


def load_state(net: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """`net.load_state_dict`, where a mismatch is a ValueError that names the file and the keys."""
    expected = net.state_dict()
    problems = [
        _listed("is missing", sorted(set(expected) - set(state))),
        _listed("has the unexpected", sorted(set(state) - set(expected))),
        _listed(
            "has another shape for",
            [
                f"{key} {tuple(state[key].shape)}, not {tuple(value.shape)}"
                for key, value in expected.items()
                if key in state and state[key].shape != value.shape
            ],
        ),
        _listed("is not finite in", [k for k, v in state.items() if not bool(v.isfinite().all())]),
    ]
    told = "; it ".join(problem for problem in problems if problem)
    if told:
        raise ValueError(
            f"{path}: the weights do not fit the network described beside them: the file {told}"
        )
    net.load_state_dict(state)


def _listed(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return f"{what} {', '.join(keys[:4])}{more}"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text())  # Python reads a bare Infinity
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); is it truncated?") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}; expected a JSON object")
    return values


def _read_hyperparameters(folder: Path) -> tuple[Path, dict[str, Any]]:
    for name in _HYPERPARAMETERS:
        values = _read_json(folder / name)
        if values is not None:
            return folder / name, values
    raise ValueError(f"{folder}: neither {' nor '.join(_HYPERPARAMETERS)} is there")


def _pick(folder: Path, checkpoint: int | None, ema_length: float | None) -> tuple[Path, int]:
    """The checkpoint file and its number."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("checkpoint*.pt")):
        digits = re.findall("[0-9]+", path.stem)
        found.setdefault(int(digits[-1]) if digits else 0, []).append(path)
    if not found:
        raise ValueError(
            f"{folder}: no file checkpoint*.pt is there, so there are no weights to load"
        )
    number = max(found) if checkpoint is None else checkpoint
    if number not in found:
        raise ValueError(
            f"{folder}: got checkpoint={checkpoint}; there are {', '.join(map(str, sorted(found)))}"
        )
    paths = found[number]
    if ema_length is not None:
        paths = [path for path in paths if f"_emalength{ema_length:.2f}_" in path.name]
    if len(paths) != 1:
        names = ", ".join(path.name for path in found[number])
        raise ValueError(
            f"{folder}: checkpoint {number} is in {names}; "
            + ("none has" if not paths else "say which with")
            + f" ema_length{'=' + str(ema_length) if ema_length is not None else ''}"
        )
    return paths[0], number


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError and pickle's own
        raise ValueError(
            f"{path}: cannot be read as a file of tensors ({_first_line(error)}); it is truncated, corrupt, or "
            "holds pickled objects, which are not loaded"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors by name, as state_dict() gives")
    return dict(state)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


def _without_prefix(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    """Weights saved from a wrapper carry its attribute's name: `model.`, later `net.` (or both)."""
    if expected & set(state):
        return state
    for prefix in ("net.", "model."):
        stripped = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if stripped:
            return stripped
    return state


def _process(values: dict[str, Any], path: Path, newer: bool) -> SDE:
    """The forward process that the hyperparameters tell."""
    name = (
        _new_process_name(values, path) if newer and "sde" in values else _old_process_name(values)
    )

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: got {key} = {value!r}; a {name} process needs a number")
        return float(value)

    t_max = number("T", 1.0)
    if name == "TSVE":
        return TSVE(
            sigma_min=number("sigma_min"),
            sigma_max=number("sigma_max"),
            t_star=number("t_star"),
            beta=number("beta"),
            T=t_max,
            t_min=number("epsilon", 0.0),
        )
    if name == "VE":
        return VE(sigma_min=number("sigma_min"), sigma_max=number("sigma_max"), T=t_max)
    if name == "VP" and newer:
        # There beta is linear in t/T: the same process with the slope and the end rescaled.
        low, high = number("beta_min", 0.01), number("beta_max", 20.0)
        slope = (high - low) / t_max**2
        low /= t_max
        return VP(low, low + slope, t_min=number("epsilon", 1e-3), t_max=t_max)
    if name == "VP":
        return VP(
            number("beta_min"), number("beta_max"), t_min=number("epsilon", 1e-5), t_max=t_max
        )
    raise ValueError(
        f"{path}: nothing tells the process; expected t_star (TSVE), sigma_min (VE) or beta_min (VP)"
    )


def _old_process_name(values: dict[str, Any]) -> str | None:
    for key, name in (("t_star", "TSVE"), ("sigma_min", "VE"), ("beta_min", "VP")):
        if key in values:
            return name
    return None


def _new_process_name(values: dict[str, Any], path: Path) -> str:
    known = {"ve": "VE", "vp": "VP", "tsve": "TSVE"}
    name = str(values["sde"]).lower().removesuffix("sde")
    formulation = str(values.get("formulation", "original")).lower()
    if name not in known or formulation != "original":
        raise ValueError(
            f"{path}: got sde = {values['sde']!r}, formulation = {formulation!r}; supported are the "
            f"processes {', '.join(known)} in the original formulation"
        )
    return known[name]


def _network(
    values: dict[str, Any], path: Path, newer: bool, state: dict[str, Tensor]
) -> dict[str, Any]:
    """The configuration of the network, with the defaults of the version that wrote the folder."""
    kind = str(values.get("model_architecture", "ncsnpp")).lower()
    if kind not in _NEW_DEFAULTS:
        raise ValueError(
            f"{path}: got model_architecture = {values['model_architecture']!r}; supported are "
            f"{', '.join(_NEW_DEFAULTS)}"
        )
    given = {**values}
    if newer:
        given = {**_NEW_DEFAULTS[kind], **given}
        if "num_blocks" in given:
            given.setdefault("num_res_blocks", given["num_blocks"])
        if given.get("conditions"):
            raise ValueError(f"{path}: got conditions = {given['conditions']}; not supported")
    # None is an option's default throughout.
    options = [key for key in network_options(kind) if given.get(key) is not None]
    config = {"kind": kind, **{key: given[key] for key in options}}
    if kind == "mlp":
        if not any("all_modules." in key for key in state):
            raise ValueError(
                f"{path}: this is the MLP of score_models' development branch, which 0.5.11 cannot build"
            )
        config.setdefault("dimensions", 2)
        config.update(_bottleneck(state))
    return config


def _bottleneck(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the hyperparameters of an MLP leave out, from its weights."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if key.endswith("bottleneck_in.weight"):
            found["bottleneck"] = int(value.shape[0])
        if key.endswith("temb_to_bottleneck.weight"):
            found["attention"] = True
    return found


def _default_shape(config: dict[str, Any], stride: int) -> tuple[int, ...]:
    if config["kind"] == "mlp":
        return (int(config["dimensions"]),)
    side = stride * math.ceil(_SIDE / stride)
    return (int(config.get("channels", 1)), *[side] * int(config.get("dimensions", 2)))


def _finite(value: Any) -> Any:
    """Infinity and NaN as text: the card is JSON that others read too."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
