"""Samples on disk: one zarr (v3) group.

The group holds ``x`` (n, *shape), one chunk a draw, ``log_weights`` (n,) if there are weights, a group
``extras`` of what the sampler told of every draw, and the attributes ``format`` ("diffpost-samples-1"), ``calls``, ``vjps`` and ``info``. It is written
beside its destination and moved there when complete, so a store that exists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr

from diffpost.samples import Samples

FORMAT = "diffpost-samples-1"


def save_samples(samples: Samples, path: str | Path, overwrite: bool = False) -> None:
    """Writes samples to a new zarr store at ``path``.

    Raises:
        FileExistsError: path exists and overwrite is False.
    """
    write_group(path, lambda group: fill_samples(group, samples), overwrite=overwrite)


def write_group(
    path: str | Path, fill: Callable[[zarr.Group], None], overwrite: bool = False
) -> None:
    """Makes a zarr group beside ``path``, has it filled, and moves it into place.

    Raises:
        FileExistsError: path exists and overwrite is False.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        fill(zarr.open_group(partial, mode="w", zarr_format=3))
        if path.is_dir():
            shutil.rmtree(path)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill_samples(group: zarr.Group, samples: Samples) -> None:
    """Puts samples into an empty group."""
    x = samples.x.detach().cpu().numpy()
    group.create_array("x", data=x, chunks=(1, *x.shape[1:]))
    if samples.log_weights is not None:
        group.create_array("log_weights", data=samples.log_weights.detach().cpu().numpy())
    if samples.extras:
        extras = group.create_group("extras")
        for name, values in samples.extras.items():
            extras.create_array(name, data=values.detach().cpu().numpy())
    group.attrs.update(
        {
            "format": FORMAT,
            "calls": samples.calls,
            "vjps": samples.vjps,
            "info": json.loads(json.dumps(dict(samples.info))),
        }
    )


def load_samples(path: str | Path) -> Samples:
    """Reads a store that :func:`save_samples` wrote.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a store of samples.
    """
    return read_samples(open_group(path, FORMAT, "Samples.save"))


def open_group(path: str | Path, form: str, writer: str) -> zarr.Group:
    """The group at ``path``, of this format.

    Raises:
        FileNotFoundError: no such path.
        ValueError: something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No samples at {path}.")
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is not a zarr group; expected what {writer} writes.") from error
    if group.attrs.get("format") != form:
        raise ValueError(
            f"{path} has format {group.attrs.get('format')!r}; expected {form!r}, as {writer} writes."
        )
    return group


def read_samples(group: zarr.Group) -> Samples:
    """The samples that :func:`fill_samples` put into a group."""
    attrs = dict(group.attrs)
    weights = np.asarray(group["log_weights"][...]) if "log_weights" in group else None
    extras = group.get("extras")
    found = {} if not isinstance(extras, zarr.Group) else dict(extras.arrays())
    return Samples(
        x=torch.from_numpy(np.asarray(group["x"][...])),
        calls=int(attrs["calls"]),
        vjps=float(attrs["vjps"]),
        log_weights=None if weights is None else torch.from_numpy(weights),
        info=attrs["info"],
        extras={name: torch.from_numpy(np.asarray(found[name][...])) for name in sorted(found)},
    )
