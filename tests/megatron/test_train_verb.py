"""``pvs tokenize`` and ``pvs train``, as a user without a recipe types them."""

import json
import random

import pytest

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.training import metrics
from nemo_pvs.training.job import JOB_FILE, TrainingJob
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.usefixtures("forked_launcher")]


def test_train_from_random_weights_and_again(pvs, tmp_path):
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)))
    done = pvs("tokenize", text, "--tokenizer", model, "--out", tmp_path / "data")
    assert done.code == 0, done.errors

    settings = [
        "--data", tmp_path / "data", "--tokens", 1024, "--sequence-length", 32, "--global-batch-size", 4,
        "--validation-samples", 8, "--tensor-parallel", 2, "--random-init",
    ]  # fmt: skip
    refused = pvs("train", model, tmp_path / "run", *settings, "--tokens", 1e9)
    assert refused.code == 2
    assert "The run reads 1,000,000,000 tokens, but" in refused.errors
    refused = pvs("train", model, tmp_path / "run", *settings, "--clip-before-mask")
    assert refused.code == 2
    assert "has no masks, so --clip-before-mask has no effect" in refused.errors
    refused = pvs("train", model, tmp_path / "run", *settings[:-1], "--keep-parent-embeddings")
    assert refused.code == 2
    assert "--keep-parent-embeddings has an effect only with --random-init" in refused.errors
    assert not (tmp_path / "run").exists()

    done = pvs("train", model, tmp_path / "run", *settings)
    assert done.code == 0, done.errors
    assert "trained checkpoint" in done.output
    curve = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [point["step"] for point in curve.training] == list(range(1, 9))
    assert curve.training[-1]["loss"] < curve.training[0]["loss"]
    initial = open_source(tmp_path / "run" / "initial")
    assert fingerprint(initial) != fingerprint(open_source(model)), "the weights were not drawn again"

    again = pvs("train", model, tmp_path / "run", *settings)
    assert again.code == 0
    assert metrics.read(tmp_path / "run" / "metrics.jsonl") == curve, "a finished run was trained again"
    other = pvs("train", model, tmp_path / "run", *settings, "--seed", 7)
    assert other.code == 2
    assert "holds a run with other settings" in other.errors


@pytest.mark.slow
def test_search_trains_its_best_candidates_for_a_while(pvs, tmp_path):
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)))
    assert pvs("tokenize", text, "--tokenizer", model, "--out", tmp_path / "data").code == 0
    sizes = ("--data", text, "--samples", 4, "--sequence-length", 32)
    assert pvs("calibrate", model, "--out", tmp_path / "scores", *sizes).code == 0
    best = tmp_path / "best.json"
    command = [
        "search", model, "--scores", tmp_path / "scores", "--out", best, "--parameters", "100e3", "--tolerance", 0.4,
        "--hidden-step", 16, "--ffn-step", 16, "--layers-step", 1, "--retrain-tokens", 1024, "--retrain-best", 2,
        "--sequence-length", 32, "--global-batch-size", 4, "--data-parallel", 2,
    ]  # fmt: skip
    refused = pvs(*command)
    assert refused.code == 2
    assert "--retrain-tokens needs text" in refused.errors
    done = pvs(*command, "--retrain-data", tmp_path / "data")
    assert done.code == 0, done.errors
    assert "after" in done.output  # the heading may be broken
    runs = [folder for folder in best.with_suffix(".runs").iterdir() if (folder / "metrics.jsonl").exists()]
    assert len(runs) == 2
    trained = [metrics.read(run / "metrics.jsonl").validation[-1]["loss"] for run in runs]
    known = json.loads(best.with_suffix(".search.json").read_text())
    (losses,) = (value for key, value in known.items() if key.startswith("retrained_loss"))
    assert sorted(losses.values()) == sorted(trained)
    before = [(run / "metrics.jsonl").read_text() for run in runs]
    assert pvs(*command, "--retrain-data", tmp_path / "data", "--overwrite").code == 0
    assert [(run / "metrics.jsonl").read_text() for run in runs] == before, "trained again"
    assert TrainingJob.load(runs[0] / JOB_FILE).layout.data_parallel == 2
    winner = min(losses, key=losses.get)
    assert json.loads(best.read_text())["layers"] == int(dict(pair.split("=") for pair in winner.split(","))["layers"])


@pytest.mark.slow
def test_train_on_what_a_teacher_says(pvs, tmp_path):
    model = save_tiny_tokenizer(make_tiny_llama(tmp_path / "model"))
    teacher = save_tiny_tokenizer(make_tiny_llama(tmp_path / "teacher", seed=1, num_hidden_layers=6))
    larger = save_tiny_tokenizer(make_tiny_llama(tmp_path / "larger", vocab_size=256), vocab=256)
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)))
    assert pvs("tokenize", text, "--tokenizer", model, "--out", tmp_path / "data").code == 0
    settings = [
        "--data", tmp_path / "data", "--tokens", 512, "--sequence-length", 32, "--global-batch-size", 4,
        "--validation-samples", 8, "--pipeline-parallel", 2,
    ]  # fmt: skip
    for options, sentence in (
        (["--temperature", 2], "are for distillation; add --teacher"),
        (["--teacher", larger], "The teacher's vocabulary has 256 tokens and the student's 128"),
        (["--teacher", teacher, "--temperature", 0], "distill.temperature"),
        (["--teacher", tmp_path / "none"], "does not exist"),
    ):
        refused = pvs("train", model, tmp_path / "run", *settings, *options)
        assert refused.code == 2, refused.output
        assert sentence in " ".join(refused.errors.split())
    assert not (tmp_path / "run").exists()
    teaching = ["--teacher", teacher, "--temperature", 2, "--top-k", 20, "--lm-weight", 0.5]
    done = pvs("train", model, tmp_path / "run", *settings, *teaching)
    assert done.code == 0, done.errors
    curve = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert curve.training[-1]["kl"] < curve.training[0]["kl"]
    # The same folder with another teacher is another run.
    other = save_tiny_tokenizer(make_tiny_llama(tmp_path / "teacher", seed=2, num_hidden_layers=6))
    refused = pvs("train", model, tmp_path / "run", *settings, *teaching)
    assert refused.code == 2, other
    assert "holds a run with other settings or weights" in refused.errors
