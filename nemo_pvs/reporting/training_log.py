"""Read validation losses from TensorBoard or Weights & Biases logs, of stock NeMo's runs and of nemo_pvs's."""

from __future__ import annotations

import csv
import math
from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_pvs.errors import UserError

_LOSS = "val_loss"
_TRAINED = "global_step"
_STEP = "trainer/global_step"
"""The optimizer step in Lightning's W&B logger; W&B's ``Step`` counts calls of ``log``."""


def validation_losses(log: Path) -> dict[int, float]:
    """Return the validation loss (nats per token) by the number of optimizer steps before its measurement.

    Lightning numbers steps from zero, so a value at step 99 was measured after 100 steps. If a resumed run measured a
    step again, the later measurement counts. A resumed run of stock NeMo numbers its validations one step too low for
    every time it was resumed; this is corrected for TensorBoard, but cannot be detected in a CSV export.

    Args:
        log: A folder with TensorBoard's ``events.out.tfevents.*``, or one of these files; or the CSV export of a W&B
            run (of a chart, or ``run.history()``) with the columns ``trainer/global_step`` and ``val_loss``.

    Raises:
        UserError: it is neither, has no validation loss, or a loss is not finite.
    """
    if not log.exists():
        raise UserError(f"{log} does not exist; give a folder with TensorBoard's event files, or W&B's CSV export.")
    losses = _weights_and_biases(log) if log.is_file() and log.suffix == ".csv" else _tensorboard(log)
    for steps, loss in losses.items():
        if not math.isfinite(loss):
            raise UserError(
                f"{log} has a validation loss of {loss} after {steps:,} steps; use the log of a run that did not "
                "diverge."
            )
    return dict(sorted(losses.items()))


def log_files(log: Path) -> list[Path]:
    """Return the files of a log; empty if there are none."""
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

    measured: list[tuple[float, int, float]] = []
    tags: set[str] = set()
    for file in files:
        read = EventAccumulator(str(file), size_guidance={"scalars": 0})
        read.Reload()
        scalars = read.Tags()["scalars"]
        tags.update(scalars)
        if _LOSS in scalars:
            validations, training = read.Scalars(_LOSS), read.Scalars(_TRAINED) if _TRAINED in scalars else []
            steps = _steps_done(validations, training)
            for event, done in zip(validations, steps, strict=True):
                measured.append((event.wall_time, done, event.value))
    if not measured:
        raise UserError(f"{log} has no {_LOSS}, but {', '.join(sorted(tags)) or 'nothing'}; was the run validated?")
    return {done: loss for _, done, loss in sorted(measured)}


def _steps_done(validations: list[Any], training: list[Any]) -> list[int]:
    """Return the number of steps before each validation that a process logged.

    A checkpoint is saved before Lightning counts the step in ``_batches_that_stepped``, by which it numbers
    validations and chooses which training steps to log, so after every resumption both lag by one more step. The value
    of ``global_step`` does not lag: it is the number of steps before the logged one. Every n steps, the step whose
    number is -1 modulo n is logged, so the validation's number modulo n is the number of steps after it.
    """
    interval = min((int(later.value - event.value) for event, later in pairwise(training)), default=0)
    times = [event.wall_time for event in training]
    steps = []
    for event in validations:
        before = bisect_right(times, event.wall_time)
        if interval > 0 and before:
            steps.append(int(training[before - 1].value) + 1 + (event.step + 1) % interval)
        else:
            steps.append(event.step + 1)
    return steps


def _weights_and_biases(log: Path) -> dict[int, float]:
    try:
        with open(log, newline="", encoding="utf-8-sig", errors="replace") as file:  # Excel writes a BOM
            reader = csv.DictReader(file)
            columns, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise UserError(f"{log} is not a CSV table ({error}); export it again.") from None
    losses = [name for name in columns if name == _LOSS or name.endswith(f" - {_LOSS}")]
    if len(losses) != 1 or _STEP not in columns:
        raise UserError(
            f"{log} needs the columns {_STEP} and one {_LOSS} (it has {', '.join(columns) or 'none'}); export the "
            f"chart of one run with {_STEP} as its x-axis, or run.history()."
        )
    measured = [row for row in rows if row[losses[0]]]
    if not measured:
        raise UserError(f"{log} has no row with a {_LOSS}; was the run validated?")
    try:
        return {int(float(row[_STEP])) + 1: float(row[losses[0]]) for row in measured}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{log} has a value that is not a number ({error}); export it again.") from None
