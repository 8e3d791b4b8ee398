"""Checks before any work, so that no stage of ``pvs run`` fails after others have trained."""

from __future__ import annotations

from nemo_pvs.data.token_set import check_documents, check_length, document_lengths
from nemo_pvs.pipeline.tokens import RunData, Splits
from nemo_pvs.planning.learned import end_of_reading
from nemo_pvs.planning.parent_checks import check_unread
from nemo_pvs.recipe.options import reads_calibration
from nemo_pvs.recipe.recipe import Recipe


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
        if settings.windows == "documents":
            check_documents(
                document_lengths(tokens.prefix("calibration")),
                samples=settings.samples,
                sequence_length=settings.sequence_length,
                seed=settings.seed,
                data_set="calibration",
            )
