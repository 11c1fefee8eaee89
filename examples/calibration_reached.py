"""Are the shipped priors' posteriors calibrated?  The runs behind the table of docs/calibration.md.

    python examples/calibration_reached.py --out runs/calibration [--heldout DATA] [--only TEXT ...]
    python examples/calibration_reached.py --out runs/calibration --tables

Runs `diffpost calibrate` for each setting that OUT does not hold yet; an interrupted one goes on. DATA is the folder that
examples/prepare_galaxies.py wrote, whose held-out galaxies are the truths of some settings; without it they are left out.
--tables writes the table and the pictures of docs/calibration.md from the runs that are there, and keeps what they are made from
in docs/calibration.json, so that a run need not be there again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge_prior import heldout_crops

from diffpost import plot
from diffpost.diagnostics import coverage_from_fractions, sbc_from_ranks
from diffpost.io.checkpoints import load_prior
from diffpost.training_config import TrainConfig

ROOT = Path(__file__).parents[1]
METHODS = {
    "recommended": "recommended",
    "moment-matching": "moment matching with the network's derivative",
    "pigdm": "PiGDM",
    "dps": "DPS",
    "convolved": "Convolved",
}
KEPT = (
    "calibrated",
    "level",
    "tests",
    "controls",
    "sizes",
    "simulations",
    "samples",
    "seed",
    "prior",
)
KEPT += (
    "guidance",
    "sampler",
    "calls_per_draw",
    "jacobian_products_per_draw",
    "seconds_per_simulation",
)
KEPT += ("diffpost",)


@dataclass(frozen=True)
class Setting:
    """One run of `diffpost calibrate`."""

    prior: str
    operator: str
    noise: float
    method: str = "recommended"
    simulations: int = 304
    draws: int = 64
    heldout: bool = False

    @property
    def name(self) -> str:
        kind = "-heldout" if self.heldout else ""
        return f"{self.prior}-{self.operator.replace(':', '')}-{self.noise:g}-{self.method}{kind}"

    @property
    def instrument(self) -> str:
        """In words."""
        what, number = self.operator.split(":")
        seen = f"PSF of {number} px" if what == "psf" else f"{float(number):.0%} masked"
        return f"{seen}, noise {self.noise:g}"

    def arguments(self) -> list[str]:
        words = [
            "--prior",
            self.prior,
            "--operator",
            self.operator,
            "--noise-std",
            f"{self.noise:g}",
        ]
        words += ["--simulations", f"{self.simulations}", "--samples", f"{self.draws}"]
        words += ["--method", self.method, "--batch-size", "256"]
        return words + (["--controls"] if self.method == "recommended" else [])


def settings() -> Iterator[Setting]:
    """The recommended method first, then the others where a smaller number is enough to reject them."""
    instruments = (("psf:1.5", 0.03), ("mask:0.5", 0.03), ("psf:1.5", 0.1))
    for operator, noise in instruments:
        yield Setting("galaxies-32", operator, noise)
    yield Setting("galaxies-64", "psf:1.5", 0.03, simulations=104, draws=32)
    yield Setting("galaxies-32", "psf:1.5", 0.03, simulations=104, heldout=True)
    for operator, noise in instruments:
        for method in ("convolved", "dps", "pigdm"):
            yield Setting("galaxies-32", operator, noise, method, simulations=64)


def heldout_truths(prior: str, data: Path, count: int, path: Path) -> Path:
    """Crops of the held-out frames, one a frame as far as they last, in a file."""
    if not path.exists():
        model = load_prior(prior)
        config = TrainConfig.from_dict(model.card["training"]["config"])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, heldout_crops(config, data, count, model.shape[-1])[:, 0].numpy())
    return path


def run(setting: Setting, out: Path, data: Path | None) -> None:
    folder = out / setting.name
    if (folder / "verdict.json").exists():
        return
    words = setting.arguments()
    if setting.heldout:
        if data is None:
            return
        path = out / f"{setting.prior}-heldout.npy"
        words += ["--truths", str(heldout_truths(setting.prior, data, setting.simulations, path))]
    going_on = ["--resume"] if folder.exists() else []
    print(f"{setting.name}: {' '.join(words)}", flush=True)
    command = [sys.executable, "-m", "diffpost.cli", "calibrate", *words, "--out", str(folder)]
    subprocess.run([*command, *going_on], check=True)


# Tables -----------------------------------------------------------------------------------------


def collected(out: Path, kept: Path) -> dict[str, dict[str, Any]]:
    """What the runs found, by name: those in `kept`, and newer ones in `out`."""
    found: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for setting in settings():
        folder = out / setting.name
        if (folder / "verdict.json").exists():
            verdict = json.loads((folder / "verdict.json").read_text())
            verdict = {key: verdict[key] for key in KEPT}  # no paths, no machine
            with np.load(folder / "simulations.npz") as arrays:
                fractions = arrays["fraction"].round(5).tolist()
                ranks = arrays["ranks"].tolist()
            found[setting.name] = {"verdict": verdict, "fractions": fractions, "ranks": ranks}
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    head = [
        "prior, truths",
        "data",
        "method",
        "simulations × draws",
        "coverage",
        "total flux",
        "peak",
    ]
    head += ["half-light radius", "misfit", "error / claimed", "calls (VJPs)"]
    rows = [head, ["---"] * len(head)]
    for setting in settings():
        if setting.name not in found:
            continue
        verdict = found[setting.name]["verdict"]
        cells = [
            setting.prior + (", held-out galaxies" if setting.heldout else ""),
            setting.instrument,
            METHODS[setting.method],
            f"{verdict['simulations']} × {verdict['samples']}",
        ]
        for test in verdict["tests"]:
            p = test["p_value"]
            text = f"{p:.2g}" if p > 1e-16 else "<1e-16"
            cells.append(f"**{text}**" if test["rejected"] else text)
        ratio, error = verdict["sizes"]["error_over_spread"]
        cells.append("diverges" if ratio is None else f"{ratio:.2f} ± {error or 0:.2f}")
        cells.append(f"{verdict['calls_per_draw']} ({verdict['jacobian_products_per_draw']:.0f})")
        rows.append(cells)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def controls(found: dict[str, dict[str, Any]]) -> str:
    """How many of the sets that were spoilt on purpose the same tests reject."""
    lines = []
    for setting in settings():
        verdict = found.get(setting.name, {}).get("verdict", {})
        if verdict.get("controls") and verdict["calibrated"]:
            caught = [name for name, control in verdict["controls"].items() if control["rejected"]]
            missed = [name for name in verdict["controls"] if name not in caught]
            text = f"{setting.prior}, {setting.instrument}: rejected {', '.join(caught) or 'none'}"
            lines.append(f"* {text}" + (f"; not found {', '.join(missed)}" if missed else ""))
    return "\n".join(lines)


def pictures(found: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """One picture for each instrument, all methods in it."""
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for setting in settings():
        if setting.name in found:
            fractions = torch.tensor(found[setting.name]["fractions"], dtype=torch.float64)
            draws = found[setting.name]["verdict"]["samples"]
            curve = coverage_from_fractions(fractions, draws, seed=0)
            label = METHODS[setting.method] + (", held-out galaxies" if setting.heldout else "")
            key = (setting.prior, f"{setting.operator.replace(':', '')}-{setting.noise:g}")
            groups.setdefault(key, {})[label] = curve
    written = []
    for (prior, instrument), curves in groups.items():
        name = f"coverage-{prior}-{instrument}.png"
        plot.coverage(
            curves, folder / name, title=f"{prior}, {instrument.replace('-', ', noise ')}"
        )
        written.append(name)
    return written


def rank_picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    """ECDFs of the truths' ranks less the diagonal: a row for each instrument, a column for each statistic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows: dict[str, list[Setting]] = {}
    for setting in settings():
        if setting.name in found:
            rows.setdefault(f"{setting.prior}\n{setting.instrument}", []).append(setting)
    names = [test["name"] for test in found[next(iter(found))]["verdict"]["tests"][1:]]
    figure, axes = plt.subplots(
        len(rows), len(names), figsize=(13, 2.7 * len(rows)), layout="constrained", squeeze=False
    )
    for line, (row, members) in zip(axes, rows.items(), strict=True):
        for k, axis in enumerate(line):
            for i, setting in enumerate(members):
                ranks = torch.tensor(found[setting.name]["ranks"])[:, k : k + 1]
                draws = found[setting.name]["verdict"]["samples"]
                result = sbc_from_ranks(ranks, draws)
                if i == 0:  # the recommended method's; the others have fewer simulations
                    band = result.band - result.grid
                    axis.fill_between(result.grid, *band, color="0.88", label="95%, recommended")
                label = METHODS[setting.method] + (", held-out" if setting.heldout else "")
                axis.plot(result.grid, result.ecdf[:, 0] - result.grid, label=label, lw=1.3)
            axis.axhline(0, color="0.4", lw=0.7, ls=":")
            axis.set(ylim=(-0.5, 0.5), xlim=(0, 1))
        line[0].set_ylabel(row)
        line[-1].legend(fontsize=7, loc="lower right", frameon=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name)
    figure.supxlabel("rank of the truth / (draws + 1);  vertical: ECDF less the diagonal")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)


def fill(page: Path, name: str, text: str) -> None:
    """Replace what is between <!-- NAME --> and <!-- end -->."""
    content = page.read_text()
    begin = content.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
    end = content.index("<!-- end -->", begin)
    page.write_text(f"{content[:begin]}\n\n{text}\n\n{content[end:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "calibration")
    parser.add_argument("--heldout", type=Path, help="folder of prepared galaxies")
    parser.add_argument(
        "--only", nargs="*", default=[], help="settings with all of these in the name"
    )
    parser.add_argument("--tables", action="store_true", help="write docs/calibration.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    if not options.tables:
        for setting in settings():
            if all(text in setting.name for text in options.only):
                run(setting, options.out, options.heldout)
        return
    kept = options.docs / "calibration.json"
    found = collected(options.out, kept)
    kept.write_text(json.dumps(found, separators=(",", ":"), allow_nan=False) + "\n")
    names = pictures(found, options.docs / "images")
    rank_picture(found, options.docs / "images" / "calibration-ranks.png")
    page = options.docs / "calibration.md"
    fill(page, "table", table(found))
    fill(page, "controls", controls(found))
    shown = [f"![expected coverage](images/{name})" for name in names]
    shown.append("![ranks of the truth among its draws](images/calibration-ranks.png)")
    fill(page, "pictures", "\n\n".join(shown))


if __name__ == "__main__":
    main()
