"""Processes: which one a number means, and ending when they should, with their parent or when the user says so."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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


def is_running(pid: int, started: int | None) -> bool:
    """Return whether a process of this machine still runs.

    Args:
        pid: Its number.
        started: Its ``start_time``, which another process of that number does not have; None if that is not known.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    state, now = _status(pid)
    return state not in ("Z", "X") and (None in (now, started) or now == started)


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks after the machine did; None where the system does not say."""
    return _status(pid)[1]


def _status(pid: int) -> tuple[str | None, int | None]:
    """Return the state of a process (Z has ended, but its parent has not asked how) and its start; Linux only."""
    with suppress(OSError):
        # The second field is the command's name in parentheses, with anything in it.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return None, None


def boot_id() -> str | None:
    """Return what Linux calls the time since this machine was started; no two machines have the same."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def pid_namespace() -> str | None:
    """Return the name of the namespace that process numbers belong to; a container often has one of its own."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None
