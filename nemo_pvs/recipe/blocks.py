"""The small blocks of a recipe: the values that each key of the YAML file takes, with types, bounds and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from nemo_pvs.checkpoints.huggingface.config import normal_config
from nemo_pvs.ledger.budget import EqualBudget
from nemo_pvs.recipe.fields import Budget, Fraction, Positive, RecipeBlock, Tokens, number

TASK_DATA = "task_data"
"""Default folder of downloaded data sets."""
RECOVERY = "recovery"
"""The preset of tasks and measures that show how much of its parent a retrained model has regained."""


def _budget(value: Any) -> Any:
    if isinstance(value, str) and value not in get_args(EqualBudget) and number(value) is None:
        raise ValueError(f"must be a number of tokens or one of {', '.join(get_args(EqualBudget))}")
    return value


def _names(value: Any) -> Any:
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


TokenBudget = Annotated[Budget | EqualBudget, BeforeValidator(_budget)]
"""A number of tokens, or the quantity that is to equal the pruned arm's."""


class Parent(RecipeBlock):
    """The model to prune."""

    source: str | None = None
    """A Hugging Face folder, a NeMo checkpoint, a ``.gguf`` file, ``hf://owner/name``, or ``smollm2-135m``."""
    config: dict[str, Any] | None = None
    """The Hugging Face config.json of the parent: for a dry run without the model, and for a parent that has not been
    trained yet (then without ``source``)."""
    tokenizer: str | None = None
    """A folder with the tokenizer, for a parent that has not been trained yet."""
    pretraining_tokens: Tokens = 0
    """Tokens that the parent was pretrained on, for the ledger; 0 if unknown, or if its own ledger records them."""
    recipe: dict[str, Any] | None = Field(default=None, exclude_if=lambda given: given is None)
    """The recipe that trains the parent first (in the file a path or a name): it has one arm, from random weights. It
    gives ``config`` and ``pretraining_tokens``, and ``source`` once the parent's folder is known."""

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to prune, now or after the parent's own recipe has run."""
        return self.source is not None or self.recipe is not None

    @model_validator(mode="after")
    def _is_something(self) -> Parent:
        if self.recipe is not None:
            return self
        if self.source is None and (self.config is None or self.tokenizer is None):
            raise ValueError("give the source, or the config and the tokenizer of a model that is still to be trained")
        return self

    @property
    def name(self) -> str:
        """The parent's name in reports."""
        return self.source or (self.recipe["name"] if self.recipe else "parent")

    @property
    def normal_config(self) -> dict[str, Any] | None:
        """The recipe's ``config`` in normal form.

        Raises:
            UserError: ``normal_config`` does not accept it.
        """
        return None if self.config is None else normal_config(self.config, "parent.config of the recipe")


class Calibration(RecipeBlock):
    """The sequences that importance is measured on."""

    samples: Positive = 128
    sequence_length: Positive = 2048
    scan_samples: Positive = 16
    """Sequences for the depth scan, which runs the model once per window."""
    seed: int = 0
    windows: Literal["packed", "documents"] = Field(default="packed", exclude_if=lambda given: given == "packed")
    """Whether a sequence may hold parts of several documents (packed) or is cut from one (documents)."""

    @property
    def identity(self) -> list[int | str]:
        """What determines the sequences besides the text and their number, for records of finished stages."""
        return [self.sequence_length, self.seed, *([] if self.windows == "packed" else [self.windows])]


class RecoveryMeasures(RecipeBlock):
    """Sizes of the measures of ``recovery`` that need no data set."""

    windows: Positive = 64
    """Maximum windows of the text: the parent's and the model's predictions are compared on each, and it begins with
    a prompt that both continue."""
    prompt_tokens: Positive = 32
    """Tokens of each window that are the prompt."""
    new_tokens: Positive = 64
    """Tokens with which each prompt is continued by greedy decoding."""


class Evaluation(RecipeBlock):
    """How perplexity on the test split is measured, and which tasks are evaluated."""

    samples: Positive = 64
    sequence_length: Positive = 2048
    tasks: Annotated[list[str], BeforeValidator(_names)] = Field(default=[])
    """As for ``pvs evaluate --tasks``; ``continuation`` is made from the test split, and so are the windows of
    ``recovery``."""
    at: list[Fraction] | None = Field(default=None, exclude_if=lambda given: given is None)
    """Shares of the training of a pruned arm after which the tasks are evaluated, besides its end: 0 is the model that
    training starts from. By default [0] if the tasks include ``recovery``, otherwise none. Checkpoints are kept for
    it."""
    recovery: RecoveryMeasures = Field(
        default=RecoveryMeasures(), exclude_if=lambda given: given == RecoveryMeasures()
    )
    """Sizes of the measures of the task ``recovery``."""
    task_data: str = TASK_DATA
    """Folder of downloaded data sets, each under ``<owner>/<name>``."""
    task_limit: Positive | None = None
    """Maximum documents per task; the first ones are taken."""
    texts: dict[str, str] = Field(default={}, exclude_if=lambda given: not given)
    """Token files (paths without suffix) by name, such as one per source; the loss on each is measured too."""

    @property
    def before_the_end(self) -> list[float]:
        """The shares of the training of a pruned arm, below 1, after which the tasks are evaluated."""
        given = self.at if self.at is not None else [0.0] * (RECOVERY in self.tasks)
        return sorted({share for share in given if share < 1})

    @model_validator(mode="after")
    def _there_is_something_to_ask(self) -> Evaluation:
        if self.at is not None and not self.tasks:
            raise ValueError("at says when the tasks are evaluated, and there are none; name them under tasks")
        if self.recovery != RecoveryMeasures() and RECOVERY not in self.tasks:
            raise ValueError(f"recovery sets sizes of the task {RECOVERY}; add it to tasks, or leave them out")
        if RECOVERY in self.tasks and self.recovery.prompt_tokens > self.sequence_length:
            raise ValueError(f"recovery.prompt_tokens does not fit windows of {self.sequence_length} tokens")
        return self


class Budgets(RecipeBlock):
    """Token budgets by initial weights; each is a separate run."""

    pruned: list[Budget] = Field(default=[])
    random: list[TokenBudget] = Field(default=[])
    """A setting stands for one run per budget in ``pruned``, with the budget that makes it equal to that run."""

    @model_validator(mode="after")
    def _settings_have_a_pruned_arm(self) -> Budgets:
        setting = next((budget for budget in self.random if isinstance(budget, str)), None)
        if setting and not self.pruned:
            raise ValueError(f"{setting} is relative to pruned arms; give their budgets under pruned")
        return self
