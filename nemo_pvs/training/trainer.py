"""Run training jobs without importing NeMo: start launchers, show progress, return the trained checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

from nemo_pvs.checkpoints.convert import read_through
from nemo_pvs.checkpoints.manifest import Manifest, describe_tensors
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import TrainingError, UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.processes import die_with_parent
from nemo_pvs.system.progress import console, progress
from nemo_pvs.training.checkpoints import check_split, checkpoint_name, newest_sound, say_broken, state_to_carry
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.job_progress import AllJobs, heading, showing, tokens_done
from nemo_pvs.training.launcher import Launcher, rank_memory, share_of_machine
from nemo_pvs.training.preemption import PREEMPTED, handing_on
from nemo_pvs.training.teaching_job import Job, TeachingJob

_SECONDS_BETWEEN_LOOKS = 1.0


class PreemptedError(TrainingError):
    """A training run has saved and stopped on a signal."""

    exit_code = PREEMPTED


@dataclass
class _Active:
    """A job that a launcher is training."""

    job: Job
    show: Callable[[], int]
    """Updates its row of progress, and returns its tokens so far."""
    held: ExitStack
    """The lock of its folder, and that row."""


class Trainer:
    """Trains jobs in child processes, launchers, each of which imports NeMo once for all its jobs.

    A launcher starts with its first job; it and its ranks end with the ``with`` block.
    """

    def __init__(self, log: Path, jobs: int | None = None) -> None:
        """Start nothing yet.

        Args:
            log: File for the output of the launcher itself, such as warnings while it imports NeMo; that of the
                second launcher is in ``<name>-2.log``, and so on.
            jobs: Number of jobs that ``train_all`` trains at the same time, with one thread per rank and an equal
                share of the GPUs each. None: one at a time, with all cores and GPUs.
        """
        self._log = log
        self._jobs = jobs
        self._launchers: list[Launcher | None] = [None] * (jobs or 1)
        self._answers: SimpleQueue[tuple[Launcher, str]] = SimpleQueue()
        self._active: dict[Launcher, _Active] = {}

    def __enter__(self) -> Trainer:
        """Return the trainer; nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the launchers."""
        self._end_launchers()

    def train(self, job: Job) -> Path:
        """Run ``job``, resuming an earlier attempt, and return its last checkpoint or its teacher cache.

        Raises:
            PreemptedError: as for ``train_all``.
            TrainingError: as for ``train_all``.
            UserError: as for ``train_all``.
        """
        return self.train_all([job])[0]

    def train_all(self, jobs: Sequence[Job]) -> list[Path]:
        """Run jobs in order, several at the same time, resuming earlier attempts; return what each has made.

        This is the last checkpoint of a training, and the folder of a teacher cache.

        If one fails, those that are running are trained to their end, and no others are started. To forward signals
        to the ranks, call this in the main thread.

        Raises:
            PreemptedError: this process received SIGTERM or SIGUSR1; the ranks have saved and stopped.
            TrainingError: a rank failed, or several jobs could not be trained.
            UserError: the optimizer state to start from is missing, the initial weights or the teacher are damaged,
                or another command is training the job.
        """
        waiting, skipped = deque(jobs), list[Job]()
        trained: dict[Path, Path] = {}
        failures: list[TrainingError | UserError] = []
        try:
            with ExitStack() as row, handing_on(self._send_signal) as received:
                show = (
                    row.enter_context(progress(f"all {len(jobs)} jobs", "tokens")) if len(jobs) > 1 else _show_nothing
                )
                together = AllJobs(jobs, show)
                while waiting or self._active:
                    if failures or received:
                        skipped.extend(waiting)
                        waiting.clear()
                    try:
                        if waiting and len(self._active) < len(self._launchers):
                            job = waiting.popleft()
                            self._start(job, heading(job, jobs), trained, received)
                        elif self._active:
                            self._wait(together, trained, received)
                    except (TrainingError, UserError) as error:
                        failures.append(error)
        except BaseException:
            self._end_launchers()
            raise
        if received:
            stopped = ", ".join(job.name for job in jobs if job.folder not in trained and job not in skipped)
            training = f"Training of {stopped}" if stopped else "Training"
            raise PreemptedError(f"{training} was asked to stop; run the same command again to continue.")
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise TrainingError(" ".join(map(str, failures)))
        return [trained[job.folder] for job in jobs]

    def _start(self, job: Job, row: str, trained: dict[Path, Path], received: Sequence[int]) -> None:
        """Have a job trained, unless it is finished or a signal is ``received`` before; its progress is in ``row``."""
        with ExitStack() as held:
            held.enter_context(locked_folder(job.folder))
            if is_finished(job):
                trained[job.folder] = _result(job)
                return
            _check_beginning(job)
            launcher = self._free_launcher()
            update = showing(job, held.enter_context(progress(row, "tokens")))
            # From here on signals reach the launcher.
            self._active[launcher] = _Active(job, update, held.pop_all())
        if received:
            self._active.pop(launcher).held.close()
        else:
            launcher.train(job)

    def _wait(self, together: AllJobs, trained: dict[Path, Path], received: Sequence[int]) -> None:
        """Wait a moment for one of the jobs to end, or show the progress of all.

        Raises:
            TrainingError: the job failed.
        """
        try:
            launcher, answer = self._answers.get(timeout=_SECONDS_BETWEEN_LOOKS)
        except Empty:
            for active in self._active.values():
                together.update(active.job, active.show())
            together.show(len(trained))
            return
        ended = self._active.pop(launcher, None)
        if ended is None:  # a launcher without a job ended
            return
        job = ended.job
        together.update(job, tokens_done(job))
        with ended.held:
            if answer == "0" and is_finished(job):
                trained[job.folder] = _result(job)
            elif not received:
                what = f"{'Job' if isinstance(job, TeachingJob) else 'Training of'} {job.name}"
                if answer == str(-signal.SIGKILL):  # the log ends without a word
                    raise TrainingError(
                        f"{what} was killed, probably because memory ran out; run the same command to continue from "
                        f"its last checkpoint. The log is {job.log}."
                    )
                raise TrainingError(f"{what} failed; the reason is at the end of {job.log}.")

    def _free_launcher(self) -> Launcher:
        """Return a launcher without a job, and start it if necessary."""
        free = (number for number, one in enumerate(self._launchers) if one not in self._active)
        number = next(free)
        launcher = self._launchers[number]
        if launcher is None or launcher.ended:
            share = {} if self._jobs is None else share_of_machine(number, self._jobs)
            log = self._log.with_stem(f"{self._log.stem}-{number + 1}") if number else self._log
            log.parent.mkdir(parents=True, exist_ok=True)
            launcher = self._launchers[number] = Launcher(_launch(log, share), self._answers)
        return launcher

    def _send_signal(self, number: int) -> None:
        for launcher in list(self._active):
            launcher.send_signal(number)

    def _end_launchers(self) -> None:
        """End all launchers, then unlock the folders of their jobs."""
        for number, launcher in enumerate(self._launchers):
            if launcher is not None:
                launcher.kill()
                self._launchers[number] = None
        while self._active:
            self._active.popitem()[1].held.close()


def _launch(log: Path, share: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a launcher, which reads paths of job files and writes exit codes.

    Args:
        log: Receives its other output.
        share: Variables for its environment.
    """
    with open(log, "a") as errors:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "nemo_pvs.megatron.launch", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**rank_memory(), **os.environ, **share},
            preexec_fn=die_with_parent,
        )


def is_finished(job: Job) -> bool:
    """Return whether the checkpoint of the job's last step exists and is intact, or its teacher cache is complete."""
    if isinstance(job, TeachingJob):
        return job.is_finished
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


def _result(job: Job) -> Path:
    """Return what a finished job has made."""
    return job.folder if isinstance(job, TeachingJob) else with_manifest(last_checkpoint(job))


def _check_beginning(job: Job) -> None:
    """Check what a job starts from, and print which of its checkpoints are broken.

    The checkpoints that Megatron is about to load are read to verify their checksums, because Megatron does not.

    Raises:
        UserError: the weights are damaged, the optimizer state to start from is missing, or the newest
            checkpoint can only be resumed in another layout.
    """
    if isinstance(job, TeachingJob):
        _check_model("teacher", job.name, job.teacher)
        return
    newest, broken = newest_sound(job.checkpoints)
    for sentence in say_broken(newest, broken):
        console.print(sentence, soft_wrap=True)
    if newest is not None:
        check_split(newest, job.layout.split, distributed_optimizer=job.layout.distributed_optimizer)
        return
    if job.carried:
        state_to_carry(job.carried.checkpoints)
    _check_model("initial weights", job.name, job.initial)
    if job.teacher is not None and job.cache is None:
        _check_model("teacher", job.name, job.teacher)


def _check_model(what: str, job: str, path: Path) -> None:
    """Read all weights of a model to verify their checksums.

    Raises:
        UserError: a weight is damaged.
    """
    with progress(f"check the {what} of {job}", "parameters") as show:
        read_through(open_source(path), progress=show)


def with_manifest(checkpoint: Path) -> Path:
    """Write the manifest of a trained checkpoint, unless it has one, and return the checkpoint.

    Only checkpoints that are used after the run need one. The others get none; the checksums that PyTorch stores in
    their files reveal damage.
    """
    if Manifest.read(checkpoint) is None:
        with progress(f"checksums of {checkpoint.name}", "parameters") as show:
            describe_tensors(open_source(checkpoint), checkpoint, "nemo", progress=show)
    return checkpoint


def _show_nothing(*_: object, **__: object) -> None:
    """Show nothing: the progress of all jobs is that of the only one."""
