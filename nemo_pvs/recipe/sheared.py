"""The block ``learn`` of a target of method ``sheared-llama``: mask learning."""

from __future__ import annotations

from pydantic import Field

from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Budget, Fraction, Parallelism, Positive, Rate, RecipeBlock, Tokens


class MaskLearning(RecipeBlock):
    """Joint training of the parent's weights and masks towards the target's sizes (Xia et al., 2310.06694).

    Defaults are those of the published runs. The sequence length and every setting that is not given here are those of
    ``train``; there is no weight decay.
    """

    tokens: Budget = 419_430_400
    """3,200 steps of 32 sequences of 4,096 tokens."""
    first_token: Tokens | None = None
    """First token of this training, in training order; by default the first token of pruned arms, which then read the
    same tokens again."""
    global_batch_size: Positive | None = None
    micro_batch_size: Positive | None = None
    learning_rate: Rate = 1e-4
    """Peak learning rate of the weights."""
    mask_learning_rate: Rate = 1.0
    """Peak learning rate of the mask parameters, log alpha."""
    multiplier_learning_rate: Rate = 1.0
    """Peak learning rate of the Lagrange multipliers (gradient ascent)."""
    min_learning_rate_ratio: Fraction = 0.1
    warmup_fraction: Fraction = 0.1
    """Warm-up of all three rates, which follow one schedule, as a fraction of the steps."""
    target_warmup_fraction: Fraction = 0.2
    """Fraction of the steps over which the required sparsity rises to the target's."""
    validations: Positive | None = None
    checkpoints: Positive | None = None
    dynamic_loading: DynamicLoading | None = Field(default=None, exclude_if=lambda given: given is None)
    """Used instead of ``train.dynamic_loading``."""
    seed: int = Field(default=0, ge=0)
    """Seed for the mask noise."""
    layout: Parallelism | None = None
    """Layout of mask learning, in which the parent is trained whole; the target's own by default."""
