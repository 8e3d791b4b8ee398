"""The launcher and its ranks as processes, without NeMo."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.megatron import launch
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.processes import is_running, start_time
from nemo_pvs.training.job import TrainingJob
from tests.system.lock_holder import holder


@pytest.fixture(name="job")
def job_fixture(tmp_path: Path) -> TrainingJob:
    training = Training(tokens=512, sequence_length=32, global_batch_size=4, learning_rate=1e-3, validation_samples=4)
    (tmp_path / "run").mkdir()
    return TrainingJob("arm", tmp_path / "run", tmp_path / "initial", {}, Parallelism(), training)


def _fork_and_wait(job: TrainingJob) -> None:
    """As Megatron's checkpoint writer, whose workers wait for their rank."""
    child = os.fork()
    if child:
        (job.folder / "child.part").write_text(str(child))
        (job.folder / "child.part").rename(job.folder / "child")
    signal.pause()


def test_what_a_rank_forks_does_not_outlive_it(job):
    rank = multiprocessing.get_context("fork").Process(target=launch._rank, args=(_fork_and_wait, job, 0, 0))
    rank.start()
    deadline = time.monotonic() + 10
    while not (job.folder / "child").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child = int((job.folder / "child").read_text())
    started = start_time(child)
    assert is_running(child, started)
    time.sleep(0.2)  # until it has asked Linux for this
    rank.kill()
    rank.join()
    _assert_ends(child, started, deadline)


def _assert_ends(process, started, deadline):
    """Wait for the end of a process; one that is still running at the deadline is killed."""
    while is_running(process, started) and time.monotonic() < deadline:
        time.sleep(0.01)
    outlived = is_running(process, started)
    if outlived:
        os.kill(process, signal.SIGKILL)
    assert not outlived


@pytest.mark.parametrize("locked", [True, False])
def test_a_rank_locks_the_folder_unless_what_started_it_has(job, monkeypatch, capsys, locked):
    """The launcher of a second job was started before the lock of its folder, and so does not know it."""
    trained, bound = [], []

    class Rank:
        train = staticmethod(trained.append)

    monkeypatch.setattr(launch, "_training", lambda: Rank)
    monkeypatch.setattr(launch, "forked_die_with_this", lambda: None)
    monkeypatch.setattr(launch, "die_with_parent", lambda: bound.append(True))
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    file = str(job.save())
    with holder(job.folder):
        code = launch.main(["--locked", file] if locked else [file])
    assert (code, len(trained)) == ((0, 1) if locked else (2, 0)), capsys.readouterr().err
    assert bool(bound) == locked, "a rank of our torchrun ends with it, and its launcher; any other does not"


def test_a_job_with_more_ranks_than_gpus_is_refused_before_it_starts(job, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr(launch, "_torchrun", lambda job: 0)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for ranks, code in ((8, 0), (128, 2)):
        assert launch.main([str(replace(job, layout=Parallelism(data_parallel=ranks)).save())]) == code
    assert "arm needs 128 ranks, but this machine has 8 GPUs; " in (said := capsys.readouterr().err)
    assert "--launch" in said


def test_a_task_to_which_a_container_gives_the_variables_of_a_rank_starts_the_ranks(job, monkeypatch):
    """Pyxis with enroot's hook for PyTorch sets them, but no TORCHELASTIC_RUN_ID, in any single task."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(launch, "_start", lambda job: job.layout.processes)
    assert launch.main([str(replace(job, layout=Parallelism(data_parallel=8)).save())]) == 8


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 4), (4, 4), (8, 4), (1, 4), (4, 8)])
def test_ranks_that_something_else_starts_have_a_gpu_each(monkeypatch, gpus, ranks):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if 0 < gpus < ranks:
        with pytest.raises(UserError, match=f"{ranks} ranks, but each sees {gpus} of its GPUs"):
            launch._check_gpus_of_ranks()
    else:
        launch._check_gpus_of_ranks()


def test_torchrun_ends_with_its_launcher(job, monkeypatch, tmp_path):
    """However that ends: its ranks would go on without a lock."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/agent\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(python))
    launcher = multiprocessing.get_context("fork").Process(target=launch._torchrun, args=(job,))
    launcher.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "agent").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    agent = int((tmp_path / "agent").read_text())
    started = start_time(agent)
    launcher.kill()
    launcher.join()
    _assert_ends(agent, started, deadline)


def test_torchrun_s_ranks_know_that_the_folder_is_locked(job, monkeypatch, tmp_path):
    """Recorded by a stand-in for the interpreter, which would take long to start torchrun."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 3\n')
    python.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(python))
    assert launch._torchrun(job) == 3
    assert (tmp_path / "arguments").read_text().split()[-3:] == [
        "nemo_pvs.megatron.launch",
        "--locked",
        str(job.file),
    ]
