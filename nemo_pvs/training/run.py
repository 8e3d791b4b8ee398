"""Run a training job from the light process: start the launcher, show its progress, hand over the trained model."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from nemo_pvs.processes import die_with_parent
from nemo_pvs.progress import progress
from nemo_pvs.training import metrics
from nemo_pvs.training.job import TrainingJob

_SECONDS_BETWEEN_LOOKS = 0.5


class TrainingFailed(Exception):
    """A training run ended early; says where its log is."""


def run_job(job: TrainingJob) -> Path:
    """Train ``job``, going on where an earlier attempt stopped, and return its last checkpoint.

    Raises:
        TrainingFailed: a rank failed.
    """
    job_file = job.save()
    command = [sys.executable, "-m", "nemo_pvs.training.launch", str(job_file)]
    with open(job.log, "a") as log, progress(f"train {job.name}", "tokens") as show:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=die_with_parent)
        try:
            while process.poll() is None:
                _show(job, show)
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            _show(job, show)
        finally:
            if process.poll() is None:
                process.kill()  # its ranks die with it
                process.wait()
    if process.returncode:
        raise TrainingFailed(f"Training of {job.name} failed; the reason is at the end of {job.log}.")
    return last_checkpoint(job)


def last_checkpoint(job: TrainingJob) -> Path:
    """Return the newest finished checkpoint of a job.

    Raises:
        TrainingFailed: there is none.
    """
    finished = [
        folder
        for folder in job.checkpoints.glob("*-last")
        if not folder.with_name(f"{folder.name}-unfinished").exists()
    ]
    if not finished:
        raise TrainingFailed(f"Training of {job.name} left no checkpoint in {job.checkpoints}; see {job.log}.")
    return max(finished, key=lambda folder: folder.stat().st_mtime)


def _show(job: TrainingJob, show) -> None:  # type: ignore[no-untyped-def]
    curve = metrics.read(job.metrics)
    total = job.training.steps * job.training.tokens_per_step
    if not curve.training:
        show(0, total, note="starting NeMo and Megatron")
        return
    last = curve.training[-1]
    note = f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s"
    if curve.validation:
        note += f", validation {curve.validation[-1]['loss']:.3f}"
    show(last["tokens"], total, note=note)
