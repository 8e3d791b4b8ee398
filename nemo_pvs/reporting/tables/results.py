"""The outcome in words and the results table: the same rows for the page, the Markdown file and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from nemo_pvs.ledger.ledger import SHARED_ANSWERS
from nemo_pvs.reporting.compare.estimates import bits_per_byte_after, final_loss, gap, parent_loss, perplexity_after
from nemo_pvs.reporting.numbers import (
    DASH,
    NOT_FINITE,
    fixed,
    format_perplexity,
    plus_minus,
    scaled,
    scientific,
    unit_of,
)
from nemo_pvs.reporting.results import ArmResult, ParentResult, Results
from nemo_pvs.reporting.statistics import MeanEstimate

if TYPE_CHECKING:
    from nemo_pvs.reporting.compare.runs import SideBySide

_MANY = 6
"""Comparisons beyond which sentences give a range."""
_BETWEEN_COLUMNS = 2
_LEAST_NAME = 12
"""Columns of the terminal for names."""
_NOT_FINITE = "NaN/∞"
"""The short form for the terminal, where a wider cell would push out the last column."""


@dataclass(frozen=True)
class Column:
    """A column of the results table, with units in its headings."""

    group: str
    """Heading shared by adjacent columns; empty for none."""
    heading: str
    """Heading below the group's."""
    plain: str
    """Heading in tables without groups."""
    terminal: str | None = None
    """Heading in the terminal; None omits the column there."""


@dataclass(frozen=True)
class ResultsTable:
    """Formatted cells; the first of a row is its name, all others are numbers or dashes."""

    columns: list[Column]
    rows: list[list[str]]
    """The parent, if there is one, then the arms in order."""


_GAP_HEADING = "gap\n(nats)"
_GAP = (
    "Gap: loss of the model from scratch minus loss of the pruned one after the same number of training tokens; "
    "positive where pruning won."
)
PLUS_MINUS = (
    "Means over runs with different seeds ± half of their 95 % interval (Student's t, n − 1 degrees of freedom); gaps "
    "are paired: the two arms of a seed are subtracted first."
)
_ONE_RUN = "Each arm is one run: differences that another seed would make are not measured."
NOTES = (
    "Body: decoder layers and final norm, without embedding and output head.",
    "TP × PP: tensor-parallel times pipeline-parallel ranks.",
    _GAP,
    "Before and after: the training on the tokens counted here.",
    _ONE_RUN,
    f"{DASH}: not measured or not known.",
)


_OTHER_TOKENS = (
    "Models with different vocabularies split text into different tokens: losses, gaps and perplexities are per token "
    "and comparable within a target only; across vocabularies compare bits per byte."
)


def notes_of(runs: SideBySide) -> list[str]:
    """Return the notes below the table of these runs."""
    notes = [note for note in NOTES if note != _GAP or runs.results.parent]
    if not runs.results.all_same_tokens:
        notes.append(_OTHER_TOKENS)
    notes += _of_training(runs)
    if runs.seeds == 1:
        return notes
    counts = ", ".join(f"{arm.name} {len(runs.repetitions[arm.name])}" for arm in runs.results.arms)
    if len({len(repeated) for repeated in runs.repetitions.values()}) == 1:
        counts = f"{runs.seeds} of each arm"
    repeated = f"{PLUS_MINUS} Runs: {counts}."
    return [repeated if note == _ONE_RUN else note for note in notes]


_INITIALISATIONS = {
    "megatron": "as Megatron draws them: with a standard deviation of 0.02 (initializer_range), divided by √(2 L) in "
    "attention outputs and MLP down projections, as in GPT-2",
    "maxtext": "as the MaxText of the published runs (arXiv 2606.14150) draws them, so that scratch begins where "
    "theirs did: by 1 / √(inputs), queries by another √(head size), embeddings with 0.02",
    "normal": "with a standard deviation of 0.02 (initializer_range) everywhere, as the published sparse baselines "
    "(arXiv 2606.14150) were",
}
_PAPER_STEPS = (
    "Budgets in names are counted as the paper labels its runs, 2^20 tokens for a million; all other numbers are of "
    "tokens that were seen."
)
_SHARED_TEACHER = (
    "The teacher read each token once, for all arms that learn from it; its forward passes are charged once, to these "
    "arms in proportion to the tokens that each was trained on."
)


def _of_training(runs: SideBySide) -> list[str]:
    """Return notes on the initialisation of random weights, the unit of budgets and a shared teacher's cost."""
    trained = [train for run in runs.runs if isinstance(train := run.results.recipe.get("train"), Mapping)]
    drawn = any(arm.initialisation == "random" for run in runs.runs for arm in run.results.arms)
    schemes = dict.fromkeys(str(train.get("initialisation", "megatron")) for train in trained) if drawn else {}
    notes = [f"Random weights are drawn {_INITIALISATIONS[scheme]}." for scheme in schemes]
    if any(train.get("paper_steps") for train in trained):
        notes.append(_PAPER_STEPS)
    arms = [arm for run in runs.runs for arm in run.results.arms]
    if any(charge.note == SHARED_ANSWERS for arm in arms for charge in arm.ledger.charges):
        notes.append(_SHARED_TEACHER)
    return notes


def outcome(results: Results, runs: SideBySide | None = None) -> str:
    """Return the headline: which arm won on each target at equal training tokens, and by how many nats per token.

    For a run without pruned models, return their final losses.

    Args:
        results: The arms.
        runs: The runs that they are the means of, whose gaps are paired by seed.
    """
    if results.parent is None:
        ends = [f"{arm.name} ended at {fixed(arm.validation_loss)} nats per token" for arm in results.arms]
        return f"Trained from random weights: {', '.join(ends)}."
    compared = [arm for arm in results.arms if results.scratch_of(arm) is not None]
    if not compared:
        return "No pruned model here has a counterpart trained from scratch."
    if len(compared) > _MANY:
        return _summary(compared, runs, results)
    verdicts = []
    for arm in compared:
        alone = sum(other in compared for other in results.targets[arm.target]) == 1
        verdicts.append(
            f"on {arm.target} {_verdict(_gap(results, arm, runs), 'pruning' if alone else f'“{arm.name}”')}"
        )
    return f"At equal training tokens, {', '.join(verdicts)}."


def _summary(compared: list[ArmResult], runs: SideBySide | None, results: Results) -> str:
    """Return the headline for more comparisons than a reader would read one by one."""
    gaps = [_gap(results, arm, runs) for arm in compared]
    finite = [estimate for estimate in gaps if estimate is not None and math.isfinite(estimate.mean)]
    ahead = [estimate.mean for estimate in finite if _winner(estimate) == 1]
    behind = [-estimate.mean for estimate in finite if _winner(estimate) == -1]
    parts = [f"pruning won {len(ahead)} of {len(compared)} comparisons{_range(ahead)}"]
    if behind:
        parts.append(f"training from scratch won {len(behind)}{_range(behind)}")
    if undecided := len(compared) - len(ahead) - len(behind):
        parts.append(
            f"{undecided} {'was' if undecided == 1 else 'were'} within the error of the seeds, or without a winner"
        )
    return f"At equal training tokens, {', '.join(parts)}."


def _range(leads: list[float]) -> str:
    return f" by {fixed(min(leads))} to {fixed(max(leads))} nats per token" if leads else ""


def _gap(results: Results, arm: ArmResult, runs: SideBySide | None) -> MeanEstimate | None:
    return gap(runs, arm) if runs else _alone(results.gap(arm))


def _winner(difference: MeanEstimate) -> int:
    """Return 1 for pruning and -1 for scratch; 0 if the interval over seeds contains zero, or the two are equal."""
    if difference.stderr is not None:
        return difference.sign
    return int(difference.mean > 0) - int(difference.mean < 0)


def _verdict(difference: MeanEstimate | None, pruned: str) -> str:
    if difference is None:
        return f"{pruned} was not compared with training from scratch"
    if not math.isfinite(difference.mean):
        return f"{pruned} or training from scratch diverged"
    lead = fixed(abs(difference.mean))
    if lead == "0.00":
        return f"{pruned} and training from scratch were equal to two decimals"
    ahead = pruned if difference.mean > 0 else "training from scratch"
    if not _winner(difference):
        return f"{ahead} was ahead by {lead} nats per token, within the error of {difference.count} seeds"
    return f"{ahead} won by {lead} nats per token"


def total_cost(results: Results) -> str:
    """Return a sentence on the total cost, with the parent charged as in the paper's second budget."""
    if results.parent is None:
        spent = [(arm.name, arm.ledger.total) for arm in results.arms]
        costs = [
            f"{fixed(total.tokens, 0)} tokens and {scientific(total.flops)} FLOPs ({name})" for name, total in spent
        ]
        return f"It took {', '.join(costs)}."
    ratios, numbers = [], []
    for arm in results.arms:
        if scratch := results.scratch_of(arm):
            pruned_flops, scratch_flops = arm.ledger.total.flops, scratch.ledger.total.flops
            ratio = pruned_flops / scratch_flops if pruned_flops and scratch_flops else None
            ratios.append(f"{_times(ratio)} ({arm.name})")
            numbers += [] if ratio is None else [ratio]
    if not ratios:
        return "No pruned model here has a counterpart to compare its cost with."
    if len(numbers) > _MANY:
        ratios = [f"{_times(min(numbers))} to {_times(max(numbers))}"]
    return (
        "Charged with all the work it builds on, the parent's pretraining included, a pruned model cost this many "
        f"times the FLOPs of its counterpart from scratch: {', '.join(ratios)}."
    )


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "unknown"
    return fixed(ratio) if ratio < 1000 else scientific(ratio)


def results_rows(results: Results, runs: SideBySide | None = None) -> ResultsTable:
    """Return the main table of the report, with formatted cells and units in the headings.

    Args:
        results: The arms.
        runs: The runs that they are the means of, for intervals and for the rows of missing arms.
    """
    parent = results.parent
    shapes = [*([parent.shape] if parent else []), *(arm.shape for arm in results.arms)]
    size = unit_of([shape.parameters for shape in shapes])
    tokens = unit_of([arm.ledger.training.tokens for arm in results.arms])
    unit, token_unit = (f" ({prefix})" if prefix else "" for _, prefix in (size, tokens))
    columns = [
        Column("", "Model", "Model", "Model"),
        Column(f"Parameters{unit}", "total", f"Parameters{unit}", f"params\n{unit.strip()}"),
        Column(f"Parameters{unit}", "removed (%)", "removed (%)", "removed\n(%)"),
        Column(f"Body parameters{unit}", "total", f"Body{unit}"),
        Column(f"Body parameters{unit}", "removed (%)", "body removed (%)"),
        Column("", "TP\u00a0×\u00a0PP", "TP × PP", "TP × PP\n(ranks)"),
        Column("Training", f"tokens{token_unit}", f"training tokens{token_unit}", f"tokens\n{token_unit.strip()}"),
        Column("Training", "FLOPs", "training FLOPs"),
        Column("", "FLOPs with ancestors", "FLOPs with ancestors"),
        Column("Validation (nats per token)", "loss", "validation loss (nats)", "loss\n(nats)"),
        Column("Validation (nats per token)", "gap", "gap (nats)", _GAP_HEADING),
        Column("Test perplexity", "before", "test PPL before", "PPL\nbefore"),
        Column("Test perplexity", "after", "test PPL after", "PPL\nafter"),
    ]
    if results.has_bits_per_byte:
        terminal = None if results.all_same_tokens else "bits\nper byte"
        columns += [
            Column("Test bits per byte", "before", "test bits per byte before"),
            Column("Test bits per byte", "after", "test bits per byte after", terminal),
        ]
    rows = [_arm_row(results, arm, size, tokens, runs) for arm in results.arms]
    dashes = [DASH] * (len(columns) - 1)
    missing = [[f"{target}, {start} (missing)", *dashes] for target, start in (runs.missing if runs else [])]
    if results.has_bits_per_byte:
        for row, arm in zip(rows, results.arms, strict=True):
            spread = _half_width(bits_per_byte_after(runs, arm)) if runs else None
            after = plus_minus(fixed(arm.test_bits_per_byte_after, 3), spread, 3)
            row += [fixed(arm.test_bits_per_byte_before, 3), after]
    of_parent = []
    if parent:
        bits = [DASH, fixed(parent.test_bits_per_byte, 3)] if results.has_bits_per_byte else []
        of_parent.append([*_parent_row(parent, size, runs), *bits])
    return ResultsTable(columns, [*of_parent, *rows, *missing])


def _parent_row(parent: ParentResult, size: tuple[float, str], runs: SideBySide | None) -> list[str]:
    return [
        f"{parent.label} (parent)",
        scaled(parent.shape.parameters, size),
        DASH,
        scaled(parent.shape.body_parameters, size),
        *[DASH] * 5,
        plus_minus(fixed(parent.validation_loss), _half_width(parent_loss(runs)) if runs else None),
        DASH,
        DASH,
        format_perplexity(parent.test_perplexity),
    ]


def _arm_row(
    results: Results, arm: ArmResult, size: tuple[float, str], tokens: tuple[float, str], runs: SideBySide | None
) -> list[str]:
    parent = results.parent
    total = arm.shape.parameters - arm.masked_parameters
    body = arm.shape.body_parameters - arm.masked_parameters
    sizes = [arm.parallel.get(dimension) for dimension in ("tensor", "pipeline")]
    return [
        arm.name,
        scaled(total, size),
        fixed(100 * (1 - total / parent.shape.parameters) if parent else None, 1),
        scaled(body, size),
        fixed(100 * (1 - body / parent.shape.body_parameters) if parent else None, 1),
        DASH if None in sizes else "\u00a0×\u00a0".join(map(str, sizes)),
        scaled(arm.ledger.training.tokens if arm.ledger.charges else None, tokens),
        scientific(arm.ledger.training.flops if arm.ledger.charges else None),
        scientific(arm.ledger.total.flops if arm.ledger.charges else None),
        plus_minus(fixed(arm.validation_loss), _half_width(final_loss(runs, arm)) if runs else None),
        gap_cell(gap(runs, arm) if runs else _alone(results.gap(arm))),
        format_perplexity(arm.test_perplexity_before),
        _perplexity_cell(arm, runs),
    ]


def _perplexity_cell(arm: ArmResult, runs: SideBySide | None) -> str:
    value, spread = arm.test_perplexity_after, _half_width(perplexity_after(runs, arm)) if runs else None
    return plus_minus(format_perplexity(value), spread, 2 if value is None or value < 1000 else 0)


def gap_cell(over_seeds: MeanEstimate | None, decimals: int = 2) -> str:
    """Format a gap with half of its 95 % interval; a dash if there is none."""
    return plus_minus(
        fixed(over_seeds.mean if over_seeds else None, decimals, signed=True), _half_width(over_seeds), decimals
    )


def _half_width(over_seeds: MeanEstimate | None) -> float | None:
    return over_seeds.half_width if over_seeds else None


def _alone(value: float | None) -> MeanEstimate | None:
    return None if value is None else MeanEstimate(value, 1)


def results_table(results: Results, runs: SideBySide | None = None, *, width: int) -> Table:
    """Return the results as a table for the terminal, without the cost columns, which the report has.

    It can be wider than the terminal, so print it with ``crop=False``.

    Args:
        results: The arms.
        runs: The runs that they are the means of; with several seeds the table has their intervals.
        width: Columns of the terminal, in which long names are folded.
    """
    rows = results_rows(results, runs)
    caption = [outcome(results, runs)]
    if runs is not None and runs.seeds > 1:
        caption.append(PLUS_MINUS)
    shown = [(index, column.terminal) for index, column in enumerate(rows.columns) if column.terminal is not None]
    table = Table(
        title=Text(results.title, "bold"),  # not a str, in which brackets could be markup
        caption=Text("\n".join(caption)),
        title_justify="left",
        caption_justify="left",
        caption_style="",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    lines = []
    for row in rows.rows:
        cells = [(heading, row[index].replace(NOT_FINITE, _NOT_FINITE)) for index, heading in shown]
        # There is room for one interval: that of the gap, which is the comparison.
        numbers = [cell if heading == _GAP_HEADING else cell.partition("\u00a0±")[0] for heading, cell in cells[1:]]
        lines.append([cells[0][1], *numbers])
    widths = []
    for place, (_, heading) in enumerate(shown):
        widths.append(max(len(text) for text in [*heading.split("\n"), *(line[place] for line in lines)]))
    # A name may be folded; a truncated number would be wrong, so a narrow terminal has to wrap the lines.
    room = width - sum(widths[1:]) - _BETWEEN_COLUMNS * len(widths)
    widths[0] = max(_LEAST_NAME, min(widths[0], room))
    table.width = sum(widths) + _BETWEEN_COLUMNS * len(widths)  # else rich makes it as narrow as the terminal
    for (_, heading), needed in zip(shown, widths, strict=True):
        table.add_column(heading, justify="right" if table.columns else "left", overflow="fold", width=needed)
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def markdown_table(results: Results, runs: SideBySide | None = None) -> str:
    """Return the results table in GitHub's Markdown."""
    rows = results_rows(results, runs)
    return markdown_rows([column.plain for column in rows.columns], rows.rows)


def markdown_rows(headings: list[str], rows: list[list[str]]) -> str:
    """Return a table in GitHub's Markdown, with all but the first column right-aligned."""
    ruler = ["-", *["-:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(map(_escape_bars, cells))} |" for cells in [headings, ruler, *rows]) + "\n"


def _escape_bars(cell: str) -> str:
    return cell.replace("|", "\\|")
