"""The progress of jobs on the console: a row for each that is running, and one for all together. Imports no NeMo."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.teaching_job import Job, TeachingJob

_STARTING = "starting NeMo and Megatron"


def heading(job: Job, jobs: Sequence[Job]) -> str:
    """Return what a job is called in its row, with its run folder if several of ``jobs`` have its name."""
    if isinstance(job, TeachingJob):
        return job.name
    same_name = [other for other in jobs if other.name == job.name]
    run = f" of {job.folder.parents[1].name}" if len(same_name) > 1 else ""
    return f"train {job.name}{run}"


def tokens_of(job: Job) -> int:
    """Return the number of tokens that a job reads."""
    return job.content.tokens if isinstance(job, TeachingJob) else job.training.steps * job.training.tokens_per_step


def tokens_done(job: Job) -> int:
    """Return the number of those tokens that earlier attempts have read."""
    if isinstance(job, TeachingJob):
        return job.cache.tokens_done
    training = metrics.read(job.metrics).training
    return training[-1]["tokens"] if training else 0


def showing(job: Job, show: Callable[..., None]) -> Callable[[], int]:
    """Return a function that shows how far a job is, how fast, and how long is left; it returns the tokens done.

    Args:
        job: The job.
        show: What ``progress`` yields.
    """
    return _showing_cache(job, show) if isinstance(job, TeachingJob) else _showing_training(job, show)


class AllJobs:
    """The progress of jobs that are run together: their tokens, how many are finished, and how long is left."""

    def __init__(self, jobs: Sequence[Job], show: Callable[..., None]) -> None:
        """Read how far earlier attempts got.

        Args:
            jobs: All jobs, finished ones too.
            show: What ``progress`` yields.
        """
        self._show = show
        self._total = sum(map(tokens_of, jobs))
        self._done = {job.folder: tokens_done(job) for job in jobs}
        self._before = sum(self._done.values())
        self._began = time.monotonic()

    def update(self, job: Job, tokens: int) -> None:
        """Note how many tokens of a job are done."""
        self._done[job.folder] = tokens

    def show(self, finished: int) -> None:
        """Show the progress of all jobs, of which ``finished`` are."""
        done = sum(self._done.values())
        speed = (done - self._before) / max(time.monotonic() - self._began, 1e-3)
        left = metrics.time_left(self._total - done, [speed]) if speed > 0 else ""
        self._show(done, self._total, note=f"{finished} finished", left=left)


def _showing_cache(job: TeachingJob, show: Callable[..., None]) -> Callable[[], int]:
    began, before = time.monotonic(), job.cache.tokens_done

    def update() -> int:
        done, total = job.cache.tokens_done, tokens_of(job)
        speed = (done - before) / max(time.monotonic() - began, 1e-3)
        if speed:
            show(done, total, note=f"{speed:,.0f} tokens/s", left=metrics.time_left(total - done, [speed]))
        else:
            show(done, total, note=_STARTING)
        return done

    return update


def _showing_training(job: TrainingJob, show: Callable[..., None]) -> Callable[[], int]:
    growing, total = metrics.GrowingMetrics(job.metrics), tokens_of(job)

    def update() -> int:
        curve = growing.read()
        if not curve.training:
            show(0, total, note=_STARTING)
            return 0
        tokens: int = curve.training[-1]["tokens"]
        speeds = [point["tokens_per_second"] for point in curve.training[-metrics.PACE_STEPS :]]
        show(tokens, total, note=latest(curve), left=metrics.time_left(total - tokens, speeds))
        return tokens

    return update


def latest(curve: metrics.Metrics) -> str:
    """Format the latest loss and speed, and the latest validation loss and share of zeros if there are any."""
    last = curve.training[-1]
    note = f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in last:
        note += f", MFU {last['mfu']:.0%}"
    if "peak_gigabytes" in last:
        note += f", {last['peak_gigabytes']:.0f} GB"
    if curve.validation:
        note += f", validation {curve.validation[-1]['loss']:.3f}"
    if curve.sparsity:
        note += f", {curve.sparsity[-1]['zero_fraction']:.2%} zeros"
    return note
