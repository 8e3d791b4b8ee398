"""The verb that measures checkpoints: tasks, and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_pvs.api.values import compute_of, one_of, parse_dtype
from nemo_pvs.cli.arguments import ActivationMemory, Device, IgnoreManifest
from nemo_pvs.errors import UserError
from nemo_pvs.system.folder_lock import locked_folder
from nemo_pvs.system.output_paths import check_folder
from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

_BACKENDS = ("auto", "transformers", "megatron")


def evaluate(
    paths: Annotated[list[str], typer.Argument(help="checkpoints of any format, also ones that training left")],
    tasks: Annotated[
        Optional[str],
        typer.Option(
            help="paper, names of lm-eval's tasks (winogrande:5 for five shots) or a folder of its YAML files"
        ),
    ] = None,
    perplexity: Annotated[
        Optional[list[str]],
        typer.Option(help="c4, wikitext, cnn_dailymail, wikipedia-sample, a text of your own, or none; repeatable"),
    ] = None,
    limit: Annotated[Optional[int], typer.Option(help="take only the first so many documents of each task")] = None,
    samples: Annotated[Optional[int], typer.Option(help="windows of each text at most; 64, or the preset's")] = None,
    sequence_length: Annotated[Optional[int], typer.Option(help="tokens a window; 512, or the preset's")] = None,
    stride: Annotated[
        Optional[int], typer.Option(help="sliding windows this many tokens apart, instead of chunks")
    ] = None,
    task_data: Annotated[str, typer.Option(help="folder of downloaded data sets, <owner>/<name> each")] = "task_data",
    out: Annotated[str, typer.Option(help="folder for results.json and every measurement")] = "runs/evaluation",
    backend: Annotated[
        str, typer.Option(help="what answers tasks: megatron, transformers; auto is megatron for NeMo checkpoints")
    ] = "auto",
    device: Device = None,
    dtype: Annotated[Optional[str], typer.Option(help="bf16, fp16 or fp32")] = None,
    batch_size: Annotated[Optional[int], typer.Option(help="requests a batch; found out by default")] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Megatron ranks that share each matrix")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="Megatron ranks that share the layers")] = 1,
    activation_memory: ActivationMemory = "8GB",
    compat: Annotated[
        bool, typer.Option(help="perplexity on training text, as the paper's code has it, to compare with its numbers")
    ] = False,
    ignore_manifest: IgnoreManifest = False,
    force: Annotated[bool, typer.Option(help="measure again what has been measured")] = False,
) -> None:
    """Measure checkpoints on zero-shot and few-shot tasks and by perplexity, on transformers or on Megatron."""
    check_folder(Path(out))
    one_of("--backend", backend, _BACKENDS)
    for option, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; give 1 or more.")
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.evaluation.checkpoint import Checkpoint, Compute
    from nemo_pvs.evaluation.measure import measure
    from nemo_pvs.evaluation.requests import EvaluationRequest
    from nemo_pvs.evaluation.store import Store
    from nemo_pvs.evaluation.summary import summary_table
    from nemo_pvs.system import ranks
    from nemo_pvs.system.ranks import joined

    chosen = compute_of(device, activation_memory)
    compute = Compute(
        **{**chosen, "dtype": parse_dtype(dtype) or chosen["dtype"]},
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        batch_size=batch_size,
    )
    request = EvaluationRequest.parse(
        tasks, perplexity, samples=samples, sequence_length=sequence_length, stride=stride, train_split=compat
    )
    store = Store(Path(out))
    with ignoring_manifests(ignore_manifest), joined(on_gpus=True), ranks.held_by_main(locked_folder(store.folder)):
        compute.check_ranks()
        models = [Checkpoint(path, None if backend == "auto" else backend) for path in paths]  # type: ignore[arg-type]
        results = measure(models, request, store, compute, task_data=Path(task_data), limit=limit, force=force)
    console.print(summary_table(results))
    console.print(f"Results: {(store.folder / 'results.json').resolve()}", soft_wrap=True)
