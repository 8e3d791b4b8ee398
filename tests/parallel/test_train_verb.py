"""``pvs tokenize`` and ``pvs train``, as a user without a recipe types them."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_pvs.checkpoints.detect import open_source
from nemo_pvs.checkpoints.source import fingerprint
from nemo_pvs.training import metrics
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

pytestmark = [pytest.mark.parallel, pytest.mark.slow]


def _pvs(*arguments: object) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("pvs")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_train_from_random_weights_and_again(tmp_path):
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)))
    done = _pvs("tokenize", text, "--tokenizer", model, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr

    settings = [
        "--data", tmp_path / "data", "--tokens", 1024, "--sequence-length", 32, "--global-batch-size", 4,
        "--validation-samples", 8, "--tensor-parallel", 2, "--random-init",
    ]  # fmt: skip
    refused = _pvs("train", model, tmp_path / "run", *settings, "--tokens", 1e9)
    assert refused.returncode == 2
    assert "--tokens is 1,000,000,000, but" in refused.stderr
    assert not (tmp_path / "run").exists()

    done = _pvs("train", model, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    assert "trained checkpoint" in done.stdout
    curve = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [point["step"] for point in curve.training] == list(range(1, 9))
    assert curve.training[-1]["loss"] < curve.training[0]["loss"]
    initial = open_source(tmp_path / "run" / "initial")
    assert fingerprint(initial) != fingerprint(open_source(model)), "the weights were not drawn anew"

    again = _pvs("train", model, tmp_path / "run", *settings)
    assert again.returncode == 0
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == curve, "a finished run was trained again"
    other = _pvs("train", model, tmp_path / "run", *settings, "--seed", 7)
    assert other.returncode == 2
    assert "holds a run with other settings" in other.stderr
