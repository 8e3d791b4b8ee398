"""The verbs that lead to a smaller model: calibrate, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.api.values import compute_of, tokens_of
from nemo_pvs.cli.arguments import (
    OUTPUT,
    TEXT,
    ActivationMemory,
    Destination,
    Device,
    IgnoreManifest,
    Loader,
    Overwrite,
    ParentTokens,
    Samples,
    Seed,
    SequenceLength,
    Source,
    Text,
)
from nemo_pvs.cli.checkpoints import sentence
from nemo_pvs.cli.megatron_gradients import check_ranks, with_gradients
from nemo_pvs.cli.method_options import AMOUNT, with_method_options
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def calibrate(
    source: Source,
    out: Annotated[str, typer.Option(help="folder for the scores")],
    data: Text = "wikipedia-sample",
    samples: Samples = 128,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    loader: Loader = None,
    gradients: Annotated[bool, typer.Option(help="go back through the layers, too, for llm-pruner")] = False,
    tensor_parallel: Annotated[int, typer.Option(help="gradients on Megatron: ranks that share each matrix")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="gradients on Megatron: ranks that share the layers")] = 1,
    device: Device = None,
    activation_memory: ActivationMemory = "8GB",
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure importance once, for every width target."""
    check_new_folder(Path(out), overwrite=overwrite)
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.system import ranks

    compute = compute_of(device, activation_memory)
    megatron = (tensor_parallel, pipeline_parallel) != (1, 1)
    if megatron and not gradients:
        raise UserError("Only gradients are measured on Megatron; add --gradients, or leave the parallelism out.")
    with (
        ignoring_manifests(ignore_manifest),
        ranks.joined(on_gpus=megatron),
        ranks.held_by_main(locked_target(Path(out))),
        local_checkpoint(source) as folder,
    ):
        if megatron:
            check_ranks(tensor_parallel, pipeline_parallel)
        model = open_source(folder)
        tokens = tokens_of(folder, data, samples, sequence_length, seed, loader)
        with progress("calibrate", "layers") as show:
            scores = measure(model, tokens, gradients=gradients and not megatron, **compute, progress=show)
        if megatron:
            scores = with_gradients(model, scores, compute, tensor_parallel, pipeline_parallel)
        if not ranks.is_main():
            return
        scores.save(Path(out), overwrite=overwrite)
        console.print(f"{out}: scores of {tokens.ids.numel():,} tokens, {scores.content_hash[:12]}")


_CHECK = "Refuse a shape that does not suit"


@with_method_options
def prune(
    source: Source,
    target_folder: Destination,
    method: Annotated[str, typer.Option(help="the method; pvs methods describes them")],
    target: Annotated[
        Optional[str],
        typer.Option(
            help="sizes to reach, e.g. hidden=288,ffn=768 or layers=14, or the file of pvs search",
            rich_help_panel=AMOUNT,
        ),
    ] = None,
    task_data: Annotated[str, typer.Option(help="folder of downloaded data sets for --task")] = "task_data",
    scores: Annotated[
        Optional[str], typer.Option(help="folder of pvs calibrate; measured now if left out", rich_help_panel=TEXT)
    ] = None,
    data: Text = "wikipedia-sample",
    samples: Samples = 32,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    loader: Loader = None,
    format: Annotated[  # noqa: A002
        Optional[str], typer.Option(help="hf or nemo; that of the source by default", rich_help_panel=OUTPUT)
    ] = None,
    uneven: Annotated[
        str, typer.Option(help="keep layers of different sizes, or pad them with zeros", rich_help_panel=OUTPUT)
    ] = "keep",
    parent_tokens: ParentTokens = None,
    overwrite: Overwrite = False,
    tensor_parallel: Annotated[
        int, typer.Option(help="that cannot be split over this many ranks", rich_help_panel=_CHECK)
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="whose layers cannot be split over this many stages", rich_help_panel=_CHECK)
    ] = 1,
    fp8: Annotated[bool, typer.Option(help="whose shards do not suit FP8", rich_help_panel=_CHECK)] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "8GB",
    ignore_manifest: IgnoreManifest = False,
    **options: Any,
) -> None:
    """Prune a model to a smaller architecture, or make it sparse; under torchrun the ranks share the text."""
    check_new_folder(Path(target_folder), overwrite=overwrite)
    from nemo_pvs.api.prune import prune as prune_checkpoint
    from nemo_pvs.checkpoints.convert import describe
    from nemo_pvs.system import ranks

    with ranks.joined():
        prune_checkpoint(
            source,
            target_folder,
            method,
            target=target,
            scores=scores,
            data=data,
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            loader=loader,
            task_data=task_data,
            format=format,
            uneven=uneven,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            fp8=fp8,
            device=device,
            activation_memory=activation_memory,
            parent_tokens=parent_tokens,
            ignore_manifest=ignore_manifest,
            overwrite=overwrite,
            **options,
        )
        if ranks.is_main():
            console.print(f"{target_folder}: {sentence(describe(target_folder))}", soft_wrap=True)
