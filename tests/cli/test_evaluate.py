"""``pvs evaluate``, as a user types it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nemo_pvs.cli.main import main
from nemo_pvs.evaluation.requests import task_presets
from nemo_pvs.evaluation.scoring import TransformersScorer
from nemo_pvs.layerwise import perplexity as perplexity_module
from nemo_pvs.reporting.compare.scores import read_scores
from tests.conftest import make_tiny_llama
from tests.evaluation.generation_data import write_writing
from tests.evaluation.models import TASKS, save_byte_model
from tests.evaluation.paper_data import write_paper_data


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """Run ``pvs evaluate`` in this process; return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")  # wherever this checkout lies, its path fits a line

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pvs", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def model(tmp_path) -> Path:
    return save_byte_model(tmp_path / "model", max_position_embeddings=600)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Sequences of every batch that a model is asked to score."""
    counted: list[int] = []
    original = TransformersScorer.score

    def score(self, ids):
        counted.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(TransformersScorer, "score", score)
    return counted


def measured(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["models"][0]["measured"]


@pytest.mark.slow
def test_the_papers_table_from_local_data(evaluate, model, tmp_path):
    write_paper_data(tmp_path / "task_data")
    code, out, errors = evaluate(model, "--tasks", "paper", "--sequence-length", 64, "--out", tmp_path / "out")
    assert code == 0, errors
    names = list(measured(tmp_path / "out"))
    assert [name for name in names if name.endswith("/perplexity")] == [
        *("perplexity/c4/perplexity", "perplexity/wikitext/perplexity", "perplexity/cnn_dailymail/perplexity")
    ]
    assert names[-1] == "paper/average"
    assert len(names) == 3 * 3 + 8 + 1
    assert all(name in out for name in names)
    assert "chunks of 64" in out
    assert out.count("±") == len(names) - 2  # sciq has one question here, so no standard error, nor has the average
    trained = measured(tmp_path / "out")["perplexity/c4/perplexity"]["value"]
    compat = ("--perplexity", "c4", "--compat", "--sequence-length", 64, "--out", tmp_path / "compat")
    code, out, errors = evaluate(model, *compat)
    assert code == 0, errors
    assert "training split" in out
    assert measured(tmp_path / "compat")["perplexity/c4/perplexity"]["value"] != trained


@pytest.mark.slow
def test_a_measurement_is_made_once(evaluate, model, tmp_path, forwards):
    options = ("--tasks", TASKS, "--out", tmp_path / "out")
    assert evaluate(model, *options)[0] == 0
    first, asked = measured(tmp_path / "out"), sum(forwards)
    assert asked > 0
    assert not list((tmp_path / "out").rglob("*.journal"))

    assert evaluate(model, *options)[0] == 0
    assert sum(forwards) == asked
    assert {name: about["value"] for name, about in measured(tmp_path / "out").items()} == {
        name: about["value"] for name, about in first.items()
    }
    assert all(about["measured"] == "before" for about in measured(tmp_path / "out").values())

    forwards.clear()
    assert evaluate(model, *options, "--force")[0] == 0
    assert sum(forwards) == asked
    forwards.clear()
    assert evaluate(model, *options, "--limit", 2)[0] == 0  # another measurement, and the first one stays
    assert 0 < sum(forwards) < asked
    forwards.clear()
    assert evaluate(save_byte_model(tmp_path / "other", seed=1), *options)[0] == 0
    assert sum(forwards) == asked, "another model has answers of its own"
    forwards.clear()
    assert evaluate(model, *options)[0] == 0
    assert not forwards

    # What earlier commands measured is still said, so that models may be measured one by one.
    assert evaluate(model, "--perplexity", TASKS / "letters.jsonl", "--sequence-length", 32, *options[2:])[0] == 0
    models = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert [(Path(one["checkpoint"]).name, one["limit"]) for one in models] == [
        *(("model", None), ("other", None), ("model", 2))
    ]
    assert len(models[0]["measured"]) == len(first) + 3
    assert all(models[0]["measured"][name]["value"] == about["value"] for name, about in first.items())
    scores = read_scores(tmp_path / "out")
    assert scores.keys() == {one["fingerprint"] for one in models}
    assert scores[models[0]["fingerprint"]]["capitals/0-shot/acc"].documents == 8


@pytest.mark.slow
def test_a_killed_evaluation_keeps_what_it_has(evaluate, model, tmp_path, forwards, monkeypatch):
    options = ("--tasks", TASKS, "--batch-size", 4, "--out", tmp_path / "out")
    counting = TransformersScorer.score

    def dying(self, ids):
        if len(forwards) == 4:  # capitals has 8 batches
            raise KeyboardInterrupt
        return counting(self, ids)

    monkeypatch.setattr(TransformersScorer, "score", dying)
    code, _, errors = evaluate(model, "--perplexity", TASKS / "letters.jsonl", "--sequence-length", 32, *options)
    assert code == 130
    assert "interrupted" in errors
    [text] = (tmp_path / "out").rglob("*.json")  # and no results.json
    assert "letters.jsonl-" in text.name  # of a long path the end is kept
    assert len(list((tmp_path / "out").rglob("*.journal"))) == 1
    before = sum(forwards)
    monkeypatch.setattr(TransformersScorer, "score", counting)
    assert evaluate(model, *options)[0] == 0
    total = sum(forwards)
    forwards.clear()
    assert evaluate(model, *options, "--force")[0] == 0
    assert before < total == sum(forwards), "something was asked twice, or not at all"


def test_the_default_is_perplexity_of_the_same_text(evaluate, model, tmp_path, monkeypatch):
    code, out, errors = evaluate(
        model, "--perplexity", TASKS / "letters.jsonl", "--stride", 50, "--sequence-length", 64
    )
    assert code == 0, errors
    assert "windows of 64 every 50" in out
    assert (tmp_path / "runs" / "evaluation" / "results.json").is_file()
    before = measured(tmp_path / "runs" / "evaluation")
    monkeypatch.setattr(perplexity_module, "LayerwiseModel", None)
    code, out, _ = evaluate(model, "--perplexity", TASKS / "letters.jsonl", "--stride", 50, "--sequence-length", 64)
    assert code == 0, "it was measured again"
    assert measured(tmp_path / "runs" / "evaluation").keys() == before.keys()


@pytest.mark.slow
def test_mistakes_get_one_sentence(evaluate, model, tmp_path):
    bare = make_tiny_llama(tmp_path / "bare")
    longer = save_byte_model(tmp_path / "longer", max_position_embeddings=1024)
    writing = write_writing(tmp_path / "writing", "Dear", 600, "{metric: exact_match, aggregation: mean}")
    for sentence, arguments in {
        f"{bare} has no tokenizer": (bare, "--tasks", TASKS),
        "hf download allenai/winogrande": (model, "--tasks", "paper", "--perplexity", "none"),
        "run hf download allenai/c4": (model, "--perplexity", "c4"),
        "no/such/model does not exist": ("no/such/model",),
        "--backend is 'vllm'; choose auto, transformers or megatron": (model, "--backend", "vllm"),
        "--limit is 0; give 1 or more": (model, "--limit", 0),
        "0 samples of 512 tokens predict nothing": (model, "--perplexity", TASKS / "letters.jsonl", "--samples", 0),
        "A stride of 0 tokens does not fit windows of 512; choose one from 1 to 511": ("no/such", "--stride", 0),
        "0 samples of 512 tokens": ("no/such", "--samples", 0),
        "--tensor-parallel is -1; give 1 or more": ("no/such", "--tensor-parallel", -1, "--pipeline-parallel", -1),
        "--perplexity none leaves nothing to measure": (model, "--perplexity", "none"),
        "The task writing/0-shot asks for up to 600 new tokens, which do not fit the context of": (
            *(model, "--tasks", writing, "--perplexity", TASKS / "letters.jsonl", "--sequence-length", 32),
        ),
        "need a multiple of 2 ranks, not 1; start them with torchrun": (model, "--tensor-parallel", 2),
        "Sequences of 699 tokens do not fit the model's context of 600": (
            *(longer, model, "--perplexity", "wikipedia-sample", "--sequence-length", 700),
        ),
    }.items():
        code, _, errors = evaluate(*arguments)
        assert code == 2, (sentence, errors)
        assert sentence in errors
        assert errors.startswith("pvs: ")
        assert errors.count("\n") == 1, errors
        assert not list((tmp_path / "runs").rglob("*.json")), sentence


@pytest.mark.slow
def test_recovery_needs_no_data_set_and_names_what_it_leaves_out(evaluate, model, tmp_path):
    other = save_byte_model(tmp_path / "other", seed=1, max_position_embeddings=600)
    options = ("--perplexity", TASKS / "letters.jsonl", "--sequence-length", 48, "--limit", 2)
    code, out, errors = evaluate(model, other, "--tasks", "recovery", "--parent", model, *options)
    assert code == 0, errors
    for task, repository in {
        "arc_easy": "allenai/ai2_arc",
        "gsm8k": "openai/gsm8k",
        "ifeval": "google/IFEval",
    }.items():
        assert f"left out: {task} (its data are not here; run hf download {repository} --repo-type dataset" in out
    models = json.loads((tmp_path / "runs" / "evaluation" / "results.json").read_text())["models"]
    assert [set(one["left_out"]) for one in models] == [
        {"arc_easy", "hellaswag", "winogrande", "gsm8k", "ifeval"},
    ] * 2
    kinds = [{name.split("/")[0] for name in one["measured"]} for one in models]
    assert kinds == [{"perplexity", "recovery"}] * 2
    assert models[1]["measured"][f"recovery/{TASKS / 'letters.jsonl'}/kl"]["documents"] == 2
    assert "64 after prompts of 32" in out

    code, _, errors = evaluate(model, "--parent", model, *options)
    assert code == 2
    assert errors == (
        "pvs: --parent is for --tasks recovery, which compares with it; add recovery, or leave --parent out.\n"
    )


@pytest.mark.slow
def test_presets_name_the_data_sets_of_their_tasks():
    from nemo_pvs.evaluation.tasks import _definition, _known_tasks

    for request in task_presets()["recovery"].requests:
        assert _definition(_known_tasks(None).task_index[request.task])[0]["dataset_path"] == request.data_set


@pytest.mark.slow
def test_recovery_asks_the_tasks_whose_data_are_here(evaluate, model, tmp_path):
    write_paper_data(tmp_path / "task_data")
    options = ("--perplexity", "none", "--limit", 2)
    code, out, errors = evaluate(model, "--tasks", "recovery", *options)
    assert code == 0, errors
    names = set(measured(tmp_path / "runs" / "evaluation"))
    assert names == {"arc_easy/0-shot/acc_norm", "hellaswag/0-shot/acc_norm", "winogrande/0-shot/acc"}
    assert "left out: gsm8k (" in out
    assert "left out: arc_easy" not in out


def test_the_results_of_a_run_are_not_overwritten(evaluate, model, tmp_path, forwards):
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text('{"arms": []}')
    code, _, errors = evaluate(model, "--tasks", TASKS, "--out", run)
    assert code == 2
    assert (
        f"does not belong to an evaluation and would be overwritten; choose another folder with --out, such as {run}"
        in errors
    )
    assert (run / "results.json").read_text() == '{"arms": []}'
    assert not forwards
