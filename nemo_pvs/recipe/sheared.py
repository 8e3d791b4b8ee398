"""The block ``learn`` of a target of method ``sheared-llama``: how its masks are learned."""

from __future__ import annotations

from pydantic import Field

from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Block, Fraction, Parallelism, Positive, Rate, Tokens


class MaskLearning(Block):
    """Training of the parent's weights together with masks, towards the target's sizes (Xia et al., 2310.06694).

    Defaults are those of the published runs. Sequences are as long as those of ``train``, whose other settings hold
    too where nothing else is said here; weights are not decayed.
    """

    tokens: Tokens = 419_430_400
    """3,200 steps of 32 sequences of 4,096 tokens."""
    first_token: Tokens | None = None
    """Where in the training data, in the order of training; by default where pruned arms begin, which then read the
    same tokens again."""
    global_batch_size: Positive | None = None
    micro_batch_size: Positive | None = None
    learning_rate: Rate = 1e-4
    """Of the weights, at its peak."""
    mask_learning_rate: Rate = 1.0
    """Of log alpha."""
    multiplier_learning_rate: Rate = 1.0
    """Of the Lagrange multipliers, which ascend."""
    min_learning_rate_ratio: Fraction = 0.1
    warmup_fraction: Fraction = 0.1
    """Of all three rates: they follow one schedule."""
    target_warmup_fraction: Fraction = 0.2
    """Share of the steps in which the sparsity that is asked for grows to the target's."""
    validations: Positive | None = None
    checkpoints: Positive | None = None
    dynamic_loading: DynamicLoading | None = Field(default=None, exclude_if=lambda given: given is None)
    """Instead of ``train.dynamic_loading``."""
    seed: int = Field(default=0, ge=0)
    """Of the masks' noise."""
    layout: Parallelism | None = None
    """Of mask learning, in which the parent is trained whole; the target's own by default."""
