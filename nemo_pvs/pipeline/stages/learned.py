"""The stage of targets whose parent is trained first, with masks or with units that are removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.stages import efficient, sheared
from nemo_pvs.planning.efficient import prunes_while_training
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.training.job import TrainingJob
from nemo_pvs.training.trainer import Trainer


def stage_job(
    recipe: Recipe, name: str, shape: Shape, folder: Path, data: Mapping[str, Any]
) -> tuple[TrainingJob, dict[str, Any]]:
    """Return the training job of a target's stage, and what tells it from another.

    Args:
        recipe: The recipe.
        name: The target.
        shape: What the target is pruned to, as far as it is known.
        folder: Of the stage.
        data: As in ``TrainingJob``.
    """
    if prunes_while_training(recipe.targets[name]):
        return efficient.aware_job(recipe, name, folder, data)
    return sheared.mask_job(recipe, name, shape, folder, data)


def train_stage(trainer: Trainer, job: TrainingJob, parent: WeightSource) -> dict[str, Any]:
    """Train, going on where an earlier attempt stopped; returns ``checkpoint`` and ``masks`` (a hash)."""
    return (efficient.train_and_prune if job.pruning else sheared.learn_masks)(trainer, job, parent)


def prune_by_stage(job: TrainingJob, checkpoint: str, parent: WeightSource) -> tuple[PrunedSource, Plan]:
    """Return the pruned model, not written yet, and its plan, from what a job has found out."""
    return (efficient.prune_by_units if job.pruning else sheared.prune_by_masks)(job, checkpoint, parent)
