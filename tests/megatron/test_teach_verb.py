"""``pvs teach``, and ``pvs train`` from its cache, as a user types them."""

from __future__ import annotations

import json
import random

import pytest

from nemo_pvs.data.teacher_cache import TeacherCache
from nemo_pvs.ledger.ledger import LEDGER, Ledger
from nemo_pvs.training import metrics
from tests.conftest import make_tiny_llama, save_tiny_tokenizer

pytestmark = [pytest.mark.parallel, pytest.mark.slow, pytest.mark.usefixtures("forked_launcher")]


def test_a_teacher_answers_once_and_trainings_read_it(pvs, tmp_path):
    student = save_tiny_tokenizer(make_tiny_llama(tmp_path / "student"))
    teacher = save_tiny_tokenizer(make_tiny_llama(tmp_path / "teacher", seed=5, initializer_range=0.2))
    generator = random.Random(0)
    words = [f"w{generator.randint(2, 127)}" for _ in range(61)]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(words[index:] + words * 5)}) for index in range(60)))
    assert pvs("tokenize", text, "--tokenizer", student, "--out", tmp_path / "data").code == 0
    order = ["--data", tmp_path / "data", "--sequence-length", 32, "--global-batch-size", 4]
    teach = ["teach", teacher, "--out", tmp_path / "cache", *order, "--top-k", 16, "--precision", "fp32"]
    precise = [*teach, "--cache-precision", "fp32"]

    for options, message in (
        (["--tokens", 1e9], "The run reads 1,000,000,000 tokens, but"),
        (["--tokens", 512, "--top-k", 0], "--top-k is 0"),
        (["--tokens", 512, "--tensor-parallel", 3], "Tensor parallelism 3"),
        (["--tokens", 512, "--sequence-length", 512], "context ends at 256"),
    ):
        refused = pvs(*precise, *options)
        assert (refused.code, message in refused.errors) == (2, True), refused.errors
    assert not (tmp_path / "cache").exists()

    done = pvs(*precise, "--tokens", 500, "--first-token", 200, "--data-parallel", 2, "--micro-batch-size", 3)
    assert done.code == 0, done.errors
    assert "512 tokens, 100 bytes each, from token 256 of the training order" in done.output
    assert f"hold {TeacherCache.open(tmp_path / 'cache').kept_probability():.1%} of the teacher's" in done.output
    ledger = Ledger.load(tmp_path / "cache" / LEDGER)
    assert [(charge.activity, charge.tokens) for charge in ledger.charges] == [("teacher", 512)]
    content = TeacherCache.open(tmp_path / "cache").content
    assert (content.first, content.end, content.top_k) == (8, 24, 16)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    again = pvs(*precise, "--tokens", 512, "--first-token", 256)
    assert again.code == 0, again.errors
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a complete cache was written again"
    other = pvs(*teach, "--tokens", 512, "--first-token", 256)
    assert other.code == 2
    assert "holds a teacher cache made with precision fp32, not fp16" in other.errors

    train = [*order, "--tokens", 512, "--first-token", 256, "--validation-samples", 8, "--precision", "fp32"]
    train += ["--teacher", teacher, "--temperature", 2]
    cached = [*train, "--cache", tmp_path / "cache"]
    for options, message in (
        (
            [*cached, "--first-token", 384],
            "covers the tokens 256 to 768 of the training order, but this training reads",
        ),
        ([*cached, "--data-seed", 5], "made with seed 1234, not 5"),
        ([*cached, "--teacher", student], "made from another teacher"),
        ([*cached, "--top-k", 17], "top_k is 17, but cache.top_k keeps only 16"),
        ([*cached, "--embedding-weight", 1], "not its hidden states"),
        ([*train, "--cache", tmp_path / "nowhere"], "is not a teacher cache"),
        ([*cached, "--rest", "class"], "rest: class needs temperature 1"),
    ):
        refused = pvs("train", student, tmp_path / "run", *options)
        assert (refused.code, message in refused.errors) == (2, True), refused.errors
    assert not (tmp_path / "run").exists()

    curves = []
    for name, options in (("cached", cached), ("online", [*train, "--top-k", 16])):
        done = pvs("train", student, tmp_path / name, *options)
        assert done.code == 0, done.errors
        curves.append(metrics.read(tmp_path / name / "metrics.jsonl").training)
    for ours, theirs in zip(*curves, strict=True):
        assert [ours[key] for key in ("loss", "kl")] == pytest.approx(
            [theirs[key] for key in ("loss", "kl")], rel=1e-4
        )
    assert curves[0][0]["kl"] == pytest.approx(curves[1][0]["kl"], rel=1e-6)
    charges = [Ledger.load(tmp_path / name / LEDGER).charges for name in ("cached", "online")]
    assert charges[0] == charges[1]
