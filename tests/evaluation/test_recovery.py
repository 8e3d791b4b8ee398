"""The measures of recovery that need no data set: those of transformers' own answers, measured once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_pvs.errors import UserError
from nemo_pvs.evaluation import recovery
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
from nemo_pvs.evaluation.degeneration import agreement, distinct, repetition
from nemo_pvs.evaluation.measure import measure
from nemo_pvs.evaluation.requests import EvaluationRequest
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.texts import windows_of
from nemo_pvs.recipe.blocks import RecoveryMeasures
from nemo_pvs.reporting.compare.scores import read_scores
from tests.evaluation.models import TASKS, save_byte_model

TEXT = str(TASKS / "letters.jsonl")
SIZES = RecoveryMeasures(windows=3, prompt_tokens=8, new_tokens=12)
LENGTH = 40


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    parent = save_byte_model(tmp_path / "parent")
    return [parent, save_byte_model(tmp_path / "pruned", seed=1, num_hidden_layers=2)]


def _request(**settings) -> EvaluationRequest:
    sizes = {"samples": 8, "sequence_length": LENGTH, "recovery": SIZES}
    return EvaluationRequest([], [TEXT], [], **{**sizes, **settings})


def _measure(paths: list[Path], out: Path, parent: Path | None = None, **settings) -> list[dict]:
    checkpoints = {path: OpenedCheckpoint(str(path)) for path in paths}
    reference = checkpoints.get(parent) or (OpenedCheckpoint(str(parent)) if parent else None)
    options = {"task_data": out / "none", "parent": reference}
    found = measure(list(checkpoints.values()), _request(), Store(out), Engine(), **options, **settings)
    assert json.loads((out / "results.json").read_text())["models"][0].get("left_out") == found[0].get("left_out")
    return found


def _of(found: dict) -> dict[str, dict]:
    prefix = f"recovery/{TEXT}/"
    return {name.removeprefix(prefix): about for name, about in found["measured"].items() if name.startswith(prefix)}


@pytest.mark.slow
def test_they_are_those_of_transformers(models: list[Path], tmp_path: Path) -> None:
    parent, pruned = _measure(models, tmp_path / "out", models[0])
    ids = windows_of(TEXT, models[0], samples=3, sequence_length=LENGTH).ids.long()
    continued, logprobs = [], []
    for path in models:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        prompts = ids[:, :8]
        new = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)[:, 8:]
        continued.append(new.tolist())
        with torch.no_grad():
            logprobs.append(model(ids).logits.double().log_softmax(-1))
    kl = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1)
    expected = {
        "repetition": sum(map(repetition, continued[1])) / 3,
        "distinct_1": distinct(continued[1], 1),
        "distinct_2": distinct(continued[1], 2),
        "agreement": sum(agreement(ours, theirs) for ours, theirs in zip(continued[1], continued[0], strict=True)) / 3,
        "kl": float(kl.mean()),
        "kl_1_16": float(kl[:, :16].mean()),
        "kl_17_40": float(kl[:, 16:].mean()),
    }
    assert {name: about["value"] for name, about in _of(pruned).items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert _of(pruned)["kl"]["by_document"] == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    lower = {name for name, about in _of(pruned).items() if not about["higher_is_better"]}
    assert lower == {"repetition", "kl", "kl_1_16", "kl_17_40"}
    own = _of(parent)
    assert own["agreement"]["value"] == 1.0
    assert all(own[name]["value"] == 0.0 for name in own if name.startswith("kl"))
    assert f"perplexity/{TEXT}/loss" in pruned["measured"]

    scores = read_scores(tmp_path / "out")
    ours, parents = (scores[model["fingerprint"]][f"recovery/{TEXT}/kl"] for model in (pruned, parent))
    assert ours.by_document is not None
    assert ours.content == parents.content, "the report pairs their windows"
    assert scores[pruned["fingerprint"]][f"recovery/{TEXT}/agreement"].by_document is not None


@pytest.mark.slow
def test_they_are_measured_once(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _measure(models[1:], tmp_path / "out", models[0])  # the parent is none of the models
    monkeypatch.setattr(recovery, "divergence", None)
    monkeypatch.setattr(OpenedCheckpoint, "_scorer", None)
    again = _measure(models[1:], tmp_path / "out", models[0])
    values = [{name: about["value"] for name, about in _of(found).items()} for found in (first[0], again[0])]
    assert values[0] == values[1]
    assert all(about["measured"] == "before" for about in _of(again[0]).values())


@pytest.mark.slow
def test_without_a_parent_of_the_same_tokens_nothing_is_compared(models: list[Path], tmp_path: Path) -> None:
    alone = _measure(models[1:], tmp_path / "alone")[0]
    assert set(_of(alone)) == {"repetition", "distinct_1", "distinct_2"}
    assert alone["left_out"] == {"agreement and KL": "no parent to compare with (--parent)"}
    tokenizer = models[0] / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<eos>", "<end>"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = models[0] / name
        file.write_text(file.read_text().replace("<eos>", "<end>"))
    other = _measure(models[1:], tmp_path / "other", models[0])[0]
    assert set(_of(other)) == {"repetition", "distinct_1", "distinct_2"}
    assert other["left_out"] == {"agreement and KL": f"its tokens are not those of {models[0]}"}
    assert _of(other)["repetition"]["value"] == _of(alone)["repetition"]["value"]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"prompt_tokens": 50}, "have 40 tokens, and recovery takes prompts of 50 from them"),
        ({"new_tokens": 300}, "A prompt of 32 tokens and 300 new ones do not fit the context of"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_before_any_work(
    sizes: dict[str, int], sentence: str, models: list[Path], tmp_path: Path
) -> None:
    request = _request(recovery=RecoveryMeasures(**sizes))
    store = Store(tmp_path / "out")
    with pytest.raises(UserError, match=sentence):
        measure([OpenedCheckpoint(str(models[0]))], request, store, Engine(), task_data=tmp_path)
    assert not store.folder.exists()
