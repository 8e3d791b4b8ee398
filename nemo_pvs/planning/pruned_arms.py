"""The pruned arms and their costs, from a finished run or estimated from a recipe."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from nemo_pvs.errors import UserError
from nemo_pvs.ledger.budget import PrunedArm
from nemo_pvs.ledger.ledger import Ledger
from nemo_pvs.planning.dry_run import dry_run
from nemo_pvs.planning.equal_terms import pruned_arm
from nemo_pvs.recipe.load import load_recipe
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.reporting.compare.compare import RESULTS, seeds_of
from nemo_pvs.reporting.results import Results


def pruned_arms(run_or_recipe: str) -> list[PrunedArm]:
    """Return the pruned arms of a finished run (a folder with ``results.json``) or of a recipe.

    Of a folder with a run per seed, the first seed's: the others have the same budgets.

    Raises:
        UserError: it is neither, its parent's sizes are not known, or it has no pruned arm.
    """
    results = seeds_of(Path(run_or_recipe))[0] / RESULTS
    arms = _of_run(Results.load(results)) if results.exists() else of_recipe(load_recipe(run_or_recipe))
    if not arms:
        raise UserError(f"{run_or_recipe} has no pruned arm to compare training from scratch with; add one.")
    return arms


def _of_run(results: Results) -> list[PrunedArm]:
    try:
        training = results.recipe["train"]
        length = int(training["sequence_length"])
        per_step = length * int(training["global_batch_size"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"The results of {results.recipe_name} do not state the tokens per training step; give the recipe instead."
        ) from None
    return [
        PrunedArm(
            arm.name, arm.ledger, arm.shape, per_step, length, arm.masked_parameters, *_scratch(results, arm.target)
        )
        for arm in results.arms
        if arm.initialisation == "pruned"
    ]


def _scratch(results: Results, target: str) -> tuple[int, Fraction, Ledger]:
    """Return what the teacher of a target's scratch arm costs, and the arm's cost before training.

    The former is the FLOPs per token and the part of them that the arm is charged.
    """
    scratch = next((arm for arm in results.arms if (arm.target, arm.initialisation) == (target, "random")), None)
    charges = scratch.ledger.charges if scratch else []
    teacher = next((charge for charge in charges if charge.is_teacher_pass), None)
    if scratch is None or teacher is None:
        return 0, Fraction(1), Ledger()
    rate = (teacher.flops or 0) // (teacher.tokens or 1)
    share = Fraction(teacher.tokens or 0, scratch.ledger.training.tokens or 1)
    return (
        rate,
        share,
        Ledger([charge for charge in charges if charge is not teacher and charge.activity != "training"]),
    )


def of_recipe(recipe: Recipe) -> list[PrunedArm]:
    """Return the pruned arms of a recipe with their costs as estimated by a dry run.

    Raises:
        UserError: something in the recipe is impossible, or the parent's sizes are not known here.
    """
    plan = dry_run(recipe)
    shapes = {planned.name: planned.expected.shape for planned in plan.targets}
    return [
        pruned_arm(plan.recipe, planned.arm, shapes[planned.arm.target], plan.parent)
        for planned in plan.arms
        if planned.arm.initialisation == "pruned"
    ]
