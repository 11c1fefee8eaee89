r"""Priors on disk.

A prior is a folder of two files:

    weights.safetensors     the network's tensors by name; float16 or float32, computed with in float32
    card.json               what they are: the network's configuration, the head, the process, the size of an
                            image, the map to physical units, and whatever else its maker wants to tell

The head says how the network becomes a score: "edm" is `NetworkScore` (Karras et al. 2022,
arXiv:2206.00364), "sigma" is `SigmaHeadScore`, net(t, x)/sigma(t).  Neither file can run code.  Both are
written in full before the first is replaced, and the card holds the SHA-256 of its weights, so that a
pair that a kill tore apart is noticed.  Folders that score_models wrote are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpost.io.atomic import replace_files
from diffpost.io.score_models_folder import (
    is_score_models_folder,
    load_state,
    read_score_models_folder,
)
from diffpost.networks import build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.networks.score_models import SigmaHeadScore
from diffpost.score import ScoreModel
from diffpost.sde import sde_from_dict

__all__ = ["load_prior", "save_prior", "shipped_priors"]

_WEIGHTS, _CARD = "weights.safetensors", "card.json"
_FORMAT = 1
_REQUIRED = ("format", "head", "network", "sde", "shape", "scale", "offset")
_HASH = "weights_sha256"
RESERVED = (*_REQUIRED, "sigma_data", "stride", _HASH)  # names that a card's maker may not use


def shipped_priors() -> list[str]:
    """Names of the priors in the package."""
    folder = _shipped_folder()
    return (
        sorted(p.name for p in folder.iterdir() if (p / _CARD).is_file()) if folder.is_dir() else []
    )


def _shipped_folder() -> Path:
    return Path(str(resources.files("diffpost.priors")))


def save_prior(
    directory: str | os.PathLike[str],
    model: NetworkScore | SigmaHeadScore,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a prior to a folder, made when missing; an old prior there is replaced.

    Args:
        directory: the folder.
        model: its `card` becomes part of card.json.
        dtype: of the stored weights, float32 or float16, which halves the file and costs three digits.

    Raises:
        ValueError: a model of another class or of a network without a configuration, a card that is not plain
            JSON or uses a name of ours, weights that are not finite in `dtype`, another dtype.
        OSError: the folder cannot be written, or the disk is full; a prior that was there stays.
    """
    if dtype not in (torch.float32, torch.float16):
        raise ValueError(f"save_prior(dtype={dtype}): expected torch.float32 or torch.float16")
    if not isinstance(model, NetworkScore | SigmaHeadScore):
        raise ValueError(
            f"save_prior: got a {type(model).__name__}; only networks are saved "
            "(NetworkScore, SigmaHeadScore)"
        )
    network = getattr(model.net, "config", None)
    if network is None:
        raise ValueError(
            f"save_prior: the network {type(model.net).__name__} has no `config` to build it from again; "
            "use one that build_network makes"
        )
    taken = sorted(set(model.card) & set(RESERVED))
    if taken:
        raise ValueError(f"save_prior: the card may not use the name {', '.join(taken)}; rename it")
    card: dict[str, Any] = {
        "format": _FORMAT,
        "head": "edm" if isinstance(model, NetworkScore) else "sigma",
        "network": network,
        "sde": model.sde.to_dict(),
        "shape": list(model.shape),
        "stride": model.stride,
        "scale": _plain(model.scale),
        "offset": _plain(model.offset),
    }
    if isinstance(model, NetworkScore):
        card["sigma_data"] = model.sigma_data
    tensors = {}
    for key, value in model.net.state_dict().items():
        stored = value.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        if not bool(stored.isfinite().all()):
            raise ValueError(f"save_prior: {key} is not finite in {dtype}")
        tensors[key] = stored

    from safetensors.torch import save

    weights = save(tensors)
    card[_HASH] = hashlib.sha256(weights).hexdigest()
    try:
        text = json.dumps({**card, **model.card}, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"save_prior: the card is not plain JSON: {error}") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    replace_files({folder / _WEIGHTS: weights, folder / _CARD: f"{text}\n".encode()})


def load_prior(
    name_or_dir: str | os.PathLike[str],
    *,
    shape: tuple[int, ...] | None = None,
    device: torch.device | str = "cpu",
    checkpoint: int | None = None,
    ema_length: float | None = None,
) -> ScoreModel:
    """A shipped prior by its name, or the prior in a folder.

    Args:
        name_or_dir: a name in `shipped_priors()`, which goes before a folder of that name; a folder that
            `save_prior` or the trainer wrote; or a checkpoint folder of score_models.
        shape: of one image, where another one than the folder's is wanted. score_models does not write the
            shape: without it, it is taken to be (channels, 64, 64).
        device: where the network goes.
        checkpoint, ema_length: which of the checkpoints in a folder of score_models; None is the last.

    Raises:
        ValueError: no such prior, a file that is missing, truncated or of another network, weights that
            are not those of the card (where it holds their hash; older cards do not), a card with missing
            or unknown values; the message names the file.
        ImportError: a network of score_models where that is not installed.
    """
    folder = _find(name_or_dir)
    model: NetworkScore | SigmaHeadScore
    if (folder / _CARD).is_file():
        if checkpoint is not None or ema_length is not None:
            raise ValueError(f"{folder}: checkpoint and ema_length are for folders of score_models")
        model = _load(folder)
        if shape is not None:
            model = model.with_shape(shape)
    else:
        model = read_score_models_folder(
            folder, shape=shape, checkpoint=checkpoint, ema_length=ema_length
        )
    return model if torch.device(device).type == "cpu" else model.to(device=device)


def _find(name_or_dir: str | os.PathLike[str]) -> Path:
    name = os.fspath(name_or_dir)
    shipped = shipped_priors()
    if name in shipped:
        return _shipped_folder() / name
    folder = Path(name).expanduser()
    if (folder / _CARD).is_file() or is_score_models_folder(folder):
        return folder
    known = ", ".join(shipped) or "none"
    if (folder / "prior" / _CARD).is_file():
        raise ValueError(f"{folder} is a training run; its prior is {folder / 'prior'}")
    if folder.is_dir():
        raise ValueError(
            f"{folder} holds no prior: expected {_CARD}, or a checkpoint folder of score_models with "
            "model_hparams.json or hyperparameters.json"
        )
    raise ValueError(
        f"no prior {name!r}: it is neither a folder nor a shipped prior; shipped are: {known}"
    )


def _load(folder: Path) -> NetworkScore | SigmaHeadScore:
    """The prior that `save_prior` wrote."""
    path = folder / _CARD
    try:
        card = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); it is truncated or corrupt") from error
    if not isinstance(card, dict):
        raise ValueError(f"{path}: got {type(card).__name__}; expected a JSON object")
    head = card.get("head")
    required = (*_REQUIRED, "sigma_data") if head == "edm" else _REQUIRED
    missing = [key for key in required if key not in card]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} missing; is this the card of a prior?")
    if card["format"] != _FORMAT:
        raise ValueError(
            f"{path}: got format {card['format']}; this version of diffpost reads {_FORMAT}"
        )
    if head not in ("edm", "sigma"):
        raise ValueError(f"{path}: got head {head!r}; expected 'edm' or 'sigma'")
    state = _read_weights(folder / _WEIGHTS, card.get(_HASH))
    rest = {key: value for key, value in card.items() if key not in RESERVED}
    try:
        net = build_network(card["network"])
        sde = sde_from_dict(card["sde"])
        shape = tuple(int(side) for side in card["shape"])
        scale, offset = _affine(card["scale"]), _affine(card["offset"])
        model: NetworkScore | SigmaHeadScore
        if head == "edm":
            sigma_data = float(card["sigma_data"])
            model = NetworkScore(net, sde, shape, sigma_data, card=rest)
        else:
            model = SigmaHeadScore(net, sde, shape, card=rest)
        model = model.with_affine(scale, offset)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    load_state(net, state, folder / _WEIGHTS)
    return model


def _read_weights(path: Path, expected: Any) -> dict[str, Tensor]:
    """Tensors in float32; expected: SHA-256 of the file, None where the card does not tell."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    if not path.is_file():
        raise ValueError(f"{path}: no such file; the prior is incomplete")
    content = path.read_bytes()
    try:
        state = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or corrupt ({error}); fetch it again") from error
    found = hashlib.sha256(content).hexdigest()
    if expected is not None and found != expected:
        raise ValueError(
            f"{path}: got a file with SHA-256 {found[:12]}..., and {_CARD} was written with "
            f"{str(expected)[:12]}...; one of the two was replaced without the other, or the weights "
            "are damaged. Fetch or save the prior again; if it is being trained, load it again after "
            "its next checkpoint"
        )
    return {key: value.float() for key, value in state.items()}


def _plain(value: float | Tensor) -> Any:
    return value.detach().cpu().tolist() if isinstance(value, Tensor) else float(value)


def _affine(value: Any) -> float | Tensor:
    return torch.tensor(value) if isinstance(value, list) else float(value)
