"""A run that is asked to stop saves and goes on later, and one whose newest checkpoint is cut short uses the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.reporting.training_log import log_files, validation_losses
from nemo_pvs.system.files import read_json
from nemo_pvs.training import metrics
from nemo_pvs.training.checkpoints import SPLIT_FILE, damage, newest_sound, saved_checkpoints
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.preemption import PREEMPTED
from nemo_pvs.training.trainer import Trainer, is_finished
from tests.conftest import make_tiny_llama, save_tiny_tokenizer
from tests.megatron.jobs import tiny_job

pytestmark = [pytest.mark.parallel, pytest.mark.slow]

STEPS = 16


class Launcher:
    """``python -m nemo_pvs.megatron.launch -``, which imports NeMo once for all jobs of this file."""

    def __init__(self, log: Path) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "nemo_pvs.megatron.launch", "-"]
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def train(self, job: TrainingJob, signal_at_step: int | None = None, number: int = signal.SIGTERM) -> int:
        """Train a job and return its exit code; send a signal to the launcher as soon as a step is logged."""
        job.folder.mkdir(exist_ok=True)
        print(job.save(), file=self.process.stdin, flush=True)
        if signal_at_step is not None:
            threading.Thread(target=self._signal, args=(job, signal_at_step, number), daemon=True).start()
        return int(self.process.stdout.readline())

    def _signal(self, job: TrainingJob, step: int, number: int) -> None:
        while not any(point["step"] >= step for point in metrics.read(job.metrics).training):
            time.sleep(0.01)
        self.process.send_signal(number)


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    launcher = Launcher(tmp_path_factory.mktemp("launcher") / "log.txt")
    yield launcher
    launcher.process.kill()
    launcher.process.wait()


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> TrainingJob:
    """A run of 16 steps on two ranks, saved at 5, 10, 15 and 16."""
    folder = tmp_path_factory.mktemp("job")
    model = save_tiny_tokenizer(make_tiny_llama(folder / "model"))
    return replace(tiny_job(folder, model, steps=STEPS, checkpoints=3), layout=Parallelism(data_parallel=2))


@pytest.fixture(scope="module")
def finished(job, launcher) -> TrainingJob:
    """The run without interruption."""
    assert launcher.train(job) == 0, job.log.read_text()[-3000:]
    return job


def _losses(job: TrainingJob) -> list[float]:
    return [point["loss"] for point in metrics.read(job.metrics).training]


def _validation(job: TrainingJob) -> dict[int, float]:
    """Return the validation losses by steps done; TensorBoard keeps fp32."""
    return {point["step"]: pytest.approx(point["loss"], rel=1e-6) for point in metrics.read(job.metrics).validation}


def _names(job: TrainingJob) -> list[str]:
    return [path.name for path in saved_checkpoints(job.checkpoints)]


def test_two_checkpoints_are_kept_and_tensorboard_has_the_curve(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert is_finished(finished)
    assert _names(finished) == ["step=15-last", "step=14-last"]
    assert sorted(path.name for path in finished.checkpoints.iterdir()) == ["step=14-last", "step=15-last"]
    splits = [read_json(path / SPLIT_FILE) for path in saved_checkpoints(finished.checkpoints)]
    assert splits == [None, finished.layout.split], "the last one fits any layout, the others only theirs"
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("reduced_train_loss")]
    assert written == pytest.approx(_losses(finished), rel=1e-6)
    assert validation_losses(finished.folder / "tensorboard") == _validation(finished)


@pytest.mark.parametrize(
    ("number", "layout"),
    [(signal.SIGTERM, Parallelism(data_parallel=2)), (signal.SIGUSR1, Parallelism(tensor_parallel=2))],
    ids=["SIGTERM", "SIGUSR1, then another layout"],
)
def test_a_signal_saves_and_the_next_start_goes_on(finished, launcher, tmp_path, number, layout):
    job = replace(finished, folder=tmp_path / "run")
    assert launcher.train(job, signal_at_step=6, number=number) == PREEMPTED, job.log.read_text()[-3000:]
    done = metrics.read(job.metrics).training[-1]["step"]
    assert 6 <= done < STEPS
    assert _names(job)[0] == f"step={done - 1}-last", "the step at which it stopped was not saved"
    assert "stop requested" in job.log.read_text()
    job = replace(job, layout=layout)
    assert launcher.train(job) == 0, job.log.read_text()[-3000:]
    assert job.log.read_text().count(f"step {done}/{STEPS}") == 1, "it did not go on where it stopped"
    assert _losses(job) == pytest.approx(_losses(finished), abs=1e-4 if layout.tensor_parallel > 1 else 1e-6)
    assert len(log_files(job.folder / "tensorboard")) == 2
    assert validation_losses(job.folder / "tensorboard") == _validation(job)


@pytest.fixture
def broken_off(finished, tmp_path) -> TrainingJob:
    """The run as a crash in the last step leaves it."""
    job = replace(finished, folder=tmp_path / "run")
    shutil.copytree(finished.folder, job.folder)
    shutil.rmtree(job.checkpoints / "step=15-last")
    return job


def test_a_checkpoint_of_the_middle_of_a_run_fits_another_number_of_replicas(broken_off, finished, launcher):
    assert launcher.train(replace(broken_off, layout=Parallelism())) == 0, broken_off.log.read_text()[-3000:]
    assert _losses(broken_off) == pytest.approx(_losses(finished), abs=1e-5)


def test_a_checkpoint_of_the_middle_of_a_run_is_refused_in_another_split(broken_off, launcher):
    job = replace(broken_off, layout=Parallelism(tensor_parallel=2))
    sentence = "was saved in the middle of a run with tensor_parallel 1, pipeline_parallel 1 and the distributed"
    with Trainer(job.folder / "launcher.log") as trainer, pytest.raises(UserError, match=sentence):
        trainer.train(job)
    assert launcher.train(job) == 1, "a rank that no pipeline has started refuses it, too"
    assert sentence in job.log.read_text()


def test_with_a_plain_optimizer_any_checkpoint_fits_any_layout(finished, launcher, tmp_path):
    training = finished.training.model_copy(update={"checkpoints": 2, "tokens": 1024})
    layouts = [{"data_parallel": 2}, {"tensor_parallel": 2}]
    first, second = (Parallelism(**layout, distributed_optimizer=False) for layout in layouts)
    job = replace(finished, folder=tmp_path / "run", training=training, layout=first)
    assert launcher.train(job) == 0, job.log.read_text()[-3000:]
    shutil.rmtree(job.checkpoints / "step=3-last")
    assert launcher.train(replace(job, layout=second)) == 0, job.log.read_text()[-3000:]
    assert job.log.read_text().count("step 2/4  tokens") == 1, "it started over"


def test_it_is_saved_by_the_clock(finished, launcher, tmp_path):
    """Rank 0's; so much for a run without any other save before the last step."""
    training = finished.training.model_copy(update={"checkpoints": 1, "checkpoint_minutes": 1e-9, "tokens": 1024})
    job = replace(finished, folder=tmp_path / "run", training=training)
    assert launcher.train(job) == 0, job.log.read_text()[-3000:]
    assert _names(job) == ["step=3-last", "step=2-last"]


def test_the_checkpoint_before_a_truncated_one_is_used_and_that_is_said(finished, launcher, tmp_path):
    job = replace(finished, folder=tmp_path / "run")
    shutil.copytree(finished.folder, job.folder)
    newest, before = saved_checkpoints(job.checkpoints)
    data = max((newest / "weights").glob("*.distcp"), key=lambda file: file.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    assert damage(newest) is not None
    assert newest_sound(job.checkpoints)[0] == before
    assert not is_finished(job)
    assert launcher.train(job) == 0, job.log.read_text()[-3000:]
    problem = f"{data.name} cut short or missing, 1 in all"
    said = f"Checkpoint {newest.name} is broken ({problem}); resuming from {before.name}."
    assert job.log.read_text().count(said) == 1
    assert job.log.read_text().count("step 15/16") == 1
    assert job.log.read_text().count("step 16/16  tokens") == 2
    assert _losses(job) == pytest.approx(_losses(finished), abs=1e-6)
    assert is_finished(job)
    assert damage(newest) is None
