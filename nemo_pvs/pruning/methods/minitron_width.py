"""Minitron-width: hidden and FFN channels, KV groups and query heads, by activations (2407.14679)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_sizes, to_shape
from nemo_pvs.pruning.options import QueryHeads, SizesOrRatio, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest

NAME = "minitron-width"


class MinitronWidthOptions(QueryHeads, SizesOrRatio):
    """The options of Minitron-width."""

    aggregation: Literal["energy", "meanabs_l2"] = option(
        "how activations are aggregated over tokens: energy or meanabs_l2", "energy"
    )


def _plan(request: PruneRequest[MinitronWidthOptions], target: Shape) -> Plan:
    from nemo_pvs.pruning.structured.width import plan_width

    return plan_width(request.scores(), target, request.options.aggregation, merge_heads=request.options.merge_heads)


METHOD = PruningMethod(
    name=NAME,
    removes="hidden and FFN channels, KV groups and query heads, by activations",
    paper="2407.14679",
    options=MinitronWidthOptions,
    prune=to_shape(NAME, _plan),
    expected=expected_sizes(NAME),
    scored=True,
    rounds=True,
)
