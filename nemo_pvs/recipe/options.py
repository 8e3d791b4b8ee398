"""What the targets of a recipe ask of their methods."""

from __future__ import annotations

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.methods.minitron_depth import MinitronDepthOptions
from nemo_pvs.pruning.options import SIZES
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.recipe.target import DENSE, Target

EFFICIENT = "efficient-llm"
ADAPT = "adapt-pruner"


def check_options(target: Target) -> None:
    """Refuse a target whose method has no such option, or that doesn't say how much to remove.

    Raises:
        UserError: naming the option.
    """
    if target.method == DENSE:
        if target.given:
            raise UserError(f"dense has no {next(iter(target.given))}; its options are none.")
    else:
        options = method_named(target.method).options
        asked = options.parse(target.method, target.given)
        _check_amount(options.amounts, target)
        if isinstance(asked, MinitronDepthOptions):
            _check_task(asked, target)
    if target.learn is not None and target.method != "sheared-llama":
        raise UserError(f"{target.method} learns no masks; leave learn out.")
    if target.pruning_aware is not None and target.method != EFFICIENT:
        raise UserError(f"{target.method} removes nothing while it trains; leave pruning_aware out.")
    if is_sparse(target):
        from nemo_pvs.pruning.sparse.sparsity import Sparsity  # takes seconds, for PyTorch

        Sparsity.parse(target.given["sparsity"])
    if target.method == DENSE and target.keep_parent_embeddings:
        raise UserError("a dense target is not made of the parent's weights; leave keep_parent_embeddings out.")
    if target.task_data and not task_of(target):
        raise UserError("task_data and task_limit are about a task; name one under task, or leave them out.")


def _check_amount(amounts: tuple[str, ...], target: Target) -> None:
    asked = [name for name in amounts if name in target.given or (name == "sizes" and target.sizes)]
    if amounts and len(asked) != 1:
        known = ", ".join(", ".join(SIZES) if name == "sizes" else name for name in amounts)
        raise UserError(
            f"{'two things say' if asked else 'nothing says'} how much to remove; "
            f"give {'only one' if asked else 'at least one'} of {known}."
        )


def _check_task(asked: MinitronDepthOptions, target: Target) -> None:
    if asked.task is not None and asked.search != "contiguous":
        raise UserError("a task compares contiguous runs of layers; leave search out.")
    if asked.task is None and (target.task_data or asked.task_limit):
        raise UserError("task_data and task_limit are about a task; name one under task, or leave them out.")


def task_of(target: Target) -> str | None:
    """Return the tasks by which a target's layers are chosen, as ``pvs evaluate --tasks`` takes them; None if none."""
    asked = target.asked
    return asked.task if isinstance(asked, MinitronDepthOptions) else None


def task_limit_of(target: Target) -> int | None:
    """Return the maximum of documents per task of such a target."""
    asked = target.asked
    return asked.task_limit if isinstance(asked, MinitronDepthOptions) else None


def needs_scores(target: Target) -> bool:
    """Return whether a target is pruned by the scores of a calibration."""
    return target.method != DENSE and method_named(target.method).scored and stages_of(target) == 1


def needs_gradients(target: Target) -> bool:
    """Return whether that calibration must go back through the model, too."""
    return target.method != DENSE and method_named(target.method).gradients


def scans(target: Target) -> bool:
    """Return whether a target is found by the loss of every candidate on the calibration text."""
    return target.method != DENSE and method_named(target.method).scans and task_of(target) is None


def reads_calibration(target: Target) -> bool:
    """Return whether a target is pruned by what the calibration split says of the parent."""
    return target.method != DENSE and (method_named(target.method).reads_text or needs_scores(target))


def is_sparse(target: Target) -> bool:
    """Return whether a target keeps the parent's shape and has masks."""
    return "sparsity" in target.given


def stages_of(target: Target) -> int:
    """Return how many stages a target is reached in."""
    return target.stages or 1
