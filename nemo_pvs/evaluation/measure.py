"""Measure checkpoints on tasks and texts, store each measurement, and write a summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
from nemo_pvs.evaluation.recovery import PREFIX, RecoveryMeasure
from nemo_pvs.evaluation.requests import EvaluationRequest, TaskRequest, left_out
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.summary import measured_before, summary, with_earlier
from nemo_pvs.evaluation.texts import windows_of
from nemo_pvs.system import ranks
from nemo_pvs.system.files import write_json
from nemo_pvs.system.progress import progress

RESULTS = "results.json"


def measure(
    models: Sequence[OpenedCheckpoint],
    request: EvaluationRequest,
    store: Store,
    engine: Engine,
    *,
    task_data: Path,
    parent: OpenedCheckpoint | None = None,
    held_out: Mapping[str, TokenSet] | None = None,
    limit: int | None = None,
    run_generated_code: bool = False,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Measure models on tasks and texts, reusing earlier measurements, and write ``results.json``.

    The file is in the store's folder, and results of earlier commands with the same folder remain in it.

    Args:
        models: The checkpoints to measure.
        request: The tasks and texts to measure them on.
        store: Stores every measurement.
        engine: What runs the models.
        task_data: Folder of downloaded data sets, each in ``<owner>/<name>``.
        parent: What the measures of recovery compare with; one of the models or another.
        held_out: Windows to take the measures of recovery on, as ``recovery/test``, by each checkpoint's path, the
            parent's included; None for the texts of the request.
        limit: Maximum number of documents per task, and of windows for the measures of recovery.
        run_generated_code: Allow tasks that run the code that a model has written.
        force: Measure again even if the store has the result.

    Returns:
        The requested results of each model; ``left_out`` names what could not be measured, with the reason.

    Raises:
        UserError: a task or a text is missing or does not suit a model, or ``results.json`` belongs to something other
            than an evaluation; nothing is measured then.
    """
    file = store.folder / RESULTS
    measured_before(file)
    loaded, not_here = _load_tasks(request.tasks, task_data, run_generated_code)
    texts = {model.path: _windows(request, model, task_data) for model in models}
    for model in models:
        model.check_answers(loaded)
        for tokens in texts[model.path].values():
            model.check_window(tokens.ids.shape[1] - 1)  # the last token is only predicted
    recovery = None
    if request.recovery:
        recovery = RecoveryMeasure(request.recovery, parent, store, engine, limit, force)
        if held_out is None:
            prompts = {**texts, **({parent.path: _windows(request, parent, task_data)} if parent else {})}
        else:
            prompts = {path: {"test": tokens} for path, tokens in held_out.items()}
        for model in [*models, *([parent] if parent else [])]:
            recovery.check(model, prompts[model.path])
        if parent:
            recovery.continue_as_parent(prompts[parent.path])
    results = []
    for model in models:
        measured: dict[str, Any] = {}
        for text, tokens in texts[model.path].items():
            name = f"perplexity/{text}"
            with progress(f"{name} of {model.path}", "layers") as show:
                metrics = model.measure_text(name, tokens, store, engine, show, force=force)
            measured.update({f"{name}/{metric}": result for metric, result in metrics.items()})
        missing = dict(not_here)
        with model.language_model(engine) as load:
            for task in loaded:
                with progress(f"{task.name} of {model.path}", "requests") as show:
                    metrics = model.measure_task(task, store, engine, load, show, limit=limit, force=force)
                measured.update({f"{task.name}/{metric}": result for metric, result in metrics.items()})
            if recovery:
                for text, tokens in prompts[model.path].items():
                    metrics = recovery.measure(model, text, tokens, load)
                    measured.update({f"{PREFIX}/{text}/{metric}": result for metric, result in metrics.items()})
                if prompts[model.path] and (reason := recovery.not_compared(model)):
                    missing["agreement and KL"] = reason
        measured.update(request.averages(measured))
        about = {**model.about(), "backend": model.backend, "limit": limit, "measured": measured}
        results.append({**about, **({"left_out": missing} if missing else {})})
    if ranks.is_main():
        known = with_earlier(results, measured_before(file))
        write_json(file, summary(known, engine.to_json()))
    return results


def _windows(request: EvaluationRequest, model: OpenedCheckpoint, data: Path) -> dict[str, TokenSet]:
    """Return the windows of each text, tokenised for a model, by the name of the text."""
    return {
        text: windows_of(
            text,
            tokenizer_folder(model.folder),
            samples=request.samples,
            sequence_length=request.sequence_length,
            stride=request.stride,
            train_split=request.train_split,
            data=data,
        )
        for text in request.texts
    }


def _load_tasks(
    requests: Sequence[TaskRequest], data: Path, run_generated_code: bool
) -> tuple[list[Any], dict[str, str]]:
    """Load tasks, and import lm-eval only if there are any, because that takes seconds.

    Returns:
        The tasks, and the names of those that are left out with the reason.
    """
    missing = left_out(requests, data)
    reasons = {request.task: reason for request, reason in missing.items()}
    here = [request for request in requests if request not in missing]
    if not here:
        return [], reasons
    from nemo_pvs.evaluation.tasks import load_tasks

    return load_tasks(here, data, run_generated_code=run_generated_code), reasons
