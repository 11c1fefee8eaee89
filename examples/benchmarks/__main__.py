"""Runs what is missing of the benchmarks, or writes their tables.

python -m examples.benchmarks [--out runs/benchmarks] [--only TEXT ...] [--list]
python -m examples.benchmarks --tables

Every result goes to OUT/results.jsonl as soon as it is there, and is not computed again. Results that come with the
project are in docs/benchmarks.json; --tables joins both, writes the tables and the picture from them, and stores the
joined results there.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

from . import mixture, peers, picture, problems, tables
from .results import Record, Task, append, load, store

ROOT = Path(__file__).parents[2]


def tasks(count: int) -> Iterator[Task]:
    """In the order in which they run."""
    seeds = range(count)
    yield from mixture.headline(seeds)
    yield from problems.lens_tasks(range(problems.RING_SEEDS))
    yield from problems.fields()
    yield from problems.texture_tasks(range(problems.TEXTURE_SEEDS))
    yield from problems.field_pareto()
    yield from mixture.pareto(range(min(count, 6)))
    yield from mixture.others(seeds)


def possible(task: Task) -> bool:
    """Whether the package that the method is from is installed."""
    names = [name for name in ("azula", "score_models") if task.method.startswith(name)]
    return all(peers.installed(name) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="with benchmarks.md and benchmarks.json"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="tasks whose names have all of these in them ('a/b': a or b)",
    )
    parser.add_argument("--problems", type=int, default=20, help="of each size of the mixture")
    parser.add_argument("--list", action="store_true", help="say what is missing")
    parser.add_argument("--tables", action="store_true", help="write docs/benchmarks.md")
    arguments = parser.parse_args()
    path = arguments.out / "results.jsonl"
    vendored = arguments.docs / "benchmarks.json"
    done = load(vendored, path)
    if arguments.tables:
        store(vendored, done.values())
        tables.write(arguments.docs / "benchmarks.md", done, arguments.problems)
        picture.draw(arguments.docs / "images" / "pareto.png", done)
        return
    missing = {
        task.key: task
        for task in tasks(arguments.problems)
        if task.key not in done
        and possible(task)
        and all(any(w in task.name for w in word.split("/")) for word in arguments.only)
    }
    if arguments.list:
        print("\n".join(task.name for task in missing.values()))
        return
    broken = 0
    for count, task in enumerate(missing.values(), 1):
        start = time.perf_counter()
        try:
            found = task.run()
        except Exception:  # the others go on; this one is tried again next time
            print(f"{count}/{len(missing)} {task.name}: {traceback.format_exc()}", flush=True)
            broken += 1
            continue
        names = {"part": task.part, "problem": task.problem}
        record: Record = {**names, "method": task.method, "seed": task.seed, **found}
        append(path, record)
        seconds = time.perf_counter() - start
        told = record.get("distance", record.get("mean_error", record.get("failed", "")))
        print(f"{count}/{len(missing)} {task.name}: {told} ({seconds:.1f} s)", flush=True)
    if broken:
        raise SystemExit(f"{broken} tasks raised; see above")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
