"""Shared by FLAP, Wanda-sp, magnitude-sp and LLM-Pruner: from scores of channels to a plan that keeps whole units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pruning.input_means import FEATURES, InputMeans
from nemo_pvs.pruning.plan import Indices, Plan
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
    """Keep the best units of every layer; counts are exact, and ties go to the lower index.

    Args:
        scores: Where the channel scores come from; identifies the model and has the means for the biases.
        method: Name of the method.
        attention: Score of each KV group [L, G], query head [L, H], or input channel of ``o_proj`` [L, H*h]; averaged
            over a group. If heads are removed, those that are the r-th best of their groups are one unit, whose score
            is their average.
        ffn: Score of each input channel of ``down_proj`` [L, f].
        rules: How many units to keep.
        bias: Compensate for the mean contribution of removed units.
        settings: The method's settings, for the plan's provenance.

    Raises:
        UserError: the rules are invalid for this model, or leave a layer without attention units or neurons.
    """
    parent = scores.shape
    if rules.attention_unit == "heads":
        heads = attention.unflatten(1, (parent.kv_groups, parent.heads_per_group, -1)).mean(dim=3)
        units = heads.sort(dim=2, descending=True).values.mean(dim=1)
    else:
        units = attention.unflatten(1, (parent.kv_groups, -1)).mean(dim=2)
    counts = unit_counts(units, ffn, parent, rules)
    if rules.attention_unit == "heads":
        keep_groups = (tuple(range(parent.kv_groups)),) * parent.layers
        keep_heads = tuple(_best_of_each_group(*layer) for layer in zip(heads, counts[0], strict=True))
    else:
        keep_groups, keep_heads = _best(units, counts[0]), ()
    keep_ffn = _best(ffn, counts[1])
    target = parent.with_layers(rules.sizes(parent, *kept) for kept in zip(*counts, strict=True))
    plan = Plan(
        method=method,
        parent=parent,
        target=target,
        keep_layers=tuple(range(parent.layers)),
        keep_hidden=tuple(range(parent.hidden)),
        keep_ffn=keep_ffn,
        keep_kv_groups=keep_groups,
        keep_heads=keep_heads,
        provenance={
            "model_fingerprint": scores.model_fingerprint,
            "scores": scores.content_hash,
            "settings": {**(settings or {}), **_recorded(rules), "bias": bias},
            "removed_of_matrices": 1 - target.matrix_parameters / parent.matrix_parameters,
        },
    )
    return _with_biases(plan, scores) if bias else plan


def _recorded(rules: UnitRules) -> dict[str, Any]:
    """Return the rules for the provenance of a plan, without ``attention_unit`` if it is what it always was."""
    recorded = asdict(rules)
    if rules.attention_unit == "groups":
        del recorded["attention_unit"]
    return recorded


def _best_of_each_group(heads: torch.Tensor, count: int) -> Indices:
    """Return the indices of the ``count`` best query heads of each KV group of a layer, given scores [G, g]."""
    kept: list[int] = []
    for group, scores in enumerate(heads):
        kept += [group * len(scores) + head for head in most_important(scores, count)]
    return tuple(kept)


def _best(scores: torch.Tensor, counts: Sequence[int]) -> tuple[Indices, ...]:
    """Return the indices of the best units of each layer, given scores [L, n] and the number to keep [L]."""
    return tuple(most_important(row, count) for row, count in zip(scores, counts, strict=True))


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Return scores [L, n] scaled to mean 0 and unbiased variance 1 in each layer; equal scores become 0.

    FLAP (2312.11983) makes layers comparable by this.
    """
    centred = scores - scores.mean(dim=1, keepdim=True)
    deviation = centred.square().sum(dim=1, keepdim=True).div(max(1, scores.shape[1] - 1)).sqrt()
    return torch.where(deviation > 0, centred / deviation, torch.zeros_like(centred))


def _with_biases(plan: Plan, scores: Scores) -> Plan:
    """Return the plan with biases that compensate for the mean contribution of what it removes."""
    query, ffn = [], []
    means = zip(scores.channels("attention", "mean"), scores.channels("ffn", "mean"), strict=True)
    for layer, (query_means, ffn_means) in enumerate(means):
        query.append(query_means[list(plan.removed("query", layer))])
        ffn.append(ffn_means[list(plan.removed("ffn", layer))])
    features = tuple(sorted({*plan.target.features, *FEATURES}))
    return replace(plan, target=plan.target.replace(features=features), input_means=InputMeans.of(query, ffn))
