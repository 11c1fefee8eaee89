"""A noise model from stamps of blank sky, by the trainer of priors.

    train_noise(read_stamps("stamps"), "runs/noise")        # out/prior is the model

Stamps are brought to mean 0 (a level belongs to the sky, which is subtracted or modelled, not to the noise) and to a
standard deviation of 1, which the model's scale undoes, so that `LearnedNoise(load_prior(...))` is in the unit of the
stamps. Some *fields* are held out whole. Crops are shifted at will and turned or mirrored only where the stamps' power
spectrum shows that this is allowed (:mod:`diffpost.jobs.isotropy`).
"""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from diffpost.io.atomic import replace_files
from diffpost.io.checkpoints import load_prior, save_prior
from diffpost.io.stamps import Stamps, contaminated
from diffpost.jobs.isotropy import Isotropy, isotropy
from diffpost.networks import UNet, build_network
from diffpost.networks.precondition import NetworkScore
from diffpost.training import TrainConfig, train

__all__ = ["CARD_KEY", "NoiseData", "noise_config", "prepare_noise", "train_noise"]

CARD_KEY = "noise"  # what the card of a noise model holds, beside "noise_std"

_CROP, _IMAGES = 32, 100_000
_HELD_OUT = 0.25  # share of the fields
_FEW = 5
_OURS = ("data", "heldout", "sigma_data", "scale", "init", "seed")  # not for the user's file
_DEFAULTS: dict[str, Any] = {
    "network": {"kind": "unet", "patch": 2, "widths": [48], "blocks": [1], "embedding": 48},
    "stages": [{"images": _IMAGES, "crop": _CROP, "batch": 64}],
    "sde": {"name": "EDM", "sigma_min": 0.02, "sigma_max": 20.0},
    "noise": {"log_mean": -0.9, "log_std": 1.1, "flat": 0.3, "low": 0.03, "high": 20.0},
    "validate_levels": [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0],
    "validate_every": 10_000,
    "learning_rate": 2e-3,
    "warmup": 100,
    "decay_images": 40_000,
    "cooldown": 0.2,
    "ema": 0.998,
    "sample_images": 0,
    "error_images": 0,
    "reference_images": 0,
}


@final
@dataclass(frozen=True, eq=False)
class NoiseData:
    """Stamps made ready.

    Attributes:
        train, heldout: (n, 1, h, w) float32 of mean 0 and standard deviation 1 over the training stamps.
        heldout_fields: (n,) field of each held-out stamp.
        std: of the training stamps, in their unit; with ``per_field`` the median over the fields.
        isotropy: what the test found.
        card: what is told of them in the model's card.
        notes: the same in words; warnings: what the user should look at.
    """

    train: NDArray[np.float32]
    heldout: NDArray[np.float32]
    heldout_fields: NDArray[np.str_]
    std: float
    isotropy: Isotropy
    card: dict[str, Any]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def prepare_noise(
    stamps: Stamps,
    *,
    heldout: Sequence[str] | None = None,
    per_field: bool = False,
    drop_suspects: bool = False,
    seed: int = 0,
) -> NoiseData:
    """Split stamps by field and bring them to the network's units.

    Args:
        heldout: names of fields to hold out; None draws a quarter of them, one or more.
        per_field: divide each field by its own standard deviation, for fields of different depth or unit; the model is
            then of noise of one depth, and who uses it says which.
        drop_suspects: leave out the stamps that seem to hold sources.
        seed: of that draw and of the test of isotropy.

    Raises:
        ValueError: fewer than two fields, fields that are not there or none left to train on, stamps without scatter.
    """
    told, warned = [], []
    suspect, words = contaminated(stamps.values)
    if words:
        warned.append(words)
    if drop_suspects and suspect.any():
        stamps = stamps.select(~suspect)
        told.append(f"{int(suspect.sum())} stamps that seem to hold sources were left out")
    names = stamps.names
    if len(names) < 2:
        raise ValueError(
            f"got stamps of one field, {names[0]!r}; expected two or more: with one, nothing tells whether the model has "
            "learned the instrument or that field. Harvest another image"
        )
    if len(names) < _FEW:
        warned.append(
            f"only {len(names)} fields: the held-out loss says little about the next one; {_FEW} or more are advised"
        )
    if heldout is None:
        count = max(1, round(_HELD_OUT * len(names)))
        order = np.random.default_rng(seed).permutation(len(names))
        kept = sorted(names[i] for i in order[:count])
    else:
        kept = sorted(set(heldout))
        if unknown := [name for name in kept if name not in names]:
            raise ValueError(
                f"held out: no field {', '.join(unknown)}; the stamps are of {', '.join(names)}"
            )
        if not kept or len(kept) == len(names):
            raise ValueError(
                f"got {len(kept)} of {len(names)} fields to hold out; expected at least one, and one to train on"
            )
    deviation = {name: float(stamps.values[stamps.fields == name].std()) for name in names}
    if not min(deviation.values()) > 0:
        flat = min(deviation, key=lambda name: deviation[name])
        raise ValueError(f"the stamps of field {flat} have no scatter at all; they are not noise")
    out = np.isin(stamps.fields, kept)
    values = stamps.values.astype(np.float64)
    if per_field:
        values = values / np.array([deviation[str(f)] for f in stamps.fields])[:, None, None]
    inner = values[~out]
    mean, std = float(inner.mean()), float(inner.std())
    scaled = ((values - mean) / std).astype(np.float32)[:, None]
    scale = float(np.median([deviation[n] for n in names if n not in kept])) if per_field else std
    if abs(mean) > 0.1 * std:
        warned.append(
            f"the stamps' mean is {mean / std:+.2f} standard deviations; it was subtracted, as noise has none: was the "
            "background?"
        )
    if not per_field and max(deviation.values()) > 1.5 * min(deviation.values()):
        warned.append(
            f"the fields' standard deviations go from {min(deviation.values()):.4g} to {max(deviation.values()):.4g}: "
            "the model is of a mixture of depths. With --per-field it is of one, and its scale is yours to give"
        )
    turned = isotropy(scaled[~out, 0], seed)
    unit = stamps.unit or "the unit of the stamps"
    told += [
        f"{int((~out).sum())} stamps of {len(names) - len(kept)} fields to train on, {int(out.sum())} of "
        f"{', '.join(kept)} held out",
        f"standard deviation {scale:.4g} {unit}" + (" (median of the fields)" if per_field else ""),
        str(turned),
    ]
    card = {
        "unit": stamps.unit,
        "std": scale,
        "per_field": per_field,
        "fields": [name for name in names if name not in kept],
        "heldout_fields": kept,
        "std_by_field": deviation,
        "stamps": int((~out).sum()),
        "heldout_stamps": int(out.sum()),
        "isotropy": turned.to_dict(),
        "warnings": warned,
    }
    return NoiseData(
        scaled[~out],
        scaled[out],
        stamps.fields[out],
        scale,
        turned,
        card,
        tuple(told),
        tuple(warned),
    )


def noise_config(
    data: NoiseData,
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    images: int | None = None,
    seed: int = 0,
) -> TrainConfig:
    """The settings of a run on ``folder``/train.npy and heldout.npy.

    Args:
        settings: those of a training configuration that replace ours (network, stages, noise, learning_rate, ...).
        images: of the run, where ``settings`` has no stages.

    Raises:
        ValueError: settings that are this function's, and stamps smaller than the network's receptive field or the crop.
    """
    given = dict(settings or {})
    if taken := sorted(set(given) & set(_OURS)):
        raise ValueError(
            f"configuration: {', '.join(taken)} follow from the stamps; leave them out"
        )
    values = {**_DEFAULTS, **given}
    values["network"] = {"channels": 1, **values["network"]}
    if images is not None:
        if "stages" in given:
            raise ValueError("got a number of images and stages in the configuration; give one")
        values["stages"] = [{"images": images, "crop": _CROP, "batch": 64}]
        values["validate_every"] = given.get("validate_every", max(images // 10, 1))
    sources = {"dihedral": data.isotropy.shown, "centred": 0.0}
    values |= {
        "data": [{"path": str(folder / "train.npy"), **sources}],
        "heldout": [{"path": str(folder / "heldout.npy"), **sources}],
        "sigma_data": 1.0,
        "scale": data.std,
        "seed": seed,
        "card": {**given.get("card", {}), "noise_std": 1.0, CARD_KEY: data.card},
    }
    config = TrainConfig.from_dict(values)
    side, crop = min(data.train.shape[-2:]), max(t.crop for s in config.stages for t in s.steps)
    net = build_network(config.network)
    needed = net.receptive_field if isinstance(net, UNet) else crop
    if side < max(needed, crop):
        raise ValueError(
            f"the stamps are of {side} pixels, the network sees {needed} around one and is trained on crops of {crop}; "
            "give larger stamps, or a smaller network (`network` and `stages` in --config)"
        )
    if min(t.crop for s in config.stages for t in s.steps) < needed:
        raise ValueError(
            f"crops of {crop} pixels are smaller than the {needed} that the network sees around one, so that it would "
            "never see the whole of what it takes in; give larger crops or a smaller network"
        )
    return config


def train_noise(
    stamps: Stamps,
    out: str | os.PathLike[str],
    *,
    settings: dict[str, Any] | None = None,
    heldout: Sequence[str] | None = None,
    per_field: bool = False,
    drop_suspects: bool = False,
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = True,
    announce: Callable[[str], None] | None = None,
) -> NetworkScore:
    """Train a noise model, or continue the run in ``out``; the model is in ``out``/prior.

    ``out``/stamps holds what the network sees, train.npy and heldout.npy, and fields.npy, the field of each stamp held out.

    Args:
        stamps: of at least two fields.
        out: folder of the run.
        settings, images: as :func:`noise_config`; heldout, per_field, drop_suspects: as :func:`prepare_noise`.
        seed: of the split, the crops and the noise.
        announce: is told what was found.

    Raises:
        ValueError: as these, and a folder that holds a run on other stamps or with other settings.
    """
    data = prepare_noise(
        stamps, heldout=heldout, per_field=per_field, drop_suspects=drop_suspects, seed=seed
    )
    for text in data.warnings:
        if announce is None:
            warnings.warn(text, stacklevel=2)
        else:
            announce(f"warning: {text}")
    for text in data.notes:
        if announce is not None:
            announce(text)
    folder = Path(out) / "stamps"
    config = noise_config(data, folder, settings, images=images, seed=seed)
    arrays = {"train": data.train, "heldout": data.heldout, "fields": data.heldout_fields}
    _keep(folder, arrays, Path(out))
    model = train(config, out, device=device, progress=progress)
    seen = int(model.card["training"]["images_seen"])
    if seen < sum(stage.images for stage in config.stages):
        return model  # interrupted: the run goes on with the same call

    from diffpost.jobs.noise_summary import summarise

    crop = config.stages[-1].crop
    found = summarise(model, data.heldout[..., :crop, :crop], seed)
    if announce is not None:
        announce(found.text())
    card = {**model.card, CARD_KEY: {**data.card, "generated": found.to_dict()}}
    path = Path(out) / "prior"
    final = load_prior(path)
    if not isinstance(final, NetworkScore):
        raise ValueError(f"{path} is not a model that this trainer wrote")
    final.card = card
    save_prior(path, final)
    return final


def _keep(folder: Path, arrays: dict[str, NDArray[Any]], out: Path) -> None:
    """Write the arrays, or see that those that are there are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {}
    for name, array in arrays.items():
        packed = io.BytesIO()
        np.save(packed, array)
        contents[folder / f"{name}.npy"] = packed.getvalue()
    for path, content in contents.items():
        if path.exists() and path.read_bytes() != content:
            raise ValueError(
                f"{out} holds a run on other stamps, or on another split of them; continue it with its own, or give "
                "another --out"
            )
    replace_files(contents)


def settings_of(path: Path | None) -> dict[str, Any]:
    """The settings in a YAML file, {} without one.

    Raises:
        ValueError: not YAML, or not a mapping.
    """
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got {type(values).__name__}; expected a mapping of settings")
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path}: unknown setting {', '.join(unknown)}; known: {sorted(known)}")
    return values
