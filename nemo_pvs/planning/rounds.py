"""Targets that are reached in rounds of pruning and training: the size after each, and its share of the training.

A recipe asks for them by ``targets.<name>.stages``. That key, and names of records and folders such as
``train/half/stage-1``, keep the older word; elsewhere a *stage* is a stage of ``pvs run``. Does not use NeMo.

Adapt-Pruner (2502.03460) alternates between pruning a few percent and training on a share of the tokens; iterative
Minitron does the same with whole layers or widths. All shares together are one training run, with one learning rate
schedule and one range of the data; each share continues where the previous one ended. The optimizer state is reset
after each pruning, as published, or pruned along with the weights (``slice_optimizer_state``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import Shape
from nemo_pvs.pruning.methods import adapt_pruner
from nemo_pvs.pruning.methods.adapt_pruner import AdaptPrunerOptions
from nemo_pvs.pruning.options import SizesOrRatio
from nemo_pvs.pruning.registry import methods
from nemo_pvs.pruning.target import choose_target, parameters_left, shrunk
from nemo_pvs.recipe.options import rounds_of, task_of
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.target import Target
from nemo_pvs.recipe.training import Training

_WIDTH_MULTIPLE = 8
"""Intermediate widths are multiples of this if the first and the last width are."""


@dataclass(frozen=True)
class RoundTraining:
    """A round's share of the training of an arm."""

    training: Training
    """The arm's settings with the tokens of this share."""
    first_token: int
    """First token that it reads, in training order."""
    first_step: int = 0
    """Steps of all previous shares."""
    all_steps: int | None = None
    """Steps of all shares, the length of the learning rate schedule; None if there is only one share."""


def shares(recipe: Recipe, arm: Arm) -> list[RoundTraining]:
    """Return the shares of an arm's training, which differ by at most one step; just one if it is pruned at once.

    Raises:
        UserError: there are more rounds than steps.
    """
    rounds = rounds_of(recipe.targets[arm.target]) if arm.initialisation == "pruned" else 1
    training = arm.training
    if rounds == 1:
        return [RoundTraining(training, arm.first_token)]
    if rounds > training.steps:
        raise UserError(
            f"{arm.name} is pruned in {rounds} rounds but trains for {training.steps} steps; give fewer stages, or "
            "more tokens."
        )
    bounds = [training.steps * number // rounds for number in range(rounds + 1)]
    often = {name: max(1, getattr(training, name) // rounds) for name in ("validations", "checkpoints")}
    return [
        RoundTraining(
            training.model_copy(update={"tokens": float((end - first) * training.tokens_per_step), **often}),
            arm.first_token + first * training.tokens_per_step,
            first,
            training.steps,
        )
        for first, end in pairwise(bounds)
    ]


def round_targets(target: Target, parent: Shape) -> list[tuple[Target, Shape]]:
    """Return each round's target for its method and its expected shape, in order.

    Every round removes the same number of parameters, ``P_k = P_0 - (P_0 - P_N) k / N``; with Minitron, as nearly as
    whole layers and multiples of widths allow.

    Raises:
        UserError: the parent cannot be pruned to the target.
    """
    numbers = range(1, rounds_of(target) + 1)
    if target.method == adapt_pruner.NAME:
        counts = [adapt_parameters(target, parent, number) for number in numbers]
        return [(target, shrunk(parent, count)) for count in counts]
    last = final_shape(target, parent)
    targets = []
    for number in numbers:
        sizes = {name: _between(target, parent, last, name, number) for name in _axes(target)}
        if last.heads_per_group != parent.heads_per_group:
            sizes["heads"] = sizes["kv_groups"] * _between(target, parent, last, "heads_per_group", number)
        changes: dict[str, Any] = {"ratio": None, "preset": None, "of": None, "stages": None, **sizes}
        targets.append((target.model_copy(update=changes), parent.replace(**sizes)))
    return targets


def final_shape(target: Target, parent: Shape) -> Shape:
    """Return the final shape of a Minitron target.

    Raises:
        UserError: the parent cannot be pruned to it.
    """
    options = target.asked
    assert isinstance(options, SizesOrRatio)
    return choose_target(
        parent, target.method, sizes=options.sizes, ratio=options.ratio, of=options.of, preset=options.preset
    )


def adapt_parameters(target: Target, parent: Shape, number: int) -> int:
    """Return the maximum number of parameters, including embeddings, after a round of Adapt-Pruner, counted from 1.

    The number of removed parameters is rounded down, as in the published scripts.
    """
    options = target.asked
    assert isinstance(options, AdaptPrunerOptions)
    assert options.ratio is not None
    last = parameters_left(parent, options.ratio, options.of)
    return parent.parameters - (parent.parameters - last) * number // rounds_of(target)


def check_rounds(recipe: Recipe, name: str, target: Target, parent: Shape) -> None:
    """Refuse impossible rounds, before any work.

    Raises:
        UserError: naming what is wrong.
    """
    if target.slice_optimizer_state and rounds_of(target) == 1:
        raise UserError(
            "slice_optimizer_state needs training between rounds of pruning; give stages, or leave it out."
        )
    if target.slice_optimizer_state and target.given.get("merge_heads"):
        raise UserError(
            "merged query heads have no optimizer state to keep; leave out merge_heads, or slice_optimizer_state."
        )
    if target.stages is None:
        return
    in_rounds = [name for name, method in methods().items() if method.rounds]
    if target.method not in in_rounds:
        raise UserError(
            f"{target.method} has no rounds of pruning; leave stages out, or choose one of {', '.join(in_rounds)}."
        )
    if task_of(target) is not None:
        raise UserError("rounds of pruning choose layers by the loss; leave out task, or stages.")
    arms = recipe.pruned_runs(name)
    if len(arms) != 1:
        raise UserError(
            f"what a round prunes depends on the training before it, so rounds need exactly one budget for pruned "
            f"arms, not {len(arms)}; give one, or use one recipe per budget."
        )
    shares(recipe, arms[0])
    if target.method != adapt_pruner.NAME:
        shapes = [parent, *(shape for _, shape in round_targets(target, parent))]
        for number, (before, after) in enumerate(pairwise(shapes), 1):
            after.check_parallel(**target.layout.split)
            if before == after:
                raise UserError(f"round {number} of {target.stages} would remove nothing; give fewer stages.")


def _axes(target: Target) -> tuple[str, ...]:
    return ("layers",) if target.method == "minitron-depth" else ("hidden", "ffn", "kv_groups")


def _between(target: Target, parent: Shape, last: Shape, axis: str, number: int) -> int:
    """Return a size after a round, interpolated linearly and rounded to a common divisor of the first and the last."""
    first, end = getattr(parent, axis), getattr(last, axis)
    limit = {
        "layers": target.layout.pipeline_parallel,
        "kv_groups": target.layout.tensor_parallel,
        "heads_per_group": 1,
    }
    multiple = math.gcd(first, end, limit.get(axis, _WIDTH_MULTIPLE))
    return int(first - round((first - end) * number / rounds_of(target) / multiple) * multiple)
