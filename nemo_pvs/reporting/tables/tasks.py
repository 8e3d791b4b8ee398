"""Further tables of the report, for page and Markdown: pruned and scratch on tasks, and on equal terms."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.reporting.compare.estimates import gap
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.scores import Score, unit_of_score
from nemo_pvs.reporting.compare.tasks import SURE, TaskRow
from nemo_pvs.reporting.numbers import DASH, fixed, plus_minus
from nemo_pvs.reporting.tables.results import gap_cell

TASK_HEADINGS = ["Task", "pruned model", "parent", "pruned (P)", "scratch (S)", "S − P", "better"]
_TASK_NOTES = [
    "Accuracies in per cent and differences of them in points, losses in nats per token; in this table ± is one "
    "standard error.",
    f"Better: which side's advantage exceeds {SURE:g} standard errors of the difference; within error: neither.",
    "*: the difference was taken question by question, which makes its standard error smaller; else the two models "
    "count as independent.",
    f"{DASH}: not measured, or in windows of another kind.",
]
_OF_SEEDS = (
    "Standard errors are over questions and seeds; instead of {sure:g} of them, as many count as Student's t says at "
    "95 % if these are more."
)
TERMS_HEADINGS = ["Pruned model", "from scratch", "equal", "gap (nats)"]
_TRAINING = "equal-training-tokens"


def task_notes(runs: SideBySide) -> list[str]:
    """Return the notes below the table of tasks."""
    return [*_TASK_NOTES, *([_OF_SEEDS.format(sure=SURE)] if runs.seeds > 1 else [])]


def task_cells(rows: Sequence[TaskRow]) -> list[list[str]]:
    """Return the formatted cells of ``compare.tasks.task_rows``."""
    cells = []
    for row in rows:
        task = row.task if row.cut is None else f"{row.task}, {row.cut}"
        scores = [_score(row.task, score) for score in (row.parent, row.pruned, row.scratch)]
        winner = DASH if row.difference is None else row.winner
        cells.append([task, row.pruned_name, *scores, _difference(row), winner])
    return cells


def terms_cells(runs: SideBySide) -> list[list[str]]:
    """Return every comparison on equal terms; empty if all have the main table's setting."""
    cells, settings = [], set()
    for arm in runs.results.arms:
        for comparison in runs.results.comparisons(arm):
            settings.add(comparison.setting)
            terms = comparison.setting.removeprefix("equal-").replace("-", " ")
            over_seeds = gap(runs, arm, comparison.setting)
            cells.append([arm.name, comparison.scratch.name, terms, gap_cell(over_seeds)])
    return cells if settings - {_TRAINING} else []


def _score(task: str, score: Score | None) -> str:
    if score is None:
        return DASH
    factor, decimals = _scale(task)
    error = None if score.stderr is None else factor * score.stderr
    return plus_minus(fixed(factor * score.value, decimals), error, decimals)


def _difference(row: TaskRow) -> str:
    if row.difference is None:
        return DASH
    factor, decimals = _scale(row.task)
    error = None if row.stderr is None else factor * row.stderr
    shown = plus_minus(fixed(factor * row.difference, decimals, signed=True), error, decimals)
    return f"{shown}\u00a0*" if row.paired else shown


def _scale(task: str) -> tuple[int, int]:
    """Return the factor and the number of decimals for a metric: shares are shown in per cent."""
    return (100, 1) if unit_of_score(task) == "points" else (1, 2)
