"""Adapt-Pruner: KV groups and FFN channels, most from layers that change their input least (2502.03460)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import Expected, PruningMethod
from nemo_pvs.pruning.methods.steps import planned
from nemo_pvs.pruning.options import Multiples, Positive, Share, VocabularySize, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.request import PruneRequest
    from nemo_pvs.pruning.result import Pruned

NAME = "adapt-pruner"


class AdaptPrunerOptions(VocabularySize, Multiples):
    """The options of Adapt-Pruner."""

    amounts: ClassVar[tuple[str, ...]] = ("ratio",)

    ratio: Share | None = option("share to remove, e.g. 0.5")
    of: Literal["body", "total"] = option("what the ratio is a share of: body or total", "total")
    iterations: Positive = option("iterations after which everything would be removed", 50)
    amplitude: float = option("by how much layers differ in sparsity at each iteration", 0.02, ge=0)
    metric: Literal["param_first", "param_second", "param_mix", "vectorize"] = option(
        "what a weight's importance is: param_first, param_second, param_mix or vectorize", "param_first"
    )
    compat: bool = option("reproduce the published code's quirks, and so its numbers", False)


def _prune(request: PruneRequest[AdaptPrunerOptions]) -> Pruned:
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.pruning.structured.adapt_pruner import AdaptPrunerSettings, LayerMeasure, plan_adapt_pruner
    from nemo_pvs.pruning.target import parameters_left

    options = request.options
    if options.ratio is None:
        raise UserError("Nothing says how much to prune; give --ratio 0.2 for a fifth of all parameters.")
    count = parameters_left(shape_of(request.source), options.ratio, options.of)
    names = ("iterations", "amplitude", "metric", "ffn_multiple", "kv_groups_multiple", "compat")
    settings = AdaptPrunerSettings(**{name: getattr(options, name) for name in names})
    measure = LayerMeasure(request.draw or (lambda _: request.tokens()), settings.metric, request.compute)
    with request.progress("prune by adapt-pruner", "parameters") as show:
        plan = plan_adapt_pruner(request.source, count, measure, settings, show)
    cost = {"tokens": measure.tokens, "flops": measure.flops}
    return planned(request, replace(plan, provenance={**plan.provenance, "calibration": cost}))


def _expected(options: AdaptPrunerOptions, parent: Shape) -> Expected:
    from nemo_pvs.pruning.target import parameters_left, shrunk

    if options.ratio is None:
        raise UserError("Nothing says how much to prune; give a ratio, such as 0.2 for a fifth of all parameters.")
    return Expected(shrunk(parent, parameters_left(parent, options.ratio, options.of)), exact=False, uneven=True)


METHOD = PruningMethod(
    name=NAME,
    removes="KV groups and FFN channels by |W gradient|, most from layers that change their input least",
    paper="2502.03460",
    options=AdaptPrunerOptions,
    prune=_prune,
    expected=_expected,
    rounds=True,
)
