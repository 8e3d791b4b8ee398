"""Magnitude-sp: KV groups and FFN channels by |W|, FLAP's baseline (An et al., 2312.11983)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nemo_pvs.pruning.method import PruningMethod
from nemo_pvs.pruning.methods.steps import by_scores, expected_units
from nemo_pvs.pruning.options import Units

if TYPE_CHECKING:
    from nemo_pvs.pruning.plan import Plan


class MagnitudeSpOptions(Units):
    """The options of Magnitude-sp."""


def _plan(*arguments: Any, **options: Any) -> Plan:
    from nemo_pvs.pruning.structured.magnitude_sp import plan_magnitude_sp

    return plan_magnitude_sp(*arguments, **options)


METHOD = PruningMethod(
    name="magnitude-sp",
    removes="KV groups and FFN channels by |W|",
    paper="2312.11983",
    options=MagnitudeSpOptions,
    prune=by_scores(_plan, expected_units),
    expected=expected_units,
    scored=True,
    reads_text=False,
)
