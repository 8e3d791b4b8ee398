"""The shapes that the targets of a recipe lead to, as far as they are known before pruning."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.planning.checks import check_context, check_training
from nemo_pvs.planning.efficient import about_shape
from nemo_pvs.planning.learned import check_stage, is_trained_first
from nemo_pvs.planning.rounds import check_stages, stage_targets
from nemo_pvs.pruning.input_means import FEATURES
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.structured.unit_counts import UnitRules, unit_counts
from nemo_pvs.pruning.target import choose_target
from nemo_pvs.recipe.options import ADAPT, EFFICIENT, is_sparse
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import DENSE, Target

_STRUCTURES = {"flap": "AL-AM", "wanda-sp": "UL-UM", "magnitude-sp": "UL-UM", "llm-pruner": "UL-UM"}
"""The structure of each method that counts units, where a target names none."""


class Expected(NamedTuple):
    """The shape of a target before it is pruned."""

    shape: Shape
    exact: bool
    """Whether it is decided by numbers alone; else scores decide layer by layer, and this is about their average."""


def masked_parameters(target: Target, shape: Shape) -> int:
    """Return the weights that a target's mask will hold at zero; rows of odd length may round to a few less."""
    return 0 if target.sparsity is None else Sparsity.parse(target.sparsity).count(shape.matrix_parameters)


def expected_shape(target: Target, parent: Shape) -> Expected:
    """Return the shape that a target will have.

    Raises:
        UserError: the parent cannot be pruned to it.
    """
    options = target.options
    if target.method == DENSE:
        return Expected(parent, True)
    if target.sparsity is not None:
        sparsity = Sparsity.parse(target.sparsity)
        for name, inputs in (("q_proj", parent.hidden), ("o_proj", parent.axis("query")), ("down_proj", parent.ffn)):
            sparsity.check(name, (1, inputs))
        return Expected(parent, True)
    if target.method == EFFICIENT:
        return Expected(about_shape(target, parent), False)
    if target.method == ADAPT:
        return Expected(stage_targets(target, parent)[-1][1], False)
    if target.method in _STRUCTURES:
        return _by_units(target, parent, options)
    sizes = {name: options.get(name) for name in ("target", "ratio", "preset")}
    return Expected(choose_target(parent, target.method, of=target.of or "body", **sizes), True)


def _by_units(target: Target, parent: Shape, options: dict[str, Any]) -> Expected:
    structure = target.structure or _STRUCTURES[target.method]
    exact = structure.startswith("UL")
    names = (
        "remove_groups",
        "uniform",
        "ffn_multiple",
        "kv_groups_multiple",
        "compat",
        "protect_first",
        "protect_last",
    )
    rules = UnitRules(
        structure=structure if exact else "UL-MM",
        ratio=options["ratio"],
        round_kept=target.method == "llm-pruner",
        **{name: options[name] for name in names if name in options},
    )
    # Where all layers that are pruned are alike the counts do not depend on the scores.
    counts = unit_counts(
        torch.zeros(parent.layers, parent.kv_groups), torch.zeros(parent.layers, parent.ffn), parent, rules
    )
    shape = parent.with_layers(
        LayerSizes(ffn, groups * parent.heads_per_group, groups) for groups, ffn in zip(*counts, strict=True)
    )
    if target.method == "flap" and target.bias is not False:
        shape = shape.replace(features=tuple(sorted({*shape.features, *FEATURES})))
    return Expected(shape, exact)


def check_recipe(recipe: Recipe, parent: Shape, context_length: int) -> None:
    """Refuse what a parent cannot be pruned or trained to, before any work.

    Raises:
        UserError: a target, a layout or a sequence length is impossible.
    """
    for name in ("calibrate", "train", "evaluate"):
        check_context(getattr(recipe, name).sequence_length, context_length, f"{name}.sequence_length")
    for name, target in recipe.targets.items():
        try:
            expected = expected_shape(target, parent)
            check_stages(recipe, name, target, parent)
            check_training(recipe.train, target.layout, expected.shape, exact=expected.exact)
            if is_trained_first(target):
                check_stage(recipe, target, expected.shape, parent)
        except UserError as error:
            raise UserError(f"Target {name}: {error}") from None
    for key in ("clip_before_mask", "mask_check_steps"):
        if getattr(recipe.train, key) and not any(map(is_sparse, recipe.targets.values())):
            raise UserError(f"train.{key} is about sparse models, and no target is one; leave it out.")
