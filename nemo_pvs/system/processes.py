"""Processes: identify them beyond their id, end with the parent, and handle Ctrl-C reliably."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

_SECONDS_TO_CLEAN_UP = 5.0


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, even by kill -9, so that no orphan keeps training."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def forked_die_with_this() -> None:
    """Ask Linux to kill every process that this one forks from now on when this one ends, and theirs in turn.

    Libraries fork too: a worker of Megatron's checkpoint writer waits forever for a rank that has been killed.
    """
    os.register_at_fork(after_in_child=die_with_parent)


@contextmanager
def heeding_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on Ctrl-C, and again every few seconds until the block ends.

    Python raises it once, in whatever code is running; a library that catches every exception while importing or
    parsing swallows it, and the program would keep running.
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


@contextmanager
def hidden_main_module() -> Iterator[None]:
    """Let processes that are spawned within the block import only what they need, not the program's main module.

    Otherwise each of them runs the user's script again, unless it is guarded by ``if __name__ == "__main__"``.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def is_running(pid: int, started: int | None) -> bool:
    """Return whether a process on this machine is still running.

    Args:
        pid: Its process id.
        started: Its ``start_time``, which differs from that of a later process with the same id; None if unknown.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    state, now = _status(pid)
    return state not in ("Z", "X") and (None in (now, started) or now == started)


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot; None if the system does not provide it."""
    return _status(pid)[1]


def _status(pid: int) -> tuple[str | None, int | None]:
    """Return the state of a process (Z: ended, but not yet reaped by its parent) and its start time; Linux only."""
    with suppress(OSError):
        # The second field is the command's name in parentheses, which may contain any character.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    return None, None


def boot_id() -> str | None:
    """Return Linux's random id of the current boot, unique to this machine and boot; None on other systems."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def pid_namespace() -> str | None:
    """Return the name of this process's PID namespace; containers usually have their own. None on other systems."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return None
