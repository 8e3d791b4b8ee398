"""The table of methods, shares removed and budgets, as in Table 2 of arXiv 2606.14150."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.reporting.compare.budgets import ACCURACY, LOSS, BudgetRow
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.numbers import DASH, and_list, fixed, scaled, unit_of
from nemo_pvs.reporting.tables.results import gap_cell

BUDGET_HEADINGS = [
    "Method",
    "target",
    "granularity",
    "removed (%)",
    "training tokens",
    "quantity",
    "scratch, equal training tokens",
    "pruned",
    "scratch, equal total tokens",
    "pruning ahead by, equal training tokens",
    "pruning ahead by, equal total tokens",
]
_PAPER = "paper"
_AHEAD = "Ahead: positive where pruning is better; losses and perplexities are better if lower, accuracies if higher."
_PUBLISHED_NOTE = (
    f"Rows of the {_PAPER} (arXiv 2606.14150) are single runs with another parent and other data, without intervals; "
    "the share removed is its nominal ratio."
)
_AS_PUBLISHED_NOTE = (
    "Equal total tokens are counted as the paper counts them, without calibration, search and mask learning, for: "
    "{arms}."
)


def budget_cells(rows: Sequence[BudgetRow]) -> list[list[str]]:
    """Return the formatted cells of ``compare.budgets.budget_rows``."""
    cells = []
    for row in rows:
        decimals = 1 if row.quantity == ACCURACY else 3 if row.quantity == LOSS and row.target else 2
        cells.append(
            [
                row.method,
                row.target or _PAPER,
                row.granularity or DASH,
                fixed(None if row.removed is None else 100 * row.removed, 1),
                DASH if row.tokens is None else scaled(row.tokens, unit := unit_of([row.tokens])) + unit[1],
                row.quantity,
                fixed(row.scratch, decimals),
                fixed(row.pruned, decimals),
                fixed(row.scratch_of_total, decimals),
                gap_cell(row.gap, decimals),
                gap_cell(row.gap_of_total, decimals),
            ]
        )
    return cells


def budget_notes(runs: SideBySide, rows: Sequence[BudgetRow]) -> list[str]:
    """Return the notes below the table of ``rows``."""
    notes = [_AHEAD]
    counted = [arm.name for arm in runs.results.arms if runs.results.leaves_out_calibration(arm)]
    if counted:
        notes.append(_AS_PUBLISHED_NOTE.format(arms=and_list(counted)))
    if any(row.target is None for row in rows):
        notes.append(_PUBLISHED_NOTE)
    return notes
