"""A launcher of training jobs that is forked from a process that has imported NeMo, so that it need not."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.megatron import launch
from nemo_pvs.system.processes import die_with_parent
from tests.megatron.ranks import fork_context


class ForkedLauncher:
    """What ``subprocess.Popen`` of a launcher is to a ``Trainer``; the launcher itself is the same code."""

    def __init__(self, log: Path, share: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("fork") if "nemo" in sys.modules else fork_context()
        jobs, to_jobs = context.Pipe(duplex=False)
        answers, to_answers = context.Pipe(duplex=False)
        self._process = context.Process(target=_serve, args=(jobs, to_answers, log, share))
        self._process.start()
        self.stdin = os.fdopen(os.dup(to_jobs.fileno()), "w")
        self.stdout = os.fdopen(os.dup(answers.fileno()))
        for end in (jobs, to_jobs, answers, to_answers):
            end.close()

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()


def _serve(jobs: Any, answers: Any, log: Path, share: Mapping[str, str]) -> None:
    die_with_parent()
    os.environ.update(share)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in enumerate((jobs.fileno(), answers.fileno(), said)):
        os.dup2(file, number)
    sys.stdin, sys.stdout, sys.stderr = map(os.fdopen, range(3), "rww")
    os._exit(launch.main(["-"]))
