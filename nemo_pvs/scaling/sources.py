"""Read series from finished runs, the paper's published points, or a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

from nemo_pvs.errors import UserError
from nemo_pvs.reporting.compare.compare import seeds_of
from nemo_pvs.reporting.published import published
from nemo_pvs.reporting.results import ArmResult, Results, at
from nemo_pvs.reporting.training_log import log_files, validation_losses
from nemo_pvs.scaling.series import LossSeries

PUBLISHED = "published"

_WARM_UP = 0.1
"""Share of a run whose losses are ignored: its warm-up (5 % in the paper) and the losses that it still affects."""
_LADDER = 3
"""Budgets from which the last losses of arms are fitted together, as a curve has three parameters."""
_COLUMNS = ("name", "tokens", "loss", "parameters")
_OPTIONAL = ("initialisation", "parent_parameters", "parent_loss")
_LOG_COLUMNS = ("name", "log", "tokens_per_step", "parameters")


def read_series(runs: Iterable[str], leave_out: Callable[[str], None] | None = None) -> list[LossSeries]:
    """Read series from run folders (``results.json``), CSV tables or, by the name ``published``, the paper's Figure 1.

    A table has the columns name, tokens, loss, parameters and, if known, initialisation (``pruned`` or ``random``),
    parent_parameters and parent_loss; rows with the same name are the ends of separate runs of one model. With log and
    tokens_per_step instead of tokens and loss, a row is one run whose curve is in a training log
    (``reporting.training_log``; the path is relative to the table).

    Args:
        runs: Run folders, tables or ``published``.
        leave_out: Called with a message for each arm of a run that cannot be fitted, because it diverged or was hardly
            validated; the other arms are read. Without it such an arm raises its error.

    Raises:
        UserError: one of them cannot be read, or two series have the same name.
    """
    all_series: list[LossSeries] = []
    for run in runs:
        if run == PUBLISHED:
            all_series += _published()
        elif run.endswith(".csv"):
            all_series += _table(Path(run))
        else:
            for folder in seeds_of(Path(run)):
                all_series += run_series(_results(folder), str(folder), leave_out)
    names = [series.name for series in all_series]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"There are two series named {name!r}; give each run once.")
    return all_series


def _results(folder: Path) -> Results:
    file = folder / "results.json"
    if folder.is_dir() and not file.exists() and log_files(folder):
        raise UserError(
            f"{folder} has training logs but no results.json, which says what was trained; list the logs in a .csv "
            f"table with the columns {', '.join(_LOG_COLUMNS)}."
        )
    return Results.load(file)


def run_series(results: Results, source: str, leave_out: Callable[[str], None] | None = None) -> list[LossSeries]:
    """Return the series of a run; ``leave_out`` is that of ``read_series``.

    Arms of one target with equal initial weights and at least three budgets are one series of their last losses: the
    ends of decayed runs, as scaling laws assume. Every other arm is a series of its own, with the losses that were
    measured while its learning rate was still high.
    """
    series = []
    for arms in _ladders(results):
        try:
            if len(arms) > 1:
                series.append(_last_losses(results, arms, source))
            elif any(point.tokens for point in arms[0].validation):
                series.append(_arm(results, arms[0], source))
        except UserError as error:
            if leave_out is None:
                raise
            leave_out(str(error))
    return series


def _ladders(results: Results) -> list[list[ArmResult]]:
    """Return groups of arms that differ only in their budgets, three or more, and every other arm alone."""
    groups: dict[tuple[str, str], dict[int, ArmResult]] = {}
    for arm in results.arms:
        if arm.setting is None and arm.validation_loss is not None and math.isfinite(arm.validation_loss):
            groups.setdefault((arm.target, arm.initialisation), {})[arm.validation[-1].tokens] = arm
    ladders = [[arms[tokens] for tokens in sorted(arms)] for arms in groups.values() if len(arms) >= _LADDER]
    grouped = {arm.name for arms in ladders for arm in arms}
    return [*ladders, *([arm] for arm in results.arms if arm.name not in grouped)]


def _last_losses(results: Results, arms: list[ArmResult], source: str) -> LossSeries:
    series = replace(_arm(results, arms[-1], source), name=f"{source}: {arms[0].target}, {arms[0].initialisation}")
    return replace(
        series,
        tokens=tuple(arm.validation[-1].tokens for arm in arms),
        losses=tuple(arm.validation[-1].loss for arm in arms),
        separate_runs=True,
        planned_tokens=None,
    )


def _arm(results: Results, arm: ArmResult, source: str) -> LossSeries:
    planned = arm.ledger.training.tokens or None
    start = max(_WARM_UP * (planned or arm.validation[-1].tokens), _last_round(results, arm))
    points = {point.tokens: point.loss for point in arm.validation if point.tokens > start}
    of_parent = results.hashes.get("tokenizer")
    tokenizer = results.hashes.get(f"tokenizer of {arm.target}", of_parent)
    # A loss per token of another tokenizer is in another unit.
    parent_loss = results.parent.validation_loss if results.parent and tokenizer == of_parent else None
    return LossSeries(
        name=f"{source.rstrip('/')}: {arm.name}",
        tokens=tuple(sorted(points)),
        losses=tuple(points[tokens] for tokens in sorted(points)),
        initialisation=arm.initialisation,
        parameters=arm.shape.parameters - arm.masked_parameters,
        parent_parameters=results.parent.shape.parameters if results.parent else None,
        parent_loss=parent_loss,
        planned_tokens=planned,
        source=source,
        tokenizer=tokenizer,
    )


def _last_round(results: Results, arm: ArmResult) -> int:
    """Return the tokens after which an arm was last pruned; before that it was a larger model."""
    if arm.initialisation == "random" or (at(results.recipe, "targets", arm.target, "stages") or 1) == 1:
        return 0
    # A round begins with a second validation at the same number of tokens.
    rounds = [point.tokens for point, following in pairwise(arm.validation) if point.tokens == following.tokens]
    return max(rounds, default=0)


def _published() -> list[LossSeries]:
    paper = published()
    all_series = []
    for curve in paper.curves:
        series = LossSeries(
            name=curve.name,
            tokens=tuple(point.tokens for point in curve.points),
            losses=tuple(point.loss for point in curve.points),
            initialisation=curve.initialisation,
            parameters=curve.parameters,
            parent_parameters=paper.parent_parameters,
            parent_loss=paper.parent_loss,
            separate_runs=True,
            source=curve.source,
        )
        all_series.append(series)
    return all_series


def _table(path: Path) -> list[LossSeries]:
    if not path.is_file():
        raise UserError(f"{path} does not exist; check the path.")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # Excel writes a BOM
        reader = csv.DictReader(file)
        logs = "log" in (reader.fieldnames or ())
        needed = _LOG_COLUMNS if logs else _COLUMNS
        missing = [column for column in needed if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{path} lacks the columns {', '.join(missing)}; it needs {', '.join(needed)} and may have "
                f"{', '.join(_OPTIONAL)}."
            )
        rows = sorted(reader, key=lambda row: str(row["name"]))
    if logs:
        return [_log_series(path, row) for row in rows]
    return [_row_series(path, name, list(group)) for name, group in groupby(rows, key=lambda row: str(row["name"]))]


def _log_series(path: Path, row: dict[str, str]) -> LossSeries:
    try:
        size = int(float(row["tokens_per_step"]))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {row['name']!r} has a value that is not a number ({error}); correct it.") from None
    losses = validation_losses(path.parent / row["log"])
    start = _WARM_UP * max(losses) * size
    rows = []
    for steps, loss in losses.items():
        if steps * size > start:
            rows.append({**row, "tokens": str(steps * size), "loss": str(loss)})
    return replace(_row_series(path, row["name"], rows), separate_runs=False)


def _row_series(path: Path, name: str, rows: list[dict[str, str]]) -> LossSeries:
    first = rows[0]
    start = first.get("initialisation") or "pruned"
    for row in rows:
        if any(row.get(column) != first.get(column) for column in ("parameters", *_OPTIONAL)):
            raise UserError(f"{path}: the rows of {name!r} are of different models; give each its own name.")
    if start != "pruned" and start != "random":
        raise UserError(f"{path}: initialisation is {start!r}; write pruned or random.")
    try:
        points = sorted((float(row["tokens"]), float(row["loss"])) for row in rows)
        parent = first.get("parent_parameters")
        parent_loss = first.get("parent_loss")
        return LossSeries(
            name=name,
            tokens=tuple(tokens for tokens, _ in points),
            losses=tuple(loss for _, loss in points),
            initialisation="pruned" if start == "pruned" else "random",
            parameters=int(float(first["parameters"])),
            parent_parameters=int(float(parent)) if parent else None,
            parent_loss=float(parent_loss) if parent_loss else None,
            separate_runs=True,
            source=str(path),
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {name!r} has a value that is not a number ({error}); correct it.") from None
