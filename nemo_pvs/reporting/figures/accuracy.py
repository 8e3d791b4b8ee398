"""Average accuracy of pruned and scratch as pairs of bars with S − P (as in Figure 1 right of arXiv 2606.14150)."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from nemo_pvs.reporting.compare.tasks import TaskRow
from nemo_pvs.reporting.figures.theme import GRID, PRUNED, SCRATCH, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed

_WIDTH = 0.36


def accuracy_figure(rows: Sequence[TaskRow]) -> str:
    """Draw the averages as bars with their standard errors, scratch hatched.

    Args:
        rows: Rows that ``compare.tasks.averages`` returned.

    Returns:
        An ``<svg>`` element; empty if there are no rows.
    """
    if not rows:
        return ""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(4.0, 1.3 + 1.5 * len(rows)), 3.9), layout="constrained")
        axes = figure.subplots()
        top = 0.0
        for position, row in enumerate(rows):
            assert row.pruned is not None
            assert row.scratch is not None
            assert row.difference is not None
            sides = ((row.pruned, -1, PRUNED[0], ""), (row.scratch, 1, SCRATCH, "///"))
            for score, side, colour, hatch in sides:
                axes.bar(
                    position + side * _WIDTH / 2,
                    100 * score.value,
                    _WIDTH,
                    yerr=None if score.stderr is None else 100 * score.stderr,
                    facecolor=colour if side < 0 else "none",
                    edgecolor=colour,
                    ecolor=TEXT,
                    hatch=hatch,
                    capsize=4,
                    label=("pruned" if side < 0 else "random weights") if position == 0 else None,
                )
            height = 100 * max(score.value + (score.stderr or 0) for score in (row.pruned, row.scratch))
            top = max(top, height)
            axes.annotate(
                f"S − P {fixed(100 * row.difference, 1, signed=True)}",
                (position, height),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        parent = rows[0].parent
        if parent is not None:
            axes.axhline(100 * parent.value, color=TEXT, linestyle="dotted", linewidth=1.2)
            axes.annotate(
                f"parent {fixed(100 * parent.value, 1)}",
                (-0.5, 100 * parent.value),
                (2, 3),
                textcoords="offset points",
                fontsize=9,
            )
            top = max(top, 100 * parent.value)
        axes.set_xticks(range(len(rows)), [row.pruned_name for row in rows], wrap=True)
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_ylim(0, 1.3 * top or 1)
        axes.set_ylabel(f"accuracy, {rows[0].task} (%)")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=9, labelcolor=TEXT)
        values = "; ".join(f"{row.pruned_name}: {fixed(100 * (row.difference or 0), 1, signed=True)}" for row in rows)
        return to_svg(figure, f"Average accuracy, scratch minus pruned in points: {values}.", prefix="accuracy")
