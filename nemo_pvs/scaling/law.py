"""The interface of a scaling law: exponents within bounds, non-negative coefficients, and a curve for a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from nemo_pvs.scaling.series import Conditions

if TYPE_CHECKING:
    from nemo_pvs.scaling.curve import Curve
    from nemo_pvs.scaling.series import LossSeries


class Bounds(NamedTuple):
    """An exponent and the range in which it is fitted."""

    name: str
    low: float
    high: float


class Law(Protocol):
    """A law that is linear in its coefficients for given exponents; the fit relies on that."""

    name: str
    exponents: tuple[Bounds, ...]
    coefficients: tuple[str, ...]
    of_tokens: str
    """The coefficient of D^-beta."""

    def curve(self, values: Sequence[float], at: Conditions) -> Curve:
        """Return the loss curve of a model.

        Args:
            values: Exponents, then coefficients.
            at: The model; arrays give a curve of arrays.
        """
        ...

    def check(self, series: Sequence[LossSeries]) -> list[str]:
        """Return warnings about series outside the range in which the law was validated.

        Raises:
            UserError: the series cannot identify the law's parameters.
        """
        ...


def names(law: Law) -> tuple[str, ...]:
    """Return the names of a law's parameters, exponents first."""
    return (*(bounds.name for bounds in law.exponents), *law.coefficients)
