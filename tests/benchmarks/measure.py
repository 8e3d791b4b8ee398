"""Seconds and memory of a piece of work in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does, before PyTorch is imported


@dataclass(frozen=True)
class Measured:
    seconds: float
    cpu_seconds: float
    """Of the processor, in user and system mode, of the process and its children."""
    baseline: int
    """Resident bytes before the work: the interpreter and the libraries."""
    peak: int
    """Most resident bytes, baseline included."""


def measure(work: Callable[..., Any], *arguments: Any) -> Measured:
    """Run ``work`` in a fork of this process, which must be small and have no threads.

    Raises:
        RuntimeError: the work failed; what it said is on stderr.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(sender, work, arguments))
    child.start()
    sender.close()
    try:
        measured = receiver.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} failed") from None
    finally:
        child.join()
    return measured


def forget_cached(folder: Path) -> None:
    """Drop the pages of a folder's files from the page cache, so that the next reader reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _child(sender: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    baseline = _peak()
    begun = time.perf_counter()
    work(*arguments)
    sender.send(Measured(time.perf_counter() - begun, _cpu_seconds(), baseline, _peak()))


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
