"""Validation losses out of a training log that TensorBoard or Weights & Biases has, of NeMo's runs and of ours."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError

_LOSS = "val_loss"
_STEP = "trainer/global_step"
"""How Lightning's W&B logger calls the optimizer step; W&B's own ``Step`` counts calls of ``log``."""


def validation_losses(log: Path) -> dict[int, float]:
    """Return the validation loss (nats per token) by the optimizer steps that were done when it was measured.

    Lightning numbers steps from zero, so what stands at step 99 was measured after 100. Where a resumed run has
    measured a step again, the later measurement counts.

    Args:
        log: A folder with TensorBoard's ``events.out.tfevents.*``, or one of these files; or the CSV export of a W&B
            run (a chart's, or ``run.history()``) with the columns ``trainer/global_step`` and ``val_loss``.

    Raises:
        UserError: it is neither, has no validation loss, or one that is no number.
    """
    if not log.exists():
        raise UserError(f"{log} does not exist; give a folder with TensorBoard's event files, or W&B's CSV export.")
    found = _weights_and_biases(log) if log.suffix == ".csv" else _tensorboard(log)
    for steps, loss in found.items():
        if not math.isfinite(loss):
            raise UserError(
                f"{log} has a validation loss of {loss} after {steps:,} steps; a run that diverged is no curve."
            )
    return dict(sorted(found.items()))


def log_files(log: Path) -> list[Path]:
    """Return the files that a log consists of; none if it is no log."""
    if log.is_file():
        return [log]
    return sorted(log.glob("**/events.out.tfevents.*"))


def _tensorboard(log: Path) -> dict[int, float]:
    files = log_files(log)
    if not files or not all("tfevents" in file.name for file in files):
        raise UserError(
            f"{log} holds no events.out.tfevents file; give TensorBoard's folder of one run, or a .csv export of W&B."
        )
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise UserError(f"{log} holds the logs of several runs; give one of {', '.join(folders)}.")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes seconds

    events: list[Any] = []
    tags: set[str] = set()
    for file in files:
        read = EventAccumulator(str(file), size_guidance={"scalars": 0})
        read.Reload()
        tags.update(read.Tags()["scalars"])
        events += read.Scalars(_LOSS) if _LOSS in read.Tags()["scalars"] else []
    if not events:
        raise UserError(f"{log} has no {_LOSS}, but {', '.join(sorted(tags)) or 'nothing'}; was the run validated?")
    return {event.step + 1: event.value for event in sorted(events, key=lambda event: event.wall_time)}


def _weights_and_biases(log: Path) -> dict[int, float]:
    with open(log, newline="") as file:
        rows = csv.DictReader(file)
        columns = rows.fieldnames or []
        losses = [name for name in columns if name == _LOSS or name.endswith(f" - {_LOSS}")]
        if len(losses) != 1 or _STEP not in columns:
            raise UserError(
                f"{log} needs the columns {_STEP} and one {_LOSS} (it has {', '.join(columns) or 'none'}); export the "
                f"chart of one run with {_STEP} as its x-axis, or run.history()."
            )
        try:
            return {int(float(row[_STEP])) + 1: float(row[losses[0]]) for row in rows if row[losses[0]]}
        except (TypeError, ValueError) as error:
            raise UserError(f"{log} has a value that is no number ({error}); export it again.") from None
