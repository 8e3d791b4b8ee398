"""Depth pruning by a task: remove the run of layers without which the model scores best on the task."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.pruning.request import TaskScorer
from nemo_pvs.pruning.structured.depth import METHOD, check_removal, ends, layer_plan, unprotected_starts


@dataclass(frozen=True)
class TaskScan:
    """The score of a model without each run of ``removed`` consecutive layers."""

    shape: Shape
    """The dense model."""
    model_fingerprint: str
    removed: int
    scores: tuple[float, ...]
    """Score without layers i to i + removed - 1, for i = 0 .. L - removed."""
    dense_score: float
    tokens: int = 0
    """Tokens that went through all these models."""
    flops: int = 0
    """FLOPs of their forward passes."""


def scan_task(
    source: WeightSource, remove: int, score: TaskScorer, *, progress: Callable[[int, int], None] | None = None
) -> TaskScan:
    """Score the dense model and the model without each run of ``remove`` layers (Minitron, 2408.11796).

    A scorer is a black box, so candidates share no work: it is called for each of ``L - remove + 2`` models.

    Args:
        source: The dense model.
        remove: Layers to remove (k), 1 to L - 1.
        score: Scores a model.
        progress: Called with (models done, their total).

    Raises:
        UserError: ``remove`` is out of range, or a score is not a number.
    """
    shape = shape_of(source)
    check_removal(shape.layers, remove)
    runs = [range(start, start + remove) for start in range(shape.layers - remove + 1)]
    models = [source, *(PrunedSource(source, layer_plan(shape, run, METHOD, {})) for run in runs)]
    scores: list[float] = []
    tokens = flops = 0
    for model in models:
        scored = score(model)
        for length, sequences in scored.read.items():
            tokens += sequences * length
            flops += sequences * length * shape_of(model).flops_per_token(sequence_length=length, training=False)
        scores.append(float(scored.score))
        if math.isnan(scores[-1]):
            raise UserError("The task's score is not a number; check the task on the dense model.")
        if progress:
            progress(len(scores), len(models))
    return TaskScan(shape, fingerprint(source), remove, tuple(scores[1:]), scores[0], tokens, flops)


def plan_task(scan: TaskScan, *, compat: bool = False, protect_first: int = 0, protect_last: int = 0) -> Plan:
    """Remove the run of layers with the highest score; ties go to the first.

    Args:
        scan: Result of ``scan_task``.
        compat: Take the score nearest to the dense model's instead, as llm-pruning-collection does, which can reject a
            candidate that is better than the dense model.
        protect_first: Layers at the input that are always kept.
        protect_last: Layers at the output that are always kept.

    Raises:
        UserError: fewer layers are unprotected than the run has.
    """
    merits = [-abs(score - scan.dense_score) for score in scan.scores] if compat else list(scan.scores)
    starts = unprotected_starts(scan.shape.layers, scan.removed, protect_first, protect_last)
    start = max(starts, key=merits.__getitem__)
    settings = {"search": "contiguous", "by": "task", "removed": scan.removed, "compat": compat}
    provenance = {
        "model_fingerprint": scan.model_fingerprint,
        "settings": {**settings, **ends(protect_first, protect_last)},
        "dense_score": scan.dense_score,
        "scores": list(scan.scores),
        "tokens_read": scan.tokens,
        "flops": scan.flops,
    }
    return layer_plan(scan.shape, range(start, start + scan.removed), METHOD, provenance)
