"""What a stage of ``pvs run`` would otherwise refuse after others have trained: checked before any work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemo_pvs.checkpoints.masks import masks_of
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import check_length
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import KEYS
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.stages.efficient import prunes_while_training
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.planning.equal_terms import arm_cost
from nemo_pvs.planning.learned import end_of_reading, is_trained_first, stage_reads
from nemo_pvs.recipe.options import expected_shape, reads_calibration
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import Machine

if TYPE_CHECKING:
    from nemo_pvs.pipeline.tokens import RunData, Splits


def check_costs(recipe: Recipe, parent: Shape) -> None:
    """Refuse a recipe that contradicts the ledger of its parent or its teacher.

    Args:
        recipe: With a number for each budget (``equal_terms.settle``).
        parent: Its parent's shape.

    Raises:
        UserError: naming the ledger.
    """
    for arm in recipe.runs:
        arm_cost(recipe, arm, expected_shape(recipe.targets[arm.target], parent).shape, parent)


def check_dense_parent(recipe: Recipe, parent: WeightSource) -> None:
    """Refuse a parent with masks of single weights where a method cannot train such a model.

    Raises:
        UserError: naming the target.
    """
    for name, target in recipe.targets.items():
        if prunes_while_training(target) and masks_of(parent).names:
            raise UserError(
                f"Target {name}: the parent is sparse, with masks of single weights; efficient-llm needs a dense one."
            )


def check_unread(recipe: Recipe, file: str | None) -> None:
    """Refuse to train the parent's weights again on what its ledger says that they have read.

    Args:
        recipe: With a number for each budget.
        file: Hash of the file with the training tokens; None where they are a blend, or in domains.

    Raises:
        UserError: unless the recipe allows it.
    """
    ledger = Ledger.of_checkpoint(Path(recipe.parent.source)) if recipe.parent.source else None
    if ledger is None or file is None or recipe.data.token_ranges.allow_overlap:
        return
    reading = [tokens_read(file, arm.training, arm.first_token) for arm in recipe.runs if arm.takes_parent]
    reading += [stage_reads(recipe, target, file) for target in recipe.targets.values() if is_trained_first(target)]
    for read in reading:
        read.check_new(ledger.read, KEYS)


def check_text(recipe: Recipe, tokens: RunData, splits: Splits) -> None:
    """Refuse splits that are too short for what a recipe reads of them, or that the parent was trained on.

    Args:
        recipe: With a number for each budget.
        tokens: The token files of the run.
        splits: What is known of them.

    Raises:
        UserError: naming the split.
    """
    tokens.check_end(splits, end_of_reading(recipe))
    check_unread(recipe, tokens.training_file(splits))
    wanted = recipe.evaluate
    check_length(
        splits["test"]["tokens"],
        samples=wanted.samples,
        sequence_length=wanted.sequence_length,
        data_set="test",
    )
    if any(map(reads_calibration, recipe.targets.values())):
        settings = recipe.calibrate
        check_length(
            splits["calibration"]["tokens"],
            samples=settings.samples,
            sequence_length=settings.sequence_length,
            seed=settings.seed,
            data_set="calibration",
        )


def check_machine(jobs: Iterable[TrainingJob]) -> None:
    """Refuse trainings that this machine cannot do.

    Raises:
        UserError: it lacks kernels that a layout or a precision needs, or GPUs.
    """
    machine = Machine.here()
    for job in jobs:
        machine.check(job.layout)
        machine.precision(job.training.precision)
        if machine.gpu and job.layout.processes > torch.cuda.device_count():
            raise UserError(
                f"{job.name} is spread over {job.layout.processes} ranks, but this machine has "
                f"{torch.cuda.device_count()} GPUs; change its layout, or run it elsewhere with --launch."
            )
