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
) -> Plan:
    """Keep the units whose columns of ``o_proj`` and ``down_proj`` have the largest L2 norms.

    The scores' activations are not used, so any calibration set will do.

    Args:
        scores: What ``calibrate`` measured.
        ratio: Share of the weights in the decoder layers' matrices that goes; with the published structure, UL-UM,
            the share of KV groups and of FFN channels of every layer, each rounded down.
        structure: UL-UM or UL-MM; scores of different layers are not comparable.
        remove_groups: KV groups removed per layer, for UL-MM; by default the ratio of them.
        ffn_multiple: Multiples in which FFN channels stay.
        kv_groups_multiple: Multiples in which KV groups stay.

    Raises:
        UserError: an argument makes no sense for this model, or the scores lack what it needs.
    """
    attention, ffn = (scores.channels(site, "weight_energy").sqrt() for site in ("attention", "ffn"))
    rules = UnitRules(
        ratio, structure, remove_groups, ffn_multiple=ffn_multiple, kv_groups_multiple=kv_groups_multiple
    ).within_layers("magnitude-sp")
    return plan_units(scores, "magnitude-sp", attention, ffn, rules)
