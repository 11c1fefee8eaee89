"""Draws of image and parameters on disk: one zarr (v3) group.

It holds ``theta`` (chains, draws, P), ``acceptance``, ``nonfinite`` and, where known, ``log_prob``, a group ``extras`` of
what is told of every chain, and the images as the group ``samples``, which :meth:`Samples.load
<diffpost.samples.Samples.load>` reads too. Attributes: ``format`` ("diffpost-joint-1"), ``names`` and ``info``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import zarr

from diffpost.io.store import fill_samples, open_group, read_samples, write_group
from diffpost.parameters.result import JointSamples

FORMAT = "diffpost-joint-1"


def save_joint(joint: JointSamples, path: str | Path, overwrite: bool = False) -> None:
    """Writes joint samples to a new zarr store at ``path``.

    Raises:
        FileExistsError: path exists and overwrite is False.
    """

    def fill(group: zarr.Group) -> None:
        for name in ("theta", "acceptance", "nonfinite", "log_prob"):
            values = getattr(joint, name)
            if values is not None:
                group.create_array(name, data=values.detach().cpu().numpy())
        extras = group.create_group("extras")
        for name, values in joint.extras.items():
            extras.create_array(name, data=values.detach().cpu().numpy())
        if joint.samples is not None:
            fill_samples(group.create_group("samples"), joint.samples)
        info = json.loads(json.dumps(dict(joint.info)))
        group.attrs.update({"format": FORMAT, "names": list(joint.names), "info": info})

    write_group(path, fill, overwrite=overwrite)


def load_joint(path: str | Path) -> JointSamples:
    """Reads a store that :func:`save_joint` wrote.

    Raises:
        FileNotFoundError: no such path.
        ValueError: not a store of joint samples.
    """
    group = open_group(path, FORMAT, "JointSamples.save")

    def array(holder: zarr.Group, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(holder[name][...]))

    extras, samples = group["extras"], group.get("samples")
    return JointSamples(
        names=tuple(group.attrs["names"]),
        theta=array(group, "theta"),
        acceptance=array(group, "acceptance"),
        nonfinite=array(group, "nonfinite"),
        samples=read_samples(samples) if isinstance(samples, zarr.Group) else None,
        log_prob=array(group, "log_prob") if "log_prob" in group else None,
        extras={name: array(extras, name) for name in sorted(extras.array_keys())},
        info=group.attrs["info"],
    )
