"""The benchmark works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.checksums", "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fingerprint, no manifest, again" in done.stdout
