"""LLM-Pruner: remove the units without which the loss changes least, by its gradients (2305.11627)."""

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
) -> Plan:
    """Keep the KV groups and FFN channels of the largest Taylor importance; nothing makes up for the rest.

    Importances are estimates of a change of the loss, so those of different layers may be compared (AL). There a unit
    counts by its importance per weight: by the sum a KV group, which has hundreds of times the weights of an FFN
    channel, would never go.

    Args:
        scores: What ``calibrate`` measured, with gradients.
        ratio: Share of the weights in the decoder layers' matrices that goes; with the published structure, UL-UM,
            of the FFN channels of every layer that is not protected ``int(n (1 - ratio))`` stay, and of its KV groups
            go as many as the key channels that are to go fill.
        metric: param_first, param_second, param_mix or vectorize (``calibration.taylor.METRICS``).
        structure: UL-UM, UL-MM, AL-MM or AL-AM (``pruning.unit_counts.STRUCTURES``).
        remove_groups: KV groups removed per layer, for UL-MM and AL-MM; by default the ratio of them.
        uniform: Same counts in every layer, so that the result is a plain Llama.
        ffn_multiple: Multiples in which a layer's FFN channels stay.
        kv_groups_multiple: Multiples in which its KV groups stay.
        protect_first: Layers at the input that stay as they are; 4 in the published runs, of 32.
        protect_last: Layers at the output that stay as they are; 2 in the published runs.

    Raises:
        UserError: an argument makes no sense for this model, or the scores were measured without gradients.
    """
    if metric not in METRICS:
        raise UserError(f"Unknown metric {metric!r}; choose {', '.join(METRICS)}.")
    try:
        groups, ffn = (scores.tensors[f"{site}.{metric}"] for site in ("groups", "ffn"))
    except KeyError:
        raise UserError(
            "These scores were measured without gradients; measure them again by pvs calibrate --gradients."
        ) from None
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
    )
    if structure.startswith("AL"):
        # A group has the weights of so many FFN channels.
        groups = groups / (2 * (shape.heads_per_group + 1) * shape.head_dim / 3)
    return plan_units(scores, "llm-pruner", groups, ffn, rules, settings={"metric": metric})
