"""A run that evaluates what comes back: before, during and after the training of its pruned arm."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.errors import UserError
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pipeline.pipeline import Pipeline
from nemo_pvs.pipeline.records import TasksRecord
from nemo_pvs.pipeline.results import assemble
from nemo_pvs.pipeline.stage import Stage
from nemo_pvs.pipeline.stages.tasks import ask_tasks, say_left_out
from nemo_pvs.recipe.blocks import Evaluation
from nemo_pvs.recipe.load import parse_recipe
from nemo_pvs.reporting.html import write_report
from nemo_pvs.training.checkpoints import checkpoint_name
from tests.pipeline.test_pipeline import tiny_values

FREE = {"repetition", "distinct_1", "distinct_2", "agreement", "kl", "kl_1_16", "kl_17_32"}


def _values(folder: Path) -> dict:
    values = tiny_values(folder)
    values["targets"] = {"depth": {"method": "minitron-depth", "layers": 2}}
    values["arms"] = ["pruned"]
    sizes = {"windows": 4, "prompt_tokens": 8, "new_tokens": 8}
    values["evaluate"] |= {"tasks": "continuation, recovery", "at": [0, 0.25], "recovery": sizes}
    return values


@pytest.mark.parallel
@pytest.mark.slow
def test_models_before_and_during_training_are_in_the_report(
    tmp_path: Path, forked_launcher: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(parse_recipe(_values(tmp_path), "test"), tmp_path / "run")
    pipeline.run()
    (arm,) = pipeline.arms
    checkpoints = pipeline.job(arm).checkpoints
    assert {path.name for path in checkpoints.iterdir()} == {checkpoint_name(step) for step in (4, 8, 16)}
    results = assemble(pipeline)
    assert list(results.arms[0].before_the_end) == [0, 4 * 128]
    assert results.arms[0].before_the_end[0] == pipeline.records.pruned("depth").fingerprint
    kept = open_source(checkpoints / checkpoint_name(4))
    validated = next(point.loss for point in results.arms[0].validation if point.step == 4)
    assert perplexity(kept, pipeline.tokens.validation_windows)["loss"] == pytest.approx(validated, abs=1e-4)

    write_report(results, pipeline.folder)
    rows = json.loads((pipeline.folder / "report.json").read_text())["regained"]
    along: dict[str, list[int]] = {}
    for row in rows:
        along.setdefault(row["measure"], []).append(row["tokens"])
    expected = {"continuation/0-shot/acc", *(f"recovery/test/{metric}" for metric in FREE)}
    assert along.keys() == {"validation loss", *expected}
    assert all(along[measure] == [0, 512, 2048] for measure in expected)
    page, text = ((pipeline.folder / name).read_text() for name in ("report.html", "report.md"))
    assert "What comes back" in page
    assert 'aria-label="depth, pruned, relative to the parent after training: likelihood ' in page
    assert "## What comes back" in text
    assert "| KL after 17–32 tokens |" in text

    again = Pipeline(parse_recipe(_values(tmp_path), "test"), tmp_path / "run")
    before = (tmp_path / "run" / "stages" / "evaluate-tasks.json").stat().st_mtime_ns
    again.run()
    assert (tmp_path / "run" / "stages" / "evaluate-tasks.json").stat().st_mtime_ns == before

    values = _values(tmp_path)
    values["evaluate"]["at"] = [0, 0.25, 0.75]
    later = Pipeline(parse_recipe(values, "test"), tmp_path / "run")
    later.run()
    said = "depth-pruned after 1,536 tokens is not evaluated: the training was finished before evaluate.at asked"
    assert said in capsys.readouterr().out
    assert list(assemble(later).arms[0].before_the_end) == [0, 4 * 128]


def test_tasks_are_asked_again_if_the_windows_of_recovery_change() -> None:
    def stage(**values: Any) -> Stage[TasksRecord]:
        recipe = SimpleNamespace(evaluate=Evaluation(**values), parent=SimpleNamespace(source=None))
        tokens = SimpleNamespace(prefix=lambda split: Path(split))
        parts = {"recipe": recipe, "folder": Path("run"), "parent_path": Path("parent"), "tokens": tokens, "arms": []}
        return ask_tasks(SimpleNamespace(**parts, text=lambda split: split))  # type: ignore[arg-type]

    plain = stage(tasks="recovery")
    assert stage(tasks="recovery", samples=64, sequence_length=2048).inputs() == plain.inputs()
    assert stage(tasks="recovery", sequence_length=512).inputs() != plain.inputs()
    assert stage(tasks="recovery", samples=32).inputs() != plain.inputs()
    assert stage(tasks="arc_easy", samples=32).inputs() == stage(tasks="arc_easy").inputs()
    # Answers say themselves what they answer, so those that still fit are kept.
    assert (plain.outputs, plain.reusable) == ([Path("run/tasks/results.json")], [Path("run/tasks")])


@pytest.mark.parametrize(
    ("evaluate", "sentence"),
    [
        ({"at": [0.5]}, "at says when the tasks are evaluated, and there are none"),
        ({"tasks": "continuation", "recovery": {"windows": 4}}, "recovery sets sizes of the task recovery; add it"),
        ({"tasks": "recovery", "at": [1.5]}, "evaluate.at"),
        ({"tasks": "recovery", "sequence_length": 16}, "recovery.prompt_tokens does not fit windows of 16 tokens"),
    ],
)
def test_a_recipe_that_cannot_be_evaluated_is_refused(evaluate: dict, sentence: str, tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    values["evaluate"] = {"samples": 8, "sequence_length": 32, **evaluate}
    with pytest.raises(UserError, match=sentence):
        parse_recipe(values, "test")


def test_the_pruned_model_is_evaluated_by_default_only_for_recovery(tmp_path: Path) -> None:
    values = tiny_values(tmp_path)
    steps = []
    for tasks in (["continuation"], ["continuation", "recovery"]):
        values["evaluate"]["tasks"] = tasks
        recipe = parse_recipe(values, "test")
        pipeline = Pipeline(recipe, tmp_path / "run")
        steps.append({arm.name: pipeline.evaluated_steps(arm) for arm in recipe.runs})
    names = ("width-pruned", "width-random", "depth-pruned", "depth-random")
    assert steps[0] == {name: [] for name in names}
    assert steps[1] == {name: [0] * name.endswith("pruned") for name in names}


def test_tasks_without_data_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "task_data" / "openai" / "gsm8k").mkdir(parents=True)
    settings = Evaluation(tasks=["recovery", "continuation"], task_data=str(tmp_path / "task_data"))
    say_left_out(settings, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("Left out of the tasks: arc_easy, hellaswag, winogrande and ifeval, whose data are not in ")
    assert out.endswith(f"{tmp_path / 'results.json'} has the commands that download them.\n")
    say_left_out(Evaluation(tasks=["continuation"]), tmp_path)
    assert not capsys.readouterr().out
