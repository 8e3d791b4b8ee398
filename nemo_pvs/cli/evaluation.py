"""The verb that measures checkpoints: tasks, and perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_pvs.cli.arguments import OUTPUT, ActivationMemory, Device, IgnoreManifest
from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

TASKS, TEXTS, ENGINE = "Tasks", "Perplexity", "Engine"
"""Panels of --help."""


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="checkpoints of any format, also those of unfinished runs, .gguf files, smollm2-135m or "
            "hf://owner/name"
        ),
    ],
    tasks: Annotated[
        Optional[str],
        typer.Option(
            help="paper, recovery, names of lm-eval's tasks (winogrande:5 for five shots) or a folder of YAML files",
            rich_help_panel=TASKS,
        ),
    ] = None,
    parent: Annotated[
        Optional[str],
        typer.Option(help="checkpoint with which --tasks recovery compares the others", rich_help_panel=TASKS),
    ] = None,
    perplexity: Annotated[
        Optional[list[str]],
        typer.Option(
            help="c4, wikitext, cnn_dailymail, wikipedia-sample, a text of your own, or none; repeatable",
            rich_help_panel=TEXTS,
        ),
    ] = None,
    limit: Annotated[
        Optional[int], typer.Option(help="maximum documents per task, and windows of recovery", rich_help_panel=TASKS)
    ] = None,
    samples: Annotated[
        Optional[int], typer.Option(help="maximum windows per text; 64, or the preset's", rich_help_panel=TEXTS)
    ] = None,
    sequence_length: Annotated[
        Optional[int], typer.Option(help="tokens per window; 512, or the preset's", rich_help_panel=TEXTS)
    ] = None,
    stride: Annotated[
        Optional[int],
        typer.Option(help="sliding windows this many tokens apart, instead of chunks", rich_help_panel=TEXTS),
    ] = None,
    task_data: Annotated[
        str, typer.Option(help="folder of downloaded data sets, <owner>/<name> each", rich_help_panel=TASKS)
    ] = "task_data",
    run_generated_code: Annotated[
        bool,
        typer.Option(
            help="allow tasks that run the code a model writes (HumanEval), with all your rights on this machine",
            rich_help_panel=TASKS,
        ),
    ] = False,
    out: Annotated[
        str, typer.Option(help="folder for results.json and every measurement", rich_help_panel=OUTPUT)
    ] = "runs/evaluation",
    backend: Annotated[
        str,
        typer.Option(
            help="what answers tasks: megatron, transformers; auto is megatron for NeMo checkpoints",
            rich_help_panel=ENGINE,
        ),
    ] = "auto",
    device: Device = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(help="bf16, fp16 or fp32; by default bf16 on a GPU, fp32 on a CPU", rich_help_panel=ENGINE),
    ] = None,
    batch_size: Annotated[
        Optional[int],
        typer.Option(help="requests per batch; by default as many as fit in memory", rich_help_panel=ENGINE),
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option(help="Megatron ranks that share each matrix", rich_help_panel=ENGINE)
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="Megatron ranks that share the layers", rich_help_panel=ENGINE)
    ] = 1,
    activation_memory: ActivationMemory = "auto",
    compat: Annotated[
        bool,
        typer.Option(
            help="measure perplexity on training text, as the paper's code does, to compare with its numbers",
            rich_help_panel=TEXTS,
        ),
    ] = False,
    ignore_manifest: IgnoreManifest = False,
    force: Annotated[
        bool, typer.Option(help="repeat measurements that have been made before", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Measure checkpoints on zero-shot and few-shot tasks and by perplexity, on transformers or on Megatron."""
    from nemo_pvs.api.evaluate import evaluate as measure

    found = measure(
        paths,
        tasks=tasks,
        parent=parent,
        perplexity=perplexity,
        limit=limit,
        samples=samples,
        sequence_length=sequence_length,
        stride=stride,
        task_data=task_data,
        run_generated_code=run_generated_code,
        out=out,
        backend=backend,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        activation_memory=activation_memory,
        compat=compat,
        ignore_manifest=ignore_manifest,
        force=force,
    )
    from nemo_pvs.evaluation.summary import left_out_lines, summary_tables

    for table in summary_tables(found.models, console.width):
        console.print(table, crop=False)
    for line in left_out_lines(found.models):
        console.print(line, soft_wrap=True)
    console.print(f"Results: {(Path(out) / 'results.json').resolve()}", soft_wrap=True)
