"""A folder in which a run keeps its state, so that it goes on where it was interrupted.

``run.json`` says what the run is, with numbers that its densities must give again; a folder of another run is refused.
A state is one ``.npz`` file, written under another name and moved into place: it is whole, or the one before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

__all__ = ["Checkpoint"]

FORMAT = "diffpost-parameters-run-1"
TOLERANCE = 1e-5
"""Of the marks of a run, such as log densities, which differ between machines in their last digits."""


@final
class Checkpoint:
    """The states of one run, by name.

    Args:
        path: the folder; made if missing.
        info: what determines the run, as JSON values.
        marks: numbers that the same run gives again, such as log densities at its start.

    Raises:
        ValueError: the folder holds another run, or something else.
    """

    def __init__(
        self, path: str | Path, info: Mapping[str, Any], marks: Sequence[float] = ()
    ) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        described = json.loads(json.dumps(dict(info)))
        record = self.path / "run.json"
        if not record.exists():
            if any(self.path.glob("*.npz")):
                raise ValueError(
                    f"{self.path} holds states but no run.json; choose an empty folder."
                )
            content = {"format": FORMAT, "info": described, "marks": list(map(float, marks))}
            _write(record, json.dumps(content, indent=1).encode())
            return
        try:
            found = json.loads(record.read_text())
            if found["format"] != FORMAT:
                raise KeyError("format")
            known, was = found["info"], np.asarray(found["marks"], dtype=float)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{record} does not describe a run of parameters; choose an empty folder."
            ) from error
        names = sorted(set(known) | set(described))
        differing = [
            k for k in names if k != "diffpost" and known.get(k, _NONE) != described.get(k, _NONE)
        ]
        now = np.asarray(list(map(float, marks)))
        size = max(1.0, float(np.nan_to_num(np.abs(was)).max(initial=0)))
        if was.shape != now.shape or not np.allclose(
            now, was, rtol=TOLERANCE, atol=1e-9 * size, equal_nan=True
        ):
            differing.append("the density of the parameters")
        if differing:
            there = {k: known[k] for k in differing if k in known}
            raise ValueError(
                f"{self.path} holds another run: {', '.join(differing)} differ"
                f"{f' (there: {there})' if there else ''}. Choose another folder, or repeat its run."
            )

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The arrays last saved under a name, or None.

        Raises:
            ValueError: a file that cannot be read.
        """
        file = self.path / f"{name}.npz"
        if not file.exists():
            return None
        try:
            with np.load(file, allow_pickle=False) as content:
                return {k: torch.from_numpy(np.asarray(content[k])) for k in content.files}
        except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
            raise ValueError(
                f"{file} cannot be read; delete it to compute again what it held."
            ) from error

    def save(self, name: str, arrays: Mapping[str, Tensor]) -> None:
        """Keeps arrays under a name, in the place of what was there."""
        target = self.path / f"{name}.npz"
        partial = target.with_name(f".{target.name}.partial")
        content: dict[str, Any] = {k: v.detach().cpu().numpy() for k, v in arrays.items()}
        with open(partial, "wb") as handle:
            np.savez(handle, **content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(target)


_NONE = "\0missing"


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)
