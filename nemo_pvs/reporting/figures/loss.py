"""The main figure of the report: validation loss against training tokens, as SVG in the colours of its page."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_pvs.recipe.target import DENSE
from nemo_pvs.reporting.figures.theme import GRID, MARKERS, PRUNED, SCRATCH, STYLE, TEXT, to_svg
from nemo_pvs.reporting.numbers import fixed, unit_of
from nemo_pvs.reporting.results import ArmResult, Point, Results

Deviations = Mapping[str, Mapping[int, float]]
"""Standard deviation of the validation loss over seeds, by arm and tokens."""
Missing = Collection[tuple[str, str]]
_SCRATCH_MARKERS = ("s", "v", "P")
_PANELS_PER_ROW = 2
# A random start has a loss of ln(vocabulary), which would make the differences at the end invisible. The axis covers
# losses after this share of the tokens; a higher initial loss is given in the legend.
_IGNORED_SHARE = 0.1


def loss_figure(results: Results, deviations: Deviations | None = None, missing: Missing | None = None) -> str:
    """Draw one panel per target: pruned solid, scratch dashed, parent dotted, the gap at the end in nats per token.

    Markers and dashes differ too, so that the figure is readable in black and white; bars are standard deviations.

    Args:
        results: The arms.
        deviations: Standard deviations of their losses over seeds.
        missing: Target and initial weights of the arms to label as missing; by default all absent ones.

    Returns:
        An ``<svg>`` element to insert into a page. Text has the page's colour, lines the CSS variables ``--series-1``,
        ``--series-2``, ``--series-3``, ``--series-scratch`` and ``--figure-grid`` if the page sets them. Empty if no
        validation loss was measured.
    """
    targets = _drawn(results)
    return _draw(results, targets, deviations or {}, missing, _PANELS_PER_ROW) if targets else ""


def loss_panels(results: Results, deviations: Deviations | None = None, missing: Missing | None = None) -> list[str]:
    """Return the panels of ``loss_figure`` as separate elements on one scale, for a page that arranges them itself."""
    panels = []
    for index, (name, arms) in enumerate(_drawn(results).items()):
        panels.append(_draw(results, {name: arms}, deviations or {}, missing, 1, prefix=f"loss-{index}"))
    return panels


def _drawn(results: Results) -> dict[str, list[ArmResult]]:
    return {name: arms for name, arms in results.targets.items() if any(_finite(arm.validation) for arm in arms)}


def _draw(
    results: Results,
    targets: dict[str, list[ArmResult]],
    deviations: Deviations,
    missing: Missing | None,
    most_columns: int,
    prefix: str = "",
) -> str:
    columns = min(len(targets), most_columns)
    rows = math.ceil(len(targets) / columns)
    unit = unit_of([point.tokens for arm in results.arms for point in arm.validation])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * columns, 3.9 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        low, high = _loss_range(results)
        for axes, (name, arms) in zip(panels, targets.items(), strict=False):
            _draw_panel(axes, results, arms, deviations, missing, unit, high)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_ylim(low, high)
        for axes in panels[len(targets) :]:
            axes.remove()
        for axes in figure.axes[::columns]:
            axes.set_ylabel("validation loss (nats per token)")
        return to_svg(figure, f"Validation loss against training tokens: {', '.join(targets)}.", prefix=prefix)


def standalone(figure: str) -> str:
    """Return the element of ``loss_figure`` as a standalone file, readable on light and dark pages."""
    style = "svg { color: #1d1f23; background: #ffffff; }"
    return figure.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(
        ">", f"><style>{style}</style>", 1
    )


def _finite(points: list[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.loss)]


def _parent_loss(results: Results) -> float | None:
    """Return the parent's validation loss if it was measured, is finite and is comparable with every arm's."""
    if not results.all_same_tokens:
        return None
    loss = results.parent.validation_loss if results.parent else None
    return loss if loss is not None and math.isfinite(loss) else None


def _loss_range(results: Results) -> tuple[float, float]:
    points = [point for arm in results.arms for point in _finite(arm.validation)]
    start = _IGNORED_SHARE * max(point.tokens for point in points)
    losses = [point.loss for point in points if point.tokens >= start]
    parent_loss = _parent_loss(results)
    if parent_loss is not None:
        losses.append(parent_loss)
    margin = 0.12 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin


def _draw_panel(
    axes: Axes,
    results: Results,
    arms: list[ArmResult],
    deviations: Deviations,
    missing: Missing | None,
    unit: tuple[float, str],
    top_of_axis: float,
) -> None:
    divisor, prefix = unit
    pruned = [arm for arm in arms if arm.initialisation == "pruned"]
    scratch = [arm for arm in arms if arm.initialisation == "random"]
    for arm in arms:
        points = _finite(arm.validation)
        label = arm.name
        if points and points[0].loss > top_of_axis:
            label += f" (starts at {fixed(points[0].loss)})"
        if len(points) < len(arm.validation):
            label += " (diverged)"
        kind, markers = (pruned, MARKERS) if arm in pruned else (scratch, _SCRATCH_MARKERS)
        rank = kind.index(arm)
        colour = PRUNED[rank % len(PRUNED)] if arm in pruned else SCRATCH
        tokens, losses = [point.tokens / divisor for point in points], [point.loss for point in points]
        axes.plot(
            tokens,
            losses,
            color=colour,
            linestyle="solid" if arm in pruned else "dashed",
            marker=markers[rank % len(markers)],
            markersize=5,
            linewidth=1.8,
            label=label,
        )
        if spread := deviations.get(arm.name):
            bars = [spread.get(point.tokens, 0.0) for point in points]
            axes.errorbar(tokens, losses, bars, fmt="none", ecolor=colour, elinewidth=1.2, capsize=4)
    if all(arm.method != DENSE for arm in arms):
        for kind, start in ((pruned, "pruned"), (scratch, "random")):
            if not kind and (missing is None or (arms[0].target, start) in missing):
                axes.plot([], [], " ", label=f"{arms[0].target}, {start}: missing")
    last = max(point.tokens for arm in arms for point in _finite(arm.validation)) / divisor or 1.0
    parent_loss = _parent_loss(results)
    if parent_loss is not None:
        axes.axhline(parent_loss, color=TEXT, linestyle="dotted", linewidth=1.2)
        axes.annotate(
            f"parent {fixed(parent_loss)}", (0, parent_loss), (2, -3), textcoords="offset points", va="top", fontsize=9
        )
    if pruned:
        _annotate_gap(axes, results, pruned[0], divisor, last)
    axes.set_xlim(-0.02 * last, 1.24 * last)
    axes.set_xlabel(f"training tokens ({prefix})" if prefix else "training tokens")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=TEXT, handlelength=3)


def _annotate_gap(axes: Axes, results: Results, arm: ArmResult, divisor: float, last: float) -> None:
    """Mark the gap between scratch and pruned at the last token count that both have."""
    gap, scratch = results.gap(arm), results.scratch_of(arm)
    if gap is None or scratch is None or not math.isfinite(gap):
        return
    tokens = max({point.tokens for point in arm.validation} & {point.tokens for point in scratch.validation})
    loss = next(point.loss for point in arm.validation if point.tokens == tokens)
    x = tokens / divisor + 0.04 * last
    bracket = {"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": TEXT, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, loss), (x, loss + gap), arrowprops=bracket, annotation_clip=False)
    axes.annotate(
        f"{fixed(abs(gap))} nats", (x, loss + gap / 2), (6, 0), textcoords="offset points", va="center", fontsize=9
    )
