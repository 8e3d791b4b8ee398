"""Progress that people like: what, how far, how fast, how long left, on a terminal and in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

_LOG_WIDTH = 160
"""Columns where nobody has said how many there are: tables of a log that is read later, of Slurm or a pipe."""


def _made() -> Console:
    first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    made = Console(highlight=False, quiet=not first)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _LOG_WIDTH
    return made


console = _made()
"""Of the ranks that torchrun starts the first one talks."""


@cache
def say_once(text: str) -> None:
    """Print a remark that the user should know of; however often a process comes upon it, only the first time."""
    console.print(f"[yellow]![/] {escape(text)}", soft_wrap=True)


_SECONDS_BETWEEN_LINES = 20.0

Report = Callable[[int, int], None]
"""Called with (done, total)."""


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show how far a piece of work is: a bar on a terminal, a line every 20 s elsewhere.

    Yields a function to call with (done, total) and, if there is more to say, ``note="loss 3.21"``; and with
    ``left="3 min"`` where the caller knows better than the clock of this piece, which does not know what was resumed.
    """
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            task = bars.add_task(what, total=None, note="")

            def show(done: int, total: int, note: str = "", left: str = "") -> None:  # the bar has its own
                bars.update(task, completed=done, total=total, note=note)

            yield show
        return

    began = last = time.monotonic()

    def say(done: int, total: int, note: str = "", left: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            left = left or f"{(now - began) / done * (total - done):.0f} s"
            console.print(
                f"  {what}: {done:,}/{total:,} {unit}, {left} left{', ' + note if note else ''}", soft_wrap=True
            )

    yield say
