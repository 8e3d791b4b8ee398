"""The verbs that lead to a smaller model: calibrate, search, prune."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.errors import UserError
from nemo_pvs.progress import console, progress
from nemo_pvs.verbs.arguments import (
    ActivationMemory,
    Destination,
    Device,
    Loader,
    Overwrite,
    Samples,
    Seed,
    SequenceLength,
    Source,
    Text,
    compute_of,
    one_of,
    parse_bytes,
    tokens_of,
)
from nemo_pvs.verbs.checkpoints import sentence
from nemo_pvs.verbs.megatron_gradients import check_ranks, with_gradients

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
    overwrite: Overwrite = False,
) -> None:
    """Measure importance once, for every width target."""
    from nemo_pvs.calibration import ranks
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.parent import local_checkpoint
    from nemo_pvs.evaluation.parallel import joined
    from nemo_pvs.files import refuse_existing

    refuse_existing(Path(out), overwrite=overwrite)
    compute = compute_of(device, activation_memory)
    megatron = (tensor_parallel, pipeline_parallel) != (1, 1)
    if megatron and not gradients:
        raise UserError("Only gradients are measured on Megatron; add --gradients, or leave the parallelism out.")
    with local_checkpoint(source) as folder:
        model = open_source(folder)
        tokens = tokens_of(folder, data, samples, sequence_length, seed, loader)
        with joined() if megatron else ranks.joined():
            if megatron:
                check_ranks(tensor_parallel, pipeline_parallel)
            with progress("calibrate", "layers") as show:
                scores = measure(model, tokens, gradients=gradients and not megatron, **compute, progress=show)
            if megatron:
                scores = with_gradients(model, scores, compute, tensor_parallel, pipeline_parallel)
            if not ranks.is_main():
                return
        scores.save(Path(out), overwrite=overwrite)
        console.print(f"{out}: scores of {tokens.ids.numel():,} tokens, {scores.content_hash[:12]}")


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
    fp8: Annotated[bool, typer.Option(help="only shapes whose shards suit FP8")] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "8GB",
    overwrite: Overwrite = False,
) -> None:
    """Find the best architecture within a budget, by the loss right after pruning."""
    from rich.table import Table

    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.files import refuse_existing
    from nemo_pvs.pruning.grid import Budget, Grid, flops_at, legal_shapes
    from nemo_pvs.pruning.search import search as rank
    from nemo_pvs.pruning.target import write_target
    from nemo_pvs.recipe_file import parse_layout, parse_training
    from nemo_pvs.training.short import short_training

    refuse_existing(Path(out), overwrite=overwrite)
    if retrain_tokens and not retrain_data:
        raise UserError("--retrain-tokens needs text to train on; give --retrain-data, a folder from pvs tokenize.")
    compute = compute_of(device, activation_memory)
    model = open_source(source)
    budget = Budget(
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
    with progress("search", "layers") as show:
        ranking = find(progress=show)
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
        layout = parse_layout({"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel})
        runs, data = Path(out).with_suffix(".runs"), Path(retrain_data or "")
        with short_training(model, runs, data, layout, training) as retrain:
            ranking = find(retrain=retrain, retrain_best=retrain_best, retrained=f"{data}: {training}")
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
    write_target(ranking.candidates[0].shape, Path(out))
    console.print(f"{len(shapes):,} shapes within the budget; the best is in {out}", soft_wrap=True)


def prune(
    source: Source,
    target_folder: Destination,
    method: Annotated[
        str,
        typer.Option(
            help="minitron-depth, shortgpt, minitron-width, minitron-joint, flap, wanda-sp, magnitude-sp, llm-pruner, "
            "magnitude, wanda, sparsegpt"
        ),
    ],
    target: Annotated[Optional[str], typer.Option(help="sizes to reach, e.g. hidden=288,ffn=768 or layers=14")] = None,
    ratio: Annotated[Optional[float], typer.Option(help="share to remove, e.g. 0.5")] = None,
    of: Annotated[Optional[str], typer.Option(help="what --ratio is a share of: body or total")] = None,
    preset: Annotated[Optional[str], typer.Option(help="a published target, e.g. llama31_8b/4b-width")] = None,
    sparsity: Annotated[Optional[str], typer.Option(help="0.5, or 2:4 for two zeros in four")] = None,
    search: Annotated[Optional[str], typer.Option(help="contiguous, greedy or individual layers")] = None,
    task: Annotated[
        Optional[str], typer.Option(help="choose layers by lm-eval tasks instead of the loss, e.g. winogrande")
    ] = None,
    task_data: Annotated[str, typer.Option(help="folder of downloaded data sets for --task")] = "task_data",
    task_limit: Annotated[Optional[int], typer.Option(help="take only so many documents of each task")] = None,
    aggregation: Annotated[Optional[str], typer.Option(help="energy or meanabs_l2")] = None,
    metric: Annotated[
        Optional[str], typer.Option(help="WIFV, IFV or WIFN; param_first, param_second, param_mix or vectorize")
    ] = None,
    structure: Annotated[Optional[str], typer.Option(help="UL-UM, UL-MM, AL-MM or AL-AM")] = None,
    bias: Annotated[Optional[bool], typer.Option(help="make up for the mean of what goes")] = None,
    uniform: Annotated[Optional[bool], typer.Option(help="same sizes in every layer")] = None,
    remove_groups: Annotated[Optional[int], typer.Option(help="KV groups to remove from every layer")] = None,
    ffn_multiple: Annotated[Optional[int], typer.Option(help="FFN channels stay in multiples of this")] = None,
    kv_groups_multiple: Annotated[Optional[int], typer.Option(help="KV groups stay in multiples of this")] = None,
    protect_first: Annotated[Optional[int], typer.Option(help="layers at the input that stay in any case")] = None,
    protect_last: Annotated[Optional[int], typer.Option(help="layers at the output that stay in any case")] = None,
    sequential: Annotated[Optional[bool], typer.Option(help="measure each layer behind the pruned ones")] = None,
    compat: Annotated[Optional[bool], typer.Option(help="the published code's quirks, to repeat its numbers")] = None,
    scores: Annotated[Optional[str], typer.Option(help="folder that pvs calibrate wrote; else calibrates now")] = None,
    data: Text = "wikipedia-sample",
    samples: Samples = 32,
    sequence_length: SequenceLength = 256,
    seed: Seed = 0,
    loader: Loader = None,
    format: Annotated[Optional[str], typer.Option(help="hf or nemo; as the source by default")] = None,  # noqa: A002
    uneven: Annotated[str, typer.Option(help="keep layers of different sizes, or pad them with zeros")] = "keep",
    tensor_parallel: Annotated[int, typer.Option(help="refuse a shape that cannot be split over so many ranks")] = 1,
    pipeline_parallel: Annotated[int, typer.Option(help="refuse a shape that has no such pipeline stages")] = 1,
    fp8: Annotated[bool, typer.Option(help="refuse a shape whose shards do not suit FP8")] = False,
    device: Device = None,
    activation_memory: ActivationMemory = "8GB",
    overwrite: Overwrite = False,
) -> None:
    """Prune a model to a smaller architecture, or make it sparse; under torchrun the ranks share the text."""
    from nemo_pvs.calibration import ranks
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.detect import open_source
    from nemo_pvs.checkpoints.parent import local_checkpoint
    from nemo_pvs.checkpoints.stream import describe
    from nemo_pvs.files import refuse_existing
    from nemo_pvs.pruning import methods
    from nemo_pvs.pruning.work_folder import work_folder

    options = {name: value for name, value in locals().items() if name in methods.Options.__dataclass_fields__}
    one_of("--uneven", uneven, ("keep", "pad"))
    refuse_existing(Path(target_folder), overwrite=overwrite)
    compute = compute_of(device, activation_memory)
    with ranks.joined(), local_checkpoint(source, Path(target_folder)) as folder:
        wanted = one_of("--format", format or _format(describe(folder)), ("hf", "nemo"))
        model = open_source(folder)

        def read_tokens() -> Any:
            return known_scores().tokens if scores else tokens_of(folder, data, samples, sequence_length, seed, loader)

        @cache
        def known_scores() -> Any:
            if scores:
                return Scores.load(Path(scores), model)
            with progress("calibrate", "layers") as show:
                gradients = methods.METHODS[method].gradients
                return measure(model, read_tokens(), gradients=gradients, **compute, progress=show)

        def score_by_task() -> Any:
            from nemo_pvs.evaluation.task_score import task_score

            where = {name: compute[name] for name in ("dtype", "device")}
            return task_score(str(task), folder, Path(task_data), limit=task_limit, **where)

        pruned = methods.prune(
            method,
            methods.Job(
                source=model,
                options=methods.Options(**options),
                tokens=read_tokens,
                scores=known_scores,
                check=lambda shape: shape.check_parallel(
                    tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, fp8=fp8
                ),
                work_folder=work_folder(Path(target_folder)),
                progress=progress,
                say=lambda text: console.print(text, soft_wrap=True),
                overwrite=overwrite,
                task_score=score_by_task,
                compute=compute,
            ),
        )
        if not ranks.is_main():
            return
        with progress(f"write {wanted}", "parameters") as show:
            methods.write(pruned, Path(target_folder), wanted, pad=uneven == "pad", overwrite=overwrite, progress=show)
        console.print(f"{target_folder}: {sentence(describe(target_folder))}", soft_wrap=True)


def _format(about: dict[str, Any]) -> str:
    return "hf" if about["format"] == "huggingface" else "nemo"
