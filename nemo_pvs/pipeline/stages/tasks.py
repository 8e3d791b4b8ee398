"""The stage that evaluates a recipe's tasks on the parent and every trained arm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
from nemo_pvs.evaluation.continuations import NAME
from nemo_pvs.evaluation.measure import RESULTS, measure
from nemo_pvs.evaluation.requests import EvaluationRequest, left_out, parse_tasks
from nemo_pvs.evaluation.store import Store
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.recipe_tasks import with_questions
from nemo_pvs.pipeline.records import TasksRecord, evaluation_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.planning.rounds import shares
from nemo_pvs.recipe.blocks import RECOVERY, Evaluation
from nemo_pvs.recipe.distillation import PARENT
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.reporting.numbers import and_list
from nemo_pvs.system.progress import console
from nemo_pvs.training.checkpoints import checkpoint_name
from nemo_pvs.training.trainer import with_manifest

TASKS = "tasks"
"""The folder in a run folder for the measurements."""


def ask_tasks(run: RunFolder) -> Stage[TasksRecord]:
    """Return the stage that evaluates models on the recipe's tasks, for the report.

    These are the parent and every trained arm, and the models before and during training that the recipe asks for.
    """
    settings, folder = run.recipe.evaluate, run.folder / TASKS
    of_recovery = {"recovery", "samples", "sequence_length"} if RECOVERY in settings.tasks else set()

    def inputs() -> Inputs:
        # Once the data of a task are there, the stage is done again, and reuses the answers that it has.
        lacking = _left_out(settings)
        return {
            "models": [fingerprint(open_source(model.path)) for model in _models(run)],
            "text": run.text("test"),
            "tasks": settings.model_dump(include={"tasks", "task_limit", *of_recovery}),
            **({"left out": lacking} if lacking else {}),
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
    missing = _left_out(settings)
    if missing:
        console.print(
            f"Left out of the tasks: {and_list(missing)}, whose data are not in {settings.task_data}; "
            f"{folder / 'results.json'} has the commands that download them.",
            soft_wrap=True,
        )


def _left_out(settings: Evaluation) -> list[str]:
    """Return the names of the tasks whose data are not here."""
    public = [task for task in settings.tasks if task != NAME]
    return [one.task for one in left_out(parse_tasks(",".join(public)), Path(settings.task_data))] if public else []


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
    tasks = with_questions(settings.tasks, test, tokenizer, folder, settings.task_limit)
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
