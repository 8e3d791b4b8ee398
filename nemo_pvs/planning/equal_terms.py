"""The cost of a recipe's arms as far as it is known before a run, and the budgets of random arms that match it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from nemo_pvs.ledger.budget import PrunedArm, scratch_budget
from nemo_pvs.ledger.flops import (
    calibration_flops,
    sparse_calibration_flops,
    sweep_flops,
    sweep_tokens,
)
from nemo_pvs.ledger.ledger import Charge, Ledger
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.cached_teacher import teacher_share
from nemo_pvs.planning.charges import DEPTH_SCAN, charge_scores, charge_training, lesson_flops
from nemo_pvs.planning.learned import charge_learning, learned_target
from nemo_pvs.planning.rounds import round_targets, shares
from nemo_pvs.planning.targets import expected_shape, masked_parameters
from nemo_pvs.planning.teacher import charge_teacher, inherit_ancestors, teacher_shape
from nemo_pvs.pruning.methods import adapt_pruner
from nemo_pvs.pruning.methods.adapt_pruner import AdaptPrunerOptions
from nemo_pvs.pruning.methods.minitron_depth import MinitronDepthOptions
from nemo_pvs.pruning.spent import depth_scan_cost
from nemo_pvs.recipe.options import is_sparse, needs_gradients, needs_scores, rounds_of, scans, task_of
from nemo_pvs.recipe.recipe import Arm, Recipe
from nemo_pvs.recipe.target import Target

_ROUNDS = 30
"""Budgets and shares of a teacher cache follow from each other; each round at least halves the error, so that this
many leave less than one optimizer step."""


def settle(recipe: Recipe, parent: Shape, shapes: Mapping[str, Shape] | None = None) -> Recipe:
    """Return a recipe with numbers for budgets such as ``equal-total-tokens``; other recipes are returned unchanged.

    Args:
        recipe: The recipe; its targets have been checked (``planning.targets.check_recipe``).
        parent: Its parent's shape.
        shapes: Shapes of the pruned targets, by name. Without them, the shapes expected before pruning are used; if
            scores decide layer sizes, budgets in FLOPs are then approximate.

    Raises:
        UserError: the pruned arm's cost is not known, or its counterpart would read past the end of its range.
    """
    share = Fraction(1)
    for _ in range(_ROUNDS):
        tokens = {}
        for name, target in recipe.targets.items():
            for run, setting, arm in recipe.matched_runs(name):
                shape = (shapes or {}).get(name) or expected_shape(target, parent).shape
                tokens[run] = scratch_budget(pruned_arm(recipe, arm, shape, parent, share), setting).tokens
        if not tokens:
            return recipe
        recipe, before = recipe.settled(tokens, final=False), share
        # With a shared teacher, budgets decide the shares, and shares the budgets.
        share = teacher_share(recipe)
        if share == before:
            break
    return recipe.settled(tokens)


def pruned_arm(recipe: Recipe, arm: Arm, shape: Shape, parent: Shape, share: Fraction | None = None) -> PrunedArm:
    """Return a pruned arm of a recipe with its cost, including that of its ancestors.

    Args:
        recipe: The recipe.
        arm: The arm.
        shape: Its final shape.
        parent: Shape of the parent.
        share: As for ``planning.teacher.charge_teacher``.
    """
    share = teacher_share(recipe) if share is None else share
    training, target = arm.training, recipe.targets[arm.target]
    distill = recipe.train.distill if recipe.distills(arm.target, "random") else None
    scratch_before, teacher = Ledger(), teacher_shape(recipe, parent)
    inherit_ancestors(scratch_before, recipe, arm.target, "random", parent)
    return PrunedArm(
        arm.name,
        arm_cost(recipe, arm, shape, parent, share),
        shape,
        training.tokens_per_step,
        training.sequence_length,
        masked_parameters(target, shape),
        scratch_teacher_flops=lesson_flops(distill, training.sequence_length, teacher, shape)
        if distill and teacher
        else 0,
        scratch_teacher_share=share,
        scratch_before=scratch_before,
    )


def arm_cost(recipe: Recipe, arm: Arm, shape: Shape, parent: Shape, share: Fraction | None = None) -> Ledger:
    """Return the ledger that an arm will have, including its parent, its pruning and its teacher.

    The arguments are those of ``pruned_arm``.
    """
    ledger = Ledger()
    inherit_ancestors(ledger, recipe, arm.target, arm.initialisation, parent)
    target = recipe.targets[arm.target]
    if arm.initialisation == "pruned":
        ledger.charges += pruning_cost(recipe, target, shape, parent).charges
        shapes = [between for _, between in round_targets(target, parent)] if rounds_of(target) > 1 else [shape]
    else:
        shapes = [shape]
    for part, between in zip(shares(recipe, arm), [*shapes[:-1], shape], strict=True):
        charge_training(ledger, part.training, between, masked_parameters(target, between))
    charge_teacher(ledger, recipe, arm, parent, shape, share)
    return ledger


def pruning_cost(recipe: Recipe, target: Target, shape: Shape, parent: Shape) -> Ledger:
    """Return the cost of pruning to a target; a calibration that several targets share is included in each."""
    settings = recipe.calibrate
    length = settings.sequence_length
    tokens = settings.samples * length
    ledger = Ledger()
    if rounds_of(target) > 1:
        for one, after in round_targets(target, parent):
            ledger.charges += pruning_cost(recipe, one.model_copy(update={"stages": None}), after, parent).charges
            parent = after
        return ledger
    if target.method == adapt_pruner.NAME:
        adapt = target.asked
        assert isinstance(adapt, AdaptPrunerOptions)
        steps = math.ceil(adapt.iterations * (1 - shape.matrix_parameters / parent.matrix_parameters))
        flops = steps * calibration_flops(parent, tokens, length, gradients=True)
        ledger.charges.append(Charge("calibration", steps * tokens, flops, "at each iteration, forward and back"))
    if needs_scores(target):
        ledger.charges.append(charge_scores(parent, tokens, length, gradients=needs_gradients(target)))
    if is_sparse(target) and target.method != "magnitude":
        flops = sparse_calibration_flops(parent, tokens, length, sequential=target.given.get("sequential", True))
        ledger.charges.append(Charge("calibration", tokens, flops, "while pruning, layer by layer"))
    if scans(target):
        text = {"samples": settings.scan_samples, "sequence_length": length}
        options = target.asked
        assert isinstance(options, MinitronDepthOptions)
        models, forwards = depth_scan_cost(options, parent.layers, parent.layers - shape.layers)
        flops = sweep_flops(parent, text, forwards, models)
        ledger.charges.append(Charge("search", sweep_tokens(text, models), flops, DEPTH_SCAN))
    if learned := learned_target(recipe, target):
        charge_learning(ledger, learned, parent)
    if (task := task_of(target)) is not None:
        ledger.charges.append(Charge("search", None, None, f"depth by {task}, unknown until it is measured"))
    return ledger
