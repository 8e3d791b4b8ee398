"""Sheared LLaMA (2310.06694) in a recipe: the training in which masks are learned, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.sheared import MaskLearning
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training


@dataclass(frozen=True)
class ShearedTarget:
    """A target whose masks are learned by training the parent (``planning.learned.LearnedTarget``)."""

    recipe: Recipe
    target: Target
    note = "weights and masks together"
    needs_dense_parent = False

    @property
    def how(self) -> MaskLearning:
        """The target's ``learn`` block, or its defaults."""
        return self.target.learn or MaskLearning()

    @property
    def training(self) -> Training:
        """Settings of mask learning: the recipe's ``train`` with the changes of ``learn``."""
        how = self.how
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
            "dynamic_loading": how.dynamic_loading or self.recipe.train.dynamic_loading,
        }
        return self.recipe.train.model_copy(update=changes)

    @property
    def layout(self) -> Parallelism:
        """Parallel layout of mask learning; a micro-batch size of the arms' layout gives way to one of ``learn``."""
        if self.how.layout is None and self.how.micro_batch_size is not None:
            return self.target.layout.model_copy(update={"micro_batch_size": None})
        return self.how.layout or self.target.layout

    @property
    def first_token(self) -> int:
        """First token of mask learning, in training order, rounded up to whole steps."""
        return self.recipe.data.token_ranges.start_of_pruned(self.how.first_token, self.training.tokens_per_step)

    def check(self, shape: Shape, parent: Shape) -> None:
        """Refuse impossible mask learning, before any work.

        Raises:
            UserError: the target has the parent's sizes, or batches or the layout do not fit the parent.
        """
        if shape == parent:
            raise UserError("it has the parent's sizes, so there is nothing to learn; make one of them smaller.")
        if shape.heads_per_group != parent.heads_per_group:
            raise UserError("its masks remove whole KV groups; leave heads out, and give kv_groups.")
        training, layout = self.training, self.layout
        if layout.context_parallel > 1:
            raise UserError(
                "masks cannot be learned with context parallelism; give learn.layout with context_parallel: 1."
            )
        check_training(training, layout, parent)
        if training.validation_samples % training.global_batch_size:
            raise UserError(
                f"train.validation_samples {training.validation_samples} is not a multiple of "
                f"learn.global_batch_size {training.global_batch_size}; change one of them."
            )

    def describe(self, parent: Shape) -> str:
        """Return one line that describes mask learning."""
        training, layout = self.training, self.layout
        memory = training_memory(parent, layout, training)
        return (
            f"{training.steps:,} steps of {training.tokens_per_step:,} tokens from token {self.first_token:,}, "
            f"TP x PP x DP = {layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}, "
            f"{memory.total / 1e9:,.1f} GB per rank, {memory.total_recomputed / 1e9:,.1f} with full recomputation"
        )
