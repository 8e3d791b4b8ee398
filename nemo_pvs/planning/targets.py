"""The shapes of a recipe's targets, as far as they are known before pruning, and checks that need them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_pvs.checkpoints.nemo.context import check_for_nemo
from nemo_pvs.errors import UserError
from nemo_pvs.model.layout import Layout
from nemo_pvs.model.shape import Shape
from nemo_pvs.planning.checks import check_context, check_training
from nemo_pvs.planning.efficient import about_shape
from nemo_pvs.planning.learned import learned_target
from nemo_pvs.planning.rounds import check_rounds
from nemo_pvs.pruning.method import Expected
from nemo_pvs.pruning.registry import method_named
from nemo_pvs.pruning.sparse.sparsity import Sparsity
from nemo_pvs.pruning.target import with_vocabulary
from nemo_pvs.recipe.options import is_sparse, reads_calibration, vocabulary_of
from nemo_pvs.recipe.recipe import Recipe
from nemo_pvs.recipe.target import DENSE, Target


def masked_parameters(target: Target, shape: Shape) -> int:
    """Return the number of weights that a target's masks will hold at zero; rounding per row may make it less."""
    return Sparsity.parse(target.given["sparsity"]).count(shape.matrix_parameters) if is_sparse(target) else 0


def expected_shape(target: Target, parent: Shape) -> Expected:
    """Return the expected shape of a target.

    Raises:
        UserError: the parent cannot be pruned to it.
    """
    if target.method == DENSE:
        return Expected(parent, exact=True)
    expected = method_named(target.method).expected
    if expected is None:
        how = target.pruning_aware
        return Expected(about_shape(target, parent), exact=False, uneven=how is None or not how.uniform)
    known = expected(target.asked, parent)
    return known._replace(shape=with_vocabulary(known.shape, target.asked))


def _check_vocabulary(recipe: Recipe, target: Target) -> None:
    """Refuse to prune the vocabulary where the text is given in tokens of the parent only."""
    if vocabulary_of(target) is None:
        return
    given = "data.token_files" if recipe.data.token_files else "evaluate.texts" if recipe.evaluate.texts else None
    if given:
        raise UserError(
            f"vocab changes the tokenizer, but {given} holds the parent's tokens; give the text in data.source, or "
            "prune the vocabulary first (pvs prune --method vocabulary) and make the result the parent."
        )
    if target.stages is not None:
        raise UserError("a target with vocab cannot be reached in rounds; leave out vocab, or stages.")


def check_recipe(recipe: Recipe, parent: Shape, config: Mapping[str, Any]) -> None:
    """Refuse targets that the parent cannot be pruned or trained to, before any work.

    Args:
        recipe: The recipe.
        parent: The parent's shape.
        config: The parent's ``config.json``.

    Raises:
        UserError: a target, a layout or a sequence length is impossible, or no class of the family can load a target.
    """
    layout, context_length = Layout.for_config(config), int(config.get("max_position_embeddings", 0))
    whole = {**layout.defaults, **layout.config(parent, config), "torch_dtype": "bfloat16"}
    check_for_nemo(whole, vocab_rows=parent.vocab)
    calibrates = any(map(reads_calibration, recipe.targets.values()))
    for name in ("calibrate", "train", "evaluate") if calibrates else ("train", "evaluate"):
        check_context(getattr(recipe, name).sequence_length, context_length, f"{name}.sequence_length")
    for name, target in recipe.targets.items():
        try:
            expected = expected_shape(target, parent)
            layout.require_class(expected.shape, uneven=expected.uneven)
            check_rounds(recipe, name, target, parent)
            _check_vocabulary(recipe, target)
            check_training(recipe.train, target.layout, expected.shape, exact=expected.exact)
            if learned := learned_target(recipe, target):
                learned.check(expected.shape, parent)
        except UserError as error:
            raise UserError(f"Target {name}: {error}") from None
    for key in ("clip_before_mask", "mask_check_steps"):
        if getattr(recipe.train, key) and not any(map(is_sparse, recipe.targets.values())):
            raise UserError(f"train.{key} only applies to sparse models, and no target is sparse; leave it out.")
