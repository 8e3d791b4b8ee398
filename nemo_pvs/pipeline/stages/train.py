"""The train stage: train an arm on Megatron, and write the result as a Hugging Face folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nemo_pvs.checkpoints.convert import convert
from nemo_pvs.checkpoints.fingerprint import fingerprint
from nemo_pvs.checkpoints.manifest import ORIGIN
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.ledger.ledger import LEDGER
from nemo_pvs.pipeline.folder import RunFolder, forget_optimizer
from nemo_pvs.pipeline.ledger import run_ledger
from nemo_pvs.pipeline.records import TrainedRecord, data_stage, prune_stage, random_stage, teacher_stage, train_stage
from nemo_pvs.pipeline.stage import Inputs, TrainingStage
from nemo_pvs.pipeline.stages.teach import check_cache, reading_cache
from nemo_pvs.planning.rounds import RoundTraining, shares
from nemo_pvs.recipe.identity import origin_of, read_origin
from nemo_pvs.recipe.options import rounds_of, vocabulary_of
from nemo_pvs.recipe.recipe import Arm
from nemo_pvs.system.files import write_json
from nemo_pvs.training.job import CHECKPOINTS, TrainingJob
from nemo_pvs.training.trainer import last_checkpoint


def train(run: RunFolder, arm: Arm) -> TrainingStage[TrainedRecord]:
    """Return the stage that trains an arm; for an arm that is pruned in rounds, the last share of its training."""
    folder, model = run.arm_folder(arm.name), run.model(arm.name)

    def job() -> TrainingJob:
        return reading_cache(run, arm, run.job(arm))

    pruned = arm.initialisation == "pruned"
    after = [prune_stage(arm.target) if pruned else random_stage(arm.target)]
    if vocabulary_of(run.recipe.targets[arm.target]) is None:
        after.append(data_stage())
    else:
        after.append(data_stage(arm.target))
        if arm.training.distill:
            after.append(teacher_stage(arm.target))

    def inputs() -> Inputs:
        initial = run.records.pruned(arm.target) if pruned else run.records.random(arm.target)
        return training_inputs(run, arm, shares(run.recipe, arm)[-1], initial.fingerprint)

    def prepare() -> Path:
        check_cache(run, arm)
        return job().save()

    def then() -> None:
        if pruned and (number := rounds_of(run.recipe.targets[arm.target])) > 1:
            forget_optimizer(run, arm.target, number - 1)
        ledger = run_ledger(run, arm, open_source(model), run.reads(arm))
        for place in (folder, model):  # next to the model, so that what is pruned from it inherits its cost
            ledger.save(place / LEDGER)
        write_json(model / ORIGIN, origin_of(run.recipe, arm.name, read_origin(run.parent_path)))

    return TrainingStage(
        name=train_stage(arm.name),
        record=TrainedRecord,
        inputs=inputs,
        job=job,
        prepare=prepare,
        work=lambda: TrainedRecord(hand_over(last_checkpoint(run.job(arm)), model), arm.layout.model_dump()),
        outputs=[folder, model],
        after=after,
        precious=[folder / CHECKPOINTS, model],
        keep_partial=True,
        then=then,
    )


def training_inputs(run: RunFolder, arm: Arm, share: RoundTraining, initial: str) -> Inputs:
    """Return what the result of a share of an arm's training depends on.

    The layout is not included, as a run may be resumed with a different one. ``initial`` is the fingerprint of the
    initial weights.
    """
    loading, teacher = run.loading(arm), run.job(arm).teacher
    files = run.recipe.data.token_files
    weights = files.blend[0] if files else None
    return {
        "initial": str(initial),
        "text": run.text("train", arm.target),
        "validation": run.data_of(arm.target).windows_sha256,
        **({"blend": weights} if weights else {}),
        "first_token": share.first_token,
        **({"part": [share.first_step, share.all_steps]} if share.all_steps else {}),
        **({"optimizer": "sliced"} if share.first_step and run.carries(arm, 2) else {}),
        "training": share.training.identity,
        **({"loading": asdict(loading)} if loading else {}),
        **({"teacher": fingerprint(open_source(teacher))} if teacher else {}),
    }


def hand_over(checkpoint: Path, model: Path) -> str:
    """Write a trained checkpoint as the Hugging Face folder ``model``, and return its fingerprint."""
    convert(checkpoint, model, to="hf", overwrite=True)
    return fingerprint(open_source(model))
