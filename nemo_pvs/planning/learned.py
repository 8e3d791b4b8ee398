"""The masks stage of ``pvs run``: targets whose parent is trained first, which turns out what to keep of it.

Sheared LLaMA learns masks then (``run_masks``), EfficientLLM removes units (``run_efficient``); here is what the
pipeline, the dry run, the ledger and launchers ask of either.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning import efficient, sheared
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.pruning.options import SIZES
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.options import stages_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.system.files import sha256_json


def is_trained_first(target: Target) -> bool:
    """Return whether a target has this stage."""
    return sheared.learns_masks(target) or efficient.prunes_while_training(target)


def untrained_first(targets: Mapping[str, Target]) -> list[tuple[str, Target]]:
    """Return targets in the order in which they are pruned: those that no training leads to come first.

    So whatever their pruning refuses is refused before anything is trained.
    """
    return sorted(targets.items(), key=lambda item: is_trained_first(item[1]) or stages_of(item[1]) > 1)


def first_of_each_stage(recipe: Recipe) -> list[str]:
    """Return the targets whose stage is to be done: of those that have the same, the first."""
    later = {"layout": True, "micro_batch_size": True, "checkpoints": True}
    kinds = {"method": True, "preset": True, **dict.fromkeys(SIZES, True), "learn": True, "pruning_aware": True}
    first: dict[str, str] = {}
    for name, target in recipe.targets.items():
        if is_trained_first(target):
            what = target.model_dump(mode="json", include=kinds, exclude={"learn": later, "pruning_aware": later})
            first.setdefault(sha256_json(what), name)
    return list(first.values())


def stage_layout(target: Target) -> Parallelism:
    """Return how the stage is spread over processes."""
    if efficient.prunes_while_training(target):
        return efficient.aware_layout(target)
    return sheared.mask_layout(target)


def check_stage(recipe: Recipe, target: Target, shape: Shape, parent: Shape) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UserError: naming it.
    """
    if efficient.prunes_while_training(target):
        efficient.check_pruning_aware(recipe, target, parent)
    else:
        sheared.check_masks(recipe, target, shape, parent)


def charge_stage(
    ledger: Ledger, recipe: Recipe, target: Target, parent: Shape, read: TokensRead | None = None
) -> None:
    """Charge a pruned arm with the stage; ``read`` is what it was trained on, if that is known."""
    if efficient.prunes_while_training(target):
        efficient.charge_pruning_aware(ledger, recipe, target, parent, read)
    else:
        sheared.charge_masks(ledger, recipe, target, parent, read)


def stage_reads(recipe: Recipe, target: Target, file: str) -> TokensRead:
    """Return which tokens the stage reads of the token file with the hash ``file``."""
    if efficient.prunes_while_training(target):
        return tokens_read(file, efficient.aware_training(recipe, target), efficient.first_token(recipe, target))
    return tokens_read(file, sheared.mask_training(recipe, target), sheared.first_token(recipe, target))


def describe_stage(recipe: Recipe, target: Target, parent: Shape) -> str:
    """Return one line about the stage."""
    if efficient.prunes_while_training(target):
        return efficient.describe_pruning_aware(recipe, target, parent)
    return sheared.describe_masks(recipe, target, parent)


def end_of_reading(recipe: Recipe) -> int:
    """Return the end of what any run of a recipe reads, in the order of training; its budgets are numbers by now."""
    aware = [
        efficient.end_of_aware(recipe, target)
        for target in recipe.targets.values()
        if efficient.prunes_while_training(target)
    ]
    return max([*aware, sheared.end_of_reading(recipe)])
