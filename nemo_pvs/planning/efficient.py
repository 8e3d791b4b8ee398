"""EfficientLLM (2502.06663) in a recipe: the training during which units are removed, and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_training
from nemo_pvs.planning.memory import training_memory
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training

_TOKENS_PER_INPUT = 4  # with fewer, least squares add more than a third of the unpredictable part as noise
_MUCH_DAMPING = 1.0


@dataclass(frozen=True)
class EfficientTarget:
    """A target whose parent is pruned while it is trained (``planning.learned.LearnedTarget``)."""

    recipe: Recipe
    target: Target
    note = "trained while units were removed"
    needs_dense_parent = True

    @property
    def how(self) -> PruningAware:
        """The target's ``pruning_aware`` block.

        Raises:
            UserError: the target has none.
        """
        return _how(self.target)

    @property
    def training(self) -> Training:
        """Settings of the training during which units are removed."""
        return self.how.training(self.recipe.train)

    @property
    def layout(self) -> Parallelism:
        """Parallel layout of that training."""
        return self.how.layout or self.target.layout

    @property
    def first_token(self) -> int:
        """First token of that training, in training order, rounded up to whole steps."""
        return self.recipe.data.token_ranges.start_of_pruned(self.how.first_token, self.training.tokens_per_step)

    def check(self, shape: Shape, parent: Shape) -> None:
        """Refuse what cannot be done, before any work.

        Raises:
            UserError: the target is out of reach, the layout does not fit the parent, or the pruned model might not
                fit the layout in which the target is trained afterwards.
        """
        options, later = self.how, self.target.layout
        options.check(parent, self.recipe.train)
        check_training(self.training, self.layout, parent)
        for name, size, at_once in (
            ("groups_at_once", parent.kv_groups, options.groups_at_once),
            ("ffn_at_once", parent.ffn, options.ffn_at_once),
        ):
            if size % later.tensor_parallel or at_once % later.tensor_parallel:
                raise UserError(
                    f"the pruned model might not fit tensor_parallel {later.tensor_parallel}, which must divide "
                    f"pruning_aware.{name} ({at_once}) and the parent's number of such units ({size}); change the "
                    "target's layout, and set pruning_aware.layout for training the parent."
                )

    def describe(self, parent: Shape) -> str:
        """Return one line that describes that training."""
        training, layout = self.training, self.layout
        memory = training_memory(parent, layout, training)
        return (
            f"{training.steps:,} steps of {training.tokens_per_step:,} tokens from token "
            f"{self.first_token:,}, units are removed from step {self.how.start_step(training) + 1:,} on; "
            f"TP x PP x DP = {layout.tensor_parallel} x {layout.pipeline_parallel} x {layout.data_parallel}, "
            f"{memory.total / 1e9:,.1f} GB per rank, {memory.total_recomputed / 1e9:,.1f} with full recomputation"
            + _doubt(self.how, training, parent)
        )


def about_shape(target: Target, parent: Shape) -> Shape:
    """Estimate the target's shape by pruning all kinds of units by the same ratio; saliency decides the real one.

    Raises:
        UserError: the target does not say how much to remove.
    """
    parameters = _how(target).parameters

    def scaled(share: float) -> Shape:
        sizes = {"hidden": parent.hidden, "ffn": parent.ffn, "kv_groups": parent.kv_groups}
        return parent.replace(**{name: max(1, round(share * size)) for name, size in sizes.items()})

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if scaled(middle).parameters <= parameters else (low, middle)
    return scaled(low)


def _how(target: Target) -> PruningAware:
    if target.pruning_aware is None:
        raise UserError("nothing says how much to remove; give pruning_aware with parameters and tokens.")
    return target.pruning_aware


def _doubt(options: PruningAware, training: Training, parent: Shape) -> str:
    """Return a warning if there are too few tokens for compensation, else nothing."""
    widest = max(parent.hidden, parent.ffn, parent.axis("query"))
    tokens = min(training.tokens_per_step, options.compensation_tokens)
    if not options.compensate or options.damping >= _MUCH_DAMPING or tokens >= _TOKENS_PER_INPUT * widest:
        return ""
    return f"; {tokens:,} tokens are few to compensate for {widest:,} inputs: use more of them, or damping: 1"
