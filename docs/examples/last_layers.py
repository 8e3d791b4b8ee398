"""Remove the last layers."""

from __future__ import annotations

from nemo_pvs.pruning.method import Expected, Method
from nemo_pvs.pruning.methods.steps import planned
from nemo_pvs.pruning.options import Options, Positive, option


class LastLayersOptions(Options):
    """The options of the method."""

    amounts = ("last",)

    last: Positive | None = option("layers to remove at the output")


def _target(options, parent):
    return parent.replace(layers=parent.layers - options.last)


def _prune(request):
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.structured.depth import layer_plan

    parent = shape_of(request.source)
    left = _target(request.options, parent).layers
    return planned(request, layer_plan(parent, range(left, parent.layers), "last-layers", {}))


METHOD = Method(
    name="last-layers",
    removes="the last layers",
    options=LastLayersOptions,
    prune=_prune,
    expected=lambda options, parent: Expected(_target(options, parent), exact=True),
    reads_text=False,
)
