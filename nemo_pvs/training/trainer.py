"""Run training jobs without importing NeMo: start a launcher, show progress, return the trained checkpoint."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from nemo_pvs.checkpoints.convert import read_through
from nemo_pvs.checkpoints.manifest import Manifest, describe_tensors
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import TrainingError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.processes import die_with_parent
from nemo_pvs.system.progress import console, progress
from nemo_pvs.training import metrics
from nemo_pvs.training.checkpoints import checkpoint_name, newest_sound, say_broken, state_to_carry
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.preemption import PREEMPTED, handing_on

_SECONDS_BETWEEN_LOOKS = 0.5


class PreemptedError(TrainingError):
    """A training run has saved and stopped on a signal."""

    exit_code = PREEMPTED


class Trainer:
    """Trains jobs one after another in child processes, which import NeMo once for all jobs.

    The launcher starts with the first job; it and its ranks end with the ``with`` block.
    """

    def __init__(self, log: Path) -> None:
        """Store ``log``, the file for the launcher's own output, such as warnings while it imports NeMo."""
        self._log = log
        self._launcher: subprocess.Popen[str] | None = None
        self._answers: SimpleQueue[str] = SimpleQueue()

    def __enter__(self) -> Trainer:
        """Return the trainer; nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the launcher."""
        if self._launcher is not None:
            self._launcher.kill()
            self._launcher.wait()

    def train(self, job: TrainingJob) -> Path:
        """Train ``job``, resuming an earlier attempt, and return its last checkpoint.

        Raises:
            PreemptedError: the ranks have saved and stopped on SIGTERM or SIGUSR1.
            TrainingError: a rank failed.
            UserError: the optimizer state to start from is missing, the initial weights or the teacher are damaged,
                or another command is training the job.
        """
        with locked_folder(job.folder):
            return _with_manifest(last_checkpoint(job) if is_finished(job) else self._train(job))

    def _train(self, job: TrainingJob) -> Path:
        newest, broken = newest_sound(job.checkpoints)
        for sentence in say_broken(newest, broken):
            console.print(sentence, soft_wrap=True)
        if job.carried and newest is None:
            state_to_carry(job.carried.checkpoints)
        if newest is None:
            _check_weights(job)
        launcher = self._start()
        assert launcher.stdin is not None
        print(job.save(), file=launcher.stdin, flush=True)
        with progress(f"train {job.name}", "tokens") as show, handing_on(launcher.send_signal) as came:
            while (answer := self._answer()) is None:
                _show(job, show)
            _show(job, show)
        if came and answer != "0":
            raise PreemptedError(f"Training of {job.name} was asked to stop; the same command goes on from there.")
        if answer != "0":
            raise TrainingError(f"Training of {job.name} failed; the reason is at the end of {job.log}.")
        return last_checkpoint(job)

    def _start(self) -> subprocess.Popen[str]:
        if self._launcher is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            self._launcher = _launch(self._log)
            threading.Thread(target=self._listen, args=(self._launcher,), daemon=True).start()
        return self._launcher

    def _listen(self, launcher: subprocess.Popen[str]) -> None:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            self._answers.put(line.strip())
        self._answers.put("the launcher ended")

    def _answer(self) -> str | None:
        try:
            return self._answers.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except Empty:
            return None


def _launch(log: Path) -> subprocess.Popen[str]:
    """Start a launcher, which reads paths of job files and writes exit codes; ``log`` receives its other output."""
    with open(log, "a") as errors:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "nemo_pvs.megatron.launch", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=die_with_parent,
        )


def is_finished(job: TrainingJob) -> bool:
    """Return whether the checkpoint of the job's last step exists and is intact."""
    newest, _ = newest_sound(job.checkpoints)
    return newest is not None and newest.name == checkpoint_name(job.training.steps)


def last_checkpoint(job: TrainingJob) -> Path:
    """Return the newest intact checkpoint of a job.

    Raises:
        TrainingError: there is no intact checkpoint.
    """
    newest, _ = newest_sound(job.checkpoints)
    if newest is None:
        raise TrainingError(f"Training of {job.name} left no checkpoint in {job.checkpoints}; see {job.log}.")
    return newest


def _check_weights(job: TrainingJob) -> None:
    """Read the checkpoints that Megatron is about to load, to verify their checksums, because Megatron does not."""
    models = {"initial weights": job.initial, "teacher": job.teacher}
    for name, path in models.items():
        if path is not None:
            with progress(f"check the {name} of {job.name}", "parameters") as show:
                read_through(open_source(path), progress=show)


def _with_manifest(checkpoint: Path) -> Path:
    """Write the manifest of a trained checkpoint, unless it has one, and return the checkpoint.

    Only the final checkpoint is used after the run. Intermediate ones get no manifest; the checksums that PyTorch
    stores in their files reveal damage.
    """
    if Manifest.read(checkpoint) is None:
        with progress(f"checksums of {checkpoint.name}", "parameters") as show:
            describe_tensors(open_source(checkpoint), checkpoint, "nemo", progress=show)
    return checkpoint


def _show(job: TrainingJob, show) -> None:  # type: ignore[no-untyped-def]
    curve = metrics.read(job.metrics)
    total = job.training.steps * job.training.tokens_per_step
    if not curve.training:
        show(0, total, note="starting NeMo and Megatron")
        return
    tokens = curve.training[-1]["tokens"]
    speeds = [point["tokens_per_second"] for point in curve.training[-metrics.PACE_STEPS :]]
    show(tokens, total, note=latest(curve), left=metrics.time_left(total - tokens, speeds))


def latest(curve: metrics.Metrics) -> str:
    """Format the latest loss and speed, and the latest validation loss and share of zeros if there are any."""
    last = curve.training[-1]
    note = f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s"
    if curve.validation:
        note += f", validation {curve.validation[-1]['loss']:.3f}"
    if curve.sparsity:
        note += f", {curve.sparsity[-1]['zero_fraction']:.2%} zeros"
    return note
