"""The tasks of a recipe: asked of the parent and of every trained arm, or to choose the layers of a target by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.checkpoint import Checkpoint, Compute
from nemo_pvs.evaluation.continuations import NAME, write_continuations
from nemo_pvs.evaluation.measure import measure
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.evaluation.wishes import Wishes
from nemo_pvs.pruning.depth_task import Scorer
from nemo_pvs.recipe_blocks import TASK_DATA, Evaluation, Target

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
    asked = _with_questions(settings.tasks, test, tokenizer, folder, settings.task_limit)
    measure(
        [Checkpoint(str(path), "transformers") for path in models],
        Wishes.parse(",".join(asked), ["none"]),
        Store(folder),
        Compute(**compute),
        task_data=Path(settings.task_data),
        limit=settings.task_limit,
    )


def search_score(target: Target, text: Path, tokenizer: Path, folder: Path, compute: Mapping[str, Any]) -> Scorer:
    """Return what measures candidates by the task of a target.

    Args:
        target: With a task.
        text: Prefix of the token file that ``continuation`` is made of.
        tokenizer: Folder of the run's tokenizer.
        folder: Where its questions go.
        compute: Where models run.

    Raises:
        UserError: a task or its data are not there.
    """
    asked = _with_questions(_tasks_of(target), text, tokenizer, folder, target.task_limit)
    where = {name: compute[name] for name in ("dtype", "device") if name in compute}
    data = Path(target.task_data or TASK_DATA)
    return task_score(",".join(asked), tokenizer, data, limit=target.task_limit, **where)


def reads_text(target: Target) -> bool:
    """Return whether the task of a target is made of the run's own text."""
    return NAME in _tasks_of(target)


def _tasks_of(target: Target) -> list[str]:
    return [task.strip() for task in (target.task or "").split(",")]


def _with_questions(tasks: Sequence[str], text: Path, tokenizer: Path, folder: Path, limit: int | None) -> list[str]:
    """Return the tasks, in the place of ``continuation`` the path of its questions, which are made here."""
    if NAME not in tasks:
        return list(tasks)
    made = folder / NAME
    write_continuations(text, load_tokenizer(tokenizer), made, limit or _QUESTIONS)
    return [str(made) if task == NAME else task for task in tasks]
