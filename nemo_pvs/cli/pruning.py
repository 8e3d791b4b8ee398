"""The verbs that lead to a smaller model: calibrate, prune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

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
    Windows,
)
from nemo_pvs.cli.checkpoints import sentence
from nemo_pvs.cli.method_options import AMOUNT, with_method_options
from nemo_pvs.pruning.prune_command import read_prune_command
from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.progress import console

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

GRADIENTS = "Gradients"
"""Panel of --help."""


def calibrate(
    source: Source,
    out: Annotated[str, typer.Option(help="folder for the scores; must not exist")],
    data: Text = "wikipedia-sample",
    samples: Samples = 128,
    sequence_length: SequenceLength = 512,
    seed: Seed = 0,
    loader: Loader = None,
    windows: Windows = "packed",
    gradients: Annotated[
        bool, typer.Option(help="also run the backward pass, which llm-pruner needs", rich_help_panel=GRADIENTS)
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option(help="on Megatron: ranks that share each matrix", rich_help_panel=GRADIENTS)
    ] = 1,
    pipeline_parallel: Annotated[
        int, typer.Option(help="on Megatron: ranks that share the layers", rich_help_panel=GRADIENTS)
    ] = 1,
    device: Device = None,
    activation_memory: ActivationMemory = "auto",
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure importance once, for every target; under torchrun the ranks share the text."""
    from nemo_pvs.api.calibrate import calibrate as measure

    scores = measure(
        source,
        out,
        data=data,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        loader=loader,
        windows=windows,
        gradients=gradients,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        device=device,
        activation_memory=activation_memory,
        ignore_manifest=ignore_manifest,
        overwrite=overwrite,
    )
    console.print(f"{out}: scores of {scores.tokens.ids.numel():,} tokens, {scores.content_hash[:12]}")


_CHECK = "Refuse a shape that does not suit"


@with_method_options
def prune(
    source: Source,
    target_folder: Destination,
    method: Annotated[str, typer.Option(help="the method; pvs methods describes them")],
    target: Annotated[
        Optional[str],
        typer.Option(
            help="sizes to reach, e.g. hidden=288,ffn=768, layers=14 or vocab=32000, or the file of pvs search",
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
    windows: Windows = "packed",
    format: Annotated[  # noqa: A002
        Optional[str], typer.Option(help="hf or nemo; that of the source by default", rich_help_panel=OUTPUT)
    ] = None,
    uneven: Annotated[
        str, typer.Option(help="keep layers of different sizes, or pad them with zeros", rich_help_panel=OUTPUT)
    ] = "keep",
    parent_tokens: ParentTokens = None,
    overwrite: Overwrite = False,
    tensor_parallel: Annotated[
        int, typer.Option(help="refuse a shape that cannot be split over this many ranks", rich_help_panel=_CHECK)
    ] = 1,
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            help="refuse one whose layers cannot be split over this many pipeline stages", rich_help_panel=_CHECK
        ),
    ] = 1,
    fp8: Annotated[bool, typer.Option(help="refuse one whose shards do not suit FP8", rich_help_panel=_CHECK)] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "auto",
    ignore_manifest: IgnoreManifest = False,
    **options: Any,
) -> None:
    """Prune a model to a smaller architecture, or make it sparse; under torchrun the ranks share the text."""
    check_new_folder(Path(target_folder), overwrite=overwrite)
    read_prune_command(method, target, options)  # so that a mistake need not wait for PyTorch
    from nemo_pvs.api.prune import prune as prune_checkpoint
    from nemo_pvs.checkpoints.convert import describe_checkpoint
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
            windows=windows,
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
            console.print(f"{target_folder}: {sentence(describe_checkpoint(target_folder))}", soft_wrap=True)
