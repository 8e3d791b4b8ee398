"""The gap between scratch and pruned, in two figures: against training tokens, and against what was removed."""

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
    """Return training tokens and the gap, in nats per token, wherever both were measured and are finite numbers."""
    scratch = results.scratch_of(arm)
    if scratch is None:
        return []
    losses = {point.tokens: point.loss for point in scratch.validation}
    ours = {point.tokens: point.loss for point in arm.validation}
    gaps = ((tokens, losses[tokens] - loss) for tokens, loss in sorted(ours.items()) if tokens and tokens in losses)
    return [(tokens, gap) for tokens, gap in gaps if math.isfinite(gap)]


def removed_share(results: Results, arm: ArmResult) -> float | None:
    """Return the share of the parent's parameters that an arm does not have; masked weights do not count as had.

    None where there is no parent.
    """
    if results.parent is None:
        return None
    return 1 - (arm.shape.parameters - arm.masked_parameters) / results.parent.shape.parameters


def published_gaps() -> dict[str, list[tuple[int, float, float]]]:
    """Return the paper's gaps by method: training tokens, nats per token, and the share that was removed."""
    paper = published()

    def of(start: str) -> dict[str, PublishedCurve]:
        return {curve.method: curve for curve in paper.curves if curve.initialisation == start}

    scratch = of("random")
    return {
        f"{method} ({curve.source.split(',')[0]})": [
            (point.tokens, other.loss - point.loss, 1 - curve.parameters / paper.parent_parameters)
            for point, other in zip(curve.points, scratch[method].points, strict=True)
        ]
        for method, curve in of("pruned").items()
    }


def gap_against_tokens(results: Results, *, reference: bool = False) -> str:
    """Draw the gap of every pruned arm against its training tokens; empty if there is none.

    Args:
        results: the arms.
        reference: draw the paper's points too; the axis of tokens is logarithmic then.
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

    spoken = {name: curve[-1][1] for name, curve in curves.items()}
    return _figure("tokens", "Gap against training tokens, at the end", spoken, draw)


def gap_against_ratio(results: Results, deviations: Mapping[str, float | None], *, reference: bool = False) -> str:
    """Draw the last gap of every pruned arm against the share of the parent's parameters that was removed.

    Args:
        results: the arms.
        deviations: standard deviation over seeds by arm; None for a single run.
        reference: draw the paper's points too.
    """
    found = ((arm.name, removed_share(results, arm), results.gap(arm)) for arm in results.arms)
    points = {
        name: (100 * share, gap)
        for name, share, gap in found
        if share is not None and gap is not None and math.isfinite(gap)
    }
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

    spoken = {name: gap for name, (_, gap) in points.items()}
    return _figure("ratio", "Gap against the share of parameters removed", spoken, draw)


def _short(tokens: float) -> str:
    """Return 10M for 10,000,000."""
    divisor, unit = unit_of([tokens])
    return f"{tokens / divisor:g}{unit}"


def _figure(prefix: str, what: str, spoken: dict[str, float], draw: Callable[[Axes], None]) -> str:
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
        said = ", ".join(f"{name} {fixed(gap, signed=True)}" for name, gap in spoken.items())
        return to_svg(figure, f"{what}: {said} nats per token.", prefix=prefix)
