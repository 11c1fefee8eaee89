"""How every command ends: what the user can mend, and what an interruption keeps.

Exit codes: 2 bad input or nothing may be written; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from diffpost.jobs.outputs import OutputFolder

__all__ = ["bad_input", "console", "keeping", "line"]

_INTERRUPTED = 130
_BAD_INPUT = 2


def console(stderr: bool = False) -> Console:
    """Made when needed: the streams may have been replaced, as tests do."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """What the user can mend ends with one paragraph and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
            text = f"{text}: {error.filename}"
        console(stderr=True).print(f"[bold red]error:[/bold red] {escape(text)}")
        raise typer.Exit(_BAD_INPUT) from error


@contextlib.contextmanager
def keeping(folder: OutputFolder) -> Iterator[None]:
    """A full disk or an interruption ends with what is kept, and how to go on from it."""
    try:
        yield
    except OSError as error:
        raise folder.explain(error) from None
    except KeyboardInterrupt:
        kept = f"what is finished is kept in {folder.partial}"
        command = shlex.join(["diffpost", *(a for a in sys.argv[1:] if a != "--resume")])
        console(stderr=True).print(
            f"\n[bold yellow]interrupted:[/bold yellow] {escape(kept)}; go on with\n  "
            f"{escape(command)} --resume"
        )
        raise typer.Exit(_INTERRUPTED) from None


def line(text: str) -> str:
    """A note as it is printed, a warning in yellow."""
    if text.startswith("warning: "):
        return f"[bold yellow]warning:[/bold yellow] {escape(text.removeprefix('warning: '))}"
    return f"[dim]·[/dim] {escape(text)}"
