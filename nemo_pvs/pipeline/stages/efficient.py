"""EfficientLLM in the masks stage: the parent trained while its units go, and the model that is left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, shape_of
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.records import MasksRecord
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.kept_units import KeptUnits, state_file
from nemo_pvs.pruning.learned.unit_space import UnitSpace
from nemo_pvs.pruning.methods.efficient_llm import NAME
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.target import Target
from nemo_pvs.system.files import sha256_file
from nemo_pvs.training.job import TrainingJob


class Efficient:
    """The method ``efficient-llm`` (``stages.learned.LearnedMethod``)."""

    def complete(self, job: TrainingJob, target: Target, shape: Shape) -> TrainingJob:
        """Return the job with what is to be removed."""
        return replace(job, name=f"pruning of {job.name}", pruning=target.pruning_aware)

    def identity(self, job: TrainingJob) -> dict[str, Any]:
        """Return what is removed, and when."""
        assert job.pruning is not None
        return {"pruning_aware": job.pruning.model_dump(mode="json", exclude={"layout"})}

    def finish(self, job: TrainingJob, checkpoint: Path) -> MasksRecord:
        """Return the checkpoint and the hash of the units that are left."""
        return MasksRecord(checkpoint.name, sha256_file(state_file(job.folder, job.training.steps)))

    def prune(self, job: TrainingJob, checkpoint: Path, parent: WeightSource) -> tuple[PrunedSource, Plan]:
        """Return the model that is left, and its plan: the one physical compaction.

        There is none before the end. One in between would save a part of the FLOPs of this training alone, which is
        short (the paper's 8.6 B tokens precede 50 B or more), at the price of another model, optimizer and set of
        shards each time, of sizes that need not suit the layout while units of single layers go, and of saliency that
        starts over. Where that is worth it, a recipe may take the result of another as its parent.
        """
        assert job.pruning is not None
        trained = open_source(checkpoint)
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
        plan = space.plan(state.kept, NAME, provenance)
        return PrunedSource(trained, plan), plan
