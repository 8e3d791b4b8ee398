"""Tasks as users ask for them: names that cannot collide, local data, the paper's metrics, numbers of lm-eval."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_pvs.checkpoints.huggingface.folder import HuggingFaceSource
from nemo_pvs.errors import UserError
from nemo_pvs.evaluation.language_model import CheckpointLM
from nemo_pvs.evaluation.requests import EvaluationRequest, TaskRequest, parse_tasks, task_presets
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.evaluation.summary import average
from nemo_pvs.evaluation.tasks import load_tasks, measure_task
from nemo_pvs.layerwise.token_scores import TokenScores
from tests.evaluation.models import TASKS, save_byte_model
from tests.evaluation.paper_data import write_paper_data

CONTEXT = 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def model(folder) -> CheckpointLM:
    scorer = TransformersScorer(HuggingFaceSource(folder), dtype=torch.float32, device="cpu")
    return CheckpointLM(scorer, AutoTokenizer.from_pretrained(folder), CONTEXT)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_paper_data(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_metrics_and_standard_errors_are_those_of_lm_eval(folder, model, monkeypatch):
    """The same tasks through simple_evaluate and HFLM; relative data files need its working directory."""
    loaded = {task.task.config.task: task for task in load_tasks(parse_tasks(str(TASKS)), Path("none"))}
    assert loaded.keys() == {"capitals", "endings", "letters"}
    monkeypatch.chdir(TASKS)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = simple_evaluate(
        HFLM(pretrained=hf, tokenizer=AutoTokenizer.from_pretrained(folder), max_length=CONTEXT, device="cpu"),
        tasks=list(loaded),
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        bootstrap_iters=0,
    )["results"]
    for name, task in loaded.items():
        measured = measure_task(task, model)
        metrics = {key.removesuffix(",none") for key in theirs[name] if key.endswith(",none") and "stderr" not in key}
        assert measured.keys() == metrics
        for metric, about in measured.items():
            assert about["value"] == pytest.approx(theirs[name][f"{metric},none"], rel=1e-3)
            error = theirs[name][f"{metric}_stderr,none"]
            if isinstance(error, float):
                assert about["stderr"] == pytest.approx(error, rel=1e-3)
            assert len(about["by_document"]) == about["documents"]


def test_accuracy_is_the_mean_of_single_documents(model):
    [task] = load_tasks([TaskRequest("capitals", folder=TASKS)], Path("none"))
    about = measure_task(task, model)["acc"]
    right = about["by_document"]
    assert about["value"] == pytest.approx(sum(right) / 8)
    assert about["stderr"] == pytest.approx(torch.tensor(right).std().item() / 8**0.5)
    assert measure_task(task, model, limit=3)["acc"]["by_document"] == right[:3]


def test_two_tasks_of_one_name_are_refused(tmp_path):
    """The later one would overwrite the earlier."""
    other = shutil.copytree(TASKS, tmp_path / "other")
    assert len(load_tasks(parse_tasks(f"{TASKS},{other}"), Path("none"))) == 6, "the same questions twice"
    letters = other / "letters.jsonl"
    letters.write_text(letters.read_text().replace(" ", "  "))
    with pytest.raises(UserError, match=f"{TASKS} and {other} have different tasks named letters/0-shot"):
        load_tasks(parse_tasks(f"{TASKS},{other}"), Path("none"))


@pytest.mark.slow
def test_few_shot_and_zero_shot_results_have_names_of_their_own(model):
    """The published code files both under the task, so the later one overwrites the earlier."""
    tasks = load_tasks(parse_tasks(f"{TASKS},capitals:2"), Path("none"))
    assert [task.name for task in tasks] == [
        *("capitals/0-shot", "endings/0-shot", "letters/0-shot", "capitals/2-shot")
    ]
    zero, two = tasks[0], tasks[-1]
    assert zero.content_hash != two.content_hash
    assert "Paris" not in zero.task.fewshot_context(zero.task.eval_docs[1], 0)
    assert measure_task(zero, model)["acc"]["documents"] == measure_task(two, model)["acc"]["documents"] == 8


def test_every_model_gets_the_same_few_shot_examples(model):
    """lm-eval draws them from one generator, which it does not reset between models."""
    [task] = load_tasks([TaskRequest("capitals", 2, folder=TASKS)], Path("none"))
    prompts = []
    for _ in range(2):
        measure_task(task, model)
        prompts.append([one.args for one in task.task.instances])
    assert prompts[0] == prompts[1]


@pytest.mark.slow
def test_the_preset_of_the_paper(model, data):
    """Eight tasks without examples, each with the metric that the paper's code reads."""
    tasks = load_tasks(parse_tasks("paper"), data)
    measured: dict[str, Any] = {}
    for task in tasks:
        measured.update({f"{task.name}/{metric}": about for metric, about in measure_task(task, model).items()})
    names = [
        "winogrande/0-shot/acc",
        "arc_challenge/0-shot/acc_norm",
        "arc_easy/0-shot/acc_norm",
        "hellaswag/0-shot/acc_norm",
        "piqa/0-shot/acc_norm",
        "sciq/0-shot/acc",
        "boolq/0-shot/acc",
        "openbookqa/0-shot/acc_norm",
    ]
    assert list(measured) == names
    request = EvaluationRequest.parse("paper", None)
    assert (request.texts, request.samples, request.sequence_length) == (
        ["c4", "wikitext", "cnn_dailymail"],
        256,
        8192,
    )
    mean = request.averages(measured)["paper/average"]
    assert mean["value"] == pytest.approx(sum(measured[name]["value"] for name in names) / 8)
    del measured[names[0]]
    assert request.averages(measured) == {}, "an average of seven is none of eight"


def test_the_error_of_an_average():
    about = {"documents": 10, "higher_is_better": True}
    measured = {"a": {"value": 0.5, "stderr": 0.3, **about}, "b": {"value": 0.7, "stderr": 0.4, **about}}
    mean = average(measured, ["a", "b"])
    assert mean is not None
    assert mean["value"] == pytest.approx(0.6)
    assert mean["stderr"] == pytest.approx(0.25)


def test_the_content_decides_the_hash_and_not_its_place(tmp_path):
    def hash_of(folder: Path) -> str:
        [task] = load_tasks([TaskRequest("capitals", folder=folder)], Path("none"))
        return task.content_hash

    shutil.copytree(TASKS, tmp_path / "moved")
    original = hash_of(TASKS)
    assert hash_of(tmp_path / "moved") == original
    shutil.copytree(TASKS, tmp_path / "changed")
    documents = tmp_path / "changed" / "capitals.jsonl"
    documents.write_text(documents.read_text().replace("Lyon", "Nice"))
    assert hash_of(tmp_path / "changed") != original
    shutil.copytree(TASKS, tmp_path / "asked")
    definition = tmp_path / "asked" / "capitals.yaml"
    definition.write_text(definition.read_text().replace("What is", "Name"))
    assert hash_of(tmp_path / "asked") != original


def test_requests():
    assert parse_tasks("arc_easy, winogrande:5") == [TaskRequest("arc_easy"), TaskRequest("winogrande", 5)]
    assert parse_tasks("arc_easy,arc_easy") == [TaskRequest("arc_easy")]
    assert EvaluationRequest.parse(None, None).texts == ["wikipedia-sample"]
    assert EvaluationRequest.parse("arc_easy", None).texts == []
    assert EvaluationRequest.parse("paper", ["none"]).texts == []
    assert EvaluationRequest.parse("paper", ["c4"], samples=3).samples == 3
    assert list(task_presets()) == ["paper", "recovery"]


@pytest.mark.slow
def test_mistakes_get_one_sentence(data, tmp_path):
    (tmp_path / "empty").mkdir()
    for text, sentence in {
        "arc_easy:many": "write the number of shots as arc_easy:5",
        ",": "--tasks names no task",
        str(tmp_path / "empty"): "has no .yaml file with a task: line",
    }.items():
        with pytest.raises(UserError, match=sentence):
            parse_tasks(text)
    with pytest.raises(UserError, match="lm-eval has no task arc_hard"):
        load_tasks([TaskRequest("arc_hard")], data)
    with pytest.raises(UserError, match=r"task capitals/0-shot has no metric f1 \(it has acc, acc_norm\)"):
        load_tasks([TaskRequest("capitals", metric="f1", folder=TASKS)], data)
    shutil.copytree(TASKS, tmp_path / "tasks")
    (tmp_path / "tasks" / "capitals.jsonl").unlink()
    with pytest.raises(UserError, match=r"The task capitals cannot be loaded from .*tasks"):
        load_tasks([TaskRequest("capitals", folder=tmp_path / "tasks")], data)
    definition = tmp_path / "tasks" / "letters.yaml"
    definition.write_text("task: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        parse_tasks(str(tmp_path / "tasks"))


@pytest.mark.slow
def test_data_that_are_not_here_are_named_with_the_command_that_gets_them(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError) as refused:
        load_tasks([TaskRequest("winogrande")], tmp_path)
    sentence = str(refused.value)
    assert "The data of the task winogrande are not available locally" in sentence
    assert f"hf download allenai/winogrande --repo-type dataset --local-dir {tmp_path}/allenai/winogrande" in sentence
    assert "\n" not in sentence


def grouped(folder: Path, data: str) -> Path:
    """Write two tasks on one data set, a group of them with another number of shots, and a tag."""
    folder.mkdir()
    for name in ("first", "second"):
        definition = (TASKS / "capitals.yaml").read_text().replace("task: capitals", f"task: {name}\ntag: geography")
        definition = re.sub(
            r"dataset_path.*train: capitals.jsonl", f"dataset_path: {data}", definition, flags=re.DOTALL
        )
        (folder / f"{name}.yaml").write_text(definition)
    members = "- task: first\n  num_fewshot: 1\n- second\n"
    (folder / "group.yaml").write_text(f"group: places\ntask:\n{members}metadata:\n  version: 1.0\n")
    return folder


def test_a_group_and_a_tag_read_local_data(tmp_path):
    """Of each of their tasks, which have a data set each; lm-eval's mmlu is a group and ai2_arc is a tag."""
    for split in ("train", "test"):
        file = tmp_path / "data" / "owner" / "capitals" / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(TASKS / "capitals.jsonl", file)
    folder = grouped(tmp_path / "tasks", "owner/capitals")
    for name, expected in {
        "places": ["first/1-shot", "second/0-shot"],
        "geography": ["first/0-shot", "second/0-shot"],
    }.items():
        loaded = load_tasks([TaskRequest(name, folder=folder)], tmp_path / "data")
        assert [task.name for task in loaded] == expected
        assert all(len(task.task.eval_docs) == 8 for task in loaded)
        with pytest.raises(UserError, match=r"data of the task first are not.*hf download owner/capitals --repo-type"):
            load_tasks([TaskRequest(name, folder=folder)], tmp_path / "nothing")


def write_functions(folder: Path) -> Path:
    """Write the task capitals with a filter in Python that calls a helper."""
    shutil.copytree(TASKS, folder)
    filters = "filter_list:\n- name: own\n  filter:\n  - function: custom\n    filter_fn: !function utils.own\n"
    (folder / "capitals.yaml").write_text((TASKS / "capitals.yaml").read_text() + filters)
    helper = "def helper():\n    return 1\n\n\n"
    (folder / "utils.py").write_text(f"{helper}def own(resps, docs):\n    return [one[: helper()] for one in resps]\n")
    return folder


def test_the_hash_covers_functions_and_is_the_same_in_every_process(tmp_path):
    """Their addresses differ in every process, so that no answer would ever be found again."""
    folder = write_functions(tmp_path / "tasks")

    def hash_of() -> str:
        [task] = load_tasks([TaskRequest("capitals", folder=folder)], Path("none"))
        return task.content_hash

    original = hash_of()
    for name in [name for name in sys.modules if str(folder) in name]:
        del sys.modules[name]  # as in another process: another function of the same text
    assert hash_of() == original
    helper = folder / "utils.py"
    helper.write_text(helper.read_text().replace("return 1", "return 2"))
    assert hash_of() != original, "what the functions call decides their results, too"


def test_answers_that_are_no_numbers_are_no_accuracy(model, monkeypatch):
    """Of NaN, the first choice counts as the most likely one, and a broken model would get its share of the points."""
    [task] = load_tasks([TaskRequest("capitals", folder=TASKS)], Path("none"))
    score = model._scorer.score

    def broken(ids: torch.Tensor) -> Any:
        return TokenScores(*(values * torch.nan for values in score(ids)))

    monkeypatch.setattr(model._scorer, "score", broken)
    about = measure_task(task, model, limit=3)["acc"]
    assert math.isnan(about["value"])
    assert (about["stderr"], about["by_document"], about["documents"]) == (None, [], 3)


def test_nothing_stays_changed_in_the_process(model, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    level = logging.getLogger("lm_eval").level
    [task] = load_tasks([TaskRequest("capitals", folder=TASKS)], Path("none"), run_generated_code=True)
    measure_task(task, model, limit=1)
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    assert logging.getLogger("lm_eval").level == level
