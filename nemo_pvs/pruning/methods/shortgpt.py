"""ShortGPT: whole layers, by how little they change their input (Men et al., 2403.03853)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import expected_sizes, to_shape
from nemo_pvs.pruning.options import ProtectedLayers, SizesOrRatio

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest

NAME = "shortgpt"


class ShortGPTOptions(SizesOrRatio, ProtectedLayers):
    """The options of ShortGPT."""


def _plan(request: PruneRequest[ShortGPTOptions], target: Shape) -> Plan:
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.structured.depth import layers_to_remove, unprotected
    from nemo_pvs.pruning.structured.shortgpt import plan_shortgpt

    options, parent = request.options, shape_of(request.source)
    remove = layers_to_remove(parent, target)
    unprotected(parent.layers, remove, options.protect_first, options.protect_last)  # before scores are measured
    return plan_shortgpt(request.scores(), remove, **options.given("protect_first", "protect_last"))


METHOD = PruningMethod(
    name=NAME,
    removes="whole layers, by how little they change their input",
    paper="2403.03853",
    options=ShortGPTOptions,
    prune=to_shape(NAME, _plan),
    expected=expected_sizes(NAME),
    scored=True,
)
