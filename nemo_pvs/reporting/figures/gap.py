"""Two figures of the gap between scratch and pruned: against training tokens, and against the share removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nemo_pvs.reporting.compare.estimates import gap, gap_curve
from nemo_pvs.reporting.compare.removed import GRANULARITIES, granularity, removed_share
from nemo_pvs.reporting.compare.runs import SideBySide
from nemo_pvs.reporting.figures.theme import GRID, MARKERS, PRUNED, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed, unit_of
from nemo_pvs.reporting.published import PublishedCurve, published
from nemo_pvs.reporting.results import ArmResult
from nemo_pvs.reporting.statistics import MeanEstimate

_LABEL = "scratch minus pruned (nats per token)"
_LINES = ("solid", "dashed", "dashdot", "dotted")
_PUBLISHED_MARKERS = ("X", "*")
_FITTING = 4
"""Entries of a legend that fit next to the points; more are put below the axes."""
_WIDE = 8
"""Tokens that differ by more than this factor have a logarithmic axis."""


def gap_series(runs: SideBySide) -> dict[str, list[tuple[int, MeanEstimate]]]:
    """Return training tokens and gaps to draw as one line each.

    A target with arms of several budgets has one line with the end of each, as in Figure 1 of arXiv 2606.14150: points
    along a training have a learning rate that has not decayed. Any other arm has a line along its training.
    """
    lines: dict[str, list[tuple[int, MeanEstimate]]] = {}
    for target, arms in runs.results.targets.items():
        curves = {arm.name: gap_curve(runs, arm) for arm in arms if arm.initialisation == "pruned"}
        curves = {name: curve for name, curve in curves.items() if curve}
        if len({curve[-1][0] for curve in curves.values()}) > 1:
            lines[target] = sorted((curve[-1] for curve in curves.values()), key=lambda point: point[0])
        else:
            lines |= curves
    return lines


def published_gaps() -> dict[str, list[tuple[int, float, float]]]:
    """Return the paper's gaps by method: training tokens, nats per token, and the share removed."""
    paper = published()

    def curves_from(initialisation: str) -> dict[str, PublishedCurve]:
        return {curve.method: curve for curve in paper.curves if curve.initialisation == initialisation}

    scratch = curves_from("random")
    gaps: dict[str, list[tuple[int, float, float]]] = {}
    for method, curve in curves_from("pruned").items():
        removed = 1 - curve.parameters / paper.parent_parameters
        points = gaps.setdefault(f"{method} ({curve.source.split(',')[0]})", [])
        for point, other in zip(curve.points, scratch[method].points, strict=True):
            points.append((point.tokens, other.loss - point.loss, removed))
    return gaps


def gap_against_tokens(runs: SideBySide, *, reference: bool = False) -> list[str]:
    """Draw the gap against training tokens, with 95 % intervals over seeds; empty if there is none.

    Args:
        runs: The runs.
        reference: Also draw the paper's points, on a logarithmic axis of tokens.

    Returns:
        One ``<svg>`` element, or one for each granularity if there are more lines than colours.
    """
    lines = gap_series(runs)
    if not lines:
        return []
    kinds: dict[str, dict[str, list[tuple[int, MeanEstimate]]]] = {}
    if len(lines) <= len(PRUNED):
        kinds[""] = lines
    else:
        for name, line in lines.items():
            arm = next(arm for arm in runs.results.arms if name in (arm.name, arm.target))
            kinds.setdefault(granularity(runs, arm) or "nothing removed", {})[name] = line
    paper = published_gaps() if reference else {}
    tokens_seen = [tokens for line in lines.values() for tokens, _ in line]
    tokens_seen += [tokens for points in paper.values() for tokens, *_ in points]
    bounds: list[float] = []
    for line in lines.values():
        for _, over_seeds in line:
            bounds += _bounds(over_seeds)
    figures = []
    for index, kind in enumerate(sorted(kinds, key=lambda kind: [*GRANULARITIES, kind].index(kind))):
        published = {name: points for name, points in paper.items() if not kind or kind in name}
        drawn = _TokensFigure(kinds[kind], published, tokens_seen, kind, bounds if len(kinds) > 1 else [])
        figures.append(drawn.svg(f"tokens-{index}" if index else "tokens"))
    return figures


@dataclass(frozen=True)
class _TokensFigure:
    lines: Mapping[str, list[tuple[int, MeanEstimate]]]
    published: Mapping[str, list[tuple[int, float, float]]]
    tokens: list[int]
    """The tokens of all panels, for one axis."""
    granularity: str
    bounds: list[float]
    """Gaps of all panels, for one axis; empty for the panel's own."""

    def svg(self, prefix: str) -> str:
        ends = {name: line[-1][1].mean for name, line in self.lines.items()}
        title = f"Gap against training tokens{f', {self.granularity}' if self.granularity else ''}, at the end"
        return _figure(prefix, title, ends, self._draw)

    def _draw(self, axes: Axes) -> None:
        logarithmic = max(self.tokens) > _WIDE * min(self.tokens)
        divisor, unit = (1.0, "") if logarithmic else unit_of(list(self.tokens))
        for index, (name, line) in enumerate(self.lines.items()):
            axes.errorbar(
                [tokens / divisor for tokens, _ in line],
                [over_seeds.mean for _, over_seeds in line],
                _bars([over_seeds for _, over_seeds in line]),
                color=PRUNED[index % len(PRUNED)],
                linestyle=_LINES[index % len(_LINES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                elinewidth=1.2,
                capsize=4,
                label=name,
            )
        for index, (name, points) in enumerate(self.published.items()):
            axes.plot(
                [tokens / divisor for tokens, *_ in points],
                [value for _, value, _ in points],
                color=TEXT,
                linestyle="dotted",
                marker=_PUBLISHED_MARKERS[index % 2],
                linewidth=1,
                label=name,
            )
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
            axes.xaxis.set_minor_locator(NullLocator())
        if self.bounds:
            axes.set_xlim(min(self.tokens) / divisor / 1.3, max(self.tokens) / divisor * 1.3)
            axes.update_datalim([(min(self.tokens) / divisor, value) for value in self.bounds])
        axes.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
        title = f"gap against tokens{f': {self.granularity}' if self.granularity else ''}"
        axes.set_title(title, loc="left", fontweight="bold")


def gap_against_ratio(runs: SideBySide, *, reference: bool = False) -> str:
    """Draw the last gap of every pruned arm against the share of the parent's parameters that was removed.

    Of a target with several budgets it is the arm with the most tokens. Bars are 95 % intervals over seeds.

    Args:
        runs: The runs.
        reference: Also draw the paper's points.
    """
    points = {}
    for arm in longest_arms(runs):
        share, over_seeds = removed_share(runs.results, arm), gap(runs, arm)
        if share is not None and over_seeds is not None and math.isfinite(over_seeds.mean):
            points[arm.name] = (100 * share, over_seeds)
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        for index, (name, (share, over_seeds)) in enumerate(points.items()):
            axes.errorbar(
                [share],
                [over_seeds.mean],
                _bars([over_seeds]),
                color=PRUNED[index % len(PRUNED)],
                linestyle="none",
                marker=MARKERS[(index + index // len(PRUNED)) % len(MARKERS)],
                markersize=7,
                capsize=4,
                label=name,
            )
        for index, (name, curve) in enumerate(published_gaps().items() if reference else ()):
            axes.plot(
                [100 * share for _, _, share in curve],
                [value for _, value, _ in curve],
                color=TEXT,
                linestyle="none",
                marker=_PUBLISHED_MARKERS[index % 2],
                label=f"{name}, 10B to 500B",
            )
        axes.set_xlabel("parameters removed (%)")
        axes.set_title("gap against what was removed", loc="left", fontweight="bold")

    ends = {name: over_seeds.mean for name, (_, over_seeds) in points.items()}
    return _figure("ratio", "Gap against the share of parameters removed", ends, draw)


def longest_arms(runs: SideBySide) -> list[ArmResult]:
    """Return the pruned arms that have a counterpart, of each target those with the most training tokens."""
    longest = []
    for arms in runs.results.targets.values():
        with_gap = [arm for arm in arms if gap(runs, arm) is not None]
        most = max((arm.ledger.training.tokens or 0 for arm in with_gap), default=0)
        longest += [arm for arm in with_gap if (arm.ledger.training.tokens or 0) == most]
    return longest


def _bars(line: list[MeanEstimate]) -> list[float] | None:
    """Return half of each 95 % interval; None if there is none."""
    widths = [over_seeds.half_width for over_seeds in line]
    return None if all(width is None for width in widths) else [width or 0.0 for width in widths]


def _bounds(over_seeds: MeanEstimate) -> tuple[float, float]:
    half = over_seeds.half_width or 0.0
    return over_seeds.mean - half, over_seeds.mean + half


def _short(tokens: float) -> str:
    """Format a count of tokens: 10M for 10,000,000."""
    divisor, unit = unit_of([tokens])
    return f"{tokens / divisor:g}{unit}"


def _figure(prefix: str, description: str, gaps: dict[str, float], draw: Callable[[Axes], None]) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.9), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.axhline(0, color=TEXT, linewidth=0.8)
        axes.margins(y=0.25)
        axes.set_ylabel(_LABEL)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        entries = len(axes.get_legend_handles_labels()[1])
        style = {"frameon": False, "fontsize": 9, "labelcolor": TEXT, "handlelength": 3}
        if entries > _FITTING:
            figure.set_figheight(figure.get_figheight() + 0.2 * entries)
            figure.legend(loc="outside lower left", **style)
        else:
            axes.legend(loc="best", **style)
        values = ", ".join(f"{name} {fixed(gap, signed=True)}" for name, gap in gaps.items())
        return to_svg(figure, f"{description}: {values} nats per token.", prefix=prefix)
