"""The numbers of a report as plain data: ``report.json``, and CSV tables of the same."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.scores import Score
from nemo_pvs.reporting.compare.tasks import TaskRow, averages, task_rows
from nemo_pvs.reporting.figures.gap import gap_curve, published_gaps, removed_share
from nemo_pvs.reporting.results import ArmResult

Rows = list[dict[str, Any]]


def report_data(runs: SideBySide, *, reference: bool = False) -> dict[str, Any]:
    """Return all numbers that the page shows; unknown ones are None, those that are not finite are their names.

    Args:
        runs: The runs to report.
        reference: Include the paper's points.
    """
    results = runs.results
    tasks = task_rows(runs)
    run_rows = []
    for run in runs.runs:
        run_rows.append(
            {
                "folder": run.label,
                "seed": run.seed,
                "data_seed": run.data_seed,
                "results": run.results.to_json(),
            }
        )
    gap_rows = []
    for arm in results.arms:
        gap_rows += [{"arm": arm.name, "tokens": tokens, "gap": gap} for tokens, gap in gap_curve(results, arm)]
    data = {
        "title": results.title,
        "created": results.created,
        "runs": run_rows,
        "not_comparable": list(runs.differences),
        "warnings": runs.warnings,
        "parent": asdict(results.parent) if results.parent else None,
        "arms": arm_rows(runs),
        "equal_terms": equal_terms(runs),
        "gap_against_tokens": gap_rows,
        "tasks": [_task(row) for row in tasks],
        "averages": [_task(row) for row in averages(tasks)],
    }
    if reference:
        published_rows = []
        for method, points in published_gaps().items():
            for tokens, gap, removed in points:
                published_rows.append({"method": method, "tokens": tokens, "gap": gap, "removed": removed})
        data["published"] = published_rows
    plain: dict[str, Any] = _plain(data)
    return plain


def arm_rows(runs: SideBySide) -> Rows:
    """Return one row per arm, losses and gaps in nats per token; rows of missing arms hold only their names."""
    rows = [_arm(runs, arm) for arm in runs.results.arms]
    empty: dict[str, Any] = dict.fromkeys(rows[0] if rows else ())
    for target, start in runs.missing:
        rows.append({**empty, "arm": f"{target}, {start}", "target": target, "initialisation": start, "runs": 0})
    return rows


def equal_terms(runs: SideBySide) -> Rows:
    """Return one row per pair of a pruned arm and an arm from scratch of equal cost under a setting."""
    rows = []
    for arm in runs.results.arms:
        for setting, scratch, gap in runs.results.comparisons(arm):
            rows.append({"pruned": arm.name, "scratch": scratch.name, "setting": setting, "gap": gap})
    return rows


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as CSV with a header; unknown values are empty cells."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _arm(runs: SideBySide, arm: ArmResult) -> dict[str, Any]:
    results, ledger = runs.results, arm.ledger
    known = bool(ledger.charges)
    return {
        "arm": arm.name,
        "target": arm.target,
        "method": arm.method,
        "initialisation": arm.initialisation,
        "runs": len(runs.repetitions[arm.name]),
        "parameters": arm.shape.parameters - arm.masked_parameters,
        "removed": removed_share(results, arm),
        "training_tokens": ledger.training.tokens if known else None,
        "training_flops": ledger.training.flops if known else None,
        "training_flops_zeros_skipped": ledger.training_zeros_skipped.flops if known else None,
        "total_tokens": ledger.total.tokens if known else None,
        "total_flops": ledger.total.flops if known else None,
        "total_flops_zeros_skipped": ledger.total_zeros_skipped.flops if known else None,
        "validation_loss": arm.validation_loss,
        "validation_loss_deviation": runs.final_loss_deviation(arm),
        "gap": results.gap(arm),
        "gap_deviation": runs.gap_deviation(arm),
        "test_perplexity_before": arm.test_perplexity_before,
        "test_perplexity_after": arm.test_perplexity_after,
        "test_perplexity_after_deviation": runs.perplexity_deviation(arm),
    }


def _task(row: TaskRow) -> dict[str, Any]:
    return {
        "task": row.task,
        "windows": row.cut,
        "pruned_arm": row.pruned_name,
        "scratch_arm": row.scratch_name,
        **_score("parent", row.parent),
        **_score("pruned", row.pruned),
        **_score("scratch", row.scratch),
        "difference": row.difference,
        "difference_stderr": row.stderr,
        "paired": row.paired,
        "winner": row.winner,
    }


def _score(name: str, score: Score | None) -> dict[str, Any]:
    return {
        name: None if score is None else score.value,
        f"{name}_stderr": None if score is None else score.stderr,
    }


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by their names."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
