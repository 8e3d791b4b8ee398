"""EfficientLLM in the masks stage: train the parent while units are removed, and extract the pruned model."""

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
        """Return the job with the settings of pruning-aware training."""
        return replace(job, name=f"pruning of {job.name}", pruning=target.pruning_aware)

    def identity(self, job: TrainingJob) -> dict[str, Any]:
        """Return the settings that decide what is removed and when."""
        assert job.pruning is not None
        return {"pruning_aware": job.pruning.model_dump(mode="json", exclude={"layout"})}

    def finish(self, job: TrainingJob, checkpoint: Path) -> MasksRecord:
        """Return the checkpoint and the hash of the remaining units."""
        return MasksRecord(checkpoint.name, sha256_file(state_file(job.folder, job.training.steps)))

    def prune(self, job: TrainingJob, checkpoint: Path, parent: WeightSource) -> tuple[PrunedSource, Plan]:
        """Return the pruned model and its plan; this is the only physical compaction.

        Compacting during the training would save only part of the FLOPs of a short training (the paper's 8.6 B tokens
        precede 50 B or more). In return it would need a new model, optimizer and sharding each time, with intermediate
        sizes that may not fit the layout, and would reset the saliency. If it is worth it, a recipe can use the result
        of another recipe as its parent.
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
