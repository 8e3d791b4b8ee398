"""The block ``targets``: what the parent is pruned to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nemo_pvs.recipe.efficient import PruningAware
from nemo_pvs.recipe.fields import Block, Initialisation, Parallelism, Positive, Rate
from nemo_pvs.recipe.sheared import MaskLearning

SIZES = ("layers", "hidden", "ffn", "kv_groups")


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
    layout: Parallelism = Parallelism()

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
