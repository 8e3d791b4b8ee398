"""Group Taylor importance: the estimated change of the loss without a unit (LLM-Pruner, 2305.11627, section 3.2).

A unit is a KV group (its query heads' rows of ``q_proj`` and columns of ``o_proj``, its rows of ``k_proj`` and
``v_proj``), a query head (its rows of ``q_proj`` and columns of ``o_proj``) or an FFN channel (a row of ``gate_proj``
and of ``up_proj``, a column of ``down_proj``). Its score is the sum over all its weights, or over its rows and columns
for ``vectorize``. Biases and norms are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "param_first": lambda weight, gradient, _, across: _sum((weight * gradient).abs_(), across),
    "param_second": lambda weight, _, square, across: _sum(weight.square().mul_(square), across),
    "param_mix": lambda weight, gradient, square, across: _sum(
        (weight * gradient).sub_(weight.square().mul_(square), alpha=0.5).abs_(), across
    ),
    "vectorize": lambda weight, gradient, _, across: _sum(weight * gradient, across).abs_(),
}
"""Score of each row or column of a matrix W from its gradient g and the mean over sequences of the squared gradient, a
(the diagonal of the Fisher information, which approximates the second derivative), all [outputs, inputs]:
``sum |W g|``, ``sum W^2 a``, ``sum |W g - W^2 a / 2|`` and ``|sum W g|``, along the other axis. The names are
LLM-Pruner's."""


class Matrix(NamedTuple):
    """A weight of a decoder layer and its gradients, each [outputs, inputs] and at least fp32."""

    axes: tuple[str, ...]
    """Layout axes of outputs and inputs: one is hidden and the other query, key or ffn."""
    weight: torch.Tensor
    gradient: torch.Tensor
    """Gradient of the mean loss over all sequences and ranks."""
    square: torch.Tensor
    """Mean over sequences of the squared gradient of each sequence's loss."""


def unit_scores(matrices: Iterable[Matrix], kv_groups: int, heads: int) -> dict[str, torch.Tensor]:
    """Return the score of each unit of a layer under each metric.

    A group's heads are contiguous, as in transformers (``repeat_kv``) and Megatron; LLM-Pruner's script instead adds
    query head j to the KV head j modulo their number, which belongs to another group.

    Args:
        matrices: Matrices of one layer, read one at a time.
        kv_groups: Number of KV groups of the layer.
        heads: Number of its query heads.

    Returns:
        ``groups.<metric>`` [G], ``heads.<metric>`` [H] and ``ffn.<metric>`` [f], float64 on the CPU.
    """
    scores: dict[str, torch.Tensor] = {}
    for axes, weight, gradient, square in matrices:
        unit = 1 - axes.index("hidden")
        for metric, score in METRICS.items():
            channels = score(weight, gradient, square, 1 - unit).cpu()
            if axes[unit] == "ffn":
                _add(scores, f"ffn.{metric}", channels)
            else:
                _add(scores, f"groups.{metric}", channels.unflatten(0, (kv_groups, -1)).sum(dim=1))
            if axes[unit] == "query":
                _add(scores, f"heads.{metric}", channels.unflatten(0, (heads, -1)).sum(dim=1))
    return scores


def _add(scores: dict[str, torch.Tensor], name: str, summand: torch.Tensor) -> None:
    scores[name] = scores[name] + summand if name in scores else summand


def _sum(terms: torch.Tensor, axis: int) -> torch.Tensor:
    return terms.sum(dim=axis, dtype=torch.float64)
