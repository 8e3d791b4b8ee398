"""Measuring checkpoints on tasks and texts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from nemo_pvs.api.values import compute_of, one_of, parse_dtype
from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder

_BACKENDS = ("auto", "transformers", "megatron")


class Measurement(TypedDict):
    """One number that was measured of one model."""

    model: str
    """Its path, as given."""
    task: str
    """The task with its shots (``arc_easy/0-shot``), the text (``perplexity/wikitext``, ``recovery/wikitext``) or the
    preset (``paper``)."""
    metric: str
    """``acc``, ``acc_norm``, ``perplexity``, ``loss`` (nats per token), ``bits_per_byte``, ``average``, ``agreement``,
    ``kl`` (nats per token), ..."""
    value: float
    stderr: float | None
    """Standard error; None where there is none, as for a single question."""
    higher_is_better: bool
    documents: int
    """Questions of the task, or windows of the text."""
    parameters: int
    """Of the model."""
    backend: str
    """What answered the tasks: ``transformers`` or ``megatron``."""


class Measurements(list[Measurement]):
    """Measurements as flat rows, which ``pandas.DataFrame`` takes; ``models`` has them nested, with all details."""

    def __init__(self, models: list[dict[str, Any]]) -> None:
        """Flatten what ``evaluation.measure`` returned, which stays in ``models``."""
        super().__init__(_row(model, name, about) for model in models for name, about in model["measured"].items())
        self.models = models


def evaluate(
    paths: str | Path | Sequence[str | Path],
    *,
    tasks: str | None = None,
    parent: str | Path | None = None,
    perplexity: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    samples: int | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    task_data: str | Path = "task_data",
    run_generated_code: bool = False,
    out: str | Path = "runs/evaluation",
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    activation_memory: str = "auto",
    compat: bool = False,
    ignore_manifest: bool = False,
    force: bool = False,
) -> Measurements:
    """Measure checkpoints on zero-shot and few-shot tasks and by perplexity; what has been measured is not repeated.

    Args:
        paths: Checkpoints of any format, ``.gguf`` files, ``smollm2-135m`` or ``hf://owner/name``, one or several.
        tasks: ``paper``, ``recovery``, names of lm-eval's tasks (``winogrande:5`` for five shots) or a folder of its
            YAML files, separated by commas.
        parent: The model with which ``recovery`` compares the others; one of them or another.
        perplexity: Texts: ``c4``, ``wikitext``, ``cnn_dailymail``, ``wikipedia-sample``, files of your own, or
            ``none``. Without tasks it is ``wikipedia-sample``.
        limit: Maximum documents per task, and windows of ``recovery``.
        samples: Maximum windows per text; 64, or the preset's.
        sequence_length: Tokens per window; 512, or the preset's.
        stride: Sliding windows this many tokens apart, instead of chunks.
        task_data: Folder of downloaded data sets, ``<owner>/<name>`` each.
        run_generated_code: Allow tasks such as HumanEval, which run the code that a model has written, with all your
            rights on this machine.
        out: The folder for ``results.json`` and every measurement.
        backend: What answers tasks: ``megatron``, ``transformers``, or ``auto``, which is Megatron for NeMo
            checkpoints.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        dtype: ``bf16``, ``fp16`` or ``fp32``; by default bf16 on a GPU and fp32 on a CPU.
        batch_size: Requests per batch; by default as many as fit in memory.
        tensor_parallel: Megatron ranks that share each matrix.
        pipeline_parallel: Megatron ranks that share the layers.
        activation_memory: Memory for hidden states, such as ``8GB``; ``auto`` is 8 GB on a CPU, and with a GPU what
            fits there and in page-locked memory.
        compat: Measure perplexity on training text, as the paper's code does, to compare with its numbers.
        ignore_manifest: Read weights that differ from their manifest.
        force: Repeat measurements that have been made before.

    Returns:
        A row per model, task and metric.

    Raises:
        UserError: a checkpoint, a task or a text cannot be read, or they do not suit each other.

    Example:
        >>> import nemo_pvs as pvs
        >>> rows = pvs.evaluate(
        ...     [model], perplexity=text, samples=2, sequence_length=16, out=folder / "evaluation"
        ... )
        >>> [(row["metric"], row["value"] > 1, row["documents"]) for row in rows]
        [('loss', True, 2), ('perplexity', True, 2)]
    """
    out = Path(out)
    check_folder(out)
    one_of("--backend", backend, _BACKENDS)
    for option, value in (
        ("--limit", limit),
        ("--batch-size", batch_size),
        ("--tensor-parallel", tensor_parallel),
        ("--pipeline-parallel", pipeline_parallel),
    ):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; give 1 or more.")
    # Imported only now: these take seconds, and the checks above should answer at once.
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.evaluation.checkpoint import Engine, OpenedCheckpoint
    from nemo_pvs.evaluation.measure import measure
    from nemo_pvs.evaluation.requests import EvaluationRequest
    from nemo_pvs.evaluation.store import Store
    from nemo_pvs.system import ranks

    chosen = compute_of(device, activation_memory)
    engine = Engine(
        replace(chosen, dtype=parse_dtype(dtype) or chosen.dtype),
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        batch_size=batch_size,
    )
    request = EvaluationRequest.parse(
        tasks,
        None if perplexity is None else _texts(perplexity),
        samples=samples,
        sequence_length=sequence_length,
        stride=stride,
        train_split=compat,
    )
    if parent is not None and request.recovery is None:
        raise UserError(
            "--parent is for --tasks recovery, which compares with it; add recovery, or leave --parent out."
        )
    store = Store(out)
    chosen_backend: Any = None if backend == "auto" else backend
    with (
        ignoring_manifests(ignore_manifest),
        ranks.joined(on_gpus=True),
        ranks.held_by_main(locked_folder(store.folder)),
        ExitStack() as folders,
    ):
        engine.check_ranks()

        def opened(path: str) -> OpenedCheckpoint:
            return OpenedCheckpoint(path, chosen_backend, folders.enter_context(local_checkpoint(path)))

        models = [opened(path) for path in _texts(paths)]
        reference = None
        if parent is not None:  # opened once if it is one of the models
            reference = next((model for model in models if model.path == str(parent)), None) or opened(str(parent))
        found = measure(
            models,
            request,
            store,
            engine,
            task_data=Path(task_data),
            parent=reference,
            limit=limit,
            run_generated_code=run_generated_code,
            force=force,
        )
    return Measurements(found)


def _texts(paths: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(paths)] if isinstance(paths, (str, Path)) else [str(path) for path in paths]


def _row(model: dict[str, Any], name: str, about: dict[str, Any]) -> Measurement:
    task, _, metric = name.rpartition("/")
    return {
        "model": model["checkpoint"],
        "task": task,
        "metric": metric,
        "value": about["value"],
        "stderr": about["stderr"],
        "higher_is_better": about["higher_is_better"],
        "documents": about["documents"],
        "parameters": model["parameters"],
        "backend": model["backend"],
    }
