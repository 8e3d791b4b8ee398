"""One command at a time in a folder, also on file systems that several machines share, and after ``kill -9``.

A lock is a small file that says who works there; its holder touches it every few seconds. Whoever finds one decides
whether the holder is dead: on the same machine by its process, on another by a file that nobody touches any more.

Libraries do most of this, but not on the file systems of clusters: filelock's lease replaces a dead lock by
RENAME_EXCHANGE, which NFS and Lustre refuse, and with flufl.lock two processes can break the same lock at once. Here a
dead lock is succeeded, not removed: the successor's file is named after the random id of the lock that it succeeds.
``O_EXCL``, which these file systems do have, lets one successor win, and nobody takes a new lock for the old one.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.system.processes import boot_id, is_running, pid_namespace, start_time
from nemo_pvs.system.progress import console

BEAT_SECONDS = 10.0
"""How often a holder touches its lock."""
DEAD_SECONDS = 120.0
"""A holder on another machine that has not touched its lock for so long is dead."""

_HELD = "PVS_HELD_LOCKS"
"""Variable with the ids of locks of this process and of those that started it: they do not keep it out."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SECONDS_TO_WRITE = 2.0
"""A lock that has been empty for longer is not just being written."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Work alone in a folder that is filled over time. It is made if need be, because the lock lies in it.

    Raises:
        UserError: another command is at work there, or the folder cannot be made.
    """
    with _locked(folder, folder / ".lock"):
        yield


@contextmanager
def locked_target(target: Path) -> Iterator[None]:
    """Work alone on a file or folder that is not there until it is finished. The lock lies beside it.

    Raises:
        UserError: another command is making it, or the folder around it cannot be made.
    """
    with _locked(target, target.with_name(f".{target.name}.lock")):
        yield


@contextmanager
def _locked(what: Path, base: Path) -> Iterator[None]:
    missing = [folder for folder in (base.parent, *base.parent.parents) if not folder.exists()]
    try:
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            lock = _acquire(what, base)
        except OSError as error:
            raise UserError(f"Cannot write {what}: {error.strerror}; choose another place.") from None
        if lock is None:  # it belongs to a command that this one is a part of
            yield
            return
        with _kept(base, lock):
            yield
    finally:
        with suppress(OSError):
            for folder in missing:  # the innermost first, and no further than where something has been written
                folder.rmdir()


@dataclass(frozen=True)
class _Holder:
    """What a lock says about the process that holds it."""

    id: str
    host: str
    boot: str | None
    """Another one after every start of a machine, and for machines that share a name."""
    namespace: str | None
    """Where process numbers are valid: a container, or the whole machine."""
    pid: int
    started: int | None
    """When the process started; tells it from a later one with the same number."""
    job: str | None
    restarts: int
    """How often Slurm had requeued that job."""
    since: str
    command: str

    @classmethod
    def here(cls) -> _Holder:
        """Return what this process writes into a lock."""
        return cls(
            id=secrets.token_hex(8),
            host=socket.gethostname(),
            boot=boot_id(),
            namespace=pid_namespace(),
            pid=os.getpid(),
            started=start_time(os.getpid()),
            job=os.environ.get("SLURM_JOB_ID"),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        )

    def shares_processes_with(self, other: _Holder) -> bool:
        """Return whether the process numbers of both mean the same processes."""
        mine, its = ((one.host, one.boot, one.namespace) for one in (self, other))
        return mine == its

    def is_requeued(self, earlier: _Holder) -> bool:
        """Return whether Slurm has ended the other one to start the same job again as this one."""
        return self.job is not None and self.job == earlier.job and earlier.restarts < self.restarts

    def __str__(self) -> str:
        job = f" in job {self.job}" if self.job else ""
        return f"`{self.command}` (process {self.pid} on {self.host}{job}, since {self.since})"


@dataclass(frozen=True)
class _Lock:
    """A lock as it was found or made."""

    file: Path
    id: str
    holder: _Holder | None
    """None where the file has no content that can be read."""
    touched: float
    """By the clock of the file system."""

    @property
    def who(self) -> str:
        return str(self.holder) if self.holder else "an unknown command"


def _acquire(what: Path, base: Path) -> str | None:
    """Make the lock ``base``, or succeed to a dead one.

    Returns:
        Its id; None if this process has it already, or one that has started this one.
    """
    me = _Holder.here()
    while True:
        chain = _chain(base)
        file = base
        if chain:
            last = chain[-1]
            if last.id in os.environ.get(_HELD, "").split():
                return None
            if not _is_dead(last, me):
                if _read(last.file) is None:
                    continue  # it has ended meanwhile, or has become the first of the chain
                raise UserError(
                    f"{what} is in use by {last.who}; wait until that has ended, or end it, or choose another place."
                )
            file = _successor(base, last.id)
        if not _create(file, me):
            continue  # another one was faster
        chain = _chain(base)
        if not chain or chain[-1].id != me.id:
            file.unlink(missing_ok=True)  # what it was to succeed is gone
            continue
        os.replace(file, base)
        for left in base.parent.glob(f"{base.name}.after-*"):
            if left != _successor(base, me.id):
                left.unlink(missing_ok=True)
        return me.id


def _chain(base: Path) -> list[_Lock]:
    """Return the lock, its successor, the successor's successor, and so on; the last one counts."""
    chain: list[_Lock] = []
    file = base
    while (found := _read(file)) is not None:
        chain.append(found)
        file = _successor(base, found.id)
    return chain


def _successor(base: Path, id_: str) -> Path:
    return base.with_name(f"{base.name}.after-{id_}")


def _create(file: Path, holder: _Holder) -> bool:
    """Write a lock and return True, or return False where there is one."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(json.dumps(asdict(holder)))
            handle.flush()
            os.fsync(handle.fileno())
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return True


def _read(file: Path) -> _Lock | None:
    """Return a lock, or None where there is none; wait for one that is just being written."""
    deadline = time.monotonic() + _SECONDS_TO_WRITE
    while True:
        try:
            # Opening a file asks the server of a shared file system what is true now; looking at its status does not.
            with open(file) as handle:
                text, touched = handle.read(), os.fstat(handle.fileno()).st_mtime
            holder = _Holder(**json.loads(text))
            return _Lock(file, holder.id, holder, touched)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            if time.monotonic() > deadline:
                return _Lock(file, f"unreadable-{file.name.rpartition('-')[2].strip('.')}", None, touched)
            time.sleep(0.05)


def _is_dead(lock: _Lock, me: _Holder) -> bool:
    """Return whether the holder of a lock is dead; one on another machine is watched until that is clear."""
    holder = lock.holder
    if holder and me.is_requeued(holder):
        return True
    if holder and me.shares_processes_with(holder):
        return not is_running(holder.pid, holder.started)
    left = min(DEAD_SECONDS, DEAD_SECONDS - (_file_system_time(lock.file.parent) - lock.touched))
    if left <= 0:
        return True
    console.print(f"watching {lock.who} for a sign of life, for {left:.0f} s", soft_wrap=True, markup=False)
    deadline = time.monotonic() + left
    while time.monotonic() < deadline:
        time.sleep(min(1.0, left / 10))
        now = _read(lock.file)
        if now is None or (now.id, now.touched) != (lock.id, lock.touched):
            return False
    return True


def _file_system_time(folder: Path) -> float:
    """Return the time that a file system gives to files which are written now; a server has a clock of its own."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"now")
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_mtime


@contextmanager
def _kept(base: Path, lock: str) -> Iterator[None]:
    """Touch this process's lock until the block ends; remove it then, or when a signal ends the process."""
    ended, touching = threading.Event(), threading.Lock()
    owner = os.getpid()

    def release() -> None:
        if os.getpid() != owner or ended.is_set():  # a forked child leaves its parent's lock alone
            return
        ended.set()
        with suppress(OSError), touching:
            # Whoever takes us for dead has to make this file, too, and only one of us can.
            successor = _successor(base, lock)
            try:
                ours = _create(successor, _Holder.here())
            except OSError:  # the disk is full
                ours = _chain(base)[-1].id == lock
            if ours:
                base.unlink()
                successor.unlink(missing_ok=True)

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError), touching:  # a server that is away for a while comes back
                if ended.is_set():
                    return
                chain = _chain(base)
                if not chain or chain[-1].id != lock:
                    _stop_at_once(base)
                os.utime(base)

    os.environ[_HELD] = f"{os.environ.get(_HELD, '')} {lock}".strip()
    _releases.append(release)
    try:
        with _released_by_signals():
            threading.Thread(target=beat, daemon=True).start()
            yield
    finally:
        release()
        _releases.remove(release)
        os.environ[_HELD] = " ".join(one for one in os.environ[_HELD].split() if one != lock)


_releases: list[Callable[[], None]] = []
"""What to call before a signal ends this process."""


@contextmanager
def _released_by_signals() -> Iterator[None]:
    """Remove the locks of this process before it is ended by a signal that nothing else handles."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: Any) -> None:
        for release in reversed(_releases):
            release()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    mine = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _stop_at_once(base: Path) -> None:
    """End this process and, with it, its children: even tidying up would destroy what another command now makes."""
    print(
        f"pvs: the lock {base} was removed, or another command took it over because this one gave no sign of life for "
        f"{DEAD_SECONDS:.0f} s; this one stops.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
