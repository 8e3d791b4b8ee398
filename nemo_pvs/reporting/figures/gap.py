"""Two figures of the gap between scratch and pruned: against training tokens, and against the share removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nemo_pvs.reporting.figures.theme import GRID, MARKERS, PRUNED, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed, unit_of
from nemo_pvs.reporting.published import PublishedCurve, published
from nemo_pvs.reporting.results import ArmResult, Results

_LABEL = "scratch minus pruned (nats per token)"
_LINES = ("solid", "dashed", "dashdot", "dotted")
_PUBLISHED_MARKERS = ("X", "*")


def gap_curve(results: Results, arm: ArmResult) -> list[tuple[int, float]]:
    """Return training tokens and the gap (nats per token) wherever both losses were measured and are finite."""
    scratch = results.scratch_of(arm)
    if scratch is None:
        return []
    scratch_losses = {point.tokens: point.loss for point in scratch.validation}
    pruned_losses = {point.tokens: point.loss for point in arm.validation}
    curve = []
    for tokens, loss in sorted(pruned_losses.items()):
        if tokens and tokens in scratch_losses:
            gap = scratch_losses[tokens] - loss
            if math.isfinite(gap):
                curve.append((tokens, gap))
    return curve


def removed_share(results: Results, arm: ArmResult) -> float | None:
    """Return the share of the parent's parameters that an arm lacks, counting masked weights as removed.

    None if there is no parent.
    """
    if results.parent is None:
        return None
    return 1 - (arm.shape.parameters - arm.masked_parameters) / results.parent.shape.parameters


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


def gap_against_tokens(results: Results, *, reference: bool = False) -> str:
    """Draw the gap of every pruned arm against its training tokens; empty if there is none.

    Args:
        results: The arms.
        reference: Also draw the paper's points, on a logarithmic axis of tokens.
    """
    curves = {arm.name: gap_curve(results, arm) for arm in results.arms}
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return ""
    paper = published_gaps() if reference else {}
    tokens_seen: list[float | int | None] = [tokens for curve in curves.values() for tokens, _ in curve]
    tokens_seen += [tokens for points in paper.values() for tokens, *_ in points]
    divisor, unit = (1.0, "") if reference else unit_of(tokens_seen)

    def draw(axes: Axes) -> None:
        for index, (name, curve) in enumerate(curves.items()):
            axes.plot(
                [tokens / divisor for tokens, _ in curve],
                [gap for _, gap in curve],
                color=PRUNED[index % len(PRUNED)],
                linestyle=_LINES[index % len(_LINES)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                label=name,
            )
        for index, (name, points) in enumerate(paper.items()):
            axes.plot(
                [tokens / divisor for tokens, *_ in points],
                [gap for _, gap, _ in points],
                color=TEXT,
                linestyle="dotted",
                marker=_PUBLISHED_MARKERS[index % 2],
                linewidth=1,
                label=name,
            )
        if reference:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(f"training tokens ({unit})" if unit else "training tokens")
        axes.set_title("gap against tokens", loc="left", fontweight="bold")

    last_gaps = {name: curve[-1][1] for name, curve in curves.items()}
    return _figure("tokens", "Gap against training tokens, at the end", last_gaps, draw)


def gap_against_ratio(results: Results, deviations: Mapping[str, float | None], *, reference: bool = False) -> str:
    """Draw the last gap of every pruned arm against the share of the parent's parameters that was removed.

    Args:
        results: The arms.
        deviations: Standard deviation over seeds by arm; None for a single run.
        reference: Also draw the paper's points.
    """
    points = {}
    for arm in results.arms:
        share, gap = removed_share(results, arm), results.gap(arm)
        if share is not None and gap is not None and math.isfinite(gap):
            points[arm.name] = (100 * share, gap)
    if not points:
        return ""

    def draw(axes: Axes) -> None:
        for index, (name, (share, gap)) in enumerate(points.items()):
            axes.errorbar(
                [share],
                [gap],
                deviations.get(name),
                color=PRUNED[index % len(PRUNED)],
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                markersize=7,
                capsize=4,
                label=name,
            )
        for index, (name, curve) in enumerate(published_gaps().items() if reference else ()):
            axes.plot(
                [100 * share for _, _, share in curve],
                [gap for _, gap, _ in curve],
                color=TEXT,
                linestyle="none",
                marker=_PUBLISHED_MARKERS[index % 2],
                label=f"{name}, 10B to 500B",
            )
        axes.set_xlabel("parameters removed (%)")
        axes.set_title("gap against what was removed", loc="left", fontweight="bold")

    gaps = {name: gap for name, (_, gap) in points.items()}
    return _figure("ratio", "Gap against the share of parameters removed", gaps, draw)


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
        axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=TEXT, handlelength=3)
        values = ", ".join(f"{name} {fixed(gap, signed=True)}" for name, gap in gaps.items())
        return to_svg(figure, f"{description}: {values} nats per token.", prefix=prefix)
