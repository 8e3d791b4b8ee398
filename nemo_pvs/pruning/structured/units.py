"""What FLAP, Wanda-sp, magnitude-sp and LLM-Pruner share: from scores of channels to a plan that keeps whole units."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.model.shape import LayerSizes
from nemo_pvs.pruning.input_means import FEATURES, InputMeans
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.unit_counts import UnitRules, unit_counts
from nemo_pvs.pruning.structured.width import most_important


def plan_units(
    scores: Scores,
    method: str,
    attention: torch.Tensor,
    ffn: torch.Tensor,
    rules: UnitRules,
    *,
    bias: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """Keep the best units of every layer; exact counts, of equals the lower index.

    Args:
        scores: Where the channel scores come from; gives the model, and the means for the biases.
        method: Name of the method.
        attention: Score of each KV group [L, G], or of each input channel of ``o_proj`` [L, H*h], whose mean over a
            group's channels is the group's.
        ffn: Score of each input channel of ``down_proj`` [L, f].
        rules: How many units stay.
        bias: Make up for the mean contribution of what goes.
        settings: Of the method, for the plan's provenance.

    Raises:
        UserError: the rules make no sense for this model, or leave a layer without groups or neurons.
    """
    parent = scores.shape
    groups = attention.unflatten(1, (parent.kv_groups, -1)).mean(dim=2)
    counts = unit_counts(groups, ffn, parent, rules)
    keep_groups, keep_ffn = (
        tuple(most_important(row, count) for row, count in zip(rows, kept, strict=True))
        for rows, kept in zip((groups, ffn), counts, strict=True)
    )
    target = parent.with_layers(
        LayerSizes(neurons, kept * parent.heads_per_group, kept) for kept, neurons in zip(*counts, strict=True)
    )
    plan = Plan(
        method=method,
        parent=parent,
        target=target,
        keep_layers=tuple(range(parent.layers)),
        keep_hidden=tuple(range(parent.hidden)),
        keep_ffn=keep_ffn,
        keep_kv_groups=keep_groups,
        provenance={
            "model_fingerprint": scores.model_fingerprint,
            "scores": scores.content_hash,
            "settings": {**(settings or {}), **asdict(rules), "bias": bias},
            "removed_of_matrices": 1 - target.matrix_parameters / parent.matrix_parameters,
        },
    )
    return _with_biases(plan, scores) if bias else plan


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Return scores [L, n] with mean 0 and unbiased variance 1 in each layer; equal scores become 0."""
    centred = scores - scores.mean(dim=1, keepdim=True)
    deviation = centred.square().sum(dim=1, keepdim=True).div(max(1, scores.shape[1] - 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))


def _with_biases(plan: Plan, scores: Scores) -> Plan:
    """Return the plan with biases that make up for the mean of what it removes."""
    query, ffn = (
        [row[list(plan.removed(axis, layer))] for layer, row in enumerate(scores.channels(site, "mean"))]
        for site, axis in (("attention", "query"), ("ffn", "ffn"))
    )
    features = tuple(sorted({*plan.target.features, *FEATURES}))
    return replace(plan, target=plan.target.replace(features=features), input_means=InputMeans.of(query, ffn))
