"""What to train on what: the configuration of a training run, read from YAML and kept in the card."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from diffpost.diagnostics.misspecification import FEWEST
from diffpost.training_data import DataConfig

__all__ = ["NoiseLevels", "Stage", "TrainConfig", "Turn"]


@dataclass(frozen=True)
class NoiseLevels:
    """How noise-to-signal ratios are drawn: log-normal, and a share `flat` log-uniform in [low, high]."""

    log_mean: float = -2.2
    log_std: float = 1.6
    flat: float = 0.15
    low: float = 0.001
    high: float = 80.0


@dataclass(frozen=True)
class Turn:
    """One kind of step: `batch` crops of `crop` pixels.

    only: names of the data files that it draws from, such as those whose frames are large enough;
        empty is all of them.
    noise: its noise levels, where they differ from the run's: small crops teach the local denoising
        of low noise at a fraction of the cost, large ones the layout that high noise hides.
    """

    crop: int
    batch: int
    only: tuple[str, ...] = ()
    noise: NoiseLevels | None = None

    def __post_init__(self) -> None:
        if self.crop < 1 or self.batch < 1:
            raise ValueError(f"got {self}; crop and batch must be at least 1")


@dataclass(frozen=True)
class Stage:
    """`images` training images of `crop` pixels in batches of `batch`, at `learning_rate`.

    turns: further kinds of steps; a step of `crop` and `batch` and one of each of them take turns.
    """

    images: int
    crop: int
    batch: int
    learning_rate: float | None = None
    turns: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if self.images < 1 or self.crop < 1 or self.batch < 1:
            raise ValueError(f"got {self}; images, crop and batch must all be at least 1")
        for turn in self.turns:
            if isinstance(turn, dict) and isinstance(turn.get("only"), str):
                raise ValueError(f"turns: got only: {turn['only']}; expected a list of names")
        turns = tuple(_build(Turn, turn, "turns") for turn in self.turns)
        object.__setattr__(self, "turns", turns)

    @property
    def steps(self) -> tuple[Turn, ...]:
        """Every kind of step, in the order in which they take turns."""
        return (Turn(self.crop, self.batch), *self.turns)

    def turn(self, offset: int) -> Turn:
        """The kind of the step that starts `offset` images into the stage."""
        place = offset % sum(turn.batch for turn in self.steps)
        for turn in self.steps:
            if place < turn.batch:
                break
            place -= turn.batch
        return turn


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a training run.

    data, heldout: sources of training and of held-out crops.
    network: configuration of the backbone, as `diffpost.networks.build_network` takes it.
    stages: sizes of crops and batches over the run.
    noise: noise levels of the run, where a turn has none of its own.
    sde: the process that samples are drawn with, as `SDE.to_dict` writes it.
    sigma_data: standard deviation of the training pixels.
    scale: of the prior that comes out, physical = scale * network; 1 leaves it in network units.
    ema: decay of the average of the weights, per step.
    warmup: steps of linear warm-up; decay_images: training images after which the learning rate falls
        as an inverse square root; cooldown: last share of the run in which it falls to zero.
    init: a prior to start from; its training images are added to the count in the card.
    error_images: crops on which the denoising error is measured at the end, for the card; 0 does not.
    reference_images: held-out crops on which the reference of `diffpost.diagnostics.misspecification` is measured at
        the end, for the card, where there are held-out data; 0 does not.
    precision: "float32", or "bfloat16" for mixed precision, which a CPU must support natively (AVX-512 BF16;
        half as fast again there, and a hundred times slower without). None: mixed on CUDA, else float32.
    """

    data: tuple[DataConfig, ...]
    network: dict[str, Any]
    stages: tuple[Stage, ...]
    heldout: tuple[DataConfig, ...] = ()
    sde: dict[str, Any] = field(
        default_factory=lambda: {"name": "EDM", "sigma_min": 0.002, "sigma_max": 80.0}
    )
    sigma_data: float = 0.5
    scale: float = 1.0
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 500
    decay_images: int = 200_000
    cooldown: float = 0.1
    clip: float = 1.0
    ema: float = 0.9995
    seed: int = 0
    init: str | None = None
    checkpoint_seconds: float = 120.0
    validate_every: int = 20_000
    validate_images: int = 256
    validate_levels: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    sample_images: int = 16
    error_images: int = 192
    reference_images: int = 512
    precision: str | None = None
    card: dict[str, Any] = field(default_factory=dict)

    # What may change when a run is continued: the rest decides what the numbers so far mean.
    _MAY_CHANGE = (
        "stages",
        "cooldown",
        "checkpoint_seconds",
        "validate_every",
        "validate_images",
        "validate_levels",
        "sample_images",
        "error_images",
        "reference_images",
        "scale",
        "card",
        "init",
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("got no data; give at least one source under `data`")
        if not self.stages:
            raise ValueError(
                "got no stages; give at least one, e.g. {images: 100000, crop: 64, batch: 64}"
            )
        if self.error_images < 0 or self.error_images == 1:
            raise ValueError(f"got error_images = {self.error_images}; expected 0, or 2 and more")
        if self.reference_images < 0 or 0 < self.reference_images < FEWEST:
            raise ValueError(
                f"got reference_images = {self.reference_images}; expected 0, or {FEWEST} and more"
            )
        if self.precision not in (None, "float32", "bfloat16"):
            raise ValueError(
                f"got precision = {self.precision!r}; expected float32, bfloat16, or nothing for the device's own"
            )
        if not self.sigma_data > 0:
            raise ValueError(f"got sigma_data = {self.sigma_data}; expected a positive number")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"got scale = {self.scale}; expected a positive number")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read a configuration, naming whatever is not known or missing.

        Raises
        ------
        ValueError: for unknown or missing keys and values out of range.
        """
        values = dict(values)
        nested: dict[str, Any] = {
            "data": DataConfig,
            "heldout": DataConfig,
            "stages": Stage,
        }
        for key, kind in nested.items():
            if key in values:
                values[key] = tuple(_build(kind, item, key) for item in values[key])
        if "validate_levels" in values:
            values["validate_levels"] = tuple(values["validate_levels"])
        return _build(cls, values, "configuration")

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
    ) -> Self:
        """Read a YAML file; relative paths of data are taken from `root` (default: the file's folder)."""
        import yaml

        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got {type(values).__name__}; expected a mapping of settings")
        base = path.parent if root is None else Path(root)
        for key in ("data", "heldout"):
            for item in values.get(key, ()):
                if isinstance(item, dict) and "path" in item:
                    item["path"] = str(base / item["path"])
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`, for JSON and YAML."""
        return _plain(dataclasses.asdict(self))

    def to_public_dict(self) -> dict[str, Any]:
        """`to_dict` without the folders of the data, which are nobody else's business."""
        values = _placeless(self.to_dict())
        return {**values, "init": None if self.init is None else Path(self.init).name}

    def check_continues(self, other: dict[str, Any], out: Path) -> None:
        """Raise ValueError unless a run of configuration `other` may continue with this one.

        The data may have moved to another folder; their names, shares and augmentation may not change.
        """
        mine, other = _placeless(self.to_dict()), _placeless(other)
        changed = sorted(
            key
            for key in set(mine) | set(other)
            if key not in self._MAY_CHANGE and mine.get(key) != other.get(key)
        )
        if changed:
            raise ValueError(
                f"{out} holds a run with another {', '.join(changed)}; continue it with its own "
                "settings, or give another --out"
            )


def _placeless(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the folders of its data left out."""
    return {
        **values,
        **{
            key: [{**source, "path": Path(source["path"]).name} for source in values.get(key, ())]
            for key in ("data", "heldout")
        },
    }


def _build(kind: Any, values: Any, where: str) -> Any:
    if dataclasses.is_dataclass(values):
        return values
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {values!r}; expected a mapping of settings")
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{where}: unknown setting {', '.join(unknown)}; known: {', '.join(known)}"
        )
    missing = sorted(
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and name not in values
    )
    if missing:
        raise ValueError(f"{where}: the setting {', '.join(missing)} is missing")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    if values.get("noise") is not None:
        values["noise"] = _build(NoiseLevels, values["noise"], f"{where}: noise")
    return kind(**values)


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a configuration equals itself after JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
