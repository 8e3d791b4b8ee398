"""Processes that end when they should: children with their parent, and we when the user says so."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SECONDS_TO_CLEAN_UP = 5.0


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, even by kill -9: nothing trains on as an orphan."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, and again every few seconds until the block has ended.

    Python raises it once, in whatever code runs; a library that catches everything while it imports or parses
    something loses it, and the program would run on for an hour.
    """

    def interrupt(*_: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, _SECONDS_TO_CLEAN_UP)
        raise KeyboardInterrupt

    handlers = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
