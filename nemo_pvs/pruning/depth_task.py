"""Depth pruning by a task: remove the run of layers without which a model still does best at something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nemo_pvs.checkpoints.source import WeightSource, fingerprint, shape_of
from nemo_pvs.errors import UserError
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.depth import METHOD, check_removal, layer_plan
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.shape import Shape

Scorer = Callable[[WeightSource], float]
"""Measures a model, for example its accuracy at a task; higher is better."""


@dataclass(frozen=True)
class TaskScan:
    """The score of a model without each run of ``removed`` neighbouring layers."""

    shape: Shape
    """The dense model."""
    model_fingerprint: str
    removed: int
    scores: tuple[float, ...]
    """Score without layers i to i + removed - 1, for i = 0 .. L - removed."""
    dense_score: float


def scan_task(
    source: WeightSource, remove: int, score: Scorer, *, progress: Callable[[int, int], None] | None = None
) -> TaskScan:
    """Score the dense model and the model without each run of ``remove`` layers (Minitron, 2408.11796).

    A scorer is a closed box, so there is no shared work here: it sees ``L - remove + 2`` models one after the other.

    Args:
        source: The dense model.
        remove: Layers to remove (k), 1 to L - 1.
        score: Measures a model; higher is better.
        progress: Called with (models done, in all).

    Raises:
        UserError: there is nothing to remove or nothing would be left, or a score is not a number.
    """
    shape = shape_of(source)
    check_removal(shape.layers, remove)
    runs = [range(start, start + remove) for start in range(shape.layers - remove + 1)]
    models = [source, *(PrunedSource(source, layer_plan(shape, run, METHOD, {})) for run in runs)]
    scores: list[float] = []
    for model in models:
        scores.append(float(score(model)))
        if math.isnan(scores[-1]):
            raise UserError("The task's score is not a number; check the task on the dense model.")
        if progress:
            progress(len(scores), len(models))
    return TaskScan(shape, fingerprint(source), remove, tuple(scores[1:]), scores[0])


def plan_task(scan: TaskScan, *, compat: bool = False) -> Plan:
    """Remove the run of layers with the highest score, the first of equals.

    Args:
        scan: What ``scan_task`` measured.
        compat: Take the score nearest to the dense model's instead, as llm-pruning-collection does; it passes over a
            model that is better than the dense one.
    """
    merits = [-abs(score - scan.dense_score) for score in scan.scores] if compat else list(scan.scores)
    start = merits.index(max(merits))
    provenance = {
        "model_fingerprint": scan.model_fingerprint,
        "settings": {"search": "contiguous", "by": "task", "removed": scan.removed, "compat": compat},
        "dense_score": scan.dense_score,
        "scores": list(scan.scores),
    }
    return layer_plan(scan.shape, range(start, start + scan.removed), METHOD, provenance)
