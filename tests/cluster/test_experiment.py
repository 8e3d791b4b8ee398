"""Pruning and training as one NeMo-Run experiment, really executed: local executor, a tiny model, two ranks."""

from __future__ import annotations

import json
import os
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
            "tokens": 512,
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


def _pvs(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nemo_pvs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def test_stages_run_in_their_order_and_end_in_a_report(recipe, tmp_path):
    done = _pvs("run", recipe, "--out", tmp_path / "run", "--launch", "local_cpu")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "run"
    assert [point["step"] for point in metrics.read(folder / "train/width-pruned/metrics.jsonl").training] == [
        1,
        2,
        3,
        4,
    ]
    assert (folder / "report.html").is_file()
    stages = sorted(path.parent.name for path in (folder / "nemo_run").rglob("configs"))
    assert stages == ["prepare", "report", "train-width-pruned"]


def test_a_stage_that_fails_ends_the_run_and_is_named(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    values["parent"]["source"] = str(tmp_path / "nothing")
    recipe.write_text(yaml.safe_dump(values))
    done = _pvs("run", recipe, "--out", tmp_path / "run", "--launch", "local_cpu")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Stage prepare failed" in done.stderr
    assert not (tmp_path / "run" / "train").exists()
