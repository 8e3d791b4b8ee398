"""Sheared LLaMA in the masks stage: learn masks on the parent, and extract the pruned model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource
from nemo_pvs.model.shape import Shape
from nemo_pvs.pipeline.records import MasksRecord
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.sheared import load_gates, sheared_plan
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.recipe.target import Target
from nemo_pvs.system.files import sha256_file
from nemo_pvs.training.job import LearnedMasks, TrainingJob


class Sheared:
    """The method ``sheared-llama`` (``stages.learned.LearnedMethod``)."""

    def complete(self, job: TrainingJob, target: Target, shape: Shape) -> TrainingJob:
        """Return the job with the settings of mask learning."""
        learned = LearnedMasks(shape, target.learn or MaskLearning())
        return replace(job, name=f"masks of {job.name}", masks=learned)

    def identity(self, job: TrainingJob) -> dict[str, Any]:
        """Return the target shape and the settings of mask learning."""
        assert job.masks is not None
        return {
            "shape": job.masks.target.to_dict(),
            "learn": job.masks.how.model_dump(mode="json", exclude={"layout", "micro_batch_size", "checkpoints"}),
        }

    def finish(self, job: TrainingJob, checkpoint: Path) -> MasksRecord:
        """Return the checkpoint and the hash of the masks.

        Raises:
            UserError: the masks are not within tolerance of the target.
        """
        assert job.masks is not None
        load_gates(job.masks_file, job.masks.target)
        return MasksRecord(checkpoint.name, sha256_file(job.masks_file))

    def prune(self, job: TrainingJob, checkpoint: Path, parent: WeightSource) -> tuple[PrunedSource, Plan]:
        """Return the trained model without the masked units, and its plan."""
        assert job.masks is not None
        gates = load_gates(job.masks_file, job.masks.target)
        provenance = {"parent_fingerprint": fingerprint(parent), "learned": job.masks.to_json()["how"]}
        return sheared_plan(open_source(checkpoint), gates, provenance)
