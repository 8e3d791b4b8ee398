"""Pruned and scratch on benchmark tasks: what ``pvs evaluate`` measured of a run's models, and which of it differs."""

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
"""A difference counts if it exceeds so many of its standard errors: a level of about 5 %."""
AVERAGE = "average"
_ACCURACIES = ("acc_norm", "acc")
"""Which metric of a task the average takes, where nobody has named a preset: the first that there is."""


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

        None if one of them was not measured, or on windows of another kind.
        """
        if self.pruned is None or self.scratch is None or self.pruned.cut != self.scratch.cut:
            return None
        return self.scratch.value - self.pruned.value

    @property
    def cut(self) -> str | None:
        """How the text was cut, both sides' where they differ; None for questions."""
        cuts = [one.cut for one in (self.pruned, self.scratch) if one is not None and one.cut is not None]
        return " and ".join(dict.fromkeys(cuts)) or None

    @property
    def paired(self) -> bool:
        """Whether the difference was taken question by question."""
        one, other = self.pruned, self.scratch
        if one is None or other is None or one.by_document is None or other.by_document is None:
            return False
        return one.content is not None and one.content == other.content and len(one.by_document) > 1

    @property
    def stderr(self) -> float | None:
        """The standard error of the difference: of the differences by question, or of two independent scores."""
        one, other = self.pruned, self.scratch
        if one is None or other is None or self.difference is None:
            return None
        if self.paired:
            assert one.by_document is not None
            assert other.by_document is not None
            gaps = [theirs - ours for ours, theirs in zip(one.by_document, other.by_document, strict=True)]
            return statistics.stdev(gaps) / math.sqrt(len(gaps))
        if one.stderr is None or other.stderr is None:
            return None
        return math.hypot(one.stderr, other.stderr)

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
        """Of the mean of the tasks' differences, which are independent of each other."""
        errors = [row.stderr for row in self.rows]
        known = [error for error in errors if error is not None]
        return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def task_rows(runs: SideBySide) -> list[TaskRow]:
    """Return a row for every pruned arm and metric; seeds are averaged, what was not measured is None.

    Empty if no model of these runs was evaluated.
    """
    results = runs.results
    parent = runs.runs[0].scores.get(runs.runs[0].results.hashes.get("parent weights", ""), {})
    rows = []
    for arm in results.arms:
        if arm.initialisation != "pruned":
            continue
        scratch = results.scratch_of(arm)
        ours = _scores_of(runs.repetitions[arm.name])
        theirs = _scores_of(runs.repetitions[scratch.name]) if scratch else {}
        rows += [
            TaskRow(
                task,
                arm.name,
                scratch.name if scratch else f"{arm.target}, random (missing)",
                _if_alike(parent.get(task), ours.get(task) or theirs.get(task)),
                ours.get(task),
                theirs.get(task),
            )
            for task in dict.fromkeys([*ours, *theirs])
        ]
    return rows


def _if_alike(parent: Score | None, arm: Score | None) -> Score | None:
    return parent if parent is None or arm is None or parent.cut == arm.cut else None


def averages(rows: Sequence[TaskRow]) -> list[TaskRow]:
    """Return the mean accuracy of each pruned arm over the tasks that both sides have; errors of tasks independent.

    The tasks of one arm are those of all arms with a counterpart, so that bars of different methods can be compared.
    """
    names = list(dict.fromkeys(row.pruned_name for row in rows))
    complete = {
        name: {row.task: row for row in rows if row.pruned_name == name and row.difference is not None}
        for name in names
    }
    compared = [tasks for tasks in complete.values() if tasks]
    if not compared:
        return []
    common = [task for task in compared[0] if all(task in tasks for tasks in compared)]
    chosen = _one_metric_a_task(common)
    return [_average([tasks[task] for task in chosen]) for tasks in compared if chosen]


def _one_metric_a_task(names: Sequence[str]) -> list[str]:
    by_task: dict[str, dict[str, str]] = {}
    for name in names:
        task, _, metric = name.rpartition("/")
        if metric in _ACCURACIES:
            by_task.setdefault(task, {})[metric] = name
    return [next(found[metric] for metric in _ACCURACIES if metric in found) for found in by_task.values()]


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


def _scores_of(found: Sequence[tuple[Run, ArmResult]]) -> dict[str, Score]:
    """Return the scores of an arm, the mean over its seeds; a metric that one seed lacks is left out."""
    measured = [run.scores.get(_fingerprint(run, arm), {}) for run, arm in found]
    common = [name for name in measured[0] if all(name in one for one in measured)]
    return {name: _mean_score([one[name] for one in measured], measured[0][name].documents) for name in common}


def _fingerprint(run: Run, arm: ArmResult) -> str:
    """Return the hash of an arm's trained model, which ``Results.hashes`` keeps by the arm's name in its recipe."""
    hashes = {_plain(name): value for name, value in run.results.hashes.items()}
    return hashes.get(_plain(f"model {arm.name}"), "")


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
