"""Sheared LLaMA in a recipe: how masks are learned, what that costs, and what is refused."""

from __future__ import annotations

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.pruning.learned.sheared import METHOD
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training


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


def mask_layout(target: Target) -> Parallelism:
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


def _how(target: Target) -> MaskLearning:
    return target.learn or MaskLearning()
