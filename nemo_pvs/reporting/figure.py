"""The figure of the report: validation loss against training tokens, as SVG that takes the colours of its page."""

from __future__ import annotations

import html
import io
import math
import re
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemo_pvs.reporting.numbers import fixed, unit_of
from nemo_pvs.reporting.results import ArmResult, Point, Results

# Matplotlib wants fixed colours, the page brings its own: each of these stands for a CSS colour. The fallbacks are
# from the palette of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers tell apart.
_TEXT = "#000001"
_GRID = "#000002"
_SCRATCH = "#000003"
_PRUNED = ("#000004", "#000005", "#000006")
_CSS = {
    _TEXT: "currentColor",
    _GRID: "var(--figure-grid, #d5d5d5)",
    _SCRATCH: "var(--series-scratch, #b34b00)",
    _PRUNED[0]: "var(--series-1, #0072b2)",
    _PRUNED[1]: "var(--series-2, #00795a)",
    _PRUNED[2]: "var(--series-3, #a8497f)",
}
_MARKERS = ("o", "^", "D")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_pvs",
    "font.size": 10,
    "text.parse_math": False,  # a $ in a name is a $
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.12,  # inches
    "axes.facecolor": "none",
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
}
_PANELS_A_ROW = 2
_PIXELS_AN_INCH = 102  # two panels fill a page of 72 rem, and one is no larger than one of them
# A random start has a loss of ln(vocabulary): with it on the axis, the differences at the end would be invisible. The
# axis is made for what comes after this share of the tokens; what lies above is said in words.
_IGNORED_SHARE = 0.1


def loss_figure(results: Results) -> str:
    """Draw one panel a target: pruned solid, scratch dashed, parent dotted, the gap at the end in nats per token.

    Markers and dashes differ too, so that the figure can be read in black and white.

    Returns:
        An ``<svg>`` element to put into a page. Text takes the page's colour, lines the CSS variables ``--series-1``,
        ``--series-2``, ``--series-3``, ``--series-scratch`` and ``--figure-grid`` where the page sets them. Empty if
        no validation loss was measured.
    """
    targets = {name: arms for name, arms in results.targets.items() if any(_finite(arm.validation) for arm in arms)}
    if not targets:
        return ""
    columns = min(len(targets), _PANELS_A_ROW)
    rows = math.ceil(len(targets) / columns)
    unit = unit_of([point.tokens for arm in results.arms for point in arm.validation])
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(5.4 * columns, 3.9 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        low, high = _loss_range(results)
        for axes, (name, arms) in zip(panels, targets.items(), strict=False):
            _draw_panel(axes, results, arms, unit, high)
            axes.set_title(name, loc="left", fontweight="bold")
            axes.set_ylim(low, high)
        for axes in panels[len(targets) :]:
            axes.remove()
        for axes in figure.axes[::columns]:
            axes.set_ylabel("validation loss (nats per token)")
        image = io.StringIO()
        FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    description = f"Validation loss against training tokens: {', '.join(targets)}."
    return _themed(image.getvalue(), description, pixels=_PIXELS_AN_INCH * figure.get_figwidth())


def standalone(figure: str) -> str:
    """Return ``loss_figure``'s element as a file of its own, readable on light and on dark pages."""
    style = "svg { color: #1d1f23; background: #ffffff; }"
    return figure.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1).replace(
        ">", f"><style>{style}</style>", 1
    )


def _finite(points: list[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point.loss)]


def _loss_range(results: Results) -> tuple[float, float]:
    points = [point for arm in results.arms for point in _finite(arm.validation)]
    start = _IGNORED_SHARE * max(point.tokens for point in points)
    losses = [point.loss for point in points if point.tokens >= start]
    if results.parent.validation_loss is not None and math.isfinite(results.parent.validation_loss):
        losses.append(results.parent.validation_loss)
    margin = 0.12 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin


def _draw_panel(
    axes: Axes, results: Results, arms: list[ArmResult], unit: tuple[float, str], top_of_axis: float
) -> None:
    divisor, prefix = unit
    pruned = [arm for arm in arms if arm.initialisation == "pruned"]
    for arm in arms:
        points = _finite(arm.validation)
        label = arm.name
        if points and points[0].loss > top_of_axis:
            label += f" (starts at {fixed(points[0].loss)})"
        if len(points) < len(arm.validation):
            label += " (diverged)"
        rank = pruned.index(arm) if arm in pruned else 0
        axes.plot(
            [point.tokens / divisor for point in points],
            [point.loss for point in points],
            color=_PRUNED[rank % len(_PRUNED)] if arm in pruned else _SCRATCH,
            linestyle="solid" if arm in pruned else "dashed",
            marker=_MARKERS[rank % len(_MARKERS)] if arm in pruned else "s",
            markersize=5,
            linewidth=1.8,
            label=label,
        )
    last = max(point.tokens for arm in arms for point in _finite(arm.validation)) / divisor or 1.0
    parent_loss = results.parent.validation_loss
    if parent_loss is not None and math.isfinite(parent_loss):
        axes.axhline(parent_loss, color=_TEXT, linestyle="dotted", linewidth=1.2)
        axes.annotate(
            f"parent {fixed(parent_loss)}", (0, parent_loss), (2, -3), textcoords="offset points", va="top", fontsize=9
        )
    if pruned:
        _annotate_gap(axes, results, pruned[0], divisor, last)
    axes.set_xlim(-0.02 * last, 1.24 * last)
    axes.set_xlabel(f"training tokens ({prefix})" if prefix else "training tokens")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="y", color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="upper right", frameon=False, fontsize=9, labelcolor=_TEXT, handlelength=3)


def _annotate_gap(axes: Axes, results: Results, arm: ArmResult, divisor: float, last: float) -> None:
    """Mark the distance between scratch and pruned at the last token count that both have."""
    gap, scratch = results.gap(arm), results.scratch_of(arm)
    if gap is None or scratch is None or not math.isfinite(gap):
        return
    tokens = max({point.tokens for point in arm.validation} & {point.tokens for point in scratch.validation})
    loss = next(point.loss for point in arm.validation if point.tokens == tokens)
    x = tokens / divisor + 0.04 * last
    bracket = {"arrowstyle": "|-|,widthA=0.25,widthB=0.25", "color": _TEXT, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (x, loss), (x, loss + gap), arrowprops=bracket, annotation_clip=False)
    axes.annotate(
        f"{fixed(abs(gap))} nats", (x, loss + gap / 2), (6, 0), textcoords="offset points", va="center", fontsize=9
    )


def _themed(svg: str, description: str, *, pixels: float) -> str:
    """Reduce Matplotlib's file to one element for a page: CSS colours, the page's font, a text for screen readers."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"(font: [^;\"]*?px)[^;\"]*", r"\1 system-ui, sans-serif", svg)
    for colour, css in _CSS.items():
        svg = svg.replace(colour, css)
    attributes = (
        f'role="img" aria-label="{html.escape(description)}" stroke-linejoin="round" style="max-width: {pixels:.0f}px"'
    )
    return svg.replace("<svg", f"<svg {attributes}", 1)
