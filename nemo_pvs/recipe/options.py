"""What the targets of a recipe ask of their methods: checked when a recipe is read, and the shapes to expect."""

from __future__ import annotations

from dataclasses import fields

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.methods import METHODS
from nemo_pvs.pruning.request import Options
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.recipe.target import DENSE, SIZES, Target

EFFICIENT = "efficient-llm"
ADAPT = "adapt-pruner"
STAGED = ("adapt-pruner", "minitron-width", "minitron-depth")
"""Methods that can be asked for stages."""
SCORED = ("minitron-width", "minitron-joint", "shortgpt", "flap", "wanda-sp", "magnitude-sp", "llm-pruner")
"""Methods that read the scores of one calibration, shared by all of a recipe's targets."""
_SCANNING = ("minitron-depth",)
"""Methods that run the model once for every candidate, on fewer sequences."""


def check_options(target: Target) -> None:
    """Refuse a target that asks its method for something that it has not, or does not say how much to remove.

    Raises:
        UserError: naming the option.
    """
    given = target.options
    takes = METHODS[target.method].takes if target.method != DENSE else ()
    foreign = [name for name in given if name not in takes]
    if foreign:
        own = ", ".join(", ".join(SIZES) if name == "target" else name for name in takes) or "none"
        wrong = next((size for size in SIZES if getattr(target, size)), "") if foreign[0] == "target" else foreign[0]
        raise UserError(f"{target.method} has no {wrong}; its own keys are {own}.")
    amounts = [name for name in ("target", "ratio", "preset", "sparsity") if name in takes]
    asked = [name for name in amounts if name in given]
    if amounts and len(asked) != 1:
        known = ", ".join(", ".join(SIZES) if name == "target" else name for name in amounts)
        raise UserError(
            f"{'two things say' if asked else 'nothing says'} how much to remove; "
            f"give {'only one' if asked else 'at least one'} of {known}."
        )
    if target.learn is not None and target.method != "sheared-llama":
        raise UserError(f"{target.method} learns no masks; leave learn out.")
    if target.pruning_aware is not None and target.method != EFFICIENT:
        raise UserError(f"{target.method} removes nothing while it trains; leave pruning_aware out.")
    if target.sparsity is not None:
        Sparsity.parse(target.sparsity)
    if target.method == DENSE and target.keep_parent_embeddings:
        raise UserError("a dense target is not made of the parent's weights; leave keep_parent_embeddings out.")
    if target.task is not None and target.search not in (None, "contiguous"):
        raise UserError("a task compares contiguous runs of layers; leave search out.")
    if target.task is None and (target.task_data or target.task_limit):
        raise UserError("task_data and task_limit are about a task; name one under task, or leave them out.")


def options_of(target: Target) -> Options:
    """Return what a target asks of its method."""
    known = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in target.options.items() if name in known})


def needs_scores(target: Target) -> bool:
    """Return whether a target is pruned by the scores of a calibration."""
    return target.method in SCORED and stages_of(target) == 1


def needs_gradients(target: Target) -> bool:
    """Return whether that calibration must go back through the model, too."""
    return target.method != DENSE and METHODS[target.method].gradients


def scans(target: Target) -> bool:
    """Return whether a target is found by the loss of every candidate on the calibration text."""
    return target.method in _SCANNING and target.task is None


def reads_calibration(target: Target) -> bool:
    """Return whether a target is pruned by what the calibration split says of the parent."""
    by_size = ("magnitude", "magnitude-sp", DENSE, EFFICIENT, "sheared-llama")
    return target.method not in by_size or needs_scores(target)


def is_sparse(target: Target) -> bool:
    """Return whether a target keeps the parent's shape and has masks."""
    return target.sparsity is not None


def stages_of(target: Target) -> int:
    """Return how many stages a target is reached in."""
    return target.stages or 1
