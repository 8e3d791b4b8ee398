"""The masks stage of ``pvs run``: Sheared LLaMA's masks learned on the parent, and the model that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.sheared import _how, first_token, mask_layout, mask_training
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.sheared import load_gates, sheared_plan
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import sha256_file
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import LearnedMasks, Loading, TrainingJob
from nemo_pvs.training.trainer import Trainer


def mask_job(
    recipe: Recipe, name: str, shape: Shape, folder: Path, data: Mapping[str, Any]
) -> tuple[TrainingJob, dict[str, Any]]:
    """Return the training job of a target's masks, and what tells it from another.

    Args:
        recipe: The recipe.
        name: The target.
        shape: What the target is pruned to.
        folder: Of the stage.
        data: As in ``TrainingJob``.
    """
    target = recipe.targets[name]
    training = mask_training(recipe, target)
    job = TrainingJob(
        name=f"masks of {name}",
        folder=folder.resolve() / "run",
        initial=folder.resolve() / "initial",
        data=dict(data),
        layout=mask_layout(target),
        training=training,
        first_token=first_token(recipe, target),
        masks=LearnedMasks(shape, _how(target)),
        loading=Loading.at_the_start(training),
    )
    return job, {
        "shape": shape.to_dict(),
        "learn": _how(target).model_dump(mode="json", exclude={"layout", "micro_batch_size", "checkpoints"}),
        "training": job.training.identity,
        "first_token": job.first_token,
    }


def prepare_masks(job: TrainingJob, parent: WeightSource) -> Path:
    """Write what ranks need to learn masks, and return the job's file."""
    if not job.initial.exists():
        with progress("write nemo", "parameters") as show:
            write_nemo(parent, job.initial, progress=show)
    return job.save()


def learn_masks(trainer: Trainer, job: TrainingJob, parent: WeightSource) -> dict[str, Any]:
    """Train the parent and the masks, going on where an earlier attempt stopped.

    Returns:
        ``checkpoint`` and ``masks`` (a hash).

    Raises:
        UserError: the masks did not come near the target.
    """
    assert job.masks is not None
    prepare_masks(job, parent)
    checkpoint = trainer.train(job)
    load_gates(job.masks_file, job.masks.target)
    return {"checkpoint": checkpoint.name, "masks": sha256_file(job.masks_file)}


def prune_by_masks(job: TrainingJob, checkpoint: str, parent: WeightSource) -> tuple[PrunedSource, Plan]:
    """Return the pruned model, not written yet, and its plan, from what a job has learned."""
    assert job.masks is not None
    gates = load_gates(job.masks_file, job.masks.target)
    provenance = {"parent_fingerprint": fingerprint(parent), "learned": job.masks.to_json()["how"]}
    return sheared_plan(open_source(job.checkpoints / checkpoint), gates, provenance)
