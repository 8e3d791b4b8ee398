"""Errors of a law on points that it was not fitted to, and on the slopes between points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.bootstrap import DRAWS, confidence_interval, draw
from nemo_pvs.scaling.curve import BILLION
from nemo_pvs.scaling.estimate import Array, Points, fit_parameters, predict
from nemo_pvs.scaling.law import Law
from nemo_pvs.scaling.series import LossSeries

_LAST_SHARE = 0.2


@dataclass(frozen=True)
class HeldOut:
    """The error of a law on held-out points."""

    name: str
    points: int
    rmse: float | None = None
    """Nats per token; None if it cannot be measured."""
    slope_difference: float | None = None
    """Nats per billion tokens; None if there are no two consecutive points."""
    error: float | None = None
    """Mean of measured minus predicted losses, nats per token."""
    error_interval: tuple[float, float] | None = None
    """95 % interval of ``error``, from how uncertain the law's parameters and the points are without these points;
    None if there are no more points than parameters. If it contains zero, the law predicts these points."""
    reason: str = ""
    """Why it cannot be measured."""


def held_out(law: Law, series: Sequence[LossSeries], *, draws: int = DRAWS, seed: int = 0) -> list[HeldOut]:
    """Fit again without the last 20 % of tokens, without the largest model and without the largest ratio (2411.10272).

    The last two are only for laws that depend on sizes and ratios.
    """
    splits = {"last 20 % of tokens": [np.array(run.tokens) > (1 - _LAST_SHARE) * run.tokens[-1] for run in series]}
    if law.name != "per-run":
        sizes = [run.parameters if law.name == "chinchilla" else run.parent_parameters or 0 for run in series]
        splits["largest model"] = _largest(series, sizes)
    if law.name == "p2":
        splits["largest ratio"] = _largest(series, [round(run.ratio or 0, 2) for run in series])
    return [_measure(law, name, series, unseen, draws, seed) for name, unseen in splits.items()]


def slope_difference(law: Law, values: Array, series: Sequence[LossSeries]) -> float | None:
    """Return the average slope difference (ASD): the mean of |fitted - measured slope|, nats per billion tokens.

    The P2 law's authors (2411.10272) choose between forms by it, because whether to train on is a question of slopes;
    they do not say how slopes are measured. Here they are between consecutive points of a series, of which those at
    equal tokens, from several seeds, count as one. None if there are none.
    """
    differences = []
    for run in series:
        points = Points.of([run])
        tokens, which = np.unique(points.tokens, return_inverse=True)
        means = (
            np.bincount(which, losses) / np.bincount(which) for losses in (points.losses, predict(law, values, points))
        )
        intervals = np.diff(tokens) / BILLION
        slopes = (np.diff(losses) / intervals for losses in means)
        measured, fitted = slopes
        differences += np.abs(fitted - measured).tolist()
    return float(np.mean(differences)) if differences else None


def _largest(series: Sequence[LossSeries], sizes: Sequence[float]) -> list[NDArray[np.bool_]]:
    return [np.full(len(run.tokens), size == max(sizes)) for run, size in zip(series, sizes, strict=True)]


def _measure(
    law: Law, name: str, series: Sequence[LossSeries], unseen: Sequence[NDArray[np.bool_]], draws: int, seed: int
) -> HeldOut:
    points = int(sum(mask.sum() for mask in unseen))
    fitted, held, slopes = [], [], []
    for run, mask in zip(series, unseen, strict=True):
        if part := run.where(~mask):
            fitted.append(part)
        if part := run.where(mask):
            held.append(part)
        # A slope needs two points: the first one includes the last fitted point.
        if mask.any() and (part := run.where(mask | np.append(mask[1:], False))):
            slopes.append(part)
    if not fitted:
        return HeldOut(name, points, reason="nothing is left to fit")
    try:
        law.check(fitted)
        values = fit_parameters(law, Points.of(fitted), seed=seed)
    except UserError as error:
        return HeldOut(name, points, reason=str(error))
    fitted_points, held_points = Points.of(fitted), Points.of(held)
    errors = held_points.losses - predict(law, values, held_points)
    rmse, mean = float(np.sqrt(np.mean(errors**2))), float(np.mean(errors))
    bounds = _error_interval(law, fitted_points, held_points, values, draws, seed)
    return HeldOut(name, points, rmse, slope_difference(law, values, slopes), mean, bounds)


def _error_interval(
    law: Law, fitted: Points, held: Points, values: Array, draws: int, seed: int
) -> tuple[float, float] | None:
    """Return the interval of the mean error on ``held`` of a law that is fitted to ``fitted``.

    Each draw of the parameters predicts the held-out points, to which the scatter of measurements is added.
    """
    if len(fitted.losses) <= len(values):
        return None
    generator = np.random.default_rng([seed, 2])  # a different stream from the whole fit's
    noise, drawn = draw(law, fitted, values, draws, generator)
    predicted = np.array([predict(law, parameters, held) for parameters in drawn])  # [draws, points]
    measured = predicted * np.exp(noise[:, None] * generator.standard_normal(predicted.shape))
    low, high = confidence_interval(np.mean(held.losses - measured, axis=1))
    return float(low), float(high)
