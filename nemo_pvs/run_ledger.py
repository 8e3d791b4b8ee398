"""The ledger of a finished arm: what the stages of its run counted, and what its parent had cost before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.equal_terms import charge_calibration, charge_training
from nemo_pvs.masks_stage import charge_stage, is_trained_first
from nemo_pvs.recipe import Arm, Recipe
from nemo_pvs.recipe_targets import needs_scores
from nemo_pvs.recipe_teacher import charge_teacher, inherit_ancestors
from nemo_pvs.reporting.ledger import Charge, Ledger
from nemo_pvs.shape import Shape


def run_ledger(
    recipe: Recipe, arm: Arm, stages: Mapping[str, Mapping[str, Any]], parent: Shape, model: WeightSource
) -> Ledger:
    """Charge an arm with its training, its teacher, and, when it was pruned, all that went into its initial weights.

    Args:
        recipe: Of the run.
        arm: The arm.
        stages: What ``calibrate`` and ``prune/<target>`` returned.
        parent: The parent's shape.
        model: The trained arm.

    Raises:
        UserError: the parent's ledger contradicts the recipe.
    """
    ledger = Ledger()
    inherit_ancestors(ledger, recipe, arm.target, arm.initialisation, parent)
    if arm.initialisation == "pruned":
        target = recipe.targets[arm.target]
        if needs_scores(target):
            tokens = stages["calibrate"]["tokens"]
            ledger.charges.append(charge_calibration(target, parent, tokens, recipe.calibrate.sequence_length))
        made = stages[f"prune/{arm.target}"]
        if own := made.get("calibration"):
            ledger.charges.append(Charge("calibration", own["tokens"], own["flops"], "while pruning, layer by layer"))
        if search := made.get("search"):
            task = recipe.targets[arm.target].task
            note = f"depth by {task}" if task else "depth scan, prefixes shared"
            ledger.charges.append(Charge("search", search["tokens"], search["flops"], note))
        if is_trained_first(target):
            charge_stage(ledger, recipe, target, parent)
    charge_training(ledger, arm, shape_of(model), count_masked(model))
    charge_teacher(ledger, recipe, arm, parent)
    return ledger


def count_masked(model: WeightSource) -> int:
    """Return how many weights the masks of a model hold at zero; one mask is in memory at a time."""
    masks = masks_of(model)
    return sum(int((~masks.read(name)).sum()) for name in masks.names)
