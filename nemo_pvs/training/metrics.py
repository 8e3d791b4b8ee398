"""Metrics of a run: one JSON object per line, written by rank 0, read by progress bars, curves and reports.

Imports no NeMo.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from nemo_pvs.system.progress import short_time

PACE_STEPS = 20
"""Number of recent steps from whose speed the remaining time is estimated."""


@dataclass(frozen=True)
class Metrics:
    """The metrics of a run, in the order of steps, each step once."""

    training: list[dict[str, Any]]
    """step, tokens, loss (nats per token), learning_rate (of this step's update), grad_norm, tokens_per_second,
    seconds; on GPUs also mfu (model FLOPs utilisation) and peak_gigabytes (on rank 0); for a distilled run also kl,
    its divergence from the teacher (nats per token, scaled as in ``vocabulary_parallel_kl``), and hidden_loss and
    embedding_loss if hidden states are compared."""
    validation: list[dict[str, Any]]
    """step, tokens, loss (nats per token)."""
    sparsity: list[dict[str, Any]] = field(default_factory=list)
    """step, zero_fraction (of the weights in masked matrices); empty for a dense model."""
    pruning: list[dict[str, Any]] = field(default_factory=list)
    """step, parameters (that remain after it); only steps that removed units of a run that prunes while training."""
    masks: list[dict[str, Any]] = field(default_factory=list)
    """step, sparsities (expected, by kind of unit), targets and multipliers; for a run that learns masks."""
    domains: list[dict[str, Any]] = field(default_factory=list)
    """step, and for each domain losses, shares (from that step on) and samples (read before it, also by earlier runs
    of the same weights); for a run with dynamic batch loading."""


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one record in a single write, so that a reader never takes half a record for a whole line.

    Half a line that a full disk or a crash left at the end is ended first, or this record would become part of it.
    """
    with open(path, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        begun = file.read() not in (b"", b"\n")
        line = json.dumps(record) + "\n"
        file.write((f"\n{line}" if begun else line).encode())


def read(path: Path) -> Metrics:
    """Read a metrics file, as ``GrowingMetrics`` does."""
    return GrowingMetrics(path).read()


class GrowingMetrics:
    """A metrics file that is being written; of what it had before, nothing is read again."""

    def __init__(self, path: Path) -> None:
        """Read nothing yet; the file may not exist."""
        self._path = path
        self._metrics = Metrics([], [])
        self._end = 0
        """Where the last whole line ends, in bytes."""

    def read(self) -> Metrics:
        """Return the metrics so far, without the steps that a resumed run has repeated or is about to repeat.

        A line that is incomplete, as after a kill, is left out.
        """
        new = b""
        if self._path.exists():
            with open(self._path, "rb") as file:
                if file.seek(0, os.SEEK_END) < self._end:  # another file, of a run that was begun again
                    self._metrics, self._end = Metrics([], []), 0
                file.seek(self._end)
                new = file.read()
        whole = new.rfind(b"\n") + 1
        self._end += whole
        for line in new[:whole].splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            records = getattr(self._metrics, record.pop("kind"))
            while records and records[-1]["step"] >= record["step"]:
                records.pop()
            records.append(record)
        return self._metrics


def join_curves(parts: Iterable[tuple[Path, int]], tokens_per_step: int) -> Metrics:
    """Read the metrics files of consecutive training runs as one curve.

    Args:
        parts: File of each part, and the number of steps of all parts before it.
        tokens_per_step: Tokens per step, the same in all parts.
    """
    whole = Metrics([], [])
    for path, before in parts:
        for kind, records in vars(read(path)).items():
            for record in records:
                shifted = {"step": record["step"] + before}
                if "tokens" in record:
                    shifted["tokens"] = record["tokens"] + before * tokens_per_step
                getattr(whole, kind).append({**record, **shifted})
    return whole


def training_seconds(curve: Metrics, tokens_per_step: int) -> float:
    """Return how long the steps of a curve took together, in seconds; validation and saving do not count."""
    return sum(tokens_per_step / point["tokens_per_second"] for point in curve.training)


def time_left(tokens: float, speeds: Iterable[float]) -> str:
    """Return how long a number of tokens takes, as ``short_time`` spells it.

    The median speed counts, because resuming and validation distort that of single steps.

    Args:
        tokens: Tokens that remain.
        speeds: Speeds of recent steps, in tokens per second.
    """
    return short_time(tokens / median(speeds))
