"""What a posterior draw costs at equal error, beside score_models, azula and deepinv: tables of docs/performance.md.

    python examples/peers_at_equal_error.py            # all that is missing, then the tables
    python examples/peers_at_equal_error.py errors     # the steps that each method needs
    python examples/peers_at_equal_error.py times      # the time of a draw at those steps, with a real network
    python examples/peers_at_equal_error.py tables     # what is there

Two posteriors are known exactly. `field`: a Gaussian field of 32 x 32 pixels under a PSF, in which a draw's error is the
largest relative error of the variance in a band of wavenumbers, and that of the mean in units of what 256 exact draws
have. `mixture`: 25 modes in 80 dimensions and 2 data, with the sliced W1 distance of 1,000 draws to exact ones over that
of exact ones from each other. The denoiser is exact in both; in `times` the field's costs what `galaxies-64` costs, whose
answers are computed, and differentiated, beside it and multiplied by zero.

Steps go up to 1,000 on the field and to 256 on the mixture; the first rung that meets a threshold is bisected once. 1,000
are not tried where the error at 256 is above three thresholds and has not halved since 64. Methods with constants run as shipped, and
with the best of a small grid, found on the same oracle at 64 steps: an advantage that users do not have. Libraries that
are not installed are left out. Growth with batch, size and data is in growth_of_a_draw.py.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import contenders
import torch
from known_posteriors import NETWORK, Method, field_errors, field_problem, mixture_errors

import diffpost as dp

LADDERS = {"field": (8, 16, 32, 64, 128, 256, 1000), "mixture": (16, 64, 256)}
TUNED_AT = 64
THRESHOLDS = {  # of the errors of a problem; all must be met
    "field": {"loose": (0.20, 1.5), "strict": (0.05, 1.2)},
    "mixture": {"loose": (3.0,), "strict": (1.3,)},
}
JUDGES = {"field": field_errors, "mixture": mixture_errors}


@dataclass(frozen=True)
class Row:
    """A method: who runs it, with which constants, and what may be tuned."""

    name: str
    library: str
    parameters: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Sequence[Any]] = field(default_factory=dict)
    problems: tuple[str, ...] = ("field", "mixture")

    @property
    def method(self) -> Method:
        found: Method = getattr(contenders, "ours" if self.library == "diffpost" else self.library)
        return found


REFERENCE = {"field": "diffpost, default", "mixture": "diffpost, TwistedSMC(256)"}
_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
FIELD, MIXTURE = ("field",), ("mixture",)
ROWS = (
    Row("diffpost, default", "diffpost"),
    Row("diffpost, FittedLevels", "diffpost", {"fitted": True}, problems=FIELD),
    Row("diffpost, exact Jacobian", "diffpost", {"exact": True}, problems=FIELD),
    Row("diffpost, TwistedSMC(256)", "diffpost", {"particles": 256}, problems=MIXTURE),
    Row("azula MMPS(1), DDPM", "azula"),
    Row("azula MMPS(1), xEAB", "azula", {"sampler": "xEAB"}),
    Row("azula MMPS(4), DDPM", "azula", {"iterations": 4}),
    Row("azula MMPS(4), xEAB", "azula", {"iterations": 4, "sampler": "xEAB"}),
    Row("azula MMPS(16), xEAB", "azula", {"iterations": 16, "sampler": "xEAB"}, problems=FIELD),
    Row("azula JFPS(4), xEAB", "azula", {"kind": "JFPS", "iterations": 4, "sampler": "xEAB"}),
    Row(
        "azula JFPS(64), the prior's spectrum, xEAB",
        "azula",
        {"kind": "JFPS", "sampler": "xEAB", "power": None, "iterations": 64},
        problems=FIELD,
    ),
    Row("azula TDS", "azula", {"kind": "TDS"}, problems=MIXTURE),
    Row("azula TDS, tuned", "azula", {"kind": "TDS"}, {"variance": (1.0, 10.0, 1e3)}, MIXTURE),
    Row("azula DPS", "azula", {"kind": "DPS"}),
    Row("azula DPS, tuned", "azula", {"kind": "DPS"}, {"zeta": _STRENGTHS}),
    Row("azula PGDM", "azula", {"kind": "PGDM"}),
    Row(
        "azula PGDM, tuned",
        "azula",
        {"kind": "PGDM"},
        {"ridge": (1e-3, 1e-2, 0.1, 1.0), "eta": (0.0, 1.0)},
    ),
    Row("score_models, convolved", "score_models"),
    Row("score_models, tuned", "score_models", {}, {"guidance_factor": (0.5, 0.7, 1.4, 2.0)}),
    Row("deepinv moment matching(3), DDPM", "deepinv"),
    Row("deepinv moment matching(10), DDPM", "deepinv", {"iterations": 10}),
    Row("deepinv PiGDM", "deepinv", {"kind": "PiGDM"}),
    Row(
        "deepinv PiGDM, tuned",
        "deepinv",
        {"kind": "PiGDM"},
        {"unit": (1.0, 5.0, 20.0), "iterations": (3, 20)},
    ),
    Row("deepinv DPS", "deepinv", {"kind": "DPS"}),
    Row(
        "deepinv DPS, tuned",
        "deepinv",
        {"kind": "DPS"},
        {"weight": _STRENGTHS, "guidance": ("norm", "annealed")},
    ),
    Row("deepinv DiffPIR", "deepinv", {"kind": "DiffPIR"}),
    Row(
        "deepinv DiffPIR, tuned",
        "deepinv",
        {"kind": "DiffPIR"},
        {"lmbda": (1.0, 3.0, 20.0), "zeta": (0.1, 1.0)},
    ),
)

Record = dict[str, Any]
Errors = tuple[float, ...]


def meets(errors: Errors, limits: Errors) -> bool:
    """Whether every error is finite and within its limit."""
    return all(e <= limit for e, limit in zip(errors, limits, strict=True))


def badness(errors: Errors, limits: Errors) -> float:
    """The largest error in units of its limit; infinite where one is not finite."""
    pairs = zip(errors, limits, strict=True)
    return max(e / limit if math.isfinite(e) else math.inf for e, limit in pairs)


def smallest(
    passes: Callable[[int], bool],
    ladder: Sequence[int],
    bisections: int = 1,
    hopeless: Callable[[], bool] = lambda: False,
) -> int | None:
    """The first rung that passes, then ``bisections`` geometric means between it and the rung before.

    None if no rung passes, or if, asked before the last, ``hopeless`` says so.
    """
    failed = None
    for steps in ladder:
        if failed is not None and steps == ladder[-1] and hopeless():
            return None
        if passes(steps):
            break
        failed = steps
    else:
        return None
    if failed is None:
        return steps
    for _ in range(bisections):
        middle = round(math.sqrt(failed * steps))
        if not failed < middle < steps:
            break
        failed, steps = (failed, middle) if passes(middle) else (middle, steps)
    return steps


def filled(row: Row) -> dict[str, Any]:
    """The constants of a row, with what only the field knows."""
    parameters = dict(row.parameters)
    if "exact" in parameters:
        parameters["preconditioner"] = field_problem()[0].prior.error_covariance()
    if "power" in parameters:
        parameters["power"] = field_problem()[1].prior.eigenvalues.float()
    return parameters


def measure(problem: str, row: Row) -> Record:
    """The errors of a row at the steps that had to be tried, and the constants that were best."""
    judge = JUDGES[problem]
    limits = THRESHOLDS[problem]
    parameters = filled(row)
    chosen: Record = {}
    if row.grid:
        choices = [
            dict(zip(row.grid, c, strict=True)) for c in itertools.product(*row.grid.values())
        ]

        def score(choice: Record) -> float:
            found = judge(row.method, TUNED_AT, parameters | choice)
            return badness(found[3:], limits["loose"])

        chosen = min(choices, key=score)

    @functools.cache
    def evaluate(steps: int) -> Errors:
        return judge(row.method, steps, parameters | chosen)

    runs: dict[int, Errors] = {}

    def passes(steps: int, threshold: str) -> bool:
        runs[steps] = evaluate(steps)
        return meets(runs[steps][3:], limits[threshold])

    ladder, needed = LADDERS[problem], {}
    for name, limit in limits.items():

        def hopeless(limit: Errors = limit) -> bool:
            if len(ladder) < 4:
                return False
            # errors that fall at first order are halved twice in two rungs
            before, last = (badness(runs[steps][3:], limit) for steps in ladder[-4:-1:2])
            return last > 3 and not last < before / 2

        test = functools.partial(passes, threshold=name)
        needed[name] = smallest(test, ladder, hopeless=hopeless)
    return {
        "problem": problem,
        "row": row.name,
        "chosen": chosen,
        "needed": needed,
        "runs": {str(k): [float(f"{v:.5g}") for v in runs[k]] for k in sorted(runs)},
    }


# --- files ---


def load(path: Path) -> dict[tuple[str, str], Record]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["problem"], r["row"]): r for r in map(json.loads, lines)}


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def possible(rows: Iterable[Row] = ROWS) -> list[Row]:
    """Rows whose library is installed; says which is not."""
    absent = {
        r.library for r in rows if r.library != "diffpost" and not contenders.installed(r.library)
    }
    for name in sorted(absent):
        print(f"{name} is not installed: left out")
    return [r for r in rows if r.library not in absent]


def errors(options: argparse.Namespace) -> None:
    """Measures what is missing."""
    path = options.out / "errors.jsonl"
    for problem in THRESHOLDS:
        for row in possible():
            wanted = problem in row.problems and options.only in f"{problem} {row.name}"
            if not wanted or (problem, row.name) in load(path):
                continue
            start = time.perf_counter()
            record = measure(problem, row)
            append(path, record)
            spent = time.perf_counter() - start
            print(
                f"{problem}, {row.name}: {record['needed']} {record['chosen']} ({spent:.0f} s)",
                flush=True,
            )


# --- time ---


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, so that other work on the machine does not count."""
    start = time.process_time()
    call()
    return time.process_time() - start


def cost_of_vjp(rounds: int = 5) -> float:
    """A VJP on top of the forward, in forwards of the network at its own size, batch of 4."""
    net = dp.optimize(dp.load_prior(NETWORK))
    t = net.sde.t_of_nsr(torch.tensor(0.3, dtype=torch.float64))
    x = torch.randn(4, *net.shape)

    def forward() -> None:
        with torch.no_grad():
            net.denoise(x, t)

    def both() -> None:
        net.denoise_vjp(x, t)[1](x)

    ratios = [seconds(both) / seconds(forward) for _ in range(rounds + 1)]
    return statistics.median(ratios[1:]) - 1


def times(options: argparse.Namespace, rounds: int = 3, draws: int = 4, few: int = 8) -> None:
    """Time of a draw of the field at the steps that each method needs, over that of the reference.

    The steps of the other libraries cost the same, so ``few`` of them are run and scaled. Pilots of ours, once for all
    draws, are not in it.
    """
    found = load(options.out / "errors.jsonl")
    problem, _ = field_problem(network=True)
    calls: dict[tuple[str, str], tuple[Callable[[], object], float]] = {}
    for row in possible():
        record = found.get(("field", row.name))
        for threshold, steps in (record["needed"] if record else {}).items():
            if steps is not None:
                run = steps if row.library == "diffpost" else min(steps, few)
                parameters = filled(row) | record["chosen"]
                call = functools.partial(row.method, problem, run, 1, draws, **parameters)
                calls[row.name, threshold] = call, steps / run
    spent: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds + 1):  # the first warms up
        for key, (call, scale) in calls.items():
            spent[key].append(scale * seconds(call))
    ratios: dict[str, dict[str, float]] = {}
    for (name, threshold), values in spent.items():
        reference = spent.get((REFERENCE["field"], threshold))
        if reference is not None:
            pairs = zip(values[1:], reference[1:], strict=True)
            over = statistics.median(a / b for a, b in pairs)
            ratios.setdefault(name, {})[threshold] = float(f"{over:.3g}")
    told = {"vjp": round(cost_of_vjp(), 2), "torch": torch.__version__, "over reference": ratios}
    (options.out / "times.json").write_text(json.dumps(told, indent=1) + "\n")


# --- tables ---


def cost(record: Record, threshold: str, vjp: float) -> float | None:
    """Calls and VJPs of a method at a threshold, in calls; None where it does not get there."""
    steps = record["needed"][threshold]
    if steps is None:
        return None
    calls, vjps = record["runs"][str(steps)][:2]
    return calls + vjp * vjps


def cells(record: Record, threshold: str, reference: Record | None, told: Record) -> list[str]:
    """Calls + VJPs at a threshold and what they cost over the reference's: of time on the field, of evaluations else."""
    spent = cost(record, threshold, told.get("vjp", 1.0))
    if spent is None:
        return ["never", ""]
    base = None if reference is None else cost(reference, threshold, told.get("vjp", 1.0))
    over = None if base is None else spent / base
    if record["problem"] == "field":
        over = told.get("over reference", {}).get(record["row"], {}).get(threshold)
    calls, vjps = record["runs"][str(record["needed"][threshold])][:2]
    return [f"{calls:.0f} + {vjps:.0f}", "" if over is None else f"{over:.2g}"]


def table(problem: str, found: dict[tuple[str, str], Record], told: Record) -> list[str]:
    """Markdown, a method a line."""
    limits = THRESHOLDS[problem]
    reference = found.get((problem, REFERENCE[problem]))
    lines = [
        "| method | loose: calls + VJPs | cost | strict: calls + VJPs | cost | best |",
        "|" + "---|" * 6,
    ]
    for record in (found[problem, row.name] for row in ROWS if (problem, row.name) in found):
        line = [record["row"] + "".join(f", {k} {v}" for k, v in record["chosen"].items())]
        for threshold in limits:
            line += cells(record, threshold, reference, told)
        runs = record["runs"].items()
        steps, best = min(runs, key=lambda item: badness(tuple(item[1][3:]), limits["strict"]))
        if problem == "field":
            line.append(f"{best[3]:.1%}, {best[4]:.2f} ({steps} steps)")
        else:
            line.append(f"{best[3]:.2f} ({steps} steps)")
        lines.append("| " + " | ".join(line) + " |")
    return lines


def tables(options: argparse.Namespace) -> None:
    found = load(options.out / "errors.jsonl")
    path = options.out / "times.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    print(f"a VJP costs {told.get('vjp', '?')} forwards on top of the forward")
    for problem in THRESHOLDS:
        print(f"\n{problem}, {THRESHOLDS[problem]}:\n")
        print("\n".join(table(problem, found, told)))


PARTS = {"errors": errors, "times": times, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="all of them if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--only", default="", help="rows that have this in 'PROBLEM METHOD'")
    options = parser.parse_args()
    for part in PARTS if options.part is None else [options.part]:
        PARTS[part](options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
