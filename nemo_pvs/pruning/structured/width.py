"""Width pruning: keep the most active hidden channels, FFN channels and KV groups (Minitron, 2407.14679)."""

from __future__ import annotations

import torch

from nemo_pvs.calibration.engine import AGGREGATIONS
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Indices, Plan


def plan_width(scores: Scores, target: Shape, aggregation: str = "energy") -> Plan:
    """Choose the channels and KV groups to keep.

    Hidden channels are chosen once for the whole model, FFN channels and KV groups layer by layer; a group's
    importance is the sum over its query heads, which are kept with it. Counts are exact, and ties go to the lower
    index. Kept units stay in their original order, which computes the same function as the order of importance that
    llm-pruning-collection and ModelOpt use, and keeps checkpoints comparable.

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
    kv_groups = scores.tensors[f"heads.{aggregation}"].unflatten(1, (parent.kv_groups, -1)).sum(dim=2)
    return Plan(
        method="minitron-width",
        parent=parent,
        target=target,
        keep_layers=tuple(range(parent.layers)),
        keep_hidden=most_important(hidden, target.hidden),
        keep_ffn=tuple(most_important(layer, target.ffn) for layer in ffn),
        keep_kv_groups=tuple(most_important(layer, target.kv_groups) for layer in kv_groups),
        provenance={
            "model_fingerprint": scores.model_fingerprint,
            "scores": scores.content_hash,
            "settings": {"aggregation": aggregation},
        },
    )


def most_important(scores: torch.Tensor, count: int) -> Indices:
    """Return the indices of the ``count`` largest of ``scores`` [n] in ascending order; ties go to the lower index."""
    order = scores.sort(descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))
