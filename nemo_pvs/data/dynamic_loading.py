"""Dynamic batch loading: more text of domains whose loss is behind (Sheared LLaMA, arXiv 2310.06694, section 2.2)."""

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
        proportions: Shares so far, which add up to 1.
        losses: Validation loss of each domain now, nats per token.
        targets: What the loss of each domain should be: that of a model of the target's size, ``reference_losses``.
        rate: Of the step.
        smoothing: c; no share falls below c / K for long.
        clip: Take a domain that is ahead for one that is where it should be, as the paper's algorithm 1 does; the
            published code does not, so by default shares of such domains fall.

    Raises:
        UserError: the numbers are not those of the same domains, or a domain has no share.
    """
    shares, behind = np.asarray(proportions, float), np.asarray(losses, float) - np.asarray(targets, float)
    if not len(shares) == len(losses) == len(targets):
        raise UserError(
            f"{len(shares)} shares, {len(losses)} losses and {len(targets)} targets are not those of the same domains."
        )
    if not (shares > 0).all() or abs(shares.sum() - 1) > 1e-6:
        raise UserError(
            f"The domains' shares are {', '.join(f'{share:g}' for share in shares)}; each must be above 0, and all "
            "must add up to 1. Leave out a domain without data."
        )
    if not np.isfinite(behind).all():
        place = int(np.flatnonzero(~np.isfinite(behind))[0])
        raise UserError(f"Domain {place} has no validation loss; give it validation text, or leave it out.")
    scaled = np.log(shares) + rate * (np.maximum(behind, 0) if clip else behind)
    weights = np.exp(scaled - scaled.max())
    smoothed = (1 - smoothing) * weights / weights.sum() + smoothing / len(shares)
    return [float(share) for share in smoothed / smoothed.sum()]


def reference_losses(
    parameters: Sequence[float], losses: Sequence[Sequence[float]], target_parameters: float
) -> list[float]:
    """Return what each domain's loss should be at a size, from a family's models of other sizes.

    Fits ``E + A / N^alpha`` for each domain by least squares, as the published targets were made (three sizes of the
    parent's family), with E and A not below 0.

    Args:
        parameters: Sizes of the models, three or more.
        losses: Of each model, by domain: nats per token.
        target_parameters: The size wanted.

    Raises:
        UserError: there are fewer than three models, or not a loss for each model and domain.
    """
    sizes, measured = np.asarray(parameters, float), np.asarray(losses, float)
    if len(sizes) < 3 or len(set(parameters)) < 3:
        raise UserError(f"Reference losses are fitted to three models or more of different sizes, not {len(sizes)}.")
    if measured.ndim != 2 or len(measured) != len(sizes):
        raise UserError(f"{len(sizes)} models need as many rows of losses, not an array of {measured.shape}.")
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
