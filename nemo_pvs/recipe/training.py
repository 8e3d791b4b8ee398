"""The block ``train``: how arms are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.fields import Block, Fraction, Positive, Rate, Tokens


class Training(Block):
    """One training recipe for every arm; only initial weights, budget, range, peak and layout differ."""

    tokens: Tokens
    """Training tokens, rounded up to whole steps; ``budgets`` of a recipe take its place."""
    sequence_length: Positive
    global_batch_size: Positive
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Positive = 1
    learning_rate: Rate
    """The peak."""
    min_learning_rate_ratio: Fraction = 0.1
    warmup: Literal["linear", "quadratic"] = "linear"
    """linear: NeMo's, then a cosine over the rest. quadratic: the paper's, the lower of it and a cosine over all."""
    warmup_fraction: Fraction = 0.05
    warmup_max_steps: Positive | None = None
    decay_fraction: Fraction | None = Field(default=None, exclude_if=lambda given: given is None)
    """Warm-up, stable, decay: the rate stays at the peak, and falls in a line over this share of the steps, the last
    ones. Without it, a cosine."""
    weight_decay: float = Field(default=0.1, ge=0)
    weight_decay_on: Literal["matrices", "all"] = "matrices"
    """all: norms and biases too, as in the paper."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_grad_norm: float = Field(default=1.0, gt=0)
    clip_before_mask: bool = False
    """Of a sparse model: clip the gradient's norm with pruned weights in it, as the published runs did."""
    mask_check_steps: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Of a sparse model: how often every pruned weight is looked at, besides before the first step and after the last;
    every 50 steps by default."""
    precision: Literal["auto", "bf16", "fp32", "fp8"] = "auto"
    """auto: bf16 where the device computes in it, else fp32. fp8: matrix products of layers in FP8, the rest bf16."""
    validations: Positive = 10
    """How often the validation loss is measured during the run, at equal distances and at the end."""
    validation_samples: Positive = 64
    """Validation sequences, always the same ones."""
    checkpoints: Positive = 2
    """How often the run is saved, at equal distances and at the end."""
    seed: Positive = 1234
    """The draws of a random initialisation, and the order of the training data unless ``data_seed`` is given."""
    data_seed: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Order of the training data, where it is not to change with ``seed``; None where it is ``seed``."""
    initialisation: Literal["megatron", "maxtext", "normal"] = Field(
        default="megatron", exclude_if=lambda given: given == "megatron"
    )
    """How random weights are distributed (``checkpoints.initialisation``)."""
    paper_steps: bool = Field(default=False, exclude_if=lambda given: not given)
    """Count budgets as the paper's labels do, 2^20 tokens for a million (``for_budget``)."""
    dynamic_loading: DynamicLoading | None = Field(default=None, exclude_if=lambda given: given is None)
    """How much of a batch is of which domain, where ``data`` has domains."""
    distill: Distillation | None = Field(default=None, exclude_if=lambda given: given is None)
    """Learn from a teacher as well; what is not given is no part of a run's identity, so older runs keep theirs."""

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on; how a run is spread over memory and looked after may change on the way."""
        return self.model_dump(
            mode="json",
            exclude={
                "micro_batch_size": True,
                "checkpoints": True,
                "mask_check_steps": True,
                "initialisation": True,  # which the initial weights themselves are the witness of
                "distill": {"teacher", "arms", "pretraining_tokens"},
            },
        )

    def for_budget(self, tokens: int) -> Training:
        """Return this training for a budget of the recipe, in tokens that are really seen.

        With ``paper_steps`` a step of 4,194,304 tokens counts as 4.0e6, as in arXiv 2606.14150, whose 50 B are 12,500
        steps and 52.4 B tokens; steps of other sizes are counted in the same proportion.
        """
        if self.paper_steps:
            steps = max(1, round(tokens * 2**20 / (10**6 * self.tokens_per_step)))
            tokens = steps * self.tokens_per_step
        return self.model_copy(update={"tokens": tokens, "paper_steps": False})

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps: ``tokens`` rounded up."""
        return max(1, -(-int(self.tokens) // self.tokens_per_step))

    @property
    def warmup_steps(self) -> int:
        """Steps until the warm-up ends; the guard keeps 0.29 * 100 from being 28."""
        steps = int(self.warmup_fraction * self.steps + 1e-9)
        return min(steps, self.warmup_max_steps or steps)

    @property
    def decay_steps(self) -> int | None:
        """Steps of the decay in a line, if that is asked for."""
        return None if self.decay_fraction is None else int(self.decay_fraction * self.steps + 1e-9)

    @property
    def order_seed(self) -> int:
        """The seed that fixes the order of the training data."""
        return self.seed if self.data_seed is None else self.data_seed

    @model_validator(mode="before")
    @classmethod
    def _a_data_seed_differs(cls, values: Any) -> Any:
        """Drop a ``data_seed`` equal to ``seed``: stating the default must not make another run of it."""
        if not isinstance(values, Mapping) or "data_seed" not in values:
            return values
        differs = values["data_seed"] != values.get("seed", cls.model_fields["seed"].default)
        return values if differs else {key: value for key, value in values.items() if key != "data_seed"}

    @model_validator(mode="after")
    def _batches_fit(self) -> Training:
        if self.decay_fraction is not None and self.warmup == "quadratic":
            raise ValueError("a quadratic warm-up has a cosine behind it; leave decay_fraction out")
        if self.validation_samples % self.global_batch_size:
            raise ValueError("validation_samples must be a multiple of global_batch_size")
        return self
