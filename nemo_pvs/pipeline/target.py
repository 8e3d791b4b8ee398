"""Prune one target of a recipe with its method, into a Hugging Face folder and a NeMo checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.huggingface.folder import write_huggingface
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import Compute
from nemo_pvs.pipeline.folder import HUGGING_FACE, NEMO, PLAN, SETTINGS
from nemo_pvs.pipeline.records import PrunedRecord
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.prune import prune
from nemo_pvs.pruning.request import PruneRequest, TaskScorer
from nemo_pvs.pruning.sparse.pruned_layers import SparseSource
from nemo_pvs.pruning.sparse.work_folder import work_folder
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.system.files import sha256_json, write_json
from nemo_pvs.system.progress import console, progress


def prune_target(
    target: Target,
    source: WeightSource,
    folder: Path,
    *,
    draw: Callable[[int], TokenSet],
    scores: Callable[[], Scores],
    task_score: Callable[[], TaskScorer],
    token_counts: Callable[[], torch.Tensor] | None = None,
    compute: Compute,
) -> PrunedRecord:
    """Prune ``source`` into ``folder``: ``huggingface/``, ``nemo/``, and a plan or settings file.

    Args:
        target: Method and target size.
        source: The parent.
        folder: Is created; the finished layers of an interrupted sparse method are kept next to it, for resuming.
        draw: Draws the calibration text of an iteration; methods without iterations use iteration 0.
        scores: Loads or measures the scores.
        task_score: Returns the scorer for the target's task.
        token_counts: Counts the tokens of the training text, if the target prunes the vocabulary.
        compute: Where and how layers run (``PruneRequest``).

    Raises:
        UserError: the parent cannot be pruned to the target.
    """
    if target.method == DENSE:
        _write(source, folder)
        return PrunedRecord(fingerprint(open_source(folder / HUGGING_FACE)))
    pruned, spent = prune(
        target.method,
        PruneRequest(
            source=source,
            options=target.asked,
            tokens=lambda: draw(0),
            scores=scores,
            check=lambda shape: shape.check_parallel(**target.layout.split),
            work_folder=work_folder(folder),
            progress=progress,
            say=lambda text: console.print(f"  {text}", soft_wrap=True),
            overwrite=True,
            task_score=task_score,
            draw=draw,
            compute=compute,
            token_counts=token_counts,
        ),
    )
    _write(pruned.source, folder)
    if pruned.plan is not None:
        pruned.plan.save(folder / PLAN)
        plan = pruned.plan.plan_hash
    else:
        write_json(folder / SETTINGS, dict(pruned.settings))
        plan = sha256_json(dict(pruned.settings))
    if isinstance(pruned.source, SparseSource):
        shutil.rmtree(pruned.source.folder)
    made = {"fingerprint": fingerprint(open_source(folder / HUGGING_FACE)), "plan": plan, **spent}
    return PrunedRecord.from_json(made)


def write_planned(source: WeightSource, plan: Plan, folder: Path) -> PrunedRecord:
    """Write a model pruned by a given plan, in the same form as ``prune_target``."""
    _write(source, folder)
    plan.save(folder / PLAN)
    return PrunedRecord(fingerprint(open_source(folder / HUGGING_FACE)), plan.plan_hash)


def _write(source: WeightSource, folder: Path) -> None:
    folder.mkdir(parents=True)
    for write, name in ((write_huggingface, HUGGING_FACE), (write_nemo, NEMO)):
        with progress(f"write {name}", "parameters") as show:
            write(source, folder / name, progress=show)
