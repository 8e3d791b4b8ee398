"""Two further tables of the report: pruned and scratch on tasks, and on equal terms; cells for page and Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.reporting.compare.scores import Score
from nemo_pvs.reporting.compare.tasks import SURE, TaskRow
from nemo_pvs.reporting.numbers import DASH, fixed
from nemo_pvs.reporting.results import Results
from nemo_pvs.reporting.tables.results import with_deviation

TASK_HEADINGS = ["Task", "pruned model", "parent", "pruned (P)", "scratch (S)", "S − P", "better"]
TASK_NOTES = [
    "Accuracies in per cent and differences of them in points, each ± one standard error; losses in nats per token.",
    f"Better: which side's advantage exceeds {SURE:g} standard errors of the difference; within error: neither.",
    "*: the difference was taken question by question, which makes its standard error smaller; else the two models "
    "count as independent.",
    f"{DASH}: not measured, or in windows of another kind.",
]
TERMS_HEADINGS = ["Pruned model", "from scratch", "equal", "gap (nats)"]
_TRAINING = "equal-training-tokens"


def task_cells(rows: Sequence[TaskRow]) -> list[list[str]]:
    """Return formatted cells of ``compare_tasks.task_rows``."""
    return [
        [
            row.task if row.cut is None else f"{row.task}, {row.cut}",
            row.pruned_name,
            *(_score(row.task, score) for score in (row.parent, row.pruned, row.scratch)),
            _difference(row),
            DASH if row.difference is None else row.winner,
        ]
        for row in rows
    ]


def terms_cells(results: Results) -> list[list[str]]:
    """Return every comparison on equal terms, if any is of another setting than the main table's."""
    found = [(arm.name, one) for arm in results.arms for one in results.comparisons(arm)]
    if all(one.setting == _TRAINING for _, one in found):
        return []
    return [
        [name, one.scratch.name, one.setting.removeprefix("equal-").replace("-", " "), fixed(one.gap, signed=True)]
        for name, one in found
    ]


def _score(task: str, score: Score | None) -> str:
    if score is None:
        return DASH
    factor, decimals = _scale(task)
    error = None if score.stderr is None else factor * score.stderr
    return with_deviation(fixed(factor * score.value, decimals), error, decimals)


def _difference(row: TaskRow) -> str:
    if row.difference is None:
        return DASH
    factor, decimals = _scale(row.task)
    error = None if row.stderr is None else factor * row.stderr
    shown = with_deviation(fixed(factor * row.difference, decimals, signed=True), error, decimals)
    return f"{shown}\u00a0*" if row.paired else shown


def _scale(task: str) -> tuple[int, int]:
    """Return the factor and the decimals of a metric: shares become per cent."""
    metric = task.rpartition("/")[2].partition(",")[0]
    return (100, 1) if metric.startswith(("acc", "average", "exact_match", "f1")) else (1, 2)
