"""The ledger of a finished arm: what the stages of its run counted, and what its parent had cost before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.charges import charge_scores, charge_training, count_masked, pruning_charges
from nemo_pvs.planning.learned import charge_stage, is_trained_first, stage_reads
from nemo_pvs.planning.rounds import charges_of, shares
from nemo_pvs.planning.teacher import charge_teacher, inherit_ancestors
from nemo_pvs.recipe.options import needs_gradients, needs_scores, stages_of, task_of
from nemo_pvs.recipe.recipe import Arm, Recipe


def run_ledger(
    recipe: Recipe,
    arm: Arm,
    stages: Mapping[str, Mapping[str, Any]],
    parent: Shape,
    model: WeightSource,
    read: TokensRead | None = None,
) -> Ledger:
    """Charge an arm with its training, its teacher, and, when it was pruned, all that went into its initial weights.

    Args:
        recipe: Of the run.
        arm: The arm.
        stages: What ``calibrate`` and ``prune/<target>`` returned.
        parent: The parent's shape.
        model: The trained arm.
        read: Which tokens it was trained on, where that is known.

    Raises:
        UserError: the parent's ledger contradicts the recipe.
    """
    ledger = Ledger()
    inherit_ancestors(ledger, recipe, arm.target, arm.initialisation, parent)
    if arm.initialisation == "pruned":
        target = recipe.targets[arm.target]
        made = stages[f"prune/{arm.target}"]
        if needs_scores(target):
            tokens, length = stages["calibrate"]["tokens"], recipe.calibrate.sequence_length
            ledger.charges.append(charge_scores(parent, tokens, length, gradients=needs_gradients(target)))
        ledger.charges += charges_of(made) if stages_of(target) > 1 else pruning_charges(made, task_of(target))
        if is_trained_first(target):
            first = stage_reads(recipe, target, read.data) if read else None
            charge_stage(ledger, recipe, target, parent, first)
    shape = shape_of(model)
    charge_training(ledger, shares(recipe, arm)[-1].training, shape, count_masked(model), read)
    charge_teacher(ledger, recipe, arm, parent, shape)
    return ledger
