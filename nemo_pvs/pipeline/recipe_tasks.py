"""The tasks of a recipe and of its targets: checked before any work, and used to choose a target's layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.continuations import NAME, check_continuations, write_continuations
from nemo_pvs.evaluation.requests import left_out, parse_tasks
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pruning.request import TaskScorer
from nemo_pvs.recipe.blocks import TASK_DATA
from nemo_pvs.recipe.options import task_limit_of, task_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target

_QUESTIONS = 100
"""Questions of the task ``continuation``, unless the recipe sets a limit."""


def check_tasks(recipe: Recipe) -> None:
    """Refuse lm-eval tasks of ``evaluate`` and of targets that do not exist here, or whose data do not.

    Raises:
        UserError: naming the task.
    """
    asked = [(recipe.evaluate.tasks, recipe.evaluate.task_data)]
    asked += [
        (_tasks_of(target), target.task_data or TASK_DATA) for target in recipe.targets.values() if task_of(target)
    ]
    for tasks, data in asked:
        public = [task for task in tasks if task != NAME]
        requests = parse_tasks(",".join(public)) if public else []
        missing = left_out(requests, Path(data))
        if here := [request for request in requests if request not in missing]:
            from nemo_pvs.evaluation.tasks import load_tasks  # takes seconds

            load_tasks(here, Path(data))


def check_questions(recipe: Recipe, test: Path, calibration: Path, tokenizer: Path) -> None:
    """Refuse text that is too short for the ``continuation`` questions of ``evaluate`` and of targets.

    Args:
        recipe: The recipe.
        test: Prefix of the token file from which the questions of ``evaluate`` are made.
        calibration: Prefix of the token file from which the questions of targets are made.
        tokenizer: Folder of the run's tokenizer.

    Raises:
        UserError: saying how many questions the text is long enough for.
    """
    asked = [(recipe.evaluate.tasks, test, recipe.evaluate.task_limit)]
    asked += [(_tasks_of(target), calibration, task_limit_of(target)) for target in recipe.targets.values()]
    for tasks, text, limit in asked:
        if NAME in tasks and Path(f"{text}.idx").exists():
            check_continuations(text, load_tokenizer(tokenizer), limit or _QUESTIONS)


def search_score(target: Target, text: Path, tokenizer: Path, folder: Path, compute: Compute) -> TaskScorer:
    """Return the scorer that measures candidates by a target's task.

    Args:
        target: A target with a task.
        text: Prefix of the token file from which ``continuation`` is made.
        tokenizer: Folder of the run's tokenizer.
        folder: Folder for the questions of ``continuation``.
        compute: Where models run.

    Raises:
        UserError: a task or its data do not exist here.
    """
    tasks = with_questions(_tasks_of(target), text, tokenizer, folder, task_limit_of(target))
    data = Path(target.task_data or TASK_DATA)
    return task_score(",".join(tasks), tokenizer, data, limit=task_limit_of(target), compute=compute)


def reads_text(target: Target) -> bool:
    """Return whether a target's task is made from the run's own text."""
    return NAME in _tasks_of(target)


def _tasks_of(target: Target) -> list[str]:
    return [task.strip() for task in (task_of(target) or "").split(",")]


def with_questions(tasks: Sequence[str], text: Path, tokenizer: Path, folder: Path, limit: int | None) -> list[str]:
    """Write the questions of ``continuation``, and return the tasks with their path in its place."""
    if NAME not in tasks:
        return list(tasks)
    made = folder / NAME
    write_continuations(text, load_tokenizer(tokenizer), made, limit or _QUESTIONS)
    return [str(made) if task == NAME else task for task in tasks]
