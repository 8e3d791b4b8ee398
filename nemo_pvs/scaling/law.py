"""What a scaling law is to the fit: exponents within bounds, coefficients of 0 or more, and a curve for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nemo_pvs.scaling.series import Conditions

if TYPE_CHECKING:
    from nemo_pvs.scaling.curve import Curve
    from nemo_pvs.scaling.series import Series


class Bounds(NamedTuple):
    """An exponent and where the fit looks for it."""

    name: str
    low: float
    high: float


class Law(Protocol):
    """A law is linear in its coefficients once its exponents are given: that is where the fit starts from."""

    name: str
    exponents: tuple[Bounds, ...]
    coefficients: tuple[str, ...]
    of_tokens: str
    """The coefficient of D^-beta."""

    def curve(self, values: Sequence[float], at: Conditions) -> Curve:
        """Return the loss curve of a model.

        Args:
            values: exponents, then coefficients.
            at: the model; arrays give a curve of arrays.
        """
        ...

    def check(self, series: Sequence[Series]) -> list[str]:
        """Return warnings where the series lie outside what the law was validated on.

        Raises:
            UserError: the series cannot identify the law's parameters.
        """
        ...


def names(law: Law) -> tuple[str, ...]:
    """Return the names of a law's parameters, exponents first."""
    return (*(bounds.name for bounds in law.exponents), *law.coefficients)
