"""What a stage of ``pvs run`` would otherwise refuse after others have trained: checked before any work."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nemo_pvs.data.token_set import check_length
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.tokens import RunData, Splits
from nemo_pvs.planning.learned import end_of_reading
from nemo_pvs.planning.parent_checks import check_unread
from nemo_pvs.recipe.options import reads_calibration
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.machine import Machine


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
        splits["test"].tokens,
        samples=wanted.samples,
        sequence_length=wanted.sequence_length,
        data_set="test",
    )
    if any(map(reads_calibration, recipe.targets.values())):
        settings = recipe.calibrate
        check_length(
            splits["calibration"].tokens,
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
