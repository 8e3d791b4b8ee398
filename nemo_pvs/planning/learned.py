"""Targets whose parent is trained first, which turns out what to keep of it: what a recipe says about that training.

Sheared LLaMA learns masks in it, EfficientLLM removes units. The pipeline, the dry run, the ledger and launchers ask
either the same questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.ledger.tokens_read import TokensRead
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.charges import tokens_read
from nemo_pvs.planning.efficient import EfficientTarget
from nemo_pvs.planning.sheared import ShearedTarget
from nemo_pvs.pruning.methods import efficient_llm, sheared_llama
from nemo_pvs.pruning.options import SIZES
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.options import stages_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import sha256_json


class LearnedTarget(Protocol):
    """A target of a recipe whose parent is trained first."""

    @property
    def training(self) -> Training:
        """The training of the parent."""

    @property
    def layout(self) -> Parallelism:
        """How that training is spread over processes."""

    @property
    def first_token(self) -> int:
        """Where in the training data it begins, in whole steps."""

    @property
    def note(self) -> str:
        """What the ledger says about it."""

    @property
    def needs_dense_parent(self) -> bool:
        """Whether the parent must not have masks of single weights."""

    def check(self, shape: Shape, parent: Shape) -> None:
        """Refuse what cannot be done, before any work.

        Args:
            shape: What the target is pruned to, as far as it is known.
            parent: The parent.

        Raises:
            UserError: naming it.
        """

    def describe(self, parent: Shape) -> str:
        """Return one line about the training."""


_METHODS: dict[str, Callable[[Recipe, Target], LearnedTarget]] = {
    sheared_llama.NAME: ShearedTarget,
    efficient_llm.NAME: EfficientTarget,
}


def learned_target(recipe: Recipe, target: Target) -> LearnedTarget | None:
    """Return what a recipe says about the training of a target's parent; None if the method needs no such training."""
    method = _METHODS.get(target.method)
    return method(recipe, target) if method else None


def is_trained_first(target: Target) -> bool:
    """Return whether the parent is trained first for a target."""
    return target.method in _METHODS


def learned_targets(recipe: Recipe) -> list[LearnedTarget]:
    """Return all targets of a recipe whose parent is trained first."""
    found = (learned_target(recipe, target) for target in recipe.targets.values())
    return [learned for learned in found if learned is not None]


def untrained_first(targets: Mapping[str, Target]) -> list[tuple[str, Target]]:
    """Return targets in the order in which they are pruned: those that no training leads to come first.

    So whatever their pruning refuses is refused before anything is trained.
    """
    return sorted(targets.items(), key=lambda item: is_trained_first(item[1]) or stages_of(item[1]) > 1)


def first_of_each_training(recipe: Recipe) -> list[tuple[str, LearnedTarget]]:
    """Return the targets whose parent is trained first, by name; of those with the same training only the first."""
    later = {"layout": True, "micro_batch_size": True, "checkpoints": True}
    kinds = {"method": True, "preset": True, **dict.fromkeys(SIZES, True), "learn": True, "pruning_aware": True}
    first: dict[str, tuple[str, LearnedTarget]] = {}
    for name, target in recipe.targets.items():
        if learned := learned_target(recipe, target):
            what = target.model_dump(mode="json", include=kinds, exclude={"learn": later, "pruning_aware": later})
            first.setdefault(sha256_json(what), (name, learned))
    return list(first.values())


def charge_learning(ledger: Ledger, learned: LearnedTarget, parent: Shape, read: TokensRead | None = None) -> None:
    """Charge a pruned arm with the training of the whole parent on ``read``, if that is known.

    These are the FLOPs of the whole parent, which is what is computed. What only chooses units and compensates for
    them is left out, as SparseGPT's Hessians are; the step costs in ``tests/benchmarks/README.md`` have it.
    """
    training = learned.training
    ledger.charge(
        "mask learning",
        training.steps * training.tokens_per_step,
        parent,
        training.sequence_length,
        training=True,
        note=learned.note,
        tokens_per_step=training.tokens_per_step,
        read=read,
    )


def learning_reads(learned: LearnedTarget, file: str) -> TokensRead:
    """Return which tokens the training reads of the token file with the hash ``file``."""
    return tokens_read(file, learned.training, learned.first_token)


def end_of_reading(recipe: Recipe) -> int:
    """Return the end of what any run of a recipe reads, in the order of training; its budgets are numbers by now."""
    ends = [arm.first_token + arm.tokens for arm in recipe.runs]
    for learned in learned_targets(recipe):
        ends.append(learned.first_token + learned.training.steps * learned.training.tokens_per_step)
    return max(ends)
