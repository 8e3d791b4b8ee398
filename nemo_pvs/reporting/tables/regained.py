"""What pruned models regain of their parent, as rows for the page and the Markdown file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nemo_pvs.reporting.compare.regained import VALIDATION_LOSS, Regained
from nemo_pvs.reporting.compare.scores import metric_of
from nemo_pvs.reporting.numbers import DASH, fixed, scaled, unit_of

REGAINED_TITLE = "What comes back"
REGAINED_NOTES = [
    "In brackets relative to the parent, where 1 is as good: shares that are better when higher are divided by the "
    "parent's; for repeated 4-grams, the share of new ones is divided; for losses and KL it is "
    "exp(parent − model), the ratio of the probabilities that both give to a token.",
    "Agreement: how much of the parent's greedy continuation is reproduced before the first difference. KL: from the "
    "parent's predictions, in nats per token, by the number of tokens read. Both measure likeness, not quality.",
    f"{DASH}: not measured there.",
]
_WORDS = {
    "repetition": "repeated 4-grams",
    "distinct_1": "distinct tokens",
    "distinct_2": "distinct bigrams",
    "agreement": "agreement with the parent",
    "kl": "KL to the parent",
}


def regained_headings(rows: Sequence[Regained]) -> list[str]:
    """Return the headings: the tokens at which models were evaluated."""
    unit = unit_of(list(_tokens(rows)))
    along = [f"{scaled(tokens, unit)}{unit[1]} tokens" if tokens else "before training" for tokens in _tokens(rows)]
    return ["Pruned model", "measure", "parent", *along]


def regained_cells(rows: Sequence[Regained]) -> list[list[str]]:
    """Return a row for each arm and measure: the parent's value, and the model's after each number of tokens."""
    cells = []
    for row in rows:
        values = dict(row.points)
        along = [_cell(row, values.get(tokens)) for tokens in _tokens(rows)]
        cells.append([row.arm, name_of(row), _value(row, row.parent), *along])
    return cells


def name_of(row: Regained) -> str:
    """Return a measure's name for people."""
    metric, task = metric_of(row.measure), row.measure.rpartition("/")[0]
    if row.measure == VALIDATION_LOSS:
        return VALIDATION_LOSS
    if position := re.fullmatch(r"kl_(\d+)_(\d+)", metric):
        return f"KL after {position[1]}–{position[2]} tokens"
    if metric in _WORDS:
        return _WORDS[metric]
    return task.removesuffix("/0-shot")


def _tokens(rows: Sequence[Regained]) -> list[int]:
    """Return the numbers of tokens at which scores were taken; losses were measured at more."""
    of_scores = [row for row in rows if row.measure != VALIDATION_LOSS] or rows
    return sorted({tokens for row in of_scores for tokens, _ in row.points})


def _cell(row: Regained, value: float | None) -> str:
    if value is None:
        return DASH
    return f"{_value(row, value)} ({fixed(row.share(value), 2)})"


def _value(row: Regained, value: float) -> str:
    return fixed(value, 3) if row.unit == "nats" else f"{fixed(100 * value, 1)} %"
