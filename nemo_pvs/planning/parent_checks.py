"""Check a recipe against its parent: its ledger, the tokens that it has read and its masks."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import KEYS
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.planning.learned import learned_target, learned_targets, learning_reads
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.recipe.recipe import Recipe


def check_costs(recipe: Recipe, parent: Shape) -> None:
    """Refuse a recipe that contradicts the ledger of its parent or its teacher.

    Args:
        recipe: The recipe, with a number for each budget (``equal_terms.settle``).
        parent: Its parent's shape.

    Raises:
        UserError: naming the ledger.
    """
    for arm in recipe.runs:
        arm_cost(recipe, arm, expected_shape(recipe.targets[arm.target], parent).shape, parent)


def check_dense_parent(recipe: Recipe, parent: WeightSource) -> None:
    """Refuse a sparse parent (with masks of single weights) if a target's method cannot train it.

    Raises:
        UserError: naming the target.
    """
    for name, target in recipe.targets.items():
        learned = learned_target(recipe, target)
        if learned and learned.needs_dense_parent and masks_of(parent).names:
            raise UserError(
                f"Target {name}: the parent is sparse, with masks of single weights; {target.method} needs a dense "
                "one."
            )


def check_unread(recipe: Recipe, file: str | None) -> None:
    """Refuse to train the parent's weights again on tokens that they have read according to its ledger.

    Args:
        recipe: The recipe, with a number for each budget.
        file: Hash of the training token file; None if the tokens are a blend or in domains.

    Raises:
        UserError: there is an overlap, and the recipe does not set ``allow_overlap``.
    """
    ledger = Ledger.of_checkpoint(Path(recipe.parent.source)) if recipe.parent.source else None
    if ledger is None or file is None or recipe.data.token_ranges.allow_overlap:
        return
    reading = [tokens_read(file, arm.training, arm.first_token) for arm in recipe.runs if arm.takes_parent]
    reading += [learning_reads(learned, file) for learned in learned_targets(recipe)]
    for read in reading:
        read.check_new(ledger.read, KEYS)
