"""A loss curve L(D) = floor + scale * D^-exponent: the form of every law for one model, and derived quantities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

_GRID_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """Loss in nats per token after D tokens; D is in billions in the formula, in tokens in every argument."""

    floor: Values
    """The loss in the limit of infinitely many tokens."""
    scale: Values
    """The excess over the floor after a billion tokens."""
    exponent: Values

    def loss(self, tokens: Values) -> Values:
        """Return the loss after ``tokens`` tokens."""
        return self.floor + self.scale * (np.asarray(tokens) / BILLION) ** -self.exponent

    def slope(self, tokens: Values) -> Values:
        """Return dL/dD in nats per billion tokens; negative."""
        return -self.exponent * self.scale * (np.asarray(tokens) / BILLION) ** (-self.exponent - 1)

    def tokens_to(self, loss: float) -> float:
        """Return the tokens after which the loss is reached; infinite if it is not above the floor.

        D = (scale / (loss - floor))^(1 / exponent).
        """
        above = loss - float(self.floor)
        if above <= 0:
            return math.inf
        return BILLION * _power(float(self.scale) / above, 1 / float(self.exponent))

    def tokens_at_gain(self, gain: float) -> float:
        """Return the tokens after which another billion gains less than ``gain`` nats: where -dL/dD equals ``gain``.

        D = (exponent * scale / gain)^(1 / (exponent + 1)).
        """
        exponent = float(self.exponent)
        return BILLION * _power(exponent * float(self.scale) / gain, 1 / (exponent + 1))

    def overtakes(self, other: Curve, low: float, high: float, head_start: float = 0.0) -> float | None:
        """Return the tokens from which this curve stays below another up to ``high``.

        Args:
            other: The curve to overtake.
            low: Lower bound of the search, in tokens.
            high: Upper bound of the search, in tokens.
            head_start: Tokens that this model sees in addition, to account for the other's ancestors.

        Returns:
            ``low`` if this curve is below from there on; None if it is not below at ``high``.
        """

        def lead(log_tokens: Values) -> Values:
            tokens = np.exp(log_tokens)
            return other.loss(tokens) - self.loss(tokens + head_start)

        grid = np.linspace(math.log(low), math.log(high), _GRID_POINTS)
        behind = np.flatnonzero(lead(grid) <= 0)
        if not len(behind):
            return low
        last = int(behind[-1])
        if last == len(grid) - 1:
            return None
        return float(np.exp(brentq(lead, grid[last], grid[last + 1])))


def _power(base: float, exponent: float) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf


Values = Any
"""A float, or a float64 array with one entry per point."""


BILLION = 1e9
"""The unit of parameters and tokens in every formula, so that coefficients are of the order of losses."""
