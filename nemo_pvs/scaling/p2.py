"""The P2 law of post-training after pruning (Chen et al., arXiv 2411.10272)."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pvs.errors import UserError
from nemo_pvs.scaling.curve import BILLION, Curve
from nemo_pvs.scaling.law import Bounds
from nemo_pvs.scaling.series import Conditions, LossSeries

_LARGEST_RATIO = 0.35
_MOST_TOKENS = 1e9


class P2:
    """L = L0 + rho^-gamma * N0^-delta * (N_C / N0^alpha + D_C / D^beta + E).

    N0 is the parent's parameters and D the training tokens, both in billions, rho the pruning rate and L0 the parent's
    loss. The loss rises with rho only if gamma is negative, so gamma is fitted in that range. The paper fitted parents
    of 0.5 to 8 B parameters at rates of 0.15 to 0.35 over at most a billion tokens; it published no constants.
    """

    name = "p2"
    exponents: tuple[Bounds, ...] = (
        Bounds("gamma", -4.0, 0.0),
        Bounds("delta", -1.0, 2.0),
        Bounds("alpha", 0.0, 2.0),
        Bounds("beta", 0.02, 2.0),
    )
    coefficients: tuple[str, ...] = ("N_C", "D_C", "E")
    of_tokens = "D_C"

    def curve(self, values: Sequence[float], at: Conditions) -> Curve:
        """Return the loss curve of a pruned model, given the parent's parameters and loss, and the ratio."""
        gamma, delta, alpha, beta, n_c, d_c, floor = values
        size = at.parent_parameters / BILLION
        factor = at.ratio**-gamma * size**-delta
        return Curve(at.parent_loss + factor * (n_c * size**-alpha + floor), factor * d_c, beta)

    def check(self, series: Sequence[LossSeries]) -> list[str]:
        """Check that the series have at least two parents and two ratios; warn beyond the paper's ratios and tokens.

        Raises:
            UserError: a series is not of a model smaller than its parent, or there are too few parents or ratios.
        """
        for run in series:
            if run.initialisation != "pruned" or run.parent_parameters is None or run.parent_loss is None:
                raise UserError(
                    f"{run.name} cannot be fitted by the P2 law, which needs a pruned model and its parent's "
                    "parameters and loss; leave it out or use --form chinchilla or per-run."
                )
            if not run.ratio or run.ratio < 0:
                raise UserError(
                    f"{run.name} has {run.parameters:,} parameters and its parent {run.parent_parameters:,}, so "
                    "nothing was pruned that the P2 law could describe; leave it out or use --form per-run."
                )
        parents = {run.parent_parameters for run in series}
        ratios = {round(run.ratio or 0, 2) for run in series}
        if len(parents) < 2 or len(ratios) < 2:
            raise UserError(
                f"The P2 law needs at least 2 parents and 2 ratios, and there are {len(parents)} and {len(ratios)}; "
                "add runs or use --form per-run."
            )
        warnings = []
        if max(ratios) > _LARGEST_RATIO:
            warnings.append(
                f"ratios up to {max(ratios):.2f} are beyond the {_LARGEST_RATIO} up to which the P2 law was validated"
            )
        most = max(max(run.tokens) for run in series)
        if most > _MOST_TOKENS:
            warnings.append(f"{most / BILLION:.3g} B tokens are beyond the 1 B up to which the P2 law was validated")
        if len(parents) < 3:
            warnings.append("2 parents do not tell N_C, alpha and E apart; only their sum means something")
        return warnings
