"""How figures of the report take the colours of their page, and what tells their lines apart without colour."""

from __future__ import annotations

import html
import io
import re
from typing import Any

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Matplotlib wants fixed colours, the page brings its own: each of these stands for a CSS colour. The fallbacks are
# from the palette of Okabe and Ito (jfly.uni-koeln.de/color), which colour-blind readers tell apart.
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
_PIXELS_AN_INCH = 102  # two panels fill a page of 72 rem, and one is no larger than one of them


def to_svg(figure: Figure, description: str, *, prefix: str = "") -> str:
    """Return a figure that was drawn under ``STYLE`` as an ``<svg>`` element.

    Args:
        figure: with the colours above.
        description: for screen readers.
        prefix: goes before every id, so that a page can hold several figures.
    """
    image = io.StringIO()
    FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    svg = _themed(image.getvalue(), description, pixels=_PIXELS_AN_INCH * figure.get_figwidth())
    if prefix:
        svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg


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
