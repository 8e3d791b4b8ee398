"""What a plan keeps of an optimizer's state, so that training behind it need not begin it anew."""

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
    """Return AdamW's moments, and its fp32 weights where there are any, sliced by the plan as the weights are.

    AdamW moves a weight by that weight's own moments, so what is kept is what the unpruned training had.

    Args:
        checkpoint: A NeMo checkpoint of training with its optimizer, of the model that the plan was made for.
        plan: What stays; None where everything does.

    Returns:
        By the state's name in Megatron, a source whose tensors are named and sized like the pruned model's.

    Raises:
        UserError: the checkpoint lacks the moments, the plan was made for another model, or it adds biases.
    """
    trained = NemoSource(checkpoint)
    states = {state: OptimizerStateSource(checkpoint, state) for state in states_in(trained)}
    if plan is None:
        return states
    if plan.input_means is not None:
        raise UserError(
            "The plan adds biases, for which the optimizer has no state yet; choose a plan without, or restart the "
            "optimizer."
        )
    PrunedSource(trained, plan)  # refuses a plan that was made for another model
    # A fingerprint is of weights, so a state would not pass for the same model.
    rest = {name: value for name, value in plan.provenance.items() if name != "model_fingerprint"}
    slices = replace(plan, provenance=rest)
    return {name: PrunedSource(state, slices) for name, state in states.items()}
