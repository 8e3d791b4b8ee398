"""The verb that finds an architecture: search."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import typer

from nemo_pvs.api.values import compute_of, parse_bytes
from nemo_pvs.cli.arguments import ActivationMemory, Device, IgnoreManifest, Overwrite, Source
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_file
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import console, progress

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045


def search(
    source: Source,
    scores: Annotated[str, typer.Option(help="folder that pvs calibrate wrote")],
    out: Annotated[str, typer.Option(help="JSON file for the best target; pvs prune --target takes it")],
    parameters: Annotated[Optional[float], typer.Option(help="budget, e.g. 4.5e9")] = None,
    memory: Annotated[Optional[str], typer.Option(help="budget for bf16 weights and KV cache, e.g. 10GB")] = None,
    tolerance: Annotated[float, typer.Option(help="how far from the budget, both ways")] = 0.05,
    context: Annotated[int, typer.Option(help="tokens, for KV cache and latency")] = 4096,
    latency: Annotated[Optional[float], typer.Option(help="upper bound in FLOPs per token at that context")] = None,
    layers_step: Annotated[int, typer.Option(help="grid of layers; 0 keeps all")] = 2,
    hidden_step: Annotated[Optional[int], typer.Option(help="grid of hidden channels; 0 keeps all")] = None,
    ffn_step: Annotated[Optional[int], typer.Option(help="grid of FFN channels; 0 keeps all")] = None,
    kv_groups_step: Annotated[int, typer.Option(help="grid of KV groups; 0 keeps all")] = 0,
    max_width_pruning: Annotated[float, typer.Option(help="largest share of a width that may go")] = 0.4,
    max_depth_pruning: Annotated[float, typer.Option(help="largest share of layers that may go")] = 0.2,
    shortlist: Annotated[int, typer.Option(help="candidates whose loss is measured")] = 10,
    retrain_tokens: Annotated[float, typer.Option(help="train the best candidates for so many tokens, e.g. 1e8")] = 0,
    retrain_data: Annotated[Optional[str], typer.Option(help="folder from pvs tokenize to train them on")] = None,
    retrain_best: Annotated[int, typer.Option(help="candidates that are trained")] = 3,
    global_batch_size: Annotated[int, typer.Option(help="sequences per optimizer step of that training")] = 64,
    sequence_length: Annotated[int, typer.Option(help="tokens per sequence of that training")] = 2048,
    learning_rate: Annotated[float, typer.Option(help="peak of that training")] = 1e-4,
    tensor_parallel: Annotated[int, typer.Option(help="ranks that share every layer")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="stages that share the layers out")] = 1,
    data_parallel: Annotated[int, typer.Option(help="copies of a candidate that is trained")] = 1,
    fp8: Annotated[bool, typer.Option(help="only shapes whose shards suit FP8")] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "8GB",
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the best architecture within a budget; under torchrun the ranks share the text."""
    check_new_file(Path(out), overwrite=overwrite)
    from rich.table import Table

    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.pruning.search.grid import Grid, SizeLimit, flops_at, legal_shapes
    from nemo_pvs.pruning.search.search import search as rank
    from nemo_pvs.pruning.target import write_target
    from nemo_pvs.recipe.load import parse_layout, parse_training
    from nemo_pvs.system import ranks
    from nemo_pvs.training.short import short_training

    if retrain_tokens and not retrain_data:
        raise UserError("--retrain-tokens needs text to train on; give --retrain-data, a folder from pvs tokenize.")
    compute = compute_of(device, activation_memory)
    with ignoring_manifests(ignore_manifest):
        model = open_source(source)
    budget = SizeLimit(
        parameters=parameters,
        memory_bytes=None if memory is None else parse_bytes("--memory", memory),
        tolerance=tolerance,
        context=context,
        latency=latency,
    )
    grid = Grid.of(
        shape_of(model),
        layers_step=layers_step,
        hidden_step=hidden_step,
        ffn_step=ffn_step,
        kv_groups_step=kv_groups_step,
        max_width_pruning=max_width_pruning,
        max_depth_pruning=max_depth_pruning,
    )
    shapes = legal_shapes(
        shape_of(model),
        grid,
        budget,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        fp8=fp8,
    )
    known = Scores.load(Path(scores), model)
    find = partial(
        rank,
        model,
        known,
        known.tokens,
        shapes,
        flops_at(context),
        shortlist=shortlist,
        state=Path(out).with_suffix(".search.json"),
        **compute,
    )
    with ranks.joined(), ranks.held_by_main(locked_target(Path(out))):
        if retrain_tokens and ranks.world_size() > 1:
            raise UserError(
                "Candidates are trained on ranks of their own (--tensor-parallel, --pipeline-parallel, "
                "--data-parallel); leave --retrain-tokens out under torchrun, and train them by the same command "
                "without torchrun and with --overwrite: what is measured stays so."
            )
        with progress("search", "layers") as show:
            ranking = find(progress=show)
        if not ranks.is_main():
            return
        if retrain_tokens:
            training = parse_training(
                {
                    "tokens": retrain_tokens,
                    "sequence_length": sequence_length,
                    "global_batch_size": global_batch_size,
                    "validation_samples": global_batch_size,
                    "learning_rate": learning_rate,
                }
            )
            layout = parse_layout(
                {
                    "tensor_parallel": tensor_parallel,
                    "pipeline_parallel": pipeline_parallel,
                    "data_parallel": data_parallel,
                }
            )
            runs, data = Path(out).with_suffix(".runs"), Path(retrain_data or "")
            with short_training(model, runs, data, layout, training) as retrain:
                ranking = find(retrain=retrain, retrain_best=retrain_best, retrained=f"{data}: {training}")
        tokens, flops = ranking.tokens_read, ranking.flops
        for shape in [one.shape for one in ranking.candidates if one.retrained_loss is not None]:
            trained = training.steps * training.tokens_per_step
            tokens += trained
            flops += trained * shape.flops_per_token(sequence_length=sequence_length, training=True)
        sizes = ("layers", "hidden", "ffn", "KV groups", "parameters (M)", "GFLOPs/token")
        table = Table(*sizes, "loss (nats/token)", *(["after training"] if retrain_tokens else []))
        for candidate in ranking.candidates[:shortlist]:
            shape = candidate.shape
            losses = (candidate.loss, candidate.retrained_loss) if retrain_tokens else (candidate.loss,)
            table.add_row(
                *(f"{size:,}" for size in (shape.layers, shape.hidden, shape.ffn, shape.kv_groups)),
                f"{shape.parameters / 1e6:,.1f}",
                f"{candidate.latency / 1e9:,.2f}",
                *("" if loss is None else f"{loss:.4f}" for loss in losses),
            )
        console.print(table)
        write_target(ranking.candidates[0].shape, Path(out), {"tokens": tokens, "flops": flops})
        console.print(f"{len(shapes):,} shapes within the budget; the best is in {out}", soft_wrap=True)
