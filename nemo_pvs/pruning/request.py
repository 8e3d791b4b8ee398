"""The input of a pruning method: a model, options, and where text and scores come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple

import torch

from nemo_pvs.calibration.scores import Scores
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.data.token_set import TokenSet
from nemo_pvs.layerwise.model import ON_CPU, Compute
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.options import OptionsT


@dataclass(frozen=True)
class PruneRequest(Generic[OptionsT]):
    """One model to prune."""

    source: WeightSource
    options: OptionsT
    """Options of the method."""
    tokens: Callable[[], TokenSet]
    """Reads the calibration text when a method needs it."""
    scores: Callable[[], Scores]
    """Loads the scores, or measures them, when a method needs them."""
    check: Callable[[Shape], None]
    """Raises UserError for an unacceptable target shape, before any work is done."""
    work_folder: Path
    """Where a method stores finished work, to resume from."""
    progress: Callable[..., Any]
    """``progress.progress``, or a function with the same interface."""
    say: Callable[[str], None]
    overwrite: bool = False
    task_score: Callable[[], TaskScorer] | None = None
    """Returns a scorer of models by ``options.task``, when a method needs it."""
    draw: Callable[[int], TokenSet] | None = None
    """Draws new text for each iteration of an iterative method; by default all iterations read the same."""
    compute: Compute = ON_CPU
    token_counts: Callable[[], torch.Tensor] | None = None
    """Counts how often each token of the model occurs in the text (int64 [vocab]), when tokens are removed."""


class Scored(NamedTuple):
    """A model's score, and how much it read to measure it."""

    score: float
    """For example its accuracy on a task; higher is better."""
    read: Mapping[int, int]
    """Number of sequences that went through the model, by their length in tokens; for the ledger."""


TaskScorer = Callable[[WeightSource], Scored]
"""Scores a model."""
