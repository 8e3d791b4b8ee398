"""Pruning and training as NeMo-Run experiments, really executed: local executor, a tiny model, two ranks."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_pvs.training import metrics
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture
def recipe(tmp_path) -> Path:
    parent = save_tiny_tokenizer(make_tiny_llama(tmp_path / "parent"))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    lines = [json.dumps({"text": " ".join(words[index % 61 :] + words * 5)}) for index in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    values = {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": str(parent)},
        "data": {"source": str(tmp_path / "corpus.jsonl")},
        "calibrate": {"samples": 4, "sequence_length": 32},
        "targets": {"width": {"method": "minitron-width", "ffn": 48, "layout": {"tensor_parallel": 2}}},
        "arms": ["pruned"],
        "train": {
            "tokens": 256,
            "sequence_length": 32,
            "global_batch_size": 4,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "validations": 1,
            "validation_samples": 4,
        },
        "evaluate": {"samples": 2, "sequence_length": 32},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_stages_run_in_their_order_and_end_in_a_report(recipe, tmp_path):
    """And what starts them does without what only they need, which takes as long to import as all the rest."""
    script = (
        "import atexit, sys, nemo_pvs.cli.main;"
        "heavy = {'megatron', 'nemo', 'sklearn', 'transformers'};"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)))); nemo_pvs.cli.main.main()"
    )
    command = [sys.executable, "-c", script, "run", recipe, "--out", tmp_path / "run", "--launch", "local_cpu"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]"
    folder = tmp_path / "run"
    assert [point["step"] for point in metrics.read(folder / "train/width-pruned/metrics.jsonl").training] == [1, 2]
    assert (folder / "report.html").is_file()
    stages = sorted(path.parent.name for path in (folder / "nemo_run").rglob("configs"))
    assert stages == ["prepare", "report", "train-width-pruned"]


@pytest.mark.parametrize(
    ("failing", "module", "started"),
    [("prepare", "nemo_pvs.cli", 1), ("train-width-pruned", "nemo_pvs.megatron.launch", 2)],
)
def test_a_stage_that_fails_ends_the_run_and_is_named(recipe, tmp_path, monkeypatch, pvs, failing, module, started):
    """The stages' Python is a stand-in that writes down what it is asked for, and fails at one module."""
    python, log = tmp_path / "python", tmp_path / "asked"
    python.write_text(f'#!/bin/bash\necho "$*" >>{log}\n[ "$2" != {module} ]\n')
    python.chmod(0o755)
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({"kind": "local", "python": str(python)}))
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # NeMo-Run's file copying passes it on; pytest's cannot be read
    code, _, errors = pvs("run", recipe, "--out", tmp_path / "run", "--launch", profile)
    assert code == 1, errors
    assert f"Stage {failing} failed" in errors
    assert [line.split()[1] for line in log.read_text().splitlines()] == [
        "nemo_pvs.cli",
        "nemo_pvs.megatron.launch",
    ][:started]
