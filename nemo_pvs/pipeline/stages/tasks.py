"""The tasks of a recipe: asked of the parent and of every trained arm, or to choose the layers of a target by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.checkpoint import Checkpoint, Engine
from nemo_pvs.evaluation.continuations import NAME, check_continuations, write_continuations
from nemo_pvs.evaluation.measure import measure
from nemo_pvs.evaluation.requests import EvaluationRequest, parse_tasks
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import TasksRecord, evaluation_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.pipeline.stages.evaluate import models_to_evaluate
from nemo_pvs.pruning.request import TaskScorer
from nemo_pvs.recipe.blocks import TASK_DATA, Evaluation
from nemo_pvs.recipe.options import task_limit_of, task_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target

TASKS = "tasks"
"""The folder in a run folder that they are measured in."""
_QUESTIONS = 100
"""Of the task ``continuation``, unless the recipe limits it."""


def ask_tasks(run: RunFolder) -> Stage[TasksRecord]:
    """Return the stage that evaluates the parent and every trained arm on the recipe's tasks, for the report."""
    settings, folder = run.recipe.evaluate, run.folder / TASKS

    def models() -> list[Path]:
        return [path for label, path in models_to_evaluate(run).items() if not label.endswith("-initial")]

    def inputs() -> Inputs:
        return {
            "models": [fingerprint(open_source(path)) for path in models()],
            "text": run.text("test"),
            "tasks": settings.model_dump(include={"tasks", "task_limit"}),
        }

    def work() -> TasksRecord:
        measure_tasks(settings, models(), run.tokens.prefix("test"), run.tokenizer, folder, run.compute)
        return TasksRecord()

    return Stage(
        name=evaluation_stage(TASKS),
        record=TasksRecord,
        inputs=inputs,
        work=work,
        outputs=[folder],
        keep_partial=True,
    )


def measure_tasks(
    settings: Evaluation,
    models: Sequence[Path],
    test: Path,
    tokenizer: Path,
    folder: Path,
    compute: Compute,
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
        EvaluationRequest.parse(",".join(asked), ["none"]),
        Store(folder),
        Engine(compute),
        task_data=Path(settings.task_data),
        limit=settings.task_limit,
    )


def check_tasks(recipe: Recipe) -> None:
    """Refuse tasks of lm-eval that are not here, with their data: of ``evaluate`` and of every target.

    Raises:
        UserError: naming the task.
    """
    asked = [(recipe.evaluate.tasks, recipe.evaluate.task_data)]
    asked += [
        (_tasks_of(target), target.task_data or TASK_DATA) for target in recipe.targets.values() if task_of(target)
    ]
    for tasks, data in asked:
        if public := [task for task in tasks if task != NAME]:
            from nemo_pvs.evaluation.tasks import load_tasks  # takes seconds

            load_tasks(parse_tasks(",".join(public)), Path(data))


def check_questions(recipe: Recipe, test: Path, calibration: Path, tokenizer: Path) -> None:
    """Refuse text that is too short for the questions of ``continuation`` that ``evaluate`` and targets ask.

    Args:
        recipe: The recipe.
        test: Prefix of the token file that questions of ``evaluate`` are made of.
        calibration: Prefix of the one that those of targets are made of.
        tokenizer: Folder of the run's tokenizer.

    Raises:
        UserError: saying for how many questions it is long enough.
    """
    asked = [(recipe.evaluate.tasks, test, recipe.evaluate.task_limit)]
    asked += [(_tasks_of(target), calibration, task_limit_of(target)) for target in recipe.targets.values()]
    for tasks, text, limit in asked:
        if NAME in tasks and Path(f"{text}.idx").exists():
            check_continuations(text, load_tokenizer(tokenizer), limit or _QUESTIONS)


def search_score(target: Target, text: Path, tokenizer: Path, folder: Path, compute: Compute) -> TaskScorer:
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
    asked = _with_questions(_tasks_of(target), text, tokenizer, folder, task_limit_of(target))
    data = Path(target.task_data or TASK_DATA)
    return task_score(",".join(asked), tokenizer, data, limit=task_limit_of(target), compute=compute)


def reads_text(target: Target) -> bool:
    """Return whether the task of a target is made of the run's own text."""
    return NAME in _tasks_of(target)


def _tasks_of(target: Target) -> list[str]:
    return [task.strip() for task in (task_of(target) or "").split(",")]


def _with_questions(tasks: Sequence[str], text: Path, tokenizer: Path, folder: Path, limit: int | None) -> list[str]:
    """Return the tasks, in the place of ``continuation`` the path of its questions, which are made here."""
    if NAME not in tasks:
        return list(tasks)
    made = folder / NAME
    write_continuations(text, load_tokenizer(tokenizer), made, limit or _QUESTIONS)
    return [str(made) if task == NAME else task for task in tasks]
