"""LLM-Pruner: remove the units whose removal changes the loss least, estimated from gradients (2305.11627)."""

from __future__ import annotations

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.calibration.taylor import METRICS
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.unit_counts import UnitRules
from nemo_pvs.pruning.structured.units import plan_units


def plan_llm_pruner(
    scores: Scores,
    ratio: float,
    *,
    metric: str = "param_first",
    structure: str = "UL-UM",
    remove_groups: int | None = None,
    uniform: bool = False,
    ffn_multiple: int = 1,
    kv_groups_multiple: int = 1,
    protect_first: int = 0,
    protect_last: int = 0,
    attention_unit: str = "groups",
) -> Plan:
    """Keep the KV groups and FFN channels with the largest Taylor importance, without compensating for the rest.

    Importances estimate a change of the loss, so those of different layers are comparable (AL). AL compares importance
    per weight: by the sum, a KV group, which has hundreds of times the weights of an FFN channel, would never be
    removed.

    Args:
        scores: Result of ``calibrate`` with gradients.
        ratio: Share of the weights in the decoder layers' matrices to remove. With the published structure, UL-UM,
            every unprotected layer keeps ``int(n (1 - ratio))`` of its n FFN channels, and the same share of its key
            channels decides how many whole KV groups it loses.
        metric: param_first, param_second, param_mix or vectorize (``calibration.taylor.METRICS``).
        structure: UL-UM, UL-MM, AL-MM or AL-AM (``structured.unit_counts.STRUCTURES``).
        remove_groups: KV groups to remove per layer, for UL-MM and AL-MM; by default the ratio of them.
        uniform: Keep the same counts in every layer, so that the result is a plain Llama.
        ffn_multiple: Keep FFN channels of a layer in multiples of this.
        kv_groups_multiple: Keep KV groups of a layer in multiples of this.
        protect_first: Layers at the input that are not pruned; 4 of 32 in the published runs.
        protect_last: Layers at the output that are not pruned; 2 of 32 in the published runs.
        attention_unit: What is removed from attention: ``groups`` (KV groups with their query heads) or ``heads``
            (query heads, the same number from every KV group of a layer).

    Raises:
        UserError: an argument is invalid for this model, or the scores were measured without gradients.
    """
    if metric not in METRICS:
        raise UserError(f"Unknown metric {metric!r}; choose {', '.join(METRICS)}.")
    if f"groups.{metric}" not in scores.tensors:
        raise UserError(
            "These scores were measured without gradients; measure them again with pvs calibrate --gradients."
        )
    heads = attention_unit == "heads"
    attention, ffn = (
        scores.tensors[f"heads.{metric}" if heads else f"groups.{metric}"],
        scores.tensors[f"ffn.{metric}"],
    )
    shape = scores.shape
    rules = UnitRules(
        ratio,
        structure,
        remove_groups,
        uniform,
        ffn_multiple,
        kv_groups_multiple,
        round_kept=True,
        protect_first=protect_first,
        protect_last=protect_last,
        attention_unit=attention_unit,
    )
    if structure.startswith("AL"):
        # Importance per weight, relative to an FFN channel: a head or a group has the weights of this many of them.
        attention = attention / ((2 if heads else 2 * (shape.heads_per_group + 1)) * shape.head_dim / 3)
    return plan_units(scores, "llm-pruner", attention, ffn, rules, settings={"metric": metric})
