"""The method options of a recipe's targets: validation, and what they imply for calibration and rounds of pruning."""

from __future__ import annotations

from nemo_pvs.errors import UserError
from nemo_pvs.pruning.methods import efficient_llm, sheared_llama
from nemo_pvs.pruning.methods.minitron_depth import MinitronDepthOptions
from nemo_pvs.pruning.options import SIZES, VOCAB
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.recipe.target import DENSE, Target


def check_options(target: Target) -> None:
    """Refuse a target with an option that its method does not have, or without a size to prune to.

    Raises:
        UserError: naming the option.
    """
    if target.method == DENSE:
        if target.given:
            raise UserError(f"dense has no {next(iter(target.given))}, as it takes no options; leave it out.")
    else:
        options = method_named(target.method).options
        parsed = options.parse(target.method, target.given)
        _check_amount(options.amounts, target)
        if isinstance(parsed, MinitronDepthOptions):
            _check_task(parsed, target)
    if target.learn is not None and target.method != sheared_llama.NAME:
        raise UserError(f"{target.method} learns no masks; leave learn out.")
    if target.pruning_aware is not None and target.method != efficient_llm.NAME:
        raise UserError(f"{target.method} removes nothing while it trains; leave pruning_aware out.")
    if is_sparse(target):
        from nemo_pvs.pruning.sparse.sparsity import Sparsity  # takes seconds, for PyTorch

        Sparsity.parse(target.given["sparsity"])
    if target.method == DENSE and target.keep_parent_embeddings:
        raise UserError("a dense target is not made from the parent's weights; leave keep_parent_embeddings out.")
    if target.task_data and not task_of(target):
        raise UserError("task_data and task_limit only apply to a task; name one under task, or leave them out.")


def _check_amount(amounts: tuple[str, ...], target: Target) -> None:
    given = [name for name in amounts if name in target.given or (name == "sizes" and target.sizes)]
    if amounts and len(given) != 1:
        known = ", ".join(", ".join(SIZES) if name == "sizes" else name for name in amounts)
        raise UserError(
            f"{'more than one option says' if given else 'nothing says'} how much to remove; "
            f"give {'only one' if given else 'at least one'} of {known}."
        )


def _check_task(options: MinitronDepthOptions, target: Target) -> None:
    if options.task is not None and options.search != "contiguous":
        raise UserError("a task compares contiguous runs of layers; leave search out.")
    if options.task is None and (target.task_data or options.task_limit):
        raise UserError("task_data and task_limit only apply to a task; name one under task, or leave them out.")


def task_of(target: Target) -> str | None:
    """Return the tasks by which a target's layers are chosen, in the syntax of ``pvs evaluate --tasks``, or None."""
    options = target.asked
    return options.task if isinstance(options, MinitronDepthOptions) else None


def task_limit_of(target: Target) -> int | None:
    """Return the maximum documents per task of a target whose layers are chosen by a task; None if unlimited."""
    options = target.asked
    return options.task_limit if isinstance(options, MinitronDepthOptions) else None


def needs_scores(target: Target) -> bool:
    """Return whether a target is pruned by calibration scores that targets share."""
    return target.method != DENSE and method_named(target.method).scored and rounds_of(target) == 1


def needs_gradients(target: Target) -> bool:
    """Return whether a target's calibration scores need a backward pass."""
    return target.method != DENSE and method_named(target.method).gradients


def scans(target: Target) -> bool:
    """Return whether a target's layers are chosen by the loss of every candidate on the calibration text."""
    return target.method != DENSE and method_named(target.method).scans and task_of(target) is None


def reads_calibration(target: Target) -> bool:
    """Return whether pruning to a target reads the calibration split."""
    return target.method != DENSE and (method_named(target.method).reads_text or needs_scores(target))


def is_sparse(target: Target) -> bool:
    """Return whether a target keeps the parent's shape and has masks."""
    return "sparsity" in target.given


def vocabulary_of(target: Target) -> int | None:
    """Return the number of tokens that a target keeps; None if it keeps the parent's vocabulary."""
    size = target.given.get(VOCAB)
    return None if size is None else int(size)


def rounds_of(target: Target) -> int:
    """Return the number of rounds in which a target is pruned: its key ``stages``."""
    return target.stages or 1
