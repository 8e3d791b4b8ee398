"""Compare pruned and scratch models on benchmark tasks, by the scores of ``pvs evaluate``."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from nemo_pvs.reporting.compare.scores import Score
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import LEVEL, MeanEstimate, crossed_estimate, mean_estimate, quantile

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import Run, SideBySide

SURE = 2.0
"""A difference is significant if it exceeds this many of its standard errors, a level of about 5 %; with several seeds
at least as many as Student's t says."""
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
        return bool(self._differences) and all(score.by_document is not None for score in self._differences)

    @property
    def error(self) -> MeanEstimate | None:
        """How well the difference is known: over questions and, if there are several, over seeds."""
        return error_of([self._differences]) if self._differences else None

    @property
    def stderr(self) -> float | None:
        """The standard error of the difference."""
        return self.error.stderr if self.error else None

    @cached_property
    def _differences(self) -> list[Score]:
        """The differences of each seed, question by question where both models answered the same ones.

        Models that share no seed count as independent.
        """
        pruned, scratch = self.pruned, self.scratch
        if pruned is None or scratch is None or self.difference is None:
            return []
        if len(pruned.by_seed) != len(scratch.by_seed):
            return [_minus(scratch, pruned)]
        return [_minus(theirs, ours) for theirs, ours in zip(scratch.by_seed, pruned.by_seed, strict=True)]

    @property
    def winner(self) -> str:
        """``pruned``, ``scratch``, ``within error``; ``unknown`` without a standard error or a finite difference."""
        if self.difference is None or self.error is None or self.error.stderr is None:
            return "unknown"
        if not math.isfinite(self.difference):
            return "unknown"
        higher_is_better = self.pruned is None or self.pruned.higher_is_better is not False
        errors = SURE if self.error.count == 1 else max(SURE, quantile((1 + LEVEL) / 2, self.error.degrees))
        if abs(self.difference) <= errors * self.error.stderr:
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
    def error(self) -> MeanEstimate | None:
        """How well the mean of the tasks' differences is known, whose questions are independent."""
        return error_of([row._differences for row in self.rows])


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
        ours, theirs = _by_seed(runs, arm), _by_seed(runs, scratch) if scratch else {}
        shared = [seed for seed in ours if seed in theirs]
        pruned_scores = _mean_over_models([ours[seed] for seed in shared or ours])
        scratch_scores = _mean_over_models([theirs[seed] for seed in shared or theirs]) if theirs else {}
        for task in dict.fromkeys([*pruned_scores, *scratch_scores]):
            pruned, random = pruned_scores.get(task), scratch_scores.get(task)
            of_parent = _if_comparable(parent.get(task), pruned or random)
            rows.append(TaskRow(task, arm.name, scratch_name, of_parent, pruned, random))
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
        return _mean_of_tasks(known)

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


def _by_seed(runs: SideBySide, arm: ArmResult) -> dict[tuple[str, str], dict[str, Score]]:
    """Return the scores of an arm's models by the seeds of their weights and of the data's order."""
    return {(str(run.seed), str(run.data_seed)): task_scores_of(run, one) for run, one in runs.repetitions[arm.name]}


def _mean_over_models(models: Sequence[dict[str, Score]]) -> dict[str, Score]:
    """Return the scores averaged over seeds; metrics that a seed lacks are omitted."""
    common = [name for name in models[0] if all(name in scores for scores in models)]
    return {name: _mean_of_seeds([scores[name] for scores in models]) for name in common}


def _parent_scores(runs: SideBySide) -> dict[str, Score]:
    """Return the parent's scores, averaged over the parents if each seed has its own."""
    by_parent: dict[str | None, dict[str, Score]] = {}
    for run in runs.runs:  # of those with one parent, not every one may have evaluated it
        known = by_parent.setdefault(run.results.hashes.get("parent weights"), {})
        known.update({name: score for name, score in run.parent_scores.items() if name not in known})
    return _mean_over_models(list(by_parent.values()))


def task_scores_of(run: Run, arm: ArmResult) -> dict[str, Score]:
    """Return the scores of an arm's trained model in one run.

    Its fingerprint is stored in ``Results.hashes`` under the arm's name in its recipe.
    """
    hashes = {_plain(name): value for name, value in run.results.hashes.items()}
    return run.scores.get(hashes.get(_plain(f"model {arm.name}"), ""), {})


def _plain(name: str) -> str:
    return re.sub(r"[ ,-]+", "-", name)


def _mean_of_seeds(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    error = error_of([scores])
    cuts = [score.cut for score in scores if score.cut is not None]
    return Score(
        statistics.fmean(score.value for score in scores),
        error.stderr if error else None,
        scores[0].documents,
        scores[0].higher_is_better,
        cut=" and ".join(dict.fromkeys(cuts)) or None,
        seeds=tuple(scores),
    )


def _mean_of_tasks(scores: Sequence[Score]) -> Score:
    if len(scores) == 1:
        return scores[0]
    error = error_of([score.by_seed for score in scores])
    return Score(
        statistics.fmean(score.value for score in scores),
        error.stderr if error else None,
        sum(score.documents for score in scores),
        scores[0].higher_is_better,
    )


def _minus(scratch: Score, pruned: Score) -> Score:
    """Return a difference, by question if both were asked the same ones; else the two count as independent."""
    value, ours, theirs = scratch.value - pruned.value, pruned.by_document, scratch.by_document
    if ours and theirs and pruned.content is not None and pruned.content == scratch.content and len(ours) > 1:
        answers = tuple(s - p for p, s in zip(ours, theirs, strict=True))
        error = statistics.stdev(answers) / math.sqrt(len(answers))
        return Score(value, error, pruned.documents, None, answers, pruned.content)
    known = pruned.stderr is not None and scratch.stderr is not None
    error_of_both = math.hypot(pruned.stderr or 0.0, scratch.stderr or 0.0) if known else None
    return Score(value, error_of_both, pruned.documents, None)


def error_of(tasks: Sequence[Sequence[Score]]) -> MeanEstimate | None:
    """Return how well the mean of scores over tasks and seeds is known; None if an error is unknown.

    Seeds share the questions, so these do not average out over them. Where all single questions are known, this is
    ``crossed_estimate``; elsewhere the errors of questions and of seeds are added, which is never too small.

    Args:
        tasks: For each task the scores of the seeds, which are the same for all tasks.
    """
    count = min(map(len, tasks))
    of_seeds = mean_estimate([statistics.fmean(task[seed].value for task in tasks) for seed in range(count)])
    errors = [_of_questions(task) for task in tasks]
    known = [error for error in errors if error is not None]
    if of_seeds is None or len(known) < len(errors) or any(len(task) != count for task in tasks):
        return None
    questions = math.hypot(*known) / len(tasks)
    if of_seeds.stderr is None:
        return replace(of_seeds, stderr=questions, degrees=math.inf)
    if all(_same_questions(task) for task in tasks):
        return crossed_estimate([[score.by_document for score in task] for task in tasks])
    stderr = math.hypot(questions, of_seeds.stderr)
    degrees = of_seeds.degrees * (stderr / of_seeds.stderr) ** 4 if of_seeds.stderr else math.inf
    return replace(of_seeds, stderr=stderr, degrees=degrees)


def _of_questions(seeds: Sequence[Score]) -> float | None:
    """Return the standard error that the questions leave in a mean over seeds, which were all asked the same ones."""
    if len(seeds) > 1 and _same_questions(seeds):
        answers = zip(*(score.by_document or () for score in seeds), strict=True)
        means = [statistics.fmean(of_one) for of_one in answers]
        return statistics.stdev(means) / math.sqrt(len(means))
    errors = [score.stderr for score in seeds if score.stderr is not None]
    return statistics.fmean(errors) if len(errors) == len(seeds) else None


def _same_questions(scores: Sequence[Score]) -> bool:
    first = scores[0].content
    return first is not None and all(score.content == first and len(score.by_document or ()) > 1 for score in scores)
