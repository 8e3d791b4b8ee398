"""Metrics of a run: one JSON object a line, written by rank 0, read by progress bars, curves and reports. No NeMo."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

PACE_STEPS = 20
"""The last steps, whose pace says how long the rest takes."""


@dataclass(frozen=True)
class Metrics:
    """What a run measured, in step order, each step once."""

    training: list[dict[str, Any]]
    """step, tokens, loss (nats per token), learning_rate (of this step's update), grad_norm, tokens_per_second,
    seconds; of a distilled run also kl, its divergence from the teacher (nats per token, scaled as
    ``vocabulary_parallel_kl`` says), and hidden_loss and embedding_loss if its hidden states are compared."""
    validation: list[dict[str, Any]]
    """step, tokens, loss (nats per token)."""
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    """step, zero_fraction (of the weights of masked matrices); empty for a dense model."""
    pruning: list[dict[str, Any]] = field(default_factory=list)
    """step, parameters (left after it); of a run during which units are removed, the steps that removed some."""
    masks: list[dict[str, Any]] = field(default_factory=list)
    """Of a run that learns masks: step, sparsities (expected, by kind of unit), targets and multipliers."""
    domains: list[dict[str, Any]] = field(default_factory=list)
    """Of a run that reads domains: step, and by domain losses, shares (from that step on) and samples (read before
    it, also by earlier runs of the same weights)."""


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one record; a single write, so that a reader never sees half of one as a whole line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> Metrics:
    """Read a metrics file; where an interrupted run repeated steps after resuming, the later record counts.

    Half a line at the end, left by a killed run, is ignored.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {one.name: {} for one in fields(Metrics)}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record.pop("kind")][record["step"]] = record
    return Metrics(**{kind: [records[step] for step in sorted(records)] for kind, records in found.items()})


def joined(parts: Iterable[tuple[Path, int]], tokens_per_step: int) -> Metrics:
    """Read the files of trainings that are parts of one, as one curve.

    Args:
        parts: The file of each part, and the steps of all parts before it, by which its own are counted on.
        tokens_per_step: Of every part.
    """
    whole = Metrics([], [])
    for path, before in parts:
        for kind, records in vars(read(path)).items():
            for record in records:
                moved = {"step": record["step"] + before}
                if "tokens" in record:
                    moved["tokens"] = record["tokens"] + before * tokens_per_step
                getattr(whole, kind).append({**record, **moved})
    return whole


def time_left(tokens: float, speeds: Iterable[float]) -> str:
    """Return how long so many tokens take, as 12 s, 3 min or 4.5 h, at the pace of the last steps (tokens/s).

    A resumed run has done steps that its clock knows nothing about, and validation pauses it: the median step counts.
    """
    seconds = tokens / median(speeds)
    for limit, size, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
