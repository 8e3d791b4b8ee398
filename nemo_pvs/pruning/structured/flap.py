"""FLAP: remove the units whose inputs fluctuate least, and replace their mean contribution by a bias (2312.11983)."""

from __future__ import annotations

import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.structured.unit_counts import UnitRules
from nemo_pvs.pruning.structured.units import plan_units, standardised

METRICS = ("WIFV", "IFV", "WIFN")


def plan_flap(
    scores: Scores,
    ratio: float,
    *,
    metric: str = "WIFV",
    structure: str = "AL-AM",
    remove_groups: int | None = None,
    bias: bool = True,
    square_attention: bool = True,
    uniform: bool = False,
    ffn_multiple: int = 1,
    kv_groups_multiple: int = 1,
    compat: bool = False,
    attention_unit: str = "groups",
) -> Plan:
    """Choose KV groups and FFN channels layer by layer, or over all layers.

    Args:
        scores: Result of ``calibrate``.
        ratio: Share of the weights in the decoder layers' matrices to remove (``structured.unit_counts``).
        metric: Score of an input channel j of ``o_proj`` or ``down_proj`` (W): WIFV ``var_j sum_i W_ij^2``, IFV
            ``var_j``, or WIFN ``mean_i |W_ij| sqrt(sum x_j^2)``.
        structure: UL-UM, UL-MM, AL-MM or AL-AM (``structured.unit_counts.STRUCTURES``). AL compares scores that are
            standardised over the channels of each layer.
        remove_groups: KV groups to remove per layer, for UL-MM and AL-MM; by default the ratio of them.
        bias: Add ``W[:, removed] mean[removed]`` to the biases of ``o_proj`` and ``down_proj``.
        square_attention: Square the metric of ``o_proj``, as in the published runs (CASIA-IVA-Lab/FLAP).
        uniform: Keep the same counts in every layer, so that the result is a plain Llama.
        ffn_multiple: Keep FFN channels of a layer in multiples of this, e.g. 128 for fast kernels.
        kv_groups_multiple: Keep KV groups of a layer in multiples of this, e.g. the tensor-parallel size.
        compat: Use the published script's order-dependent variance and its budgets for multi-head attention.
        attention_unit: What is removed from attention: ``groups`` (KV groups with their query heads) or ``heads``
            (query heads, the same number from every KV group of a layer).

    Raises:
        UserError: an argument is invalid for this model, or the scores lack a statistic that it needs.
    """
    if metric not in METRICS:
        raise UserError(f"Unknown metric {metric!r}; choose {', '.join(METRICS)}.")
    attention, ffn = (channel_scores(scores, site, metric, compat=compat) for site in ("attention", "ffn"))
    if square_attention:
        attention = attention.square()
    if structure.startswith("AL"):
        attention, ffn = standardised(attention), standardised(ffn)
    rules = UnitRules(
        ratio,
        structure,
        remove_groups,
        uniform,
        ffn_multiple,
        kv_groups_multiple,
        compat,
        attention_unit=attention_unit,
    )
    settings = {"metric": metric, "square_attention": square_attention}
    return plan_units(scores, "flap", attention, ffn, rules, bias=bias, settings=settings)


def channel_scores(scores: Scores, site: str, metric: str, *, compat: bool = False) -> torch.Tensor:
    """Return a metric of the inputs of ``o_proj`` (``attention``, [L, H*h]) or ``down_proj`` (``ffn``, [L, f]).

    Of the input channel j of a layer's W [d, H*h] or [d, f], over all tokens: WIFV ``var_j sum_i W_ij^2``, IFV
    ``var_j``, WIFN ``mean_i |W_ij| sqrt(sum x_j^2)`` (2312.11983).
    """
    if metric == "WIFN":
        return scores.channels(site, "weight_mean_abs") * scores.channels(site, "energy").sqrt()
    variance = scores.channels(site, "fluctuation" if compat else "variance")
    return variance if metric == "IFV" else variance * scores.channels(site, "weight_energy")
