"""Bars of the gap on equal training and equal total tokens by granularity (cf. Figure 1 right of arXiv 2606.14150)."""

from __future__ import annotations

import math
from itertools import groupby

import matplotlib as mpl
from matplotlib.figure import Figure

from nemo_pvs.reporting.compare.estimates import EQUAL_TOTAL, EQUAL_TRAINING, gap
from nemo_pvs.reporting.compare.removed import GRANULARITIES, granularity
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.figures.theme import GRID, PRUNED, SCRATCH, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import MeanEstimate

_WIDTH = 0.36
_SIDES = ((EQUAL_TRAINING, -1, PRUNED[0], ""), (EQUAL_TOTAL, 1, SCRATCH, "///"))


def compared_arms(runs: SideBySide) -> list[ArmResult]:
    """Return one pruned arm per target, from coarse to fine granularity, of targets with a gap at equal total tokens.

    It is the one with the most training tokens among those that have this gap.
    """
    arms = []
    for members in runs.results.targets.values():
        of_total = [arm for arm in members if _finite(gap(runs, arm, EQUAL_TOTAL))]
        if of_total:
            arms.append(max(of_total, key=lambda arm: arm.ledger.training.tokens or 0))
    return sorted(arms, key=lambda arm: _rank(runs, arm))


def terms_figure(runs: SideBySide) -> str:
    """Draw the gaps of ``compared_arms`` as pairs of bars with 95 % intervals over seeds.

    Returns:
        An ``<svg>`` element; empty if no arm was compared at equal total tokens.
    """
    arms = compared_arms(runs)
    if not arms:
        return ""
    groups = [(kind, list(members)) for kind, members in groupby(arms, lambda arm: granularity(runs, arm) or "dense")]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(5.4, 1.6 + 0.95 * len(arms) + 0.4 * len(groups)), 4.2), layout="constrained")
        axes = figure.subplots()
        ticks, names, words, position = [], [], [], 0.0
        for kind, members in groups:
            first = position
            for arm in members:
                for setting, side, colour, hatch in _SIDES:
                    over_seeds = gap(runs, arm, setting)
                    if over_seeds is None or not _finite(over_seeds):
                        continue
                    axes.bar(
                        position + side * _WIDTH / 2,
                        over_seeds.mean,
                        _WIDTH,
                        yerr=over_seeds.half_width,
                        facecolor=colour if side < 0 else "none",
                        edgecolor=colour,
                        ecolor=TEXT,
                        hatch=hatch,
                        capsize=4,
                    )
                    words.append(f"{arm.name}, {setting.replace('-', ' ')} {fixed(over_seeds.mean, signed=True)}")
                ticks.append(position)
                names.append(arm.target)
                position += 1
            axes.annotate(
                kind,
                ((first + position - 1) / 2, 1),
                (0, 3),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="center",
                fontweight="bold",
            )
            position += 0.4
        for _, side, colour, hatch in _SIDES:
            label = "equal training tokens" if side < 0 else "equal total tokens"
            axes.bar(0, 0, 0, facecolor=colour if side < 0 else "none", edgecolor=colour, hatch=hatch, label=label)
        axes.set_xticks(ticks, names, rotation=30 if len(arms) > 4 else 0, ha="right" if len(arms) > 4 else "center")
        axes.axhline(0, color=TEXT, linewidth=0.8)
        axes.margins(y=0.2)
        axes.set_ylabel("scratch minus pruned (nats per token)")
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=TEXT)
        return to_svg(figure, f"Gap by granularity: {'; '.join(words)} nats per token.", prefix="terms")


def _rank(runs: SideBySide, arm: ArmResult) -> int:
    kind = granularity(runs, arm)
    return GRANULARITIES.index(kind) if kind else len(GRANULARITIES)


def _finite(over_seeds: MeanEstimate | None) -> bool:
    return over_seeds is not None and math.isfinite(over_seeds.mean)
