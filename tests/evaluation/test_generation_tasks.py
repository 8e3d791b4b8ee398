"""Tasks that generate text, by lm-eval's own definitions from local data; and which of them are refused, and how."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.requests import TaskRequest, parse_tasks
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.tasks import load_tasks, measure_task
from tests.evaluation.generation_data import save_counting_model, write_code_task, write_generation_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_counting_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_generation_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def ifeval_anew(monkeypatch) -> None:
    """Let lm-eval import the code of IFEval once more."""
    for name in [name for name in sys.modules if "ifeval" in name]:
        monkeypatch.delitem(sys.modules, name)


def write_punkt(folder: Path, monkeypatch: Any) -> None:
    """Make NLTK find its data, of which no instruction here needs any content."""
    import nltk

    (folder / "tokenizers" / "punkt_tab").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(folder)])


@pytest.mark.slow
def test_metrics_are_those_of_lm_evals_own_model(folder, data, tmp_path, monkeypatch):
    write_punkt(tmp_path, monkeypatch)
    tasks = load_tasks(parse_tasks("gsm8k:2,ifeval"), data)
    assert [task.name for task in tasks] == ["gsm8k/2-shot", "ifeval/0-shot"]
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for task in tasks:
        task.task.config.generation_kwargs["max_gen_toks"] = 24
    ours = [measure_task(task, CheckpointLM(scorer, tokenizer, 1024)) for task in tasks]
    assert list(ours[0]) == ["exact_match,strict-match", "exact_match,flexible-extract"]
    values = {name: about["value"] for measured in ours for name, about in measured.items()}
    assert any(0 < value < 1 for name, value in values.items() if name.startswith("exact_match")), values
    assert any(0 < value < 1 for name, value in values.items() if name.endswith("_acc")), values
    for filtered in ours[0].values():  # one answer a question and filter, and not those of the other filter
        assert filtered["documents"] == len(filtered["by_document"]) == 9
        assert filtered["value"] == pytest.approx(sum(filtered["by_document"]) / 9)
    for task, measured in zip(tasks, ours, strict=True):
        task.task._instances = None
        task.task.set_fewshot_seed(1234)
        model = HFLM(pretrained=hf, tokenizer=tokenizer, max_length=1024, batch_size=1, device="cpu")
        theirs = evaluate(model, {task.task.config.task: task.task}, bootstrap_iters=0)
        results = theirs["results"][task.task.config.task]
        for name, about in measured.items():
            key = name if "," in name else f"{name},none"
            assert about["value"] == pytest.approx(results[key])


def test_a_task_that_samples_is_refused_before_any_work(data):
    with pytest.raises(
        UserError, match=r"The task gsm8k_cot_self_consistency generates text with do_sample: True, te"
    ):
        load_tasks([TaskRequest("gsm8k_cot_self_consistency")], data)


def test_generated_code_runs_only_if_the_user_says_so(folder, data, tmp_path):
    tasks = write_code_task(tmp_path / "tasks")
    with pytest.raises(UserError, match="The task doubling runs the code that the model writes, with all your rights"):
        load_tasks([TaskRequest("doubling", folder=tasks)], data)
    assert not (tasks / "ran").exists(), "not even imported"
    [task] = load_tasks([TaskRequest("doubling", folder=tasks)], data, run_generated_code=True)
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    measured = measure_task(task, CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), 1024))
    assert (tasks / "ran").read_text() == "loaded tested tested tested "
    assert measured["passes"]["value"] == 1


def test_generated_code_does_not_hide_in_a_group(tmp_path):
    """As in lm-eval's humaneval_infilling, which runs what the model writes and does not say so itself."""
    tasks = write_code_task(tmp_path / "tasks")
    (tasks / "coding.yaml").write_text("group: coding\ntask:\n- doubling\n")
    (tasks / "tagged.yaml").write_text((tasks / "doubling.yaml").read_text() + "tag: programs\n")
    (tasks / "doubling.yaml").unlink()
    for name in ("coding", "programs"):
        with pytest.raises(UserError, match="The task doubling runs the code that the model writes"):
            load_tasks([TaskRequest(name, folder=tasks)], tmp_path)
        assert not (tasks / "ran").exists(), "not even imported"
    with pytest.raises(UserError, match=r"The task humaneval_.* runs the code that the model writes"):
        load_tasks([TaskRequest("humaneval_infilling")], tmp_path)


def test_other_end_of_text_tokens_are_another_measurement(folder, tmp_path):
    """They are in no tensor, no task and no file of the tokenizer, and a user may have corrected them."""
    model = shutil.copytree(folder, tmp_path / "model")
    tasks = write_code_task(tmp_path / "tasks")
    [task] = load_tasks([TaskRequest("doubling", folder=tasks)], tmp_path, run_generated_code=True)

    def measured() -> Any:
        checkpoint = OpenedCheckpoint(str(model))
        with checkpoint.language_model(Engine()) as load:
            return checkpoint.measure_task(task, Store(tmp_path / "out"), Engine(), load, lambda *_, **__: None)

    assert "measured" not in measured()["passes"]
    assert measured()["passes"]["measured"] == "before"
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert "measured" not in measured()["passes"]


def test_humaneval_says_what_it_needs(data):
    with pytest.raises(UserError, match="The task humaneval_plus runs the code that the model writes"):
        load_tasks([TaskRequest("humaneval_plus")], data)
    with pytest.raises(UserError, match=r"humaneval needs files from .* that are not on this machine .*'code_eval'"):
        load_tasks([TaskRequest("humaneval")], data, run_generated_code=True)


def test_a_missing_package_is_named(data, ifeval_anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError) as refused:
        load_tasks([TaskRequest("ifeval")], data)
    assert str(refused.value) == "The task ifeval needs the package langdetect; run pip install 'lm_eval[ifeval]'."


@pytest.mark.slow
def test_missing_data_of_nltk_are_named_and_not_downloaded(data, ifeval_anew, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(UserError, match=r"ifeval needs files from .* NLTK's by python -m nltk.downloader punkt_tab"):
        load_tasks([TaskRequest("ifeval")], data)


def test_a_metric_that_would_be_downloaded_is_named(data, tmp_path):
    tasks = write_code_task(tmp_path / "tasks")
    definition = (tasks / "doubling.yaml").read_text().replace("!function utils.passes", "rouge")
    (tasks / "doubling.yaml").write_text(definition.replace("unsafe_code: true", "unsafe_code: false"))
    with pytest.raises(UserError, match=r"doubling/0-shot has the metric rouge of the package evaluate, which is not"):
        load_tasks([TaskRequest("doubling", folder=tasks)], data)


@pytest.mark.slow
def test_the_verb_refuses_generated_code_and_allows_it(pvs, folder, tmp_path):
    tasks = write_code_task(tmp_path / "tasks")
    command = ("evaluate", folder, "--tasks", tasks, "--out", tmp_path / "out")
    refused = pvs(*command)
    assert refused.code == 2
    assert "allow that with --run-generated-code" in refused.errors
    done = pvs(*command, "--run-generated-code")
    assert done.code == 0, done.errors
    assert "doubling/0-shot" in done.output
    assert not list((tmp_path / "out").rglob("*.journal"))
    before = (tasks / "ran").read_text()
    assert pvs(*command, "--run-generated-code").code == 0
    assert (tasks / "ran").read_text() in (before, f"{before}loaded "), "no answer is tested again"
