"""The benchmark of memory runs, on a model of kilobytes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.benchmarks.methods import METHODS


@pytest.mark.slow
def test_every_method_is_measured(tmp_path):
    """In a process without threads, as ``measure`` asks."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.calibration_8b", "--shape", "tiny"]
    printed = subprocess.run([*command, "--folder", str(tmp_path)], check=True, capture_output=True, text=True).stdout
    assert set(re.findall(r"^(\S+): [\d.]+ s$", printed, re.MULTILINE)) == {"calibrate", *METHODS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-4-layers", "scores"]
