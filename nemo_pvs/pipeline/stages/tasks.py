"""The tasks of a recipe: evaluated on the parent and every trained arm, or used to choose a target's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.data.tokenize import load_tokenizer
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
from nemo_pvs.evaluation.continuations import NAME, check_continuations, write_continuations
from nemo_pvs.evaluation.measure import RESULTS, measure
from nemo_pvs.evaluation.requests import EvaluationRequest, left_out, parse_tasks
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.task_score import task_score
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import TasksRecord, evaluation_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.planning.rounds import shares
from nemo_pvs.pruning.request import TaskScorer
from nemo_pvs.recipe.blocks import RECOVERY, TASK_DATA, Evaluation
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.options import task_limit_of, task_of
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.reporting.numbers import and_list
from nemo_pvs.system.progress import console
from nemo_pvs.training.checkpoints import checkpoint_name
from nemo_pvs.training.trainer import with_manifest

TASKS = "tasks"
"""The folder in a run folder for the measurements."""
_QUESTIONS = 100
"""Questions of the task ``continuation``, unless the recipe sets a limit."""


def ask_tasks(run: RunFolder) -> Stage[TasksRecord]:
    """Return the stage that evaluates models on the recipe's tasks, for the report.

    These are the parent and every trained arm, and the models before and during training that the recipe asks for.
    """
    settings, folder = run.recipe.evaluate, run.folder / TASKS
    windows = {"samples", "sequence_length"}
    # Windows of the default size are left out, as in the records of earlier versions.
    sized = settings.model_dump(include=windows) != Evaluation().model_dump(include=windows)
    of_recovery = {"recovery", *(windows if sized else ())} if RECOVERY in settings.tasks else set()

    def inputs() -> Inputs:
        return {
            "models": [fingerprint(open_source(model.path)) for model in _models(run)],
            "text": run.text("test"),
            "tasks": settings.model_dump(include={"tasks", "task_limit", *of_recovery}),
        }

    def work() -> TasksRecord:
        models = _models(run)
        measure_tasks(settings, models, run.tokens.prefix("test"), run.tokenizer, folder, run.compute)
        before_the_end: dict[str, dict[str, str]] = {}
        for model in models:
            if model.tokens is not None:
                before_the_end.setdefault(model.arm, {})[str(model.tokens)] = fingerprint(open_source(model.path))
        return TasksRecord(before_the_end or None)

    return Stage(
        name=evaluation_stage(TASKS),
        record=TasksRecord,
        inputs=inputs,
        work=work,
        outputs=[folder / RESULTS],
        reusable=[folder],  # answers of other arms or tasks, which are found there by model, task and settings
        keep_partial=True,
    )


def say_not_kept(run: RunFolder) -> None:
    """Print which models during training cannot be evaluated, because their checkpoints were not kept."""
    for model in [model for arm in run.arms for model in _before_the_end(run, arm) if not model.path.exists()]:
        console.print(
            f"{model.arm} after {model.tokens:,} tokens is not evaluated: the training was finished before "
            "evaluate.at asked to keep that checkpoint.",
            soft_wrap=True,
        )


def say_left_out(settings: Evaluation, folder: Path) -> None:
    """Print which tasks of a preset are left out, because their data are not here.

    Args:
        settings: The recipe's ``evaluate`` block.
        folder: The folder for ``results.json``, which has the commands that download the data.
    """
    public = [task for task in settings.tasks if task != NAME]
    missing = left_out(parse_tasks(",".join(public)), Path(settings.task_data)) if public else {}
    if missing:
        names = and_list([request.task for request in missing])
        console.print(
            f"Left out of the tasks: {names}, whose data are not in {settings.task_data}; "
            f"{folder / 'results.json'} has the commands that download them.",
            soft_wrap=True,
        )


@dataclass(frozen=True)
class EvaluatedModel:
    """A model that is evaluated on a recipe's tasks."""

    path: Path
    """Its checkpoint folder."""
    test: Path
    """Prefix of the token file of the test split, in its tokens."""
    arm: str = PARENT
    """The arm that it belongs to."""
    tokens: int | None = None
    """Tokens that it has been trained on, if its training went on; None for the parent and trained arms."""


def _models(run: RunFolder) -> list[EvaluatedModel]:
    """Return the models to evaluate that are here: the parent, and each arm before, during and after its training."""
    parent = EvaluatedModel(run.parent_path, run.tokens.prefix("test"))
    models = [parent] if run.recipe.parent.source else []
    for arm in run.arms:
        before_the_end = [model for model in _before_the_end(run, arm) if model.path.exists()]
        models += [replace(model, path=with_manifest(model.path)) for model in before_the_end]
        models.append(EvaluatedModel(run.model(arm.name), run.tokens_of(arm.target).prefix("test"), arm.name))
    return models


def _before_the_end(run: RunFolder, arm: Arm) -> list[EvaluatedModel]:
    """Return the models before and during an arm's training that the recipe asks for."""
    first, models = shares(run.recipe, arm)[-1].first_step, []
    for step in run.evaluated_steps(arm):
        kept = run.job(arm).checkpoints / checkpoint_name(step)
        path = kept if step else run.initial(arm.target, arm.initialisation)
        tokens = (first + step) * arm.training.tokens_per_step
        models.append(EvaluatedModel(path, run.tokens_of(arm.target).prefix("test"), arm.name, tokens))
    return models


def measure_tasks(
    settings: Evaluation,
    models: Sequence[EvaluatedModel],
    test: Path,
    tokenizer: Path,
    folder: Path,
    compute: Compute,
) -> None:
    """Evaluate every model; answers that are already stored are reused.

    Args:
        settings: The recipe's ``evaluate`` block.
        models: The models; the first of ``PARENT`` is what ``recovery`` compares with.
        test: Prefix of the token file from which ``continuation`` is made.
        tokenizer: Folder of the run's tokenizer.
        folder: Folder for ``results.json`` and all measurements.
        compute: Where layers run.

    Raises:
        UserError: a task or its data do not exist here.
    """
    tasks = _with_questions(settings.tasks, test, tokenizer, folder, settings.task_limit)
    checkpoints = {str(model.path): OpenedCheckpoint(str(model.path), "transformers") for model in models}
    request = EvaluationRequest.parse(",".join(tasks), ["none"])
    windows = None
    if request.recovery:
        request = replace(request, recovery=settings.recovery)
        windows = {str(model.path): _windows(settings, model) for model in models}
    measure(
        list(checkpoints.values()),
        request,
        Store(folder),
        Engine(compute),
        task_data=Path(settings.task_data),
        parent=next((checkpoints[str(model.path)] for model in models if model.arm == PARENT), None),
        held_out=windows,
        limit=settings.task_limit,
    )


def _windows(settings: Evaluation, model: EvaluatedModel) -> TokenSet:
    return TokenSet.from_token_file(model.test, samples=settings.samples, sequence_length=settings.sequence_length)


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
    tasks = _with_questions(_tasks_of(target), text, tokenizer, folder, task_limit_of(target))
    data = Path(target.task_data or TASK_DATA)
    return task_score(",".join(tasks), tokenizer, data, limit=task_limit_of(target), compute=compute)


def reads_text(target: Target) -> bool:
    """Return whether a target's task is made from the run's own text."""
    return NAME in _tasks_of(target)


def _tasks_of(target: Target) -> list[str]:
    return [task.strip() for task in (task_of(target) or "").split(",")]


def _with_questions(tasks: Sequence[str], text: Path, tokenizer: Path, folder: Path, limit: int | None) -> list[str]:
    """Write the questions of ``continuation``, and return the tasks with their path in its place."""
    if NAME not in tasks:
        return list(tasks)
    made = folder / NAME
    write_continuations(text, load_tokenizer(tokenizer), made, limit or _QUESTIONS)
    return [str(made) if task == NAME else task for task in tasks]
