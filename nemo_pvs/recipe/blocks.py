"""The blocks of a recipe: what may stand under each key of the YAML file, with types, bounds and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from nemo_pvs.checkpoints.huggingface.config import normal_config
from nemo_pvs.ledger.budget import Setting
from nemo_pvs.recipe.distillation import Distillation
from nemo_pvs.recipe.domains import DynamicLoading
from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Block, Fraction, Initialisation, Layout, Positive, Rate, Tokens
from nemo_pvs.recipe.sheared import MaskLearning

SIZES = ("layers", "hidden", "ffn", "kv_groups")
TASK_DATA = "task_data"
"""Where downloaded data sets lie unless a recipe says otherwise."""
_NO_OPTIONS = (
    "method",
    "stages",
    "slice_optimizer_state",
    "task_data",
    "learning_rate",
    "keep_parent_embeddings",
    "layout",
    "arms",
    "distill",
    "learn",
    "pruning_aware",
)
"""Keys of a target that its method does not ask for."""
DENSE = "dense"
"""The method of a target that is the parent's own architecture: to train the parent itself, or to train it on."""


def _pattern(value: Any) -> Any:
    """Undo YAML, which takes 2:4 without quotes for 2 minutes and 4 seconds; no sparsity is 60 or more."""
    if isinstance(value, int) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return str(value) if isinstance(value, float) else value


def number(text: str) -> float | None:
    """Return the number that a text is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def _budget(value: Any) -> Any:
    if isinstance(value, str) and value not in get_args(Setting) and number(value) is None:
        raise ValueError(f"must be a number of tokens or one of {', '.join(get_args(Setting))}")
    return value


Budget = Annotated[Tokens | Setting, BeforeValidator(_budget)]
"""A number of tokens, or what is to be equal to the pruned arm."""


class Parent(Block):
    """The model to prune."""

    source: str | None = None
    """A Hugging Face folder, a NeMo checkpoint, a ``.gguf`` file, ``hf://owner/name``, or ``smollm2-135m``."""
    config: dict[str, Any] | None = None
    """The Hugging Face config.json of the parent: for a dry run without the model, and for a parent that is yet to be
    trained (then without ``source``)."""
    tokenizer: str | None = None
    """A folder with the tokenizer of a parent that is yet to be trained."""
    pretraining_tokens: Tokens = 0
    """Tokens that the parent was pretrained on, for the ledger; 0 when nobody knows, or its own ledger does."""

    @model_validator(mode="after")
    def _is_something(self) -> Parent:
        if self.source is None and (self.config is None or self.tokenizer is None):
            raise ValueError("give the source, or the config and the tokenizer of a model that is yet to be trained")
        return self

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.source or "parent"

    @property
    def normal_config(self) -> dict[str, Any] | None:
        """The stated config in normal form.

        Raises:
            UserError: as ``hf_config.normal_config``.
        """
        return None if self.config is None else normal_config(self.config, "parent.config of the recipe")


class Calibration(Block):
    """The sequences that importance is measured on."""

    samples: Positive = 128
    sequence_length: Positive = 2048
    scan_samples: Positive = 16
    """Sequences for the depth scan, which runs the model once for every window."""
    seed: int = 0


class Rates(Block):
    """Peak learning rates by initial weights."""

    pruned: Rate
    random: Rate


class Target(Block):
    """One pruned architecture: the method and how much it removes."""

    method: Literal[
        "minitron-depth",
        "shortgpt",
        "minitron-width",
        "minitron-joint",
        "flap",
        "wanda-sp",
        "magnitude-sp",
        "llm-pruner",
        "sheared-llama",
        "efficient-llm",
        "adapt-pruner",
        "magnitude",
        "wanda",
        "sparsegpt",
        "dense",
    ]
    layers: Positive | None = None
    hidden: Positive | None = None
    ffn: Positive | None = None
    kv_groups: Positive | None = None
    ratio: float | None = Field(default=None, gt=0, lt=1)
    of: Literal["body", "total"] | None = None
    preset: str | None = None
    sparsity: Annotated[str | None, BeforeValidator(_pattern)] = None
    search: Literal["contiguous", "greedy", "sleb", "individual"] | None = None
    task: str | None = None
    """Choose layers by tasks instead of the loss: as ``pvs evaluate --tasks`` takes them, or ``continuation``, made of
    the calibration split."""
    task_data: str | None = None
    """Folder of downloaded data sets, ``<owner>/<name>`` each; ``TASK_DATA`` where it is left out."""
    task_limit: Positive | None = None
    """Take only the first so many documents of each task."""
    aggregation: Literal["energy", "meanabs_l2"] | None = None
    metric: Literal["WIFV", "IFV", "WIFN", "param_first", "param_second", "param_mix", "vectorize"] | None = None
    structure: Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM"] | None = None
    bias: bool | None = None
    uniform: bool | None = None
    remove_groups: int | None = Field(default=None, ge=0)
    ffn_multiple: Positive | None = None
    kv_groups_multiple: Positive | None = None
    sequential: bool | None = None
    protect_first: int | None = Field(default=None, ge=0)
    protect_last: int | None = Field(default=None, ge=0)
    compat: bool | None = None
    iterations: Positive | None = None
    amplitude: float | None = Field(default=None, ge=0)
    stages: Positive | None = Field(default=None, exclude_if=lambda given: given is None)
    """Reach the target in so many steps, with a share of the training behind each (``staged``)."""
    slice_optimizer_state: bool = Field(default=False, exclude_if=lambda given: not given)
    """Of ``stages``: go on with what each stage's pruning leaves of AdamW's state, instead of beginning it anew."""
    learning_rate: Rate | Rates | None = None
    """Instead of ``train.learning_rate``: one, or one for each kind of initial weights."""
    arms: list[Initialisation] | None = Field(default=None, min_length=1, exclude_if=lambda given: given is None)
    """Initial weights to train it from, instead of the recipe's ``arms``."""
    keep_parent_embeddings: bool = False
    """The random arm keeps the pruned model's embedding and vectors, as the published sparse baseline does."""
    distill: bool = True
    """Whether ``train.distill`` is for its arms, too; false trains them on the text alone."""
    learn: MaskLearning | None = None
    """How ``sheared-llama`` learns its masks."""
    pruning_aware: PruningAware | None = None
    """How much ``efficient-llm`` removes, and when, while the parent is trained."""
    layout: Layout = Layout()

    @property
    def options(self) -> dict[str, Any]:
        """What is asked of the method, under the names of ``pruning.job.Options``."""
        given = {
            name: value
            for name in type(self).model_fields
            if name not in {*_NO_OPTIONS, *SIZES} and (value := getattr(self, name)) is not None
        }
        sizes = ((name, getattr(self, name)) for name in SIZES)
        target = ",".join(f"{name}={size}" for name, size in sizes if size is not None)
        return {**({"target": target} if target else {}), **given}

    def peak(self, initialisation: Initialisation, default: float) -> float:
        """Return the peak learning rate of an arm."""
        rate = self.learning_rate
        return default if rate is None else getattr(rate, initialisation) if isinstance(rate, Rates) else rate


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


class Evaluation(Block):
    """How perplexity on the test split is measured, and what tasks are asked."""

    samples: Positive = 64
    sequence_length: Positive = 2048
    tasks: list[str] = Field(default=[])
    """As ``pvs evaluate --tasks`` takes them; ``continuation`` is made of the test split."""
    task_data: str = TASK_DATA
    """Folder of downloaded data sets, ``<owner>/<name>`` each."""
    task_limit: Positive | None = None
    """Take only the first so many documents of each task."""


class Budgets(Block):
    """Token budgets by initial weights; every one is a run of its own."""

    pruned: list[Tokens] = Field(default=[])
    random: list[Budget] = Field(default=[])
    """A setting is a run for each of ``pruned``, as long as makes it equal to that one."""

    @model_validator(mode="after")
    def _settings_have_a_pruned_arm(self) -> Budgets:
        setting = next((budget for budget in self.random if isinstance(budget, str)), None)
        if setting and not self.pruned:
            raise ValueError(f"{setting} is relative to pruned arms; say under pruned what these get")
        return self
