"""Wanda-sp: KV groups and FFN channels by |W| |x|, FLAP's baseline (An et al., 2312.11983)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import by_scores, expected_units
from nemo_pvs.pruning.options import Units

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan


class WandaSpOptions(Units):
    """The options of Wanda-sp."""


def _plan(*arguments: Any, **options: Any) -> Plan:
    from nemo_pvs.pruning.structured.wanda_sp import plan_wanda_sp

    return plan_wanda_sp(*arguments, **options)


METHOD = PruningMethod(
    name="wanda-sp",
    removes="KV groups and FFN channels by |W| |x|",
    paper="2312.11983",
    options=WandaSpOptions,
    prune=by_scores(_plan, expected_units),
    expected=expected_units,
    scored=True,
)
