"""Memory of this machine that a process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")


def available(root: Path = _ROOT) -> int:
    """Return how many bytes this process may still take: those of the machine, or of its control group if fewer.

    Files that the kernel caches count as free. Limits of control groups of version 1 are not read.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return min([left, *_of_groups(root)])


def _of_groups(root: Path) -> Iterator[int]:
    """Yield what each limit of this process's control group and of those around it leaves."""
    top = root / "sys/fs/cgroup"
    own = ""
    with suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
    group = top / own
    while group.is_relative_to(top):
        with suppress(OSError, ValueError):  # there is no such file at the top, and "max" is no limit
            limit = int((group / "memory.max").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = int(statistics["inactive_file"]) + int(statistics["active_file"])
            yield max(0, limit - int((group / "memory.current").read_text()) + cached)
        group = group.parent
