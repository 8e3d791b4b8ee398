"""The last measurements of a run: perplexity and validation loss of every model, and the tasks of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.stages.tasks import TASKS, measure_tasks
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.system.progress import progress
from nemo_pvs.training import metrics


def initial_label(arm: Arm) -> str:
    """Return what the evaluation of an arm's initial weights is called; all its budgets begin with the same."""
    return f"{arm.target}-{arm.initialisation}-initial"


def evaluate(run: RunFolder) -> None:
    """Measure perplexity on the test split, and the validation loss of models that no training measured."""
    validated = {arm.name: _is_validated(run, arm) for arm in run.recipe.runs}
    for label, path in models_to_evaluate(run).items():
        source = open_source(path)
        inputs = {
            "model": fingerprint(source),
            "text": run.text("test"),
            "settings": run.recipe.evaluate.model_dump(include={"samples", "sequence_length"}),
            "validation": run.results["data"]["validation_windows"]["ids_sha256"],
            **({} if validated.get(label, True) else {"validated": False}),
        }

        def work(source: WeightSource = source, label: str = label) -> dict[str, Any]:
            settings = run.recipe.evaluate
            test = TokenSet.from_token_file(
                run.tokens.prefix("test"),
                samples=settings.samples,
                sequence_length=settings.sequence_length,
            )
            texts = {"test": test}
            if not validated.get(label):
                texts["validation"] = run.tokens.validation_windows
            measured = {}
            for text, tokens in texts.items():
                with progress(f"{text} loss of {label}", "layers") as show:
                    measured[text] = perplexity(source, tokens, **run.compute, progress=show)
            return measured

        run.stage(f"evaluate/{label}", inputs, [], work, shared=True)


def _is_validated(run: RunFolder, arm: Arm) -> bool:
    """Return whether training measured the loss at its last step; one killed between saving and that did not."""
    job = run.job(arm)
    measured = metrics.read(job.metrics).validation
    return bool(measured) and measured[-1]["step"] == job.training.steps


def ask_tasks(run: RunFolder) -> None:
    """Ask the tasks of the recipe of the parent and of every trained arm; the report finds the answers."""
    settings, folder = run.recipe.evaluate, run.folder / TASKS
    models = [path for label, path in models_to_evaluate(run).items() if not label.endswith("-initial")]
    inputs = {
        "models": [fingerprint(open_source(path)) for path in models],
        "text": run.text("test"),
        "tasks": settings.model_dump(include={"tasks", "task_limit"}),
    }

    def work() -> dict[str, Any]:
        measure_tasks(settings, models, run.tokens.prefix("test"), run.tokenizer, folder, run.compute)
        return {}

    run.stage("evaluate/tasks", inputs, [folder], work, keep_partial=True)


def models_to_evaluate(run: RunFolder) -> dict[str, Path]:
    """Return every model of the run by label: the parent, each arm's initial weights, each trained arm."""
    models = {"parent": run.parent_path} if run.recipe.parent.source else {}
    for arm in run.recipe.runs:
        models[initial_label(arm)] = run.initial(arm.target, arm.initialisation)
        models[arm.name] = run.model(arm.name)
    return models
