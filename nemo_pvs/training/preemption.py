"""Graceful exit when a cluster reclaims its nodes: the signals, the exit code, and forwarding signals to ranks.

Slurm announces the end of a job with a signal (``--signal``, or SIGTERM on preemption), a person with ``kill``. The
ranks then finish the current step, save, and exit with ``PREEMPTED``; running the same command again resumes from
there. Imports no NeMo.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

PREEMPTED = os.EX_TEMPFAIL
"""Exit code of a run that has saved and stopped on a signal: 75, a temporary failure in sysexits.h."""

USER_ERROR_FILE = "PVS_USER_ERROR_FILE"
"""Variable with the path of a file that a rank of a Slurm job creates if it ends with a user error.

The other ranks wait for that rank until srun kills them, and srun's exit code is then theirs (137). The
file tells the batch script that requeuing would not help.
"""


@contextmanager
def handing_on(send: Callable[[int], None]) -> Iterator[list[int]]:
    """Call ``send`` with each of ``SIGNALS`` that this process receives inside the block; yield the list of these.

    Python lets only the main thread handle signals; in any other thread they keep their effect, and the list is empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        send(number)

    handlers = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def children(pid: int) -> list[int]:
    """Return the ids of a process's running children (Linux)."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def send_to_each(pids: list[int], number: int) -> None:
    """Send a signal to processes; ignore those that have ended already."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
