"""Finding the best architecture within a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from nemo_pvs.api.values import compute_of, device_name, parse_bytes, parse_dtype, parse_latency, scores_of
from nemo_pvs.errors import UserError
from nemo_pvs.system.files import check_new_file
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import progress

if TYPE_CHECKING:
    from nemo_pvs.calibration.scores import Scores
    from nemo_pvs.model.shape import Shape
    from nemo_pvs.pruning.search.latency import LatencyTable
    from nemo_pvs.pruning.search.search import Candidate

_CHECKED = 3
"""Candidates whose latency is also measured on the whole model."""


@dataclass(frozen=True)
class SearchResult:
    """What a search found."""

    path: Path
    """The file with the best sizes, which ``prune`` takes as its target."""
    candidates: tuple[Candidate, ...]
    """Every architecture within the budget, the best first."""
    tokens: int
    """Tokens that went through all models that were run or trained."""
    flops: int
    """What that took."""
    note: str | None = None
    """What a user should know about the best architecture, in a sentence."""
    latency_table: Path | None = None
    """The file with measured times, if a latency was asked for."""

    @property
    def latency_error(self) -> float | None:
        """Mean relative error of the times per token compared with whole models; None if none was measured."""
        errors = [
            abs(candidate.latency.per_token / candidate.latency.whole - 1)
            for candidate in self.candidates
            if candidate.latency is not None and candidate.latency.whole is not None
        ]
        return mean(errors) if errors else None

    @property
    def shape(self) -> Shape:
        """The best architecture."""
        return self.candidates[0].shape


def search(
    source: str | Path,
    scores: str | Path | Scores,
    out: str | Path,
    *,
    parameters: float | None = None,
    memory: str | None = None,
    tolerance: float = 0.05,
    context: int = 4096,
    flops_per_token: float | None = None,
    latency: str | None = None,
    on: str | None = None,
    batch: int = 1,
    dtype: str | None = None,
    latency_table: str | Path | None = None,
    layers_step: int = 2,
    hidden_step: int | None = None,
    ffn_step: int | None = None,
    kv_groups_step: int = 0,
    heads_step: int = 0,
    max_width_pruning: float = 0.4,
    max_depth_pruning: float = 0.2,
    shortlist: int = 10,
    retrain_tokens: float = 0,
    retrain_data: str | Path | None = None,
    retrain_best: int = 3,
    global_batch_size: int = 64,
    sequence_length: int = 2048,
    learning_rate: float = 1e-4,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    data_parallel: int = 1,
    fp8: bool = False,
    device: str | None = None,
    activation_memory: str = "auto",
    ignore_manifest: bool = False,
    overwrite: bool = False,
) -> SearchResult:
    """Find the best architecture within a budget; an interrupted search is resumed.

    Args:
        source: Checkpoint folder of any format, ``.gguf`` file, ``smollm2-135m`` or ``hf://owner/name``.
        scores: What ``calibrate`` returned, or its folder.
        out: The JSON file for the best sizes.
        parameters: Budget in parameters.
        memory: Budget for bf16 weights and KV cache, such as ``10GB``.
        tolerance: Largest relative distance from the budget, both ways.
        context: Tokens per sequence, for KV cache, FLOPs and latency.
        flops_per_token: Upper bound of the forward FLOPs per token at that context.
        latency: Upper bound of the time to decode a token after that context, such as ``12ms``: the sum of a shape's
            parts, which are measured on this machine where ``latency_table`` lacks them.
        on: Where latency is measured, ``cpu`` or ``cuda``; by default the GPU if there is one.
        batch: Sequences that are decoded at once, for KV cache and latency.
        dtype: Of the weights whose latency is measured, ``bf16``, ``fp16`` or ``fp32``; on a GPU the checkpoint's, on
            a CPU fp32, which ``from_pretrained`` of ``transformers`` 4 loads.
        latency_table: JSON file for measured times, also one that another machine wrote; by default one for this
            machine and workload in the user's cache.
        layers_step: Grid of layers; 0 keeps all.
        hidden_step: Grid of hidden channels; 0 keeps all.
        ffn_step: Grid of FFN channels; 0 keeps all.
        kv_groups_step: Grid of KV groups; 0 keeps all.
        heads_step: Grid of query heads, the same number in every kept KV group; 0 keeps all of these.
        max_width_pruning: Largest share of a width to remove.
        max_depth_pruning: Largest share of layers to remove.
        shortlist: Candidates whose loss is measured.
        retrain_tokens: Train the best candidates for this many tokens; 0 for no training.
        retrain_data: Folder of ``tokenize`` to train them on.
        retrain_best: Candidates that are trained.
        global_batch_size: Sequences per optimizer step of that training.
        sequence_length: Tokens per sequence of that training.
        learning_rate: Peak learning rate of that training.
        tensor_parallel: Only shapes that can be split over this many ranks.
        pipeline_parallel: Only shapes whose layers can be split over this many pipeline stages.
        data_parallel: Replicas of a candidate that is trained.
        fp8: Only shapes whose shards suit FP8.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        activation_memory: Memory for hidden states, such as ``8GB``; ``auto`` is 8 GB on a CPU, and with a GPU what
            fits there and in page-locked memory.
        ignore_manifest: Read weights that differ from the source's manifest.
        overwrite: Replace ``out``.

    Returns:
        The candidates, best first, with a latency also the times of the first ``shortlist``. Under torchrun every rank
        gets them, and the first one writes the file.

    Raises:
        UserError: no budget is given, no shape is within it, the scores are of another model, or ``out`` exists.

    Example:
        >>> import nemo_pvs as pvs
        >>> scores = pvs.calibrate(model, folder / "scores", data=text, samples=2, sequence_length=16)
        >>> best = pvs.search(
        ...     model, scores, folder / "best.json", parameters=1.5e5, tolerance=0.1, hidden_step=0,
        ...     ffn_step=16,
        ... )
        >>> [candidate.shape.ffn for candidate in best.candidates], best.shape.ffn == best.candidates[0].shape.ffn
        ([80, 64], True)
    """
    out = Path(out)
    check_new_file(out, overwrite=overwrite)
    from nemo_pvs.checkpoints.fetch import local_checkpoint
    from nemo_pvs.checkpoints.open import open_source
    from nemo_pvs.checkpoints.source import shape_of
    from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
    from nemo_pvs.model.layout import Layout
    from nemo_pvs.pruning.search.grid import Grid, SizeLimit, flops_at, legal_shapes
    from nemo_pvs.pruning.search.search import search as rank
    from nemo_pvs.pruning.target import write_target
    from nemo_pvs.recipe.load import parse_layout, parse_training
    from nemo_pvs.system import ranks
    from nemo_pvs.training.short import short_training

    if parameters is None and memory is None and flops_per_token is None and latency is None:
        raise UserError("A search needs a budget; give --parameters, --memory, --flops-per-token or --latency.")
    bound = None if latency is None else parse_latency(latency)
    for option, value in (("--on", on), ("--dtype", dtype), ("--latency-table", latency_table)):
        if value is not None and bound is None:
            raise UserError(f"{option} says how latency is measured; give --latency as well, or leave {option} out.")
    if retrain_tokens and not retrain_data:
        raise UserError("--retrain-tokens needs text to train on; give --retrain-data, a folder from pvs tokenize.")
    compute = compute_of(device, activation_memory)
    with ignoring_manifests(ignore_manifest), local_checkpoint(str(source)) as folder:
        model = open_source(folder)
        budget = SizeLimit(
            parameters=parameters,
            memory_bytes=None if memory is None else parse_bytes("--memory", memory),
            tolerance=tolerance,
            context=context,
            batch_size=batch,
            flops_per_token=flops_per_token,
        )
        grid = Grid.of(
            shape_of(model),
            layers_step=layers_step,
            hidden_step=hidden_step,
            ffn_step=ffn_step,
            kv_groups_step=kv_groups_step,
            heads_step=heads_step,
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
        known = scores_of(scores, model)
        with ranks.joined(), ranks.held_by_main(locked_target(out)):
            if retrain_tokens and ranks.world_size() > 1:
                raise UserError(
                    "Candidates are trained on separate ranks (--tensor-parallel, --pipeline-parallel, "
                    "--data-parallel); under torchrun leave out --retrain-tokens, then run the command again with it "
                    "and with --overwrite, but without torchrun: measurements are kept."
                )
            table = None
            if bound is not None:
                table = _latency_table(model.config, on, dtype, batch, context, latency_table)
                with progress("measure latency", "parts") as show:
                    shapes = table.within(bound, shapes, show)
            find = partial(
                rank,
                model,
                known,
                known.tokens,
                shapes,
                flops_at(context),
                shortlist=shortlist,
                state=out.with_suffix(".search.json"),
                compute=compute,
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
                layout = parse_layout(
                    {
                        "tensor_parallel": tensor_parallel,
                        "pipeline_parallel": pipeline_parallel,
                        "data_parallel": data_parallel,
                    }
                )
                runs, data = out.with_suffix(".runs"), Path(retrain_data or "")
                with short_training(model, runs, data, layout, training, compute) as retrain:
                    ranking = find(retrain=retrain, retrain_best=retrain_best, retrained=f"{data}: {training}")
            tokens, flops = ranking.tokens_read, ranking.flops
            for shape in [one.shape for one in ranking.candidates if one.retrained_loss is not None]:
                trained = training.steps * training.tokens_per_step
                tokens += trained
                flops += trained * shape.flops_per_token(sequence_length=sequence_length, training=True)
            candidates = ranking.candidates
            if table is not None:
                candidates = _with_latencies(candidates, table, shortlist)
            if ranks.is_main():
                write_target(ranking.candidates[0].shape, out, {"tokens": tokens, "flops": flops})
    note = Layout.for_config(model.config).loading_note(candidates[0].shape)
    return SearchResult(out, candidates, tokens, flops, note, None if table is None else table.path)


def _latency_table(
    config: Mapping[str, Any], on: str | None, dtype: str | None, batch: int, context: int, path: str | Path | None
) -> LatencyTable:
    import torch

    from nemo_pvs.pruning.search.latency import LatencyTable
    from nemo_pvs.pruning.search.timing import Timer, Workload

    device = device_name("--on", on)
    default = torch.float32
    if device == "cuda":
        stored = config.get("torch_dtype") or config.get("dtype")  # transformers renamed it in 4.56
        default = {"float32": torch.float32, "float16": torch.float16}.get(str(stored), torch.bfloat16)
    workload = Workload(config, device, parse_dtype(dtype) or default, batch, context)
    return LatencyTable(Timer(workload), None if path is None else Path(path))


def _with_latencies(candidates: tuple[Candidate, ...], table: LatencyTable, shortlist: int) -> tuple[Candidate, ...]:
    """Add the times of the best candidates, the first few also as measured on whole models."""
    best = candidates[:shortlist]
    shapes = [candidate.shape for candidate in best]
    if table.can_grow:
        with progress("measure latency to the first token", "parts") as show:
            table.measure("first token", shapes, show)
        with progress("measure whole models", "models") as show:
            table.measure_whole(shapes[:_CHECKED], show)
    measured = (replace(candidate, latency=table.latency(candidate.shape)) for candidate in best)
    return (*measured, *candidates[shortlist:])
