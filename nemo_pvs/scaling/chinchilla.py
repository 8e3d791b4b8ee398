"""The law of training from scratch (Hoffmann et al., arXiv 2203.15556, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import BILLION, Curve
from nemo_pvs.scaling.law import Bounds
from nemo_pvs.scaling.series import Conditions, LossSeries


class Chinchilla:
    """L = E + A / N^alpha + B / D^beta with the model's parameters N and its training tokens D, both in billions."""

    name = "chinchilla"
    exponents: tuple[Bounds, ...] = (Bounds("alpha", 0.02, 2.0), Bounds("beta", 0.02, 2.0))
    coefficients: tuple[str, ...] = ("E", "A", "B")
    of_tokens = "B"

    def curve(self, values: Sequence[float], at: Conditions) -> Curve:
        """Return the loss curve of a model, given its number of parameters."""
        alpha, beta, floor, a, b = values
        return Curve(floor + a * (at.parameters / BILLION) ** -alpha, b, beta)

    def check(self, series: Sequence[LossSeries]) -> list[str]:
        """Check that the series have at least two sizes and one kind of initialisation.

        Raises:
            UserError: they do not.
        """
        sizes = {run.parameters for run in series}
        if len(sizes) < 2:
            raise UserError(
                "The Chinchilla law needs models of at least 2 sizes, and there is 1; add runs or use --form per-run."
            )
        initialisations = {run.initialisation for run in series}
        if len(initialisations) > 1:
            raise UserError(
                "The Chinchilla law has no term for the start of training, and these are pruned and random; "
                "choose one of them with --initialisation."
            )
        warnings = ["2 sizes do not tell A, alpha and E apart; only their sum means something"]
        return warnings if len(sizes) < 3 else []
