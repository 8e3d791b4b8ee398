"""A stage of a run as it is declared: what it is made from, what it does, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from nemo_pvs.pipeline.records import RecordT
from nemo_pvs.training.job import TrainingJob

Inputs = Mapping[str, Any]
"""Settings and hashes of what a stage reads, as plain data."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[RecordT]):
    """One stage of a run: declared once, for whoever does it and for whoever looks ahead at it.

    A stage may be declared before the stages that it is made from are done; its functions are called after that.
    """

    name: str
    """``calibrate``, or ``prune/width`` for one of several; ``--force prune`` means all of them."""
    record: type[RecordT]
    """What it returns."""
    inputs: Callable[[], Inputs]
    """Returns everything that the result depends on; a stage with the same inputs as before is not done again."""
    work: Callable[[], RecordT]
    """Does it."""
    outputs: Sequence[Path] = ()
    """Files or folders that it makes; leftovers are removed before it starts."""
    after: Sequence[str] = ()
    """Names of the stages that it is made from."""
    reads: Sequence[Path] = ()
    """Files or folders of other stages that ``inputs`` opens."""
    known: Callable[[], RecordT | None] | None = None
    """Returns the result if it is known before any work, else None; of such a stage an earlier record is no proof that
    the result is still there."""
    decisive: Callable[[Inputs], Any] = dict
    """Returns the part of the inputs that certainly changes the result when it changes."""
    precious: Sequence[Path] = ()
    """The outputs that took long: if they were made from other inputs, they are not removed unasked."""
    keep_partial: bool = False
    """Whether the stage resumes by itself from what an interrupted attempt at the same inputs left."""
    shared: bool = False
    """Whether a stage of the same kind (the name before the slash) with the same inputs makes the same."""
    then: Callable[[], None] | None = None
    """Called whenever the stage is done or is found done; repeating it changes nothing."""


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage[RecordT]):
    """A stage that trains a job; ``work`` is what is left to do when the job is trained."""

    job: Callable[[], TrainingJob]
    """Returns the job."""
    prepare: Callable[[], Path]
    """Writes what the ranks need, and returns the job's file."""
