"""What a finished pruning had read and computed, by itself: a search for layers, a calibration layer by layer."""

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
from nemo_pvs.pruning.structured.greedy import GREEDY, protected_ends


def spent(pruned: Pruned, options: Options, parent: Shape, read: TokenSet | None) -> dict[str, Any]:
    """Return what pruning spent beside the scores that it was given.

    Args:
        pruned: The result.
        options: What it was asked for.
        parent: The dense model.
        read: The text that the method read; None if it read none.

    Returns:
        ``search`` and ``calibration``, where there was one: ``tokens`` and ``flops``, of a search also the ``losses``
        or ``scores`` of the candidates.
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
    made = plan.provenance
    if "tokens_read" in made:  # by a task
        return {"search": {"tokens": made["tokens_read"], "flops": made["flops"], "scores": made["scores"]}}
    if "layer_forwards" not in made or not isinstance(options, MinitronDepthOptions):
        return {}
    models = depth_scan_cost(options, plan.parent.layers, plan.parent.layers - plan.target.layers).models
    return {
        "search": {
            "tokens": sweep_tokens(made["tokens"], models),
            "flops": sweep_flops(plan.parent, made["tokens"], made["layer_forwards"], models),
            "losses": made["losses"],
        }
    }


def depth_scan_cost(options: MinitronDepthOptions, layers: int, removed: int) -> ScanCost:
    """Return what a scan for layers by the loss takes, by the search that is asked for."""
    if options.search in GREEDY:
        first, last = protected_ends(options.search, options.protect_first, options.protect_last)
        return greedy_scan_cost(layers, removed, protect_first=first, protect_last=last)
    return window_scan_cost(layers, 1 if options.search == "individual" else removed)
