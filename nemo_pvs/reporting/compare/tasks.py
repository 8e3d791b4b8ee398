"""Compare pruned and scratch models on benchmark tasks, by the scores of ``pvs evaluate``."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_pvs.reporting.compare.scores import Score
from nemo_pvs.reporting.results import ArmResult

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import Run, SideBySide

SURE = 2.0
"""A difference is significant if it exceeds this many of its standard errors: a level of about 5 %."""
AVERAGE = "average"
ACCURACIES = ("acc_norm", "acc")
"""Metrics that the average may use; of each task the first that was measured."""


@dataclass(frozen=True)
class TaskRow:
    """A pruned model and its counterpart from scratch on one metric."""

    task: str
    pruned_name: str
    scratch_name: str
    parent: Score | None
    pruned: Score | None
    scratch: Score | None

    @property
    def difference(self) -> float | None:
        """Scratch minus pruned (S − P in arXiv 2606.14150, Figure 1).

        None if one of them was not measured, or both were measured on different windows.
        """
        if self.pruned is None or self.scratch is None or self.pruned.cut != self.scratch.cut:
            return None
        return self.scratch.value - self.pruned.value

    @property
    def cut(self) -> str | None:
        """How the text was split into windows, for both models if they differ; None for questions."""
        cuts = [score.cut for score in (self.pruned, self.scratch) if score is not None and score.cut is not None]
        return " and ".join(dict.fromkeys(cuts)) or None

    @property
    def paired(self) -> bool:
        """Whether the difference was taken question by question."""
        pruned, scratch = self.pruned, self.scratch
        if pruned is None or scratch is None or pruned.by_document is None or scratch.by_document is None:
            return False
        return pruned.content is not None and pruned.content == scratch.content and len(pruned.by_document) > 1

    @property
    def stderr(self) -> float | None:
        """The standard error of the difference: of the differences by question, or of two independent scores."""
        pruned, scratch = self.pruned, self.scratch
        if pruned is None or scratch is None or self.difference is None:
            return None
        if self.paired:
            assert pruned.by_document is not None
            assert scratch.by_document is not None
            differences = [s - p for p, s in zip(pruned.by_document, scratch.by_document, strict=True)]
            return statistics.stdev(differences) / math.sqrt(len(differences))
        if pruned.stderr is None or scratch.stderr is None:
            return None
        return math.hypot(pruned.stderr, scratch.stderr)

    @property
    def winner(self) -> str:
        """``pruned``, ``scratch``, or ``within error``; ``unknown`` without a standard error."""
        if self.difference is None or self.stderr is None:
            return "unknown"
        higher_is_better = self.pruned is None or self.pruned.higher_is_better is not False
        if abs(self.difference) <= SURE * self.stderr:
            return "within error"
        return "scratch" if (self.difference > 0) == higher_is_better else "pruned"


@dataclass(frozen=True)
class AverageRow(TaskRow):
    """The mean over several tasks."""

    rows: tuple[TaskRow, ...] = ()

    @property
    def paired(self) -> bool:
        """Whether every task's difference was taken question by question."""
        return all(row.paired for row in self.rows)

    @property
    def stderr(self) -> float | None:
        """The standard error of the mean of the tasks' differences, taken as independent."""
        errors = [row.stderr for row in self.rows]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def task_rows(runs: SideBySide) -> list[TaskRow]:
    """Return one row per pruned arm and metric; seeds are averaged, and scores that were not measured are None.

    Empty if no model of these runs was evaluated.
    """
    results = runs.results
    parent = _parent_scores(runs)
    rows = []
    for arm in results.arms:
        if arm.initialisation != "pruned":
            continue
        scratch = results.scratch_of(arm)
        scratch_name = scratch.name if scratch else f"{arm.target}, random (missing)"
        pruned_scores = _mean_scores(runs.repetitions[arm.name])
        scratch_scores = _mean_scores(runs.repetitions[scratch.name]) if scratch else {}
        for task in dict.fromkeys([*pruned_scores, *scratch_scores]):
            ours, theirs = pruned_scores.get(task), scratch_scores.get(task)
            rows.append(
                TaskRow(task, arm.name, scratch_name, _if_comparable(parent.get(task), ours or theirs), ours, theirs)
            )
    return rows


def _if_comparable(parent: Score | None, arm: Score | None) -> Score | None:
    return parent if parent is None or arm is None or parent.cut == arm.cut else None


def averages(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the mean accuracy of each pruned arm and its counterpart over tasks, with errors of tasks independent.

    The average is over the tasks that all arms with a counterpart have, so that different methods can be compared.
    """
    names = list(dict.fromkeys(row.pruned_name for row in rows))
    compared = []
    for name in names:
        tasks = {row.task: row for row in rows if row.pruned_name == name and row.difference is not None}
        if tasks:
            compared.append(tasks)
    if not compared:
        return []
    common = [task for task in compared[0] if all(task in tasks for tasks in compared)]
    chosen = accuracies_of(common)
    return [_average([tasks[task] for task in chosen]) for tasks in compared if chosen]


def accuracies_of(names: Sequence[str]) -> list[str]:
    """Return the accuracies among metrics, one of each task: the one that an average over tasks uses."""
    by_task: dict[str, dict[str, str]] = {}
    for name in names:
        task, _, metric = name.rpartition("/")
        if metric in ACCURACIES:
            by_task.setdefault(task, {})[metric] = name
    return [next(metrics[name] for name in ACCURACIES if name in metrics) for metrics in by_task.values()]


def _average(rows: list[TaskRow]) -> TaskRow:
    def mean(scores: list[Score | None]) -> Score | None:
        known = [score for score in scores if score is not None]
        if len(known) < len(scores):
            return None
        return _mean_score(known, sum(score.documents for score in known))

    label = f"{AVERAGE} of {len(rows)} {'task' if len(rows) == 1 else 'tasks'}"
    return AverageRow(
        label,
        rows[0].pruned_name,
        rows[0].scratch_name,
        mean([row.parent for row in rows]),
        mean([row.pruned for row in rows]),
        mean([row.scratch for row in rows]),
        tuple(rows),
    )


def _mean_scores(repetitions: Sequence[tuple[Run, ArmResult]]) -> dict[str, Score]:
    """Return an arm's scores, averaged over its seeds; metrics that a seed lacks are omitted."""
    return _mean_over_models([scores_of(run, arm) for run, arm in repetitions])


def _mean_over_models(models: Sequence[dict[str, Score]]) -> dict[str, Score]:
    common = [name for name in models[0] if all(name in scores for scores in models)]
    return {name: _mean_score([scores[name] for scores in models], models[0][name].documents) for name in common}


def _parent_scores(runs: SideBySide) -> dict[str, Score]:
    """Return the parent's scores, averaged over the parents if each seed has its own."""
    by_parent: dict[str | None, dict[str, Score]] = {}
    for run in runs.runs:  # of those with one parent, not every one may have evaluated it
        known = by_parent.setdefault(run.results.hashes.get("parent weights"), {})
        known.update({name: score for name, score in run.parent_scores.items() if name not in known})
    return _mean_over_models(list(by_parent.values()))


def scores_of(run: Run, arm: ArmResult) -> dict[str, Score]:
    """Return the scores of an arm's trained model in one run.

    Its fingerprint is stored in ``Results.hashes`` under the arm's name in its recipe.
    """
    hashes = {_plain(name): value for name, value in run.results.hashes.items()}
    return run.scores.get(hashes.get(_plain(f"model {arm.name}"), ""), {})


def _plain(name: str) -> str:
    return re.sub(r"[ ,-]+", "-", name)


def _mean_score(scores: Sequence[Score], documents: int) -> Score:
    if len(scores) == 1:
        return scores[0]
    errors = [score.stderr for score in scores if score.stderr is not None]
    questions = [score.by_document for score in scores if score.by_document is not None]
    contents = {score.content for score in scores}
    cuts = [score.cut for score in scores if score.cut is not None]
    same = len(questions) == len(scores) and len(contents) == 1 and None not in contents
    return Score(
        statistics.fmean(score.value for score in scores),
        math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None,
        documents,
        scores[0].higher_is_better,
        tuple(map(statistics.fmean, zip(*questions, strict=True))) if same else None,
        contents.pop() if same else None,
        " and ".join(dict.fromkeys(cuts)) or None,
    )
