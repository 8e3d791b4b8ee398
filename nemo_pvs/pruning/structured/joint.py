"""Prune width and depth together by one set of scores, as a search over architectures does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.shortgpt import removal_order
from nemo_pvs.pruning.structured.width import plan_width


def plan_joint(
    scores: Scores,
    target: Shape,
    aggregation: str = "energy",
    layer_order: Sequence[int] | None = None,
    *,
    merge_heads: bool = False,
) -> Plan:
    """Choose layers, channels, KV groups and query heads of the dense model in one step, as ModelOpt's search does.

    Widths are chosen as in ``plan_width``, regardless of which layers are removed.

    Args:
        scores: Result of ``calibrate``.
        target: The Shape to reach.
        aggregation: ``energy`` or ``meanabs_l2``, as in ``plan_width``.
        layer_order: Layers in order of removal, such as ``GreedyScan.removed``; by ascending block influence if None.
        merge_heads: As in ``plan_width``.

    Raises:
        UserError: the aggregation is unknown, or the target removes more layers than ``layer_order`` has.
    """
    parent = scores.shape
    width = plan_width(scores, target.replace(layers=parent.layers), aggregation, merge_heads=merge_heads)
    if target.layers == parent.layers:
        return width
    order = removal_order(scores) if layer_order is None else layer_order
    removed = order[: parent.layers - target.layers]
    if len(removed) < parent.layers - target.layers:
        raise UserError(
            f"The order of removal has {len(order)} layers, but {parent.layers - target.layers} must be removed to "
            f"leave {target.layers}; scan for more."
        )
    kept = tuple(layer for layer in range(parent.layers) if layer not in removed)
    settings = {**width.provenance["settings"], "removed": list(removed)}
    return replace(
        width,
        method="minitron-joint",
        target=target,
        keep_layers=kept,
        keep_ffn=tuple(width.keep_ffn[layer] for layer in kept),
        keep_kv_groups=tuple(width.keep_kv_groups[layer] for layer in kept),
        keep_heads=tuple(width.keep_heads[layer] for layer in kept) if width.keep_heads else (),
        merged_heads=tuple(width.merged_heads[layer] for layer in kept) if width.merged_heads else (),
        provenance={**width.provenance, "settings": settings},
    )
