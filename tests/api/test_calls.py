"""Calls from Python: in a notebook, twice in one process, with paths of either kind, and what they return."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest

import nemo_pvs as pvs
from nemo_pvs.api import values
from nemo_pvs.api.evaluate import Measurement
from nemo_pvs.checkpoints.nemo import fiddle_json
from nemo_pvs.checkpoints.nemo.fiddle_json import Config, Symbol
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import read_json, write_json
from tests import families
from tests.checkpoints.test_gguf_write import llama, saved
from tests.conftest import make_tiny_llama

CELL = """\
import asyncio, sys
import nemo_pvs as pvs
from nemo_pvs.system.progress import console
console.quiet = True
model, text, out = sys.argv[1:]

async def cell(number):
    folder = f"{out}/{number}"
    small = pvs.prune(model, f"{folder}/small", "minitron-width", ffn=64, data=text, samples=2, sequence_length=16)
    pvs.convert(small.path, f"{folder}/nemo")
    rows = pvs.evaluate([small.path, f"{folder}/nemo"], perplexity=text, samples=2, sequence_length=16, out=folder)
    return [(row["metric"], row["value"]) for row in rows]

found = [asyncio.run(cell(number)) for number in (1, 2)]
assert found[0] == found[1], found
print(found[0])
"""


@pytest.mark.slow
def test_a_notebook_calls_everything_twice(model: Path, text: Path, tmp_path: Path) -> None:
    """A running event loop, no main guard, one process."""
    done = subprocess.run(
        [sys.executable, "-", model, text, tmp_path], input=CELL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = ast.literal_eval(done.stdout)
    assert [metric for metric, _ in rows] == ["loss", "perplexity"] * 2
    assert rows[:2] == rows[2:], "a model in two formats"


def test_a_megatron_run_is_converted_with_and_without_a_config(tmp_path: Path) -> None:
    """Neither has NeMo's context, which says where a tokenizer is."""
    model = make_tiny_llama(tmp_path / "hf")
    there = pvs.convert(model, tmp_path / "root", to="megatron")
    back = pvs.convert(tmp_path / "root", tmp_path / "nemo", to="nemo")
    assert back.manifest is not None
    assert there.manifest is not None
    assert back.manifest.source == there.manifest.source
    [iteration] = (tmp_path / "root").glob("iter_*")
    for name in ("run_config.yaml", "huggingface_config.json", "common.pt"):
        (iteration / name).rename(tmp_path / name)
    bare = pvs.convert(iteration, tmp_path / "bare", to="hf", config=model)
    assert bare.manifest is not None
    assert bare.manifest.source == there.manifest.source


def test_a_tokenizer_that_a_nemo_training_only_names_is_named(tmp_path: Path) -> None:
    pvs.convert(make_tiny_llama(tmp_path / "hf"), tmp_path / "nemo")
    path = tmp_path / "nemo" / "context" / "io.json"
    stored = fiddle_json.find(read_json(path), "<root>.model")
    assert stored is not None
    tokenizer = Config(Symbol("nemo.collections.common.tokenizers", "AutoTokenizer"), {"pretrained_model_name": "a/b"})
    model = Config(stored.symbol, {**stored.arguments, "tokenizer": tokenizer})
    write_json(path, fiddle_json.dump(Config(Symbol("nemo.lightning.io.pl", "TrainerContext"), {"model": model})))
    notes = pvs.convert(tmp_path / "nemo", tmp_path / "back").notes
    assert f"The result has no tokenizer: {tmp_path / 'nemo'} only names a/b; copy its files into the result." in notes


def test_a_long_text_is_read_in_pieces_and_said_to_take_long(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its words are split from each other, so that the tokens are those of the whole."""
    arguments = (model, str(text), 4, 16, 0)
    whole = values.tokens_of(*arguments)
    assert not capsys.readouterr().out
    monkeypatch.setattr(values, "_CHARACTERS_AT_ONCE", 1000)
    monkeypatch.setattr(values, "_LONG", 1000)
    pieces = values.tokens_of(*arguments)
    assert capsys.readouterr().out == (
        f"{text} has 0.0 GB, all of which is tokenised to draw 4 windows. One of its files, or a token file (pvs "
        "tokenize), is faster.\n"
    )
    assert pieces.manifest == whole.manifest


def test_layers_that_no_class_could_load_are_refused_before_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    families.without_uneven_classes(monkeypatch)
    model = families.save_tiny(tmp_path / "mistral", "mistral")
    with pytest.raises(UserError, match="mistral has no class for uneven layers; prune all layers alike"):
        pvs.prune(model, tmp_path / "small", "flap", ratio=0.2, bias=False, data=tmp_path / "no text")


def test_three_lines(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the README, on a model that takes seconds."""
    monkeypatch.chdir(tmp_path)
    small = pvs.prune(str(model), "SMALLER", method="flap", ratio=0.2, data=text, samples=2, sequence_length=16)
    converted = pvs.convert("SMALLER", "SMALLER-nemo")
    rows = pvs.evaluate(["SMALLER", "SMALLER-nemo"], perplexity=text, samples=2, sequence_length=16)

    assert small.path == Path("SMALLER")
    assert small.shape.uneven
    assert "keep_ffn" not in repr(small), "a notebook shows every index"
    assert "model.layers" not in repr(converted), "a notebook shows every tensor"
    assert small.shape == shape_of(pvs.open_checkpoint("SMALLER-nemo"))
    table = pandas.DataFrame(rows)
    assert list(table.columns) == [*Measurement.__annotations__]
    assert list(table["model"]) == ["SMALLER"] * 2 + ["SMALLER-nemo"] * 2
    assert table.pivot(index="model", columns="metric", values="value").nunique().to_list() == [1, 1]


def test_a_gguf_file_is_a_model_for_every_verb_that_says_so(tmp_path: Path) -> None:
    folder, file, text = saved(tmp_path / "model", llama()), tmp_path / "the model.gguf", tmp_path / "text.txt"
    text.write_text("A text that is as good as any other. " * 20)
    pvs.convert(folder, file, dtype="fp32")
    size: dict[str, Any] = {"samples": 2, "sequence_length": 40}
    rows = pvs.evaluate([file, folder], parent=file, tasks="recovery", perplexity=text, limit=1, **size, out=tmp_path)
    for metric in ("loss", "repetition"):
        ours, theirs = (row for row in rows if row["metric"] == metric)
        assert (ours["model"], theirs["model"]) == (str(file), str(folder))
        assert ours["value"] == theirs["value"]

    scores = pvs.calibrate(file, tmp_path / "scores", data=text, **size)
    best = pvs.search(file, scores, tmp_path / "best.json", parameters=1e5, tolerance=0.5, hidden_step=0)
    assert best.shape.ffn < 96

    for name in (str(file), file, "hf://owner/name", Path("hf://owner/name")):
        with pytest.raises(UserError, match=r"name|gguf.* is not a folder, which is needed here; write one with pvs"):
            pvs.train(name, tmp_path / "x", tmp_path, tokens=64)


def test_mistakes_are_user_errors_and_write_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    for call in (
        lambda: pvs.prune(model, tmp_path / "x", "flap", ratio=2.0, data=text, samples=2, sequence_length=16),
        lambda: pvs.prune(model, tmp_path / "x", "flap", sparsity="2:4"),
        lambda: pvs.convert(model, tmp_path / "x", to="gguf"),
        lambda: pvs.convert(model, tmp_path / "x", verify="maybe"),
        lambda: pvs.convert(model, tmp_path / "x", to="hf", max_shard_size="infGB"),
        lambda: pvs.calibrate(model, tmp_path / "x", data=text, samples=2, sequence_length=16, device="tpu"),
        lambda: pvs.search(model, tmp_path / "absent", tmp_path / "x", parameters=1e5),
        lambda: pvs.tokenize(text, model, tmp_path / "x", split="half"),
        lambda: pvs.train(model, tmp_path / "x", tmp_path / "absent", tokens=-1),
        lambda: pvs.evaluate(model, out=tmp_path / "x", limit=0),
        lambda: pvs.run("nothing", tmp_path / "x"),
        lambda: pvs.report(tmp_path / "absent", tmp_path / "x"),
        lambda: pvs.open_checkpoint(tmp_path / "absent"),
    ):
        with pytest.raises(pvs.UserError):
            call()
        assert not list(tmp_path.iterdir())


def test_one_path_or_several_of_either_kind(model: Path, text: Path, tmp_path: Path) -> None:
    settings = {"samples": 2, "sequence_length": 16, "out": tmp_path}
    found = [
        pvs.evaluate(paths, perplexity=texts, **settings)  # type: ignore[arg-type]
        for paths, texts in ((model, text), (str(model), str(text)), ([model], [str(text)]), ((model,), (text,)))
    ]
    assert all(rows == found[0] for rows in found)
    assert [row["task"] for row in found[0]] == [f"perplexity/{text}"] * 2
    assert found[0].models[0]["measured"][f"perplexity/{text}/loss"]["value"] == found[0][0]["value"]


def test_scores_are_given_as_they_are_or_by_their_folder(model: Path, text: Path, tmp_path: Path) -> None:
    scores = pvs.calibrate(model, tmp_path / "scores", data=text, samples=2, sequence_length=16)
    plans = [
        pvs.prune(model, tmp_path / str(index), "minitron-width", ffn=64, scores=known).plan
        for index, known in enumerate((scores, tmp_path / "scores"))
    ]
    assert plans[0] == plans[1] is not None
    other = make_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(pvs.UserError, match="measured on another model"):
        pvs.prune(other, tmp_path / "x", "minitron-width", ffn=64, scores=scores)


def test_a_checkpoint_is_opened_whatever_it_is(model: Path, tmp_path: Path) -> None:
    pvs.convert(model, tmp_path / "nemo")
    one, other = pvs.open_checkpoint(model), pvs.open_checkpoint(str(tmp_path / "nemo"))
    assert one.read("lm_head.weight").equal(other.read("lm_head.weight"))
