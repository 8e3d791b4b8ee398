"""What a fitted law says about losses and tokens, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.estimate import Array
from nemo_pvs.scaling.fit import Fit, interval
from nemo_pvs.scaling.series import Conditions

_FARTHEST = 10.0
"""Times the most tokens of a fit: nothing is predicted beyond."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; infinite where a loss is never reached."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Overtaking:
    """The tokens from which scratch is better than pruned."""

    tokens: Estimate | None
    """None where it never is, up to ``horizon``."""
    share: float
    """Of the draws in which it is, up to ``horizon``."""
    low: float
    """Tokens from which on the curves were compared: where both were measured."""
    horizon: float
    """Tokens up to which the curves were compared."""


def loss_at(fit: Fit, tokens: float, at: Conditions | None = None) -> Estimate:
    """Return the loss after so many tokens; the interval is for a measurement, its scatter included.

    Args:
        fit: the law.
        tokens: training tokens.
        at: the model, for laws over several; None for a fit of one run.

    Raises:
        UserError: the tokens are too far beyond those of the fit, or the model is not given.
    """
    most = fit.range[1]
    if not 0 < tokens <= _FARTHEST * most:
        raise UserError(
            f"A loss after {tokens:,.0f} tokens is out of reach of a fit of up to {most:,.0f}; "
            f"ask for at most {_FARTHEST:.0f} times as many, or train further."
        )
    generator = np.random.default_rng([0, 1])  # whatever the fit's seed was, its stream was another
    draws = np.array([curve.loss(tokens) for curve in _drawn(fit, at)])
    noisy = draws * np.exp(np.array(fit.noise) * generator.standard_normal(len(draws)))
    return _estimate(float(curve_of(fit, at).loss(tokens)), noisy)


def tokens_to(fit: Fit, loss: float, at: Conditions | None = None) -> Estimate:
    """Return the tokens to a target loss; infinite where the law never gets there.

    Raises:
        UserError: it is no loss.
    """
    if not 0 < loss < math.inf:
        raise UserError(f"A target loss of {loss:g} makes no sense; give nats per token above 0.")
    return _of_curve(fit, at, lambda curve: curve.tokens_to(loss))


def tokens_at_gain(fit: Fit, gain: float, at: Conditions | None = None) -> Estimate:
    """Return the tokens from which another billion gains less than ``gain`` nats.

    Raises:
        UserError: the gain is not positive.
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
    """Return the tokens from which scratch is better than pruned.

    Args:
        scratch: law of models trained from scratch.
        pruned: law of pruned models.
        head_start: tokens that scratch gets in addition: the parent's, for a comparison at equal total tokens.
        scratch_at: the model trained from scratch, for laws over several.
        pruned_at: the pruned model.

    Raises:
        UserError: the head start is no number of tokens.
    """
    if not 0 <= head_start < math.inf:
        raise UserError(f"A head start of {head_start:g} tokens makes no sense; give 0 or more.")
    low = max(scratch.range[0], pruned.range[0])
    horizon = _FARTHEST * min(scratch.range[1], pruned.range[1])
    best = curve_of(scratch, scratch_at).overtakes(curve_of(pruned, pruned_at), low, horizon, head_start)
    # Fits of the same seed were drawn from the same random numbers: only draws of different places are independent.
    of_scratch, of_pruned = _drawn(scratch, scratch_at), _drawn(pruned, pruned_at)
    pairs = zip(of_scratch, [*of_pruned[1:], of_pruned[0]], strict=False)
    drawn = [one.overtakes(other, low, horizon, head_start) for one, other in pairs]
    share = sum(tokens is not None for tokens in drawn) / len(drawn)
    tokens = None
    if best is not None:
        tokens = _estimate(best, np.array([math.inf if one is None else one for one in drawn]))
    return Overtaking(tokens, share, low, horizon)


def extrapolation(fit: Fit, tokens: float, at: Conditions | None = None) -> list[str]:
    """Return warnings where a question lies outside what the law was fitted to."""
    warnings = []
    low, high = fit.range
    if not low <= tokens <= high:
        warnings.append(f"{tokens:,.0f} tokens are outside the fitted {low:,.0f} to {high:,.0f}")
    for name, asked in (at or Conditions())._asdict().items():
        seen = [getattr(one.conditions, name) for one in fit.series]
        if np.isfinite(asked) and np.isfinite(seen).all() and not 0.99 * min(seen) <= asked <= 1.01 * max(seen):
            what = name.replace("_", " ")
            warnings.append(f"{what} {asked:,.4g} is outside the fitted {min(seen):,.4g} to {max(seen):,.4g}")
    return warnings


def curve_of(fit: Fit, at: Conditions | None = None) -> Curve:
    """Return the fitted curve of a model.

    Raises:
        UserError: the law needs to know more about the model.
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


def _of_curve(fit: Fit, at: Conditions | None, ask: Callable[[Curve], float]) -> Estimate:
    return _estimate(ask(curve_of(fit, at)), np.array([ask(curve) for curve in _drawn(fit, at)]))


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = interval(draws)
    return Estimate(value, float(low), float(high))
