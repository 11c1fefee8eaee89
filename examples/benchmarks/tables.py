"""The tables of docs/benchmarks.md, between its marks, from the results."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean

from . import mixture, problems
from .results import Key, Record

Records = dict[Key, Record]
DIVERGED = 1e4  # floors
OPEN = "…"
VJP = 1.7  # forward passes that a product with a network's Jacobian costs, on top of the forward


def number(value: float) -> str:
    """Two or three digits."""
    if not math.isfinite(value):
        return "diverges"
    if value >= 1000:
        return f"{value:.1e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def select(records: Records, part: str, problem: str) -> dict[str, list[Record]]:
    """By method, in order of seeds."""
    found: dict[str, list[Record]] = {}
    for (p, q, method, _), record in sorted(records.items(), key=lambda item: item[0][3]):
        if (p, q) == (part, problem):
            found.setdefault(method, []).append(record)
    return found


def cost(rows: Iterable[Record]) -> tuple[float, float]:
    """Calls and VJPs per draw, averaged over problems that did not fail."""
    known = [r for r in rows if "calls" in r]
    if not known:
        return math.nan, math.nan
    return mean(r["calls"] for r in known), mean(r["vjps"] for r in known)


def ratios(rows: list[Record], exact: list[Record]) -> list[float]:
    """Distance over the floor of the same problem; infinite where the method failed."""
    floors = {r["seed"]: r["distance"] for r in exact}
    return [r.get("distance", math.inf) / floors[r["seed"]] for r in rows if r["seed"] in floors]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def order(names: Iterable[str], value: Callable[[str], float]) -> list[str]:
    def key(name: str) -> tuple[bool, float, str]:
        v = value(name)
        return (not math.isfinite(v), v if math.isfinite(v) else 0.0, name)

    return sorted(names, key=key)


def bare(name: str) -> str:
    """Without the number of calls."""
    return re.sub(r", \d+$", "", name)


def cells() -> list[str]:
    return [f"{size},{data}" for size in mixture.SIZES for data in mixture.DATA]


def mixture_headline(records: Records, count: int) -> str:
    rows = []
    for problem in cells():
        found = select(records, mixture.PART, problem)
        exact = found.get("exact", [])
        line = [f"({problem.replace(',', ', ')})"]
        line.append(number(mean(r["distance"] for r in exact)) if exact else OPEN)
        for name in (mixture.THINNED, mixture.WHOLE):
            of = ratios(found.get(name, []), exact)
            if not of:
                line += [OPEN, OPEN, OPEN]
                continue
            floors = {r["seed"]: r["distance"] for r in exact}
            used = [r for r in found[name] if r["seed"] in floors]
            both = mean(r.get("distance", math.inf) for r in used) / mean(
                floors[r["seed"]] for r in used
            )
            some = "" if len(of) >= count else f" ({len(of)} of {count})"
            line += [number(mean(of)) + some, number(both), number(max(of))]
        rows.append(line)
    head = ["(d_x, d_y)", "floor"]
    for particles in ("3,000 particles of 100 calls", "1,000 of 300"):
        head += [f"{particles}: mean ratio", "ratio of means", "worst"]
    return table(head, rows)


def mixture_methods(records: Records, count: int, calls: int = 100) -> str:
    per_cell = {problem: select(records, mixture.PART, problem) for problem in cells()}
    names = {name for found in per_cell.values() for name in found if name.endswith(f", {calls}")}

    def typical(name: str) -> float:
        values = [
            math.log(max(mean(of), 1e-3))
            for found in per_cell.values()
            if (of := ratios(found.get(name, []), found.get("exact", []))) and mean(of) < math.inf
        ]
        return mean(values) if values else math.inf

    rows = []
    for name in order(names, typical):
        line = [bare(name)]
        for found in per_cell.values():
            of = ratios(found.get(name, []), found.get("exact", []))
            text = number(mean(of)) if of else OPEN
            line.append(text if len(of) in (0, count) else f"{text} ({len(of)})")
        paid = [cost(found[name]) for found in per_cell.values() if name in found]
        paid = [p for p in paid if math.isfinite(p[0])]
        low, high = (min(p[1] for p in paid), max(p[1] for p in paid)) if paid else (0.0, 0.0)
        line.append(f"{low:.0f}" if round(low) == round(high) else f"{low:.0f}–{high:.0f}")
        rows.append(line)
    return table(["method", *(f"({p.replace(',', ', ')})" for p in per_cell), "VJPs"], rows)


def field_ratio(record: Record) -> float:
    value = float(record.get("mean_error", math.inf)) / float(record.get("floor", 1.0))
    return value if value < DIVERGED else math.inf


def field_tables(records: Records, steps: int = 64) -> str:
    """A table for each observation."""
    text = []
    titles = {
        "psf": "PSF, white noise",
        "mask": "Mask, three quarters of the pixels unseen",
        "dense": "Dense random matrix, 4,096 data",
        "heteroscedastic": "PSF, noise ten times stronger on one side",
        "correlated": "PSF, correlated noise",
    }
    for size in (64, 128):
        for kind, title in titles.items():
            if (kind, size) == ("dense", 128):
                continue
            found = select(records, problems.FIELD, f"{kind},{size}")
            exact = found.pop("exact", [])
            text.append(f"**{title}, {size} × {size}**\n")
            if not found:
                text.append("Not run yet.\n")
                continue
            found = {n: r for n, r in found.items() if int(n.rsplit(", ", 1)[1]) >= steps}
            if kind == "psf" and size == 64:
                found = {n: r for n, r in found.items() if not n.endswith(", 128")}
            text.append(field_table(found, exact) + "\n")
    return "\n".join(text)


def field_table(found: dict[str, list[Record]], exact: list[Record]) -> str:
    rows = [field_row("exact draws", r) for r in exact]
    for name in order(found, lambda n: field_ratio(found[n][0])):
        rows.append(field_row(bare(name), found[name][0]))
    head = ["method", "mean error / floor", "var k<4", "var 4–12", "var k≥12", "calls", "VJPs"]
    return table(head, rows)


def field_row(name: str, record: Record) -> list[str]:
    value = field_ratio(record)
    paid = [f"{record[k]:.0f}" if k in record else "" for k in ("calls", "vjps")]
    if not math.isfinite(value):
        return [name, "diverges", "", "", "", *paid]
    return [name, number(value), *(number(r) for r in record["ratios"]), *paid]


def texture_table(records: Records) -> str:
    found = select(records, problems.TEXTURES, "32")

    def off(rows: list[Record]) -> float:
        known = [r for r in rows if "share" in r]
        if len(known) < len(rows) or not known:
            return math.inf
        return math.sqrt(mean((r["share"] - r["exact_share"]) ** 2 for r in known))

    rows = []
    for name in order(found, lambda n: -1.0 if n == "exact" else off(found[n])):
        own = found[name]
        line = ["exact draws" if name == "exact" else bare(name)]
        known = [r for r in own if "share" in r]
        line.append(number(off(own)))
        line.append(f"{mean(r['share'] - r['exact_share'] for r in known):+.2f}" if known else "")
        given = [r for r in known if field_ratio(r) < math.inf]
        if given:
            line.append(number(mean(field_ratio(r) for r in given)))
            line += [number(mean(r["ratios"][b] for r in given)) for b in range(3)]
        else:
            line += ["", "", "", ""]
        paid = cost(own)
        line += ["" if math.isnan(p) else f"{p:.0f}" for p in paid]
        line.append(str(len(own)))
        rows.append(line)
    head = ["method", "weight, rms error", "weight, mean error", "mean given the texture / floor"]
    head += ["var k<4", "var 4–12", "var k≥12", "calls", "VJPs", "problems"]
    return table(head, rows) if rows else "Not run yet."


def lens_table(records: Records) -> str:
    found = select(records, problems.RING, "2")
    exact = found.pop("exact", [])
    rows = []
    for name in order(found, lambda n: mean(ratios(found[n], exact) or [math.inf])):
        own = [r for r in found[name] if "mean_off" in r]
        if not own:
            rows.append([bare(name), "diverges", "", "", "", "", ""])
            continue
        rows.append(
            [
                bare(name),
                number(mean(ratios(found[name], exact))),
                number(mean(r["mean_off"] for r in own)),
                number(mean(r["variances"][0] for r in own)),
                number(mean(r["variances"][1] for r in own)),
                *(f"{p:.0f}" for p in cost(own)),
            ]
        )
    head = ["method", "sliced W1 / floor", "mean, σ", "least variance", "largest variance"]
    text = table([*head, "calls", "VJPs"], rows) if rows else "Not run yet."
    if exact:
        off, low, high = (
            mean(r["mean_off"] for r in exact),
            mean(r["variances"][0] for r in exact),
            mean(r["variances"][1] for r in exact),
        )
        text += f"\n\nExact draws: mean {off:.2f} σ, variances {low:.2f} and {high:.2f}."
    return text


def write(path: Path, records: Records, count: int) -> None:
    """Replaces what is between <!-- table NAME --> and <!-- end --> in a page."""
    made = {
        "mixture": mixture_headline(records, count),
        "methods": mixture_methods(records, count),
        "fields": field_tables(records),
        "textures": texture_table(records),
        "lens": lens_table(records),
    }
    text = path.read_text()
    for name, body in made.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        if not re.search(pattern, text, re.S):
            raise ValueError(f"{path} has no place for the table {name!r}")
        text = re.sub(pattern, lambda m, b=body: f"{m[1]}\n{b}\n\n{m[2]}", text, flags=re.S)
    path.write_text(text)
