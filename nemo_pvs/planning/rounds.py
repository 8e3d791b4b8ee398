"""Targets that are reached in stages: what each stage prunes to, and its share of one training. No NeMo.

Adapt-Pruner (2502.03460) prunes a few percent and trains a share of the tokens, again and again; iterative Minitron
does the same with whole layers or widths. All shares together are one training: one schedule of the learning rate,
one range of the data, each share where the one before has ended. The optimizer's moments begin anew, as published, or
are what the pruning leaves of those before (``slice_optimizer_state``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.methods.adapt_pruner import AdaptPrunerOptions
from nemo_pvs.pruning.options import SizesOrRatio
from nemo_pvs.pruning.registry import methods
from nemo_pvs.pruning.target import choose_target, parameters_left, shrunk
from nemo_pvs.recipe.options import ADAPT, stages_of, task_of
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training

_WIDTH_MULTIPLE = 8
"""Widths between the first and the last are multiples of this, where those two are."""


@dataclass(frozen=True)
class Round:
    """A stage's part of the training of an arm."""

    training: Training
    """With the tokens of this part."""
    first_token: int
    """Where in the training data it begins to read."""
    first_step: int = 0
    """Steps of the parts before it."""
    all_steps: int | None = None
    """Steps of all parts, over which the learning rate runs; None where there is one part."""


def shares(recipe: Recipe, arm: Arm) -> list[Round]:
    """Return the parts of an arm's training, which differ by one step at most; one for arms without stages.

    Raises:
        UserError: there are more stages than steps.
    """
    stages = stages_of(recipe.targets[arm.target]) if arm.initialisation == "pruned" else 1
    training = arm.training
    if stages == 1:
        return [Round(training, arm.first_token)]
    if stages > training.steps:
        raise UserError(
            f"{arm.name} has {stages} stages but trains for {training.steps} steps; choose fewer stages, or more "
            "tokens."
        )
    bounds = [training.steps * stage // stages for stage in range(stages + 1)]
    often = {name: max(1, getattr(training, name) // stages) for name in ("validations", "checkpoints")}
    return [
        Round(
            training.model_copy(update={"tokens": float((end - first) * training.tokens_per_step), **often}),
            arm.first_token + first * training.tokens_per_step,
            first,
            training.steps,
        )
        for first, end in pairwise(bounds)
    ]


def stage_targets(target: Target, parent: Shape) -> list[tuple[Target, Shape]]:
    """Return what each stage asks its method for, and about the shape that it will have, the last stage's last.

    Parameters go in equal portions: ``P_k = P_0 - (P_0 - P_N) k / N``; those of Minitron's layers and widths as
    nearly as whole layers and multiples allow.

    Raises:
        UserError: the parent cannot be pruned to the target.
    """
    numbers = range(1, stages_of(target) + 1)
    if target.method == ADAPT:
        counts = [adapt_parameters(target, parent, number) for number in numbers]
        return [(target, shrunk(parent, count)) for count in counts]
    last = final_shape(target, parent)
    found = []
    for number in numbers:
        sizes = {name: _between(target, parent, last, name, number) for name in _axes(target)}
        changes: dict[str, Any] = {"ratio": None, "preset": None, "of": None, "stages": None, **sizes}
        found.append((target.model_copy(update=changes), parent.replace(**sizes)))
    return found


def final_shape(target: Target, parent: Shape) -> Shape:
    """Return the shape that a target of Minitron's ends with.

    Raises:
        UserError: the parent cannot be pruned to it.
    """
    asked = target.asked
    assert isinstance(asked, SizesOrRatio)
    return choose_target(parent, target.method, sizes=asked.sizes, ratio=asked.ratio, of=asked.of, preset=asked.preset)


def adapt_parameters(target: Target, parent: Shape, stage: int) -> int:
    """Return how many parameters may stay after a stage of Adapt-Pruner, counted from 1; embeddings count.

    What goes is rounded down, as in the published scripts.
    """
    asked = target.asked
    assert isinstance(asked, AdaptPrunerOptions)
    assert asked.ratio is not None
    last = parameters_left(parent, asked.ratio, asked.of)
    return parent.parameters - (parent.parameters - last) * stage // stages_of(target)


def check_stages(recipe: Recipe, name: str, target: Target, parent: Shape) -> None:
    """Refuse stages that cannot be, before any work.

    Raises:
        UserError: naming what is wrong.
    """
    if target.slice_optimizer_state and stages_of(target) == 1:
        raise UserError("slice_optimizer_state is about the training between stages; say stages, or leave it out.")
    if target.stages is None:
        return
    staged = [name for name, method in methods().items() if method.rounds]
    if target.method not in staged:
        raise UserError(f"{target.method} has no stages; {', '.join(staged)} have.")
    if task_of(target) is not None:
        raise UserError("stages choose layers by the loss; leave out task, or stages.")
    arms = recipe.pruned_runs(name)
    if len(arms) != 1:
        raise UserError(
            f"what stages prune depends on the training between them, so there is one budget for pruned arms, not "
            f"{len(arms)}; give one, or a recipe for each."
        )
    shares(recipe, arms[0])
    if target.method != ADAPT:
        shapes = [parent, *(shape for _, shape in stage_targets(target, parent))]
        for number, (before, after) in enumerate(pairwise(shapes), 1):
            after.check_parallel(**target.layout.split)
            if before == after:
                raise UserError(f"stage {number} of {target.stages} would remove nothing; choose fewer stages.")


def _axes(target: Target) -> tuple[str, ...]:
    return ("layers",) if target.method == "minitron-depth" else ("hidden", "ffn", "kv_groups")


def _between(target: Target, parent: Shape, last: Shape, axis: str, stage: int) -> int:
    """Return a size behind a stage: on the line from the first to the last, rounded to what both are multiples of."""
    first, end = getattr(parent, axis), getattr(last, axis)
    limit = {"layers": target.layout.pipeline_parallel, "kv_groups": target.layout.tensor_parallel}
    multiple = math.gcd(first, end, limit.get(axis, _WIDTH_MULTIPLE))
    return int(first - round((first - end) * stage / stages_of(target) / multiple) * multiple)
