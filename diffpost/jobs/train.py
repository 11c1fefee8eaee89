"""What `diffpost train` trains on what."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from diffpost.training import TrainConfig

__all__ = ["train_config"]


def train_config(data: Path, config: Path | None, seed: int | None) -> TrainConfig:
    """The settings of a run: the file's, whose paths are relative to DATA, or one source and a small net.

    seed: of the run, in place of the file's or of 0; None leaves it.
    """
    if not data.exists():
        raise FileNotFoundError(f"there is no file or folder {data}")
    if config is not None:
        read = TrainConfig.from_yaml(config, root=data if data.is_dir() else data.parent)
        return read if seed is None else dataclasses.replace(read, seed=seed)
    return TrainConfig.from_dict(
        {
            "data": [{"path": str(data)}],
            "network": {"kind": "unet", "channels": 1, "patch": 2},
            "stages": [{"images": 400_000, "crop": 64, "batch": 64}],
            "seed": seed or 0,
        }
    )
