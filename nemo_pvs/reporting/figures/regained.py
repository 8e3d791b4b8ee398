"""What comes back: every measure of a pruned model relative to its parent's, against training tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_pvs.reporting.compare.regained import VALIDATION_LOSS, Regained
from nemo_pvs.reporting.compare.scores import metric_of
from nemo_pvs.reporting.compare.tasks import ACCURACIES
from nemo_pvs.reporting.figures.theme import GRID, PRUNED, SCRATCH, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed, unit_of
from nemo_pvs.reporting.tables.regained import name_of

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
_LABEL = 0.062
"""Least distance between two labels, as a share of the axis."""
_NAMES = {VALIDATION_LOSS: "likelihood", "repetition": "new 4-grams"}
"""What is drawn where higher is better in the figure and lower in the table."""
_TOP = 1.5
"""The top of the axis where shares are larger; these are drawn there, with their value."""


class _End(NamedTuple):
    """The end of a line."""

    name: str
    tokens: float
    """In the unit of the axis."""
    share: float
    colour: str

    @property
    def height(self) -> float:
        """Where the line ends."""
        return min(self.share, _TOP)

    @property
    def label(self) -> str:
        """The name, with the share where it is not drawn to scale."""
        return self.name if self.share <= _TOP else f"{self.name} ({fixed(self.share)})"


def regained_panels(rows: Sequence[Regained]) -> list[str]:
    """Draw a panel for each arm: lines by measure, labelled at their ends, and the parent as a dotted line at 1.

    Args:
        rows: What ``compare.regained`` returned.

    Returns:
        ``<svg>`` elements; empty if there are no rows.
    """
    panels = []
    for index, (arm, measures) in enumerate(groupby(rows, lambda row: row.arm)):
        panels.append(_panel(arm, _drawn(list(measures)), f"regained-{index}"))
    return panels


def _drawn(rows: list[Regained]) -> list[Regained]:
    """Return the measures to draw: of the divergences only those at the first and the last positions."""
    by_position = [row for row in rows if metric_of(row.measure).startswith("kl_")]
    left_out = by_position[1:-1] + [row for row in rows if metric_of(row.measure) == "kl" and by_position]
    return [row for row in rows if row not in left_out]


def _panel(arm: str, rows: list[Regained], prefix: str) -> str:
    divisor, unit = unit_of([tokens for row in rows for tokens, _ in row.points])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 4.2), layout="constrained")
        axes = figure.subplots()
        ends, last, highest = [], 1.0, 1.0
        for row, marker in zip(rows, _MARKERS * len(rows), strict=False):
            shares = [(tokens / divisor, row.share(value)) for tokens, value in row.points]
            points = [(x, y) for x, y in shares if y is not None and math.isfinite(y)]
            if not points:
                continue
            axes.plot(
                [x for x, _ in points],
                [min(y, _TOP) for _, y in points],
                color=_colour(row),
                marker=marker,
                markersize=5,
                linewidth=1.6,
            )
            name = _NAMES.get(metric_of(row.measure)) or name_of(row)
            ends.append(_End(name, *points[-1], _colour(row)))
            last = max(last, points[-1][0])
            highest = max(highest, *(min(y, _TOP) for _, y in points))
        axes.axhline(1, color=TEXT, linestyle="dotted", linewidth=1.2)
        axes.annotate("parent", (0, 1), (2, 3), textcoords="offset points", fontsize=9)
        top = highest + 0.1
        axes.set_ylim(0, top)
        axes.set_xlim(-0.02 * last, 1.75 * last)
        _label(axes, ends, last, top)
        axes.set_xticks([tick for tick in MaxNLocator(4).tick_values(0, last) if tick <= last])
        axes.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
        axes.set_ylabel("relative to the parent (1 is as good)")
        axes.set_title(arm, loc="left", fontweight="bold")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        words = "; ".join(f"{end.name} {fixed(end.share)}" for end in ends)
        return to_svg(figure, f"{arm}, relative to the parent after training: {words}.", prefix=prefix)


def _colour(row: Regained) -> str:
    """Return one colour each for predictions, choices among answers, written answers and free text."""
    metric = metric_of(row.measure)
    if row.measure == VALIDATION_LOSS or metric.startswith("kl"):
        return PRUNED[0]
    if metric in ACCURACIES:
        return PRUNED[1]
    return PRUNED[2] if metric.startswith(("repetition", "distinct", "agreement")) else SCRATCH


def _label(axes: Axes, ends: Sequence[_End], last: float, top: float) -> None:
    """Name the lines to the right of their ends, moved up or down where labels would overlap."""
    least = _LABEL * top
    places: list[float] = []
    ordered = sorted(ends, key=lambda end: end.height)
    for end in ordered:
        places.append(max(end.height, places[-1] + least) if places else max(end.height, least / 2))
    limit = top - least / 2
    for index in range(len(places) - 1, -1, -1):  # down again where they go past the top
        places[index] = min(places[index], limit)
        limit = places[index] - least
    for end, place in zip(ordered, places, strict=True):
        axes.annotate(
            end.label,
            (end.tokens, end.height),
            (1.08 * last, place),
            textcoords="data",
            va="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": end.colour, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4},
        )
