"""The block ``pruning_aware`` of a target of method ``efficient-llm`` (EfficientLLM, 2502.06663)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.removal_rules import RemovalRules, fewest_removals
from nemo_pvs.recipe.fields import Budget, Fraction, Parallelism, Positive, Rate, RecipeBlock, Tokens
from nemo_pvs.recipe.rates import peak_of

if TYPE_CHECKING:
    from nemo_pvs.recipe.training import Training


class PruningAware(RecipeBlock):
    """Pruning-aware training: units are removed during training until the model has the target size.

    Choices that the paper leaves open are documented where they are made, in ``pruning.learned.saliency``
    and ``pruning.learned.compensation``.
    """

    parameters: Tokens
    """Target size: pruning ends when the model has at most this many, embedding and output head included."""
    tokens: Budget
    """Tokens of this training run, in the steps of ``train``; the target's arms are trained after it."""
    start_tokens: Tokens = 0
    """Tokens before the first removal; saliency is accumulated meanwhile."""
    every: Positive = 1
    """Steps from one removal to the next: the paper's N, 1 or 2."""
    pace: Literal["one", "linear"] = "one"
    """one: one removal each time, until the target is reached. linear: as many each time as it takes for the number of
    parameters to fall linearly until ``pace_end``."""
    pace_end: Fraction = 0.9
    """With a linear pace: the fraction of the steps after the start at which the target is reached."""
    uniform: bool = True
    groups_at_once: Positive = 1
    ffn_at_once: Positive = 1
    hidden_at_once: Positive = 1
    least_groups: Positive = 1
    least_ffn: Positive = 1
    least_hidden: Positive = 1
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the moving average over steps; 0 uses the last step alone."""
    curvature: Literal["tokens", "sequences"] = "tokens"
    """What a step's gradient is taken as the mean of, n in ``h = n g^2``. The gradients of a sequence's tokens are
    correlated; counting sequences underestimates h, which gives the first order more weight."""
    signed: bool = False
    per_parameter: bool = Field(default=True, exclude_if=lambda given: given)
    """Compare kinds of units by saliency per parameter, which the paper leaves open; otherwise by total saliency."""
    compensate: bool = True
    """Update the remaining weights to compensate for the removed ones."""
    compensation_tokens: Positive = 65_536
    """Tokens per step, evenly spread, from which each layer's input Hessian is computed. Least squares with n tokens
    and m inputs add about ``m / (n - m)`` of the unpredictable part as noise, so n should be several times the widest
    input, or the damping high."""
    damping: float = Field(default=1.0, ge=0)
    """Damping as a fraction of the Hessian's mean diagonal. SparseGPT's 0.01 assumes 64 tokens per input. Measured by
    removing a tenth of SmolLM2-135M's 1,536 FFN inputs in layers 4, 15 and 25 and compensating from 2,048 or 4,096
    tokens: on other text the error was 1.2 to 2.2 times that without compensation for damping 0.01, 0.9 to 1.3 times
    for 0.1, and 0.8 to 0.9 times for 1."""
    learning_rate: Rate | None = None
    """Peak learning rate; that of ``train`` by default."""
    first_token: Tokens | None = None
    """First token of this training, in training order; by default the first token of pruned arms, which then read the
    same tokens again."""
    layout: Parallelism | None = None
    """Layout of this training, in which the parent's tensors are whole; the target's own by default."""

    @property
    def rules(self) -> RemovalRules:
        """Which units may be removed, and how many at once."""
        names = ("uniform", "groups_at_once", "ffn_at_once", "hidden_at_once", "per_parameter")
        least = ("least_groups", "least_ffn", "least_hidden")
        return RemovalRules(int(self.parameters), **{name: getattr(self, name) for name in (*names, *least)})

    def training(self, train: Training) -> Training:
        """Return the training settings for the run during which units are removed."""
        peak = self.learning_rate or peak_of(train.learning_rate, "pruned")
        return train.model_copy(update={"tokens": self.tokens, "learning_rate": peak, "distill": None})

    def start_step(self, train: Training) -> int:
        """Return the step, counted from 0, after whose gradient the first units may be removed."""
        return -(-int(self.start_tokens) // train.tokens_per_step)

    def is_due(self, step: int, train: Training) -> bool:
        """Return whether units may be removed at a step, counted from 0."""
        after = step - self.start_step(train)
        return after >= 0 and after % self.every == 0

    def goal(self, step: int, train: Training, parent: int) -> int:
        """Return the most parameters that a linear pace allows after a step.

        Args:
            step: The step, counted from 0.
            train: The recipe's ``train``.
            parent: The parent's number of parameters.
        """
        first = self.start_step(train)
        length = max(1, int(self.pace_end * (self.training(train).steps - first) + 1e-9))
        done = min(1.0, (step - first + 1) / length)
        return parent - int((parent - int(self.parameters)) * done + 1e-9)

    def check(self, parent: Shape, train: Training) -> None:
        """Refuse a target size that this training cannot reach.

        Raises:
            UserError: the parent has uneven layers, the target is out of reach, or there are too few steps.
        """
        if parent.uneven:
            raise UserError(
                "efficient-llm only prunes models whose layers all have the same sizes, and this one's differ; choose "
                "another method or parent."
            )
        if self.compensate and self.compensation_tokens <= train.global_batch_size:
            raise UserError(
                f"compensation_tokens of {int(self.compensation_tokens):,} are the first token of each of the "
                f"{train.global_batch_size:,} sequences of a step, which says nothing about the others; give more."
            )
        removals = fewest_removals(parent, self.rules)
        steps, first = self.training(train).steps, self.start_step(train)
        times = max(0, -(-(steps - first) // self.every))
        needed = removals if self.pace == "one" else 1
        if times < needed:
            raise UserError(
                f"Going from {parent.parameters:,} to {int(self.parameters):,} parameters takes at least {removals:,} "
                f"removals, so {first + (needed - 1) * self.every + 1:,} steps, but {int(self.tokens):,} tokens are "
                f"{steps:,} steps with {times:,} removals; give more tokens, remove more at once, or set pace: linear."
            )
