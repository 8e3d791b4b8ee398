"""Intervals of a law's parameters and predictions, from a parametric bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nemo_pvs.scaling.estimate import Array, Points, polish, predict, spread, undetermined
from nemo_pvs.scaling.law import Law

DRAWS = 399
"""With this many, an interval's bounds are exactly draws (``confidence_interval``)."""
CONFIDENCE = 95.0
"""Coverage of the intervals in per cent."""
FEWEST_DRAWS = 39
"""With fewer, even the full range of the draws is narrower than a 95 % interval should be."""
_BLOCK = 100


def draw(
    law: Law,
    points: Points,
    values: Array,
    draws: int,
    generator: np.random.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, Array]:
    """Draw parameters from a parametric bootstrap around ``values`` whose noise level is itself uncertain.

    Each draw takes a standard deviation, the residuals' times sqrt(dof / chi^2_dof), draws losses around the fitted
    law with it, and fits them. For a linear law the draws' percentiles are exactly Student's interval. For the laws
    here they are still calibrated, whereas those of resampled residuals cover 80 to 90 % on few points
    (tests/benchmarks/scaling_intervals.py). Percentiles are invariant under monotonic transformations, so no scale has
    to be chosen: intervals of positive quantities and of token counts, even infinite ones, are the same as on a
    logarithmic scale.

    Fits begin at ``values``. What the points do not determine would stay there, and its interval would be a point; so
    for those parameters each draw begins elsewhere (``estimate.spread``).

    Returns:
        The standard deviation of ln(loss) in each draw [draws], and the parameters [draws, parameters].
    """
    fitted = predict(law, values, points)
    freedom = len(fitted) - len(values)
    noise = scatter(points, fitted, len(values)) * np.sqrt(freedom / generator.chisquare(freedom, draws))
    losses = fitted * np.exp(noise[:, None] * generator.standard_normal((draws, len(fitted))))
    starts = np.tile(values, (draws, 1))
    if free := undetermined(law, points, values):
        starts = spread(law, points, values, free, draws, generator)
    drawn = []
    for start in range(0, draws, _BLOCK):
        block = losses[start : start + _BLOCK]
        drawn.append(polish(law, points, starts[start : start + _BLOCK], block)[1])
        if progress:
            progress(start + len(block), draws)
    return noise, np.concatenate(drawn)


def scatter(points: Points, fitted: Array, parameters: int) -> float:
    """Return the standard deviation of ln(loss) around a fitted law, corrected for degrees of freedom."""
    residuals = np.log(points.losses) - np.log(fitted)
    return math.sqrt(float(np.sum(residuals**2)) / (len(residuals) - parameters))


def confidence_interval(draws: Array) -> tuple[Array, Array]:
    """Return the bounds of the 95 % interval from draws [draws, ...], which may be infinite.

    The truth is equally likely to have any rank among the draws, so the bounds are the draws of rank
    (draws + 1) x 2.5 % from each end.
    """
    ordered = np.sort(draws, axis=0)
    rank = max(1, int((len(ordered) + 1) * (100 - CONFIDENCE) / 200))
    return ordered[rank - 1], ordered[-rank]
