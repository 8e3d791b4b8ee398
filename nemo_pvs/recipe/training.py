"""The block ``train``: training settings of the arms."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Budget, Fraction, Positive, Rate, RecipeBlock
from nemo_pvs.recipe.rates import LearningRate, Sweep, peak_of

_Decay = Annotated[float, Field(ge=0, lt=1)]


class Training(RecipeBlock):
    """The training settings of all arms, which differ only in initial weights, budget, range, peak rate and layout."""

    tokens: Budget
    """Training tokens, rounded up to whole steps; replaced by the recipe's ``budgets``."""
    sequence_length: Positive
    global_batch_size: Positive
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Positive = 1
    learning_rate: LearningRate
    """Peak learning rate, or one for each kind of initial weights; of a sweep the chosen rate is used."""
    min_learning_rate_ratio: Fraction = 0.1
    warmup: Literal["linear", "quadratic"] = "linear"
    """linear: NeMo's schedule, a linear warm-up and a cosine over the remaining steps. quadratic: that of arXiv
    2606.14150, the minimum of a quadratic warm-up and a cosine over all steps."""
    warmup_fraction: Fraction = 0.05
    warmup_max_steps: Positive | None = None
    decay_fraction: Fraction | None = Field(default=None, exclude_if=lambda given: given is None)
    """Warm-up, stable, decay: the rate stays at the peak and decays linearly over this fraction of the steps, at the
    end. Without it, a cosine."""
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """all: norms and biases too, as in arXiv 2606.14150."""
    adam_betas: tuple[_Decay, _Decay] = (0.9, 0.95)
    adam_eps: Rate = 1e-8
    clip_grad_norm: float = Field(default=1.0, gt=0)
    clip_before_mask: bool = False
    """For sparse models: clip the gradient norm before masking, as the published runs did; the norm then includes the
    gradients of pruned weights."""
    mask_check_steps: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """For sparse models: interval in steps at which every pruned weight is checked to be zero, in addition to the
    checks before the first step and after the last; 50 by default."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """auto: bf16 if the device supports it, else fp32. fp8: matrix products of layers in FP8, the rest in bf16."""
    validations: Positive = 10
    """Number of validations during the run, at equal intervals and at the end."""
    validation_samples: Positive = 64
    """Validation sequences, the same ones every time."""
    checkpoints: Positive = 2
    """Number of checkpoints saved during the run, at equal intervals and at the end."""
    checkpoint_minutes: float = Field(default=30.0, gt=0, exclude_if=lambda given: given == 30.0)
    """Minutes after the last checkpoint at which another is saved."""
    seed: Positive = 1234
    """Seed for random initialisation, and for the order of the training data unless ``data_seed`` is given."""
    data_seed: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Seed for the order of the training data, if different from ``seed``."""
    initialisation: Literal["megatron", "maxtext", "normal"] = Field(
        default="megatron", exclude_if=lambda given: given == "megatron"
    )
    """Distribution of random weights (``checkpoints.transforms.initialisation``)."""
    paper_steps: bool = Field(default=False, exclude_if=lambda given: not given)
    """Count budgets as in the labels of arXiv 2606.14150, where a million is 2^20 tokens (``for_budget``)."""
    dynamic_loading: DynamicLoading | None = Field(default=None, exclude_if=lambda given: given is None)
    """Shares of the domains in a batch, if ``data`` has domains."""
    distill: Distillation | None = Field(default=None, exclude_if=lambda given: given is None)
    """Learn from a teacher as well. Keys that are not given are left out of a run's identity, so that the runs
    recorded in ``tests/unchanged`` and ``recipes/*/results`` keep theirs."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine the result; memory and monitoring settings may change during a run."""
        identity = self.model_dump(
            mode="json",
            exclude={
                "micro_batch_size": True,
                "checkpoints": True,
                "checkpoint_minutes": True,
                "mask_check_steps": True,
                "initialisation": True,  # the initial weights themselves show it
                "distill": {"teacher": True, "arms": True, "pretraining_tokens": True, "cache": {"layout"}},
            },
        )
        if self.data_seed == self.seed:  # stating the default changes nothing
            del identity["data_seed"]
        return identity

    def for_budget(self, tokens: int) -> Training:
        """Return these settings for a budget of the recipe, with ``tokens`` in tokens that are really read.

        With ``paper_steps`` a step of 4,194,304 tokens counts as 4.0e6, as in arXiv 2606.14150, whose 50 B are 12,500
        steps and 52.4 B tokens; steps of other sizes are counted in the same proportion.
        """
        if self.paper_steps:
            steps = max(1, round(tokens * 2**20 / (10**6 * self.tokens_per_step)))
            tokens = steps * self.tokens_per_step
        return self.model_copy(update={"tokens": tokens, "paper_steps": False})

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate; that of pruned weights if there are several, from which all but arms start.

        It has been chosen if the recipe has a sweep.
        """
        rate = peak_of(self.learning_rate, "pruned")
        assert not isinstance(rate, Sweep)
        return rate

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps, rounded up."""
        return max(1, -(-int(self.tokens) // self.tokens_per_step))

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up; the 1e-9 keeps 0.29 * 100 from becoming 28."""
        steps = int(self.warmup_fraction * self.steps + 1e-9)
        return min(steps, self.warmup_max_steps or steps)

    @property
    def decay_steps(self) -> int | None:
        """Steps of the linear decay; None without one."""
        return None if self.decay_fraction is None else int(self.decay_fraction * self.steps + 1e-9)

    @property
    def order_seed(self) -> int:
        """The seed for the order of the training data."""
        return self.seed if self.data_seed is None else self.data_seed

    @model_validator(mode="after")
    def _batches_fit(self) -> Training:
        if self.decay_fraction is not None and self.warmup == "quadratic":
            raise ValueError("a quadratic warm-up is followed by a cosine; leave decay_fraction out")
        if self.validation_samples % self.global_batch_size:
            raise ValueError("validation_samples must be a multiple of global_batch_size")
        return self
