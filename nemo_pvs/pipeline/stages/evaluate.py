"""The evaluate stages: perplexity and validation loss of every model."""

from __future__ import annotations

from pathlib import Path

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_bytes import token_bytes
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.perplexity import perplexity
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import EvaluationRecord, MeasuredLoss, evaluation_stage
from nemo_pvs.pipeline.stage import Inputs, Stage
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.system.progress import progress
from nemo_pvs.training import metrics


def initial_label(arm: Arm) -> str:
    """Return the label of an arm's initial weights, which are the same for all budgets."""
    return f"{arm.target}-{arm.initialisation}-initial"


def evaluate(run: RunFolder, label: str, path: Path) -> Stage[EvaluationRecord]:
    """Return the stage that measures a model's perplexity, and its validation loss unless training measured it.

    Args:
        run: The run folder.
        label: Label of the model (``models_to_evaluate``).
        path: Its checkpoint folder.
    """
    settings = run.recipe.evaluate
    arm = next((arm for arm in run.recipe.runs if arm.name == label), None)
    target = next((arm.target for arm in run.arms if label in (arm.name, initial_label(arm))), None)
    tokens = run.tokens_of(target)
    validated = arm is not None and _is_validated(run, arm)

    def inputs() -> Inputs:
        return {
            "model": fingerprint(open_source(path)),
            "text": run.text("test", target),
            "settings": settings.model_dump(include={"samples", "sequence_length"}),
            "validation": run.data_of(target).windows_sha256,
            **({"validated": False} if arm is not None and not validated else {}),
            **({"texts": run.tokens.text_hashes} if settings.texts else {}),
        }

    def measure(text: str, token_set: TokenSet) -> MeasuredLoss:
        with progress(f"{text} loss of {label}", "layers") as show:
            size = token_bytes(run.tokenizer_of(target))
            measured = perplexity(open_source(path), token_set, run.compute, token_bytes=size, progress=show)
            return MeasuredLoss.from_json(measured)

    def windows(prefix: Path) -> TokenSet:
        return TokenSet.from_token_file(prefix, samples=settings.samples, sequence_length=settings.sequence_length)

    def work() -> EvaluationRecord:
        measured = measure("test", windows(tokens.prefix("test")))
        validation = None if validated else measure("validation", tokens.validation_windows)
        texts = {name: measure(name, windows(Path(prefix))) for name, prefix in settings.texts.items()}
        return EvaluationRecord(measured, validation, texts or None)

    return Stage(name=evaluation_stage(label), record=EvaluationRecord, inputs=inputs, work=work, shared=True)


def _is_validated(run: RunFolder, arm: Arm) -> bool:
    """Return whether training measured the loss at its last step, which a kill after the last save prevents."""
    job = run.job(arm)
    measured = metrics.read(job.metrics).validation
    return bool(measured) and measured[-1]["step"] == job.training.steps


def models_to_evaluate(run: RunFolder) -> dict[str, Path]:
    """Return every model of the run by label: the parent, each arm's initial weights, each trained arm."""
    models = {"parent": run.parent_path} if run.recipe.parent.source else {}
    for arm in run.arms:
        models[initial_label(arm)] = run.initial(arm.target, arm.initialisation)
        models[arm.name] = run.model(arm.name)
    return models
