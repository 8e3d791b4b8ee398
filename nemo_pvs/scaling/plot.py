"""The figure of a fit: measured losses with the fitted curves, and the residuals."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from nemo_pvs.scaling.curve import BILLION
from nemo_pvs.scaling.estimate import Points, predict
from nemo_pvs.scaling.fit import Fit
from nemo_pvs.system.files import write_text

# The colours of Okabe and Ito (jfly.uni-koeln.de/color), distinguishable by colour-blind readers; markers differ too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_CURVE_POINTS = 100


def write_figure(fits: Sequence[Fit], path: Path) -> None:
    """Write an SVG: losses against tokens with their fitted curves on the left, residuals in per cent on the right."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemo_pvs", "text.parse_math": False}):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        pairs = [(fit, series) for fit in fits for series in fit.series]
        for index, (fit, series) in enumerate(pairs):
            colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
            points = Points.of([series])
            fitted = predict(fit.law, np.array(fit.values), points)
            curve = fit.law.curve(fit.values, series.conditions)
            tokens = np.geomspace(points.tokens[0], points.tokens[-1], _CURVE_POINTS)
            left.plot(tokens / BILLION, curve.loss(tokens), color=colour, linewidth=1.4)
            left.plot(points.tokens / BILLION, points.losses, marker, color=colour, markersize=5, label=series.name)
            residuals = 100 * (points.losses / fitted - 1)
            right.plot(points.tokens / BILLION, residuals, marker, color=colour, markersize=5)
        for axes in (left, right):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel("training tokens (B)")
            axes.spines[["top", "right"]].set_visible(False)
        left.set_ylabel("loss (nats per token)")
        right.set_ylabel("measured above fitted (%)")
        right.axhline(0, color="#888888", linewidth=0.8)
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
        image = io.StringIO()
        FigureCanvasSVG(figure).print_svg(image, metadata={"Date": None})
    write_text(path, image.getvalue())
