"""How well the draws of a deconvolution fit its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpost.jobs.noise_model import expectations, judged
from diffpost.jobs.problem import Grid, Problem
from diffpost.likelihood import Likelihood
from diffpost.samplers import MALA, Sampler
from diffpost.samples import Samples

__all__ = ["autocorrelation", "chain_metrics", "fit_metrics", "residuals"]

Array = NDArray[np.float64]


def _on_cutout(data: Tensor, problem: Problem, grid: Grid) -> Tensor:
    """The cutout of data (B, 1, H, W) with the margin, or of the cutout alone: (B, h, w)."""
    rows, columns = grid.data_region(problem.oversample)
    return data[:, 0] if problem.noise_model is not None else data[:, 0, rows, columns]


def residuals(likelihood: Likelihood, x: Tensor, problem: Problem, grid: Grid) -> Array:
    """(B, h, w) residuals in sigma, NaN where there is no data."""
    return _in_sigma(_raw(likelihood, x), problem, grid)


def _raw(likelihood: Likelihood, x: Tensor) -> Tensor:
    with torch.no_grad():
        return likelihood.residual(x.to(likelihood.y.dtype))


def _in_sigma(raw: Tensor, problem: Problem, grid: Grid) -> Array:
    values = _on_cutout(raw, problem, grid).double().numpy()
    seen = problem.seen
    out: Array = np.where(seen, values / np.where(seen, problem.std, 1.0), np.nan)
    return out


def fit_metrics(
    problem: Problem, grid: Grid, likelihood: Likelihood, draws: Samples
) -> dict[str, Any]:
    """How well the draws fit, as JSON values.

    reduced_chi2: of the posterior mean and of the draws (mean over them), each with the expectation
    if noise and model are right.  residual_autocorrelation: of the mean's residual between adjacent
    pixels, along x and y, and what blank sky has of it (drizzled noise is correlated).  flux: of the
    model in the pixels that count, and through the operator over the data's there.  Under a noise model
    whitened_chi2 too (`diffpost.jobs.noise_model`), of the mean, of the draws and of the model's own noise.
    """
    seen = problem.seen
    n = int(seen.sum())
    noise = problem.noise_model
    mean_raw = _raw(likelihood, draws.mean[None])
    mean = _in_sigma(mean_raw, problem, grid)[0]
    each = []
    each_raw = []
    modelled = []
    k = problem.oversample
    inside = torch.from_numpy(np.kron(seen, np.ones((k, k))))
    through = np.zeros(seen.shape)
    square = np.zeros(seen.shape)
    for row in draws.x.split(8):
        raw = _raw(likelihood, row)
        if noise is not None:
            each_raw.append(raw)
        part = _in_sigma(raw, problem, grid)
        each += [float(np.nanmean(r**2)) for r in part]
        deviation = np.nan_to_num(part - mean)
        through += deviation.sum(0)
        square += (deviation**2).sum(0)
        rows, columns = grid.region
        modelled += (row[:, 0, rows, columns].double() * inside).sum((1, 2)).tolist()
    m = len(draws)
    spread = float((square - through**2 / m)[seen].sum() / (max(m - 1, 1) * n)) if m > 1 else None
    data = np.where(seen, problem.data, 0.0)
    with torch.no_grad():
        blurred = likelihood.operator(draws.mean[None].to(likelihood.y.dtype))
    image = _on_cutout(blurred, problem, grid)[0].double().numpy()
    source = problem.scene.target & seen
    sky = problem.report.get("sky", {})
    known = {"chi2_std": (2 / n) ** 0.5, "x": 0.0, "y": 0.0}
    if noise is not None:
        known = expectations(noise, likelihood.data_shape)
    metrics: dict[str, Any] = {
        "pixels": n,
        "reduced_chi2": {
            "mean": float(np.nanmean(mean**2)),
            "mean_expected": None if spread is None else 1 - spread * (m - 1) / m,
            "draws": float(np.mean(each)),
            "draws_expected": 1.0,
            "expected_std": known["chi2_std"],
            "target": float(np.mean(mean[source] ** 2)) if source.any() else None,
            "sky": sky.get("reduced_chi2"),
        },
        "residual_autocorrelation": {
            "x": autocorrelation(mean, 0, 1),
            "y": autocorrelation(mean, 1, 0),
            "expected": {"x": known["x"], "y": known["y"]},
            "expected_std": float(n**-0.5),
            "sky": sky.get("autocorrelation"),
        },
        "largest_residual": float(np.nanmax(np.abs(mean))),
        "flux": {
            "mean": float(np.mean(modelled)),
            "std": float(np.std(modelled, ddof=1)) if m > 1 else None,
            "model_over_data": float(image[seen].sum() / data[seen].sum()),
        },
    }
    if noise is not None:
        metrics["whitened_chi2"] = judged(noise, mean_raw, torch.cat(each_raw))
    return metrics


def chain_metrics(draws: Samples, sampler: Sampler) -> dict[str, Any]:
    """How the chains in which the draws end went, as JSON values.

    levels: noise and moves of each chain, in turn. Of the last one: acceptance and its smallest; step_size; the worst error
    of an integral by which a move was decided (nats); flux_within_between: the scatter of the flux within a chain over that
    between chains (None for one), near 1 if the chains have forgotten their starts, and small if the flux is as the stage before left it.
    """
    levels: list[dict[str, Any]] = []
    part: Sampler | None = sampler
    while isinstance(part, MALA):
        levels.insert(0, {"nsr": part.nsr, "moves": part.steps})
        part = part.start
    told = {name: value.double() for name, value in draws.extras.items()}
    flux = told["trace_flux"]
    between = float(flux.mean(1).std()) if min(flux.shape) > 1 else 0.0
    return {
        "levels": levels,
        "acceptance": float(told["acceptance"].mean()),
        "acceptance_min": float(told["acceptance"].min()),
        "step_size": float(told["step_size"].mean()),
        "quadrature_error": float(told["quadrature_error"].max()),
        "flux_within_between": float(flux.std(1).mean()) / between if between else None,
    }


def autocorrelation(residual: Array, dy: int, dx: int) -> float:
    """Correlation of pixels with those (dy, dx) further on, NaN pixels left out."""
    h, w = residual.shape
    a, b = residual[: h - dy, : w - dx], residual[dy:, dx:]
    both = np.isfinite(a) & np.isfinite(b)
    if not both.any():
        return float("nan")
    return float((a * b)[both].mean() / np.nanmean(residual**2))
