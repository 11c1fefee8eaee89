"""A folder that holds the finished batches of a run, so that an interrupted run goes on.

``run.json`` says what made the draws, together with a fingerprint: the model's denoiser at fixed
noise, and a hash of the data. A folder of another run is refused. Every batch is one ``.npz`` file,
written under another name and moved into place, so a file that exists is whole. As a draw depends
on its own index only, a resumed run gives the draws that it would have given uninterrupted, also
with another batch size (then to rounding).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from diffpost.posterior import Posterior
from diffpost.random import Noise
from diffpost.score import ScoreModel

FORMAT = "diffpost-run-1"
# Between fingerprints of one run on different machines or batch splits: of the whole model, whose solves
# are iterative, and of its likelihood and units alone.
TOLERANCE = 1e-3
EXACT = 2e-5
_EXTRA = "extra."


@final
@dataclass(frozen=True)
class Row:
    """One finished draw: (*shape) in physical units, its log weight, what its batch cost, and what the sampler told."""

    x: Tensor
    log_weight: Tensor | None
    calls: int
    vjps: int
    extras: Mapping[str, Tensor]


@final
class RunFolder:
    """Finished batches of one run.

    Args:
        path: the folder; made if missing.
        info: what determines the draws (JSON values).
        model: fingerprinted, so that other weights, data or guidance are noticed.

    Raises:
        ValueError: the folder holds another run, or something else.
    """

    def __init__(self, path: str | Path, info: Mapping[str, Any], model: ScoreModel) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        described = json.loads(json.dumps(dict(info)))
        mark = _fingerprint(model)
        record = self.path / "run.json"
        if not record.exists():
            if any(self.path.glob("rows-*.npz")):
                raise ValueError(
                    f"{self.path} holds batches but no run.json; choose an empty folder."
                )
            content = {"format": FORMAT, "info": described, "fingerprint": mark}
            _write(record, json.dumps(content, indent=1).encode())
            return
        try:
            found = json.loads(record.read_text())
            known, response, data = (
                found["info"],
                found["fingerprint"]["response"],
                found["fingerprint"]["data"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{record} does not describe a run; choose an empty folder."
            ) from error
        differing = [k for k in described if k != "diffpost" and known.get(k) != described[k]]
        if data != mark["data"]:
            differing.append("data")
        if len(response) != len(mark["response"]) or not np.allclose(
            response, mark["response"], rtol=TOLERANCE, atol=TOLERANCE * np.abs(response).max()
        ):
            differing.append("the model's response")
        exact = found["fingerprint"].get("exact", [])
        if len(exact) != len(mark["exact"]) or not np.allclose(
            exact, mark["exact"], rtol=EXACT, atol=0, equal_nan=True
        ):
            differing.append("the operator, the noise or the flux scale")
        if differing:
            was = {k: known[k] for k in differing if k in known}
            raise ValueError(
                f"{self.path} holds another run: {', '.join(differing)} differ"
                f"{f' (there: {was})' if was else ''}. Choose another folder, or repeat its run."
            )

    def load(self, n: int) -> dict[int, Row]:
        """The finished draws by index.

        Raises:
            ValueError: a file that cannot be read.
        """
        rows: dict[int, Row] = {}
        for file in sorted(self.path.glob("rows-*.npz")):
            try:
                with np.load(file, allow_pickle=False) as content:
                    arrays = {k: content[k] for k in content.files}
                x, ids = torch.from_numpy(arrays["x"]), arrays["ids"].tolist()
                calls, vjps = (int(v) for v in arrays["spent"])
            except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
                raise ValueError(
                    f"{file} cannot be read; delete it to compute its draws again."
                ) from error
            weights = torch.from_numpy(arrays["w"]) if "w" in arrays else None
            extras = {
                k.removeprefix(_EXTRA): torch.from_numpy(a)
                for k, a in arrays.items()
                if k.startswith(_EXTRA)
            }
            for j, i in enumerate(ids):
                if i < n:
                    told = {name: values[j] for name, values in extras.items()}
                    weight = None if weights is None else weights[j]
                    rows[i] = Row(x[j], weight, calls, vjps, told)
        return rows

    def save(
        self,
        ids: Sequence[int],
        x: Tensor,
        log_weights: Tensor | None,
        calls: int,
        vjps: int,
        extras: Mapping[str, Tensor],
    ) -> None:
        """Adds one finished batch, atomically."""
        arrays = {
            "ids": np.asarray(ids, dtype=np.int64),
            "x": x.numpy(),
            "spent": np.asarray([calls, vjps], dtype=np.int64),
        }
        if log_weights is not None:
            arrays["w"] = log_weights.numpy()
        arrays |= {_EXTRA + name: values.numpy() for name, values in extras.items()}
        target = self.path / f"rows-{ids[0]:08d}-{ids[-1]:08d}.npz"
        partial = target.with_name(f".{target.name}.partial")
        with open(partial, "wb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(target)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def _fingerprint(model: ScoreModel) -> dict[str, Any]:
    """Mean and rms of the denoiser's answers (physical units) to fixed noise at three levels, and
    the data's hash, and χ² and rms of fixed noise in physical units, which operator, noise and scale decide.
    """
    rows = model.rows
    ids = torch.arange(1 if rows is None else min(rows, 4))
    part = model.select(ids)
    noise = Noise(0, ids.to(model.device))
    dtype = torch.promote_types(model.dtype, torch.float32)
    like = torch.zeros(len(ids), *model.shape, dtype=dtype, device=model.device)
    response: list[float] = []
    for step, t in enumerate(model.sde.time_grid(4)[1:4]):
        out = part.to_physical(part.denoise(noise.at(step)(like) * float(model.sde.sigma(t)), t))
        flat = out.double().flatten(1)
        response += torch.cat([flat.mean(1), flat.square().mean(1).sqrt()]).tolist()
    digest = hashlib.sha256()
    physical = model.to_physical(noise.at(9)(like))
    exact = physical.double().flatten(1).square().mean(1).sqrt().tolist()
    inner, chosen = model, part
    while isinstance(inner, Posterior) and isinstance(chosen, Posterior):
        digest.update(inner.likelihood.y.detach().cpu().to(torch.float64).numpy().tobytes())
        exact += chosen.likelihood.chi2(physical).double().tolist()
        inner, chosen = inner.prior, chosen.prior
    return {"response": response, "exact": exact, "data": digest.hexdigest()}
