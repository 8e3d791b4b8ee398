from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from pathlib import Path

import pytest

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.compare.scores import Score, read_scores
from nemo_pvs.reporting.compare.tasks import TaskRow, averages, error_of, task_rows
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.statistics import crossed_estimate
from nemo_pvs.reporting.tables.tasks import task_cells, task_notes
from nemo_pvs.system.files import read_json, write_json

from .evaluated import write_evaluation

PRUNED = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
SCRATCH = [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
MODELS = {"parent weights": "a" * 64, "model depth-pruned": "b" * 64, "model depth-scratch": "c" * 64}
ANSWERS = {
    "b" * 64: {"arc_easy": PRUNED, "boolq": PRUNED[:4]},
    "c" * 64: {"arc_easy": SCRATCH, "boolq": SCRATCH[:4]},
}


@pytest.fixture
def evaluated(results: Results, tmp_path: Path) -> Run:
    write_evaluation(tmp_path, ANSWERS)
    results.hashes |= MODELS
    return Run("runs/demo", results, read_scores(tmp_path))


def _row(run: Run, task: str) -> TaskRow:
    return next(row for row in task_rows(compare([run])) if row.task == task)


def test_differences_are_scratch_minus_pruned_and_paired_by_question(evaluated: Run) -> None:
    row = _row(evaluated, "arc_easy/0-shot/acc_norm")
    gaps = [theirs - ours for ours, theirs in zip(PRUNED, SCRATCH, strict=True)]
    assert row.paired
    assert row.difference == pytest.approx(statistics.fmean(gaps))
    assert row.stderr == pytest.approx(statistics.stdev(gaps) / math.sqrt(6))
    assert row.pruned is not None
    assert row.scratch is not None
    assert row.stderr is not None
    assert row.stderr < math.hypot(row.pruned.stderr or 0, row.scratch.stderr or 0)
    assert row.parent is None


def test_without_single_questions_the_errors_are_independent(evaluated: Run) -> None:
    row = _row(evaluated, "perplexity/c4/loss")
    assert not row.paired
    assert row.stderr == pytest.approx(math.hypot(0.25, 0.25))


def test_windows_are_said_and_only_equal_ones_compared(evaluated: Run) -> None:
    ours, theirs = (evaluated.scores[name * 64] for name in "bc")
    task = "perplexity/c4/loss"
    for scores in (ours, theirs):
        scores[task] = dataclasses.replace(scores[task], cut="chunks of 8192")
    row = _row(evaluated, task)
    assert (row.cut, row.difference) == ("chunks of 8192", 0.0)
    assert task_cells([row])[0][0] == "perplexity/c4/loss, chunks of 8192"
    evaluated.scores["a" * 64] = {task: ours[task]}
    assert _row(evaluated, task).parent == ours[task]
    evaluated.scores["a" * 64] = {task: dataclasses.replace(ours[task], cut="chunks of 512")}
    assert _row(evaluated, task).parent is None
    theirs[task] = dataclasses.replace(theirs[task], cut="chunks of 512")
    row = _row(evaluated, task)
    assert (row.cut, row.difference, row.stderr) == ("chunks of 8192 and chunks of 512", None, None)
    assert task_cells([row])[0][-2:] == ["–", "–"]


def test_other_questions_are_not_paired(evaluated: Run, tmp_path: Path) -> None:
    file = tmp_path / "measured" / ("c" * 16) / "arc_easy.json"
    kept = read_json(file)
    kept["settings"]["task"] = "other questions"
    write_json(file, kept)
    run = Run(evaluated.label, evaluated.results, read_scores(tmp_path))
    assert not _row(run, "arc_easy/0-shot/acc_norm").paired


def test_a_measurement_with_another_limit_is_not_taken_for_this_one(evaluated: Run, tmp_path: Path) -> None:
    file = tmp_path / "measured" / ("b" * 16) / "arc_easy.json"
    kept = read_json(file)
    kept["settings"]["limit"] = 6
    write_json(file, kept)
    assert read_scores(tmp_path)["b" * 64]["arc_easy/0-shot/acc_norm"].by_document is None


def test_a_metric_that_is_no_mean_over_questions_is_not_paired(evaluated: Run, tmp_path: Path) -> None:
    """As the perplexity of LAMBADA, exp of the mean of log-likelihoods: their differences are in other units."""
    file = tmp_path / "measured" / ("b" * 16) / "arc_easy.json"
    kept = read_json(file)
    answers = kept["metrics"]["acc_norm"]["by_document"]
    assert read_scores(tmp_path)["b" * 64]["arc_easy/0-shot/acc_norm"].by_document == tuple(answers)
    kept["metrics"]["acc_norm"]["by_document"] = [-3.0 - answer for answer in answers]
    write_json(file, kept)
    assert read_scores(tmp_path)["b" * 64]["arc_easy/0-shot/acc_norm"].by_document is None


def test_the_last_of_several_evaluations_counts(evaluated: Run, tmp_path: Path) -> None:
    """Of other backends or tokenizers; the newest is the first in the file."""
    file = tmp_path / "results.json"
    known = read_json(file)
    loss = {"value": 1.0, "stderr": None, "documents": 4, "higher_is_better": False}
    newest = {**known["models"][0], "backend": "megatron", "measured": {"perplexity/c4/loss": loss}}
    write_json(file, {**known, "models": [newest, *known["models"]]})
    assert read_scores(tmp_path)[newest["fingerprint"]]["perplexity/c4/loss"].value == 1.0


@pytest.mark.parametrize(
    ("pruned", "scratch", "higher", "winner"),
    [
        (0.6, 0.5, True, "pruned"),
        (0.5, 0.6, True, "scratch"),
        (3.0, 3.2, False, "pruned"),
        (3.2, 3.0, False, "scratch"),
        (0.5, 0.55, True, "within error"),
        (0.5, 0.5, True, "within error"),
    ],
)
def test_a_difference_counts_beyond_two_standard_errors(
    pruned: float, scratch: float, higher: bool, winner: str
) -> None:
    sides = [Score(value, 0.02, 100, higher) for value in (pruned, scratch)]
    assert TaskRow("t/acc", "p", "s", None, *sides).winner == winner  # an error of 0.0283


def test_what_was_not_measured_is_unknown(evaluated: Run) -> None:
    row = TaskRow("t/acc", "p", "s", None, Score(0.5, None, 9, True), None)
    assert (row.difference, row.stderr, row.winner) == (None, None, "unknown")
    names = {row.pruned_name for row in task_rows(compare([evaluated]))}
    assert names == {"depth, pruned"}  # nothing of width was evaluated
    evaluated.scores.pop("c" * 64)
    rows = task_rows(compare([evaluated]))
    assert rows
    assert all(row.scratch is None and row.difference is None for row in rows)
    assert averages(rows) == []


def test_the_average_takes_one_metric_a_task(evaluated: Run) -> None:
    (row,) = averages(task_rows(compare([evaluated])))
    assert row.task == "average of 2 tasks"
    assert row.difference == pytest.approx((-2 / 6 - 1 / 4) / 2)
    errors = [statistics.stdev([0, -1, 0, 0, -1, 0]) / math.sqrt(6), statistics.stdev([0, -1, 0, 0]) / 2]
    assert row.paired
    assert row.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_seeds_are_averaged_question_by_question(evaluated: Run, tmp_path: Path) -> None:
    other = copy.deepcopy(evaluated.results)
    other.recipe["train"]["seed"] = 2
    other.hashes["model depth-pruned"] = "d" * 64
    write_evaluation(tmp_path / "second", {"d" * 64: {"arc_easy": SCRATCH}, "c" * 64: {"arc_easy": SCRATCH}})
    second = Run("runs/second", other, read_scores(tmp_path / "second"))
    rows = {row.task: row for row in task_rows(compare([evaluated, second]))}
    row = rows["arc_easy/0-shot/acc_norm"]
    assert row.difference == pytest.approx(-2 / 6 / 2)
    assert row.paired
    differences = [[s - p for p, s in zip(pruned, SCRATCH, strict=True)] for pruned in (PRUNED, SCRATCH)]
    expected = crossed_estimate([differences])
    assert row.error is not None
    assert (row.stderr, row.error.degrees) == pytest.approx((expected.stderr, expected.degrees))
    assert "boolq/0-shot/acc" not in rows  # the second run lacks it
    assert task_notes(compare([evaluated])) == task_notes(compare([evaluated, second]))[:-1]


def _seeds(means: list[float], *, single: bool, content: str = "q") -> Score:
    """Return a mean over seeds, of models that answer 200 questions alike up to the share that is right."""
    scores = []
    for mean in means:
        answers = tuple(float(index < 200 * mean) for index in range(200))
        scores.append(Score(mean, 0.035, 200, True, answers if single else None, content if single else None))
    error = error_of([scores])
    assert error is not None
    return Score(statistics.fmean(means), error.stderr, 200, True, seeds=tuple(scores))


@pytest.mark.parametrize("single", [True, False])
def test_a_lead_that_seeds_do_not_share_is_within_error(single: bool) -> None:
    """The error of questions alone, 0.02, would make it sure."""
    scratch = _seeds([0.5, 0.5, 0.5], single=single)
    row = TaskRow("t/acc", "p", "s", None, _seeds([0.70, 0.52, 0.61], single=single), scratch)
    assert row.paired is single
    assert row.winner == "within error"
    assert row.stderr is not None
    assert row.stderr > statistics.stdev([0.2, 0.02, 0.11]) / math.sqrt(3) - 1e-9
    leads = TaskRow("t/acc", "p", "s", None, _seeds([0.81, 0.80, 0.82], single=single), scratch)
    assert leads.winner == "pruned"


def test_questions_that_all_seeds_answer_do_not_average_out() -> None:
    """Three equal seeds know no more of the questions than one."""
    assert _seeds([0.5] * 3, single=False).stderr == pytest.approx(0.035)
    assert _seeds([0.5] * 3, single=True).stderr == pytest.approx(0.5 / math.sqrt(199))


def test_a_model_common_to_all_tasks_makes_their_errors_depend_on_each_other() -> None:
    scratch = [_seeds([0.5] * 3, single=True, content=name) for name in "ab"]
    pruned = [_seeds([0.70, 0.52, 0.61], single=True, content=name) for name in "ab"]
    rows = [TaskRow(f"{name}/acc", "p", "s", None, *sides) for name, *sides in zip("ab", pruned, scratch, strict=True)]
    (average,) = averages(rows)
    assert average.difference == pytest.approx(-0.11)
    assert average.stderr == pytest.approx(crossed_estimate([_table(row) for row in rows]).stderr)
    assert average.winner == "within error"


def _table(row: TaskRow) -> list[list[float]]:
    assert row.pruned is not None
    assert row.scratch is not None
    table = []
    for ours, theirs in zip(row.pruned.seeds, row.scratch.seeds, strict=True):
        table.append([s - p for p, s in zip(ours.by_document or (), theirs.by_document or (), strict=True)])
    return table


def test_what_is_not_finite_has_no_winner() -> None:
    sides = Score(3.0, 0.02, 100, False), Score(math.nan, 0.02, 100, False)
    assert TaskRow("t/loss", "p", "s", None, *sides).winner == "unknown"


def test_the_parent_need_be_evaluated_in_one_of_its_runs_only(evaluated: Run, tmp_path: Path) -> None:
    write_evaluation(tmp_path / "parent", {"a" * 64: {"arc_easy": PRUNED}})
    evaluated.scores.update(read_scores(tmp_path / "parent"))
    other = copy.deepcopy(evaluated.results)
    other.recipe["more"] = True
    other.arms = other.arms[2:]
    evaluated.results.arms = evaluated.results.arms[:2]
    for runs in ([evaluated, Run("runs/other", other)], [Run("runs/other", other), evaluated]):
        rows = {row.task: row for row in task_rows(compare(runs))}
        parent = rows["arc_easy/0-shot/acc_norm"].parent
        assert parent is not None
        assert parent.value == pytest.approx(5 / 6)


def test_what_is_no_evaluation_is_refused(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "results.json")
    with pytest.raises(UserError, match="holds no evaluation"):
        read_scores(tmp_path)
