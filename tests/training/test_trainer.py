"""Several jobs at a time: what each launcher gets of the machine, what fails and what stops, without NeMo."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.megatron import launch
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system import progress
from nemo_pvs.training import job_progress, metrics, trainer
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.job_progress import AllJobs, heading
from nemo_pvs.training.launcher import rank_memory, share_of_machine
from nemo_pvs.training.machine import H100, Machine, check_here
from nemo_pvs.training.trainer import PreemptedError, Trainer
from tests.system.lock_holder import holder

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("devices", "visible", "launchers", "shares"),
    [
        (0, None, 2, [None, None]),
        (8, None, 2, ["0,1,2,3", "4,5,6,7"]),
        (4, "7,5,GPU-3f,1", 2, ["7,5", "GPU-3f,1"]),
        (2, "3,2,99,0", 2, ["3", "2"]),  # CUDA stops at 99, which is none of this machine's
        (3, None, 2, ["0", "1"]),
        (1, None, 1, ["0"]),
    ],
)
def test_every_launcher_has_its_own_gpus_and_one_thread(monkeypatch, devices, visible, launchers, shares):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for number, share in enumerate(shares):
        expected = _ONE_THREAD if share is None else {**_ONE_THREAD, "CUDA_VISIBLE_DEVICES": share}
        assert share_of_machine(number, launchers) == expected


def test_a_launcher_keeps_freed_memory_on_a_cpu(monkeypatch, tmp_path):
    """What the user sets counts."""
    started: list[dict[str, str]] = []
    monkeypatch.setattr(trainer.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    for devices in (0, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        trainer._launch(tmp_path / "log", {})
    on_cpu, on_gpu = started
    assert on_cpu["MALLOC_MMAP_MAX_"] == "7"
    assert int(on_cpu["MALLOC_TRIM_THRESHOLD_"]) > 1e12
    assert "MALLOC_TRIM_THRESHOLD_" not in on_gpu
    assert rank_memory() == {}


def test_ranks_must_fit_the_share_of_the_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(Machine, "here", lambda: H100)
    training = _job(tmp_path, "arm").training

    def check(ranks: int, jobs: int | None = None) -> None:
        check_here("arm", Parallelism(tensor_parallel=ranks), training, jobs)

    check(2, 2)
    check(3, 1)
    check(3)
    with pytest.raises(UserError, match="arm needs 3 ranks, but with --jobs 2 it gets 2 of this machine's GPUs"):
        check(3, 2)
    with pytest.raises(UserError, match="arm needs 1 ranks, but with --jobs 5 it gets 0 of this machine's GPUs"):
        check(1, 5)
    with pytest.raises(UserError, match=r"this machine has 4 GPUs; .* --launch"):
        check(8)
    monkeypatch.setattr(Machine, "here", lambda: replace(H100, gpu=False))
    check(8)  # ranks share a CPU


def _job(folder: Path, name: str, **layout: int) -> TrainingJob:
    training = Training(tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4)
    return TrainingJob(name, folder / name, folder / "initial", {}, Parallelism(**layout), training)


def _environment(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if entry)


def test_a_launcher_has_one_thread_only_if_it_shares_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    started = []
    for jobs in (None, 1):
        with Trainer(tmp_path / "launcher.log", jobs) as running:
            process = running._free_launcher()._process
            started.append(_environment(process.pid)["OMP_NUM_THREADS"])
        assert process.poll() == -signal.SIGKILL, "the launcher outlived the trainer"
    assert started == ["7", "1"]


class _Ranks:
    """In place of a launcher's process: ends each job as ``ends`` says, by the job's name, after ``seconds``."""

    def __init__(self, ends: dict[str, str], seconds: float) -> None:
        self.ends, self.seconds = ends, seconds
        self.events: list[str] = []

    def launch(self, log: Path, share: dict[str, str]) -> _Process:
        return _Process(self)

    def most_at_once(self) -> int:
        running = most = 0
        for event in self.events:
            running += 1 if event.startswith("start") else -1
            most = max(most, running)
        return most


class _Process:
    def __init__(self, ranks: _Ranks) -> None:
        self._ranks = ranks
        read, write = os.pipe()
        self.stdin = self
        self.stdout = os.fdopen(read)
        self._answers = os.fdopen(write, "w")
        self._signalled = threading.Event()

    def write(self, text: str) -> None:
        if text.strip():
            threading.Thread(target=self._train, args=(Path(text.strip()).parent.name,)).start()

    def flush(self) -> None:
        pass

    def _train(self, name: str) -> None:
        self._ranks.events.append(f"start {name}")
        # What fails does so at once, so that a busy machine does not let others end before it.
        fails = self._ranks.ends[name] not in ("0", "done")
        stopped = self._signalled.wait(0 if fails else self._ranks.seconds)
        self._ranks.events.append(f"end {name}")
        print("75" if stopped else self._ranks.ends[name], file=self._answers, flush=True)

    def send_signal(self, number: int) -> None:
        self._signalled.set()

    def kill(self) -> None:
        pass

    def wait(self) -> None:
        self._answers.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., _Ranks]:
    """Train nothing: jobs end as their launchers answer, and those that answer 0 have their checkpoint."""

    def pretend(seconds: float = 0.1, **ends: str) -> _Ranks:
        made = _Ranks(ends, seconds)
        done = {name for name, code in ends.items() if code == "done"}
        monkeypatch.setattr(trainer, "_launch", made.launch)
        monkeypatch.setattr(trainer, "_check_beginning", lambda job: None)
        monkeypatch.setattr(trainer, "with_manifest", lambda checkpoint: checkpoint)
        monkeypatch.setattr(trainer, "last_checkpoint", lambda job: job.checkpoints / "last")
        monkeypatch.setattr(
            trainer,
            "is_finished",
            lambda job: job.name in done or (f"end {job.name}" in made.events and ends[job.name] == "0"),
        )
        return made

    return pretend


def _train(folder: Path, names: str, at_once: int) -> list[Path]:
    with Trainer(folder / "launcher.log", at_once) as running:
        return running.train_all([_job(folder, name) for name in names])


def test_as_many_at_once_as_asked_in_order_and_finished_ones_not_again(tmp_path, ranks):
    made = ranks(a="0", b="done", c="0", d="0", e="0")
    checkpoints = _train(tmp_path, "abcde", 2)
    assert [path.relative_to(tmp_path).parts[0] for path in checkpoints] == list("abcde")
    assert [event for event in made.events if event.startswith("start")] == [f"start {name}" for name in "acde"]
    assert made.most_at_once() == 2
    assert not list(tmp_path.rglob(".lock*")), "a folder is still locked"


def test_a_log_says_how_far_all_jobs_are(tmp_path, ranks, monkeypatch):
    """Each job has 512 tokens; an earlier attempt ended after 128 tokens of one and 256 of the other."""
    log = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=log, width=200))
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(trainer, "_SECONDS_BETWEEN_LOOKS", 0.05)
    ranks(a="0", b="0", seconds=1)
    for name, steps in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        record = {"kind": "training", "step": steps, "tokens": 128 * steps, "loss": 5.0, "tokens_per_second": 64.0}
        metrics.append(_job(tmp_path, name).metrics, record)
    _train(tmp_path, "ab", 1)
    lines = log.getvalue().splitlines()
    assert any(line.startswith("  all 2 jobs: 384/1,024 tokens, ") and line.endswith("0 finished") for line in lines)
    assert any(line.startswith("  all 2 jobs: ") and line.endswith("1 finished") for line in lines)
    log.truncate(0)
    _train(tmp_path, "a", 1)
    assert "all 1 jobs" not in log.getvalue()


def test_time_left_of_all_jobs_by_what_was_done_since_the_start(tmp_path, monkeypatch):
    now = 100.0
    monkeypatch.setattr(job_progress.time, "monotonic", lambda: now)
    jobs = [_job(tmp_path, name) for name in "abc"]
    for job, steps in zip(jobs, (4, 2, 0), strict=True):
        job.folder.mkdir()
        if steps:
            metrics.append(job.metrics, {"kind": "training", "step": steps, "tokens": 128 * steps})
    shown: list[tuple[object, ...]] = []
    together = AllJobs(jobs, lambda *counts, **words: shown.append((*counts, words["note"], words["left"])))
    together.show(1)
    now += 10
    together.update(jobs[1], 384)  # 128 tokens in 10 s, and 640 are left
    together.show(1)
    assert shown == [(768, 1536, "1 finished", ""), (896, 1536, "1 finished", "50 s")]


def test_jobs_of_one_name_are_told_apart_by_their_runs(tmp_path):
    one, two, other = (_job(tmp_path / seed / "train", arm) for seed, arm in (("1", "a"), ("2", "a"), ("2", "b")))
    assert [heading(job, [one, two, other]) for job in (one, two, other)] == [
        "train a of 1",
        "train a of 2",
        "train b",
    ]


def test_one_that_fails_lets_the_others_end_and_is_named(tmp_path, ranks):
    made = ranks(a="1", b="0", c="0", seconds=2)
    with pytest.raises(TrainingError, match=r"^Training of a failed; the reason is at the end of \S+/a/log.txt.$"):
        _train(tmp_path, "abc", 2)
    assert sorted(made.events) == ["end a", "end b", "start a", "start b"], "c was started, or b was not waited for"
    ranks(a="1", b="0", c="2")
    with pytest.raises(TrainingError, match=r"Training of a failed; .*/a/log.txt. Training of c failed; .*/c/log.txt"):
        _train(tmp_path, "abc", 3)


def test_one_that_was_killed_says_so(tmp_path, ranks):
    ranks(a="-9")
    with pytest.raises(
        TrainingError, match=r"^Training of a was killed, probably because memory ran out; .*/a/log.txt.$"
    ):
        _train(tmp_path, "a", 1)


def test_one_that_another_command_trains_lets_the_others_end(tmp_path, ranks):
    made = ranks(a="0", b="0", c="0")
    with holder(tmp_path / "b") as other, pytest.raises(UserError, match=f"process {other.pid} on"):
        _train(tmp_path, "abc", 2)
    assert made.events == ["start a", "end a"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_reaches_every_launcher_and_starts_no_other_job(tmp_path, ranks, number):
    made = ranks(a="0", b="0", c="0", seconds=30)
    before = signal.getsignal(number)

    def send() -> None:
        while len(made.events) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(PreemptedError, match=r"^Training of a, b was asked to stop; ") as ended:
        _train(tmp_path, "abc", 2)
    assert ended.value.exit_code == 75
    assert sorted(made.events) == ["end a", "end b", "start a", "start b"]
    assert signal.getsignal(number) is before


def test_a_signal_before_the_first_job_starts_none(tmp_path, ranks, monkeypatch):
    made = ranks(a="0", b="0")
    monkeypatch.setattr(trainer, "_check_beginning", lambda job: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(PreemptedError):
        _train(tmp_path, "ab", 2)
    assert not made.events


def test_a_port_is_reserved_for_the_ranks_of_one_job():
    """Two jobs that start at the same time never get the same port, and rank 0 can listen on the one it gets."""
    import socket
    from datetime import timedelta

    from torch.distributed import TCPStore

    with launch._reserved_port() as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        store = TCPStore("127.0.0.1", port, 1, is_master=True, timeout=timedelta(seconds=20))
        store.set("rank", "0")
        assert store.get("rank") == b"0"
