"""Slice an optimizer's state by a plan, so that training after pruning need not start it from zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nemo_pvs.checkpoints.nemo.checkpoint import NemoSource
from nemo_pvs.checkpoints.nemo.optimizer_state import OptimizerStateSource, states_in
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan


def slice_optimizer_state(checkpoint: str | Path, plan: Plan | None) -> Mapping[str, WeightSource]:
    """Return AdamW's moments, and its fp32 weights if there are any, sliced by the plan like the weights.

    AdamW updates a weight from that weight's own moments only, so the kept weights continue with the moments that
    they had in the unpruned training.

    Args:
        checkpoint: A NeMo checkpoint with its optimizer state, of the model that the plan was made for.
        plan: The plan; None keeps everything.

    Returns:
        For each state, by its name in Megatron, a source whose tensors have the names and sizes of the pruned model's.

    Raises:
        UserError: the checkpoint lacks the moments, or the plan was made for another model, adds biases or merges
            query heads.
    """
    trained = NemoSource(checkpoint)
    states = {state: OptimizerStateSource(checkpoint, state) for state in states_in(trained)}
    if plan is None:
        return states
    if plan.input_means is not None:
        raise UserError(
            "The plan adds biases, for which the optimizer has no state yet; choose a plan without biases, or restart "
            "the optimizer."
        )
    if plan.merged_heads:
        raise UserError(
            "The plan merges query heads, whose moments cannot be merged; choose a plan without merge_heads, or "
            "restart the optimizer."
        )
    PrunedSource(trained, plan)  # refuses a plan that was made for another model
    # A fingerprint identifies weights, so the check of a state against it would fail.
    rest = {name: value for name, value in plan.provenance.items() if name != "model_fingerprint"}
    slices = replace(plan, provenance=rest)
    return {name: PrunedSource(state, slices) for name, state in states.items()}
