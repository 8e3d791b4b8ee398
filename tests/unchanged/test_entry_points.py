"""Ways into the program that are typed by people, and written into batch scripts and checkpoints."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _answer(*arguments: str) -> str:
    answer = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)
    return f"{answer.stdout}{answer.stderr}exit code {answer.returncode}\n"


def test_python_m_nemo_pvs_cli():
    """Batch scripts of `pvs run --launch` start it so; what it says in full may get better."""
    answer = _answer("nemo_pvs.cli", "--help")
    assert answer.endswith("exit code 0\n")
    assert "Usage: " in answer
    for verb in ("calibrate", "prune", "convert", "inspect", "search", "train", "evaluate", "run", "report"):
        assert f" {verb} " in answer


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["no/such/job.json"], ["--slurm"]],
    ids=["no jobs", "--help", "a job that is not there", "as a task of srun, with no environment of one"],
)
def test_python_m_nemo_pvs_training_launch(arguments, golden):
    pass
