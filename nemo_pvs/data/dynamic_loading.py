"""Dynamic batch loading: more text from domains whose loss lags (Sheared LLaMA, arXiv 2310.06694, section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nemo_pvs.errors import UserError

_EXPONENTS = np.linspace(0.01, 1.0, 1000)


def update_proportions(
    proportions: Sequence[float],
    losses: Sequence[float],
    targets: Sequence[float],
    *,
    rate: float = 1.0,
    smoothing: float = 1e-4,
    clip: bool = False,
) -> list[float]:
    """Return the domains' shares of the batches until the next validation.

    The exponentiated gradient step of DoReMi (arXiv 2305.10429): ``a = softmax(log p + rate (l - l*))``, and then
    ``(1 - c) a + c / K``.

    Args:
        proportions: Current shares p of the K domains, which add up to 1.
        losses: Current validation loss l of each domain, in nats per token.
        targets: Target loss l* of each domain: that of a model of the target's size (``reference_losses``).
        rate: Step size.
        smoothing: c; no share falls below c / K.
        clip: Treat a domain whose loss is below its target as if it were at the target, as in the paper's algorithm 1;
            the published code does not, so by default the shares of such domains fall.

    Raises:
        UserError: the lists differ in length, a share is not positive, or a loss is not finite.
    """
    shares, excess = np.asarray(proportions, float), np.asarray(losses, float) - np.asarray(targets, float)
    if not len(shares) == len(losses) == len(targets):
        raise UserError(
            f"{len(shares)} shares, {len(losses)} losses and {len(targets)} targets do not match; give one of each "
            "per domain."
        )
    if not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"The domains' shares are {', '.join(f'{share:g}' for share in shares)}; each must be above 0, and all "
            "must add up to 1. Leave out a domain without data."
        )
    if not np.isfinite(excess).all():
        domain = int(np.flatnonzero(~np.isfinite(excess))[0])
        raise UserError(f"Domain {domain} has no validation loss; give it validation text, or leave it out.")
    scaled = np.log(shares) + rate * (np.maximum(excess, 0) if clip else excess)
    weights = np.exp(scaled - scaled.max())
    smoothed = (1 - smoothing) * weights / weights.sum() + smoothing / len(shares)
    return [float(share) for share in smoothed / smoothed.sum()]


def reference_losses(
    parameters: Sequence[float], losses: Sequence[Sequence[float]], target_parameters: float
) -> list[float]:
    """Predict each domain's loss for a model size from models of the same family with other sizes.

    Fits ``E + A / N^alpha`` for each domain by least squares with E and A of 0 or more, like the published targets
    (from three sizes of the parent's family).

    Args:
        parameters: Parameter counts N of the models, at least three.
        losses: [models, domains], in nats per token.
        target_parameters: The parameter count to predict for.

    Raises:
        UserError: there are fewer than three models of different sizes, or a loss is missing.
    """
    sizes, measured = np.asarray(parameters, float), np.asarray(losses, float)
    if len(sizes) < 3 or len(set(parameters)) < 3:
        raise UserError(
            f"Reference losses are fitted to three or more models of different sizes, not {len(sizes)}; give more."
        )
    if measured.ndim != 2 or len(measured) != len(sizes):
        raise UserError(f"{len(sizes)} models need one row of losses each, not an array of {measured.shape}.")
    scale = np.exp(np.log(sizes).mean())
    return [_extrapolate(sizes / scale, column, target_parameters / scale) for column in measured.T]


def _extrapolate(sizes: NDArray[np.float64], losses: NDArray[np.float64], wanted: float) -> float:
    best = (np.inf, float(losses.mean()))
    for exponent in _EXPONENTS:
        falling = sizes**-exponent
        slope, floor = np.polyfit(falling, losses, 1)
        if floor < 0:
            floor, slope = 0.0, float(falling @ losses / (falling @ falling))
        error = float(((floor + slope * falling - losses) ** 2).sum())
        if slope >= 0 and error < best[0]:
            best = (error, float(floor + slope * wanted**-exponent))
    return best[1]
