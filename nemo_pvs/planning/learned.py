"""Targets whose parent is trained first to decide what to keep of it.

Sheared LLaMA (2310.06694) learns masks in this training, EfficientLLM (2502.06663) removes units. The pipeline, the
dry run, the ledger and launchers use both through the same interface.
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
from nemo_pvs.recipe.options import rounds_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training
from nemo_pvs.system.files import sha256_json


class LearnedTarget(Protocol):
    """A target of a recipe whose parent is trained first."""

    @property
    def training(self) -> Training:
        """Settings of the parent's training."""

    @property
    def layout(self) -> Parallelism:
        """Parallel layout of that training."""

    @property
    def first_token(self) -> int:
        """First token of that training, in training order, at a whole step."""

    @property
    def note(self) -> str:
        """The ledger's note for it."""

    @property
    def needs_dense_parent(self) -> bool:
        """Whether the parent must not have masks of single weights."""

    def check(self, shape: Shape, parent: Shape) -> None:
        """Refuse what cannot be done, before any work.

        Args:
            shape: The expected shape of the target.
            parent: The parent's shape.

        Raises:
            UserError: saying what is wrong.
        """

    def describe(self, parent: Shape) -> str:
        """Return one line that describes the training."""


_METHODS: dict[str, Callable[[Recipe, Target], LearnedTarget]] = {
    sheared_llama.NAME: ShearedTarget,
    efficient_llm.NAME: EfficientTarget,
}


def learned_target(recipe: Recipe, target: Target) -> LearnedTarget | None:
    """Return a target's training of the parent; None if the method needs no such training."""
    method = _METHODS.get(target.method)
    return method(recipe, target) if method else None


def is_trained_first(target: Target) -> bool:
    """Return whether a target's method trains the parent first."""
    return target.method in _METHODS


def learned_targets(recipe: Recipe) -> list[LearnedTarget]:
    """Return all targets of a recipe whose parent is trained first."""
    targets = (learned_target(recipe, target) for target in recipe.targets.values())
    return [learned for learned in targets if learned is not None]


def untrained_first(targets: Mapping[str, Target]) -> list[tuple[str, Target]]:
    """Return targets in the order in which they are pruned: those that need no training come first.

    Errors in pruning those are then reported before anything is trained.
    """
    return sorted(targets.items(), key=lambda item: is_trained_first(item[1]) or rounds_of(item[1]) > 1)


def first_of_each_training(recipe: Recipe) -> list[tuple[str, LearnedTarget]]:
    """Return the targets whose parent is trained first, with their names; only the first of those that share it."""
    later = {"layout": True, "micro_batch_size": True, "checkpoints": True}
    kinds = {"method": True, "preset": True, **dict.fromkeys(SIZES, True), "learn": True, "pruning_aware": True}
    first: dict[str, tuple[str, LearnedTarget]] = {}
    for name, target in recipe.targets.items():
        if learned := learned_target(recipe, target):
            settings = target.model_dump(mode="json", include=kinds, exclude={"learn": later, "pruning_aware": later})
            first.setdefault(sha256_json(settings), (name, learned))
    return list(first.values())


def charge_learning(ledger: Ledger, learned: LearnedTarget, parent: Shape, read: TokensRead | None = None) -> None:
    """Charge a pruned arm with the training of the whole parent.

    These are the FLOPs of the whole parent, which is what is computed. The work that chooses units and compensates for
    removed ones is not counted, as with SparseGPT's Hessians; ``tests/benchmarks/README.md`` gives its cost per step.

    Args:
        ledger: Gets the charge.
        learned: The target.
        parent: The parent's shape.
        read: The tokens that the training reads, if known.
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
    """Return the tokens that the training reads; ``file`` is the hash of the token file."""
    return tokens_read(file, learned.training, learned.first_token)


def end_of_reading(recipe: Recipe) -> int:
    """Return the number of tokens, in training order, up to the last that any run reads; budgets must be numbers."""
    ends = [arm.first_token + arm.tokens for arm in recipe.runs]
    for learned in learned_targets(recipe):
        ends.append(learned.first_token + learned.training.steps * learned.training.tokens_per_step)
    return max(ends)
