"""The verbs under NeMo's own command, as an installed plugin."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import make_tiny_llama

pytestmark = pytest.mark.slow


def _nemo(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("nemo")), *map(str, arguments)]
    # What the README asks for on a machine with the CUDA toolkit and no device; it means nothing elsewhere.
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": "9.0"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_nemo_pvs_runs_a_verb(tmp_path):
    model = make_tiny_llama(tmp_path / "model")
    done = _nemo("pvs", "convert", f"source={model}", f"target={tmp_path / 'nemo'}", "--yes")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "nemo" / "weights" / ".metadata").exists()


def test_nemo_pvs_lists_the_verbs():
    out = _nemo("pvs", "--help").stdout
    for verb in ("convert", "inspect", "prune", "train", "run"):
        assert verb in out
