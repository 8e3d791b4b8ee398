"""The numbers of a report as plain data: ``report.json``, and CSV tables of the same."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nemo_pvs.reporting.compare.budgets import BudgetRow, budget_rows
from nemo_pvs.reporting.compare.estimates import (
    bits_per_byte_after,
    final_loss,
    gap,
    gap_curve,
    parent_loss,
    perplexity_after,
)
from nemo_pvs.reporting.compare.regained import regained
from nemo_pvs.reporting.compare.removed import removed_share
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.compare.scores import Score
from nemo_pvs.reporting.compare.tasks import TaskRow, averages, task_rows
from nemo_pvs.reporting.compare.verdicts import NonInferiority, PaperFinding
from nemo_pvs.reporting.figures.gap import published_gaps
from nemo_pvs.reporting.results import ArmResult, ParentResult
from nemo_pvs.reporting.statistics import MeanEstimate
from nemo_pvs.reporting.tables.sweeps import sweeps_of

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
        for tokens, over_seeds in gap_curve(runs, arm):
            gap_rows.append({"arm": arm.name, "tokens": tokens, **_estimate("gap", over_seeds)})
    data = {
        "title": results.title,
        "created": results.created,
        "runs": run_rows,
        "not_comparable": list(runs.differences),
        "warnings": runs.warnings,
        "findings": [_finding(finding) for finding in runs.findings],
        "parent": _parent(runs, results.parent) if results.parent else None,
        "arms": arm_rows(runs),
        "equal_terms": equal_terms(runs),
        "by_budget": [_budget(row) for row in budget_rows(runs, reference=reference)],
        "gap_against_tokens": gap_rows,
        "tasks": [_task(row) for row in tasks],
        "averages": [_task(row) for row in averages(tasks)],
    }
    if sweeps := sweeps_of(runs):
        data["learning_rates"] = [asdict(sweep) for sweep in sweeps]
    if returning := regained(runs):
        rows = []
        for row in returning:
            about = {"arm": row.arm, "measure": row.measure, "parent": row.parent}
            for tokens, value in row.points:
                rows.append({**about, "tokens": tokens, "value": value, "relative": row.share(value)})
        data["regained"] = rows
    if runs.recoveries:
        data["non_inferiority"] = [_non_inferiority(test) for test in runs.recoveries]
    if reference:
        published_rows = []
        for method, points in published_gaps().items():
            for tokens, gap, removed in points:
                published_rows.append({"method": method, "tokens": tokens, "gap": gap, "removed": removed})
        data["published"] = published_rows
    plain: dict[str, Any] = _plain(data)
    return plain


def _parent(runs: SideBySide, parent: ParentResult) -> dict[str, Any]:
    values = {**asdict(parent), **_interval("validation_loss", parent_loss(runs))}
    if parent.test_bits_per_byte is None:
        del values["test_bits_per_byte"]
    return values


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
        for setting, scratch, _ in runs.results.comparisons(arm):
            names = {"pruned": arm.name, "scratch": scratch.name, "setting": setting}
            rows.append({**names, **_estimate("gap", gap(runs, arm, setting))})
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
        **_interval("validation_loss", final_loss(runs, arm)),
        **_estimate("gap", gap(runs, arm)),
        "test_perplexity_before": arm.test_perplexity_before,
        "test_perplexity_after": arm.test_perplexity_after,
        **_interval("test_perplexity_after", perplexity_after(runs, arm)),
        **(
            {
                "test_bits_per_byte_before": arm.test_bits_per_byte_before,
                "test_bits_per_byte_after": arm.test_bits_per_byte_after,
                **_interval("test_bits_per_byte_after", bits_per_byte_after(runs, arm)),
            }
            if results.has_bits_per_byte
            else {}
        ),
    }


def _estimate(name: str, over_seeds: MeanEstimate | None) -> dict[str, Any]:
    """Return a mean over seeds with its interval and number of seeds, under keys that start with ``name``."""
    return {
        name: None if over_seeds is None else over_seeds.mean,
        **_interval(name, over_seeds),
        f"{name}_seeds": 0 if over_seeds is None else over_seeds.count,
    }


def _interval(name: str, over_seeds: MeanEstimate | None) -> dict[str, Any]:
    """Return standard deviation and 95 % interval over seeds; all None for one seed."""
    return {
        f"{name}_deviation": None if over_seeds is None else over_seeds.deviation,
        f"{name}_low": None if over_seeds is None else over_seeds.low,
        f"{name}_high": None if over_seeds is None else over_seeds.high,
    }


def _finding(finding: PaperFinding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "source": finding.source,
        "statement": finding.statement,
        "judgement": finding.judgement,
        "reason": finding.reason,
        "evidence": [{"comparison": name, **_estimate("gap", value)} for name, value in finding.evidence],
        "missing": list(finding.missing),
    }


def _non_inferiority(test: NonInferiority) -> dict[str, Any]:
    difference = test.difference
    return {
        "arm": test.arm,
        "measure": test.measure,
        "unit": test.unit,
        "margin": test.margin,
        "difference": None if difference is None else difference.mean,
        "difference_stderr": None if difference is None else difference.stderr,
        "degrees_of_freedom": None if difference is None or difference.stderr is None else difference.degrees,
        "lower_bound": None if difference is None else difference.lower_bound,
        "upper_bound": None if difference is None else difference.upper_bound,
        "verdict": test.verdict,
        "basis": test.basis,
    }


def _budget(row: BudgetRow) -> dict[str, Any]:
    return {
        "method": row.method,
        "target": row.target,
        "granularity": row.granularity,
        "removed": row.removed,
        "training_tokens": row.tokens,
        "quantity": row.quantity,
        "scratch_equal_training": row.scratch,
        "pruned": row.pruned,
        "scratch_equal_total": row.scratch_of_total,
        **_estimate("gap_equal_training", row.gap),
        **_estimate("gap_equal_total", row.gap_of_total),
        "source": row.source,
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
