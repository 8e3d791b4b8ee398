"""The masks stage: train the parent with masks, or while units are removed, to learn what to keep of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.folder import RunFolder
from nemo_pvs.pipeline.records import MasksRecord, masks_stage
from nemo_pvs.pipeline.stage import Inputs, TrainingStage
from nemo_pvs.pipeline.stages.efficient import Efficient
from nemo_pvs.pipeline.stages.sheared import Sheared
from nemo_pvs.planning.learned import LearnedTarget, learned_target
from nemo_pvs.planning.targets import expected_shape
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.methods import efficient_llm, sheared_llama
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.target import Target
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import CHECKPOINTS, Loading, TrainingJob
from nemo_pvs.training.trainer import last_checkpoint


class LearnedMethod(Protocol):
    """The parts of the masks stage that differ between methods."""

    def complete(self, job: TrainingJob, target: Target, shape: Shape) -> TrainingJob:
        """Return the job with the method's settings.

        Args:
            job: The training job, named after the target.
            target: The target.
            shape: The expected shape of the target.
        """

    def identity(self, job: TrainingJob) -> dict[str, Any]:
        """Return the settings, in addition to those of the training, that determine the result of a job."""

    def finish(self, job: TrainingJob, checkpoint: Path) -> MasksRecord:
        """Return the result of a trained job.

        Raises:
            UserError: the result is not within tolerance of the target.
        """

    def prune(self, job: TrainingJob, checkpoint: Path, parent: WeightSource) -> tuple[PrunedSource, Plan]:
        """Return the pruned model, not written yet, and its plan, from the result of a trained job."""


_METHODS: dict[str, LearnedMethod] = {sheared_llama.NAME: Sheared(), efficient_llm.NAME: Efficient()}


def learn(run: RunFolder, name: str, target: Target) -> TrainingStage[MasksRecord]:
    """Return the stage that trains the parent to learn what to keep of it for a target."""
    method, folder = _METHODS[target.method], _folder(run, name)

    def job() -> TrainingJob:
        return learning_job(run, name, target)

    def inputs() -> Inputs:
        learning = job()
        return {
            "parent": run.records.parent.fingerprint,
            "text": run.text("train"),
            "validation": run.records.data.windows_sha256,
            **method.identity(learning),
            "training": learning.training.identity,
            "first_token": learning.first_token,
        }

    def prepare() -> Path:
        learning = job()
        if not learning.initial.exists():
            with progress("write nemo", "parameters") as show:
                write_nemo(run.parent_source, learning.initial, progress=show)
        return learning.save()

    def work() -> MasksRecord:
        learning = job()
        return method.finish(learning, last_checkpoint(learning))

    return TrainingStage(
        name=masks_stage(name),
        record=MasksRecord,
        inputs=inputs,
        job=job,
        prepare=prepare,
        work=work,
        outputs=[folder],
        after=["parent", "data"],
        precious=[folder / "run" / CHECKPOINTS],
        keep_partial=True,
        shared=True,
    )


def learning_job(run: RunFolder, name: str, target: Target) -> TrainingJob:
    """Return the job that trains the parent for a target; the parent's sizes must be known."""
    learned = learned_target(run.recipe, target)
    assert learned is not None
    shape = expected_shape(target, run.parent_shape).shape
    return complete_job(learned, name, target, shape, _folder(run, name), run.training_data)


def complete_job(
    learned: LearnedTarget, name: str, target: Target, shape: Shape, folder: Path, data: dict[str, Any]
) -> TrainingJob:
    """Return the job that trains the parent for a target.

    Args:
        learned: Settings of that training.
        name: The target's name.
        target: The target.
        shape: The expected shape of the target.
        folder: Folder of the stage.
        data: As in ``TrainingJob``.
    """
    training = learned.training
    job = TrainingJob(
        name=name,
        folder=folder.resolve() / "run",
        initial=folder.resolve() / "initial",
        data=data,
        layout=learned.layout,
        training=training,
        first_token=learned.first_token,
        loading=Loading.at_the_start(training),
    )
    return _METHODS[target.method].complete(job, target, shape)


def prune_by_learning(run: RunFolder, name: str, target: Target) -> tuple[PrunedSource, Plan]:
    """Return a pruned target, not written yet, and its plan, from the result of training the parent."""
    job, checkpoint = learning_job(run, name, target), run.records.masks(name).checkpoint
    return _METHODS[target.method].prune(job, job.checkpoints / checkpoint, run.parent_source)


def _folder(run: RunFolder, name: str) -> Path:
    return run.folder / "masks" / name
