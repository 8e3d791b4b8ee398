"""How often intervals of 95 % hold the truth: runs drawn from known laws, fitted, and asked."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.estimate import Points, polish, predict
from nemo_pvs.scaling.fit import LAWS, Fit, Form, fit
from nemo_pvs.scaling.law import names
from nemo_pvs.scaling.predict import loss_at, overtaking, tokens_at_gain, tokens_to
from nemo_pvs.scaling.series import LossSeries

from .conftest import TRUTH, draw

SCRATCH = Curve(2.2, 1.5, 0.4)
"""A run from scratch, which catches up with the pruned one of ``conftest.PER_RUN`` after 88 B tokens."""

PREDICTIONS = ("loss at 3 x", "tokens to a loss", "tokens at a gain", "catch-up")
"""A new loss after three times the most tokens; the tokens to the loss after twice as many, and to the last slope; the
tokens from which ``SCRATCH`` is better."""

_SEED = 1_000_000
"""Of the fits: far from those of the noise, or a fit's own random numbers would be the noise that it is fitted to."""


@dataclass(frozen=True)
class Case:
    """Runs of one law: how many, how long, how noisy."""

    form: Form
    noise: float
    """Standard deviation of ln(loss)."""
    runs: dict[str, Any] = field(default_factory=lambda: {"parents": (8,), "ratios": (0.25,)})
    billions: Sequence[float] = ()


CASES = {
    "per-run, 5 points as in Figure 1": Case("per-run", 0.003, billions=(10.5, 31.5, 52.4, 262, 524)),
    "per-run, 6 points": Case("per-run", 0.003, billions=np.geomspace(1, 100, 6).tolist()),
    "per-run, 6 points, 1 % noise": Case("per-run", 0.01, billions=np.geomspace(1, 100, 6).tolist()),
    "per-run, 20 points": Case("per-run", 0.003, billions=np.geomspace(1, 100, 20).tolist()),
    "chinchilla, 4 x 5 points": Case(
        "chinchilla", 0.003, {"parents": (1, 3, 8, 20), "ratios": (0.25,)}, np.geomspace(0.5, 20, 5).tolist()
    ),
    "chinchilla, 3 x 4 points": Case(
        "chinchilla", 0.003, {"parents": (1, 4, 20), "ratios": (0.25,)}, np.geomspace(0.5, 20, 4).tolist()
    ),
    "p2, 12 x 4 points": Case("p2", 0.001, {"parents": (0.5, 2, 8, 30)}, np.geomspace(0.05, 1, 4).tolist()),
}


def coverage(case: Case, repetitions: int, *, draws: int = 39) -> dict[str, dict[str, float]]:
    """Return, by quantity, the shares of the intervals that held the truth.

    Args:
        case: What is drawn and fitted.
        repetitions: How often.
        draws: Of every fit.

    Returns:
        For every parameter and prediction, ``calibrated`` (those of ``Fit``) and ``resampled``: what percentiles of a
        bootstrap of the residuals, which take no notice of degrees of freedom beyond their size, would have covered.
    """
    held: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for repetition in range(repetitions):
        pruned, scratch = _fit(case, repetition, draws), _scratch(case, repetition, draws)
        kinds = {
            "calibrated": (pruned, scratch),
            "resampled": (_resampled(pruned, repetition, 2), scratch and _resampled(scratch, repetition, 4)),
        }
        for kind, fits in kinds.items():
            for name, inside in _answers(case, repetition, *fits).items():
                held[name][kind].append(inside)
    return {name: {kind: float(np.mean(inside)) for kind, inside in kinds.items()} for name, kinds in held.items()}


def _fit(case: Case, repetition: int, draws: int) -> Fit:
    series = draw(case.form, noise=case.noise, seed=repetition, billions=case.billions, **case.runs)
    return fit(case.form, series, draws=draws, seed=_SEED + repetition)


def _scratch(case: Case, repetition: int, draws: int) -> Fit | None:
    """Return the fit of a run from scratch that catches up with the pruned one; None but for one curve."""
    if case.form != "per-run":
        return None
    tokens = np.array(case.billions) * 1e9
    noise = case.noise * np.random.default_rng([1, repetition]).standard_normal(len(tokens))
    losses = SCRATCH.loss(tokens) * np.exp(noise)
    series = LossSeries("scratch", tuple(tokens), tuple(losses), "random", 10**9)
    return fit("per-run", [series], draws=draws, seed=_SEED + repetition)


def _resampled(found: Fit, repetition: int, stream: int) -> Fit:
    """Return the fit with the draws of a bootstrap of its residuals, made as large as the noise is."""
    points, values = Points.of(found.series), np.array(found.values)
    fitted = predict(found.law, values, points)
    residuals = np.log(points.losses) - np.log(fitted)
    residuals *= math.sqrt(len(residuals) / (len(residuals) - len(values)))
    count = len(found.draws)
    noise = np.random.default_rng([stream, repetition]).choice(residuals, (count, len(fitted)))
    _, draws = polish(found.law, points, np.tile(values, (count, 1)), fitted * np.exp(noise))
    size = [float(np.std(residuals))] * count
    return Fit(**{**found.__dict__, "draws": draws.tolist(), "noise": size})


def _answers(case: Case, repetition: int, found: Fit, scratch: Fit | None) -> dict[str, bool]:
    """Return which intervals hold the truth: of parameters, and of predictions for the first of the models."""
    truth = list(TRUTH[case.form].values())
    at = found.series[0].conditions
    curve = LAWS[case.form].curve(truth, at)
    last = found.range[1]
    inside = {
        name: found.intervals[name][0] <= value <= found.intervals[name][1]
        for name, value in zip(names(LAWS[case.form]), truth, strict=True)
    }
    measured = curve.loss(3 * last) * math.exp(case.noise * np.random.default_rng([3, repetition]).standard_normal())
    loss, to_loss, at_gain, catch_up = PREDICTIONS
    asked = {
        loss: (loss_at(found, 3 * last, at), measured),
        to_loss: (tokens_to(found, float(curve.loss(2 * last)), at), 2 * last),
        at_gain: (tokens_at_gain(found, -float(curve.slope(last)), at), last),
    }
    if scratch is not None:
        met = overtaking(scratch, found)
        crossing = SCRATCH.overtakes(curve, met.low, met.horizon)
        if met.tokens is not None and crossing is not None:
            asked[catch_up] = (met.tokens, crossing)
    return {**inside, **{name: bool(one.low <= value <= one.high) for name, (one, value) in asked.items()}}
