"""Draws of image and parameters together."""

from __future__ import annotations

import csv
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from diffpost.diagnostics.chains import Convergence, convergence
from diffpost.samples import Samples

__all__ = ["JointSamples"]


@final
@dataclass(frozen=True)
class JointSamples:
    """Draws of p(theta, x | y) by several chains, and what made them.

    Attributes:
        names: of the P parameters.
        theta: (chains, draws, P) float64, in the parameters' own units; angles within half a period of their mean.
        acceptance: (chains,) mean acceptance probability of the moves of theta, after the warm-up.
        nonfinite: (chains,) proposals of no finite density, each rejected.
        samples: images of some of the draws, or of all, or None. Their ``extras`` say of which: ``theta`` (n, P), and
            ``chain`` and ``draw`` (n,), the place in ``theta``.
        log_prob: (chains, draws) log density of theta up to a constant, where the method knows it.
        extras: what a method tells of every chain, by name, each (chains, ...).
        info: what made the draws, as JSON values.

    Raises:
        ValueError: shapes that do not fit.
    """

    names: tuple[str, ...]
    theta: Tensor
    acceptance: Tensor
    nonfinite: Tensor
    samples: Samples | None = None
    log_prob: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        chains = self.theta.shape[:1]
        if self.theta.ndim != 3 or self.theta.shape[2] != len(self.names):
            raise ValueError(
                f"JointSamples: theta {tuple(self.theta.shape)}; expected (chains, draws, {len(self.names)}) for "
                f"{', '.join(self.names)}."
            )
        per_chain = {"acceptance": self.acceptance, "nonfinite": self.nonfinite, **self.extras}
        for name, values in per_chain.items():
            if values.shape[:1] != chains:
                raise ValueError(
                    f"JointSamples: {name} {tuple(values.shape)}; expected ({chains[0]}, ...), one a chain."
                )
        if self.log_prob is not None and self.log_prob.shape != self.theta.shape[:2]:
            raise ValueError(
                f"JointSamples: log_prob {tuple(self.log_prob.shape)}; expected {tuple(self.theta.shape[:2])}."
            )
        missing = {"theta", "chain", "draw"} - set(self.samples.extras if self.samples else ())
        if self.samples is not None and missing:
            raise ValueError(f"JointSamples: the images do not tell their {', '.join(missing)}.")

    def __len__(self) -> int:
        return self.theta.shape[0] * self.theta.shape[1]

    @functools.cached_property
    def convergence(self) -> Convergence:
        """R-hat and effective sample sizes of every parameter.

        Raises:
            ImportError: ArviZ is not installed.
            ValueError: fewer than 2 chains or 4 draws.
        """
        return convergence(self.theta)

    @property
    def rhat(self) -> Tensor:
        """(P,) rank-normalised split R-hat; 1 for chains that agree, below 1.01 is usual."""
        return self.convergence.rhat

    @property
    def ess(self) -> Tensor:
        """(P,) effective sample size of the bulk."""
        return self.convergence.ess

    @property
    def flat(self) -> Tensor:
        """(chains draws, P), chain by chain."""
        return self.theta.flatten(0, 1)

    @property
    def mean(self) -> Tensor:
        """(P,)."""
        return self.flat.mean(0)

    @property
    def std(self) -> Tensor:
        """(P,)."""
        return self.flat.std(0)

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Quantiles over all draws: (P,) for a number, (len(q), P) for a sequence."""
        return torch.quantile(self.flat, torch.as_tensor(q, dtype=self.theta.dtype), 0)

    def of_chains(self, first: int, count: int) -> JointSamples:
        """Those of ``count`` chains from ``first`` on, as of one problem of several.

        Raises:
            ValueError: no such chains.
        """
        if not 0 <= first < first + count <= len(self.theta):
            raise ValueError(
                f"JointSamples.of_chains({first}, {count}): there are chains 0 to {len(self.theta) - 1}."
            )
        part = slice(first, first + count)
        samples = self.samples
        if samples is not None:
            chain = samples.extras["chain"]
            own = (chain >= first) & (chain < first + count)
            extras = {name: values[own] for name, values in samples.extras.items()}
            extras["chain"] = extras["chain"] - first
            samples = dataclasses.replace(samples, x=samples.x[own], extras=extras)
        return JointSamples(
            names=self.names,
            theta=self.theta[part],
            acceptance=self.acceptance[part],
            nonfinite=self.nonfinite[part],
            samples=samples,
            log_prob=None if self.log_prob is None else self.log_prob[part],
            extras={name: values[part] for name, values in self.extras.items()},
            info=self.info,
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each parameter: name, mean, std, q16, q50, q84, rhat and ess."""
        low, middle, high = self.quantile((0.16, 0.5, 0.84))
        columns = {
            "mean": self.mean,
            "std": self.std,
            "q16": low,
            "q50": middle,
            "q84": high,
            "rhat": self.rhat,
            "ess": self.ess,
        }
        return [
            {"name": name} | {k: float(v[i]) for k, v in columns.items()}
            for i, name in enumerate(self.names)
        ]

    def write_table(self, path: str | Path) -> None:
        """Writes the table as CSV."""
        path = Path(path)
        rows = self.table()
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes a zarr (v3) store: parameters, images, and what made them.

        Raises:
            FileExistsError: path exists and overwrite is False.
        """
        from diffpost.io.joint_store import save_joint

        save_joint(self, path, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> JointSamples:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such path.
            ValueError: not a store of joint samples.
        """
        from diffpost.io.joint_store import load_joint

        return load_joint(path)
