"""The verb that finds an architecture: search."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from nemo_pvs.cli.arguments import PARALLEL, ActivationMemory, Device, IgnoreManifest, Overwrite, Source
from nemo_pvs.system.progress import console

if TYPE_CHECKING:
    from nemo_pvs.api.search import SearchResult
    from nemo_pvs.pruning.search.search import Candidate

# nemo_run reads these signatures too, and knows Optional[X] but not X | None.
# ruff: noqa: UP045

BUDGET, LATENCY, GRID, RETRAINING = "Budget", "Measured latency", "Grid", "Training the best candidates"
"""Panels of --help."""


def search(
    source: Source,
    scores: Annotated[str, typer.Option(help="folder that pvs calibrate wrote")],
    out: Annotated[str, typer.Option(help="JSON file for the best target; pvs prune --target takes it")],
    parameters: Annotated[Optional[float], typer.Option(help="e.g. 4.5e9", rich_help_panel=BUDGET)] = None,
    memory: Annotated[
        Optional[str], typer.Option(help="for bf16 weights and KV cache, e.g. 10GB", rich_help_panel=BUDGET)
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="largest relative distance from the budget, both ways", rich_help_panel=BUDGET)
    ] = 0.05,
    context: Annotated[
        int, typer.Option(help="tokens per sequence, for KV cache, FLOPs and latency", rich_help_panel=BUDGET)
    ] = 4096,
    batch: Annotated[
        int, typer.Option(help="sequences decoded at once, for KV cache and latency", rich_help_panel=BUDGET)
    ] = 1,
    flops_per_token: Annotated[
        Optional[float],
        typer.Option(help="upper bound of the forward FLOPs per token at that context", rich_help_panel=BUDGET),
    ] = None,
    latency: Annotated[
        Optional[str],
        typer.Option(help="upper bound of the time to decode a token, e.g. 12ms", rich_help_panel=LATENCY),
    ] = None,
    on: Annotated[
        Optional[str],
        typer.Option(help="where it is measured: cpu or cuda; the GPU if there is one", rich_help_panel=LATENCY),
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option(
            help="weights that are timed: bf16, fp16 or fp32; on a GPU the checkpoint's, on a CPU fp32",
            rich_help_panel=LATENCY,
        ),
    ] = None,
    latency_table: Annotated[
        Optional[str],
        typer.Option(
            help="JSON file for measured times, also of another machine; in the user's cache by default",
            rich_help_panel=LATENCY,
        ),
    ] = None,
    layers_step: Annotated[int, typer.Option(help="step in layers; 0 keeps all", rich_help_panel=GRID)] = 2,
    hidden_step: Annotated[
        Optional[int],
        typer.Option(help="step in hidden channels; 0 keeps all; about 1/16 of them by default", rich_help_panel=GRID),
    ] = None,
    ffn_step: Annotated[
        Optional[int],
        typer.Option(help="step in FFN channels; 0 keeps all; about 1/28 of them by default", rich_help_panel=GRID),
    ] = None,
    kv_groups_step: Annotated[int, typer.Option(help="step in KV groups; 0 keeps all", rich_help_panel=GRID)] = 0,
    heads_step: Annotated[
        int, typer.Option(help="step in query heads; 0 keeps all of the kept KV groups", rich_help_panel=GRID)
    ] = 0,
    max_width_pruning: Annotated[
        float, typer.Option(help="largest share of a width to remove", rich_help_panel=GRID)
    ] = 0.4,
    max_depth_pruning: Annotated[
        float, typer.Option(help="largest share of the layers to remove", rich_help_panel=GRID)
    ] = 0.2,
    shortlist: Annotated[int, typer.Option(help="candidates whose loss is measured")] = 10,
    retrain_tokens: Annotated[
        float,
        typer.Option(help="tokens to train each of them for, e.g. 1e8; 0 trains none", rich_help_panel=RETRAINING),
    ] = 0,
    retrain_data: Annotated[
        Optional[str], typer.Option(help="folder from pvs tokenize to train them on", rich_help_panel=RETRAINING)
    ] = None,
    retrain_best: Annotated[int, typer.Option(help="number of candidates to train", rich_help_panel=RETRAINING)] = 3,
    global_batch_size: Annotated[
        int, typer.Option(help="sequences per optimizer step", rich_help_panel=RETRAINING)
    ] = 64,
    sequence_length: Annotated[int, typer.Option(help="tokens per sequence", rich_help_panel=RETRAINING)] = 2048,
    learning_rate: Annotated[float, typer.Option(help="peak", rich_help_panel=RETRAINING)] = 1e-4,
    tensor_parallel: Annotated[
        int, typer.Option(help="only shapes that can be split over this many ranks", rich_help_panel=PARALLEL)
    ] = 1,
    pipeline_parallel: Annotated[
        int,
        typer.Option(
            help="only shapes whose layers can be split over this many pipeline stages", rich_help_panel=PARALLEL
        ),
    ] = 1,
    data_parallel: Annotated[
        int, typer.Option(help="replicas of a candidate that is trained", rich_help_panel=PARALLEL)
    ] = 1,
    fp8: Annotated[bool, typer.Option(help="only shapes whose shards suit FP8", rich_help_panel=PARALLEL)] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "auto",
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the best architecture within a budget; under torchrun the ranks share the text."""
    from nemo_pvs.api.search import search as find

    result = find(
        source,
        scores,
        out,
        parameters=parameters,
        memory=memory,
        tolerance=tolerance,
        context=context,
        flops_per_token=flops_per_token,
        latency=latency,
        on=on,
        batch=batch,
        dtype=dtype,
        latency_table=latency_table,
        layers_step=layers_step,
        hidden_step=hidden_step,
        ffn_step=ffn_step,
        kv_groups_step=kv_groups_step,
        heads_step=heads_step,
        max_width_pruning=max_width_pruning,
        max_depth_pruning=max_depth_pruning,
        shortlist=shortlist,
        retrain_tokens=retrain_tokens,
        retrain_data=retrain_data,
        retrain_best=retrain_best,
        global_batch_size=global_batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        data_parallel=data_parallel,
        fp8=fp8,
        device=device,
        activation_memory=activation_memory,
        ignore_manifest=ignore_manifest,
        overwrite=overwrite,
    )
    _print_candidates(result, result.candidates[:shortlist], context, batch)
    console.print(f"{len(result.candidates):,} shapes within the budget; the best is in {out}", soft_wrap=True)
    if result.latency_table is not None:
        console.print(_about_latency(result), soft_wrap=True)
    if result.note:
        console.print(result.note, soft_wrap=True)


def _print_candidates(result: SearchResult, candidates: tuple[Candidate, ...], context: int, batch: int) -> None:
    from rich.table import Table

    from nemo_pvs.pruning.search.grid import inference_bytes

    table = Table("layers", "hidden", "ffn", "KV groups", "heads", "parameters (M)", "memory (GB)", "GFLOPs/token")
    timed = result.latency_table is not None
    retrained = candidates[0].retrained_loss is not None
    for column in (*(("ms/token", "first token (ms)") if timed else ()), "loss (nats/token)"):
        table.add_column(column)
    if retrained:
        table.add_column("after training")
    for candidate in candidates:
        shape = candidate.shape
        cells = [f"{size:,}" for size in (shape.layers, shape.hidden, shape.ffn, shape.kv_groups, shape.heads)]
        cells += [f"{shape.parameters / 1e6:,.1f}", f"{inference_bytes(shape, context, batch) / 1e9:,.2f}"]
        cells.append(f"{candidate.flops_per_token / 1e9:,.2f}")
        if candidate.latency is not None:
            times = (candidate.latency.per_token, candidate.latency.first_token)
            cells += ["" if seconds is None else f"{seconds * 1e3:,.2f}" for seconds in times]
        losses = (candidate.loss, candidate.retrained_loss) if retrained else (candidate.loss,)
        table.add_row(*cells, *("" if loss is None else f"{loss:.4f}" for loss in losses))
    console.print(table)


def _about_latency(result: SearchResult) -> str:
    """Say where times come from, and how far they are from those of whole models."""
    whole = [one.latency.whole for one in result.candidates if one.latency is not None and one.latency.whole]
    said = f"Times are sums of measured parts, which are in {result.latency_table}"
    if result.latency_error is None:
        return f"{said}; no whole model was measured."
    measured = ", ".join(f"{seconds * 1e3:,.2f}" for seconds in whole)
    return (
        f"{said}; whole models of the first {len(whole)} take {measured} ms/token, a mean error of "
        f"{result.latency_error:.1%}."
    )
