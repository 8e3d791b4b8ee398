"""Folder locks: one command at a time works in a folder, even on shared file systems and after ``kill -9``.

A lock is a small file that describes its holder, which touches it every few seconds. A process that finds a lock
decides whether the holder is dead: on the same machine by the holder's process, on another by whether the file is
still being touched.

Libraries do most of this, but not on the file systems of clusters: filelock's lease replaces a dead lock by
RENAME_EXCHANGE, which NFS and Lustre refuse, and with flufl.lock two processes can break the same lock at once. Here a
dead lock is succeeded, not removed: the successor's file is named after the random id of the lock that it succeeds.
``O_EXCL``, which these file systems support, lets only one successor win, and a new lock is never mistaken for the old
one.
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
from typing import Any, TextIO

from nemo_pvs.errors import UserError
from nemo_pvs.system.processes import boot_id, is_running, pid_namespace, start_time
from nemo_pvs.system.progress import console

BEAT_SECONDS = 10.0
"""Interval at which a holder touches its lock."""
DEAD_SECONDS = 120.0
"""A holder on another machine that has not touched its lock for this long is considered dead."""

_HELD = "PVS_HELD_LOCKS"
"""Environment variable with the ids of locks held by this process or its ancestors, which do not block it."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SECONDS_TO_WRITE = 2.0
"""A lock that is still incomplete after this time is not just being written."""


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder that is filled over time. It is created if necessary, because the lock is in it.

    Raises:
        UserError: another command is working there, or the folder cannot be created.
    """
    with _locked(folder, folder / ".lock"):
        yield


@contextmanager
def locked_target(target: Path) -> Iterator[None]:
    """Lock a file or folder that does not exist until it is finished. The lock is next to it.

    Raises:
        UserError: another command is writing it, or its parent folder cannot be created.
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
            raise UserError(f"Cannot write {what}: {error.strerror}; choose another path.") from None
        if lock is None:  # held by this process or one of its ancestors
            yield
            return
        with _kept(base, lock):
            yield
    finally:
        with suppress(OSError):
            for folder in missing:  # innermost first; stops at the first that is not empty
                folder.rmdir()


@dataclass(frozen=True)
class _Holder:
    """The process that holds a lock, as described in the lock file."""

    id: str
    host: str
    boot: str | None
    """Changes at every boot, and differs between machines with the same host name."""
    namespace: str | None
    """Where process ids are valid: a container, or the whole machine."""
    pid: int
    started: int | None
    """When the process started; distinguishes it from a later one with the same id."""
    job: str | None
    restarts: int
    """How often Slurm has requeued that job."""
    since: str
    command: str

    @classmethod
    def current(cls) -> _Holder:
        """Describe this process."""
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
        """Return whether process ids mean the same processes for both."""
        mine, theirs = ((holder.host, holder.boot, holder.namespace) for holder in (self, other))
        return mine == theirs

    def is_requeued(self, earlier: _Holder) -> bool:
        """Return whether this process belongs to a later start of the same Slurm job as ``earlier``."""
        return self.job is not None and self.job == earlier.job and earlier.restarts < self.restarts

    def __str__(self) -> str:
        job = f" in job {self.job}" if self.job else ""
        return f"`{self.command}` (process {self.pid} on {self.host}{job}, since {self.since})"


@dataclass(frozen=True)
class _Lock:
    """A lock file as it was read."""

    file: Path
    id: str
    holder: _Holder | None
    """None if the file's content is unreadable."""
    touched: float
    """Modification time by the file system's clock, in seconds."""

    @property
    def who(self) -> str:
        return str(self.holder) if self.holder else "an unknown command"


def _acquire(what: Path, base: Path) -> str | None:
    """Create the lock ``base``, or succeed a dead one.

    Returns:
        The lock's id; None if this process or one of its ancestors holds it already.
    """
    me = _Holder.current()
    while True:
        chain = _chain(base)
        file = base
        if chain:
            last = chain[-1]
            if last.id in os.environ.get(_HELD, "").split():
                return None
            if not _is_dead(last, me):
                if _read(last.file) is None:
                    continue  # it was released in the meantime, or was renamed to the start of the chain
                raise UserError(
                    f"{what} is in use by {last.who}; wait until it ends, stop it, or choose another path."
                )
            file = _successor(base, last.id)
        if not _create(file, me):
            continue  # another process was faster
        chain = _chain(base)
        if not chain or chain[-1].id != me.id:
            file.unlink(missing_ok=True)  # the lock to succeed no longer exists
            continue
        os.replace(file, base)
        for stale in base.parent.glob(f"{base.name}.after-*"):
            if stale != _successor(base, me.id):
                stale.unlink(missing_ok=True)
        return me.id


def _chain(base: Path) -> list[_Lock]:
    """Return the lock, its successor, the successor's successor, and so on; the last one is in force."""
    chain: list[_Lock] = []
    file = base
    while (lock := _read(file)) is not None:
        chain.append(lock)
        file = _successor(base, lock.id)
    return chain


def _successor(base: Path, id_: str) -> Path:
    return base.with_name(f"{base.name}.after-{id_}")


def _create(file: Path, holder: _Holder) -> bool:
    """Create a lock file and return True, or return False if it exists."""
    text = json.dumps(asdict(holder))
    try:
        return _create_at_once(file, text)
    except OSError:  # shared file systems have no files without a name
        pass
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as handle:
            _write(handle, text)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return True


def _create_at_once(file: Path, text: str) -> bool:
    """Create a lock file that is complete whenever it exists: a process that is killed while writing leaves nothing.

    Raises:
        OSError: the file system cannot do that.
    """
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        descriptor = os.open(file.parent, os.O_WRONLY | os.O_TMPFILE, 0o644)
        with os.fdopen(descriptor, "w") as handle:
            _write(handle, text)
            try:
                os.link(f"/proc/self/fd/{descriptor}", file, src_dir_fd=folder)  # with a folder it follows the link
            except FileExistsError:
                return False
        return True
    finally:
        os.close(folder)


def _write(handle: TextIO, text: str) -> None:
    handle.write(text)
    handle.flush()
    os.fsync(handle.fileno())


def _read(file: Path) -> _Lock | None:
    """Return a lock, or None if there is none; wait for one that is just being written."""
    deadline = time.monotonic() + _SECONDS_TO_WRITE
    while True:
        try:
            # On shared file systems, opening a file fetches its current state from the server; stat alone does not.
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
    """Return whether the holder of a lock is dead; a holder on another machine is watched until that is certain."""
    holder = lock.holder
    if holder and me.is_requeued(holder):
        return True
    if holder and me.shares_processes_with(holder):
        return not is_running(holder.pid, holder.started)
    remaining = min(DEAD_SECONDS, DEAD_SECONDS - (_file_system_time(lock.file.parent) - lock.touched))
    if remaining <= 0:
        return True
    console.print(f"watching {lock.who} for a sign of life, for {remaining:.0f} s", soft_wrap=True)
    deadline = time.monotonic() + remaining
    while time.monotonic() < deadline:
        time.sleep(min(1.0, remaining / 10))
        now = _read(lock.file)
        if now is None or (now.id, now.touched) != (lock.id, lock.touched):
            return False
    return True


def _file_system_time(folder: Path) -> float:
    """Return the current time by the file system's clock, which on a server may differ from this machine's."""
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
            # A process that considers this one dead creates the same file, and only one of the two can.
            successor = _successor(base, lock)
            try:
                ours = _create(successor, _Holder.current())
            except OSError:  # the disk is full
                ours = _chain(base)[-1].id == lock
            if ours:
                base.unlink()
                successor.unlink(missing_ok=True)

    def beat() -> None:
        while not ended.wait(BEAT_SECONDS):
            with suppress(OSError), touching:  # a file server may be unavailable for a while
                if ended.is_set():
                    return
                chain = _chain(base)
                if not chain or chain[-1].id != lock:
                    _stop_at_once(base)
                os.utime(base)

    os.environ[_HELD] = f"{os.environ.get(_HELD, '')} {lock}".strip()
    _releases.append(release)
    _handle_signals()
    try:
        threading.Thread(target=beat, daemon=True).start()
        yield
    finally:
        release()
        _releases.remove(release)
        _handle_signals()
        os.environ[_HELD] = " ".join(id_ for id_ in os.environ[_HELD].split() if id_ != lock)


_releases: list[Callable[[], None]] = []
"""Functions to call before a signal ends this process."""


def _handle_signals() -> None:
    """While there are locks, remove them before a signal that nothing else handles ends this process.

    Locks may be released in any order. Python lets only the main thread handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if not _releases:
        _handle_nothing()
        return
    for number in _SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _release_and_end)
            _handled.add(number)


def _release_and_end(number: int, _: Any) -> None:
    for release in reversed(_releases):
        release()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


_handled: set[int] = set()
"""Signals that ``_release_and_end`` handles in this process."""


def _handle_nothing() -> None:
    """Give these signals their default effect, for a process without locks, such as a forked child.

    Python calls a handler only when it runs bytecode: a worker that SIGTERM reaches just before it waits for a
    semaphore would wait forever, and with it whoever terminates a pool of such workers, as lm-eval does.
    """
    for number in _handled:
        signal.signal(number, signal.SIG_DFL)
    _handled.clear()


os.register_at_fork(after_in_child=_handle_nothing)


def _stop_at_once(base: Path) -> None:
    """End this process without cleaning up, which would destroy another command's work; its children end with it."""
    print(
        f"pvs: the lock {base} was removed, or another command took it over because this one gave no sign of life for "
        f"{DEAD_SECONDS:.0f} s; this one stops.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
