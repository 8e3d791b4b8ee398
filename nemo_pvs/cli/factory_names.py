"""What our recipes, methods and launch profiles are called under NeMo's own command. Imports no NeMo."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nemo_pvs.errors import UserError
from nemo_pvs.recipe.recipe import Arm, Recipe


def factory_name(recipe: str) -> str:
    """Return ``pvs_smollm2_135m_demo`` for the recipe ``smollm2_135m/demo``.

    NeMo-Run takes letters, digits and underscores only; a dot becomes a p, as in NeMo's own names.
    """
    return "pvs_" + re.sub(r"\W", "_", recipe.replace(".", "p")).lower()


def factory_call(name: str, recipe: Recipe, arm: Arm) -> str:
    """Return ``pvs_smollm2_135m_demo(target=width,init=pruned)``: how one arm of a recipe is written.

    Args:
        name: The recipe's name.
        recipe: The recipe; what all of its arms have in common is left out.
        arm: One of its runs.
    """
    choices: dict[str, list[str]] = {
        "target": [one.target for one in recipe.runs],
        "init": [one.initialisation for one in recipe.runs],
        "tokens": [_written(one) for one in recipe.runs],
    }
    values = {"target": arm.target, "init": arm.initialisation, "tokens": _written(arm)}
    said = [f"{key}={value}" for key, value in values.items() if len(set(choices[key])) > 1]
    return factory_name(name) + (f"({','.join(said)})" if said else "")


def choose_arm(recipe: Recipe, target: str = "", init: str = "", tokens: float = 0) -> Arm:
    """Return the arm of a recipe that the arguments of its factory mean.

    Args:
        recipe: The recipe.
        target: A key under its ``targets``; may be empty where there is one.
        init: ``pruned`` or ``random``; empty for pruned, where there is that.
        tokens: Training tokens, rounded to steps or not; 0 where all arms have the same.

    Raises:
        UserError: no arm matches, or more than one does.
    """
    found = [
        arm
        for arm in recipe.runs
        if target in ("", arm.target)
        and init in ("", arm.initialisation)
        and (not tokens or abs(arm.tokens - tokens) < arm.training.tokens_per_step)
    ]
    if not init:
        found = [arm for arm in found if arm.initialisation == "pruned"] or found
    if len(found) == 1:
        return found[0]
    among = found or recipe.runs
    raise UserError(
        f"Recipe {recipe.name} has {len(found) or 'no'} matching runs; choose one with "
        f"target={_either(arm.target for arm in among)}, init={_either(arm.initialisation for arm in among)}, "
        f"tokens={_either(_written(arm) for arm in among)}."
    )


def _either(values: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(values))


def _written(arm: Arm) -> str:
    """Return an arm's tokens in short, near enough to find it by: 50e9."""
    tokens = arm.training.tokens
    return f"{tokens / 1e9:g}e9" if tokens >= 1e9 and tokens % 1e6 == 0 else f"{tokens:.0f}"


def prune_factory_name(method: str) -> str:
    """Return ``pvs_minitron_width`` for the method ``minitron-width``, under ``nemo llm prune --factory``."""
    return "pvs_" + re.sub(r"\W", "_", method)


def executor_name(profile: str) -> str:
    """Return ``pvs_slurm_h100`` for the launch profile ``slurm_h100``, under ``run.executor=``."""
    return "pvs_" + re.sub(r"\W", "_", profile)
