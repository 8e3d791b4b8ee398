"""Estimate a law's parameters: robust least squares on the logarithm of the loss, from many starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import BILLION
from nemo_pvs.scaling.law import Law, names
from nemo_pvs.scaling.series import Conditions, LossSeries

Array = NDArray[np.float64]

_HUBER = 0.01
"""Residual of ln(loss) beyond which the cost is linear: 1 % of the loss. Hoffmann et al. (2203.15556) use 0.001, which
amounts to a median fit and is inefficient for points as precise as validation losses."""
_STARTS = 200
_RIDGE = 1e-12
_POLISHED = 5
_MOST_STEPS = 200
_FIRST_DAMPING = 1e-3
_MOST_DAMPING = 1e12
_LEAST_DAMPING = 1e-12
"""Keeps the equations of parameters that the points do not determine solvable."""
_ENOUGH = 1e-8
"""Stop after a step that reduces the cost by less than this share."""
_STEP = 1e-7
"""Step of the finite differences; parameters are of the order of losses and exponents."""
_TINY = 1e-30
_SAME = 1e-5
"""Directions in which losses change by less than this share of what single parameters do are not determined."""


@dataclass(frozen=True)
class Points:
    """The points of several series, concatenated."""

    tokens: Array
    losses: Array
    at: Conditions

    @classmethod
    def of(cls, series: Sequence[LossSeries]) -> Points:
        """Concatenate the points of series."""
        lengths = [len(run.tokens) for run in series]
        columns = zip(*(run.conditions for run in series), strict=True)
        return cls(
            np.concatenate([np.array(run.tokens, np.float64) for run in series]),
            np.concatenate([np.array(run.losses, np.float64) for run in series]),
            Conditions(*(np.repeat(np.array(column, np.float64), lengths) for column in columns)),
        )


def fit_parameters(law: Law, points: Points, *, seed: int = 0) -> Array:
    """Return the best-fitting parameters [parameters], with exponents within bounds and coefficients of 0 or more.

    Exponents are sampled, and the coefficients for them found by non-negative linear least squares. The best of these
    starts are polished with the Huber loss on ln(loss).

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
    errors, starts = _starts(law, points, drawn)
    costs, polished = polish(law, points, starts[np.argsort(errors)[:_POLISHED]])
    return np.asarray(polished[np.argmin(costs)], np.float64)


def polish(law: Law, points: Points, starts: Array, losses: Array | None = None) -> tuple[Array, Array]:
    """Return the robust costs [fits] and the parameters [fits, parameters] of the minima near ``starts``.

    All fits take their Levenberg-Marquardt steps together, so the hundreds of fits of a bootstrap are as fast as a
    few. The Huber loss enters as weights, and a parameter at its bound stays there while the gradient points outwards.

    Tokens are temporarily measured in units of their geometric mean: in billions, the coefficient and the exponent of
    a run of a million tokens would be strongly correlated, and the search would stop early.

    Args:
        law: The law to fit.
        points: Points to fit it to.
        starts: Parameters to start from [fits, parameters].
        losses: Losses of every fit [fits, points]; None fits all to the losses of ``points``.
    """
    low, high = _bounds(law)
    unit = float(np.exp(np.mean(np.log(points.tokens / BILLION))))
    points = replace(points, tokens=points.tokens / unit)
    measured = np.log(points.losses[None] if losses is None else losses)
    measured = np.broadcast_to(measured, (len(starts), len(points.tokens)))
    values = np.clip(_change_unit(law, starts, unit), low, high)
    residuals, slopes = _residuals(law, values, points, measured)
    costs = _huber(residuals)
    damping = np.full(len(starts), _FIRST_DAMPING)
    moving = np.arange(len(starts))
    for _ in range(_MOST_STEPS):
        now = values[moving]
        weights = 1 / np.maximum(1, np.abs(residuals[moving]) / _HUBER)
        gradient = np.einsum("mn,mnp->mp", weights * residuals[moving], slopes[moving])
        curvature = np.einsum("mn,mnp,mnq->mpq", weights, slopes[moving], slopes[moving])
        stuck = ((now <= low) & (gradient > 0)) | ((now >= high) & (gradient < 0))
        curvature[stuck[:, :, None] | stuck[:, None, :]] = 0
        diagonal = np.einsum("mpp->mp", curvature)
        diagonal += damping[moving, None] * diagonal + _TINY
        tried = np.clip(now - np.linalg.solve(curvature, np.where(stuck, 0, gradient)[:, :, None])[:, :, 0], low, high)
        tried_residuals, tried_slopes = _residuals(law, tried, points, measured[moving])
        tried_costs = _huber(tried_residuals)
        gain = costs[moving] - tried_costs
        better = gain > 0
        taken = moving[better]
        values[taken], residuals[taken], slopes[taken] = tried[better], tried_residuals[better], tried_slopes[better]
        costs[taken] = tried_costs[better]
        damping[moving] = np.maximum(_LEAST_DAMPING, damping[moving] * np.where(better, 0.2, 5.0))
        done = (better & (gain <= _ENOUGH * tried_costs)) | (damping[moving] > _MOST_DAMPING)
        moving = moving[~done]
        if not len(moving):
            break
    return costs, _change_unit(law, values, 1 / unit)


def undetermined(law: Law, points: Points, values: Array) -> list[str]:
    """Return the names of the parameters that the points do not determine.

    These can change, alone or together, without any loss changing: the singular vectors of the losses' derivatives,
    each parameter's divided by their norm, whose singular value is zero up to rounding.

    Args:
        law: The law that was fitted.
        points: The points that it was fitted to, more than it has parameters.
        values: The fitted parameters [parameters].
    """
    unit = float(np.exp(np.mean(np.log(points.tokens / BILLION))))
    moved = replace(points, tokens=points.tokens / unit)
    _, slopes = _residuals(law, _change_unit(law, values[None], unit), moved, np.log(points.losses)[None])
    sizes = np.linalg.norm(slopes[0], axis=0)
    _, singular, directions = np.linalg.svd(slopes[0] / np.where(sizes > _TINY, sizes, 1), full_matrices=False)
    free = (np.abs(directions[singular < _SAME]) > _SAME).any(axis=0)
    return [name for name, is_free in zip(names(law), free, strict=True) if is_free]


def spread(
    law: Law, points: Points, values: Array, free: Sequence[str], count: int, generator: np.random.Generator
) -> Array:
    """Return parameters [count, parameters] that differ in what the points do not determine.

    Exponents among ``free`` are drawn from their whole range, with a random one of the best coefficients for each
    draw: where there are several, they are the mixtures of those with as many zeros as possible.
    """
    exponents = np.tile(values[: len(law.exponents)], (count, 1))
    for index, bounds in enumerate(law.exponents):
        if bounds.name in free:
            exponents[:, index] = bounds.low + (bounds.high - bounds.low) * generator.random(count)
    errors, coefficients = _solutions(law, points, exponents)
    best = errors.min(axis=0)
    shares = np.where(errors <= best + _SAME * (best + _SAME), generator.exponential(size=errors.shape), 0)
    mixed = np.einsum(
        "sm,smp->mp", shares / shares.sum(axis=0), np.where(np.isfinite(errors)[..., None], coefficients, 0)
    )
    return np.concatenate([exponents, mixed], axis=1)


def _residuals(law: Law, values: Array, points: Points, measured: Array) -> tuple[Array, Array]:
    """Return ln(fitted) - ln(measured) [fits, points] and its derivatives [fits, points, parameters]."""

    def log_loss(moved: Array) -> Array:
        return np.asarray(np.log(law.curve(list(moved.T[:, :, None]), points.at).loss(points.tokens)), np.float64)

    # Far from the data a curve may overflow; such a step is rejected, not an error.
    with np.errstate(all="ignore"):
        fitted = log_loss(values)
        slopes = (
            np.stack([log_loss(values + step) - fitted for step in _STEP * np.eye(values.shape[1])], axis=-1) / _STEP
        )
        residuals = fitted - measured
    return np.nan_to_num(residuals, nan=1e3, posinf=1e3, neginf=-1e3), np.nan_to_num(slopes, nan=0, posinf=0, neginf=0)


def _huber(residuals: Array) -> Array:
    size = np.abs(residuals)
    return np.sum(np.where(size <= _HUBER, residuals**2 / 2, _HUBER * (size - _HUBER / 2)), axis=-1)


def _change_unit(law: Law, values: Array, unit: float) -> Array:
    """Return the parameters [fits, parameters] of the same curves for tokens in another unit."""
    exponent, coefficient = names(law).index("beta"), names(law).index(law.of_tokens)
    moved = np.array(values, np.float64)
    moved[:, coefficient] *= unit ** -moved[:, exponent]
    return moved


def predict(law: Law, values: Array, points: Points) -> Array:
    """Return the law's loss at every point [points]."""
    return np.asarray(law.curve(values.tolist(), points.at).loss(points.tokens), np.float64)


def _starts(law: Law, points: Points, exponents: Array) -> tuple[Array, Array]:
    """Return errors [starts] and parameters [starts, parameters] with the best coefficients for given exponents."""
    errors, coefficients = _solutions(law, points, exponents)
    best, starts = np.argmin(errors, axis=0), np.arange(len(exponents))
    return errors[best, starts], np.concatenate([exponents, coefficients[best, starts]], axis=1)


def _solutions(law: Law, points: Points, exponents: Array) -> tuple[Array, Array]:
    """Return errors [subsets, starts] and coefficients [subsets, starts, coefficients] for given exponents.

    Of two or three non-negative coefficients the best are the least-squares solution on one of their subsets, the
    others being 0. The error of a solution with a negative coefficient is infinite.
    """
    given = list(exponents.T[:, :, None])

    def losses(coefficients: Array) -> Array:
        return np.asarray(law.curve([*given, *coefficients], points.at).loss(points.tokens), np.float64)

    count = len(law.coefficients)
    offset = losses(np.zeros(count))
    features = np.stack([losses(unit) - offset for unit in np.eye(count)], axis=-1) / points.losses[:, None]
    size = np.linalg.norm(features, axis=1)
    features /= size[:, None, :]
    wanted = (points.losses - offset) / points.losses
    errors, solutions = [], []
    for chosen in product((False, True), repeat=count):
        subset = features[:, :, chosen]
        squares = np.swapaxes(subset, 1, 2) @ subset + _RIDGE * np.eye(subset.shape[2])
        solved = np.linalg.solve(squares, np.swapaxes(subset, 1, 2) @ wanted[:, :, None])[:, :, 0]
        error = np.sum((wanted - np.einsum("mnp,mp->mn", subset, solved)) ** 2, axis=1)
        errors.append(np.where((solved >= 0).all(axis=1), error, np.inf))
        solution = np.zeros((len(exponents), count))
        solution[:, chosen] = solved
        solutions.append(solution / size)
    return np.array(errors), np.array(solutions)


def _bounds(law: Law) -> tuple[Array, Array]:
    low = [bounds.low for bounds in law.exponents] + [0.0] * len(law.coefficients)
    high = [bounds.high for bounds in law.exponents] + [np.inf] * len(law.coefficients)
    return np.array(low), np.array(high)
