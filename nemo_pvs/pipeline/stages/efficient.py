"""The masks stage of a target of method ``efficient-llm``: the parent trained while its units go, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.pipeline.stages.sheared import prepare_masks
from nemo_pvs.planning.efficient import aware_layout, aware_training, first_token, how
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.kept_units import KeptUnits, state_file
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.options import EFFICIENT
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.system.files import sha256_file
from nemo_pvs.training.job import Loading, TrainingJob
from nemo_pvs.training.trainer import Trainer


def aware_job(recipe: Recipe, name: str, folder: Path, data: Mapping[str, Any]) -> tuple[TrainingJob, dict[str, Any]]:
    """Return the training job in which units of a target go, and what tells it from another.

    Args:
        recipe: The recipe.
        name: The target.
        folder: Of the stage.
        data: As in ``TrainingJob``.
    """
    target = recipe.targets[name]
    asked, training = how(target), aware_training(recipe, target)
    job = TrainingJob(
        name=f"pruning of {name}",
        folder=folder.resolve() / "run",
        initial=folder.resolve() / "initial",
        data=dict(data),
        layout=aware_layout(target),
        training=training,
        first_token=first_token(recipe, target),
        pruning=asked,
        loading=Loading.at_the_start(training),
    )
    return job, {
        "pruning_aware": asked.model_dump(mode="json", exclude={"layout"}),
        "training": training.identity,
        "first_token": job.first_token,
    }


def train_and_prune(trainer: Trainer, job: TrainingJob, parent: WeightSource) -> dict[str, Any]:
    """Train the parent while its units go, from where an earlier attempt stopped.

    Returns:
        ``checkpoint`` and ``masks`` (a hash of the units that are left).
    """
    prepare_masks(job, parent)
    checkpoint = trainer.train(job)
    return {"checkpoint": checkpoint.name, "masks": sha256_file(state_file(job.folder, job.training.steps))}


def prune_by_units(job: TrainingJob, checkpoint: str, parent: WeightSource) -> tuple[PrunedSource, Plan]:
    """Return the model that is left, not written yet, and its plan: the one physical compaction.

    There is none before the end. One in between would save a part of the FLOPs of this training alone, which is short
    (the paper's 8.6 B tokens stand before 50 B or more), at the price of another model, optimizer and set of shards
    each time, of sizes that need not suit the layout while units of single layers go, and of saliency that begins
    anew. Where that is worth it, a recipe may take the result of another as its parent.
    """
    assert job.pruning is not None
    trained = open_source(job.checkpoints / checkpoint)
    space = UnitSpace(shape_of(trained))
    state = KeptUnits.load(state_file(job.folder, job.training.steps), space)
    provenance = {
        "model_fingerprint": fingerprint(trained),
        "parent_fingerprint": fingerprint(parent),
        "pruning_aware": job.pruning.model_dump(mode="json"),
        "removals": {
            kind: sum(removal["units"] for removal in state.removals if removal["kind"] == kind)
            for kind in ("hidden", "groups", "ffn")
        },
    }
    plan = space.plan(state.kept, EFFICIENT, provenance)
    return PrunedSource(trained, plan), plan
