"""Console output: progress bars on a terminal, progress lines in a log, one-time warnings."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

_LOG_WIDTH = 160
"""Width in columns if none is set and output is not a terminal, as for a pipe or a Slurm log."""


def _made() -> Console:
    first = os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ
    # No markup: brackets in a path or a name are printed, not taken for a style.
    made = Console(highlight=False, markup=False, emoji=False, quiet=not first)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _LOG_WIDTH
    return made


console = _made()
"""Prints on the first rank only."""


@cache
def say_once(text: str) -> None:
    """Print a warning, but only the first time that a process calls this with the same text."""
    warn(text)


def warn(text: str, indent: str = "") -> None:
    """Print a warning."""
    console.print(Text.assemble(indent, ("!", "yellow"), f" {text}"), soft_wrap=True)


_SECONDS_BETWEEN_LINES = 20.0


def short_time(seconds: float) -> str:
    """Return a time as all lines spell it: 12 s, 3 min or 4.5 h."""
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


Report = Callable[[int, int], None]
"""Called with (done, total)."""


@contextmanager
def progress(what: str, unit: str = "") -> Iterator[Callable[..., None]]:
    """Show the progress of a task: a bar on a terminal, otherwise a line every 20 s.

    Tasks that are shown at the same time have a row each.

    Yields a function to call with (done, total) and optionally ``note="loss 3.21"``, and with ``left="3 min"`` if the
    caller's estimate is better than one from the time since this task began, as in a resumed run.
    """
    if console.is_terminal:
        with _row(what, unit) as show:
            yield show
        return

    began = last = time.monotonic()

    def say(done: int, total: int, note: str = "", left: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES and 0 < done < total:
            last = now
            left = left or short_time((now - began) / done * (total - done))
            console.print(
                f"  {what}: {done:,}/{total:,} {unit}, {left} left{', ' + note if note else ''}",
                soft_wrap=True,
            )

    yield say


@contextmanager
def expected(what: str, seconds: float) -> Iterator[None]:
    """Show the progress of a call that reports none, in seconds of those that it is expected to take."""
    finished = threading.Event()
    began = time.monotonic()

    def watch(show: Callable[..., None]) -> None:
        while not finished.wait(1.0):
            taken = time.monotonic() - began
            show(int(taken), max(round(seconds), int(taken) + 1))

    with progress(what, "s") as show:
        watcher = threading.Thread(target=watch, args=(show,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            finished.set()
            watcher.join()


_bars: Progress | None = None
"""The rows on the terminal, which has room for one live display; None while there are none."""


@contextmanager
def _row(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """Add a row to the terminal's display; the first one opens the display, and the last one closes it."""
    global _bars
    if _bars is None:
        _bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
        )
        _bars.start()
    bars = _bars
    task = bars.add_task(what, total=None, unit=unit, note="")

    def show(done: int, total: int, note: str = "", left: str = "") -> None:  # the bar shows its own estimate
        bars.update(task, completed=done, total=total, note=note)

    try:
        yield show
    finally:
        bars.remove_task(task)
        if not bars.tasks:
            bars.stop()
            _bars = None
