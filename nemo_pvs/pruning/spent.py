"""The cost of a finished pruning itself: a search for layers, or a layer-by-layer calibration."""

from __future__ import annotations

from typing import Any

from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.ledger.flops import (
    ScanCost,
    greedy_scan_cost,
    sparse_calibration_flops,
    sweep_flops,
    sweep_tokens,
    window_scan_cost,
)
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.methods.minitron_depth import MinitronDepthOptions
from nemo_pvs.pruning.options import Options
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.result import Pruned


def spent(pruned: Pruned, options: Options, parent: Shape, read: TokenSet | None) -> dict[str, Any]:
    """Return the cost of pruning, without that of the scores that it was given.

    Args:
        pruned: The result.
        options: Options of the method.
        parent: Shape of the dense model.
        read: The text that the method read; None if it read none.

    Returns:
        ``search`` and ``calibration``, if there was one, each with ``tokens`` and ``flops``; a search also has the
        ``losses`` or ``scores`` of the candidates.
    """
    if pruned.plan is not None and "calibration" in pruned.plan.provenance:
        return {"calibration": dict(pruned.plan.provenance["calibration"])}
    if pruned.plan is not None:
        return _search(pruned.plan, options)
    if read is None:
        return {}
    tokens, length = read.ids.numel(), read.ids.shape[1]
    flops = sparse_calibration_flops(parent, tokens, length, sequential=getattr(options, "sequential", True))
    return {"calibration": {"tokens": tokens, "flops": flops}}


def _search(plan: Plan, options: Options) -> dict[str, Any]:
    search = plan.provenance
    if "tokens_read" in search:  # by a task
        return {"search": {"tokens": search["tokens_read"], "flops": search["flops"], "scores": search["scores"]}}
    if "layer_forwards" not in search or not isinstance(options, MinitronDepthOptions):
        return {}
    models = depth_scan_cost(options, plan.parent.layers, plan.parent.layers - plan.target.layers).models
    return {
        "search": {
            "tokens": sweep_tokens(search["tokens"], models),
            "flops": sweep_flops(plan.parent, search["tokens"], search["layer_forwards"], models),
            "losses": search["losses"],
        }
    }


def depth_scan_cost(options: MinitronDepthOptions, layers: int, removed: int) -> ScanCost:
    """Return the cost of the options' search for ``removed`` layers by the loss."""
    if options.greedy_ends is not None:
        first, last = options.greedy_ends
        return greedy_scan_cost(layers, removed, protect_first=first, protect_last=last)
    return window_scan_cost(layers, 1 if options.search == "individual" else removed)
