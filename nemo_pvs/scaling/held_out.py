"""How well a law meets points that it was not fitted to, and the slopes between points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import BILLION
from nemo_pvs.scaling.estimate import Array, Points, estimate, predict
from nemo_pvs.scaling.law import Law
from nemo_pvs.scaling.series import Series

_LAST_SHARE = 0.2


@dataclass(frozen=True)
class HeldOut:
    """The error of a law on points that it has not seen."""

    name: str
    points: int
    rmse: float | None = None
    """Nats per token; None where it cannot be measured."""
    slope_difference: float | None = None
    """Nats per billion tokens; None where no two points follow each other."""
    reason: str = ""
    """Why it cannot be measured."""


def held_out(law: Law, series: Sequence[Series], *, seed: int = 0) -> list[HeldOut]:
    """Fit again without the last 20 % of tokens, without the largest model and without the largest ratio (2411.10272).

    The last two only where the law knows sizes and ratios.
    """
    splits = {"last 20 % of tokens": [np.array(one.tokens) > (1 - _LAST_SHARE) * one.tokens[-1] for one in series]}
    if law.name != "per-run":
        sizes = [one.parameters if law.name == "chinchilla" else one.parent_parameters or 0 for one in series]
        splits["largest model"] = _largest(series, sizes)
    if law.name == "p2":
        splits["largest ratio"] = _largest(series, [round(one.ratio or 0, 2) for one in series])
    return [_measure(law, name, series, seen_not, seed) for name, seen_not in splits.items()]


def slope_difference(law: Law, values: Array, series: Sequence[Series]) -> float | None:
    """Return the average slope difference (ASD): the mean of |fitted - measured slope|, nats per billion tokens.

    The P2 law's authors choose between forms by it, because "more tokens or stop" is a question of slopes; they do not
    say how slopes are measured. Here: differences between points that follow each other in a series. None without any.
    """
    differences = []
    for one in series:
        points = Points.of([one])
        apart = np.diff(points.tokens) / BILLION
        slopes = (np.diff(losses) / apart for losses in (points.losses, predict(law, values, points)))
        measured, fitted = slopes
        differences += np.abs(fitted - measured).tolist()
    return float(np.mean(differences)) if differences else None


def _largest(series: Sequence[Series], sizes: Sequence[float]) -> list[NDArray[np.bool_]]:
    return [np.full(len(one.tokens), size == max(sizes)) for one, size in zip(series, sizes, strict=True)]


def _measure(law: Law, name: str, series: Sequence[Series], unseen: Sequence[NDArray[np.bool_]], seed: int) -> HeldOut:
    points = int(sum(kept.sum() for kept in unseen))
    rest = [part for one, out in zip(series, unseen, strict=True) if (part := one.where(~out))]
    rest_of = [part for one, out in zip(series, unseen, strict=True) if (part := one.where(out))]
    if not rest:
        return HeldOut(name, points, reason="nothing is left to fit")
    try:
        law.check(rest)
        values = estimate(law, Points.of(rest), seed=seed)
    except UserError as error:
        return HeldOut(name, points, reason=str(error))
    # A slope needs two points: the last one of those that were fitted belongs to it too.
    slopes = [
        with_last
        for one, out in zip(series, unseen, strict=True)
        if out.any() and (with_last := one.where(out | np.append(out[1:], False)))
    ]
    held = Points.of(rest_of)
    rmse = float(np.sqrt(np.mean((held.losses - predict(law, values, held)) ** 2)))
    return HeldOut(name, points, rmse, slope_difference(law, values, slopes))
