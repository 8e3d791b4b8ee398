"""Saliency of the minimal groups of EfficientLLM (2502.06663): the change of the loss when a group is removed.

A minimal group is a unit of ``unit_space`` with every weight in its rows and columns: matrices, norms, biases. Setting
them to zero changes the loss, to second order and with a diagonal Hessian h, by ``-sum w g + 1/2 sum h w^2``. The
paper has no code; where it leaves a choice open, we make one and often offer an option:

- Its attention groups are heads. Ours are KV groups with their query heads, because a head cannot leave its group.
- It does not define h. We use the Gauss-Newton estimate ``n g^2`` from the mean gradient g of n tokens, as in Sophia
  (2305.14342), which is exact in expectation if the gradients of tokens are independent; so ``h w^2 = n (w g)^2``, and
  a step costs only one product of weights and gradients.
- Groups of all kinds are compared by saliency ``per_parameter``, or else by the total saliency of what is removed at a
  time, by which FFN channels are removed long before a head. The absolute value counts, unless ``signed``.
- "Accumulated" saliency is an exponential average over steps.
- One KV group, one hidden channel, or a given number of FFN channels is removed at a time; ``uniform`` removes the
  same number from every layer and leaves an even model, like those that the paper has published.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.learned.removal_rules import RemovalRules, unit_kinds, unit_parameters
from nemo_pvs.pruning.learned.unit_space import UnitSpace


@dataclass(frozen=True)
class Removal:
    """Units that are removed together."""

    kind: str
    """hidden, groups or ffn."""
    units: torch.Tensor
    """Indices into the vector of units, int64, ascending."""
    parameters: int
    """Number of parameters that they have."""
    saliency: float
    """Total saliency of the units, divided by ``parameters`` if the rules compare per parameter."""


def add_terms(totals: torch.Tensor, product: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Add a matrix's contribution to the sums of its units, in place; ``product`` is overwritten.

    Args:
        totals: Every unit's sums of ``w g`` and of ``(w g)^2``, float64 [2, size].
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
        first: Sums of ``w g`` [size].
        second: Sums of ``h w^2`` [size].
        signed: Omit the absolute value: units whose removal is expected to lower the loss are removed first.
    """
    change = second / 2 - first
    return change if signed else change.abs()


def next_removal(scores: torch.Tensor, kept: torch.Tensor, space: UnitSpace, rules: RemovalRules) -> Removal:
    """Choose the next removal: the units of least saliency, per parameter or in total, of all kinds and layers.

    Ties go to hidden channels before KV groups before FFN channels, to the first layer and to the lowest index.

    Args:
        scores: Saliency of the units [size].
        kept: Units not removed yet, bool [size].
        space: Unit space of the model.
        rules: What may be removed.

    Raises:
        UserError: nothing more may be removed, although the target is not reached.
    """
    removal = min(_candidates(scores, kept, space, rules), key=lambda candidate: candidate.saliency, default=None)
    if removal is None:
        shape = space.kept_shape(kept)
        raise UserError(
            f"Nothing more can be removed from [{shape}] without pruning a layer to nothing, but the target is "
            f"{rules.parameters:,} parameters; choose a larger target, or remove fewer units at once."
        )
    return removal


def _candidates(scores: torch.Tensor, kept: torch.Tensor, space: UnitSpace, rules: RemovalRules) -> Iterator[Removal]:
    costs = unit_parameters(space.kept_shape(kept), space.shape)
    indices = torch.arange(space.size, device=scores.device)
    for kind, at_once, least in unit_kinds(rules):
        part = getattr(space, kind)
        matrices = [part(vector).view(-1, part(vector).shape[-1]) for vector in (scores, kept, indices)]
        parameters = at_once * costs[kind]
        rows: list[tuple[float, torch.Tensor]] = []
        for row_scores, row_kept, units in zip(*matrices, strict=True):
            left = units[row_kept]
            if len(left) - at_once >= least:
                lowest = row_scores[row_kept].sort(stable=True)
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
