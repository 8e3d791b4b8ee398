"""The declaration of a run's stage: its inputs, its work and its outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from nemo_pvs.pipeline.records import RecordT
from nemo_pvs.training.teaching_job import Job

Inputs = Mapping[str, Any]
"""Settings and hashes of what a stage reads, as plain data."""


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[RecordT]):
    """One stage of a run, declared once for running it and for looking ahead.

    A stage may be declared before the stages that it depends on are done; its functions are called after that.
    """

    name: str
    """``calibrate``, or ``prune/width`` for one of several; ``--force prune`` means all of them."""
    record: type[RecordT]
    """Type of the result."""
    inputs: Callable[[], Inputs]
    """Returns everything that the result depends on; a stage with the same inputs as before is not run again."""
    work: Callable[[], RecordT]
    """Runs the stage."""
    outputs: Sequence[Path] = ()
    """Files or folders that the stage makes; leftovers are removed before it starts."""
    after: Sequence[str] = ()
    """Names of the stages that it depends on."""
    reads: Sequence[Path] = ()
    """Files or folders of other stages that ``inputs`` opens."""
    known: Callable[[], RecordT | None] | None = None
    """Returns the result if it is known without any work, else None; for stages with this function an earlier record
    does not prove that the result still exists."""
    decisive: Callable[[Inputs], Any] = dict
    """Returns the part of the inputs whose change certainly changes the result."""
    precious: Sequence[Path] = ()
    """The outputs that took long to make: if the inputs have changed, they are only removed with ``--force``."""
    reusable: Sequence[Path] = ()
    """Folders of results that each say what they were made from, so that the work finds those that still fit: they are
    only removed with ``--force``."""
    keep_partial: bool = False
    """Whether the stage can resume from the outputs of an interrupted attempt with the same inputs."""
    shared: bool = False
    """Whether stages of the same kind (the name before the slash) with the same inputs have the same result."""
    then: Callable[[], None] | None = None
    """Called whenever the stage is done, now or earlier; must be idempotent."""


@dataclass(frozen=True, kw_only=True)
class TrainingStage(Stage[RecordT]):
    """A stage that a job on Megatron is run for, mostly a training; ``work`` runs after the job."""

    job: Callable[[], Job]
    """Returns the job."""
    prepare: Callable[[], Path]
    """Writes the files that the ranks need, and returns the path of the job file."""
