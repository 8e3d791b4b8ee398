"""Tests of non-inferiority on losses and on answers that are known, and what is said if they are not possible."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest

from nemo_pvs.cli.results import report
from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.compare import compare
from nemo_pvs.reporting.compare.non_inferiority import judge_non_inferiority
from nemo_pvs.reporting.compare.runs import Run
from nemo_pvs.reporting.compare.scores import read_scores
from nemo_pvs.reporting.compare.verdicts import NonInferiority
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.statistics import crossed_estimate, mean_estimate
from nemo_pvs.system.files import read_json

from .evaluated import write_evaluation
from .grid import BUDGETS, grid_runs

QUESTIONS = 200
RIGHT = [float(index % 2) for index in range(QUESTIONS)]


def _with_flips(right: list[float], worse: int, better: int = 0) -> list[float]:
    """Return answers of which so many right ones are wrong, and so many wrong ones right."""
    answers = list(right)
    for index in [index for index, value in enumerate(right) if value == 1.0][:worse]:
        answers[index] = 0.0
    for index in [index for index, value in enumerate(right) if value == 0.0][:better]:
        answers[index] = 1.0
    return answers


def _seeds(results: Results, folder: Path, answers: list[dict[str, dict[str, list[float]]]]) -> list[Run]:
    """Return a run per seed with a parent of its own; answers by ``parent`` or ``pruned`` and by task."""
    runs = []
    for seed, by_model in enumerate(answers, start=1):
        other = copy.deepcopy(results)
        other.recipe["train"]["seed"] = seed
        parent, pruned = f"{seed}a" * 32, f"{seed}b" * 32
        other.hashes |= {"parent weights": parent, "model depth-pruned": pruned}
        place = folder / f"seed-{seed}"
        write_evaluation(place / "evaluation", {parent: by_model["parent"], pruned: by_model["pruned"]})
        other.save(place / "results.json")
        runs.append(Run(str(place), other, read_scores(place / "evaluation")))
    return runs


def _of(tests: tuple[NonInferiority, ...], arm: str, measure: str) -> NonInferiority:
    return next(test for test in tests if (test.arm, test.measure) == (arm, measure))


def test_losses_are_paired_by_seed_with_each_seeds_parent() -> None:
    runs = grid_runs()
    for run, lead in zip(runs, (0.02, 0.03, 0.04), strict=True):
        arm = next(arm for arm in run.results.arms if arm.name == f"depth-50, pruned, {BUDGETS[-1]}")
        arm.validation[-1].loss = run.results.parent.validation_loss - lead  # type: ignore[union-attr,operator]
    tests = judge_non_inferiority(compare(runs), 0.1, "nats")
    assert len(tests) == 15
    test = _of(tests, "depth-50, pruned, 1638400", "validation loss")
    expected = mean_estimate([0.02, 0.03, 0.04])
    assert test.difference is not None
    assert expected is not None
    assert (test.difference.mean, test.difference.stderr) == pytest.approx((expected.mean, expected.stderr))
    assert test.sentence == (
        "depth-50, pruned, 1638400, validation loss: equivalent within 0.1 nats (one-sided 95 % bounds +0.013 and "
        "+0.047, over 3 seeds)"
    )
    others = _of(tests, "depth-50, pruned, 327680", "validation loss")  # 0.7 nats above the parent
    assert others.words == "inferior by more than 0.1 nats (one-sided 95 % bound −0.700, over 3 seeds)"


def test_one_seed_of_losses_decides_nothing() -> None:
    test = judge_non_inferiority(compare(grid_runs(1)), 0.1, "nats")[0]
    assert test.verdict == "undecided"
    assert test.words == (
        "undecided (one seed, and the losses of single windows are not stored; report runs with at least two seeds)"
    )


def test_seeds_that_gave_one_and_the_same_model_decide_nothing() -> None:
    """With a given parent and ``train.data_seed`` no seed changes a pruned arm; its spread of zero is no evidence."""
    runs = grid_runs()
    for run in runs:
        run.results.arms[0].validation[-1].loss = run.results.parent.validation_loss  # type: ignore[assignment,union-attr]
    test = judge_non_inferiority(compare(runs), 0.1, "nats")[0]
    assert test.words == "undecided (every seed gave the same loss, so the seeds say nothing of its spread)"


def test_a_training_that_diverged_decides_nothing() -> None:
    runs = grid_runs()
    runs[2].results.arms[0].validation[-1].loss = math.inf
    test = judge_non_inferiority(compare(runs), 0.1, "nats")[0]
    assert test.words == "undecided (a loss is not a finite number, as the training diverged)"


def test_answers_are_paired_by_question(results: Results, tmp_path: Path) -> None:
    """Two right answers fewer of 200 and the same otherwise: 1 point worse, with the error of the differences."""
    answers = {"parent": {"boolq": RIGHT}, "pruned": {"boolq": _with_flips(RIGHT, 2)}}
    tests = judge_non_inferiority(compare(_seeds(results, tmp_path, [answers])), 3.0)
    test = _of(tests, "depth, pruned", "boolq/0-shot/acc")
    expected = mean_estimate([0.0] * 198 + [-100.0] * 2)
    assert test.difference is not None
    assert expected is not None
    assert test.difference.stderr == pytest.approx(expected.stderr)
    assert test.difference.lower_bound == pytest.approx(expected.lower_bound)
    assert test.words == (
        "equivalent within 3 points (one-sided 95 % bounds −2.17 and +0.17, over 200 questions and 1 seed)"
    )
    assert _of(tests, "width, pruned", "accuracy").verdict == "undecided"


@pytest.mark.parametrize(
    ("worse", "better", "verdict"),
    [(2, 2, "equivalent"), (0, 6, "not inferior"), (20, 0, "inferior"), (7, 1, "undecided")],
)
def test_verdicts_over_questions_and_seeds(
    worse: int, better: int, verdict: str, results: Results, tmp_path: Path
) -> None:
    answers = []
    for seed in range(3):
        pruned = _with_flips(RIGHT, worse + seed % 2, better)
        answers.append({"parent": {"boolq": RIGHT}, "pruned": {"boolq": pruned}})
    runs = compare(_seeds(results, tmp_path, answers), force=True)  # a parent for each seed
    test = _of(judge_non_inferiority(runs, 3.0), "depth, pruned", "boolq/0-shot/acc")
    table = []
    for item in answers:
        table.append([ours - theirs for ours, theirs in zip(item["pruned"]["boolq"], RIGHT, strict=True)])
    assert test.difference is not None
    assert test.difference.mean == pytest.approx(100 * crossed_estimate([table]).mean)
    assert (test.verdict, test.basis) == (verdict, "200 questions and 3 seeds")


def test_several_tasks_have_an_average_of_one_accuracy_each(results: Results, tmp_path: Path) -> None:
    both = {"arc_easy": RIGHT, "boolq": RIGHT[:100]}
    pruned = {"arc_easy": _with_flips(RIGHT, 4), "boolq": RIGHT[:100]}
    tests = judge_non_inferiority(compare(_seeds(results, tmp_path, [{"parent": both, "pruned": pruned}])), 3.0)
    named = [test.measure for test in tests if test.arm == "depth, pruned"]
    assert named == ["average of 2 tasks", "arc_easy/0-shot/acc_norm", "boolq/0-shot/acc"]
    average = _of(tests, "depth, pruned", "average of 2 tasks")
    assert average.difference is not None
    assert average.difference.mean == pytest.approx(-1.0)
    assert average.basis == "300 questions and 1 seed"


def test_without_single_questions_only_seeds_count(results: Results, tmp_path: Path) -> None:
    answers = []
    for worse in (2, 4, 6):
        answers.append({"parent": {"boolq": RIGHT}, "pruned": {"boolq": _with_flips(RIGHT, worse)}})
    runs = _seeds(results, tmp_path, answers)
    for file in tmp_path.glob("seed-2/evaluation/measured/*/boolq.json"):
        file.unlink()
    runs[1] = Run(runs[1].label, runs[1].results, read_scores(tmp_path / "seed-2" / "evaluation"))
    test = _of(judge_non_inferiority(compare(runs, force=True), 3.0), "depth, pruned", "boolq/0-shot/acc")
    expected = mean_estimate([-1.0, -2.0, -3.0])
    assert test.difference is not None
    assert expected is not None
    assert (test.difference.mean, test.difference.stderr) == pytest.approx((expected.mean, expected.stderr))
    assert test.basis == "3 seeds, without single questions, which are not stored for both models"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0.5}, "add what to compare with: --non-inferior-to parent"),
        ({"non_inferior_to": "parent"}, "--non-inferior-to needs --margin"),
        ({"non_inferior_to": "scratch", "margin": 0.5}, "--non-inferior-to scratch is unknown"),
        ({"non_inferior_to": "parent", "margin": 0.0}, "--margin 0 is not a valid margin"),
        ({"non_inferior_to": "parent", "margin": float("nan")}, "--margin nan is not a valid margin"),
        ({"non_inferior_to": "parent", "margin": 0.5, "unit": "bits"}, "--unit bits is unknown; choose points"),
        (
            {"non_inferior_to": "parent", "margin": 0.5},
            "No accuracy was measured of both a pruned model and its parent",
        ),
    ],
)
def test_what_cannot_be_tested_is_one_sentence_and_writes_nothing(
    options: dict[str, Any], message: str, results: Results, tmp_path: Path
) -> None:
    results.save(tmp_path / "run" / "results.json")
    with pytest.raises(UserError) as caught:
        report([str(tmp_path / "run")], out=str(tmp_path / "out"), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_verdicts_are_printed_and_written(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"parent": {"boolq": RIGHT}, "pruned": {"boolq": _with_flips(RIGHT, 2)}}
    (run,) = _seeds(results, tmp_path, [answers])
    report([run.label], out=str(tmp_path / "out"), non_inferior_to="parent", margin=3.0)
    sentence = "equivalent within 3 points (one-sided 95 % bounds −2.17 and +0.17, over 200 questions and 1 seed)"
    printed = capsys.readouterr().out
    assert f"depth, pruned, boolq/0-shot/acc: {sentence}" in printed
    assert "1a undecided: At equal training tokens, pruning always beats training from scratch." in printed
    for name in ("report.md", "report.html"):
        assert sentence in (tmp_path / "out" / name).read_text()
    (test, _) = read_json(tmp_path / "out" / "report.json")["non_inferiority"]
    assert (test["arm"], test["verdict"], test["margin"]) == ("depth, pruned", "equivalent", 3.0)
    assert test["lower_bound"] == pytest.approx(-2.17, abs=0.005)
