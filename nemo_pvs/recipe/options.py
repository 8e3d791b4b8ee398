"""What the targets of a recipe ask of their methods: checked when a recipe is read, and the shapes to expect."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch

from nemo_pvs.errors import UserError
from nemo_pvs.model.shape import LayerSizes, Shape
from nemo_pvs.pipeline.stages.efficient import METHOD as EFFICIENT
from nemo_pvs.pipeline.stages.efficient import about_shape
from nemo_pvs.planning.checks import check_context, check_training
from nemo_pvs.planning.learned import check_stage, is_trained_first
from nemo_pvs.planning.rounds import ADAPT, check_stages, stage_targets, stages_of
from nemo_pvs.pruning.input_means import FEATURES
from nemo_pvs.pruning.methods import METHODS
from nemo_pvs.pruning.request import Options
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.structured.unit_counts import Rules, unit_counts
from nemo_pvs.pruning.target import choose_target
from nemo_pvs.recipe.blocks import DENSE, SIZES, Target
from nemo_pvs.recipe.recipe import Recipe

SCORED = ("minitron-width", "minitron-joint", "shortgpt", "flap", "wanda-sp", "magnitude-sp", "llm-pruner")
"""Methods that read the scores of one calibration, shared by all of a recipe's targets."""
_SCANNING = ("minitron-depth",)
"""Methods that run the model once for every candidate, on fewer sequences."""
_STRUCTURES = {"flap": "AL-AM", "wanda-sp": "UL-UM", "magnitude-sp": "UL-UM", "llm-pruner": "UL-UM"}
"""The structure of each method that counts units, where a target names none."""


class Expected(NamedTuple):
    """The shape of a target before it is pruned."""

    shape: Shape
    exact: bool
    """Whether it is decided by numbers alone; else scores decide layer by layer, and this is about their average."""


def check_options(target: Target) -> None:
    """Refuse a target that asks its method for something that it has not, or does not say how much to remove.

    Raises:
        UserError: naming the option.
    """
    given = target.options
    takes = METHODS[target.method].takes if target.method != DENSE else ()
    foreign = [name for name in given if name not in takes]
    if foreign:
        own = ", ".join(", ".join(SIZES) if name == "target" else name for name in takes) or "none"
        wrong = next((size for size in SIZES if getattr(target, size)), "") if foreign[0] == "target" else foreign[0]
        raise UserError(f"{target.method} has no {wrong}; its own keys are {own}.")
    amounts = [name for name in ("target", "ratio", "preset", "sparsity") if name in takes]
    asked = [name for name in amounts if name in given]
    if amounts and len(asked) != 1:
        known = ", ".join(", ".join(SIZES) if name == "target" else name for name in amounts)
        raise UserError(
            f"{'two things say' if asked else 'nothing says'} how much to remove; "
            f"give {'only one' if asked else 'at least one'} of {known}."
        )
    if target.learn is not None and target.method != "sheared-llama":
        raise UserError(f"{target.method} learns no masks; leave learn out.")
    if target.pruning_aware is not None and target.method != EFFICIENT:
        raise UserError(f"{target.method} removes nothing while it trains; leave pruning_aware out.")
    if target.sparsity is not None:
        Sparsity.parse(target.sparsity)
    if target.method == DENSE and target.keep_parent_embeddings:
        raise UserError("a dense target is not made of the parent's weights; leave keep_parent_embeddings out.")
    if target.task is not None and target.search not in (None, "contiguous"):
        raise UserError("a task compares contiguous runs of layers; leave search out.")
    if target.task is None and (target.task_data or target.task_limit):
        raise UserError("task_data and task_limit are about a task; name one under task, or leave them out.")


def options_of(target: Target) -> Options:
    """Return what a target asks of its method."""
    known = {field.name for field in fields(Options)}
    return Options(**{name: value for name, value in target.options.items() if name in known})


def needs_scores(target: Target) -> bool:
    """Return whether a target is pruned by the scores of a calibration."""
    return target.method in SCORED and stages_of(target) == 1


def needs_gradients(target: Target) -> bool:
    """Return whether that calibration must go back through the model, too."""
    return target.method != DENSE and METHODS[target.method].gradients


def scans(target: Target) -> bool:
    """Return whether a target is found by the loss of every candidate on the calibration text."""
    return target.method in _SCANNING and target.task is None


def reads_calibration(target: Target) -> bool:
    """Return whether a target is pruned by what the calibration split says of the parent."""
    by_size = ("magnitude", "magnitude-sp", DENSE, EFFICIENT, "sheared-llama")
    return target.method not in by_size or needs_scores(target)


def is_sparse(target: Target) -> bool:
    """Return whether a target keeps the parent's shape and has masks."""
    return target.sparsity is not None


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
    rules = Rules(
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
