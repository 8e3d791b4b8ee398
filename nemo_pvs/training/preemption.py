"""Ending in good order when a cluster wants its nodes back: the signals, the exit code, and handing them on. No NeMo.

Slurm announces the end of a job by a signal (``--signal``, or SIGTERM on preemption), a person by ``kill``. The ranks
then save after the step they are in and exit with ``PREEMPTED``; starting the same command again goes on from there.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

PREEMPTED = os.EX_TEMPFAIL
"""Exit code of a run that was asked to stop and has saved: 75, "try again later" in sysexits.h."""


@contextmanager
def handing_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Call ``send`` with each such signal that this process gets inside the block; yields those that came."""
    came: list[int] = []

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        send(number)

    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield came
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that still run (Linux)."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def send_to_each(pids: list[int], number: int) -> None:
    """Send a signal to processes; one that has ended meanwhile does not matter."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
