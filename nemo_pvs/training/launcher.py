"""The process that trains jobs one after another, and its share of this machine. Imports no NeMo."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

import torch

from nemo_pvs.training.teaching_job import Job

_GPUS = "CUDA_VISIBLE_DEVICES"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""glibc gives the memory of a freed tensor to the next one. By default the system takes it, and clears it again."""


def gpus_of_each(launchers: int) -> int:
    """Return the number of GPUs that each of several launchers on this machine gets."""
    return torch.cuda.device_count() // launchers


def rank_memory() -> dict[str, str]:
    """Return the environment variables for the memory of ranks here: those that compute on a CPU keep it."""
    return {} if torch.cuda.device_count() else _KEEP_MEMORY


def share_of_machine(number: int, launchers: int) -> dict[str, str]:
    """Return the environment variables that give a launcher its share of this machine.

    One thread per rank, so that results do not depend on the number of launchers. On a machine with GPUs, an equal
    slice of those that this process may use.

    Args:
        number: The launcher, counted from 0.
        launchers: The number of launchers that may run at the same time.
    """
    devices = torch.cuda.device_count()
    if not devices:
        return _ONE_THREAD
    # CUDA ignores everything after an index that does not exist.
    visible = os.environ[_GPUS].split(",")[:devices] if _GPUS in os.environ else list(map(str, range(devices)))
    size = gpus_of_each(launchers)
    return {**_ONE_THREAD, _GPUS: ",".join(visible[number * size : (number + 1) * size])}


class Launcher:
    """A running launcher. It takes one job at a time, and answers each with an exit code."""

    def __init__(self, process: subprocess.Popen[str], answers: SimpleQueue[tuple[Launcher, str]]) -> None:
        """Listen to a launcher.

        Args:
            process: ``python -m nemo_pvs.megatron.launch -``, with pipes.
            answers: Receives each answer, and a sentence when the process ends.
        """
        self._process = process
        self.ended = False
        Thread(target=self._listen, args=(answers,), daemon=True).start()

    def train(self, job: Job) -> None:
        """Have a job trained; return at once."""
        with suppress(BrokenPipeError):  # it has just ended, which its last answer says
            print(job.save(), file=self._process.stdin, flush=True)

    def send_signal(self, number: int) -> None:
        """Send a signal, which the launcher forwards to its ranks."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End the launcher and its ranks at once."""
        self._process.kill()
        self._process.wait()

    def _listen(self, answers: SimpleQueue[tuple[Launcher, str]]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answers.put((self, line.strip()))
        self.ended = True
        answers.put((self, "the launcher ended"))
