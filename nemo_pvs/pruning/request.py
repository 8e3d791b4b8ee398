"""What a pruning method is asked: a model, options, and where text and importance come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.model.shape import Shape


@dataclass(frozen=True)
class Options:
    """What a user may ask of a method; None is the method's own default."""

    target: str | None = None
    ratio: float | None = None
    of: str | None = None
    preset: str | None = None
    sparsity: str | None = None
    search: str | None = None
    task: str | None = None
    task_limit: int | None = None
    aggregation: str | None = None
    metric: str | None = None
    structure: str | None = None
    bias: bool | None = None
    uniform: bool | None = None
    remove_groups: int | None = None
    ffn_multiple: int | None = None
    kv_groups_multiple: int | None = None
    sequential: bool | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    compat: bool | None = None
    iterations: int | None = None
    amplitude: float | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Return those of the options that were given, as keyword arguments."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class PruneRequest:
    """One model to prune."""

    source: WeightSource
    options: Options
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
    """Where and how layers run, as ``layerwise.LayerwiseModel`` takes it: ``device``, ``dtype``, ``memory_limit``."""


class Scored(NamedTuple):
    """What one model achieved, and what it read for that."""

    score: float
    """For example its accuracy at a task; higher is better."""
    read: Mapping[int, int]
    """How many sequences went through the model, by their length in tokens; for the ledger."""


TaskScorer = Callable[[WeightSource], Scored]
"""Measures a model."""
