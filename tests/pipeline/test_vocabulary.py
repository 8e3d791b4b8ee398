"""A recipe with a smaller vocabulary: its targets have their own tokens, and are compared by bits per byte."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.data.token_set import read_token_file
from nemo_pvs.data.tokenize import load_tokenizer, tokenizer_hash
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.folder import HUGGING_FACE
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.pipeline.stages.evaluate import evaluate
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.tables.results import markdown_table
from tests.conftest import make_tiny_llama
from tests.pruning.test_vocabulary import ROWS, TEXT, byte_level, save


@pytest.fixture(name="values")
def values_fixture(tmp_path: Path) -> dict[str, Any]:
    parent = save(make_tiny_llama(tmp_path / "parent", vocab_size=ROWS), byte_level())
    corpus = tmp_path / "corpus.jsonl"
    texts = [TEXT[start : start + 900] for start in range(0, 27000, 900)]
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return {
        "name": "tiny",
        "title": "A tiny run",
        "parent": {"source": str(parent), "pretraining_tokens": 1e6},
        "data": {
            "source": str(corpus),
            "split": {"train": 0.7, "validation": 0.1, "calibration": 0.1, "test": 0.1},
        },
        "calibrate": {"samples": 4, "sequence_length": 32},
        "targets": {
            "small": {"method": "minitron-width", "ffn": 48, "vocab": 400},
            "plain": {"method": "minitron-width", "ffn": 64},
        },
        "train": {
            "tokens": 1024,
            "sequence_length": 32,
            "global_batch_size": 4,
            "learning_rate": 3e-3,
            "precision": "fp32",
            "validations": 2,
            "validation_samples": 4,
        },
        "evaluate": {"samples": 4, "sequence_length": 32},
    }


@pytest.mark.slow
def test_a_target_with_fewer_tokens_has_its_own_text(values: dict[str, Any], tmp_path: Path) -> None:
    run = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    files = run.prepare_only()
    data = {arm.name: Path(run.job(arm).data["train"]) for arm in run.recipe.runs}
    assert all(file.exists() for file in files)
    assert data["small-pruned"] == data["small-random"] == (tmp_path / "run/retokenised/small/train").resolve()
    assert data["plain-pruned"] == data["plain-random"] == (tmp_path / "run/data/train").resolve()

    pruned = run.pruned("small") / HUGGING_FACE
    assert shape_of(open_source(pruned)) == run.parent_shape.replace(ffn=48, vocab=400)
    plan = Plan.load(run.pruned("small") / "plan.json")
    old, new = run.records.data, run.records.retokenised("small")
    assert plan.provenance["vocabulary"]["tokens"] == old.splits["train"].tokens
    assert new.splits["train"].tokenizer_sha256 == tokenizer_hash(pruned) != old.splits["train"].tokenizer_sha256
    tokenizers = load_tokenizer(run.tokenizer), load_tokenizer(pruned)
    texts = []
    for tokenizer, file in zip(tokenizers, (data["plain-pruned"], data["small-pruned"]), strict=True):
        texts.append(tokenizer.decode(read_token_file(file).astype("int64").tolist()))
    assert texts[0] == texts[1]
    assert new.splits["train"].tokens >= old.splits["train"].tokens

    random = NemoSource(run.initial("small", "random"))
    assert shape_of(random).vocab == 400
    assert tokenizer_hash(run.initial("small", "random") / "context" / "tokenizer") == tokenizer_hash(pruned)

    for label, path in (("parent", run.parent_path), ("small-pruned-initial", run.initial("small", "pruned"))):
        run.do(evaluate(run, label, path))
        measured = run.records.evaluation(label).test
        assert measured.bits_per_byte is not None
        assert measured.bytes is not None
        assert measured.tokens is not None
        bits = measured.loss * measured.tokens / math.log(2)
        assert measured.bits_per_byte * measured.bytes == pytest.approx(bits)
        assert measured.bytes > measured.tokens
    # The bytes are those of the text between the first token, which is not predicted, and the last.
    prefix = run.tokens_of("small").prefix("test")
    windows = torch.from_numpy(read_token_file(prefix).astype("int64"))[: 4 * 32].view(4, 32)[:, 1:]
    texts = [tokenizers[1].decode(window, skip_special_tokens=True) for window in windows]
    assert measured.bytes == sum(len(text.encode()) for text in texts)

    records = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/stages").rglob("*.json")}
    Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare_only()
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/stages").rglob("*.json")}
    assert {name for name in again if not name.endswith("begun.json") and again[name] != records[name]} == set()


@pytest.mark.slow
def test_the_teacher_of_a_target_with_fewer_tokens_has_these_tokens(values: dict[str, Any], tmp_path: Path) -> None:
    values["train"]["distill"] = {"teacher": "parent"}
    run = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    run.prepare_only()
    teachers = {arm.name: run.job(arm).teacher for arm in run.recipe.runs}
    assert teachers["plain-pruned"] == teachers["plain-random"] == run.parent_path.resolve()
    assert teachers["small-pruned"] == teachers["small-random"]
    teacher = teachers["small-pruned"]
    assert teacher is not None
    assert shape_of(open_source(teacher)) == run.parent_shape.replace(vocab=400)
    assert tokenizer_hash(teacher) == tokenizer_hash(run.pruned("small") / HUGGING_FACE)
    kept = Plan.load(run.pruned("small") / "plan.json").keep_vocab
    assert kept is not None
    ids = torch.tensor([[5, 300, 17, 399, 40]])
    with torch.no_grad():
        parent, sliced = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits.softmax(-1)
            for folder, tokens in ((run.parent_path, torch.tensor(kept)[ids]), (teacher, ids))
        )
    renormalised = parent[..., list(kept)] / parent[..., list(kept)].sum(-1, keepdim=True)
    torch.testing.assert_close(sliced, renormalised)
    (arm,) = (arm for arm in run.recipe.runs if arm.name == "small-random")
    charged = arm_cost(run.recipe, arm, run.parent_shape.replace(ffn=48, vocab=400), run.parent_shape)
    (lessons,) = (charge for charge in charged.charges if charge.activity == "teacher")
    forward = run.parent_shape.replace(vocab=400).flops_per_token(sequence_length=32, training=False)
    assert lessons.flops == arm.tokens * forward


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("data", "token_files"), dict.fromkeys(("train", "validation", "calibration", "test"), "x"), "token_files"),
        (("targets", "small", "stages"), 2, "cannot be reached in rounds"),
        (("train", "distill"), None, "only the parent can be the teacher"),
        (("targets", "small", "vocab"), 9999, "pruning only removes"),
    ],
)
def test_what_a_smaller_vocabulary_excludes(
    values: dict[str, Any], path: tuple[str, ...], value: Any, message: str
) -> None:
    changed = copy.deepcopy(values)
    block = changed
    for key in path[:-1]:
        block = block.setdefault(key, {})
    block[path[-1]] = value
    if path == ("train", "distill"):
        block["distill"] = {"teacher": values["parent"]["source"]}
    if path == ("data", "token_files"):
        changed["data"] = {"token_files": value}
    with pytest.raises(UserError, match=message):
        dry_run(parse_recipe(changed, "test"))


@pytest.mark.slow
def test_a_vocabulary_without_room_for_the_bytes_is_refused_before_any_work(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["targets"]["small"]["vocab"] = 250
    with pytest.raises(UserError, match="Target small: A vocabulary of 250 cannot hold"):
        Pipeline(parse_recipe(values, "test"), tmp_path / "run").prepare_only()
    assert not (tmp_path / "run").exists()


def test_the_dry_run_names_the_stage(values: dict[str, Any]) -> None:
    planned = dry_run(parse_recipe(values, "test"))
    stages = list(planned.stages)
    assert stages.index("prune/small") < stages.index("data/small") < stages.index("random/small")
    assert "data/plain" not in stages
    assert planned.targets[0].expected.shape.vocab == 400
    values["train"]["distill"] = {"teacher": "parent"}
    stages = list(dry_run(parse_recipe(values, "test")).stages)
    assert stages.index("data/small") < stages.index("teacher/small") < stages.index("train/small-pruned")


@pytest.mark.parallel
@pytest.mark.slow
def test_a_smaller_vocabulary_trains_to_the_report(
    values: dict[str, Any], tmp_path: Path, forked_launcher: None
) -> None:
    del values["targets"]["plain"]
    values["train"] |= {"tokens": 512, "distill": {"teacher": "parent"}}
    run = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    run.run()
    results = assemble(run)
    assert results.parent is not None
    assert results.parent.test_bits_per_byte is not None
    assert not results.all_same_tokens
    for arm in results.arms:
        assert arm.shape.vocab == 400
        assert arm.ledger.training.tokens == 512
        assert arm.validation[-1].loss < arm.validation[0].loss
        assert arm.test_bits_per_byte_after is not None
    assert (
        results.hashes["tokenizer of small"]
        == tokenizer_hash(run.model("small-pruned"))
        != results.hashes["tokenizer"]
    )
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json").arms == results.arms
    assert "test bits per byte after" in markdown_table(results)
