"""Wanda-sp: structured pruning by weight times input norm, a baseline in FLAP's paper (2312.11983)."""

from __future__ import annotations

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.flap import channel_scores
from nemo_pvs.pruning.structured.unit_counts import UnitRules
from nemo_pvs.pruning.structured.units import plan_units


def plan_wanda_sp(
    scores: Scores,
    ratio: float,
    *,
    structure: str = "UL-UM",
    remove_groups: int | None = None,
    ffn_multiple: int = 1,
    kv_groups_multiple: int = 1,
    attention_unit: str = "groups",
) -> Plan:
    """Keep the units whose channels have the largest ``mean_i |W_ij| sqrt(sum x_j^2)``, without compensating biases.

    W is ``o_proj`` [d, H*h] or ``down_proj`` [d, f], x_j its input channel j at each token.

    All inputs are those of the dense model, so that one calibration serves every ratio. The published script (in
    CASIA-IVA-Lab/FLAP) instead measures each layer after pruned ones, again for each ratio.

    Args:
        scores: Result of ``calibrate``.
        ratio: Share of the weights in the decoder layers' matrices to remove; with the published structure, UL-UM, the
            share of KV groups and of FFN channels of every layer, each rounded down.
        structure: UL-UM or UL-MM; scores of different layers are not comparable.
        remove_groups: KV groups to remove per layer, for UL-MM; by default the ratio of them.
        ffn_multiple: Keep FFN channels in multiples of this.
        kv_groups_multiple: Keep KV groups in multiples of this.
        attention_unit: What is removed from attention: ``groups`` (KV groups with their query heads) or ``heads``
            (query heads, the same number from every KV group of a layer).

    Raises:
        UserError: an argument is invalid for this model, or the scores lack a statistic that it needs.
    """
    attention, ffn = (channel_scores(scores, site, "WIFN") for site in ("attention", "ffn"))
    rules = UnitRules(
        ratio,
        structure,
        remove_groups,
        ffn_multiple=ffn_multiple,
        kv_groups_multiple=kv_groups_multiple,
        attention_unit=attention_unit,
    ).within_layers("wanda-sp")
    return plan_units(scores, "wanda-sp", attention, ffn, rules)
