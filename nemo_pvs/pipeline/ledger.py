"""The ledger of a finished arm: the costs of its run's stages and of its parent."""

from __future__ import annotations

from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.planning.charges import charge_scores, charge_training, charges_of_spent, count_masked
from nemo_pvs.planning.learned import charge_learning, learned_target, learning_reads
from nemo_pvs.planning.rounds import shares
from nemo_pvs.planning.teacher import charge_teacher, inherit_ancestors
from nemo_pvs.recipe.options import needs_gradients, needs_scores, task_of
from nemo_pvs.recipe.recipe import Arm


def run_ledger(run: RunFolder, arm: Arm, model: WeightSource, read: TokensRead | None = None) -> Ledger:
    """Return the ledger of an arm: its training, its teacher and, if it was pruned, the cost of its initial weights.

    Args:
        run: The run; the stages that the arm was made from are done.
        arm: The arm.
        model: The trained arm.
        read: The tokens that it was trained on, if known.

    Raises:
        UserError: the parent's ledger contradicts the recipe.
    """
    recipe, parent = run.recipe, run.parent_shape
    ledger = Ledger()
    inherit_ancestors(ledger, recipe, arm.target, arm.initialisation, parent)
    if arm.initialisation == "pruned":
        target, made = recipe.targets[arm.target], run.records.pruned(arm.target)
        if needs_scores(target):
            tokens, length = run.records.scores(run.calibration_of(target)).tokens, recipe.calibrate.sequence_length
            ledger.charges.append(charge_scores(parent, tokens, length, gradients=needs_gradients(target)))
        if made.charges is not None:
            ledger.charges += made.charges
        else:
            ledger.charges += charges_of_spent(made.calibration, made.search, task_of(target))
        if learned := learned_target(recipe, target):
            learning_read = learning_reads(learned, read.data) if read else None
            charge_learning(ledger, learned, parent, learning_read)
    shape = shape_of(model)
    charge_training(ledger, shares(recipe, arm)[-1].training, shape, count_masked(model), read)
    charge_teacher(ledger, recipe, arm, parent, shape)
    return ledger
