"""Recipe: a YAML file that says what to prune, how to train it and what to compare it with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.target import SIZES, parse_target
from nemo_pvs.shape import Shape

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError("must be a whole number")
    return int(value)


Tokens = Annotated[float, Field(ge=0), AfterValidator(_whole)]
"""A number of tokens; 200e9 is as good as 200000000000."""


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Parent(_Block):
    """The model to prune."""

    source: str
    """A Hugging Face folder, a NeMo checkpoint, a hub id, or the built-in name ``smollm2-135m``."""
    pretraining_tokens: Tokens = 0
    """Tokens that the parent was pretrained on, for the ledger; 0 when nobody knows."""


class Split(_Block):
    """Shares of the corpus; documents never cross from one to another."""

    train: Fraction = 0.85
    validation: Fraction = 0.05
    calibration: Fraction = 0.05
    test: Fraction = 0.05

    @model_validator(mode="after")
    def _sum_to_one(self) -> Split:
        if abs(sum(self.model_dump().values()) - 1) > 1e-9:
            raise ValueError("the shares of train, validation, calibration and test must add up to 1")
        return self


class Data(_Block):
    """The text that everything is trained, calibrated and measured on."""

    source: str | list[str]
    """Files or folders (.txt, .jsonl[.gz|.zst], .parquet), or the built-in name ``wikipedia-sample``."""
    split: Split = Split()
    seed: int = 0


class Calibration(_Block):
    """The sequences that importance is measured on."""

    samples: Positive = 128
    sequence_length: Positive = 2048
    scan_samples: Positive = 16
    """Sequences for the depth scan, which runs the model once for every window."""
    seed: int = 0


class Layout(_Block):
    """How one training run is spread over processes."""

    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1
    data_parallel: Positive = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = True

    @property
    def processes(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class Target(_Block):
    """One pruned architecture: the method and the sizes that change."""

    method: Literal["minitron-width", "minitron-depth"]
    layers: Positive | None = None
    hidden: Positive | None = None
    ffn: Positive | None = None
    kv_groups: Positive | None = None
    layout: Layout = Layout()

    @model_validator(mode="after")
    def _changes_something(self) -> Target:
        if all(getattr(self, name) is None for name in SIZES):
            raise ValueError(f"give at least one of {', '.join(SIZES)}")
        return self

    def shape(self, parent: Shape) -> Shape:
        """Return the target's shape.

        Raises:
            UserError: the parent cannot be pruned to it.
        """
        sizes = ((name, getattr(self, name)) for name in SIZES)
        return parse_target(",".join(f"{name}={size}" for name, size in sizes if size is not None), parent)


class Training(_Block):
    """One training recipe for every arm; only the initial weights and the target's layout differ."""

    tokens: Tokens
    """Training tokens, rounded up to whole steps."""
    sequence_length: Positive
    global_batch_size: Positive
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Positive = 1
    learning_rate: float = Field(gt=0)
    min_learning_rate_ratio: Fraction = 0.1
    warmup_fraction: Fraction = 0.05
    weight_decay: float = Field(default=0.1, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    clip_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp32."""
    validations: Positive = 10
    """How often the validation loss is measured during the run, at equal distances and at the end."""
    validation_samples: Positive = 64
    """Validation sequences, always the same ones."""
    checkpoints: Positive = 2
    """How often the run is saved, at equal distances and at the end."""
    seed: Positive = 1234
    """Order of the training data and the draws of a random initialisation."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps: ``tokens`` rounded up."""
        return max(1, -(-int(self.tokens) // self.tokens_per_step))

    @model_validator(mode="after")
    def _batches_fit(self) -> Training:
        if self.validation_samples % self.global_batch_size:
            raise ValueError("validation_samples must be a multiple of global_batch_size")
        return self


class Evaluation(_Block):
    """How perplexity on the test split is measured."""

    samples: Positive = 64
    sequence_length: Positive = 2048


class Recipe(_Block):
    """Everything that ``pvs run`` needs to know."""

    name: str
    title: str
    parent: Parent
    data: Data
    calibrate: Calibration = Calibration()
    targets: dict[str, Target] = Field(min_length=1)
    arms: list[Literal["pruned", "random"]] = ["pruned", "random"]
    """Initial weights to train every target from."""
    train: Training
    evaluate: Evaluation = Evaluation()

    def check(self, parent: Shape, context_length: int) -> None:
        """Refuse what this parent cannot be pruned or trained to, before any work.

        Raises:
            UserError: a target, a layout or a sequence length is impossible.
        """
        for name in ("calibrate", "train", "evaluate"):
            length = getattr(self, name).sequence_length
            if length > context_length:
                raise UserError(
                    f"{name}.sequence_length is {length}, but the parent's context ends at {context_length} tokens; "
                    "choose a shorter one."
                )
        for name, target in self.targets.items():
            layout = target.layout
            try:
                target.shape(parent).check_parallel(
                    tensor_parallel=layout.tensor_parallel, pipeline_parallel=layout.pipeline_parallel
                )
            except UserError as error:
                raise UserError(f"Target {name}: {error}") from None
            batch = self.train.micro_batch_size * layout.data_parallel
            if self.train.global_batch_size % batch:
                raise UserError(
                    f"Target {name}: global_batch_size {self.train.global_batch_size} is not a multiple of "
                    f"micro_batch_size x data_parallel = {batch}; change one of the three."
                )


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by path (``my/recipe.yaml``) or by the name of a packaged one (``smollm2_135m/demo``).

    Raises:
        UserError: there is no such recipe, or it says something that a recipe cannot say.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = Path(str(resources.files("nemo_pvs.recipes").joinpath(f"{name_or_path}.yaml")))
    if not path.is_file():
        raise UserError(f"There is no recipe {name_or_path}; known names: {', '.join(packaged_recipes())}.")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path} is not a recipe: it should hold keys such as parent, data, targets and train.")
    return parse_recipe(values, str(path))


def parse_training(values: Mapping[str, Any]) -> Training:
    """Check training settings that were given as options.

    Raises:
        UserError: naming the first wrong one.
    """
    try:
        return Training.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def parse_layout(values: Mapping[str, Any]) -> Layout:
    """Check a parallel layout that was given as options.

    Raises:
        UserError: naming the first wrong one.
    """
    try:
        return Layout.model_validate(values)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None


def parse_recipe(values: Mapping[str, Any], where: str) -> Recipe:
    """Check the values of a recipe; ``where`` names their file in messages.

    Raises:
        UserError: naming the first wrong key, and the nearest right one when it is unknown.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_problem(error)}") from None


def packaged_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = Path(str(resources.files("nemo_pvs.recipes")))
    return sorted(str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.yaml"))


_BLOCKS: dict[tuple[str, ...], type[_Block]] = {
    (): Recipe,
    ("parent",): Parent,
    ("data",): Data,
    ("data", "split"): Split,
    ("calibrate",): Calibration,
    ("targets", "*"): Target,
    ("targets", "*", "layout"): Layout,
    ("train",): Training,
    ("evaluate",): Evaluation,
}


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    keys = tuple(str(key) for key in problem["loc"])
    key = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        block = ("targets", "*", *keys[2:-1]) if keys[0] == "targets" else keys[:-1]
        known = list(_BLOCKS[block].model_fields)
        nearest = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.4)
        return f"unknown key {key}; " + (
            f"did you mean {nearest[0]}?" if nearest else f"known keys are {', '.join(known)}."
        )
    if problem["type"] == "missing":
        return f"{key} is missing; add it."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'}: {message[0].lower()}{message[1:]}, not {problem['input']!r}."
