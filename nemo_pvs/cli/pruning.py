"""The verbs that lead to a smaller model: calibrate, prune."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from nemo_pvs.cli.arguments import (
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
    compute_of,
    one_of,
    tokens_of,
)
from nemo_pvs.cli.checkpoints import sentence
from nemo_pvs.cli.megatron_gradients import check_ranks, with_gradients
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


def prune(
    source: Source,
    target_folder: Destination,
    method: Annotated[
        str,
        typer.Option(
            help="minitron-depth, shortgpt, minitron-width, minitron-joint, flap, wanda-sp, magnitude-sp, llm-pruner, "
            "adapt-pruner, magnitude, wanda, sparsegpt"
        ),
    ],
    target: Annotated[Optional[str], typer.Option(help="sizes to reach, e.g. hidden=288,ffn=768 or layers=14")] = None,
    ratio: Annotated[Optional[float], typer.Option(help="share to remove, e.g. 0.5")] = None,
    of: Annotated[Optional[str], typer.Option(help="what --ratio is a share of: body or total")] = None,
    preset: Annotated[Optional[str], typer.Option(help="a published target, e.g. llama31_8b/4b-width")] = None,
    sparsity: Annotated[Optional[str], typer.Option(help="0.5, or 2:4 for two zeros in four")] = None,
    search: Annotated[Optional[str], typer.Option(help="contiguous, greedy, sleb or individual layers")] = None,
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
    iterations: Annotated[Optional[int], typer.Option(help="steps of adapt-pruner that would remove all")] = None,
    amplitude: Annotated[Optional[float], typer.Option(help="how unlike adapt-pruner treats layers")] = None,
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
    parent_tokens: ParentTokens = None,
    ignore_manifest: IgnoreManifest = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune a model to a smaller architecture, or make it sparse; under torchrun the ranks share the text."""
    check_new_folder(Path(target_folder), overwrite=overwrite)
    from nemo_pvs.calibration.engine import calibrate as measure
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.checkpoints.convert import describe
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.ledger.ledger import LEDGER, Charge
    from nemo_pvs.planning.charges import ancestry, charge_scores, pruning_charges
    from nemo_pvs.pruning.methods import METHODS, prune_by
    from nemo_pvs.pruning.request import Options, PruneRequest
    from nemo_pvs.pruning.result import write
    from nemo_pvs.pruning.sparse.work_folder import work_folder
    from nemo_pvs.pruning.spent import spent
    from nemo_pvs.pruning.target import search_spent
    from nemo_pvs.recipe.options import SCORED
    from nemo_pvs.system import ranks

    options = {name: value for name, value in locals().items() if name in Options.__dataclass_fields__}
    one_of("--uneven", uneven, ("keep", "pad"))
    compute = compute_of(device, activation_memory)
    with (
        ignoring_manifests(ignore_manifest),
        ranks.joined(),
        ranks.held_by_main(locked_target(Path(target_folder))),
        local_checkpoint(source, Path(target_folder)) as folder,
    ):
        wanted = one_of("--format", format or _format(describe(folder)), ("hf", "nemo"))
        model = open_source(folder)
        ledger = ancestry(folder, parent_tokens)

        @cache
        def read_tokens() -> Any:
            return known_scores().tokens if scores else tokens_of(folder, data, samples, sequence_length, seed, loader)

        @cache
        def known_scores() -> Any:
            if scores:
                return Scores.load(Path(scores), model)
            with progress("calibrate", "layers") as show:
                gradients = METHODS[method].gradients
                return measure(model, read_tokens(), gradients=gradients, **compute, progress=show)

        def score_by_task() -> Any:
            from nemo_pvs.evaluation.task_score import task_score

            where = {name: compute[name] for name in ("dtype", "device")}
            return task_score(str(task), folder, Path(task_data), limit=task_limit, **where)

        pruned = prune_by(
            method,
            PruneRequest(
                source=model,
                options=Options(**options),
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
        read, parent = read_tokens() if read_tokens.cache_info().currsize else None, shape_of(model)
        if method in SCORED:
            ids, gradients = known_scores().tokens.ids, METHODS[method].gradients
            ledger.charges.append(charge_scores(parent, ids.numel(), ids.shape[1], gradients=gradients))
        if sought := search_spent(target):
            ledger.charges.append(Charge("search", sought["tokens"], sought["flops"], "architecture search"))
        ledger.charges += pruning_charges(spent(pruned, Options(**options), parent, read), task)
        with progress(f"write {wanted}", "parameters") as show:
            write(pruned, Path(target_folder), wanted, pad=uneven == "pad", overwrite=overwrite, progress=show)
        ledger.save(Path(target_folder) / LEDGER)
        console.print(f"{target_folder}: {sentence(describe(target_folder))}", soft_wrap=True)


def _format(about: dict[str, Any]) -> str:
    return "hf" if about["format"] == "huggingface" else "nemo"
