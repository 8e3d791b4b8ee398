"""Predictions of losses and tokens from a fitted law, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.bootstrap import confidence_interval
from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.estimate import Array
from nemo_pvs.scaling.fit import Fit, check_tokenizers
from nemo_pvs.scaling.series import Conditions

_FARTHEST = 10.0
"""Largest multiple of a fit's most tokens for which losses are predicted."""


@dataclass(frozen=True)
class Prediction:
    """A value and its 95 % interval; infinite if a loss is never reached."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Overtaking:
    """The tokens from which scratch is better than pruned."""

    tokens: Prediction | None
    """None if scratch is not better up to ``horizon``."""
    share: float
    """Share of the draws in which scratch is better by ``horizon``."""
    low: float
    """Lower end of the comparison in tokens, from which both curves were measured."""
    horizon: float
    """Upper end of the comparison in tokens."""


def loss_at(fit: Fit, tokens: float, at: Conditions | None = None) -> Prediction:
    """Predict the loss after ``tokens`` tokens; the interval is that of a measurement, including its scatter.

    Args:
        fit: The fitted law.
        tokens: Training tokens.
        at: The model, for laws over several models; None for a fit of one run.

    Raises:
        UserError: the tokens are too far beyond those of the fit, or the model is not given.
    """
    most = fit.range[1]
    if not 0 < tokens <= _FARTHEST * most:
        raise UserError(
            f"A loss after {tokens:,.0f} tokens cannot be predicted from a fit of up to {most:,.0f}; "
            f"ask for at most {_FARTHEST:.0f} times as many, or train further."
        )
    generator = np.random.default_rng([0, 1])  # a different stream from the fit's, whatever its seed
    draws = np.array([curve.loss(tokens) for curve in _drawn(fit, at)])
    noisy = draws * np.exp(np.array(fit.noise) * generator.standard_normal(len(draws)))
    return _estimate(float(curve_of(fit, at).loss(tokens)), noisy)


def tokens_to(fit: Fit, loss: float, at: Conditions | None = None) -> Prediction:
    """Predict the tokens to a target loss (nats per token); infinite if the law never reaches it.

    Raises:
        UserError: the loss is not positive and finite.
    """
    if not 0 < loss < math.inf:
        raise UserError(f"A target loss of {loss:g} makes no sense; give nats per token above 0.")
    return _of_curve(fit, at, lambda curve: curve.tokens_to(loss))


def tokens_at_gain(fit: Fit, gain: float, at: Conditions | None = None) -> Prediction:
    """Predict the tokens after which another billion gains less than ``gain`` nats.

    Raises:
        UserError: the gain is not positive and finite.
    """
    if not 0 < gain < math.inf:
        raise UserError(f"A gain of {gain} nats per billion tokens is not above 0; give one such as 0.001.")
    return _of_curve(fit, at, lambda curve: curve.tokens_at_gain(gain))


def overtaking(
    scratch: Fit,
    pruned: Fit,
    *,
    head_start: float = 0.0,
    scratch_at: Conditions | None = None,
    pruned_at: Conditions | None = None,
) -> Overtaking:
    """Predict the tokens from which scratch is better than pruned.

    Args:
        scratch: Fitted law of models trained from scratch.
        pruned: Fitted law of pruned models.
        head_start: Tokens that scratch gets in addition: the parent's, for a comparison at equal total tokens.
        scratch_at: The model trained from scratch, for laws over several models.
        pruned_at: The pruned model, for laws over several models.

    Raises:
        UserError: the head start is negative or infinite, or the two have different tokenizers.
    """
    check_tokenizers([*scratch.series, *pruned.series])
    if not 0 <= head_start < math.inf:
        raise UserError(f"A head start of {head_start:g} tokens makes no sense; give 0 or more.")
    low = max(scratch.range[0], pruned.range[0])
    horizon = _FARTHEST * min(scratch.range[1], pruned.range[1])
    best = curve_of(scratch, scratch_at).overtakes(curve_of(pruned, pruned_at), low, horizon, head_start)
    # Fits with the same seed used the same random numbers, so only draws with different indices are independent.
    of_scratch, of_pruned = _drawn(scratch, scratch_at), _drawn(pruned, pruned_at)
    pairs = zip(of_scratch, [*of_pruned[1:], of_pruned[0]], strict=False)
    drawn = [curve.overtakes(other, low, horizon, head_start) for curve, other in pairs]
    share = sum(tokens is not None for tokens in drawn) / len(drawn)
    tokens = None
    if best is not None:
        tokens = _estimate(best, np.array([math.inf if count is None else count for count in drawn]))
    return Overtaking(tokens, share, low, horizon)


def extrapolation(fit: Fit, tokens: float, at: Conditions | None = None) -> list[str]:
    """Return warnings if a question lies outside the range of the fit."""
    warnings = []
    low, high = fit.range
    if not low <= tokens <= high:
        warnings.append(f"{tokens:,.0f} tokens are outside the fitted {low:,.0f} to {high:,.0f}")
    for name, asked in (at or Conditions())._asdict().items():
        seen = [getattr(series.conditions, name) for series in fit.series]
        if np.isfinite(asked) and np.isfinite(seen).all() and not 0.99 * min(seen) <= asked <= 1.01 * max(seen):
            what = name.replace("_", " ")
            warnings.append(f"{what} {asked:,.4g} is outside the fitted {min(seen):,.4g} to {max(seen):,.4g}")
    return warnings


def curve_of(fit: Fit, at: Conditions | None = None) -> Curve:
    """Return the fitted curve of a model.

    Raises:
        UserError: ``at`` lacks what the law needs to know about the model.
    """
    return _curve(fit, fit.values, at)


def _curve(fit: Fit, values: list[float], at: Conditions | None) -> Curve:
    curve = fit.law.curve(values, at or Conditions())
    if not np.isfinite([curve.floor, curve.scale]).all():
        needed = "the parent's parameters and loss, and the ratio" if fit.form == "p2" else "the model's parameters"
        raise UserError(f"The {fit.form} law needs to know {needed}; give them.")
    return curve


def _drawn(fit: Fit, at: Conditions | None) -> list[Curve]:
    return [_curve(fit, values, at) for values in fit.draws]


def _of_curve(fit: Fit, at: Conditions | None, ask: Callable[[Curve], float]) -> Prediction:
    return _estimate(ask(curve_of(fit, at)), np.array([ask(curve) for curve in _drawn(fit, at)]))


def _estimate(value: float, draws: Array) -> Prediction:
    low, high = confidence_interval(draws)
    return Prediction(value, float(low), float(high))
