"""Width pruning: keep the most active hidden and FFN channels, KV groups and query heads (Minitron, 2407.14679)."""

from __future__ import annotations

import torch

from nemo_pvs.calibration.engine import AGGREGATIONS
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan


def plan_width(scores: Scores, target: Shape, aggregation: str = "energy") -> Plan:
    """Choose the channels, KV groups and query heads to keep.

    Hidden channels are chosen once for the whole model, FFN channels, query heads and KV groups layer by layer. Every
    kept group keeps its ``target.heads / target.kv_groups`` most important query heads, as in ModelOpt (since 0.41,
    which keeps all groups); a group's importance is the sum over the heads that it would keep. Counts are exact, and
    ties go to the lower index. Kept units stay in their original order, which computes the same function as the order
    of importance that llm-pruning-collection and ModelOpt use, and keeps checkpoints comparable.

    The importance of a query head is the norm of its output ``x_nt`` [h], the head's channels at the input of
    ``o_proj``, for sequences n and tokens t. With ``energy`` it is ``sum_nt |x_nt|^2``, the square of the L2 norm over
    everything. With ``meanabs_l2`` it is ``sqrt(sum_c sum_n (mean_t |x_ntc|)^2)``, as in ModelOpt's
    ``mcore_minitron``: the mean over tokens first, then the L2 norm over sequences and channels c. The paper takes the
    norm over channels first.

    Args:
        scores: Result of ``calibrate``.
        target: The Shape to reach, with as many layers as the parent.
        aggregation: ``energy`` (llm-pruning-collection, the paper's runs) or ``meanabs_l2`` (ModelOpt).

    Raises:
        UserError: the aggregation is unknown, or the target differs in more than width.
    """
    if aggregation not in AGGREGATIONS:
        raise UserError(f"Unknown aggregation {aggregation!r}; choose {' or '.join(AGGREGATIONS)}.")
    parent = scores.shape
    if target.layers != parent.layers:
        raise UserError(
            f"Width pruning keeps all {parent.layers} layers, but the target has {target.layers}; "
            "remove layers with depth pruning in a separate step."
        )
    hidden = scores.tensors[f"hidden.{aggregation}"]
    ffn = scores.tensors[f"ffn.{aggregation}"]
    heads = scores.tensors[f"heads.{aggregation}"].unflatten(1, (parent.kv_groups, -1))
    best = _best_of_each_group(heads, target.heads_per_group)
    keep_kv_groups = tuple(most_important(layer, target.kv_groups) for layer in (heads * best).sum(dim=2))
    keep_heads: tuple[Indices, ...] = ()
    if target.heads_per_group != parent.heads_per_group:
        keep_heads = tuple(_heads_of(*layer) for layer in zip(best, keep_kv_groups, strict=True))
    return Plan(
        method="minitron-width",
        parent=parent,
        target=target,
        keep_layers=tuple(range(parent.layers)),
        keep_hidden=most_important(hidden, target.hidden),
        keep_ffn=tuple(most_important(layer, target.ffn) for layer in ffn),
        keep_kv_groups=keep_kv_groups,
        keep_heads=keep_heads,
        provenance={
            "model_fingerprint": scores.model_fingerprint,
            "scores": scores.content_hash,
            "settings": {"aggregation": aggregation},
        },
    )


def _best_of_each_group(heads: torch.Tensor, count: int) -> torch.Tensor:
    """Return which query heads are the ``count`` most important of their KV group, bool, given scores [L, G, g]."""
    order = heads.sort(dim=2, descending=True, stable=True).indices
    return torch.zeros_like(heads, dtype=torch.bool).scatter(2, order[:, :, :count], value=True)


def _heads_of(best: torch.Tensor, groups: Indices) -> Indices:
    """Return the indices of the best query heads of the kept groups of a layer, given bool [G, g]."""
    kept = torch.zeros_like(best)
    kept[list(groups)] = best[list(groups)]
    return tuple(kept.flatten().nonzero().flatten().tolist())


def most_important(scores: torch.Tensor, count: int) -> Indices:
    """Return the indices of the ``count`` largest of ``scores`` [n] in ascending order; ties go to the lower index."""
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))
