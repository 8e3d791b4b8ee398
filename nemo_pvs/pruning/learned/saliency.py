"""Saliency of the minimal groups of EfficientLLM (2502.06663): what the loss changes by when a group goes.

A minimal group is a unit of ``unit_space`` with every weight in its rows and columns: matrices, norms, biases. With
all of them zero the loss changes, to second order and with a diagonal Hessian h, by ``-sum w g + 1/2 sum h w^2``. The
paper has no code; where it is silent this is our reading, and an option:

- Its attention groups are heads. Ours are KV groups with their query heads, for a head cannot leave its group.
- h is not said. Here it is the Gauss-Newton estimate ``n g^2`` from the mean gradient g of n tokens, as in Sophia
  (2305.14342), which is exact in expectation where the gradients of tokens are independent; so ``h w^2 = n (w g)^2``
  and one product of weights and gradients is all that a step costs.
- Groups of all kinds are compared by saliency ``per_parameter``, or else what can go at a time by all of it, so that
  FFN channels go long before a head; by its absolute value, unless it is to be ``signed``.
- Accumulated means an exponential average over steps.
- What goes at a time is one KV group, one hidden channel, or as many FFN channels as asked; ``uniform`` takes as many
  from every layer, and leaves an even model such as those that the paper has published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.learned.removal_rules import RemovalRules, kinds, unit_parameters
from nemo_pvs.pruning.learned.unit_space import UnitSpace


@dataclass(frozen=True)
class Removal:
    """Units that go together."""

    kind: str
    """hidden, groups or ffn."""
    units: torch.Tensor
    """Places in the vector of units, int64, ascending."""
    parameters: int
    """That go with them."""
    saliency: float
    """Of all of them together, per parameter if they are compared so."""


def add_terms(totals: torch.Tensor, product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add what the weights of a matrix contribute to the sums of their units; the product is overwritten.

    Args:
        totals: float64 [2, size]: for every unit the sums of ``w g`` and of ``(w g)^2``.
        product: Weights times gradients [r, c].
        rows: Unit of each row [r].
        columns: Unit of each column [c].
    """
    for total in totals:
        total.index_add_(0, rows, product.sum(1, dtype=totals.dtype))
        total.index_add_(0, columns, product.sum(0, dtype=totals.dtype))
        product.square_()


def saliency(first: torch.Tensor, second: torch.Tensor, *, signed: bool = False) -> torch.Tensor:
    """Return the estimated change of the loss without each unit: ``|-first + second / 2|``.

    Args:
        first: The sums of ``w g``.
        second: The sums of ``h w^2``.
        signed: Without the absolute value: a unit without which the loss is expected to fall goes first.
    """
    change = second / 2 - first
    return change if signed else change.abs()


def next_removal(scores: torch.Tensor, kept: torch.Tensor, space: UnitSpace, rules: RemovalRules) -> Removal:
    """Return what goes next: of all kinds (and layers) the units of least saliency, per parameter or in all.

    Ties go to hidden channels before KV groups before FFN channels, to the first layer and to the lowest index.

    Args:
        scores: Saliency of the units [size].
        kept: Which are still there, bool [size].
        space: Of the model.
        rules: What may go.

    Raises:
        UserError: nothing may go, the target is not reached.
    """
    found = min(_candidates(scores, kept, space, rules), key=lambda removal: removal.saliency, default=None)
    if found is None:
        shape = space.kept_shape(kept)
        raise UserError(
            f"Nothing more can be removed from [{shape}] without pruning a layer to nothing, but {rules.parameters:,} "
            "parameters were asked for; ask for more of them, or let less go at once."
        )
    return found


def _candidates(scores: torch.Tensor, kept: torch.Tensor, space: UnitSpace, rules: RemovalRules) -> Iterator[Removal]:
    costs = unit_parameters(space.kept_shape(kept), space.shape)
    places = torch.arange(space.size, device=scores.device)
    for kind, at_once, least in kinds(rules):
        part = getattr(space, kind)
        matrices = [part(vector).view(-1, part(vector).shape[-1]) for vector in (scores, kept, places)]
        parameters = at_once * costs[kind]
        rows: list[tuple[float, torch.Tensor]] = []
        for own, there, units in zip(*matrices, strict=True):
            left = units[there]
            if len(left) - at_once >= least:
                lowest = own[there].sort(stable=True)
                rows.append((float(lowest.values[:at_once].sum()), left[lowest.indices[:at_once]]))
        if rules.uniform and len(rows) == len(matrices[0]):
            together = torch.cat([units for _, units in rows])
            rows = [(sum(score for score, _ in rows), together)]
            parameters *= len(matrices[0])
        elif rules.uniform:
            continue
        for score, units in rows:
            compared = score / parameters if rules.per_parameter else score
            yield Removal(kind, units.sort().values, parameters, compared)
