"""Magnitude-sp: structured pruning by the norm of weights alone, a baseline in FLAP's paper (2312.11983)."""

from __future__ import annotations

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.unit_counts import UnitRules
from nemo_pvs.pruning.structured.units import plan_units


def plan_magnitude_sp(
    scores: Scores,
    ratio: float,
    *,
    structure: str = "UL-UM",
    remove_groups: int | None = None,
    ffn_multiple: int = 1,
    kv_groups_multiple: int = 1,
    attention_unit: str = "groups",
) -> Plan:
    """Keep the units whose columns of ``o_proj`` and ``down_proj`` have the largest L2 norms.

    The scores' activations are not used, so any calibration set will do.

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
    attention, ffn = (scores.channels(site, "weight_energy").sqrt() for site in ("attention", "ffn"))
    rules = UnitRules(
        ratio,
        structure,
        remove_groups,
        ffn_multiple=ffn_multiple,
        kv_groups_multiple=kv_groups_multiple,
        attention_unit=attention_unit,
    ).within_layers("magnitude-sp")
    return plan_units(scores, "magnitude-sp", attention, ffn, rules)
