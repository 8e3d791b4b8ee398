"""Estimate a law's parameters: robust least squares on the logarithm of the loss, from many starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.law import BILLION, Conditions, Law, names
from nemo_pvs.scaling.series import Series

Array = NDArray[np.float64]

_HUBER = 0.01
"""Residuals of ln(loss) beyond which a point counts linearly: 1 % of the loss. Hoffmann et al. (2203.15556) take
0.001, which is a fit of medians and wastes points that are as good as validation losses are."""
_STARTS = 200
_POLISHED = 5
_TINY = 1e-9


@dataclass(frozen=True)
class Points:
    """The points of several series in one row."""

    tokens: Array
    losses: Array
    at: Conditions

    @classmethod
    def of(cls, series: Sequence[Series]) -> Points:
        """Collect the points of series, one after another."""
        lengths = [len(one.tokens) for one in series]
        columns = zip(*(one.conditions for one in series), strict=True)
        return cls(
            np.concatenate([np.array(one.tokens, np.float64) for one in series]),
            np.concatenate([np.array(one.losses, np.float64) for one in series]),
            Conditions(*(np.repeat(np.array(column, np.float64), lengths) for column in columns)),
        )


def estimate(law: Law, points: Points, *, seed: int = 0) -> Array:
    """Return the parameters that fit best, exponents within their bounds and coefficients of 0 or more.

    Exponents are drawn; the coefficients that suit them are a problem of linear least squares without negative
    values. The best of these starts are polished with Huber's loss on ln(loss).

    Raises:
        UserError: there are not more points than parameters.
    """
    if len(points.tokens) <= len(names(law)):
        raise UserError(
            f"{len(points.tokens)} points do not determine the {len(names(law))} parameters of the {law.name} law; "
            "add points."
        )
    generator = np.random.default_rng(seed)
    low, high = np.array([(bounds.low, bounds.high) for bounds in law.exponents]).T
    drawn = low + (high - low) * generator.random((_STARTS, len(low)))
    starts = sorted((_start(law, points, exponents) for exponents in drawn), key=lambda start: start[0])
    polished = [polish(law, points, start) for _, start in starts[:_POLISHED]]
    return min(polished, key=lambda fitted: fitted[0])[1]


def polish(law: Law, points: Points, start: Array) -> tuple[float, Array]:
    """Return the robust cost and the parameters of the minimum next to ``start``.

    Tokens are counted in their geometric mean meanwhile: in billions, the coefficient and the exponent of a run of a
    million tokens can only move together, and the search stops half-way.
    """
    low, high = _bounds(law)
    measured = np.log(points.losses)
    unit = float(np.exp(np.mean(np.log(points.tokens / BILLION))))
    points = replace(points, tokens=points.tokens / unit)

    def residuals(values: Array) -> Array:
        # Far from the data a curve may leave what a double holds; such a step is bad, not an error.
        with np.errstate(all="ignore"):
            fitted = np.log(np.maximum(predict(law, values, points), _TINY))
        return np.nan_to_num(fitted - measured, nan=1e3, posinf=1e3, neginf=-1e3)

    inside = np.clip(_counted_in(law, start, unit), low + _TINY, np.where(np.isfinite(high), high - _TINY, high))
    found = least_squares(
        residuals, inside, bounds=(low, high), loss="huber", f_scale=_HUBER, x_scale="jac", max_nfev=400
    )
    return float(found.cost), _counted_in(law, np.asarray(found.x, np.float64), 1 / unit)


def _counted_in(law: Law, values: Array, unit: float) -> Array:
    """Return the parameters of the same curves for tokens that are counted in so many of what they were."""
    exponent, coefficient = names(law).index("beta"), names(law).index(law.of_tokens)
    moved = values.copy()
    moved[coefficient] *= unit ** -values[exponent]
    return moved


def predict(law: Law, values: Array, points: Points) -> Array:
    """Return the law's loss at every point."""
    return np.asarray(law.curve(values.tolist(), points.at).loss(points.tokens), np.float64)


def _start(law: Law, points: Points, exponents: Array) -> tuple[float, Array]:
    """Return the error and the parameters of the best coefficients for given exponents."""
    zeros = np.zeros(len(law.coefficients))
    offset = predict(law, np.concatenate([exponents, zeros]), points)
    columns = [
        predict(law, np.concatenate([exponents, unit]), points) - offset for unit in np.eye(len(law.coefficients))
    ]
    features = np.column_stack(columns) / points.losses[:, None]
    size = np.linalg.norm(features, axis=0)
    coefficients, error = nnls(features / size, (points.losses - offset) / points.losses)
    return float(error), np.concatenate([exponents, coefficients / size])


def _bounds(law: Law) -> tuple[Array, Array]:
    low = [bounds.low for bounds in law.exponents] + [0.0] * len(law.coefficients)
    high = [bounds.high for bounds in law.exponents] + [np.inf] * len(law.coefficients)
    return np.array(low), np.array(high)
