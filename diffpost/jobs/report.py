"""What a job tells its user at the end, and a prior's card in words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from diffpost.deconvolve import DeconvolutionResult

__all__ = ["readable", "report"]

_LEAST_ACCEPTANCE, _LEAST_MIXED = 0.1, 0.5
_STRANGE = 0.05  # share of held-out images; of the draws of such images, fewer ring


def report(console: Console, result: DeconvolutionResult, path: Path) -> None:
    metrics = result.metrics
    chi2, correlation, flux = (
        metrics["reduced_chi2"],
        metrics["residual_autocorrelation"],
        metrics["flux"],
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "found", "expected", "blank sky"):
        table.add_column(name, style="bold cyan" if not name else "", no_wrap=True)

    def number(value: float | None, digits: int = 2) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    error = number(chi2["expected_std"])
    expected = number(chi2["mean_expected"])
    sky = number(chi2["sky"])
    table.add_row("reduced χ² of the mean", number(chi2["mean"]), f"{expected} ± {error}", sky)
    table.add_row("reduced χ² of a draw", number(chi2["draws"]), f"1.00 ± {error}", sky)
    error, sky = number(correlation["expected_std"]), number(correlation["sky"])
    for axis in ("x", "y"):
        found, expected = number(correlation[axis]), number(correlation["expected"][axis])
        table.add_row(f"residual correlation in {axis}", found, f"{expected} ± {error}", sky)
    whitened = metrics.get("whitened_chi2")
    if whitened is not None:
        expected = f"{number(whitened['expected'])} ± {number(whitened['expected_std'])}"
        table.add_row("whitened χ² of a draw", number(whitened["draws"]), expected, "")
    spread = "" if flux["std"] is None else f" ± {flux['std']:.2g}"
    table.add_row("flux of the model", f"{flux['mean']:.5g}{spread}", result.problem.unit or "", "")
    table.add_row("the same, blurred, over data", f"{flux['model_over_data']:.4f}", "1", "")
    strange = metrics.get("misspecification")
    if strange is not None:
        share = f"{strange['p_value']:.2g}"
        table.add_row("held-out images as strange", share, f"above {_STRANGE:g}", "")
    console.print()
    console.print(table)
    if strange is not None and strange["p_value"] <= _STRANGE:
        console.print(
            f"\n[yellow]The result is unlike what the prior was trained on[/yellow]: p = {share}. Its error bars "
            "may be wrong (docs/misspecification.md)."
        )
    chain = metrics.get("chain")
    if chain is not None:
        moves = " + ".join(str(level["moves"]) for level in chain["levels"])
        console.print(
            f"\nChains of {moves} moves: acceptance {chain['acceptance']:.2f} (worst "
            f"{chain['acceptance_min']:.2f}), step {chain['step_size']:.2g} of a fresh draw."
        )
        kept = chain["flux_within_between"]
        if kept is not None and kept < _LEAST_MIXED:
            console.print(
                f"The flux scatters within a chain by {kept:.2f} of what it does between chains: it is nearly as the "
                "stage before left it, and more --moves change it further."
            )
        if chain["acceptance"] < _LEAST_ACCEPTANCE:
            console.print(
                "[yellow]Hardly a move was accepted[/yellow], so the draws are those of the Gaussian surrogate: "
                "take more --moves, or Gaussian noise."
            )
    yardstick = max(chi2["sky"] or 1.0, 0.1)
    worst = chi2["mean"] if chi2["target"] is None else chi2["target"]
    if worst > 3 * yardstick:
        console.print(
            f"\n[yellow]On the target the reduced χ² is {worst:.3g}[/yellow], well above what the "
            "noise explains: the PSF may be off (try --psf-error 0.02), or the noise too low."
        )
    seconds = result.timings["sample"]
    console.print(
        f"\n{len(result.samples)} draws in {seconds:.0f} s, in [bold]{escape(str(path))}[/bold]: "
        "summary.png, mean.fits, std.fits, q16/q50/q84.fits, samples.fits, samples.zarr, "
        "residual.fits, run.json"
    )


def readable(value: Any, indent: int = 0) -> str:
    """A card's entry as text: mappings one entry a line, tables by their size."""
    pad = "  " * indent
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            nested = isinstance(item, dict) or (
                isinstance(item, list | tuple) and any(isinstance(part, dict) for part in item)
            )
            text = readable(item, indent + 1)
            lines.append(
                f"{pad}{key}:\n{text}" if nested and item else f"{pad}{key}: {text.strip()}"
            )
        return "\n".join(lines)
    if isinstance(value, list | tuple):
        if any(isinstance(item, dict) for item in value):
            return "\n".join(
                pad + ", ".join(f"{k} {readable(v).strip()}" for k, v in item.items())
                for item in value
            )
        if len(value) > 12 or any(isinstance(item, list | tuple) for item in value):
            inner = f" x {len(value[0])}" if isinstance(value[0], list | tuple) else ""
            return f"{pad}({len(value)}{inner} numbers, in card.json)"
        return pad + ", ".join(readable(item).strip() for item in value)
    return f"{pad}{value:.4g}" if isinstance(value, float) else f"{pad}{value}"
