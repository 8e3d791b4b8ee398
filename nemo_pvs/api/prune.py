"""Pruning a checkpoint into another one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_pvs.api.values import compute_of, one_of, scores_of, token_counts_of, tokens_of
from nemo_pvs.calibration.engine import calibrate
from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.convert import describe_checkpoint
from nemo_pvs.checkpoints.fetch import local_checkpoint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import shape_of
from nemo_pvs.checkpoints.stored_tensors import ignoring_manifests
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.ledger.ledger import Charge, Ledger
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.charges import ancestry, charge_scores, pruning_charges
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.prune import prune as prune_source
from nemo_pvs.pruning.prune_command import read_prune_command
from nemo_pvs.pruning.request import PruneRequest, TaskScorer
from nemo_pvs.pruning.result import write
from nemo_pvs.pruning.sparse.work_folder import work_folder
from nemo_pvs.system import ranks
from nemo_pvs.system.files import check_new_folder
from nemo_pvs.system.folder_lock import locked_target
from nemo_pvs.system.progress import console, progress


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model on disk."""

    path: Path
    """Its checkpoint folder."""
    shape: Shape
    plan: Plan | None
    """What was kept of the parent; None for a sparse model, whose masks say it."""
    ledger: Ledger
    """What the model has cost so far: its parent, calibration, search."""


def prune(
    source: str | Path,
    target_folder: str | Path,
    method: str,
    *,
    target: str | Path | None = None,
    scores: str | Path | Scores | None = None,
    data: str | Path = "wikipedia-sample",
    samples: int = 32,
    sequence_length: int = 256,
    seed: int = 0,
    loader: str | None = None,
    windows: str = "packed",
    task_data: str | Path = "task_data",
    format: str | None = None,  # noqa: A002
    uneven: str = "keep",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    fp8: bool = False,
    device: str | None = None,
    activation_memory: str = "auto",
    parent_tokens: float | None = None,
    ignore_manifest: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> PrunedModel:
    """Prune a model to a smaller architecture, or make it sparse.

    Args:
        source: Checkpoint folder of any format, ``.gguf`` file, ``smollm2-135m`` or ``hf://owner/name``.
        target_folder: The folder to write.
        method: A name that ``pvs methods`` lists.
        target: Sizes as a text, ``hidden=288,ffn=768`` or ``vocab=32000``, or the file of ``pvs search``; instead of
            sizes as options.
        scores: What ``calibrate`` returned, or its folder; without it a method that needs scores measures them now.
        data: The calibration text: ``.txt``, ``.jsonl``, ``.parquet``, a folder of them, a token file (``.bin``), or
            ``wikipedia-sample``.
        samples: Number of sequences of this text.
        sequence_length: Tokens per sequence.
        seed: Seed that selects the windows of the text; -1 takes consecutive ones.
        windows: ``packed`` cuts them from all documents joined, ``documents`` each from one that is long enough.
        loader: Read the text as a reference implementation does (``data.reference_sets.LOADERS``).
        task_data: Folder of downloaded data sets for the option ``task``.
        format: ``hf`` or ``nemo``; that of the source by default.
        uneven: ``keep`` layers of different sizes, or ``pad`` them with zeros.
        tensor_parallel: Refuse a shape that cannot be split over this many ranks.
        pipeline_parallel: Refuse a shape whose layers cannot be split over this many pipeline stages.
        fp8: Refuse a shape whose shards do not suit FP8.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        activation_memory: Memory for hidden states, such as ``8GB``; ``auto`` is 8 GB on a CPU, and with a GPU what
            fits there and in page-locked memory.
        parent_tokens: Tokens that the weights were pretrained on, if no ledger says so.
        ignore_manifest: Read weights that differ from the source's manifest.
        overwrite: Replace ``target_folder``.
        options: The method's own, such as ``ratio=0.2``, ``layers=14`` or ``sparsity="2:4"``.

    Returns:
        The pruned model. Under torchrun the first rank writes it, and the others do not wait for that.

    Raises:
        UserError: the method has no such option, or the model cannot be pruned like that.

    Example:
        >>> import nemo_pvs as pvs
        >>> small = pvs.prune(
        ...     model, folder / "small", "minitron-width", ffn=64, data=text, samples=2, sequence_length=16
        ... )
        >>> small.shape.ffn, small.plan.method
        (64, 'minitron-width')
    """
    target_folder = Path(target_folder)
    chosen, asked, search = read_prune_command(method, target, options)
    one_of("--uneven", uneven, ("keep", "pad"))
    compute = compute_of(device, activation_memory)
    check_new_folder(target_folder, overwrite=overwrite)
    with (
        ignoring_manifests(ignore_manifest),
        ranks.joined(),
        ranks.held_by_main(locked_target(target_folder)),
        local_checkpoint(str(source), target_folder) as folder,
    ):
        wanted = one_of("--format", format or _format(folder), ("hf", "nemo"))
        model = open_source(folder)
        parent = shape_of(model)
        ledger = ancestry(folder, parent_tokens)
        layout = Layout.for_config(model.config)
        if uneven == "keep" and layout.uneven_class is None and chosen.expected:
            expected = chosen.expected(asked, parent)
            layout.require_class(expected.shape, uneven=expected.uneven)

        @cache
        def read_tokens() -> TokenSet:
            if scores:
                return known_scores().tokens
            return tokens_of(folder, str(data), samples, sequence_length, seed, loader, windows)

        @cache
        def known_scores() -> Scores:
            if scores:
                return scores_of(scores, model)
            with progress("calibrate", "layers") as show:
                return calibrate(model, read_tokens(), gradients=chosen.gradients, compute=compute, progress=show)

        def score_by_task() -> TaskScorer:
            from nemo_pvs.evaluation.task_score import task_score

            return task_score(str(asked.task), folder, Path(task_data), limit=asked.task_limit, compute=compute)

        pruned, spent = prune_source(
            method,
            PruneRequest(
                source=model,
                options=asked,
                tokens=read_tokens,
                scores=known_scores,
                check=lambda shape: shape.check_parallel(
                    tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel, fp8=fp8
                ),
                work_folder=work_folder(target_folder),
                progress=progress,
                say=lambda text: console.print(text, soft_wrap=True),
                overwrite=overwrite,
                task_score=score_by_task,
                compute=compute,
                token_counts=lambda: token_counts_of(folder, str(data), parent.vocab),
            ),
        )
        if chosen.scored:
            ids = known_scores().tokens.ids
            ledger.charges.append(charge_scores(parent, ids.numel(), ids.shape[1], gradients=chosen.gradients))
        if search:
            ledger.charges.append(Charge("search", search["tokens"], search["flops"], "architecture search"))
        ledger.charges += pruning_charges(spent, options.get("task"))
        shape = shape_of(pruned.source)
        if ranks.is_main():
            if note := layout.loading_note(shape.replace(uneven=()) if uneven == "pad" else shape):
                console.print(note, soft_wrap=True)
            with progress(f"write {wanted}", "parameters") as show:
                write(
                    pruned,
                    target_folder,
                    wanted,
                    pad=uneven == "pad",
                    ledger=ledger,
                    overwrite=overwrite,
                    progress=show,
                )
            shape = shape_of(open_source(target_folder))
        return PrunedModel(target_folder, shape, pruned.plan, ledger)


def _format(folder: Path) -> str:
    return "hf" if describe_checkpoint(folder)["format"] == "huggingface" else "nemo"
