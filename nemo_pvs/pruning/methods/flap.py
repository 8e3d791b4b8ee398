"""FLAP: KV groups and FFN channels whose inputs fluctuate least, with biases (An et al., 2312.11983)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import Expected, PruningMethod
from nemo_pvs.pruning.methods.steps import by_scores, expected_units
from nemo_pvs.pruning.options import Units, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned


class FlapOptions(Units):
    """The options of FLAP."""

    structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"] = option(
        "whether scores are compared within a layer (UL) or across all (AL), and modules alike (UM) or mixed", "AL-AM"
    )
    metric: Literal["WIFV", "IFV", "WIFN"] = option("what a channel's score is: WIFV, IFV or WIFN", "WIFV")
    bias: bool = option("compensate for the mean of what is removed", True)
    uniform: bool = option("same sizes in every layer", False)
    compat: bool = option("reproduce the published code's quirks, and so its numbers", False)


def _plan(*arguments: Any, **options: Any) -> Plan:
    from nemo_pvs.pruning.structured.flap import plan_flap

    return plan_flap(*arguments, **options)


def _prune(request: PruneRequest[FlapOptions]) -> Pruned:
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.model.layout import Layout

    source = request.source
    if request.options.bias:  # refuses a family that cannot have them before any scores are measured
        Layout.for_config(source.config).config(_with_biases(shape_of(source)), source.config)
    return by_scores(_plan, _expected)(request)


def _with_biases(shape: Shape) -> Shape:
    from nemo_pvs.pruning.input_means import FEATURES

    return shape.replace(features=tuple(sorted({*shape.features, *FEATURES})))


def _expected(options: FlapOptions, parent: Shape) -> Expected:
    expected = expected_units(options, parent)
    return expected._replace(shape=_with_biases(expected.shape)) if options.bias else expected


METHOD = PruningMethod(
    name="flap",
    removes="KV groups and FFN channels by fluctuation, with biases",
    paper="2312.11983",
    options=FlapOptions,
    prune=_prune,
    expected=_expected,
    scored=True,
)
