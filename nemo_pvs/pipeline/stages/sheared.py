"""The masks stage of ``pvs run``: Sheared LLaMA's masks learned on the parent, and the model that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_pvs.checkpoints.nemo.checkpoint import write_nemo
from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.checkpoints.source import WeightSource, fingerprint
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.pruning.apply import PrunedSource
from nemo_pvs.pruning.learned.sheared import METHOD, load_gates, sheared_plan
from nemo_pvs.pruning.plan import Plan
from nemo_pvs.recipe.blocks import Target, Training
from nemo_pvs.recipe.fields import Layout
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.system.files import sha256_file
from nemo_pvs.system.progress import progress
from nemo_pvs.training.job import LearnedMasks, Loading, TrainingJob
from nemo_pvs.training.trainer import Trainer


def learns_masks(target: Target) -> bool:
    """Return whether a target is pruned by masks that are learned in training."""
    return target.method == METHOD


def mask_training(recipe: Recipe, target: Target) -> Training:
    """Return the training in which the masks of a target are learned: the recipe's, with what ``learn`` changes."""
    how = _how(target)
    given = how.model_dump(
        include={"global_batch_size", "micro_batch_size", "validations", "checkpoints"}, exclude_none=True
    )
    changes = {
        **given,
        "tokens": how.tokens,
        "learning_rate": how.learning_rate,
        "min_learning_rate_ratio": how.min_learning_rate_ratio,
        "warmup": "linear",
        "warmup_fraction": how.warmup_fraction,
        "warmup_max_steps": None,
        "weight_decay": 0.0,
        "clip_before_mask": False,
        "distill": None,
        "dynamic_loading": how.dynamic_loading or recipe.train.dynamic_loading,
    }
    return recipe.train.model_copy(update=changes)


def mask_layout(target: Target) -> Layout:
    """Return how mask learning is spread over processes."""
    return _how(target).layout or target.layout


def first_token(recipe: Recipe, target: Target) -> int:
    """Return where in the training data mask learning begins, rounded up to whole steps."""
    given, step = _how(target).first_token, mask_training(recipe, target).tokens_per_step
    first = recipe.data.token_ranges.of("pruned")[0] if given is None else int(given)
    return -(-first // step) * step


def end_of_reading(recipe: Recipe) -> int:
    """Return the end of what any run of a recipe reads, in the order of training; its budgets are numbers by now."""
    arms = [arm.first_token + arm.tokens for arm in recipe.runs]
    learned = [
        first_token(recipe, target) + training.steps * training.tokens_per_step
        for target in recipe.targets.values()
        if learns_masks(target)
        for training in [mask_training(recipe, target)]
    ]
    return max(arms + learned)


def describe_masks(recipe: Recipe, target: Target, parent: Shape) -> str:
    """Return one line about how the masks of a target are learned."""
    training, layout = mask_training(recipe, target), mask_layout(target)
    memory = training_memory(parent, layout, training)
    return (
        f"{training.steps:,} steps of {training.tokens_per_step:,} tokens from token {first_token(recipe, target):,}, "
        f"TP x PP x DP = {layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}, "
        f"{memory.total / 1e9:,.1f} GB a GPU, {memory.total_recomputed / 1e9:,.1f} recomputed"
    )


def check_masks(recipe: Recipe, target: Target, shape: Shape, parent: Shape) -> None:
    """Refuse mask learning that cannot be done, before any work.

    Raises:
        UserError: the target is the parent itself, or batches or the layout do not fit the parent.
    """
    if shape == parent:
        raise UserError("it has the parent's sizes, so there is nothing to learn; make one of them smaller.")
    training, layout = mask_training(recipe, target), mask_layout(target)
    if layout.context_parallel > 1:
        raise UserError("masks are learned without context parallelism; give learn.layout.")
    check_training(training, layout, parent)
    if training.validation_samples % training.global_batch_size:
        raise UserError(
            f"train.validation_samples {training.validation_samples} is not a multiple of learn.global_batch_size "
            f"{training.global_batch_size}; change one of them."
        )


def charge_masks(
    ledger: Ledger, recipe: Recipe, target: Target, parent: Shape, read: TokensRead | None = None
) -> None:
    """Charge a pruned arm with the learning of its masks, training of the whole parent on ``read``."""
    training = mask_training(recipe, target)
    ledger.charge(
        "mask learning",
        training.steps * training.tokens_per_step,
        parent,
        training.sequence_length,
        training=True,
        note="weights and masks together",
        tokens_per_step=training.tokens_per_step,
        read=read,
    )


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


def _how(target: Target) -> MaskLearning:
    return target.learn or MaskLearning()
