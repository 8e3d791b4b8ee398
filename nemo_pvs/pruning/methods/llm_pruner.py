"""LLM-Pruner: KV groups and FFN channels by |W gradient| (Ma et al., 2305.11627)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.method import Expected, PruningMethod
from nemo_pvs.pruning.methods.steps import by_scores, expected_units
from nemo_pvs.pruning.options import ProtectedLayers, Units, option

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan


class LLMPrunerOptions(Units, ProtectedLayers):
    """The options of LLM-Pruner."""

    metric: Literal["param_first", "param_second", "param_mix", "vectorize"] = option(
        "what a weight's importance is: param_first, param_second, param_mix or vectorize", "param_first"
    )
    uniform: bool = option("same sizes in every layer", False)


def _plan(*arguments: Any, **options: Any) -> Plan:
    from nemo_pvs.pruning.structured.llm_pruner import plan_llm_pruner

    return plan_llm_pruner(*arguments, **options)


def _expected(options: LLMPrunerOptions, parent: Shape) -> Expected:
    return expected_units(options, parent, round_kept=True)


METHOD = PruningMethod(
    name="llm-pruner",
    removes="KV groups and FFN channels by |W gradient|",
    paper="2305.11627",
    options=LLMPrunerOptions,
    prune=by_scores(_plan, _expected),
    expected=_expected,
    scored=True,
    gradients=True,
)
