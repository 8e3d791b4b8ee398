"""Style of the report's figures: colours set by the page's CSS, and markers to tell lines apart without colour."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Matplotlib needs fixed colours, but the page defines its own: each of these is a placeholder for a CSS colour. The
# fallbacks are based on the palette of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers can
# distinguish.
TEXT = "#000001"
GRID = "#000002"
SCRATCH = "#000003"
PRUNED = ("#000004", "#000005", "#000006")
MARKERS = ("o", "^", "D")
_CSS = {
    TEXT: "currentColor",
    GRID: "var(--figure-grid, #d5d5d5)",
    SCRATCH: "var(--series-scratch, #b34b00)",
    PRUNED[0]: "var(--series-1, #0072b2)",
    PRUNED[1]: "var(--series-2, #00795a)",
    PRUNED[2]: "var(--series-3, #a8497f)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nemo_pvs",
    "font.size": 10,
    "text.parse_math": False,  # a $ in a name is a $
    "figure.facecolor": "none",
    "figure.constrained_layout.h_pad": 0.12,  # inches
    "axes.facecolor": "none",
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
}
_PIXELS_PER_INCH = 102  # two panels fill a page of 72 rem, and a single one has the size of one of them


def to_svg(figure: Figure, description: str, *, prefix: str = "") -> str:
    """Return a figure drawn with ``STYLE`` as an ``<svg>`` element.

    Args:
        figure: The figure, in the colours above.
        description: Text for screen readers.
        prefix: Prefix of every id, so that a page can contain several figures.
    """
    image = io.StringIO()
    FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    svg = _themed(image.getvalue(), description, pixels=_PIXELS_PER_INCH * figure.get_figwidth())
    if prefix:
        svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg


def _themed(svg: str, description: str, *, pixels: float) -> str:
    """Reduce Matplotlib's file to one element with CSS colours, the page's font and text for screen readers."""
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
