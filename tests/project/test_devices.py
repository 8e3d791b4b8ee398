"""On a machine with GPUs, the suite sees none, unless it is asked for the tests that need one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import asks_for_gpu

_TESTS = """
import os
import sys

import pytest

torch_came_after = "torch" not in sys.modules or os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def test_on_a_cpu():
    assert torch_came_after and os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.gpu
def test_on_a_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
"""


@pytest.mark.parametrize(
    ("marks", "asks"),
    [
        ("", False),
        ("not parallel and not slow", False),
        ("not gpu", False),
        ("slow and not gpu", False),
        ("gpu", True),
        ("gpu and not slow", True),
    ],
)
def test_the_marks_that_ask_for_a_gpu(marks, asks):
    assert asks_for_gpu(marks) is asks


@pytest.mark.slow
@pytest.mark.parametrize(("marks", "ran"), [("", "test_on_a_cpu"), ("gpu", "test_on_a_gpu")])
def test_gpus_are_hidden_from_tests_that_do_not_ask_for_them(tmp_path, marks, ran):
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_devices.py").write_text(_TESTS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "-m", marks, str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert [line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("PASSED")] == [ran]
