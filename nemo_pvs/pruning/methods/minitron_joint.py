"""Minitron-joint: layers and widths at once, to an architecture that ``pvs search`` found (2408.11796)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_sizes, to_shape
from nemo_pvs.pruning.options import QueryHeads, SizesOrPreset, VocabularySize, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest

NAME = "minitron-joint"


class MinitronJointOptions(QueryHeads, VocabularySize, SizesOrPreset):
    """The options of Minitron-joint."""

    aggregation: Literal["energy", "meanabs_l2"] = option(
        "how activations are aggregated over tokens: energy or meanabs_l2", "energy"
    )


def _plan(request: PruneRequest[MinitronJointOptions], target: Shape) -> Plan:
    from nemo_pvs.pruning.structured.joint import plan_joint

    return plan_joint(request.scores(), target, request.options.aggregation, merge_heads=request.options.merge_heads)


METHOD = PruningMethod(
    name=NAME,
    removes="layers and widths at once, to what pvs search found",
    paper="2408.11796",
    options=MinitronJointOptions,
    prune=to_shape(NAME, _plan),
    expected=expected_sizes(NAME),
    scored=True,
)
