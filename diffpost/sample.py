"""The one sampling loop.

Every draw is a function of (model, sampler, seed, its own index): the noise is counter-based, so
neither the batch split nor an interruption changes a draw, and memory is bounded by ``batch_size``.
The loop adds to an integrator what each of them needs: batches, a progress bar, checkpoints, counts
of evaluations, and a guard against non-finite states. The guard only accumulates a flag on the
device, reads it every few steps, and, when it is raised, replays those steps to find the step and
the term at fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.instrument import Counter, NonFiniteError, Probe, counted
from diffpost.random import Noise
from diffpost.resume import RunFolder
from diffpost.samplers.base import Sampler, State
from diffpost.samples import Samples
from diffpost.score import ScoreModel

GUARD_INTERVAL = 8
"""Steps between readings of the guard's flag on an accelerator, where a reading waits for the
device.
"""


@torch.no_grad()
def sample(
    model: ScoreModel,
    n: int,
    sampler: Sampler,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Samples:
    """Draws n samples of a prior or a posterior.

    Args:
        model: what to sample. A posterior whose data have a batch axis of n rows conditions draw b
            on row b, whatever the batches.
        n: number of draws.
        sampler: the integrator.
        seed: of the draws; draw b depends on (seed, b) and not on its neighbours. Draws of a posterior
            have nothing in common with those of its prior at the same seed.
        batch_size: draws computed together, rounded to whole groups of the sampler; None is all of
            them.
        progress: a bar with the time left, on a terminal or in a notebook; nowhere else.
        checkpoint: a folder. Each finished batch is written to it, atomically, and the same call
            made again computes only what is missing. None writes nothing.

    Returns:
        Samples: draws in physical units, on the CPU, (n, *shape), at least float32.

    Raises:
        ValueError: n or batch_size not positive; n other than the rows of the data or not whole groups
            of the sampler; a checkpoint folder of another run.
        NonFiniteError: a state became infinite or NaN; names the step, sigma and the term at fault.
    """
    if n < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"sample(n={n}, batch_size={batch_size}): expected positive integers.")
    rows = model.rows
    if rows is not None and rows != n:
        raise ValueError(
            f"sample(n={n}): the data have {rows} rows and entry b conditions draw b, so n must "
            f"be {rows}. Repeat rows for several draws of each, or pass data without a batch axis."
        )
    sampler = sampler.prepared(model)
    group = sampler.group
    if n % group:
        raise ValueError(
            f"sample(n={n}): {type(sampler).__name__} makes {group} draws together; n must be a multiple of that."
        )
    info = describe(model, n, sampler, seed)
    store = None if checkpoint is None else RunFolder(checkpoint, info, model)
    size = n if batch_size is None else min(max(batch_size // group, 1) * group, n)
    done = {} if store is None else store.load(n)
    whole = [all(i in done for i in range(g, g + group)) for g in range(0, n, group)]
    missing = [i for i in range(n) if not whole[i // group]]
    batches = [missing[i : i + size] for i in range(0, len(missing), size)]

    x: list[Tensor | None] = [done[i].x if i in done else None for i in range(n)]
    weights: list[Tensor | None] = [done[i].log_weight if i in done else None for i in range(n)]
    spent = [(done[i].calls, done[i].vjps) if i in done else (0, 0) for i in range(n)]
    extras = [dict(done[i].extras) if i in done else {} for i in range(n)]
    with progress_bar(len(batches) * (len(sampler.times(model.sde)) - 1), progress) as advance:
        for batch in batches:
            ids = torch.tensor(batch, dtype=torch.int64)
            counter = Counter(len(ids))
            state = integrate(model.select(ids), sampler, seed, ids, counter, advance)
            result = model.to_physical(state.x).to("cpu")
            log_weights = None if state.log_weights is None else state.log_weights.to("cpu")
            told = {name: values.to("cpu") for name, values in state.extras.items()}
            if store is not None:
                store.save(batch, result, log_weights, counter.per_draw, counter.vjps, told)
            for row, i in enumerate(batch):
                x[i] = result[row]
                weights[i] = None if log_weights is None else log_weights[row]
                spent[i] = (counter.per_draw, counter.vjps)
                extras[i] = {name: values[row] for name, values in told.items()}
    known = [w for w in weights if w is not None]
    return Samples(
        x=torch.stack([row for row in x if row is not None]),
        calls=max(calls for calls, _ in spent),
        vjps=sum(vjps for _, vjps in spent) / n,
        log_weights=torch.stack(known) if known else None,
        info=info,
        extras={name: torch.stack([row[name] for row in extras]) for name in extras[0]},
    )


def describe(model: ScoreModel, n: int, sampler: Sampler, seed: int) -> dict[str, Any]:
    """What determines the draws, as JSON values."""
    return {
        "diffpost": __version__,
        "n": int(n),
        "seed": int(seed),
        "noise_seed": model.noise_seed(int(seed)),
        "sampler": type(sampler).__name__,
        "sampler_arguments": {
            f.name: _plain(getattr(sampler, f.name)) for f in dataclasses.fields(sampler)
        },
        # without addresses in memory, which differ from run to run
        "model": re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model)),
        "sde": model.sde.to_dict(),
        "shape": list(model.shape),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _plain(value: Any) -> Any:
    """A field of a sampler as a JSON value; infinities as text."""
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    return value if isinstance(value, float) and abs(value) != float("inf") else repr(value)


def integrate(
    model: ScoreModel,
    sampler: Sampler,
    seed: int,
    ids: Tensor,
    counter: Counter,
    advance: Callable[[], None],
) -> State:
    """One batch from pure noise to clean images, guarded."""
    watched = counted(model, counter)
    noise = Noise(model.noise_seed(seed), ids.to(model.device))
    times = sampler.times(model.sde)
    state = sampler.init(watched, noise.at(0), len(ids))
    every = 1 if state.x.device.type == "cpu" else GUARD_INTERVAL
    last_good, start = state, 0
    finite = torch.isfinite(state.x).all()
    steps = len(times) - 1
    for i in range(steps):
        state = sampler.step(watched, state, times[i], times[i + 1], noise.at(i + 1))
        finite = finite & torch.isfinite(state.x).all()
        if (i + 1) % every == 0 or i + 1 == steps:
            if not bool(finite):
                _blame(model, sampler, last_good, start, times, noise, ids)
            last_good, start = state, i + 1
        advance()
    return state


def _blame(
    model: ScoreModel,
    sampler: Sampler,
    state: State,
    start: int,
    times: Tensor,
    noise: Noise,
    ids: Tensor,
) -> None:
    """Replays from the last finite state and raises with the step, sigma and the term at fault."""
    steps = len(times) - 1
    for i in range(start, steps):
        probe = Probe(model)
        t = times[i]
        term = None
        try:
            state = sampler.step(probe, state, t, times[i + 1], noise.at(i + 1))
        except NonFiniteError as error:
            term, t = error.term, error.t
            bad = error.entries
        else:
            bad = ~torch.isfinite(state.x).flatten(1).all(1)
            if bool(bad.any()):
                term = f"the update of {type(sampler).__name__}"
        if term is not None:
            names = ids[bad.cpu()].tolist()
            listed = ", ".join(map(str, names[:8])) + (", ..." if len(names) > 8 else "")
            raise NonFiniteError(
                f"Non-finite state at step {i + 1} of {steps}, sigma = "
                f"{float(model.sde.sigma(t)):.4g} (t = {float(t):.4g}), draws {listed}: it comes "
                f"from {term}. Check the data and the noise, or take more steps if a guidance "
                "diverges.",
                term=term,
                t=t,
                entries=bad,
            )
    raise NonFiniteError(
        f"Non-finite state in steps {start + 1} to {steps} that a replay did not "
        "reproduce: the model is not deterministic.",
        term="unknown",
        t=times[start],
        entries=torch.ones(len(ids), dtype=torch.bool),
    )


@contextlib.contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A rich progress bar on a terminal or in a notebook; elsewhere only the counting function."""
    if wanted and total:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Left

        console = Console(stderr=True)
        if console.is_terminal or console.is_jupyter:
            columns = (
                TextColumn("sampling"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                Left(),
            )
            with Progress(*columns, console=console) as bar:
                task = bar.add_task("sampling", total=total)
                yield lambda: bar.advance(task)
            return
    yield lambda: None
