"""The block of a target of method ``efficient-llm``: pruning-aware training (EfficientLLM, 2502.06663)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.learned.removal_rules import RemovalRules, fewest_removals
from nemo_pvs.recipe.fields import Block, Fraction, Parallelism, Positive, Rate, Tokens

if TYPE_CHECKING:
    from nemo_pvs.recipe.training import Training


class PruningAware(Block):
    """How a model is trained while units of it are removed, until it is as small as asked.

    Where the paper is silent, ``pruning.saliency`` and ``pruning.compensation`` say what was chosen.
    """

    parameters: Tokens
    """The target: pruning ends when the model has no more than so many, embedding and output head included."""
    tokens: Tokens
    """Of this training, in the steps of ``train``; what is trained after that are the target's arms."""
    start_tokens: Tokens = 0
    """Before the first unit goes; saliency is summed up meanwhile."""
    every: Positive = 1
    """Steps from one removal to the next: the paper's N, 1 or 2."""
    pace: Literal["one", "linear"] = "one"
    """one: a removal each time, until the target is reached. linear: as many or as few each time as let the number of
    parameters fall on a straight line, which ends at ``pace_end``."""
    pace_end: Fraction = 0.9
    """Share of the steps after the start at which a linear pace has reached the target."""
    uniform: bool = True
    groups_at_once: Positive = 1
    ffn_at_once: Positive = 1
    hidden_at_once: Positive = 1
    least_groups: Positive = 1
    least_ffn: Positive = 1
    least_hidden: Positive = 1
    decay: float = Field(default=0.9, ge=0, lt=1)
    """Of the average over steps: 0 looks at the last step alone."""
    curvature: Literal["tokens", "sequences"] = "tokens"
    """What the gradient of a step is the mean of, n in ``h = n g^2``. Tokens of a sequence have their gradients in
    common to some part; with sequences h is smaller than it is, and first order counts for more."""
    signed: bool = False
    per_parameter: bool = Field(default=True, exclude_if=lambda given: given)
    """Compare kinds of units by saliency per parameter, which the paper leaves open; else by the whole of it."""
    compensate: bool = True
    """Let the weights that stay make up for those that go."""
    compensation_tokens: Positive = 65_536
    """Of a step, evenly spread, from which the Hessian of each input is made. Least squares from n tokens for m inputs
    add about ``m / (n - m)`` of what cannot be predicted as noise, so n should be several times the widest input,
    or the damping high."""
    damping: float = Field(default=1.0, ge=0)
    """Share of the Hessian's mean diagonal. SparseGPT's 0.01 is for 64 tokens an input. Of the 1,536 FFN inputs of
    SmolLM2-135M a tenth went, in layers 4, 15 and 25, made up for from 2,048 or 4,096 tokens: on other text the error
    was 1.2 to 2.2 times that of doing nothing with 0.01, 0.9 to 1.3 times with 0.1, and 0.8 to 0.9 times with 1."""
    learning_rate: Rate | None = None
    """The peak; that of ``train`` if it is left out."""
    first_token: Tokens | None = None
    """Where in the training data, in the order of training; by default where pruned arms begin, which then read the
    same tokens again."""
    layout: Parallelism | None = None
    """Of this training, in which the parent's tensors are whole; the target's own by default."""

    @property
    def rules(self) -> RemovalRules:
        """What may go."""
        names = ("uniform", "groups_at_once", "ffn_at_once", "hidden_at_once", "per_parameter")
        least = ("least_groups", "least_ffn", "least_hidden")
        return RemovalRules(int(self.parameters), **{name: getattr(self, name) for name in (*names, *least)})

    def training(self, train: Training) -> Training:
        """Return the training during which units go."""
        changes = {"tokens": self.tokens, "learning_rate": self.learning_rate or train.learning_rate, "distill": None}
        return train.model_copy(update=changes)

    def start_step(self, train: Training) -> int:
        """Return the step, from 0, after whose gradient the first units may go."""
        return -(-int(self.start_tokens) // train.tokens_per_step)

    def is_due(self, step: int, train: Training) -> bool:
        """Return whether units may go at a step, from 0."""
        after = step - self.start_step(train)
        return after >= 0 and after % self.every == 0

    def goal(self, step: int, train: Training, parent: int) -> int:
        """Return the number of parameters that the model may have after a step, from 0, at a linear pace."""
        first = self.start_step(train)
        length = max(1, int(self.pace_end * (self.training(train).steps - first) + 1e-9))
        done = min(1.0, (step - first + 1) / length)
        return parent - int((parent - int(self.parameters)) * done + 1e-9)

    def check(self, parent: Shape, train: Training) -> None:
        """Refuse what cannot be reached.

        Raises:
            UserError: the parent has uneven layers, the target is out of reach, or there are too few steps.
        """
        if parent.uneven:
            raise UserError("efficient-llm prunes models of even layers only; this one's are uneven.")
        removals = fewest_removals(parent, self.rules)
        steps, first = self.training(train).steps, self.start_step(train)
        times = max(0, -(-(steps - first) // self.every))
        needed = removals if self.pace == "one" else 1
        if times < needed:
            raise UserError(
                f"From {parent.parameters:,} to {int(self.parameters):,} parameters it takes at least {removals:,} "
                f"removals, so {first + (needed - 1) * self.every + 1:,} steps, but {int(self.tokens):,} tokens are "
                f"{steps:,} steps with {times:,} removals; give more tokens, remove more at once, or say pace: linear."
            )
