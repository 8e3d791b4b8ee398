"""Ways into the program that people type and batch scripts hold."""

from __future__ import annotations

import subprocess
import sys

import pytest


def _answer(*arguments: str, given: str = "") -> tuple[int, str, str]:
    answer = subprocess.run(
        [sys.executable, "-m", *arguments], input=given, capture_output=True, text=True, timeout=300
    )
    return answer.returncode, answer.stdout, answer.stderr


def test_python_m_nemo_pvs_cli():
    """As ``pvs run --launch`` starts its stages."""
    code, output, errors = _answer("nemo_pvs.cli", "--help")
    assert (code, errors) == (0, "")
    assert "Usage: python -m nemo_pvs.cli [OPTIONS] COMMAND [ARGS]..." in output
    for verb in ("convert", "inspect", "tokenize", "calibrate", "search", "prune", "train", "evaluate", "recipes",
                 "run", "report", "budget", "scaling-fit", "scaling-predict", "advise", "scaling"):  # fmt: skip
        assert f"│ {verb} " in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "given", "expected"),
    [
        ([], "", (0, "", "")),
        (["-"], "", (0, "", "")),
        (["no/such/job.json"], "", (2, "", "pvs: no/such/job.json does not exist; check the path.\n")),
    ],
    ids=["no job", "jobs from standard input", "a job that is not there"],
)
def test_python_m_nemo_pvs_megatron_launch(arguments, given, expected):
    """As batch scripts start the ranks of a job, whose file is the argument."""
    assert _answer("nemo_pvs.megatron.launch", *arguments, given=given) == expected
