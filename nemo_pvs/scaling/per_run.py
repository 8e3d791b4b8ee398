"""The law of a single run: the P2 law reduced to one model and one ratio."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.scaling.curve import Curve
from nemo_pvs.scaling.law import Bounds
from nemo_pvs.scaling.series import Conditions, LossSeries


class PerRun:
    """L = E + B / D^beta with D in billions of tokens; independent of sizes and ratios."""

    name = "per-run"
    exponents: tuple[Bounds, ...] = (Bounds("beta", 0.02, 2.0),)
    coefficients: tuple[str, ...] = ("E", "B")
    of_tokens = "B"

    def curve(self, values: Sequence[float], at: Conditions) -> Curve:
        """Return the run's loss curve; ``at`` is not used."""
        beta, floor, scale = values
        return Curve(floor, scale, beta)

    def check(self, series: Sequence[LossSeries]) -> list[str]:
        """Accept any series."""
        return []
