"""The tasks of a recipe, asked of the parent and of every trained arm of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.checkpoint import Checkpoint, Compute
from nemo_pvs.evaluation.continuations import NAME, write_continuations
from nemo_pvs.evaluation.measure import measure
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.wishes import Wishes
from nemo_pvs.recipe_blocks import Evaluation

TASKS = "tasks"
"""The folder in a run folder that they are measured in."""
_QUESTIONS = 100
"""Of the task ``continuation``, unless the recipe limits it."""


def measure_tasks(
    settings: Evaluation,
    models: Sequence[Path],
    test: Path,
    tokenizer: Path,
    folder: Path,
    compute: Mapping[str, Any],
) -> None:
    """Ask every model; an answer that is kept from before is not asked for again.

    Args:
        settings: The recipe's ``evaluate`` block.
        models: Checkpoint folders.
        test: Prefix of the token file that ``continuation`` is made of.
        tokenizer: Folder of the run's tokenizer.
        folder: Where ``results.json`` and every measurement go.
        compute: Where layers run.

    Raises:
        UserError: a task or its data are not there.
    """
    asked = list(settings.tasks)
    if NAME in asked:
        made = folder / NAME
        write_continuations(test, load_tokenizer(tokenizer), made, settings.task_limit or _QUESTIONS)
        asked[asked.index(NAME)] = str(made)
    measure(
        [Checkpoint(str(path), "transformers") for path in models],
        Wishes.parse(",".join(asked), ["none"]),
        Store(folder),
        Compute(**compute),
        task_data=Path(settings.task_data),
        limit=settings.task_limit,
    )
