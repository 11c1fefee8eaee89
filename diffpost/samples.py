"""Posterior draws: statistics, storage and export.

With importance weights w_i (normalised to one) an average is sum_i w_i f(x_i); without, w_i = 1/n.
The standard deviation is the unbiased one, divided by 1 - sum_i w_i^2, which is (n - 1)/n without
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from diffpost.samplers.particles import effective_size, systematic

if TYPE_CHECKING:
    import xarray
    from astropy.io.fits import Header


@final
@dataclass(frozen=True)
class Samples:
    """Draws in physical units, and what made them.

    Attributes:
        x: (n, *shape) draws, in the units of the data.
        calls: denoiser evaluations per draw.
        vjps: products with the denoiser's Jacobian per draw; an average over batches where an
            iterative solve took a different number of iterations in each.
        log_weights: (n,) log importance weights up to a constant, or None for equal weights.
        extras: what the sampler tells of every draw, by name, each (n, ...): see the samplers.
        info: what made the draws: seed, sampler, model, process, version; plain JSON values.

    Raises:
        ValueError: no draws, or log_weights or an extra of another length.
    """

    x: Tensor
    calls: int = 0
    vjps: float = 0.0
    log_weights: Tensor | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x.ndim < 1 or len(self.x) == 0:
            raise ValueError(
                f"Samples: x has shape {tuple(self.x.shape)}; expected (n, *shape), n > 0."
            )
        if self.log_weights is not None and self.log_weights.shape != (len(self.x),):
            raise ValueError(
                f"Samples: log_weights {tuple(self.log_weights.shape)} for {len(self.x)} draws; "
                f"expected ({len(self.x)},)."
            )
        for name, values in self.extras.items():
            if values.shape[:1] != (len(self.x),):
                raise ValueError(
                    f"Samples: the extra {name!r} has shape {tuple(values.shape)} for {len(self.x)} draws; "
                    f"expected ({len(self.x)}, ...)."
                )

    def __len__(self) -> int:
        return len(self.x)

    @property
    def weights(self) -> Tensor:
        """(n,) float64, summing to one."""
        if self.log_weights is None:
            return torch.full((len(self.x),), 1 / len(self.x), dtype=torch.float64)
        return torch.softmax(self.log_weights.double(), 0).cpu()

    @property
    def mean(self) -> Tensor:
        """(*shape) posterior mean."""
        return self._average(self.x)

    @property
    def std(self) -> Tensor:
        """(*shape) posterior standard deviation (NaN for a single draw)."""
        square = self._average((self.x - self.mean) ** 2)
        return (square / (1 - float(self.weights.square().sum()))).sqrt()

    def quantile(self, q: float | Sequence[float]) -> Tensor:
        """Quantiles over the draws: (*shape) for a number, (len(q), *shape) for a sequence.

        Linear between order statistics, as numpy; with weights, the smallest draw at which the
        cumulated weight reaches q.

        Raises:
            ValueError: q outside [0, 1].
        """
        levels = torch.as_tensor(q, dtype=torch.float64).reshape(-1)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"quantile(q={q}): expected values in [0, 1].")
        ordered, order = self.x.sort(0)
        if self.log_weights is None:
            rank = levels * (len(self.x) - 1)
            low = rank.floor().long()
            high = rank.ceil().long()
            part = (rank - low).to(self.x.dtype).to(self.x.device)
            part = part.reshape(-1, *[1] * (self.x.ndim - 1))
            out = torch.lerp(ordered[low], ordered[high], part)
        else:
            cumulated = self.weights.to(self.x.device)[order].cumsum(0)
            index = torch.stack([(cumulated < float(a) - 1e-12).sum(0) for a in levels])
            out = ordered.gather(0, index.clamp_max(len(self.x) - 1))
        return out[0] if isinstance(q, float | int) else out

    def resampled(self, n: int | None = None, seed: int = 0) -> Samples:
        """As many equally weighted draws, for what knows no weights: ranks, PQMass, R-hat.

        Systematic resampling (Douc & Cappe 2005, arXiv:cs/0507025): draw i appears floor or ceil of n w_i times, so
        heavy draws appear repeatedly, and what counts draws as independent overstates them: see
        :attr:`effective_size`. Their order is shuffled. Draws without weights are returned as they are.

        Args:
            n: how many; default: as many as there are.
            seed: of the resampling.

        Raises:
            ValueError: n below 1, or another n for draws without weights.
        """
        count = len(self) if n is None else n
        if count < 1:
            raise ValueError(f"resampled(n={n}): expected at least 1.")
        if self.log_weights is None:
            if count != len(self):
                raise ValueError(
                    f"resampled(n={n}): the {len(self)} draws have equal weights; take x[:{n}] instead."
                )
            return self
        generator = torch.Generator().manual_seed(seed)
        start = torch.rand(1, generator=generator, dtype=torch.float64)
        chosen = systematic(self.log_weights.double().cpu()[None], start, count)[0]
        chosen = chosen[torch.randperm(count, generator=generator)].to(self.x.device)
        return replace(
            self,
            x=self.x[chosen],
            log_weights=None,
            extras={name: values[chosen.to(values.device)] for name, values in self.extras.items()},
            info={**self.info, "resampled": {"from": len(self), "seed": seed}},
        )

    @property
    def effective_size(self) -> float:
        """1 / sum of squared weights: the number of draws, less what uneven weights cost (Kong 1992)."""
        if self.log_weights is None:
            return float(len(self))
        return float(effective_size(self.log_weights.double()))

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes a zarr (v3) store: the draws, the weights, and what made them.

        Raises:
            FileExistsError: path exists and overwrite is False.
        """
        from diffpost.io.store import save_samples

        save_samples(self, path, overwrite=overwrite)

    @staticmethod
    def load(path: str | Path) -> Samples:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such path.
            ValueError: not a store of samples.
        """
        from diffpost.io.store import load_samples

        return load_samples(path)

    def to_xarray(self) -> xarray.Dataset:
        """A dataset with ``x`` (draw, channel, y, x for images) and, if weighted,
        ``log_weights``.
        """
        import xarray

        inner = self.x.ndim - 1
        names = ("channel", "y", "x")[3 - inner :] if inner <= 3 else None
        dims = ("draw", *(names or [f"axis{i}" for i in range(inner)]))
        data = {"x": (dims, self.x.detach().cpu().numpy())}
        if self.log_weights is not None:
            data["log_weights"] = (("draw",), self.log_weights.detach().cpu().numpy())
        attrs = {"calls": self.calls, "vjps": self.vjps, **_flat(self.info)}
        return xarray.Dataset(data, attrs=attrs)

    def to_fits(
        self, path: str | Path, header: Header | None = None, overwrite: bool = False
    ) -> None:
        """Writes the draws as a FITS cube, (n, y, x) for images of one channel, else (n, channel,
        y, x).

        Args:
            path: the file.
            header: cards to carry over, such as a WCS and BUNIT; those of the array's axes are set
                here.
            overwrite: replace an existing file.

        Raises:
            FileExistsError: path exists and overwrite is False.
        """
        from astropy.io import fits

        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
        x = self.x.detach().cpu()
        if x.ndim == 4 and x.shape[1] == 1:
            x = x[:, 0]
        hdu = fits.PrimaryHDU(x.numpy(), header=header)
        hdu.header["NDRAWS"] = (len(self), "posterior draws along the last FITS axis")
        hdu.header["CALLS"] = (self.calls, "denoiser evaluations per draw")
        if "seed" in self.info:
            hdu.header["SEED"] = (self.info["seed"], "seed of the draws")
        hdus = fits.HDUList([hdu])
        if self.log_weights is not None:
            weights = self.log_weights.detach().cpu().numpy()
            hdus.append(fits.ImageHDU(weights, name="LOGW"))
        partial = path.with_name(path.name + ".partial")
        hdus.writeto(partial, overwrite=True)
        partial.replace(path)

    def _average(self, values: Tensor) -> Tensor:
        """Weighted sum over draws, in float64 one at a time to keep memory at one image."""
        total = torch.zeros(values.shape[1:], dtype=torch.float64, device=values.device)
        for weight, value in zip(self.weights.tolist(), values, strict=True):
            total += weight * value.double()
        return total.to(values.dtype)


def _flat(info: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that netCDF can hold: nested mappings as text."""
    return {k: v if isinstance(v, int | float | str) else repr(v) for k, v in info.items()}
