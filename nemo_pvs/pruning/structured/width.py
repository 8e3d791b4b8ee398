"""Width pruning: keep the most active hidden and FFN channels, KV groups and query heads (Minitron, 2407.14679)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nemo_pvs.calibration.engine import AGGREGATIONS
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan


def plan_width(scores: Scores, target: Shape, aggregation: str = "energy", *, merge_heads: bool = False) -> Plan:
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

    With ``merge_heads`` removed heads leave a residual in the queries of kept ones, which is the paper's rule for
    grouped-query attention. Let ``head_1, ..., head_L`` be the rows of ``q_proj`` (weight and bias) of a group's heads
    by falling importance, of which the first K are kept. Then

        head_i <- head_i + (head_i - head_{2K-i+1})   for i = max(1, 2K - L + 1), ..., K

    so each kept head takes in at most one removed head, the last kept one the first removed. The paper's range of i
    begins one lower, at a head L + 1 that does not exist. Keys, values and ``o_proj`` stay as they are.

    Args:
        scores: Result of ``calibrate``.
        target: The Shape to reach, with as many layers as the parent.
        aggregation: ``energy`` (llm-pruning-collection, the paper's runs) or ``meanabs_l2`` (ModelOpt).
        merge_heads: Add the residual of removed query heads to kept ones.

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
    order = heads.sort(dim=2, descending=True, stable=True).indices
    best = torch.zeros_like(heads).scatter(2, order[:, :, : target.heads_per_group], 1.0)
    keep_kv_groups = tuple(most_important(layer, target.kv_groups) for layer in (heads * best).sum(dim=2))
    keep_heads, merged_heads = [], []
    if target.heads_per_group != parent.heads_per_group:
        for groups, ranks in zip(keep_kv_groups, order.tolist(), strict=True):
            kept: list[int] = []
            pairs: list[tuple[int, int]] = []
            for group in groups:
                ranked = [group * parent.heads_per_group + head for head in ranks[group]]
                kept += ranked[: target.heads_per_group]
                pairs += _residuals(ranked, target.heads_per_group)
            keep_heads.append(tuple(sorted(kept)))
            merged_heads.append(tuple(sorted(pairs)))
    return Plan(
        method="minitron-width",
        parent=parent,
        target=target,
        keep_layers=tuple(range(parent.layers)),
        keep_hidden=most_important(hidden, target.hidden),
        keep_ffn=tuple(most_important(layer, target.ffn) for layer in ffn),
        keep_kv_groups=keep_kv_groups,
        keep_heads=tuple(keep_heads),
        merged_heads=tuple(merged_heads) if merge_heads else (),
        provenance={
            "model_fingerprint": scores.model_fingerprint,
            "scores": scores.content_hash,
            "settings": {"aggregation": aggregation, **({"merge_heads": True} if merge_heads else {})},
        },
    )


def _residuals(ranked: Sequence[int], kept: int) -> list[tuple[int, int]]:
    """Return pairs of a kept and a removed head (``plan_width``), given a group's heads by falling importance."""
    first = max(1, 2 * kept - len(ranked) + 1)
    return [(ranked[i - 1], ranked[2 * kept - i]) for i in range(first, kept + 1)]


def most_important(scores: torch.Tensor, count: int) -> Indices:
    """Return the indices of the ``count`` largest of ``scores`` [n] in ascending order; ties go to the lower index."""
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))
