"""Measure checkpoints on tasks and texts, store each measurement, and write a summary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pvs.data.assets import tokenizer_folder
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.evaluation.checkpoint import Checkpoint, Engine
from nemo_pvs.evaluation.requests import EvaluationRequest, TaskRequest
from nemo_pvs.evaluation.store import Store
from nemo_pvs.evaluation.summary import measured_before, summary, with_earlier
from nemo_pvs.evaluation.texts import windows_of
from nemo_pvs.system import ranks
from nemo_pvs.system.files import write_json
from nemo_pvs.system.progress import progress

RESULTS = "results.json"


def measure(
    models: Sequence[Checkpoint],
    request: EvaluationRequest,
    store: Store,
    engine: Engine,
    *,
    task_data: Path,
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
        limit: Maximum number of documents per task.
        run_generated_code: Allow tasks that run the code that a model has written.
        force: Measure again even if the store has the result.

    Returns:
        The requested results of each model.

    Raises:
        UserError: a task or a text is missing or does not suit a model, or ``results.json`` belongs to something other
            than an evaluation; nothing is measured then.
    """
    file = store.folder / RESULTS
    measured_before(file)
    loaded = _load_tasks(request.tasks, task_data, run_generated_code)
    texts = {model.path: _windows(request, model, task_data) for model in models}
    results = []
    for model in models:
        measured: dict[str, Any] = {}
        for name, tokens in texts[model.path].items():
            with progress(f"{name} of {model.path}", "layers") as show:
                metrics = model.measure_text(name, tokens, store, engine, show, force=force)
            measured.update({f"{name}/{metric}": result for metric, result in metrics.items()})
        with model.language_model(engine) as load:
            for task in loaded:
                with progress(f"{task.name} of {model.path}", "requests") as show:
                    metrics = model.measure_task(task, store, engine, load, show, limit=limit, force=force)
                measured.update({f"{task.name}/{metric}": result for metric, result in metrics.items()})
        measured.update(request.averages(measured))
        results.append({**model.about(), "backend": model.backend, "limit": limit, "measured": measured})
    if ranks.is_main():
        known = with_earlier(results, measured_before(file))
        write_json(file, summary(known, engine.to_json()))
    return results


def _windows(request: EvaluationRequest, model: Checkpoint, data: Path) -> dict[str, TokenSet]:
    """Return the windows of each text, tokenised for a model, by the name of the measurement."""
    return {
        f"perplexity/{text}": windows_of(
            text,
            tokenizer_folder(Path(model.path)),
            samples=request.samples,
            sequence_length=request.sequence_length,
            stride=request.stride,
            train_split=request.train_split,
            data=data,
        )
        for text in request.texts
    }


def _load_tasks(requests: Sequence[TaskRequest], data: Path, run_generated_code: bool) -> list[Any]:
    """Load tasks, and import lm-eval only if there are any, because that takes seconds."""
    if not requests:
        return []
    from nemo_pvs.evaluation.tasks import load_tasks

    return load_tasks(requests, data, run_generated_code=run_generated_code)
