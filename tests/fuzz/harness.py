"""Runs one case: a damaged copy of a sound input, a command on it, and a look at what has become of both."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from unittest import mock

from nemo_pvs.cli import main
from nemo_pvs.errors import UserError

_MEMORY = 2 << 30
"""Bytes that a case may take beyond what the process has; inputs are a few kilobytes."""
_SECONDS = 60


@dataclass(frozen=True)
class Subject:
    """A kind of input, and a command that reads it."""

    make: Callable[[Path], None]
    """Writes a sound input into an empty folder."""
    damage: Callable[[Random, Path], None]
    """Damages a copy of it."""
    command: Callable[[Random, Path, Path], Sequence[object]]
    """Returns arguments of ``pvs`` from the folder with the input and the path of a target."""
    check: Callable[[Path, Path], None] = lambda sound, out: None
    """Asserts of a finished target, beside the sound input, whatever must be true."""


class Workshop:
    """The sound inputs, made once, and room for cases."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def run(self, name: str, subject: Subject, seed: int) -> bool:
        """Return whether the case was done; False if it was refused.

        Raises:
            AssertionError: with the command that repeats the case, and what is wrong.
        """
        sound, case = self._sound(name, subject), self._folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        random = Random(f"{name} {seed}")
        shutil.copytree(sound, case / "input", symlinks=True)
        subject.damage(random, case / "input")
        before = _tree(case)
        arguments = [str(argument) for argument in subject.command(random, case / "input", case / "out")]
        try:
            sentence = _run(arguments)
            if sentence is None:
                subject.check(sound, case / "out")
                return True
            assert "\n" not in sentence.strip(), f"more than a sentence: {sentence}"
            assert _tree(case) == before, f"left behind: {sorted({*_tree(case)} ^ {*before})}"
            return False
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            raise AssertionError(
                f"python -m tests.fuzz {name} --seed {seed}\npvs {' '.join(arguments)}\n{traceback.format_exc()}"
            ) from None

    def _sound(self, name: str, subject: Subject) -> Path:
        if name not in self._made:
            folder = self._folder / name
            folder.mkdir(parents=True)
            subject.make(folder)
            self._made[name] = folder
        return self._made[name]


def _run(arguments: list[str]) -> str | None:
    """Run ``pvs`` in this process; return the sentence of a refusal."""
    # Nothing here is about power failures, and waiting for the disk takes most of the time.
    no_waiting = mock.patch.object(os, "fsync")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), _limits(), no_waiting:
        try:
            main.app(arguments, standalone_mode=False)
        except UserError as error:
            return str(error)
    return None


@contextmanager
def _limits() -> Iterator[None]:
    """Make a case that takes gigabytes or minutes fail."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"more than {_SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + _MEMORY, limits[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def _tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))
