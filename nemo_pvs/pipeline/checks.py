"""Checks before any work, so that no stage of ``pvs run`` fails after others have trained."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_pvs.data.token_set import check_length
from nemo_pvs.errors import UserError
from nemo_pvs.pipeline.tokens import RunData, Splits
from nemo_pvs.planning.learned import end_of_reading
from nemo_pvs.planning.parent_checks import check_unread
from nemo_pvs.recipe.options import reads_calibration
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.launcher import gpus_of_each
from nemo_pvs.training.machine import Machine


def check_text(recipe: Recipe, tokens: RunData, splits: Splits) -> None:
    """Refuse splits that are too short for the recipe, or that the parent was trained on.

    Args:
        recipe: The recipe, with a number for each budget.
        tokens: The token files of the run.
        splits: Descriptions of the token files.

    Raises:
        UserError: naming the split.
    """
    tokens.check_end(splits, end_of_reading(recipe))
    check_unread(recipe, tokens.training_file(splits))
    evaluation = recipe.evaluate
    check_length(
        splits["test"].tokens,
        samples=evaluation.samples,
        sequence_length=evaluation.sequence_length,
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


def check_machine(jobs: Iterable[TrainingJob], at_once: int | None = None) -> None:
    """Refuse training jobs that this machine cannot run.

    Args:
        jobs: The jobs.
        at_once: Number of jobs that share its GPUs; None if each has all of them.

    Raises:
        UserError: it lacks GPUs, or kernels that a layout or a precision needs.
    """
    machine, gpus = Machine.here(), gpus_of_each(at_once or 1)
    for job in jobs:
        machine.check(job.layout)
        machine.precision(job.training.precision)
        if machine.gpu and job.layout.processes > gpus:
            if at_once is None:
                found, instead = f"this machine has {gpus} GPUs", "or run it elsewhere with --launch"
            else:
                found, instead = f"with --jobs {at_once} it gets {gpus} of this machine's GPUs", "or give fewer --jobs"
            raise UserError(
                f"{job.name} needs {job.layout.processes} ranks, but {found}; change its layout, {instead}."
            )
