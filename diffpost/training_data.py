r"""Training crops: a pure function of (seed, number of the crop).

Crop number g of a run is made from its own counter-based random numbers: which source, which frame,
how far it is shrunk, where it is cut, how it is turned and how bright it is.  There is no generator
state to save and no epoch to remember, so a run that was killed continues with exactly the crops that
it would have seen, and N processes that share a batch see what one process would have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpost.io.images import ImageSource, open_images, pixel_map_from_dict
from diffpost.random import uniform

__all__ = ["CropStream", "DataConfig"]

_CHOICES = 8  # uniform numbers that one crop takes
_STREAM = 7  # keeps the crops' numbers apart from the noise levels and the noise


@dataclass(frozen=True)
class DataConfig:
    """One source of training images and how crops are taken from it.

    path: a folder, `.npy`, `.npz`, HDF5 or zarr file (see `diffpost.io.images.open_images`).
    weight: share of the crops that come from this source, relative to the other sources.
    zoom: range of the factor by which a frame is shrunk (1 keeps it, 0.5 halves its sides), drawn
        uniformly in its logarithm; never so small that the frame no longer fills the crop.
    centred: probability that the crop is centred on the frame; else it may lie anywhere in it.
    jitter: largest shift in pixels, either way, of a centred crop.
    gain: range of the factor by which the fluxes are multiplied, uniform in its logarithm.
    dihedral: turn and mirror crops by the eight symmetries of the square.
    pixel_map: map from file values to network units, as `PixelMap.to_dict` writes it.
    key: array to take from a file that holds several.
    """

    path: str
    weight: float = 1.0
    zoom: tuple[float, float] = (1.0, 1.0)
    centred: float = 1.0
    jitter: float = 0.0
    gain: tuple[float, float] = (1.0, 1.0)
    dihedral: bool = True
    pixel_map: dict[str, Any] | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"{self.path}: got weight {self.weight}; expected a positive number")
        for name, (low, high) in {"zoom": self.zoom, "gain": self.gain}.items():
            if not 0 < low <= high:
                raise ValueError(
                    f"{self.path}: got {name} = ({low}, {high}); expected 0 < low <= high"
                )
        if self.zoom[1] > 1:
            raise ValueError(
                f"{self.path}: got zoom up to {self.zoom[1]}; enlarging a frame invents no detail "
                "and teaches the prior blur: keep it at or below 1"
            )
        if not 0 <= self.centred <= 1:
            raise ValueError(f"{self.path}: got centred = {self.centred}; expected a probability")


@final
class CropStream:
    """Crops of several image sources by number.

    Raises
    ------
    ValueError: when there is no source, or the sources differ in their number of channels.
    """

    def __init__(self, sources: Sequence[DataConfig], seed: int) -> None:
        if not sources:
            raise ValueError("got no training data; give at least one source")
        self.configs = tuple(sources)
        self.seed = seed
        self.images: list[ImageSource] = [
            open_images(
                config.path,
                pixel_map=None
                if config.pixel_map is None
                else pixel_map_from_dict(config.pixel_map),
                key=config.key,
            )
            for config in self.configs
        ]
        channels = {source[0].shape[0] for source in self.images}
        if len(channels) != 1:
            raise ValueError(
                f"got sources with {sorted(channels)} channels; all must have the same number"
            )
        self.channels = channels.pop()

    def __len__(self) -> int:
        """Number of frames, over all sources."""
        return sum(len(source) for source in self.images)

    def check(self, only: Sequence[str]) -> list[str]:
        """The names of the data.

        Raises
        ------
        ValueError: `only` names others.
        """
        names = [Path(config.path).name for config in self.configs]
        if unknown := sorted(set(only) - set(names)):
            raise ValueError(
                f"got a turn with only {', '.join(unknown)}; the data are {', '.join(names)}"
            )
        return names

    def _shares(self, only: Sequence[str]) -> np.ndarray:
        """Cumulated shares of the sources, those not named in `only` with none."""
        names = self.check(only)
        weights = np.cumsum(
            [
                config.weight if not only or name in only else 0.0
                for config, name in zip(self.configs, names, strict=True)
            ]
        )
        return np.asarray(weights / weights[-1])

    def _crop(self, size: int, shares: np.ndarray, draws: Sequence[float]) -> Tensor:
        """One crop as (C, size, size); `draws` are its uniform numbers in [0, 1)."""
        which, index, zoomed, x, y, centred, turn, gained = draws
        source = int(np.searchsorted(shares, which, side="right"))
        config, images = self.configs[source], self.images[source]
        frame = torch.tensor(images[int(index * len(images))], dtype=torch.float32)
        frame = self._shrink(frame, size, config, zoomed)
        height, width = frame.shape[-2:]
        top = self._corner(height - size, config, centred, y)
        left = self._corner(width - size, config, centred, x)
        crop = frame[:, top : top + size, left : left + size]
        if config.dihedral:
            crop = _dihedral(crop, int(turn * 8))
        low, high = config.gain
        return crop * (low * (high / low) ** gained)

    def batch(self, first: int, count: int, size: int, only: Sequence[str] = ()) -> Tensor:
        """Crops `first` … `first + count - 1` as (count, C, size, size).

        only: names of the files to draw from; empty is all.

        Raises
        ------
        ValueError: a name that is not among the data, or frames smaller than `size`.
        """
        numbers = torch.arange(first, first + count)
        draws = uniform(self.seed, numbers, 0, (_CHOICES,), dtype=torch.float64, stream=_STREAM)
        shares = self._shares(only)
        return torch.stack([self._crop(size, shares, row) for row in draws.tolist()])

    def _shrink(self, frame: Tensor, size: int, config: DataConfig, draw: float) -> Tensor:
        side = min(frame.shape[-2:])
        if side < size:
            raise ValueError(
                f"{config.path}: got a frame of {tuple(frame.shape)}; crops of {size} pixels need "
                "frames at least that large"
            )
        low = max(config.zoom[0], size / side)
        high = max(config.zoom[1], low)
        zoom = low * (high / low) ** draw
        if zoom >= 1:
            return frame
        target = [max(size, round(n * zoom)) for n in frame.shape[-2:]]
        return F.interpolate(
            frame[None], size=target, mode="bilinear", antialias=True, align_corners=False
        )[0]

    @staticmethod
    def _corner(room: int, config: DataConfig, centred: float, draw: float) -> int:
        """First row or column of the crop, where `room` pixels are to spare."""
        if centred < config.centred:
            corner = room / 2 + (2 * draw - 1) * config.jitter
        else:
            corner = draw * (room + 1)
        return min(max(math.floor(corner), 0), room)


def _dihedral(image: Tensor, which: int) -> Tensor:
    """One of the eight symmetries of the square."""
    image = torch.rot90(image, which % 4, dims=(-2, -1))
    return image.flip(-1) if which >= 4 else image
