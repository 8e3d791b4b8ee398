"""What a pruning method is asked: a model, options, and where text and importance come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.options import OptionsT


@dataclass(frozen=True)
class PruneRequest(Generic[OptionsT]):
    """One model to prune."""

    source: WeightSource
    options: OptionsT
    """The method's own."""
    tokens: Callable[[], TokenSet]
    """Reads the calibration text when a method needs it."""
    scores: Callable[[], Scores]
    """Loads the scores, or measures them, when a method needs them."""
    check: Callable[[Shape], None]
    """Raises UserError for a shape that is not wanted, before any work on it."""
    work_folder: Path
    """Where a method keeps what it has finished, to go on from."""
    progress: Callable[..., Any]
    """``progress.progress``, or something like it."""
    say: Callable[[str], None]
    overwrite: bool = False
    task_score: Callable[[], TaskScorer] | None = None
    """Returns what measures models by ``options.task``, when a method needs it."""
    draw: Callable[[int], TokenSet] | None = None
    """Draws a text of its own for each iteration of a method that has such; by default all read the same."""
    compute: Mapping[str, Any] = field(default_factory=dict)
    """Where and how layers run, as ``LayerwiseModel`` takes it: ``device``, ``dtype``, ``memory_limit``."""


class Scored(NamedTuple):
    """What one model achieved, and what it read for that."""

    score: float
    """For example its accuracy at a task; higher is better."""
    read: Mapping[int, int]
    """How many sequences went through the model, by their length in tokens; for the ledger."""


TaskScorer = Callable[[WeightSource], Scored]
"""Measures a model."""
