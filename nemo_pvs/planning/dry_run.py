"""``pvs run --dry-run``: everything that a recipe would do, computed from its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_pvs.checkpoints.open import open_source
from nemo_pvs.data.token_files import check_end, token_file_hash
from nemo_pvs.data.tokenize import count_tokens
from nemo_pvs.errors import UserError
from nemo_pvs.ledger.ledger import Charge, Ledger
from nemo_pvs.model.layout import Layout as WeightLayout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.cached_teacher import cached_ranges
from nemo_pvs.planning.checks import check_domains_end
from nemo_pvs.planning.equal_terms import arm_cost, pruning_cost, settle
from nemo_pvs.planning.learned import (
    LearnedTarget,
    charge_learning,
    end_of_reading,
    first_of_each_training,
    is_trained_first,
    untrained_first,
)
from nemo_pvs.planning.memory import Memory, training_memory
from nemo_pvs.planning.parent_checks import check_unread
from nemo_pvs.planning.rounds import round_targets
from nemo_pvs.planning.saves import Save, last_save, save_during_run
from nemo_pvs.planning.targets import check_recipe, expected_shape
from nemo_pvs.planning.teacher import check_recipe_teacher, teacher_shape
from nemo_pvs.pruning.method import Expected
from nemo_pvs.recipe.fields import Parallelism
from nemo_pvs.recipe.options import needs_scores, rounds_of, vocabulary_of
from nemo_pvs.recipe.recipe import _TRAIN, Arm, Recipe, _blocks, _key
from nemo_pvs.recipe.target import DENSE, Target
from nemo_pvs.recipe.training import Training

if TYPE_CHECKING:
    from nemo_pvs.recipe.recipe import Recipe


@dataclass(frozen=True)
class Placement:
    """A model and the layout in which it is trained."""

    shape: Shape
    layout: Parallelism
    training: Training
    teacher: Shape | None = None
    """A teacher on the same GPUs."""

    @property
    def memory(self) -> Memory:
        """Memory of the fullest GPU."""
        return training_memory(self.shape, self.layout, self.training, self.teacher)

    def saves(self, gpus_per_node: int) -> tuple[Save, Save]:
        """Return a save in the middle of a run, and the one at its end or on a signal."""
        given = self.shape, self.layout, self.training, gpus_per_node
        return save_during_run(*given), last_save(*given)


@dataclass(frozen=True)
class PlannedTarget:
    """One target before any work."""

    name: str
    target: Target
    expected: Expected
    largest: Placement
    """The largest model that is trained on the way to it: with rounds of pruning, what the first one leaves."""
    spent: Ledger
    """Cost of pruning to it; a calibration that several targets share is included in each."""


@dataclass(frozen=True)
class PlannedLearning:
    """The training of the whole parent that decides what is kept of it, before any work."""

    name: str
    """The target's name; several targets may share the training of the first of them."""
    learned: LearnedTarget
    placement: Placement
    charge: Charge


@dataclass(frozen=True)
class PlannedArm:
    """One training run before any work."""

    arm: Arm
    ledger: Ledger


@dataclass(frozen=True)
class DryRun:
    """What a recipe would do."""

    recipe: Recipe
    parent: Shape
    targets: tuple[PlannedTarget, ...]
    learnings: tuple[PlannedLearning, ...]
    arms: tuple[PlannedArm, ...]
    stages: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What a user should know about the models, in sentences."""


def dry_run(recipe: Recipe) -> DryRun:
    """Plan everything that ``pvs run`` would do, without reading a weight or a token.

    Raises:
        UserError: something in the recipe is impossible, or the parent's sizes are not known here.
    """
    config = parent_config(recipe)
    weights = WeightLayout.for_config(config)
    parent = weights.shape(config)
    check_recipe(recipe, parent, config)
    check_recipe_teacher(recipe, parent)
    recipe = settle(recipe, parent)
    teacher = teacher_shape(recipe, parent)
    _check_data(recipe)
    if (file := _training_file(recipe)) is not None:
        check_unread(recipe, file)
    targets = tuple(_target(recipe, name, target, parent, teacher) for name, target in recipe.targets.items())
    shapes = {planned.name: planned.expected.shape for planned in targets}
    arms = tuple(PlannedArm(arm, arm_cost(recipe, arm, shapes[arm.target], parent)) for arm in recipe.runs)
    notes = []
    for planned in targets:
        note = weights.loading_note(planned.expected.shape) if planned.expected.exact else None
        if note:
            notes.append(f"{planned.name}: {note}")
    learnings = tuple(_learning(name, learned, parent) for name, learned in first_of_each_training(recipe))
    return DryRun(recipe, parent, targets, learnings, arms, tuple(_stages(recipe)), tuple(notes))


def settled(recipe: Recipe) -> Recipe:
    """Return a recipe with a number for each budget such as ``equal-total-tokens``.

    Raises:
        UserError: it has such a budget, and the parent's sizes are not known here.
    """
    return (
        dry_run(recipe).recipe if any(True for name in recipe.targets for _ in recipe.matched_runs(name)) else recipe
    )


def parent_config(recipe: Recipe) -> Mapping[str, Any]:
    """Return the parent's config.json: the checkpoint's if it is a folder here, else ``parent.config`` of the recipe.

    Raises:
        UserError: there is neither.
    """
    source, stated = recipe.parent.source, recipe.parent.normal_config
    if source is not None and Path(source).is_dir():
        return open_source(source).config
    if stated is None:
        raise UserError(
            f"The parent {source} is not a folder here, and the recipe has no parent.config with its sizes; add its "
            "config.json there, or name a folder as parent.source."
        )
    return stated


def _check_data(recipe: Recipe) -> None:
    """Refuse ranges past the end of token files that are here; missing files are checked once they exist."""
    token_files = recipe.data.token_files
    if token_files is None:
        return
    if recipe.data.domains:
        _, names = token_files.blend
        if all(Path(f"{name}.idx").is_file() for name in names):
            available = (count_tokens(Path(name)) for name in names)
            check_domains_end(recipe, dict(zip(recipe.data.domains, available, strict=True)), end_of_reading(recipe))
        return
    weights, names = token_files.blend
    if all(Path(f"{name}.idx").is_file() for name in names):
        check_end(
            end_of_reading(recipe),
            recipe.train.sequence_length,
            [count_tokens(Path(name)) for name in names],
            weights,
            names,
        )


def _training_file(recipe: Recipe) -> str | None:
    """Return the hash of the training token file; None if it is not here or not a single file."""
    token_files = recipe.data.token_files
    names = token_files.blend[1] if token_files and not recipe.data.domains else []
    return token_file_hash(Path(names[0])) if len(names) == 1 and Path(f"{names[0]}.bin").is_file() else None


def _target(recipe: Recipe, name: str, target: Target, parent: Shape, teacher: Shape | None) -> PlannedTarget:
    expected = expected_shape(target, parent)
    arms = recipe.arms_of(name)
    distilled = any(recipe.distills(name, initialisation) for initialisation in arms)
    training = recipe.train if distilled else recipe.train.model_copy(update={"distill": None})
    online = distilled and recipe.train.distill and not recipe.train.distill.cache
    largest = expected.shape
    if rounds_of(target) > 1 and "pruned" in arms:
        _, largest = round_targets(target, parent)[0]
    placement = Placement(largest, target.layout, training, teacher if online else None)
    return PlannedTarget(name, target, expected, placement, pruning_cost(recipe, target, expected.shape, parent))


def _learning(name: str, learned: LearnedTarget, parent: Shape) -> PlannedLearning:
    ledger = Ledger()
    charge_learning(ledger, learned, parent)
    (charge,) = ledger.charges
    return PlannedLearning(name, learned, Placement(parent, learned.layout, learned.training), charge)


def _stages(recipe: Recipe) -> list[str]:
    """Return the stages in the order in which ``pipeline.Pipeline`` runs them."""
    stages = ["parent", "data"]
    if any(needs_scores(target) for target in recipe.targets.values()):
        stages.append("calibrate")
    for name, target in untrained_first(recipe.targets):
        if is_trained_first(target):
            stages.append(f"masks/{name}")
        if target.method != DENSE or "pruned" in recipe.arms_of(name):
            between = f" ({rounds_of(target)} times, training between)" if rounds_of(target) > 1 else ""
            stages.append(f"prune/{name}{between}")
        if vocabulary_of(target) is not None:
            stages.append(f"data/{name}")
            if any(recipe.distills(name, initialisation) for initialisation in recipe.arms_of(name)):
                stages.append(f"teacher/{name}")
        if "random" in recipe.arms_of(name):
            stages.append(f"random/{name}")
    stages += [f"teach/{number}" for number, _ in enumerate(cached_ranges(recipe), 1)]
    stages += [f"train/{arm.name}" for arm in recipe.runs]
    stages += ["evaluate"] + ["evaluate/tasks"] * bool(recipe.evaluate.tasks)
    return [*stages, "report"]


def describe_domains(recipe: Recipe, parameters: Mapping[str, int]) -> list[str]:
    """Describe the initial shares of the domains in each training, and the target losses of each target.

    Args:
        recipe: The recipe.
        parameters: Number of parameters of each target, by name.

    Returns:
        Lines for the dry run.
    """
    domains = recipe.data.domains
    lines = []
    for where, loading in _blocks(recipe):
        begin = (
            ", ".join(f"{name} {share:.4g}" for name, share in loading.shares.items())
            or "those at the end of mask learning"
        )
        follows = "follow their losses from the first validation on" if loading.kind == "doremi" else "stay the same"
        lines.append(f"{where}: domain shares are {begin} at the start and {follows}")
        for name, size in parameters.items():
            if not loading.fitted or where not in (_TRAIN, _key(name)):
                continue
            targets = zip(domains, loading.targets(domains, size) or [], strict=True)
            lines.append(f"target losses of {name}: {', '.join(f'{domain} {loss:.4f}' for domain, loss in targets)}")
    return lines
