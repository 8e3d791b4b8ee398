"""Locks of folders: real processes, kill -9, and other machines as a lock file looks that they have left."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.system import folder_lock
from nemo_pvs.system.files import whole_folder, write_text
from nemo_pvs.system.folder_lock import locked_folder, locked_target
from tests.conftest import cases
from tests.system.lock_holder import holder


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(folder_lock, "DEAD_SECONDS", 1.5)
    monkeypatch.setattr(folder_lock, "_SECONDS_TO_WRITE", 0.1)


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another command that works in a folder until it is told something."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(holder(*arguments, **options))


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*")}


def test_the_second_is_told_who_is_at_work_and_touches_nothing(hold, tmp_path):
    first = hold(tmp_path / "run")
    before = _files(tmp_path)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "run"))) as refused, locked_folder(tmp_path / "run"):
        pytest.fail("two at work")
    for word in (f"process {first.pid}", os.uname().nodename, "-c locked_folder", time.strftime("%Y-")):
        assert word in str(refused.value)
    assert _files(tmp_path) == before
    first.communicate("end\n")
    with locked_folder(tmp_path / "run"):
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert not (tmp_path / "run").exists(), "nothing was written, and nothing is left"


def test_a_lock_beside_its_target(hold, tmp_path):
    first = hold(tmp_path / "model", "locked_target")
    with pytest.raises(UserError, match="model is in use by"), locked_target(tmp_path / "model"):
        pytest.fail("two at work")
    first.communicate("end\n")
    assert not list(tmp_path.iterdir())


def test_after_kill_9_the_next_one_begins_at_once(hold, tmp_path):
    first = hold(tmp_path)
    first.send_signal(signal.SIGKILL)  # and its parent, this test, does not ask how it ended: it stays as a zombie
    began = time.monotonic()
    while True:
        try:
            with locked_folder(tmp_path):
                break
        except UserError:  # the signal has not arrived
            assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_ends_the_holder_as_ever_and_its_lock(hold, tmp_path, number):
    first = hold(tmp_path)
    first.send_signal(number)
    assert first.wait(10) == -number
    assert not list(tmp_path.iterdir())


def test_locks_may_be_released_in_any_order(tmp_path):
    """As those of jobs that are trained side by side, of which the first to start may be the first to end."""
    before = signal.getsignal(signal.SIGHUP)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(locked_folder(tmp_path / "first"))
        second.enter_context(locked_folder(tmp_path / "second"))
        first.close()
        assert signal.getsignal(signal.SIGHUP) == folder_lock._release_and_end
        assert (tmp_path / "second" / ".lock").exists()
    assert signal.getsignal(signal.SIGHUP) == before == signal.SIG_DFL


def test_a_mistake_removes_the_lock(hold, tmp_path):
    first = hold(tmp_path)
    assert "a mistake" in first.communicate("fail\n")[1]
    assert not list(tmp_path.iterdir())


def test_a_command_may_enter_its_own_lock_again_and_so_may_those_that_it_starts(hold, tmp_path):
    with locked_folder(tmp_path / "run"):
        with locked_folder(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / ".lock").exists()
    first = hold(tmp_path / "other")
    assert "child in" in first.communicate("child\n")[0]


def test_a_forked_child_does_not_remove_the_lock_of_its_parent(tmp_path):
    with locked_folder(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=_terminate_myself)
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGTERM
        assert (tmp_path / ".lock").exists()


def _terminate_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)


def _leave(file: Path, seconds_ago: float = 0.0, **overrides: Any) -> None:
    """Write a lock as another machine may have left it, by the clock of the file system."""
    here = folder_lock._Holder.current()
    values = {**here.__dict__, "id": "0123456789abcdef", "host": "elsewhere", "boot": "another", **overrides}
    file.write_text(json.dumps(values))
    os.utime(file, (file.stat().st_mtime - seconds_ago,) * 2)


@contextmanager
def _touched(file: Path) -> Iterator[None]:
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(file)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()


def test_another_process_of_the_same_number_does_not_hold_the_lock(tmp_path):
    here = folder_lock._Holder.current()
    _leave(tmp_path / ".lock", host=here.host, boot=here.boot, started=here.started - 1)
    with locked_folder(tmp_path):
        pass
    _leave(tmp_path / ".lock", host=here.host, boot=here.boot)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"), locked_folder(tmp_path):
        pytest.fail("its holder runs")


def test_a_machine_that_was_silent_for_long_is_dead(tmp_path, capsys):
    _leave(tmp_path / ".lock", seconds_ago=2.0)
    with locked_folder(tmp_path):
        assert "watching" not in capsys.readouterr().out
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_machine_is_watched_until_it_was_silent_for_long(tmp_path, capsys):
    _leave(tmp_path / ".lock")
    began = time.monotonic()
    with locked_folder(tmp_path):
        assert time.monotonic() - began > 1
    assert "on elsewhere" in capsys.readouterr().out


def test_a_machine_that_gives_a_sign_of_life_is_at_work(tmp_path):
    _leave(tmp_path / ".lock", job="42")
    refused = pytest.raises(UserError, match="on elsewhere in job 42, since")
    with _touched(tmp_path / ".lock"), refused, locked_folder(tmp_path):
        pytest.fail("two at work")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_clock_of_this_machine_does_not_matter(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    _leave(tmp_path / ".lock", seconds_ago=2.0)
    with locked_folder(tmp_path):
        pass
    assert "watching" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_requeued_job_takes_over_from_its_earlier_self_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _leave(tmp_path / ".lock", job="42", restarts=0)
    with _touched(tmp_path / ".lock"), locked_folder(tmp_path):
        pass
    for other in ({"job": "43", "restarts": 0}, {"job": "42", "restarts": 1}, {"job": None, "restarts": 0}):
        _leave(tmp_path / ".lock", **other)
        with _touched(tmp_path / ".lock"), pytest.raises(UserError), locked_folder(tmp_path):
            pytest.fail("two at work")


@pytest.mark.slow
def test_a_lock_that_says_nothing_counts_while_it_is_touched(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1')
    with _touched(tmp_path / ".lock"), pytest.raises(UserError, match="an unknown command"), locked_folder(tmp_path):
        pytest.fail("two at work")
    with locked_folder(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_one_that_was_killed_while_it_took_over_is_succeeded_too(tmp_path):
    here = folder_lock._Holder.current()
    gone = {"host": here.host, "boot": here.boot, "started": here.started - 1}
    _leave(tmp_path / ".lock", id="a", **gone)
    _leave(tmp_path / ".lock.after-a", id="b", **gone)
    with locked_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    _leave(tmp_path / ".lock", id="a", **gone)
    _leave(tmp_path / ".lock.after-a", id="b", host=here.host, boot=here.boot)
    with pytest.raises(UserError, match="in use by"), locked_folder(tmp_path):
        pytest.fail("the one that takes over runs")


def _contend(barrier: Any, folder: Path, results: Any) -> None:
    barrier.wait()
    try:
        with locked_folder(folder):
            try:
                descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                results.put("two at work")
                return
            os.close(descriptor)
            time.sleep(0.05)
            (folder / "inside").unlink()
            results.put("worked")
    except UserError:
        results.put("refused")


@pytest.mark.slow
@pytest.mark.parametrize("left", ["nothing", "a dead process", "a dead machine"])
def test_of_many_that_wake_at_once_one_at_a_time_is_at_work(tmp_path, left):
    fork = multiprocessing.get_context("fork")
    here = folder_lock._Holder.current()
    for attempt in range(cases(4)):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if left == "a dead process":
            _leave(folder / ".lock", host=here.host, boot=here.boot, started=here.started - 1)
        elif left == "a dead machine":
            _leave(folder / ".lock", seconds_ago=5.0)
        barrier, results = fork.Barrier(6), fork.SimpleQueue()
        processes = [fork.Process(target=_contend, args=(barrier, folder, results)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        said = [results.get() for _ in processes]
        assert "worked" in said
        assert "two at work" not in said
        assert not list(folder.iterdir())


def test_one_that_was_taken_for_dead_stops_and_leaves_everything_to_its_successor(hold, tmp_path):
    first = hold(tmp_path)
    _leave(tmp_path / "new", id="b")
    os.replace(tmp_path / "new", tmp_path / ".lock")
    assert first.wait(10) == 1
    assert "gave no sign of life" in first.stderr.read()
    assert json.loads((tmp_path / ".lock").read_text())["id"] == "b"


def test_the_end_of_a_lock_that_is_being_taken_over_leaves_it(hold, tmp_path):
    first = hold(tmp_path, beat=100)
    id_ = json.loads((tmp_path / ".lock").read_text())["id"]
    _leave(tmp_path / f".lock.after-{id_}", id="b")
    first.communicate("end\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", f".lock.after-{id_}"]


@pytest.mark.slow
def test_a_holder_touches_its_lock(hold, tmp_path):
    hold(tmp_path)
    before = (tmp_path / ".lock").stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / ".lock").stat().st_mtime_ns > before


def test_where_no_folder_can_be_made_one_sentence_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file"), locked_folder(tmp_path / "file" / "run"):
        pytest.fail("below a file")


def test_two_writers_of_one_folder(hold, tmp_path):
    """The second must not remove what the first is writing."""
    first = hold(tmp_path / "model", "locked_target")
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "weights").write_text("half")
    with pytest.raises(UserError, match="in use by"), whole_folder(tmp_path / "model", overwrite=True):
        pytest.fail("two writers")
    assert (tmp_path / ".model.partial" / "weights").read_text() == "half"
    first.communicate("end\n")
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_file(tmp_path):
    def write() -> None:
        for _ in range(100):
            write_text(tmp_path / "file", "x" * 10_000)

    failed: list[BaseException] = []
    threading.excepthook, hook = lambda about: failed.append(about.exc_value), threading.excepthook
    try:
        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threading.excepthook = hook
    assert not failed
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_forked_child_is_ended_by_signals_at_once(tmp_path):
    """A handler of Python's would not run while the child waits for a semaphore, as workers of a pool do."""
    with folder_lock.locked_folder(tmp_path):
        handled = [number for number in folder_lock._SIGNALS if signal.getsignal(number) != signal.SIG_DFL]
        assert signal.SIGTERM in handled
        child = os.fork()
        if not child:
            os._exit(sum(signal.getsignal(number) != signal.SIG_DFL for number in handled))
        assert os.waitpid(child, 0)[1] == 0
        assert all(signal.getsignal(number) != signal.SIG_DFL for number in handled), (
            "the holder still removes its lock"
        )


def test_a_lock_is_complete_as_soon_as_it_exists(tmp_path, monkeypatch):
    """A process that is killed while writing it leaves no lock that others would watch for two minutes."""
    file, seen = tmp_path / "lock", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(file.exists()), fsync(descriptor)))
    assert folder_lock._create(file, folder_lock._Holder.current())
    assert seen == [False]
    assert folder_lock._read(file).holder is not None
    assert not folder_lock._create(file, folder_lock._Holder.current())
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_file_system_without_nameless_files_has_locks_too(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("not here")

    monkeypatch.setattr(os, "link", refuse)
    assert folder_lock._create(tmp_path / "lock", folder_lock._Holder.current())
    assert not folder_lock._create(tmp_path / "lock", folder_lock._Holder.current())
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
